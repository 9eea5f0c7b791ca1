"""Dead letters by kind: queue, reason, and what was raised.

A queue is looked at again when its counters say that something died or left; so a page costs nothing while nothing
does. A look takes lists without bodies, in slices, of a bounded number of dead letters.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from filao.engine import QueueStats, State
from filao.errors import FilaoError
from filao.guarded import check_cancelled
from filao.overview import Glimpse, Overview, error_kind

LOOKED_AT_MAX = 10_000  # dead letters of one queue that are told apart: a second at most
QUEUES_MAX = 2_000  # of which is remembered what their dead letters are
CHOSEN_MAX = 100_000  # ids that one job takes, some 10 MB; more take another
SHARE = 20  # a queue is not looked at again within so many times the time that it took: matters on RabbitMQ


@dataclass(frozen=True, slots=True)
class Kind:
    """Dead letters that died of the same."""

    queue: str
    reason: str
    error: str
    count: int
    sample: str
    """The id of the one that died last."""
    last_at: datetime


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a queue's dead letters."""

    counted: tuple[int, ...]
    kinds: tuple[Kind, ...]
    looked_at: int
    """How many were told apart."""
    at: float
    took: float
    is_outdated: bool = False
    """Something was done in the queue since."""


class Triage:
    """Belongs to one event loop."""

    def __init__(self, overview: Callable[[], Overview]) -> None:
        self._overview = overview
        self._told: dict[str, Told] = {}
        self._task: asyncio.Task[None] | None = None

    async def kinds(self, queues: Mapping[str, QueueStats], within: float) -> tuple[list[Told], bool]:
        """Return what is known of each queue that has dead letters, the most first, and whether that is the latest.

        After `within` seconds it returns what was known before; the look goes on.
        """
        with_dead = {name: one for name, one in queues.items() if one.dead}
        stale = [one for one in with_dead.values() if self._is_stale(one)]
        if stale and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(stale))
        if stale and self._task is not None:
            await asyncio.wait([self._task], timeout=within)
        told = sorted((one for name, one in self._told.items() if name in with_dead), key=lambda one: -one.counted[0])
        return told, not any(self._is_stale(one) for one in with_dead.values())

    def count(self, queue: str, reason: str, error: str) -> int:
        """Return how many dead letters of a kind were told apart."""
        told = self._told.get(queue)
        kinds = () if told is None else told.kinds
        return sum(kind.count for kind in kinds if (kind.reason, kind.error) == (reason, error))

    def forget(self, queue: str) -> None:
        """Look at a queue again: something was done there. Until that has come, what was told counts as from before."""
        if (told := self._told.get(queue)) is not None:
            self._told[queue] = replace(told, is_outdated=True)

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _is_stale(self, queue: QueueStats) -> bool:
        told = self._told.get(queue.name)
        if told is None or told.is_outdated:
            return True
        return told.counted != _counted(queue) and time.monotonic() > told.at + SHARE * told.took

    async def _look(self, queues: list[QueueStats]) -> None:
        for queue in queues:
            check_cancelled()
            began = time.monotonic()
            kinds: dict[tuple[str, str], list[Glimpse]] = {}
            counts: dict[tuple[str, str], int] = {}
            looked_at = 0
            try:
                async for letter in dead_letters(self._overview(), queue.name, LOOKED_AT_MAX):
                    key = (letter.reason or "", error_kind(letter.error))
                    counts[key] = counts.get(key, 0) + 1
                    looked_at += 1
                    if key not in kinds or letter.at >= kinds[key][0].at:
                        kinds[key] = [letter]
            except FilaoError:
                continue  # it was deleted meanwhile, or the store is away: the page says so
            found = tuple(Kind(queue.name, *key, counts[key], letter.id, letter.at) for key, (letter,) in kinds.items())
            took = time.monotonic() - began
            in_order = tuple(sorted(found, key=lambda kind: -kind.count))
            while len(self._told) >= QUEUES_MAX:
                del self._told[next(iter(self._told))]
            self._told[queue.name] = Told(_counted(queue), in_order, looked_at, time.monotonic(), took)


async def dead_letters(overview: Overview, queue: str, most: int) -> AsyncGenerator[Glimpse]:
    """Yield a queue's dead letters in the order of sending, so many at most, in slices."""
    after: str | None = None
    for first in range(0, most, overview.glance_max):
        limit = min(overview.glance_max, most - first)
        page = await overview.glance(queue, State.DEAD, limit=limit, after=after)
        for letter in page:
            yield letter
        if len(page) < limit:
            return
        after = page[-1].id


def _counted(queue: QueueStats) -> tuple[int, ...]:
    return queue.dead, queue.died, queue.redriven, queue.purged, queue.cancelled
