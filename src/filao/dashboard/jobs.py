"""What operators do here: each deed is written into the log before it begins, and its result when it ends.

A long deed goes on without the page that asked for it: every page shows how far it is, even after a reload.
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
from filao.printable import some

log: logging.Logger = logging.getLogger("filao.dashboard")

RUNNING_MAX = 16  # deeds at a time
REMEMBERED_MAX = 100  # deeds that pages can ask for; the log has more
RECORDED_EVERY = 1.0  # seconds between two entries of how far a deed has come
SLICE = 500  # messages of one step: a few milliseconds of the database's time
RATE_MAX = 10_000.0  # messages per second
TICKS = 5  # steps per second of a deed with a rate
AWAY_MAX = 600.0  # seconds that a deed, and the entry of its end, wait for a store that is away
ASKS_EVERY = 1.0  # seconds between two attempts meanwhile
ENDS_WITHIN = 5.0  # seconds for stopping deeds and recording that, when the dashboard closes
DONE, STOPPED = "done", "stopped"

Step = Callable[[Sequence[str]], Awaitable[int]]
"""Does one step of a deed to the messages with these ids, and returns how many it has done."""


class TooMuchError(Exception):
    """So many deeds are under way that no other may begin."""


class StoppedError(Exception):
    """Somebody stopped a deed; what it has done is counted."""


@dataclass(eq=False, slots=True)
class Job:
    """A deed as this dashboard carries it out."""

    number: int
    """Its number in the log, by which every dashboard of the store knows it; our own number, if there is no log."""
    deed: Deed
    wanted: int
    """How many messages it is about: first as many as were known, then as many as were chosen."""
    done: int = 0
    unanswered: int = 0
    """Messages that a repeated step no longer found: the store went away before it answered for them."""
    outcome: str = ""
    """As `Deed.outcome`; empty while it goes on."""
    is_elsewhere: bool = False
    """Whether it was read from the log: if it has no outcome, another process goes on with it, or died."""
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)
    stopping: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set when somebody wants it to stop, which it does between two steps."""
    can_stop: bool = False
    """Whether it goes by steps; what an engine does all at once cannot be stopped."""
    ended: float = 0.0
    """When it ended, by the monotonic clock; 0 while it goes on."""


class Jobs:
    """The jobs of one dashboard. They belong to one event loop."""

    def __init__(self, overview: Callable[[], Overview]) -> None:
        self._overview = overview
        self._jobs: dict[int, Job] = {}
        self._last = int(time.time() * 1000)  # so that the number of a job from before a restart is not given again

    def of(self, number: int) -> Job | None:
        """Return a job that is remembered."""
        return self._jobs.get(number)

    async def told(self, number: int) -> Job | None:
        """Return a job that is remembered, or one that another process began, from the log."""
        if (job := self._jobs.get(number)) is not None or not number or (kept := self._overview().log) is None:
            return job
        for deed in await kept.deeds(1, number + 1):
            if deed.number == number:
                return Job(number, deed, deed.expected, deed.done, outcome=deed.outcome, is_elsewhere=True)
        return None

    def running(self) -> list[Job]:
        """Return the jobs that go on, the latest first."""
        return [job for job in reversed(self._jobs.values()) if not job.outcome]

    async def begin(self, deed: Deed, work: Callable[[Job], Awaitable[None]]) -> Job:
        """Write a deed into the log and begin it; a deed that cannot be written there is not done.

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
        meant = some(deed.wanted, "message")
        log.info("%s: %s %s of queue %r, %s", deed.who, deed.what, deed.about or "all", deed.queue, meant)
        while len(self._jobs) > REMEMBERED_MAX:  # fewer than these go on
            del self._jobs[next(number for number, one in self._jobs.items() if one.outcome)]
        job.task = asyncio.create_task(self._run(job, work))
        return job

    def stop(self, number: int) -> None:
        """Stop a job after its present step; what it has done stays done."""
        if (job := self._jobs.get(number)) is not None:
            job.stopping.set()

    async def close(self) -> None:
        """Stop all jobs after their present steps; a step that takes longer than `ENDS_WITHIN` is cancelled."""
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
            pass  # its outcome says that it was stopped
        except Exception as error:
            log.exception("%s of queue %r failed", job.deed.what, job.deed.queue)
            outcome = type(error).__name__
        finally:
            recording.cancel()
            await self._end(job, outcome)

    async def _end(self, job: Job, outcome: str) -> None:
        """Record how a job ended, at once or, if the store is away, when it is back."""
        log.info("%s of queue %r: %s, %s", job.deed.what, job.deed.queue, outcome, some(job.done, "message"))
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
        """Write into the log how a job ended; return the error if that fails."""
        try:
            if (kept := self._overview().log) is not None:
                await kept.record(job.number, job.done, outcome)
        except FilaoError as error:
            return error
        return None

    async def _record(self, job: Job) -> None:
        """Record every now and then how far a job is."""
        noted = 0
        while (kept := self._overview().log) is not None:
            await asyncio.sleep(RECORDED_EVERY)
            if job.done != noted:
                with suppress(FilaoError):
                    await kept.record(job.number, job.done)
                check_cancelled()
                noted = job.done


async def in_slices(job: Job, ids: Sequence[str], step: Step, rate: float | None) -> None:
    """Take steps, slice by slice, with at most `rate` messages per second, even after a step that took long.

    A step that has begun is finished and counted. Raises `StoppedError` when somebody stops the job in between.
    """
    size = SLICE if rate is None else max(1, min(SLICE, round(rate / TICKS)))
    due, job.can_stop = time.monotonic(), True
    for first in range(0, len(ids), size):
        if job.stopping.is_set():
            raise StoppedError
        done = await _seen_through(job, ids[first : first + size], step)
        job.done += done  # not `job.done += await …`: the step itself adds what an error has counted
        if rate is not None:
            due = max(due + size / rate, time.monotonic())
            await _rested(job, due - time.monotonic())


async def _seen_through(job: Job, ids: Sequence[str], step: Step) -> int:
    """Take a step, again and again while the store is away; a repeated step does nothing twice."""
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
    """Wait so many seconds, or until somebody stops the job."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await job.stopping.wait()
