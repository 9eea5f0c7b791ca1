"""What operators do here: each deed is written into the log before it begins, and how far it came when it ends.

A deed that takes long goes on without the page that asked for it: any page shows how far it is, after a reload too.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from filao.errors import EngineUnavailable, FilaoError
from filao.guarded import check_cancelled
from filao.overview import Deed, Overview

log: logging.Logger = logging.getLogger("filao.dashboard")

RUNNING_MAX = 16  # deeds at a time
REMEMBERED_MAX = 100  # deeds that pages can ask for; the log has all
RECORDED_EVERY = 1.0  # seconds between two notes of how far a deed has come
SLICE = 500  # messages of one step: a few milliseconds of the database's time
RATE_MAX = 10_000.0  # messages per second
TICKS = 5  # steps per second of a deed that is told its rate
AWAY_MAX = 600.0  # seconds that a deed, and the note of its end, wait for a store that is away
ASKS_EVERY = 1.0  # seconds between two attempts while it is
ENDS_WITHIN = 5.0  # seconds for noting down what was stopped, when the dashboard closes
DONE, STOPPED = "done", "stopped"

Step = Callable[[Sequence[str]], Awaitable[int]]
"""Does it to messages with these ids, and returns to how many it did."""


class TooMuchError(Exception):
    """So many deeds are under way that no more is begun."""


class StoppedError(Exception):
    """Somebody stopped a deed; what it has done is counted."""


@dataclass(eq=False, slots=True)
class Job:
    """A deed, here."""

    number: int
    """Its number in the log, by which every dashboard of the store knows it; one of our own, where there is no log."""
    deed: Deed
    wanted: int
    """How many messages it is about: as many as were known when it began, then as many as were chosen."""
    done: int = 0
    unanswered: int = 0
    """Messages that a step no longer found which was taken again, because the store went away before it answered."""
    outcome: str = ""
    """Empty while it goes on; as `Deed.outcome`."""
    is_elsewhere: bool = False
    """Told by the log alone: without an outcome it goes on in another process, or its process died."""
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set when somebody wants it to stop; it does so between two steps."""
    can_stop: bool = False
    """It goes by steps; what an engine does all at once is seen through."""
    ended: float = 0.0
    """When, by the monotonic clock; 0 while it goes on."""


class Jobs:
    """Belongs to one event loop."""

    def __init__(self, overview: Callable[[], Overview]) -> None:
        self._overview = overview
        self._jobs: dict[int, Job] = {}
        self._last = int(time.time() * 1000)  # a page that was told of a job before a restart must not meet another

    def of(self, number: int) -> Job | None:
        """Return a job that is remembered."""
        return self._jobs.get(number)

    async def told(self, number: int) -> Job | None:
        """Return a job that is remembered, or what the log tells of one that another process began."""
        if (job := self._jobs.get(number)) is not None or not number or (kept := self._overview().log) is None:
            return job
        for deed in await kept.deeds(1, number + 1):
            if deed.number == number:
                return Job(number, deed, deed.wanted, deed.done, outcome=deed.outcome, is_elsewhere=True)
        return None

    def running(self) -> list[Job]:
        """Return the jobs that go on, and those that ended lately, the latest first."""
        return [job for job in reversed(self._jobs.values()) if not job.outcome]

    async def begin(self, deed: Deed, work: Callable[[Job], Awaitable[None]]) -> Job:
        """Write a deed into the log and begin it; what cannot be written down is not done.

        Raises `TooMuchError`, and what the log raises.
        """
        if len(self.running()) >= RUNNING_MAX:
            raise TooMuchError
        self._last += 1
        job = self._jobs[self._last] = Job(self._last, deed, deed.wanted)
        try:
            kept = self._overview().log
            number = job.number if kept is None else await kept.begin(deed)
        finally:
            del self._jobs[job.number]
        job.number = number
        self._jobs[number] = job
        log.info(
            "%s: %s %s of queue %r, %d messages", deed.who, deed.what, deed.about or "all", deed.queue, deed.wanted
        )
        while len(self._jobs) > REMEMBERED_MAX:  # fewer than these go on
            del self._jobs[next(number for number, one in self._jobs.items() if one.outcome)]
        job.task = asyncio.create_task(self._run(job, work))
        return job

    def stop(self, number: int) -> None:
        """End a job after the step that it is at; what it has done stays done."""
        if (job := self._jobs.get(number)) is not None:
            job.stopping.set()

    async def close(self) -> None:
        """End all, after the steps that they are at; what takes longer than `ENDS_WITHIN` is left in the middle."""
        tasks: set[asyncio.Task[None]] = set()
        for job in self._jobs.values():
            job.stopping.set()
            if job.task is not None and not job.task.done():
                tasks.add(job.task)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=ENDS_WITHIN)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=ENDS_WITHIN)

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        recording = asyncio.create_task(self._record(job))
        outcome = STOPPED
        try:
            await work(job)
            outcome = DONE
        except StoppedError:
            pass
        except FilaoError as error:
            outcome = str(error)
            job.done += error.done
        except asyncio.CancelledError:
            pass  # what stopped it is told by its outcome
        except Exception as error:
            log.exception("%s of queue %r failed", job.deed.what, job.deed.queue)
            outcome = type(error).__name__
        finally:
            recording.cancel()
            await self._end(job, outcome)

    async def _end(self, job: Job, outcome: str) -> None:
        """Note down how it ended, where it is told at once, and later where the store is away."""
        log.info("%s of queue %r: %s, %d messages", job.deed.what, job.deed.queue, outcome, job.done)
        try:
            trouble = await self._noted(job, outcome)
        finally:
            job.outcome, job.ended = outcome, time.monotonic()
        until = time.monotonic() + AWAY_MAX
        while isinstance(trouble, EngineUnavailable) and time.monotonic() < until:
            await asyncio.sleep(ASKS_EVERY)
            trouble = await self._noted(job, outcome)
        if trouble is not None:
            log.warning("the log was not told how %s of queue %r ended: %s", job.deed.what, job.deed.queue, trouble)

    async def _noted(self, job: Job, outcome: str) -> FilaoError | None:
        """Tell the log how a job ended; return why it could not be told."""
        try:
            if (kept := self._overview().log) is not None:
                await kept.record(job.number, job.done, outcome)
        except FilaoError as error:
            return error
        return None

    async def _record(self, job: Job) -> None:
        """Note how far a job is, every now and then."""
        noted = 0
        while (kept := self._overview().log) is not None:
            await asyncio.sleep(RECORDED_EVERY)
            if job.done != noted:
                with suppress(FilaoError):
                    await kept.record(job.number, job.done)
                check_cancelled()
                noted = job.done


async def in_slices(job: Job, ids: Sequence[str], step: Step, rate: float | None) -> None:
    """Do something to messages, slice by slice; at most `rate` of them a second, also after a step that took long.

    A step that has begun is seen through and counted. Raises `StoppedError` when somebody stops it in between.
    """
    size = SLICE if rate is None else max(1, min(SLICE, round(rate / TICKS)))
    due, job.can_stop = time.monotonic(), True
    for first in range(0, len(ids), size):
        if job.stopping.is_set():
            raise StoppedError
        done = await _seen_through(job, ids[first : first + size], step)
        job.done += done  # not before it is known: the step counts too
        if rate is not None:
            due = max(due + size / rate, time.monotonic())
            await _rested(job, due - time.monotonic())


async def _seen_through(job: Job, ids: Sequence[str], step: Step) -> int:
    """Take a step, again and again while the store is away: what it has done already, it does not do twice."""
    until, is_again, before = time.monotonic() + AWAY_MAX, False, job.done
    while True:
        try:
            done = await step(ids)
        except EngineUnavailable as error:
            if time.monotonic() > until:
                raise
            job.done += error.done
            is_again = True
        else:
            job.unanswered += len(ids) - (job.done - before) - done if is_again else 0
            return done
        await _rested(job, ASKS_EVERY)
        if job.stopping.is_set():
            raise StoppedError


async def _rested(job: Job, seconds: float) -> None:
    """Wait until that many seconds are over, or somebody stops the job."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await job.stopping.wait()
