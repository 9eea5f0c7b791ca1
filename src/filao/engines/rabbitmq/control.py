"""What operators see and do: how many messages there are, and the dead letters.

A dead letter is looked at by receiving it and giving it back; meanwhile nobody else sees it. Invariant: one program at
a time takes the dead letters of a queue. Otherwise each would see a part of them and take it for all.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelLockedResource
from pamqp.commands import Basic

from filao.engine import Draft, Finding, QueueStats, State, StoredMessage
from filao.engines.rabbitmq import doctor, envelope, register, topology
from filao.engines.rabbitmq.consumer import PREFETCH_MAX
from filao.engines.rabbitmq.errands import Errand, Errands
from filao.engines.rabbitmq.publisher import Limited, Publisher
from filao.engines.rabbitmq.refusals import refused
from filao.engines.rabbitmq.register import Apart, Declared
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY, Server, Session
from filao.engines.rabbitmq.topology import UNDELIVERED, dead_name, ladder
from filao.errors import ConfigurationError, EngineError, EngineUnavailable
from filao.queue import Queue
from filao.slices import Tally

TAKEN, MOVED_TO = "#taken", "#moved-to"  # follow a queue's name; no queue of ours can have such a name
TAKEN_WITHIN = ANSWERS_WITHIN  # seconds until another program has put the dead letters back: thousands take seconds
LAST_TRY = 0.5  # seconds of a call's time that are kept for the last try
LOOK_AGAIN = 0.05  # seconds
REDRIVEN_AT_ONCE = 32  # dead letters; of the largest some 8 MB
CONSUMERS_MAX = 32  # of one look: RabbitMQ 3.10 puts back in order what so many were pushed, and shuffles more
PUSHED_LEAST = 64  # dead letters that one of them is pushed; more only where there would be too many of them
PUSHED_WITHIN = 1.0  # seconds for the next to come, after which we ask whether another program has taken it
BACK_WITHIN = 1.0  # seconds that we wait to see them back, for whoever looks next

T = TypeVar("T")
Publish = Callable[[DeliveredMessage], Awaitable[None]]
Taken = dict[str, int]
"""How many dead letters each queue has whose dead letters this process has taken out."""


class RabbitmqOperators:
    """See `filao.engine.Operators`."""

    pausing: None = None
    tracing: None = None

    def __init__(
        self,
        server: Server,
        declared: Declared,
        publisher: Publisher,
        limited: Limited,
        held: Callable[[], Mapping[str, int]],
    ) -> None:
        self._server = server
        self._declared = declared
        self._publisher = publisher
        self._limited = limited
        self._held = held
        self._taken: Taken = {}
        self._errands = Errands()

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        return await self._declared.learn()

    async def delete(self, queue: str) -> int:
        """Delete a queue without ready messages and dead letters; the server does not tell what consumers hold."""
        async with self._declared.apart(queue) as call:
            await reserve(call, queue)  # what somebody looks at just now is not there
            session = call.session
            held = await session.ready(queue) + await session.ready(dead_name(queue))
            if not held:
                await register.until_heard(session)
                async with session.aside() as channel:
                    await channel.queue_delete(queue)
                    await channel.queue_delete(dead_name(queue))
                await register.strike_out(session, self._server, queue, partial(remove_ladder, session))
                self._declared.rules.pop(queue, None)
        return held

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Ask the server for the depth of every queue, or of one, and of its dead letters."""
        held = self._held()
        async with self._declared.apart() as call:
            queues = [known.name for known in await self._declared.read(call.session)]
            if queue is not None:
                queues = [self._declared.known(queue).name]
            call.goes_on()
            return [await stats(call.session, one, held.get(one, 0), self._taken) for one in queues]

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return dead letters. Raises `UnsupportedFeature` for other states."""
        return await self.seen(queue, state, lambda message: message, limit=limit, after=after)

    async def seen(
        self, queue: str, state: State, keep: Callable[[StoredMessage], T], *, limit: int, after: str | None = None
    ) -> list[T]:
        """Return what is to be kept of each dead letter; of thousands with their bodies, memory could not hold all."""
        if state is not State.DEAD:
            raise refused(queue, f"peek at {state} messages", "way to look at a message without receiving it")

        async def see(errand: Errand) -> list[T]:
            async with self._declared.apart(queue) as call, _dead(call, queue, self._taken, errand) as look:
                return await peek(look, queue, keep, limit, after)

        return await self._errands.run(see)

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Publish dead letters behind what is ready; of several with one id, all."""
        if edited is not None:
            envelope.check_headers(queue, edited)

        async def publish(message: DeliveredMessage) -> None:
            async with self._limited():
                await self._publisher.redrive(queue, message, edited)

        async def send_back(errand: Errand) -> int:
            with Tally() as tally:
                async with self._declared.apart(queue) as call, _dead(call, queue, self._taken, errand) as look:
                    await redrive(look, publish, ids, limit, tally)
            return tally.done

        return await self._errands.run(send_back)

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete what is ready, or the dead letters."""
        if ids is not None and State.DEAD not in states:
            raise refused(queue, "to cancel one message", "way to find a message in a queue")
        if not {State.READY, State.DEAD} & set(states):
            raise refused(queue, f"to purge {' and '.join(states)} messages", "way to reach them")
        if ids is not None:
            return await self._errands.run(lambda errand: self._discard(errand, queue, ids))
        with Tally() as tally:
            async with self._declared.apart(queue) as call:
                if State.DEAD in states:
                    await reserve(call, queue)  # first, because it may fail
                for state, name in ((State.READY, queue), (State.DEAD, dead_name(queue))):
                    if state in states:
                        tally.done += await purge(call.session, name)
        return tally.done

    async def _discard(self, errand: Errand, queue: str, ids: Sequence[str]) -> int:
        with Tally() as tally:
            async with self._declared.apart(queue) as call, _dead(call, queue, self._taken, errand) as look:
                await discard(look, ids, tally)
        return tally.done

    async def close(self) -> None:
        """Put back all dead letters that are being looked at."""
        await self._errands.close()

    async def report(self, state: str) -> None:
        """Do nothing: the server keeps no list of processes that others could read."""

    async def doctor(self) -> list[Finding]:
        """Examine the server and its queues and say what an operator should know."""
        broken: list[Finding] = []
        try:
            await self._declared.learn()
        except (EngineError, ConfigurationError) as error:  # what was known before is examined nevertheless
            broken.append(Finding("register", "error", str(error)))
        async with self._declared.apart() as call:
            call.goes_on()
            return broken + await doctor.examine(call.session, self._server, self._declared)


async def on_the_ladder(session: Session) -> int:
    """Return how many messages of all queues wait on the ladder; 0 when there is none."""
    waiting = 0
    for name in ladder():
        found = await session.depth(name)
        if found is None:
            return waiting
        waiting += found
    return waiting


async def remove_ladder(session: Session) -> None:
    """Delete the ladder, unless a message waits on it, or came down it for a queue that was deleted."""
    for name in [*ladder(), UNDELIVERED]:
        if await session.ready(name):
            return
    async with session.aside() as channel:
        await topology.remove_ladder(channel)


async def stats(session: Session, queue: str, held: int, taken: Taken) -> QueueStats:
    """Return what the server knows of a queue; `held` is what this process holds, because it does not tell of others.

    Dead letters that this process is looking at count, though the server does not count them meanwhile.
    """
    ready, were_taken = await session.depth(queue), taken.get(queue, 0)
    dead = await session.depth(dead_name(queue)) or 0
    return QueueStats(
        name=queue,
        paused=False,
        ready=ready or 0,
        delayed=0,
        blocked=0,
        leased=held,
        dead=max(dead, taken.get(queue, were_taken)),
        oldest_ready_age=None,
    )


async def purge(session: Session, queue: str) -> int:
    """Delete what is ready in a queue of the server, and return how many messages that were."""
    async with session.aside() as channel:
        return (await channel.queue_purge(queue, timeout=ANSWERS_WITHIN)).message_count or 0


async def peek(look: "_Look", queue: str, keep: Callable[[StoredMessage], T], limit: int, after: str | None) -> list[T]:
    """Return what is to be kept of dead letters, in the order in which they died.

    What strangers sent may have no id, or that of another. Such an id names no place: a walk would repeat itself there.
    """
    found: list[T] = []
    places = 0
    async for message in look.each():
        if envelope.name_of(message.header.properties) == after:
            places += 1
        elif (after is None or places) and len(found) < limit:
            found.append(keep(envelope.stored(queue, message)))
        if after is None and len(found) == limit:
            break
    if after is not None and places != 1:
        if not places:
            raise ConfigurationError(f"queue {queue!r}: there is no dead letter {after!r} to go on behind; begin again")
        named = f"have the id {after!r}" if after else "have no id"
        raise ConfigurationError(
            f"queue {queue!r}: {places:,} dead letters {named}, so none of them is a place to go on behind. Begin "
            f"again with another limit, by which no page ends with one of them"
        )
    return found


async def redrive(look: "_Look", publish: Publish, ids: Sequence[str] | None, limit: int | None, tally: Tally) -> None:
    """Publish dead letters to their queue, some at once, and delete each that was confirmed.

    If only a few are wanted, and these are the first of all, the others are not taken: a step costs its own alone.
    """
    wanted = None if ids is None else set(ids)
    some: list[DeliveredMessage] = []
    look.few = limit if limit is not None and limit <= REDRIVEN_AT_ONCE else 0
    async for message in look.each():
        if wanted is not None and envelope.name_of(message.header.properties) not in wanted:
            continue
        some.append(message)
        if tally.done + len(some) == limit:
            await look.ask_no_more()
            break
        if len(some) == REDRIVEN_AT_ONCE:
            await _redrive(look, publish, some, tally)
            some.clear()
    await _redrive(look, publish, some, tally)


async def _redrive(look: "_Look", publish: Publish, messages: Sequence[DeliveredMessage], tally: Tally) -> None:
    failed: BaseException | None = None
    for message, error in zip(
        messages, await asyncio.gather(*map(publish, messages), return_exceptions=True), strict=True
    ):
        if error is None:
            await look.delete(message)
            tally.done += 1
        failed = failed or error
    if failed is not None:
        raise failed


async def discard(look: "_Look", ids: Sequence[str], tally: Tally) -> None:
    """Delete dead letters by their ids."""
    wanted = set(ids)
    async for message in look.each():
        if envelope.name_of(message.header.properties) in wanted:
            await look.delete(message)
            tally.done += 1


class _Look:
    """A look at the dead letters that there were when it began, in order; meanwhile this process has them.

    Invariant: one consumer at most has room, and all before it have got what lay before what it gets. When the channel
    ends, the server puts back what each was pushed, in order, consumer by consumer, and these by their tags. What goes
    back lines up behind the unseen: so these are taken, too, unless the process dies. No more bodies are held at a time
    than one consumer asks for.
    """

    def __init__(self, channel: Channel, queue: str, most: int, taken: Taken, errand: Errand) -> None:
        self.channel = channel
        self.held = 0
        """How many the server has pushed that were not deleted."""
        self.few = 0
        """How many the first consumer asks for, in the hope that these are all that are wanted; 0: as usual."""
        self._queue = queue
        self._unseen = most
        self._share = min(max(PUSHED_LEAST, -(-most // (CONSUMERS_MAX - 1))), PREFETCH_MAX)  # besides the few
        """How many a consumer asks for."""
        self._taken = taken
        self._errand = errand
        self._pushed: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        self._consumers = 0
        self._tag = ""
        """The consumer that has room, if any has."""
        self._room = 0
        """How many more the server may push to it."""
        self._is_cut_off = False
        channel.on_consumer_cancel_callbacks.add(self._cut_off)

    async def each(self) -> AsyncGenerator[DeliveredMessage]:
        """Take the dead letters one after the other, while somebody wants them."""
        while not self._errand.is_left and (message := await self._next()) is not None:
            yield message
        if self._errand.is_left:
            raise EngineUnavailable("the broker was closed meanwhile")

    async def delete(self, message: DeliveredMessage) -> None:
        """Delete one, so that it does not go back."""
        self._check()
        await self.channel.basic_ack(message.delivery_tag or 0)
        self._room += message.consumer_tag == self._tag
        self.held -= 1
        self._taken[self._queue] -= 1

    async def see_the_rest(self) -> None:
        """Take the unseen as well, so that all goes back in order; unless nothing goes back."""
        if self._is_cut_off or (not self.held and not self._tag):
            return
        while await self._next() is not None:
            pass

    async def ask_no_more(self) -> None:
        """Let the server push nothing in the place of what is deleted."""
        if self._tag:
            await self.channel.basic_cancel(self._tag, timeout=ANSWERS_WITHIN)
        self._tag, self._room = "", 0

    async def _next(self) -> DeliveredMessage | None:
        """Take the next one, but no more than there were at the beginning: more may die meanwhile, without end."""
        if not self._unseen:
            return None
        self._check()
        if self._pushed.empty() and not self._room:
            await self._ask_for(min(self._unseen, self._share, self.few or self._share))
        message = await self._arrived()
        self._unseen = self._unseen - 1 if message else 0
        return message

    async def _ask_for(self, number: int) -> None:
        """Let the server push so many to another consumer; what is deleted makes no room in the last one any more."""
        await self.ask_no_more()
        self._tag, self._room = f"{self._consumers:02}", number
        self._consumers += 1
        self.few = 0
        await self.channel.basic_qos(prefetch_count=number, timeout=ANSWERS_WITHIN)
        await self.channel.basic_consume(
            dead_name(self._queue), self._push, consumer_tag=self._tag, timeout=ANSWERS_WITHIN
        )

    async def _push(self, message: DeliveredMessage) -> None:
        self._room -= 1
        self.held += 1
        self._pushed.put_nowait(message)

    async def _arrived(self) -> DeliveredMessage | None:
        """Wait for the next one; None when there is no more, because another program has taken or deleted it."""
        now = asyncio.get_running_loop().time
        until = now() + ANSWERS_WITHIN
        while self._pushed.empty():
            try:
                async with asyncio.timeout(PUSHED_WITHIN):
                    return await self._pushed.get()
            except TimeoutError:
                found = await self.channel.queue_declare(dead_name(self._queue), passive=True, timeout=ANSWERS_WITHIN)
                self._check()
                if self._pushed.empty() and not found.message_count:
                    return None
                if now() > until:
                    raise
        return self._pushed.get_nowait()

    async def _cut_off(self, _: Basic.Cancel) -> None:
        """Learn that the server has taken back what we hold; it passes over what is deleted then."""
        self._is_cut_off = True

    def _check(self) -> None:
        if self._is_cut_off:
            raise EngineUnavailable(
                f"queue {self._queue!r}: the server has taken its dead letters back: some were held here for longer "
                f"than its consumer_timeout, or {dead_name(self._queue)!r} was deleted. Those that were being redriven "
                f"may come twice. Try again with fewer at once, or raise consumer_timeout (rabbitmq.conf, a policy)."
            )


@asynccontextmanager
async def _dead(call: Apart, queue: str, taken: Taken, errand: Errand) -> AsyncGenerator[_Look]:
    """Look at the present dead letters; when the block ends, those that were not deleted go back in order."""
    await reserve(call, queue)
    errand.has_taken = True
    call.goes_on()
    most = taken[queue] = await call.session.ready(dead_name(queue))
    try:
        async with call.session.aside(confirms=True) as channel:
            look = _Look(channel, queue, most, taken, errand)
            try:
                yield look
            except Exception:
                with suppress(*AWAY, EngineUnavailable):
                    await look.see_the_rest()
                raise
            await look.see_the_rest()
            others = await call.session.depth(dead_name(queue)) or 0
        await _wait_until_back(call.session, dead_name(queue), others + look.held)
    finally:
        del taken[queue]


async def _wait_until_back(session: Session, name: str, wanted: int) -> None:
    """Wait until as many are ready as there should be, so that the next look finds all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(BACK_WITHIN):
            while (await session.depth(name) or 0) < wanted:
                pass


async def reserve(call: Apart, queue: str) -> None:
    """Reserve the dead letters of a queue for this call's session: see `_reserve`."""
    has = "another program has had its dead letters, to look at them or to send them back"
    await _reserve(call, queue, dead_name(queue) + TAKEN, has)


async def reserve_for_move(call: Apart, queue: str) -> None:
    """Let nobody else move messages to a queue: two that took the same messages would publish each twice."""
    moves = "another program moves messages there, and both might bring the same ones"
    await _reserve(call, queue, queue + MOVED_TO, moves)


async def _reserve(call: Apart, queue: str, name: str, taken: str) -> None:
    """Reserve something of a queue for this call's session, until it is closed or its process dies.

    The reservation is a queue that only its own connection may use. Raises `EngineUnavailable` when another program
    does not give it up in time. Since RabbitMQ 4.3 it outlives a node that goes away, until that comes back.
    """
    now = asyncio.get_running_loop().time
    began, until = now(), min(now() + TAKEN_WITHIN, call.until() - LAST_TRY)
    while True:
        try:
            async with call.session.aside() as channel:
                await channel.queue_declare(name, exclusive=True, timeout=ANSWERS_WITHIN)
        except ChannelLockedResource as error:
            if now() > until:
                raise EngineUnavailable(
                    f"queue {queue!r}: for {now() - began:.1f} s {taken}. Nothing was done. Try again, or end a "
                    "program that is paused. If a node of a cluster is away, that program may have been connected to "
                    "it: since RabbitMQ 4.3 such a node must come back, or be given up: rabbitmqctl "
                    "forget_cluster_node."
                ) from error
            await asyncio.sleep(LOOK_AGAIN)
        else:
            return
