"""The user's door: a `Broker` sends to queues and receives from them, on whatever engine its URL names.

It checks and encodes what goes in before any I/O (`draft.py`), hands operations to the batcher, and makes messages of
what comes out. `connect` opens it; it belongs to the event loop that opened it, and any number of tasks may share it.
"""

import asyncio
import os
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args, overload

from msgspec import UNSET, UnsetType

from filao.batching import Batcher
from filao.codec import codec_for, shown
from filao.deferred import Deferred
from filao.draft import PEEK_MAX, RECEIVE_MANY_MAX, by_rules, check_ids, check_limit, check_state, draft, drafts
from filao.engine import (
    Delivery,
    Draft,
    Engine,
    EngineTransaction,
    Extend,
    Feature,
    Finding,
    Outcome,
    QueueStats,
    Receipt,
    Receive,
    Result,
    Send,
    Settle,
    State,
    StoredMessage,
    require,
)
from filao.engines import Durability, engine_for, located
from filao.errors import ConfigurationError, EngineUnavailable, FilaoError
from filao.forks import gate, keep
from filao.message import Guarantee, Message, Transaction, current_transaction, inside
from filao.queue import BODY_MAX_EVER, LEASE_MAX, Queue, T, check_duration, check_name, name_of
from filao.receiving import Receiving

R = TypeVar("R")

_WAITING = (State.READY, State.DELAYED, State.BLOCKED)
CLOSES_WITHIN = 30.0  # seconds, for all that closing does
_NOT_OPEN = "is not open: use it inside `async with filao.connect(…) as broker`"
_open_brokers: "weakref.WeakSet[Broker]" = weakref.WeakSet()


def connect(url: str | Path, *, durability: Durability = "full", clock: Callable[[], float] = time.time) -> "Broker":
    """Return a broker for the engine that `url` names; `async with` opens it and closes it.

    `url` is a path, `sqlite:///relative.db`, `sqlite:////absolute.db`, `sqlite://:memory:`, `postgresql://…`, `amqp://…`.
    With `durability="full"` a send survives a power cut once it returned; with "relaxed" a power cut may undo the last
    moments, but a crash of the process may not. `clock` tells the seconds since 1970, for tests. Raises
    `ConfigurationError` for a URL that cannot be right; opening raises it too, or `EngineError`.
    """
    return Broker(partial(engine_for, located(url), durability=durability, clock=clock))


class Broker:
    """Sends to and receives from the queues of one engine.

    Any call may be cancelled: a send that was under way is stored or not, a receive gives back what it got.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._begin_anew()
        self._unusable = _NOT_OPEN
        self._is_inherited = False

    def _begin_anew(self) -> None:
        self._engine = self._make()
        self._batcher = Batcher(self._engine.execute, self.return_unread, self._engine.lanes)
        self._receiving = Receiving(self, self._engine, self._batcher, self.check_usable, lambda: not self._unusable)
        self._queues: dict[str, Queue] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening = asyncio.Lock()
        self._is_used = False

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if not self._unusable:
            self._check_loop()
            raise ConfigurationError("this broker is open already: the block would close it under those who opened it")
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect to the engine; `async with` does it. Idempotent; what is closed can be opened again, on any loop."""
        if not self._unusable:
            self._check_loop()
            return
        if self._is_inherited:
            self.check_open()
        async with self._opening:
            if not self._unusable:
                return
            if self._is_used:
                opening = self._opening
                self._begin_anew()
                self._opening = opening
            self._is_used = True
            await self._engine.open()
            self._loop = asyncio.get_running_loop()
            self._unusable = ""
            _open_brokers.add(self)

    async def close(self) -> None:
        """Finish what was begun, give back the leases that are still held, and let go, within 30 s. Idempotent.

        Whoever waits for a message is sent home with a `ConfigurationError`. When its time is over or it is cancelled,
        it lets go all the same; leases then run out. Raises `EngineUnavailable` in that case.
        """
        if self._unusable:
            return
        is_orphan = self._loop is not None and self._loop.is_closed()
        if not is_orphan:
            self._check_loop()
            self._check_outside()
        self._unusable = "is closed: open it again, or another with filao.connect"
        _open_brokers.discard(self)
        self._opening = asyncio.Lock()
        if is_orphan:
            self._engine.drop()
            return
        try:
            async with asyncio.timeout(CLOSES_WITHIN):
                try:
                    await self._batcher.drain()
                    self._receiving.at_most_once.close()
                finally:
                    await self._engine.close()
        except TimeoutError:
            raise EngineUnavailable(
                f"closing took longer than {CLOSES_WITHIN:g} s, so the broker has let go at once. What it held comes "
                f"back when its leases run out."
            ) from None

    def return_unread(self, messages: object) -> None:
        """Give back messages that came for somebody who has gone away; for the blocking twin."""
        self._receiving.return_unread(messages)

    def again(self) -> "Broker":
        """Return another broker on the same storage; for the blocking twin, after a fork."""
        return Broker(self._make)

    @property
    def features(self) -> frozenset[Feature]:
        """What this engine can do."""
        return self._engine.features

    @property
    def emulated(self) -> frozenset[Feature]:
        """What this engine can only imitate, for queues that ask for it by `emulate=`."""
        return self._engine.emulated

    def check_open(self) -> None:
        """Raise `ConfigurationError` when the broker is closed, not yet open, or was inherited through a fork."""
        if self._unusable:
            raise ConfigurationError(f"this broker {self._unusable}")

    def check_usable(self, *, anywhere: bool = False) -> None:
        """Raise `ConfigurationError` when a call cannot be made now and, unless it can be `anywhere`, on this loop."""
        self.check_open()
        if not anywhere:
            self._check_loop()
        self._check_outside()

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(
                "this broker is open on another event loop, and can be used only there: open one on each loop, "
                "or use filao.sync, which has a loop of its own"
            )

    def _check_outside(self) -> None:
        transaction = current_transaction.get()
        if transaction is not None and transaction.is_open and transaction.broker is self:
            raise ConfigurationError(
                "this call would wait for the transaction that it is made in: use the transaction's own methods"
            )

    def abandon(self) -> None:
        """Make this broker unusable in a child process, without touching what it shares with its parent."""
        self._unusable = (
            f"was opened by the process that has forked this one (pid {os.getpid()}), and can be used only there: open "
            f"another here, with filao.connect"
        )
        self._is_inherited = True
        self._engine.abandon()
        keep((self._engine, self._batcher, self._loop))

    # --- queues ------------------------------------------------------------------------------------------------------

    async def declare(self, *queues: Queue[Any]) -> None:
        """Create queues, or give existing ones these rules. Idempotent; their messages stay.

        Raises `UnsupportedFeature` for a rule that this engine cannot keep.
        """
        self.check_usable()
        for queue in queues:
            if not isinstance(queue, Queue):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
                raise ConfigurationError(
                    f"declare was given {shown(queue)}; give a queue, such as filao.Queue({shown(queue)})"
                )
            codec_for(queue.body)
        for queue in queues:
            await self._engine.declare(queue)
            self._queues[queue.name] = queue

    async def queues(self) -> list[Queue[Any]]:
        """Return every declared queue with its rules, by name."""
        self.check_usable()
        return await self._engine.queues()

    async def delete_queue(self, queue: str | Queue[Any], *, messages: bool = False) -> None:
        """Delete a queue, with its rules, its counters and what deduplication remembers of it; no other call does.

        Raises `ConfigurationError` when it still holds messages, dead letters included, unless `messages` are to go too.
        """
        self.check_usable()
        name = name_of(queue)
        if messages:
            await self._engine.remove(name, tuple(State), None)
        held = await self._engine.delete(name)
        self._queues.pop(name, None)
        if held:
            raise ConfigurationError(
                f"queue {name!r} was not deleted: it holds {held:,} messages. Receive or purge them first, or delete them "
                f"with it: delete_queue({name!r}, messages=True)"
            )

    def _known(self, queue: str | Queue[T], within: object = None) -> Queue[T] | None:
        """Return a queue that this broker knows; None when `_learn` must ask the engine."""
        self.check_usable(anywhere=within is not None)
        return queue if isinstance(queue, Queue) else self._queues.get(queue)

    async def _learn(self, queue: str | Queue[T]) -> Queue[T]:
        """Learn a queue's rules from the engine."""
        known = self._queues[name_of(queue)] = await self._engine.find(name_of(queue))
        return known

    def known_within(self, queue: str | Queue[T]) -> Queue[T]:
        """Return a queue without asking the engine, whose file a transaction holds; it checks against its own rules."""
        if isinstance(queue, Queue):
            return queue
        check_name(queue)
        return self._queues.get(queue) or Queue(queue, body_max=BODY_MAX_EVER)

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
        in order. While a message with the same `dedup_key`, or with the same `message_id`, is pending, and for the
        queue's `dedup_window` after, nothing is stored and the first one's id is returned with `duplicate=True`: after
        an error that left open whether the message was stored, send again with the same `message_id`. `within` is an
        open `sqlite3` or psycopg connection (or SQLAlchemy's or Django's) on the same storage: the message then appears if and when
        the transaction that it holds commits.

        Raises `QueueNotFound`, `MessageTooLarge`, `MessageNotEncodable`, `MessageError`, `QueueFull`, `EngineError`;
        then nothing was stored.
        """
        known = self._known(queue, within) or (await self._learn(queue) if within is None else self.known_within(queue))
        sent = await by_rules(
            known,
            None if within else self._engine.find,
            lambda rules: draft(
                rules,
                body,
                headers=headers,
                delay=delay,
                priority=priority,
                group=group,
                dedup_key=dedup_key,
                ttl=ttl,
                message_id=message_id,
            ),
        )
        return (await self._send(Send(known.name, (sent,)), within))[0]

    async def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
        within: object = None,
    ) -> list[Receipt]:
        """Store up to 10,000 messages, all or none, and return a receipt for each; see `send_to_queue`."""
        known = self._known(queue, within) or (await self._learn(queue) if within is None else self.known_within(queue))
        fit = partial(
            drafts, bodies=list(bodies), headers=headers, delay=delay, priority=priority, group=group, ttl=ttl
        )
        sent = await by_rules(known, None if within else self._engine.find, fit)
        return await self._send(Send(known.name, sent), within)

    async def send_drafts(self, queue: str, messages: Sequence[Draft]) -> list[Receipt]:
        """Store messages that were checked and encoded before, all or none; for relays."""
        return await self._send(Send((self._known(queue) or await self._learn(queue)).name, messages), None)

    async def _send(self, operation: Send, within: object) -> list[Receipt]:
        if within is None:
            return cast("list[Receipt]", await self._batcher.submit(operation))
        require(self._engine, Feature.WITHIN, "joining a transaction of your own (within=)")
        receipts = self._engine.send_within(within, operation)
        if isinstance(receipts, FilaoError):
            raise receipts
        return receipts

    # --- receive -----------------------------------------------------------------------------------------------------

    @overload
    async def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> Message[T]: ...
    @overload
    async def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: float,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
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

        Waits up to `wait` seconds for one (None: for ever; 0: not at all) and returns None when that ran out. `lease`
        is in seconds, the queue's rule by default. With `guarantee="at-most-once"` the message is deleted, durably,
        before it is returned: it is never delivered again, whatever happens to its consumer. When the call is cancelled
        while that is under way, the next such call on this broker gets the message; with the broker closed, nobody.

        A message whose body does not fit the queue's type becomes a dead letter, `malformed`, and the next is taken.
        Raises `QueueNotFound`, `EngineError`.
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
        """Lease up to `limit` messages, as soon as there is one; an empty list when `wait` ran out.

        Their leases run from now: take no more than you can start soon. See `receive_from_queue`.
        """
        known: Queue[T] = self._known(queue) or await self._learn(queue)
        check_limit(known.name, limit, RECEIVE_MANY_MAX)
        if wait is not None:
            check_duration(f"queue {known.name!r}", "wait", wait)
        if lease is not None:
            check_duration(f"queue {known.name!r}", "lease", lease, least=0.001, most=LEASE_MAX)
        if guarantee not in get_args(Guarantee):
            raise ConfigurationError(f"guarantee is {guarantee!r}; it must be {' or '.join(get_args(Guarantee))}")
        receive = Receive(known.name, limit, lease, waiting=int(wait != 0))
        if wait == 0:
            return (await self._receiving.look(known, receive, guarantee))[0]
        return await self._receiving.wait(known, receive, wait, guarantee)

    async def consume(
        self,
        queue: str | Queue[T],
        *,
        prefetch: int = 1,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> AsyncGenerator[Message[T]]:
        """Yield messages for ever; the caller settles each.

        Up to `prefetch` are leased at once, which is faster; but those that wait for their turn wait within their
        lease. When the loop is left, those that were not yielded go back, their attempts unused.
        """
        ahead: list[Message[T]] = []
        try:
            while True:
                ahead = await self.receive_many(queue, prefetch, lease=lease, guarantee=guarantee)
                ahead.reverse()
                while ahead:
                    yield ahead.pop()
        finally:
            for message in reversed(ahead):
                self._receiving.give_back(message.delivery)

    # --- what messages need of their broker: see `filao.message.Settler` ---------------------------------------------

    def settle(self, delivery: Delivery, outcome: Outcome) -> "asyncio.Future[Result]":
        """End a lease; for messages and workers."""
        self.check_usable()
        return self._batcher.submit(Settle(delivery, outcome))

    async def extend(self, delivery: Delivery, seconds: float) -> None:
        """Let a lease end `seconds` from now; for messages."""
        self.check_usable()
        check_duration(f"queue {delivery.queue!r}", "extend", seconds, least=0.001, most=LEASE_MAX)
        await self._batcher.submit(Extend(delivery, seconds))

    @asynccontextmanager
    async def transaction_for(self, message: Message[Any]) -> AsyncGenerator[Transaction]:
        """Open a transaction with the message's acknowledgement in it; for messages."""
        async with self.transaction() as transaction:
            await transaction.ack(message)
            yield transaction

    @asynccontextmanager
    async def deferred_transaction_for(self, message: Message[Any]) -> AsyncGenerator[Transaction]:
        """Open one that begins with its first statement and acknowledges with its last; for workers."""
        async with self._entered(Deferred(self._engine.transaction)) as transaction:
            yield transaction
            await transaction.ack(message)

    def twin(self) -> "Broker | None":
        """Return a broker on the same storage for another event loop; None where the leases are bound to this one."""
        engine = self._engine.twin()
        return None if engine is None else Broker(lambda: engine)

    def report(self, state: str) -> Awaitable[None]:
        """Let the doctor tell how this process is doing; for workers."""
        return self._engine.report(state)

    # --- transactions ------------------------------------------------------------------------------------------------

    def transaction(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction for statements, sends and acks that shall take effect together or not at all.

        Leaving the block commits durably; an exception undoes all of it. On SQLite it holds the file's one write lock,
        on PostgreSQL a connection: do slow work before. Other calls of this broker wait, so use the transaction's own
        methods inside. Raises `UnsupportedFeature` where the engine has none.
        """
        return self._entered(self._engine.transaction())

    @asynccontextmanager
    async def _entered(self, opening: AbstractAsyncContextManager[EngineTransaction]) -> AsyncGenerator[Transaction]:
        self.check_usable()
        require(self._engine, Feature.TRANSACTIONS, "transactions")
        async with opening as within:
            transaction = Transaction(self, within)
            with inside(transaction):
                yield transaction
        transaction.mark_settled()

    # --- control -----------------------------------------------------------------------------------------------------

    @overload
    async def stats(self, queue: str | Queue[Any]) -> QueueStats: ...
    @overload
    async def stats(self, queue: None = None) -> list[QueueStats]: ...
    async def stats(self, queue: str | Queue[Any] | None = None) -> QueueStats | list[QueueStats]:
        """Return the counters of one queue, or of all, by name. It costs the same at any depth."""
        self.check_usable()
        found = await self._engine.stats(None if queue is None else name_of(queue))
        return found if queue is None else found[0]

    async def peek(
        self,
        queue: str | Queue[Any],
        *,
        state: State | str = State.READY,
        limit: int = 10,
        after: str | None = None,
    ) -> list[StoredMessage]:
        """Return stored messages of one state, in their order, and change nothing.

        `after` is the id of the last message seen: ask again with it for the next page. Raises `ConfigurationError` when
        that message has left the queue meanwhile.
        """
        self.check_usable()
        name = name_of(queue)
        check_limit(name, limit, PEEK_MAX)
        return await self._engine.peek(name, check_state(state), limit=limit, after=after)

    async def dead_letters(
        self, queue: str | Queue[Any], *, limit: int = 100, after: str | None = None
    ) -> list[StoredMessage]:
        """Return dead letters, the oldest message first, each with its reason, last error and history."""
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
        """Send dead letters back to their old places with fresh attempts, and return how many there were.

        All of them, or those with these `ids`, or the first `limit`. A new `body` (and `headers`) replaces the old one;
        that asks for exactly one id. Their histories are kept, and they no longer expire.
        """
        self.check_usable()
        name = name_of(queue)
        if limit is not None:
            check_limit(name, limit, 2**53)
        chosen = None if ids is None else check_ids(name, ids)
        if body is UNSET:
            if headers is not None:
                raise ConfigurationError(f"queue {name!r}: redrive with headers= needs body= too")
            return await self._engine.redrive(name, chosen, limit, None)
        if chosen is None or len(chosen) != 1:
            raise ConfigurationError(f"queue {name!r}: redrive with a new body needs exactly one id in ids=")
        edited = draft(self._known(queue) or await self._learn(queue), body, headers=headers)
        return await self._engine.redrive(name, chosen, limit, edited)

    async def purge(self, queue: str | Queue[Any], *, state: State | str | None = None) -> int:
        """Delete all that waits (ready, delayed and blocked), or all in one `state`, and return how many there were.

        Deduplication forgets what was purged. Purging `leased` messages makes their consumers lose the lease.
        """
        self.check_usable()
        return await self._engine.remove(name_of(queue), _WAITING if state is None else (check_state(state),), None)

    async def cancel(self, queue: str | Queue[Any], message_id: str) -> bool:
        """Delete one message if it still waits; False when it is being worked on, dead or gone."""
        self.check_usable()
        return bool(await self._engine.remove(name_of(queue), _WAITING, check_ids(name_of(queue), [message_id])))

    async def pause(self, queue: str | Queue[Any]) -> None:
        """Stop deliveries from this queue, for all processes; sends and settles go on."""
        self.check_usable()
        await self._engine.pause(name_of(queue), paused=True)

    async def resume(self, queue: str | Queue[Any], *, group: str | None = None) -> None:
        """Resume a paused queue, or one `group` of it that a dead letter halted."""
        self.check_usable()
        name = name_of(queue)
        await (self._engine.pause(name, paused=False) if group is None else self._engine.resume_group(name, group))

    async def doctor(self) -> list[Finding]:
        """Examine the storage and say what an operator should know; on a large file this takes a while."""
        self.check_usable()
        return await self._engine.doctor()


def _before_fork() -> None:
    transaction = current_transaction.get()
    gate.shut(in_transaction=transaction is not None and transaction.is_open)


def _after_fork() -> None:
    gate.inherit()
    for broker in list(_open_brokers):
        broker.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=gate.open, after_in_child=_after_fork)
