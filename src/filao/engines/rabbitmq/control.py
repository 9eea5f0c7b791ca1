"""What operators see and do: how many messages there are, and the dead letters.

A dead letter is looked at by receiving it and giving it back, so that for a moment nobody else sees it. Invariant: one
program at a time takes the dead letters of a queue, or each would see a part and take it for all.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelLockedResource

from filao.engine import Draft, Finding, QueueStats, State, StoredMessage
from filao.engines.rabbitmq import doctor, envelope, register, topology
from filao.engines.rabbitmq.refusals import refused
from filao.engines.rabbitmq.register import Declared
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, Server, Session
from filao.engines.rabbitmq.topology import UNDELIVERED, dead_name, ladder
from filao.errors import ConfigurationError, EngineUnavailable
from filao.queue import Queue

TAKEN = "#taken"  # behind a queue's name; no queue of ours can be called so
TAKEN_WITHIN = ANSWERS_WITHIN  # seconds until somebody else has put the dead letters back: thousands take seconds
LOOK_AGAIN = 0.05  # seconds

Taken = Counter[str]
"""How many dead letters of each queue this process has taken out and not yet put back."""


class RabbitmqOperators:
    """See `filao.engine.Operators`."""

    pausing: None = None
    tracing: None = None

    def __init__(self, server: Server, declared: Declared, held: Callable[[], Mapping[str, int]]) -> None:
        self._server = server
        self._declared = declared
        self._held = held
        self._taken: Taken = Counter()

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        return await self._declared.learn()

    async def delete(self, queue: str) -> int:
        """Delete a queue of which nothing is ready or dead; the server does not tell what others hold of it."""
        await self._declared.rules_of(queue)
        async with self._declared.apart() as session:
            held = await session.depth(queue) or 0
            held += await session.depth(dead_name(queue)) or 0
            if not held:
                async with asyncio.timeout(ANSWERS_WITHIN), session.aside() as channel:
                    await channel.queue_delete(queue)
                    await channel.queue_delete(dead_name(queue))
                await register.strike_out(session, self._server, queue, partial(remove_ladder, session))
                self._declared.rules.pop(queue, None)
        return held

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Ask the server for the depth of every queue, or of one, and of its dead letters."""
        if queue is not None:
            await self._declared.rules_of(queue)
        queues = [known.name for known in await self._declared.learn() if queue in (None, known.name)]
        held = self._held()
        async with self._declared.apart() as session:
            return [await stats(session, one, held.get(one, 0), self._taken) for one in queues]

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return dead letters; nothing else can be looked at."""
        await self._declared.rules_of(queue)
        if state is not State.DEAD:
            raise refused(queue, f"peek at {state} messages", "way to look at a message without receiving it")
        async with self._declared.apart() as session:
            return await peek(session, queue, limit, after, self._taken)

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Publish dead letters behind what is ready."""
        await self._declared.rules_of(queue)
        async with self._declared.apart() as session:
            return await redrive(session, queue, ids, limit, edited, taken=self._taken)

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete what is ready, or the dead letters."""
        await self._declared.rules_of(queue)
        if ids is not None:
            if State.DEAD in states:
                async with self._declared.apart() as session:
                    return await discard(session, queue, ids, self._taken)
            raise refused(queue, "to cancel one message", "way to find a message in a queue")
        async with self._declared.apart() as session:
            if not {State.READY, State.DEAD} & set(states):
                raise refused(queue, f"to purge {' and '.join(states)} messages", "way to reach them")
            ready = await purge(session, queue) if State.READY in states else 0
            if State.DEAD not in states:
                return ready
            await _take(session, queue)
            return ready + await purge(session, dead_name(queue))

    async def report(self, state: str) -> None:
        """Do nothing: the server keeps no list of processes that others could read."""

    async def doctor(self) -> list[Finding]:
        """Examine the server and its queues and say what an operator should know."""
        queues = await self._declared.learn()
        async with self._declared.apart() as session:
            return await doctor.examine(session, self._server, queues, self._declared.strange)


async def on_the_ladder(session: Session) -> int:
    """Return how many messages wait on the ladder, of whatever queue; 0 when there is none."""
    waiting = 0
    for name in ladder():
        found = await session.depth(name)
        if found is None:
            return waiting
        waiting += found
    return waiting


async def remove_ladder(session: Session) -> None:
    """Delete the ladder if nothing waits on it, nor came down it for a queue that was deleted."""
    if not await on_the_ladder(session) and await session.depth(UNDELIVERED) == 0:
        async with session.aside() as channel:
            await topology.remove_ladder(channel)


async def stats(session: Session, queue: str, held: int, taken: Taken) -> QueueStats:
    """Return what the server knows of a queue; `held` is what this process holds of it, for it tells of no other.

    Dead letters that this process looks at are there, though the server does not count them meanwhile.
    """
    ready, out = await session.depth(queue), taken[queue]
    dead = await session.depth(dead_name(queue))
    if taken[queue] < out:  # they went back meanwhile
        dead = await session.depth(dead_name(queue))
    return QueueStats(
        name=queue,
        paused=False,
        ready=ready or 0,
        delayed=0,
        blocked=0,
        leased=held,
        dead=(dead or 0) + taken[queue],
        oldest_ready_age=None,
    )


async def purge(session: Session, queue: str) -> int:
    """Delete what is ready in one of the server's queues, and return how many there were."""
    async with session.aside() as channel:
        return (await channel.queue_purge(queue, timeout=ANSWERS_WITHIN)).message_count or 0


async def peek(session: Session, queue: str, limit: int, after: str | None, taken: Taken) -> list[StoredMessage]:
    """Return dead letters, the first to die first."""
    found: list[StoredMessage] = []
    async with _dead(session, queue, taken) as (_, messages):
        seen = after is None
        async for message in messages:
            if seen:
                found.append(envelope.stored(queue, message))
            elif envelope.name_of(message.header.properties) == after:
                seen = True
            if len(found) == limit:
                break
    if not seen:
        raise ConfigurationError(f"queue {queue!r}: there is no dead letter {after!r} to go on behind; begin again")
    return found


async def redrive(
    session: Session, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None, *, taken: Taken
) -> int:
    """Publish dead letters to their queue, and delete each once that is confirmed."""
    wanted = None if ids is None else set(ids)
    most = len(wanted) if wanted is not None else limit
    done = 0
    back: set[str] = set()
    async with _dead(session, queue, taken) as (channel, messages):
        async for message in messages:
            properties = message.header.properties
            name = envelope.name_of(properties)
            if name in back:
                break  # it has died again meanwhile
            if wanted is not None and name not in wanted:
                continue
            content = message.body if edited is None else edited.content
            new = envelope.redriven(properties, edited)
            await channel.basic_publish(
                content, routing_key=queue, properties=new, mandatory=True, timeout=ANSWERS_WITHIN
            )
            await channel.basic_ack(message.delivery_tag or 0)
            taken[queue] -= 1
            done += 1
            back |= {name} - {""}
            if done == most:
                break
    return done


async def discard(session: Session, queue: str, ids: Sequence[str], taken: Taken) -> int:
    """Delete dead letters by their ids, and return how many there were."""
    wanted = set(ids)
    done = 0
    async with _dead(session, queue, taken) as (channel, messages):
        async for message in messages:
            if envelope.name_of(message.header.properties) in wanted:
                await channel.basic_ack(message.delivery_tag or 0)
                taken[queue] -= 1
                done += 1
    return done


@asynccontextmanager
async def _dead(
    session: Session, queue: str, taken: Taken
) -> AsyncGenerator[tuple[Channel, AsyncGenerator[DeliveredMessage]]]:
    """Give the dead letters there are now, in order; those that were not acknowledged go back when the block ends, or
    we die.

    What goes back lines up behind what went back before, so to keep the order all go together, the unseen as well.
    """
    await _take(session, queue)
    most = await session.depth(dead_name(queue)) or 0  # those that die meanwhile have no end
    async with session.aside(confirms=True) as channel:
        messages = _each(channel, queue, most, taken)
        try:
            yield channel, messages
            async for _ in messages:
                pass
            await channel.basic_nack(0, multiple=True, requeue=True)
        finally:
            taken.pop(queue, None)


async def _take(session: Session, queue: str) -> None:
    """Take the dead letters of a queue for this session alone, until it is closed or its process dies.

    The sign of it is a queue that only its own connection may use. Raises `EngineUnavailable` when somebody else does
    not put them back.
    """
    until = asyncio.get_running_loop().time() + TAKEN_WITHIN
    while True:
        try:
            async with session.aside() as channel:
                await channel.queue_declare(dead_name(queue) + TAKEN, exclusive=True, timeout=ANSWERS_WITHIN)
        except ChannelLockedResource as error:
            if asyncio.get_running_loop().time() > until:
                raise EngineUnavailable(
                    f"queue {queue!r}: for {TAKEN_WITHIN:g} s another program has had its dead letters, to look at "
                    "them or to send them back. Nothing was done. Try again, or end a program that is paused."
                ) from error
            await asyncio.sleep(LOOK_AGAIN)
        else:
            return


async def _each(channel: Channel, queue: str, most: int, taken: Taken) -> AsyncGenerator[DeliveredMessage]:
    for _ in range(most):
        message = await channel.basic_get(dead_name(queue), timeout=ANSWERS_WITHIN)
        if message.delivery_tag is None:
            break
        taken[queue] += 1
        yield message
