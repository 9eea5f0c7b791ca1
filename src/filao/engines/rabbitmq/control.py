"""What operators see and do: how many messages there are, and the dead letters.

A dead letter is looked at by receiving it and giving it back, so that for a moment nobody else sees it.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelNotFoundEntity

from filao.engine import Draft, QueueStats, StoredMessage
from filao.engines.rabbitmq import envelope, topology
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, Session
from filao.engines.rabbitmq.topology import UNDELIVERED, dead_name, ladder
from filao.errors import ConfigurationError


async def depth(session: Session, queue: str) -> int | None:
    """Return how many messages are ready in one of the server's queues; None when there is no such queue."""
    try:
        async with session.aside() as channel:
            return (await channel.queue_declare(queue, passive=True, timeout=ANSWERS_WITHIN)).message_count or 0
    except ChannelNotFoundEntity:
        return None


async def on_the_ladder(session: Session) -> int:
    """Return how many messages wait on the ladder, of whatever queue; 0 when there is none."""
    waiting = 0
    for name in ladder():
        found = await depth(session, name)
        if found is None:
            return waiting
        waiting += found
    return waiting


async def remove_ladder(session: Session) -> None:
    """Delete the ladder if nothing waits on it, nor came down it for a queue that was deleted."""
    if not await on_the_ladder(session) and await depth(session, UNDELIVERED) == 0:
        async with session.aside() as channel:
            await topology.remove_ladder(channel)


async def stats(session: Session, queue: str, held: int) -> QueueStats:
    """Return what the server knows of a queue; `held` is what this process holds of it, for it tells of no other."""
    ready, dead = await depth(session, queue), await depth(session, dead_name(queue))
    return QueueStats(
        name=queue,
        paused=False,
        ready=ready or 0,
        delayed=0,
        blocked=0,
        leased=held,
        dead=dead or 0,
        oldest_ready_age=None,
    )


async def purge(session: Session, queue: str) -> int:
    """Delete what is ready in one of the server's queues, and return how many there were."""
    async with session.aside() as channel:
        return (await channel.queue_purge(queue, timeout=ANSWERS_WITHIN)).message_count or 0


async def peek(session: Session, queue: str, limit: int, after: str | None) -> list[StoredMessage]:
    """Return dead letters, the first to die first."""
    found: list[StoredMessage] = []
    async with _dead(session, queue) as (_, messages):
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
    session: Session, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None
) -> int:
    """Publish dead letters to their queue, and delete each once that is confirmed."""
    wanted = None if ids is None else set(ids)
    most = len(wanted) if wanted is not None else limit
    done = 0
    back: set[str] = set()
    async with _dead(session, queue) as (channel, messages):
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
            done += 1
            back |= {name} - {""}
            if done == most:
                break
    return done


@asynccontextmanager
async def _dead(session: Session, queue: str) -> AsyncGenerator[tuple[Channel, AsyncGenerator[DeliveredMessage]]]:
    """Give the dead letters there are now, in order; those that were not acknowledged go back when the block ends, or
    we die.

    What goes back lines up behind what went back before, so to keep the order all go together, the unseen as well.
    """
    most = await depth(session, dead_name(queue)) or 0  # those that die meanwhile have no end
    async with session.aside(confirms=True) as channel:
        messages = _each(channel, dead_name(queue), most)
        yield channel, messages
        async for _ in messages:
            pass
        await channel.basic_nack(0, multiple=True, requeue=True)


async def _each(channel: Channel, queue: str, most: int) -> AsyncGenerator[DeliveredMessage]:
    for _ in range(most):
        message = await channel.basic_get(queue, timeout=ANSWERS_WITHIN)
        if message.delivery_tag is None:
            break
        yield message
