"""Moving queues, with all that is in them, from one engine to another.

A slice of messages is stored at the target, under their ids, before it is deleted at the source. So a move that is
killed at any point loses nothing, and the next one goes on where it ended. A target that deduplicates recognises by its
id a message that is then sent a second time: both queues are paused until the move is over, so that no id is forgotten
meanwhile.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from filao.checks import check_name
from filao.engine import Draft, Engine, Failure, Feature, QueueStats
from filao.errors import ConfigurationError
from filao.queue import Queue, not_found

SLICE = 100  # messages that are moved at once
LOOK = 1_000  # messages that are checked at once


class Parcel(msgspec.Struct, frozen=True):
    """A message with all that is known of it, on its way from one engine to another.

    Times are milliseconds since 1970.
    """

    handle: int
    """The handle by which its engine finds it."""
    id: str
    draft: Draft
    """With the rest of its delay and of its time to live."""
    sent_at: int
    attempts: int
    history: tuple[Failure, ...] = ()
    expires_at: int | None = None
    reason: str | None = None
    """Why a dead letter died; None for a message that waits."""
    died_at: int = 0


class Key(msgspec.Struct, frozen=True):
    """A `dedup_key` or a `message_id` that is still remembered, although its message has ended."""

    is_id: bool
    key: str
    message: str
    """The id of the message that had it first."""
    until: int
    """Milliseconds since 1970."""


class Memory(msgspec.Struct, frozen=True):
    """What a queue remembers besides its messages."""

    keys: tuple[Key, ...] = ()
    halted: tuple[str, ...] = ()
    """Groups that wait for an operator."""


class Packing(Protocol):
    """Takes messages out of a queue, in the order of sending, except those that consumers hold."""

    async def take(self, limit: int) -> list[Parcel]:
        """Return the next messages, and leave them where they are."""
        ...

    async def delivered(self, parcels: Sequence[Parcel]) -> None:
        """Delete messages that are stored at the target."""
        ...

    async def held(self) -> int:
        """Return how many messages are there but cannot be taken, as far as is known: consumers hold them, say."""
        ...


class Mover(Protocol):
    """What a move needs of the engine at either end."""

    async def identity(self) -> str:
        """Return a text that two engines share if, and only if, they are on the same storage."""
        ...

    def check(self, queue: Queue[Any], drafts: Sequence[Draft] = ()) -> None:
        """Raise `UnsupportedFeature` for a queue that cannot be declared here, or a message that cannot be kept."""

    def packing(self, queue: str) -> AbstractAsyncContextManager[Packing]:
        """Begin to move a queue's messages away."""
        ...

    def alone(self, queue: str) -> AbstractAsyncContextManager[None]:
        """Let no other move bring messages to this queue meanwhile, where two would store the same ones twice."""
        ...

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Store messages from another engine in this order, except those that were stored before."""
        ...

    async def memory(self, queue: str) -> Memory:
        """Return what the queue remembers besides its messages."""
        ...

    async def remember(self, queue: str, memory: Memory) -> None:
        """Remember what another engine remembered, except what is known here already."""


class Movable(Engine, Protocol):
    """An engine from which and to which queues can be moved."""

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
    """Messages that stay, because consumers hold them or they wait on RabbitMQ's ladder of delays: move again later."""


async def plan(source: Movable, target: Movable, names: Sequence[str]) -> list[Moved]:
    """Return what there is to move, and change nothing.

    Raises `UnsupportedFeature` for a queue or a message that the target cannot keep, `QueueNotFound`, and
    `ConfigurationError` when both are the same storage.
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
    source: Movable, target: Movable, names: Sequence[str], on_moved: Callable[[Moved], None] = lambda _: None
) -> list[Moved]:
    """Move queues (none named: all), and tell how far each has come, from its beginning on.

    A queue that is new to the target is declared there with the same rules; one that it knows keeps its own. The queue
    at the source stays, paused and empty. Raises what `plan` raises, before anything has moved.
    """
    await plan(source, target, names)
    queues = await _chosen(source, names)
    there = {queue.name for queue in await target.operators.queues()}
    for queue in queues:
        if queue.name not in there:
            await target.declare(queue)
    return [await _move(source, target, queue.name, on_moved) for queue in queues]


async def _chosen(source: Movable, names: Sequence[str]) -> list[Queue]:
    known = {queue.name: queue for queue in await source.operators.queues()}
    for name in names:
        check_name(name)
        if name not in known:
            raise not_found(name, known)
    if not known:
        raise ConfigurationError(f"{source.name} has no queue to move")
    return [known[name] for name in dict.fromkeys(names or known)]


async def _planned(source: Movable, target: Movable, queue: Queue, stats: QueueStats) -> Moved:
    memory = await source.mover.memory(stats.name)
    waiting = stats.ready + stats.delayed + stats.blocked
    async with source.mover.packing(stats.name) as packing:
        if Feature.PEEK in source.features and Feature.PEEK not in target.features:  # such a target keeps less
            while parcels := await packing.take(LOOK):
                target.mover.check(queue, [parcel.draft for parcel in parcels])
        return Moved(stats.name, waiting, stats.dead, len(memory.keys), await packing.held())


async def _move(source: Movable, target: Movable, queue: str, on_moved: Callable[[Moved], None]) -> Moved:
    async with target.mover.alone(queue):
        return await _move_alone(source, target, queue, on_moved)


async def _move_alone(source: Movable, target: Movable, queue: str, on_moved: Callable[[Moved], None]) -> Moved:
    moved = Moved(queue, 0, 0)
    on_moved(moved)
    for pausing in (source.operators.pausing, target.operators.pausing):
        if pausing is not None:
            await pausing.pause(queue, paused=True)
    async with source.mover.packing(queue) as packing:
        while parcels := await packing.take(SLICE):
            await target.mover.unpack(queue, parcels)
            await packing.delivered(parcels)
            dead = sum(parcel.reason is not None for parcel in parcels)
            moved = Moved(queue, moved.waiting + len(parcels) - dead, moved.dead + dead)
            on_moved(moved)
        held = await packing.held()
    memory = await source.mover.memory(queue)
    await target.mover.remember(queue, memory)
    for group in memory.halted:  # it halts with its messages, and not here if they come back
        if source.operators.pausing is not None:
            await source.operators.pausing.pause_group(queue, group, paused=False)
    if target.operators.pausing is not None:
        await target.operators.pausing.pause(queue, paused=False)
    keys = len(memory.keys) if Feature.DEDUPLICATION in target.features else 0
    moved = msgspec.structs.replace(moved, keys=keys, held=held)
    on_moved(moved)
    return moved
