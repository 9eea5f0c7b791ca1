"""The user's door: a `Broker` sends to queues and receives from them, on the engine that its URL names.

It checks and encodes what goes in before any I/O (`draft.py`), hands operations to the batcher, and makes messages of
what comes out. `connect` makes it. It belongs to the event loop that opened it, and any number of tasks may share it.
"""

import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args, overload

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from filao.checks import (
    PEEK_MAX,
    RECEIVE_MANY_MAX,
    check_duration,
    check_ids,
    check_key,
    check_limit,
    is_system_clock,
    is_text,
)
from filao.codec import codec_for, seen_as, shown
from filao.draft import Outgoing, draft, drafts, larger, listed
from filao.engine import Engine, Event, Feature, Finding, QueueStats, Receipt, Receive, State, StoredMessage
from filao.engines import Durability, engine_for, located
from filao.errors import ConfigurationError, MessageTooLarge, UnsupportedFeature
from filao.message import Guarantee, Message, Transaction, entered
from filao.observing import Observers
from filao.overview import Founding, Overview, Seen
from filao.printable import some
from filao.queue import LEASE_MAX, Queue, T, name_of
from filao.receiving import Receiving
from filao.session import Session

_GUARANTEES = get_args(Guarantee)
_WAITING = (State.READY, State.DELAYED, State.BLOCKED)


def connect(
    url: str | Path | Callable[[], Engine],
    *,
    durability: Durability = "full",
    clock: Callable[[], float] = time.time,
) -> "Broker":
    """Return a broker for the engine that `url` names; `async with` opens and closes it.

    `url` is a path, `sqlite:///relative.db`, `sqlite:////absolute.db`, `sqlite://:memory:`, `postgresql://…` or
    `amqp://…`; for an engine of your own, it is a function that makes the engine, without `durability` and `clock`.
    With `durability="full"`, a send that has returned survives a power cut; with "relaxed", a power cut may undo the
    last moments, but a crash of the process cannot. `clock` returns the seconds since 1970, for tests. Raises
    `ConfigurationError` for a URL that cannot be right; opening the broker raises it too, or `EngineError`.
    """
    if callable(url):
        if durability != "full" or not is_system_clock(clock):
            raise ConfigurationError("durability= and clock= are for URLs: give them to what makes your engine")
        return Broker(Session(url))
    return Broker(Session(partial(engine_for, located(url), durability=durability, clock=clock)))


class Broker:
    """Sends to and receives from the queues of one engine.

    Any call may be cancelled: a send is then stored or not, and a receive gives back what it got.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._receiving = Receiving(session)

    @property
    def observers(self) -> Observers:
        """Are told what this broker does: `broker.observers.add(…)`; see `filao.Observer`."""
        return self._session.observers

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._session.open(for_block=True)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect to the engine; `async with` does it. Idempotent. A closed broker can be opened again, on any loop."""
        await self._session.open()

    async def close(self) -> None:
        """Finish what has begun, give back the leases that are still held, and close, within 30 s. Idempotent.

        Callers that wait for a message get a `ConfigurationError`. If that takes too long, `EngineUnavailable` is
        raised. Then, and when the call is cancelled, the broker is closed all the same, and leases run out.
        """
        try:
            await self._session.close()
        finally:
            if not self._session.is_open:
                self._receiving.at_most_once.close()

    @property
    def features(self) -> frozenset[Feature]:
        """What this engine can do."""
        return self._session.engine.features

    @property
    def emulated(self) -> frozenset[Feature]:
        """What this engine can only imitate, for queues that ask for it with `emulate=`."""
        return self._session.engine.emulated

    # --- queues ------------------------------------------------------------------------------------------------------

    async def declare(self, *queues: Queue[Any]) -> None:
        """Create queues, or give existing ones these rules. Idempotent; their messages stay.

        Raises `UnsupportedFeature` for a rule that this engine cannot keep.
        """
        self._session.check_usable()
        for queue in queues:
            _check_queue(queue)
        for queue in queues:
            await self._session.declare(queue)

    async def queues(self) -> list[Queue[Any]]:
        """Return every declared queue with its rules, by name."""
        return await self._session.operators.queues()

    async def delete_queue(self, queue: str | Queue[Any], *, messages: bool = False) -> None:
        """Delete a queue, with its rules, its counters and its remembered keys; no other call does.

        Raises `ConfigurationError` when it still holds messages, including dead letters; with `messages=True` they are
        deleted too.
        """
        name, operators = name_of(queue), self._session.operators
        if messages:
            await operators.remove(name, tuple(State), None)
        held = await operators.delete(name)
        self._session.forget(name)
        if held:
            raise _not_deleted(name, held, purged=messages)

    # --- send --------------------------------------------------------------------------------------------------------

    async def send_to_queue(
        self,
        queue: str | Queue[T],
        body: T,
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        dedup_key: str | None = None,
        ttl: float | None = None,
        message_id: str | None = None,
        within: object = None,
    ) -> Receipt:
        """Store a message; once this returns, it survives a power cut.

        `delay` and `ttl` are seconds. Higher `priority` goes first. Messages of one `group` are handled one at a time,
        in order. While a message with the same `dedup_key` or `message_id` is pending, and for the queue's
        `dedup_window` after that, nothing is stored and the first one's id is returned with `duplicate=True`. So if an
        error leaves open whether the message was stored, send again with the same `message_id`. `within` is an open
        `sqlite3` or psycopg connection (or SQLAlchemy's or Django's) on the same storage, and is used in the calling
        thread: the message appears if and when the transaction on it commits.

        Raises `QueueNotFound`, `MessageTooLarge`, `MessageNotEncodable`, `MessageError`, `QueueFull`, `EngineError`.
        Then nothing was stored, unless the error says that this is open.
        """
        outgoing = Outgoing(
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
        )
        known, since = self._session.known(queue, within), None
        if known is None:
            known, since = await self._session.learned(queue)
        try:
            sent = draft(known, outgoing)
        except MessageTooLarge as error:
            since = since or time.monotonic()
            sent = draft(await larger(known, None if within else self._session.find, error), outgoing)
        return (await self._session.send(known.name, (sent,), within, since))[0]

    async def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T | Outgoing[T]],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
        within: object = None,
    ) -> list[Receipt]:
        """Store up to 10,000 messages, all or none, and return a receipt for each; see `send_to_queue`.

        All have the same terms, except those that bring their own, as `filao.Outgoing`.
        """
        known, since = await self._session.learned(queue, within)
        terms = Outgoing(None, headers=headers, delay=delay, priority=priority, group=group, ttl=ttl)
        bodies = listed(bodies)
        try:
            sent = drafts(known, bodies, terms)
        except MessageTooLarge as error:
            since = since or time.monotonic()
            sent = drafts(await larger(known, None if within else self._session.find, error), bodies, terms)
        return await self._session.send(known.name, sent, within, since)

    # --- receive -----------------------------------------------------------------------------------------------------

    @overload
    async def receive_from_queue(
        self, queue: str | Queue[T], *, wait: None = None, lease: float | None = ..., guarantee: Guarantee = ...
    ) -> Message[T]: ...
    @overload
    async def receive_from_queue(
        self, queue: str | Queue[T], *, wait: float, lease: float | None = ..., guarantee: Guarantee = ...
    ) -> Message[T] | None: ...
    async def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> Message[T] | None:
        """Lease the next message; no other consumer gets it until it is given back or the lease ends.

        It waits up to `wait` seconds for one (None: for ever; 0: not at all), and returns None if none came. `lease` is
        in seconds, the queue's rule by default. With `guarantee="at-most-once"`, the message is durably deleted before
        it is returned: it is never delivered again, whatever happens to its consumer. If the call is cancelled
        meanwhile, the next such call on this broker gets the message; once the broker is closed, nobody does.

        A message whose body does not fit the queue's type becomes a dead letter, `malformed`, and the next one is
        taken. Raises `QueueNotFound`, `EngineError`.
        """
        messages = await self.receive_many(queue, 1, wait=wait, lease=lease, guarantee=guarantee)
        return messages[0] if messages else None

    async def receive_many(
        self,
        queue: str | Queue[T],
        limit: int,
        *,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> list[Message[T]]:
        """Lease up to `limit` messages as soon as there is one; return an empty list if none came within `wait`.

        Their leases run from now, so take no more than you can start soon. See `receive_from_queue`.
        """
        known, since = self._session.known(queue), None
        if known is None:
            known, since = await self._session.learned(queue)
        receive = _asked(known.name, limit, wait, lease, guarantee)
        if wait == 0:
            return (await self._receiving.look(known, receive, guarantee, since))[0]
        return await self._receiving.wait(known, receive, wait, guarantee, since)

    def consume(
        self,
        queue: str | Queue[T],
        *,
        prefetch: int = 1,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> AsyncGenerator[Message[T]]:
        """Yield messages, for ever or until none came for `wait` seconds; the caller settles each.

        Up to `prefetch` are leased at once, which is faster, but their leases run while they wait for their turn. When
        the loop is left, those that were not yielded go back, their attempts unused.
        """
        receive = partial(self.receive_many, queue, prefetch, wait=wait, lease=lease, guarantee=guarantee)
        return self._receiving.each(receive)

    # --- transactions ------------------------------------------------------------------------------------------------

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction for statements, sends and acks that take effect together or not at all.

        Leaving the block commits durably; an exception undoes all of it. The transaction holds the file's one write
        lock on SQLite, and a connection on PostgreSQL: do slow work before. Other calls of this broker wait, so use the
        transaction's own methods inside. Raises `UnsupportedFeature` where the engine has none.
        """
        return entered(self._session)

    # --- control -----------------------------------------------------------------------------------------------------

    @overload
    async def stats(self, queue: str | Queue[Any]) -> QueueStats: ...
    @overload
    async def stats(self, queue: None = None) -> list[QueueStats]: ...
    async def stats(self, queue: str | Queue[Any] | None = None) -> QueueStats | list[QueueStats]:
        """Return the counters of one queue, or of all by name. The cost is the same at any depth."""
        found = await self._session.operators.stats(None if queue is None else name_of(queue))
        return found if queue is None else found[0]

    async def peek(
        self, queue: str | Queue[T], *, state: State | str = State.READY, limit: int = 10, after: str | None = None
    ) -> list[StoredMessage[T]]:
        """Return stored messages of one state, in their order, and change nothing.

        If a `Queue` is given, their bodies are of its type, except those of malformed messages.

        `after` is the id of the last message seen: ask again with it for the next page. Raises `ConfigurationError`
        when that message has left the queue or, on RabbitMQ, when its id is not its own.
        """
        name, operators = name_of(queue), self._session.operators
        check_limit(name, limit, PEEK_MAX)
        _check_after(name, after)
        found = await operators.peek(name, _state(state), limit=limit, after=after)
        return _seen(queue, found)

    async def dead_letters(
        self, queue: str | Queue[T], *, limit: int = 100, after: str | None = None
    ) -> list[StoredMessage[T]]:
        """Return dead letters, the oldest message first, each with its reason and its history; see `peek`."""
        return await self.peek(queue, state=State.DEAD, limit=limit, after=after)

    async def redrive(
        self,
        queue: str | Queue[T],
        *,
        ids: Iterable[str] | None = None,
        limit: int | None = None,
        body: T | UnsetType = UNSET,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """Send dead letters back to their old places with fresh attempts, and return how many those were.

        All of them, or those with these `ids`, or the first `limit` of either. A new `body` (and `headers`) replaces
        the old one; this needs exactly one id. Their histories are kept, and they no longer expire. Many are done in
        slices: an error that comes half-way says how many are done.
        """
        name, operators = name_of(queue), self._session.operators
        if limit is not None:
            check_limit(name, limit, 2**53)
        chosen = None if ids is None else check_ids(name, ids)
        new = _edited(name, chosen, body, headers)
        edited = None if new is None else draft((await self._session.learned(queue))[0], new)
        return await operators.redrive(name, chosen, limit, edited)

    async def purge(self, queue: str | Queue[Any], *, state: State | str | None = None) -> int:
        """Delete all that waits (ready, delayed and blocked), or all in one `state`, and return how many those were.

        Deduplication forgets what was purged. Purging `leased` messages makes their consumers lose the lease. An error
        that comes half-way says how many are done, as with `redrive`.
        """
        states = _WAITING if state is None else (_state(state),)
        return await self._session.operators.remove(name_of(queue), states, None)

    async def cancel(self, queue: str | Queue[Any], message_id: str) -> bool:
        """Delete one message if it still waits; False when it is being worked on, dead or gone."""
        ids = check_ids(name_of(queue), [message_id])
        return bool(await self._session.operators.remove(name_of(queue), _WAITING, ids))

    async def discard(self, queue: str | Queue[Any], *, ids: Iterable[str]) -> int:
        """Delete the dead letters with these `ids` for good, and return how many those were.

        To delete all of them: `purge(queue, state="dead")`.
        """
        return await self._session.operators.remove(name_of(queue), (State.DEAD,), check_ids(name_of(queue), ids))

    async def pause(self, queue: str | Queue[Any], *, group: str | None = None) -> None:
        """Stop deliveries from this queue, or from one `group` of it, to all processes; sends and settles go on.

        Raises `ConfigurationError` for a group of a queue without the rule `group_dead="halt"`: its groups cannot stop.
        """
        await self._pause(queue, group, paused=True)

    async def resume(self, queue: str | Queue[Any], *, group: str | None = None) -> None:
        """Resume a paused queue, or one `group` of it that was paused, or that a dead letter halted."""
        await self._pause(queue, group, paused=False)

    async def _pause(self, queue: str | Queue[Any], group: str | None, *, paused: bool) -> None:
        name, pausing = name_of(queue), self._session.operators.pausing
        if pausing is None:
            raise _cannot(f"queue {name!r}: {'pause' if paused else 'resume'}", self._session, "pauses no queues")
        if group is None:
            await pausing.pause(name, paused=paused)
        else:
            check_key(name, "group", group)
            await pausing.pause_group(name, group, paused=paused)

    async def trace(self, message_id: str) -> list[Event]:
        """Return what happened to the message with this id, the oldest event first, at most the last 1,000 events.

        Only queues declared with `history=True` remember events, for their `history_window`. If the sender gave the
        `message_id`, several queues may have a message with it. Raises `UnsupportedFeature` where the engine remembers
        no events.
        """
        tracing = self._session.operators.tracing
        if tracing is None:
            raise _cannot(f"message {shown(message_id)}: trace", self._session, "remembers no history of messages")
        ids = check_ids("trace", [message_id])
        return await tracing.trace(ids[0]) if ids else []

    async def doctor(self) -> list[Finding]:
        """Examine the storage, and return what an operator should know; on a large file this takes a while."""
        return await self._session.operators.doctor()


def _check_queue(queue: Queue[Any]) -> None:
    if not isinstance(queue, Queue):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise _no_queue(queue)
    codec_for(queue.body)


def _no_queue(given: object) -> ConfigurationError:
    one = f"a queue, such as filao.Queue({shown(given)})" if isinstance(given, str) else "a filao.Queue"
    return ConfigurationError(f"declare was given {shown(given)}; give {one}, or several, as in declare(*queues)")


def _check_after(queue: str, after: str | None) -> None:
    if after is not None and not is_text(after):
        raise ConfigurationError(f"queue {queue!r}: after is {shown(after)}, which no message has for its id")


def _seen(queue: str | Queue[T], found: list[StoredMessage[T]]) -> list[StoredMessage[T]]:
    if not isinstance(queue, Queue) or queue.body is None:
        return found
    return [replace(stored, body=seen_as(queue.body, stored.body)) for stored in found]


def _edited(
    queue: str, ids: Collection[str] | None, body: T | UnsetType, headers: Mapping[str, str] | None
) -> Outgoing[T] | None:
    """Return what replaces a dead letter that is redriven; None when it goes back as it is."""
    if body is UNSET:
        if headers is not None:
            raise ConfigurationError(f"queue {queue!r}: redrive with headers= needs body= too")
        return None
    if ids is None or len(ids) != 1:
        raise ConfigurationError(f"queue {queue!r}: redrive with a new body needs exactly one id of a message in ids=")
    return Outgoing(body, headers=headers)


def _not_deleted(queue: str, held: int, *, purged: bool) -> ConfigurationError:
    if purged:
        return ConfigurationError(
            f"queue {queue!r} was not deleted: {some(held, 'message')} came into it since this began. Those that "
            f"were in it before are gone. Stop its senders, and delete it again"
        )
    return ConfigurationError(
        f"queue {queue!r} was not deleted: it holds {some(held, 'message')}. Receive or purge them first, or "
        f"delete them with it: delete_queue({queue!r}, messages=True)"
    )


def _cannot(what: str, session: Session, lacks: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{what}: {session.engine.name} {lacks}. Engines that can: SQLite, PostgreSQL.")


def _asked(queue: str, limit: int, wait: float | None, lease: float | None, guarantee: Guarantee) -> Receive:
    """Check the arguments of a receive, and return its operation."""
    check_limit(queue, limit, RECEIVE_MANY_MAX)
    if wait is not None:
        check_duration(f"queue {queue!r}", "wait", wait)
    if lease is not None:
        check_duration(f"queue {queue!r}", "lease", lease, least=0.001, most=LEASE_MAX)
    if guarantee not in _GUARANTEES:
        raise ConfigurationError(
            f"guarantee is {shown(guarantee)}; it must be {' or '.join(_GUARANTEES)}. For effects "
            "that happen exactly once, see message.transaction()"
        )
    return Receive(queue, limit, lease, waiting=int(wait != 0))


async def received_at_once(
    broker: Broker, queue: str | Queue[T], limit: int, *, wait: float | None, lease: float | None, guarantee: Guarantee
) -> list[Message[T]] | None:
    """Return what `receive_many` would, if the calling thread can get it without waiting; otherwise None."""
    known = session_of(broker).known(queue)
    if known is None or guarantee != "at-least-once":
        return None
    return await receiving_of(broker).at_once(known, _asked(known.name, limit, wait, lease, guarantee))


def session_of(broker: Broker) -> Session:
    """Return a broker's session; for workers, relays and the blocking twin."""
    return broker._session  # noqa: SLF001 - the users of a broker do not see it


def receiving_of(broker: Broker) -> Receiving:
    """Return the object by which a broker receives; for the blocking twin."""
    return broker._receiving  # noqa: SLF001


def overview_of(broker: Broker) -> Overview:
    """Return what the dashboard sees of a broker's engine. Raises `UnsupportedFeature` where that hands out nothing."""
    engine = session_of(broker).engine
    if not isinstance(engine, Seen):
        raise UnsupportedFeature(f"{engine.name} shows nothing to the dashboard: it has no overview")
    return engine.overview


def check_is_there(broker: Broker) -> None:
    """Raise `EngineUnavailable` if opening a broker again made an empty storage, in which nobody would find anything.

    For those who only watch what was there.
    """
    session = session_of(broker)
    if not session.is_open and isinstance(session.engine, Founding):
        session.engine.check_is_there()


def _state(state: State | str) -> State:
    if not isinstance(state, str) or state not in tuple(State):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"state is {shown(state)}; it must be one of {', '.join(State)}")
    return State(state)
