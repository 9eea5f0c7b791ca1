"""Dead letters by kind: queue, reason, and what was raised.

A queue is looked at again when its counters show that something died or left; until then a page costs nothing. A look
reads lists without bodies, in slices, of a bounded number of dead letters.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from filao.engine import QueueStats, State
from filao.errors import ConfigurationError, FilaoError
from filao.guarded import check_cancelled
from filao.overview import Glimpse, Overview, error_kind

LOOKED_AT_MAX = 10_000  # dead letters of one queue that are looked at: a second at most
QUEUES_MAX = 2_000  # queues whose kinds of dead letters are remembered
CHOSEN_MAX = 100_000  # ids that one job takes, some 10 MB
BEGUN_AGAIN_MAX = 20  # times that a walk begins again, because the message behind which it was to go on has left
SHARE = 20  # a queue is not looked at again within so many times the time that the look took, which matters on RabbitMQ


@dataclass(frozen=True, slots=True)
class Kind:
    """Dead letters of one queue with the same reason and kind of error."""

    queue: str
    reason: str
    error: str
    count: int
    sample: str
    """The id of the one that died last."""
    last_at: datetime


@dataclass(frozen=True, slots=True)
class Triaged:
    """What is known of a queue's dead letters."""

    counted: tuple[int, ...]
    kinds: tuple[Kind, ...]
    looked_at: int
    """How many were looked at."""
    at: float
    took: float
    is_outdated: bool = False
    """Whether something was done in the queue since."""


class Triage:
    """Sorts dead letters by kind, and remembers the result. It belongs to one event loop."""

    def __init__(self, overview: Callable[[], Overview]) -> None:
        self._overview = overview
        self._triaged: dict[str, Triaged] = {}
        self._task: asyncio.Task[None] | None = None

    async def kinds(self, queues: Mapping[str, QueueStats], within: float) -> tuple[list[Triaged], bool]:
        """Return what is known of each queue with dead letters, those with most first, and whether it is up to date.

        After `within` seconds it returns what was known before, and the look goes on.
        """
        with_dead = {name: one for name, one in queues.items() if one.dead}
        stale = [one for one in with_dead.values() if self._is_stale(one)]
        if stale and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._look(stale))
        if stale and self._task is not None:
            await asyncio.wait([self._task], timeout=within)
        triaged = sorted(
            (one for name, one in self._triaged.items() if name in with_dead), key=lambda one: -one.counted[0]
        )
        return triaged, not any(self._is_stale(one) for one in with_dead.values())

    def count(self, queue: str, reason: str, error: str) -> int:
        """Return how many dead letters of a kind were found at the last look."""
        triaged = self._triaged.get(queue)
        kinds = () if triaged is None else triaged.kinds
        return sum(kind.count for kind in kinds if (kind.reason, kind.error) == (reason, error))

    def forget(self, queue: str) -> None:
        """Look at a queue again, because something was done there; until then what is known of it is outdated."""
        if (triaged := self._triaged.get(queue)) is not None:
            self._triaged[queue] = replace(triaged, is_outdated=True)

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _is_stale(self, queue: QueueStats) -> bool:
        triaged = self._triaged.get(queue.name)
        if triaged is None or triaged.is_outdated:
            return True
        return triaged.counted != _counted(queue) and time.monotonic() > triaged.at + SHARE * triaged.took

    async def _look(self, queues: list[QueueStats]) -> None:
        for queue in queues:
            check_cancelled()
            began = time.monotonic()
            latest: dict[tuple[str, str], Glimpse] = {}
            counts: Counter[tuple[str, str]] = Counter()
            try:
                async for letter in dead_letters(self._overview(), queue.name, LOOKED_AT_MAX):
                    key = (letter.reason or "", error_kind(letter.error))
                    counts[key] += 1
                    if key not in latest or letter.at >= latest[key].at:
                        latest[key] = letter
            except FilaoError:
                continue  # the queue was deleted, or the store is away: the page says so
            kinds = tuple(
                Kind(queue.name, *key, count, latest[key].id, latest[key].at) for key, count in counts.most_common()
            )
            while len(self._triaged) >= QUEUES_MAX:
                del self._triaged[next(iter(self._triaged))]
            now = time.monotonic()
            self._triaged[queue.name] = Triaged(_counted(queue), kinds, counts.total(), now, now - began)


async def dead_letters(overview: Overview, queue: str, most: int) -> AsyncGenerator[Glimpse]:
    """Yield a queue's dead letters in the order of sending, each once, at most `most` of them, in slices.

    An id that its sender has given names no place once its message has left, as when another dashboard discards it; the
    walk begins again then, past what was seen.
    """
    after: str | None = None
    seen: set[str] = set()
    looked = begun_again = 0
    while looked < most:
        limit = min(overview.glance_max, most - looked)
        try:
            page = await overview.glance(queue, State.DEAD, limit=limit, after=after)
        except ConfigurationError:
            begun_again += 1
            if after is None or begun_again > BEGUN_AGAIN_MAX:
                raise
            after, looked = None, 0
            continue
        for letter in page:
            if letter.id not in seen:
                yield letter
            if letter.id:  # of what strangers sent to RabbitMQ, many have none
                seen.add(letter.id)
        if len(page) < limit:
            return
        looked += len(page)
        after = page[-1].id


def _counted(queue: QueueStats) -> tuple[int, ...]:
    return queue.dead, queue.died, queue.redriven, queue.purged, queue.cancelled
