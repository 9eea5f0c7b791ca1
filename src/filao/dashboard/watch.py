"""Looks at the store again and again, once for all open pages, and remembers the last minutes.

Pages show the last look, so they work while the store is slow or away, and say since when. Looks take no more than
their share of the time: if there are so many queues that a look takes long, there are fewer looks.
"""

import asyncio
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from filao.broker import Broker, check_is_there, overview_of
from filao.engine import OpenAgain, QueueStats
from filao.errors import FilaoError, UnsupportedFeature
from filao.guarded import check_cancelled, for_ever

LOOKS_EVERY = 2.0  # seconds between two looks, while a page is open
QUIET_AFTER = 60.0  # seconds without a request after which there are fewer looks
QUIET_EVERY = 30.0  # seconds between two looks then, so that a page that is opened has a past to show
SHARE = 50  # the pause after a look is so many times as long as the look: 2 % of a core, however many queues there are
ANSWERS_WITHIN = 10.0  # seconds for one look, after which the store counts as away
FIRST_WITHIN = 1.5  # seconds that a page waits for a look that is under way
RECEIVED_LATELY = 60.0  # seconds after a receive for which a queue counts as served, because a poller is rarely seen
POINTS_MAX = 90  # looks that are remembered of each queue: three minutes


@dataclass(slots=True)
class Course:
    """The last minutes of a queue, look by look, the last one at the end."""

    depth: "array[float]" = field(default_factory=lambda: array("f"))
    """Messages that wait: ready, delayed and blocked."""
    rate_in: "array[float]" = field(default_factory=lambda: array("f"))
    """Sent per second."""
    rate_out: "array[float]" = field(default_factory=lambda: array("f"))
    """Acknowledged per second."""
    received_at: float = -RECEIVED_LATELY
    """When a look last saw that something had been received, by the monotonic clock."""

    def add(self, *values: float) -> None:
        """Add the values of a look: depth, rate in, rate out."""
        for points, value in zip((self.depth, self.rate_in, self.rate_out), values, strict=True):
            points.append(value)
            if len(points) > POINTS_MAX:
                del points[0]


_UNKNOWN = Course()


@dataclass(frozen=True, slots=True)
class Look:
    """What a look has seen."""

    number: int = 0
    queues: Mapping[str, QueueStats] = field(default_factory=dict[str, QueueStats])
    seen_at: datetime | None = None
    """When the store last answered; None: it never did."""
    trouble: str = ""
    """Why it has not answered since; empty when it has."""
    began: float = 0.0
    """When this look began, by the monotonic clock."""
    ahead: timedelta = timedelta()
    """By how much the store's clock is ahead of ours, which another machine or a jump may have set otherwise."""

    def now(self) -> datetime:
        """Return the store's time, by which the ages of what it holds are told."""
        return datetime.now(UTC) + self.ahead


class Watch:
    """Looks at one store. It belongs to the event loop that first asked it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.courses: dict[str, Course] = {}
        self._look = Look()
        self._took = 0.0
        self._looked_at = 0.0
        self._remembered_at = 0.0
        self._asked_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._came: asyncio.Future[None] | None = None
        self.is_closed: bool = False

    async def latest(self) -> Look:
        """Return the last look, after waiting a moment for one that is due; begin to look, if nobody has."""
        self._ask()
        if time.monotonic() - self._looked_at > self._pause(LOOKS_EVERY) + LOOKS_EVERY:
            self._hurry.set()
            await self.after(self._look.number, FIRST_WITHIN)
        return self._look

    async def after(self, number: int, within: float) -> Look:
        """Return the first look after the one with this number, or the last one if none comes in time (seconds)."""
        self._ask()
        until = time.monotonic() + within
        while not self.is_closed and self._look.number <= number and (left := until - time.monotonic()) > 0:
            if self._came is None:
                self._came = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._came], timeout=left)
        return self._look

    async def anew(self) -> Look:
        """Look now, because something was done, and return that look, or the last one if it takes too long."""
        now = time.monotonic()
        until = now + FIRST_WITHIN
        while not self.is_closed and self._look.began < now and (left := until - time.monotonic()) > 0:
            self._hurry.set()
            await self.after(self._look.number, left)
        return self._look

    def is_served(self, queue: QueueStats) -> bool:
        """Return whether anybody receives from a queue: waits there, holds a message, or has taken one lately."""
        course = self.courses.get(queue.name, _UNKNOWN)
        return bool(queue.receivers) or time.monotonic() - course.received_at < RECEIVED_LATELY

    async def close(self) -> None:
        """Stop looking, and answer those that wait for a look."""
        self.is_closed = True
        self._tell()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        if not self.is_closed and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(for_ever("the dashboard's watch", self._once))

    def _tell(self) -> None:
        if self._came is not None:
            self._came.set_result(None)
            self._came = None

    def _pause(self, every: float) -> float:
        return max(every, SHARE * self._took)

    async def _once(self) -> None:
        """Look, tell those that wait for it, and rest."""
        self._hurry.clear()
        self._looked_at = began = time.monotonic()
        seen, ahead, trouble = await self._read()
        check_cancelled()
        number = self._look.number + 1
        if trouble:
            self._look = replace(self._look, number=number, trouble=trouble, began=began)
        else:
            queues = {one.name: one for one in seen}
            self._remember(queues, began)
            self._look = Look(number, queues, datetime.now(UTC), began=began, ahead=ahead)
        self._tell()
        is_quiet = time.monotonic() - self._asked_at > QUIET_AFTER
        if trouble:
            self._took = 0.0  # waiting costs nothing
        with_rest = self._pause(QUIET_EVERY if is_quiet else LOOKS_EVERY)
        waiting = asyncio.create_task(self._hurry.wait())
        try:
            await asyncio.wait([waiting], timeout=with_rest)
        finally:
            waiting.cancel()

    async def _read(self) -> tuple[Sequence[QueueStats], timedelta, str]:
        """Return what the store tells, by how much its clock is ahead of ours, and what went wrong."""
        try:
            async with asyncio.timeout(ANSWERS_WITHIN):
                try:
                    return *(await self._figures()), ""
                except OpenAgain:  # there is another file now, or this one again
                    await self.broker.close()
                    return *(await self._figures()), ""
        except TimeoutError:
            return (), timedelta(), f"the store has not answered for {ANSWERS_WITHIN:g} s"
        except FilaoError as error:
            return (), timedelta(), str(error)

    async def _figures(self) -> tuple[Sequence[QueueStats], timedelta]:
        """Return what the store tells, and keep how long that took: to connect is no part of the looks to come."""
        if self._look.seen_at is not None:
            check_is_there(self.broker)
        await self.broker.open()
        began = time.monotonic()
        figures = await self.broker.stats(), await self._ahead()
        self._took = time.monotonic() - began
        return figures

    async def _ahead(self) -> timedelta:
        with suppress(UnsupportedFeature):  # an engine of somebody's own may tell no time
            return await overview_of(self.broker).now() - datetime.now(UTC)
        return timedelta()

    def _remember(self, queues: Mapping[str, QueueStats], now: float) -> None:
        before, past = self._look.queues, max(now - self._remembered_at, 0.001)
        self._remembered_at = now
        for name, one in queues.items():
            was = before.get(name, one)
            waiting = one.ready + one.delayed + one.blocked
            course = self.courses.setdefault(name, Course())
            if one.received > was.received:
                course.received_at = now
            course.add(waiting, max(0.0, (one.sent - was.sent) / past), max(0.0, (one.acked - was.acked) / past))
        for name in self.courses.keys() - queues.keys():
            del self.courses[name]
