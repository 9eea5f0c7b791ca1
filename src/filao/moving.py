"""Moving house: queues, with all that is in them, from one engine to another.

A slice of messages is stored at the target, by their ids, before it is deleted at the source; so a move that is killed
at any point loses nothing, and the next one begins where it ended. A message that is then stored a second time is known
by its id at a target that deduplicates: both queues are paused until the move is over, so that nothing ends and is
forgotten meanwhile.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from filao.engine import Draft, Engine, Failure, Feature, QueueStats
from filao.errors import ConfigurationError
from filao.queue import Queue, not_found

SLICE = 100  # messages that are under way at once
LOOK = 1_000  # messages that are looked at at once


class Parcel(msgspec.Struct, frozen=True):
    """A message with all that is known of it, on its way from one engine to another.

    Times are milliseconds since 1970.
    """

    handle: int
    """What its own engine finds it by."""
    id: str
    draft: Draft
    """With the time to live and the delay that are left."""
    sent_at: int
    attempts: int
    history: tuple[Failure, ...] = ()
    expires_at: int | None = None
    reason: str | None = None
    """Of a dead letter; None: it waits."""
    died_at: int = 0


class Key(msgspec.Struct, frozen=True):
    """A `dedup_key` or a `message_id` that is remembered though its message has ended."""

    is_id: bool
    key: str
    message: str
    """The id of the message that came first."""
    until: int
    """Milliseconds since 1970."""


class Memory(msgspec.Struct, frozen=True):
    """What a queue remembers beside its messages."""

    keys: tuple[Key, ...] = ()
    halted: tuple[str, ...] = ()
    """Groups that wait for an operator."""


class Packing(Protocol):
    """Takes messages out of a queue, in the order of sending, but for those that consumers hold."""

    async def take(self, limit: int) -> list[Parcel]:
        """Return the next messages, which stay where they are."""
        ...

    async def delivered(self, parcels: Sequence[Parcel]) -> None:
        """Delete messages that are safe elsewhere."""
        ...

    async def held(self) -> int:
        """Return how many messages are there and cannot be taken, as far as it is known: consumers hold them, say."""
        ...


class Mover(Protocol):
    """What carrying queues needs of either end."""

    async def identity(self) -> str:
        """Return what two engines have in common if, and only if, they are on the same storage."""
        ...

    def check(self, queue: Queue[Any], drafts: Sequence[Draft] = ()) -> None:
        """Raise `UnsupportedFeature` for a queue that cannot be declared here, or a message that cannot be kept."""

    def packing(self, queue: str) -> AbstractAsyncContextManager[Packing]:
        """Begin to carry a queue's messages elsewhere."""
        ...

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Store messages that came from elsewhere, in this order, but for those that came before."""
        ...

    async def memory(self, queue: str) -> Memory:
        """Return what the queue remembers beside its messages."""
        ...

    async def remember(self, queue: str, memory: Memory) -> None:
        """Remember what another engine remembered, but for what is known here already."""


class Movable(Engine, Protocol):
    """An engine whose queues can be carried away, and to which queues can be carried."""

    @property
    def mover(self) -> Mover: ...


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


async def plan(source: Movable, target: Movable, names: Sequence[str]) -> list[Moved]:
    """Return what there is to move, and change nothing.

    Raises `UnsupportedFeature` for a queue whose rules the target cannot keep, or a message that it cannot,
    `QueueNotFound`, and `ConfigurationError` when both are the same storage.
    """
    if await source.mover.identity() == await target.mover.identity():
        raise ConfigurationError(
            f"source and target are the same storage, on {source.name}: nothing can be moved there"
        )
    queues = await _chosen(source, names)
    there = {queue.name: queue for queue in await target.operators.queues()}
    for queue in queues:
        if queue.name not in there:
            target.mover.check(queue)
    stats = {found.name: found for found in await source.operators.stats()}
    return [await _planned(source, target, there.get(queue.name, queue), stats[queue.name]) for queue in queues]


async def move(
    source: Movable, target: Movable, names: Sequence[str], told: Callable[[Moved], None] = lambda _: None
) -> list[Moved]:
    """Move queues (none named: all), and tell how far each has come.

    A queue that the target has not is declared there with the same rules; one that it has keeps its own. The queue at
    the source stays paused, and empty. Raises what `plan` raises, before anything has moved.
    """
    await plan(source, target, names)
    queues = await _chosen(source, names)
    there = {queue.name for queue in await target.operators.queues()}
    for queue in queues:
        if queue.name not in there:
            await target.declare(queue)
    return [await _move(source, target, queue.name, told) for queue in queues]


async def _chosen(source: Movable, names: Sequence[str]) -> list[Queue]:
    known = {queue.name: queue for queue in await source.operators.queues()}
    for name in names:
        if name not in known:
            raise not_found(name, known)
    if not known:
        raise ConfigurationError(f"{source.name} has no queue to move")
    return [known[name] for name in dict.fromkeys(names or known)]


async def _planned(source: Movable, target: Movable, queue: Queue, stats: QueueStats) -> Moved:
    memory = await source.mover.memory(stats.name)
    waiting = stats.ready + stats.delayed + stats.blocked
    async with source.mover.packing(stats.name) as packing:
        if Feature.PEEK in source.features and Feature.PEEK not in target.features:  # it can keep less
            while parcels := await packing.take(LOOK):
                target.mover.check(queue, [parcel.draft for parcel in parcels])
        return Moved(stats.name, waiting, stats.dead, len(memory.keys), await packing.held())


async def _move(source: Movable, target: Movable, queue: str, told: Callable[[Moved], None]) -> Moved:
    for pausing in (source.operators.pausing, target.operators.pausing):
        if pausing is not None:
            await pausing.pause(queue, paused=True)
    moved = Moved(queue, 0, 0)
    async with source.mover.packing(queue) as packing:
        while parcels := await packing.take(SLICE):
            await target.mover.unpack(queue, parcels)
            await packing.delivered(parcels)
            dead = sum(parcel.reason is not None for parcel in parcels)
            moved = Moved(queue, moved.waiting + len(parcels) - dead, moved.dead + dead)
            told(moved)
        held = await packing.held()
    memory = await source.mover.memory(queue)
    await target.mover.remember(queue, memory)
    if target.operators.pausing is not None:
        await target.operators.pausing.pause(queue, paused=False)
    keys = len(memory.keys) if Feature.DEDUPLICATION in target.features else 0
    moved = msgspec.structs.replace(moved, keys=keys, held=held)
    told(moved)
    return moved
