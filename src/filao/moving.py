"""Moving house: queues, with all that is in them, from one engine to another.

A slice of messages is stored at the target, by their ids, before it is deleted at the source; so a move that is killed
at any point loses nothing, and the next one begins where it ended. A message that is then stored a second time is known
by its id at a target that deduplicates: both queues are paused until the move is over, so that nothing ends and is
forgotten meanwhile.
"""

from collections.abc import Callable, Sequence

import msgspec

from filao.engine import Engine, Feature, QueueStats
from filao.errors import ConfigurationError
from filao.queue import Queue, not_found

SLICE = 100  # messages that are under way at once
LOOK = 1_000  # messages that are looked at at once


class Moved(msgspec.Struct, frozen=True):
    """How far the move of one queue has come, or would go."""

    queue: str
    waiting: int
    """Messages that were waiting."""
    dead: int
    """Dead letters."""
    keys: int = 0
    """Deduplication keys of messages that had ended."""
    held: int = 0
    """Messages that stay, because consumers of the source hold them, or they wait on RabbitMQ's ladder: move again
    later.
    """


async def plan(source: Engine, target: Engine, names: Sequence[str]) -> list[Moved]:
    """Return what there is to move, and change nothing.

    Raises `UnsupportedFeature` for a queue whose rules the target cannot keep, or a message that it cannot,
    `QueueNotFound`, and `ConfigurationError` when both are the same storage.
    """
    if await source.identity() == await target.identity():
        raise ConfigurationError(
            f"source and target are the same storage, on {source.name}: nothing can be moved there"
        )
    queues = await _chosen(source, names)
    there = {queue.name: queue for queue in await target.queues()}
    for queue in queues:
        if queue.name not in there:
            target.check(queue)
    stats = {found.name: found for found in await source.stats()}
    return [await _planned(source, target, there.get(queue.name, queue), stats[queue.name]) for queue in queues]


async def move(
    source: Engine, target: Engine, names: Sequence[str], told: Callable[[Moved], None] = lambda _: None
) -> list[Moved]:
    """Move queues (none named: all), and tell how far each has come.

    A queue that the target has not is declared there with the same rules; one that it has keeps its own. The queue at
    the source stays paused, and empty. Raises what `plan` raises, before anything has moved.
    """
    await plan(source, target, names)
    queues = await _chosen(source, names)
    there = {queue.name for queue in await target.queues()}
    for queue in queues:
        if queue.name not in there:
            await target.declare(queue)
    return [await _move(source, target, queue.name, told) for queue in queues]


async def _chosen(source: Engine, names: Sequence[str]) -> list[Queue]:
    known = {queue.name: queue for queue in await source.queues()}
    for name in names:
        if name not in known:
            raise not_found(name, known)
    if not known:
        raise ConfigurationError(f"{source.name} has no queue to move")
    return [known[name] for name in dict.fromkeys(names or known)]


async def _planned(source: Engine, target: Engine, queue: Queue, stats: QueueStats) -> Moved:
    memory = await source.memory(stats.name)
    waiting = stats.ready + stats.delayed + stats.blocked
    async with source.packing(stats.name) as packing:
        if Feature.PEEK in source.features and Feature.PEEK not in target.features:  # it can keep less
            while parcels := await packing.take(LOOK):
                for parcel in parcels:
                    target.check_draft(queue, parcel.draft)
        return Moved(stats.name, waiting, stats.dead, len(memory.keys), await packing.held())


async def _move(source: Engine, target: Engine, queue: str, told: Callable[[Moved], None]) -> Moved:
    for engine in (source, target):
        if Feature.PAUSE in engine.features:
            await engine.pause(queue, paused=True)
    moved = Moved(queue, 0, 0)
    async with source.packing(queue) as packing:
        while parcels := await packing.take(SLICE):
            await target.unpack(queue, parcels)
            await packing.delivered(parcels)
            dead = sum(parcel.reason is not None for parcel in parcels)
            moved = Moved(queue, moved.waiting + len(parcels) - dead, moved.dead + dead)
            told(moved)
        held = await packing.held()
    memory = await source.memory(queue)
    await target.remember(queue, memory)
    if Feature.PAUSE in target.features:
        await target.pause(queue, paused=False)
    keys = len(memory.keys) if Feature.DEDUPLICATION in target.features else 0
    moved = msgspec.structs.replace(moved, keys=keys, held=held)
    told(moved)
    return moved
