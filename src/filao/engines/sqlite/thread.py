"""The one thread in which an engine's SQLite connection lives: jobs go in from the event loop, results come back.

It is leaner than an executor with one thread, because a lone caller pays for two hops between threads with every
operation. A caller that need not wait for anybody may visit the connection instead, which costs no hop. Every job runs
inside the gate of forks, so that none is half-way when this process forks.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from queue import SimpleQueue
from typing import Any, Protocol, Self, TypeVar

from filao.engines.sqlite.turnstile import LeftWaiting
from filao.errors import EngineUnavailable
from filao.forks import Storage, gate
from filao.process import may_be_handled, start

R = TypeVar("R")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]", "Ticket | None"]


class Ticket:
    """Decides whether a job that waits for its turn begins: either the job or the timer takes it, and only once.

    So a caller that was told "nothing was done" was told the truth: the timer took the ticket, and the job can never
    begin. A job that could not begin in its turn gives the ticket back, and waits on like all others.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        """Monotonic time after which the job must have begun."""
        self._lock = threading.Lock()
        self._is_over = False
        """Whether the timer has come for it."""

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for its job any more, unless the job has begun."""
        return self._is_over

    def take(self) -> bool:
        """Take it for the job; return False when it is too late."""
        return not self._is_over and self._lock.acquire(blocking=False)

    def give_back(self) -> bool:
        """Let the timer have it again; return False when the timer has come meanwhile, and will not come again."""
        self._lock.release()
        return not self._is_over

    def expire(self) -> bool:
        """Let no job take it any more; return False when one has it, which learns of this if it gives it back."""
        self._is_over = True  # before the lock: a job that gives it back just now either frees it in time or sees this
        return self._lock.acquire(blocking=False)


class Direct(asyncio.Future[R]):
    """A future that calls its callbacks at once when it ends, and not on the loop's next turn.

    It is for short callbacks only, and nobody may await it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._then: list[Callable[[Any], object]] = []

    def add_done_callback(self, fn: Callable[[Self], object], /, *, context: Context | None = None) -> None:
        """Call `fn` when it ends, or soon if it has ended."""
        if self.done():
            super().add_done_callback(fn, context=context)
        else:
            self._then.append(fn)

    def set_result(self, result: R, /) -> None:
        """End it and call the callbacks."""
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: type | BaseException, /) -> None:
        """End it by an error and call the callbacks."""
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: Any = None) -> bool:
        """Cancel it and call the callbacks."""
        is_cancelled = super().cancel(msg)
        if is_cancelled:
            self._tell()
        return is_cancelled

    def _tell(self) -> None:
        for callback in self._then:
            callback(self)


class Tickets:
    """The tickets of all jobs that have not ended, with one timer: one for each job would cost a lone call much."""

    def __init__(self, refusal: Callable[[], Exception], then: Callable[[], None]) -> None:
        """`refusal` makes the error of a job that never began; `then` is called whenever the timer has rung."""
        self._loop = asyncio.get_running_loop()
        self._refusal = refusal
        self._then = then
        self._held: dict[asyncio.Future[Any], Ticket] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def hand_out(self, until: float, future: "asyncio.Future[Any]") -> Ticket:
        """Return a ticket for a job, whose future fails when it has not begun by then (monotonic)."""
        ticket = self._held[future] = Ticket(until)
        if self._timer is None or until < self._rings_at:
            self._set(until)
        future.add_done_callback(self._take_back)
        return ticket

    def give_up(self, now: float) -> None:
        """Let the jobs fail that had to begin before now and did not."""
        self._timer = None
        for future, ticket in list(self._held.items()):
            if ticket.until <= now and ticket.expire() and not future.done():
                future.set_exception(self._refusal())
        soonest = min((ticket.until for ticket in self._held.values() if ticket.until > now), default=None)
        if soonest is not None:
            self._set(soonest)
        self._then()

    def close(self) -> None:
        """Stop the timer, when no job can come any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _set(self, until: float) -> None:
        self.close()
        self._rings_at = until
        self._timer = self._loop.call_later(until - time.monotonic(), self._ring)

    def _ring(self) -> None:
        self.give_up(max(self._rings_at, time.monotonic()))

    def _take_back(self, future: "asyncio.Future[Any]") -> None:
        ticket = self._held.pop(future)
        if future.cancelled():
            ticket.expire()  # so that the job never begins, unless it has begun


class Visited(Storage, Protocol):
    """What jobs and visits work on."""

    ticket: Ticket | None
    """The ticket of the running job, until the job takes it."""

    def mend(self) -> None:
        """Undo what is left of a visit that an exception has ended between any two of its instructions."""


class DatabaseThread:
    """Runs jobs one after the other, from its creation until `stop`."""

    def __init__(
        self, name: str, storage: Visited, *, jobs: "SimpleQueue[_Job | None] | None" = None, is_stopped: bool = False
    ) -> None:
        """Start the thread. `jobs` are those that another thread has left."""
        self._storage = storage
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue() if jobs is None else jobs
        self._is_stopped = is_stopped
        self._is_relieved = False
        self._relieving = threading.Lock()
        """Held while it is decided whether another thread takes this one's place."""
        self._given = self._jobs.qsize()
        self._done = 0
        self._busy = threading.RLock()
        """Held while the connection is used. It knows its owner, which may be interrupted before it knows itself."""
        self.waits_for_visit: bool = False
        """Whether the next job waits until a visitor has done with the connection."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start(self._thread)

    def submit(
        self, job: Callable[[], R], future: "asyncio.Future[R] | None" = None, ticket: Ticket | None = None
    ) -> "asyncio.Future[R]":
        """Run `job` after those before it; the future is resolved on the loop, unless it was meanwhile.

        A lone caller should do nothing after it: the thread that wakes up needs Python's lock, which the loop gives up
        once it has nothing to do.
        """
        future = self._loop.create_future() if future is None else future
        if self._is_stopped:
            future.set_exception(EngineUnavailable("the broker was closed meanwhile. Nothing of this was done."))
        else:
            self._given += 1
            self._jobs.put((job, future, ticket))
        return future

    def visit(self, job: Callable[[], bool]) -> bool:
        """Run `job` in the calling thread and return its result, or False if another job runs or waits for its turn.

        It also returns False where a signal handler of the program's may run in between. The handler might call the
        broker or fork, and so wait for this visit, which goes on only after the handler.

        Invariant: whatever exception is raised between any two instructions (a signal handler may raise one in the main
        thread), nothing is left of the visit but what it has committed. The stack needs room to clear it away: see
        `filao.company.ROOM`.
        """
        if self._given != self._done or may_be_handled():
            return False
        try:
            if not self._busy.acquire(blocking=False):
                return False
            is_done = gate.try_enter() and job()
            gate.leave()
            self._busy.release()
        except BaseException:
            while not self._is_mended():
                pass
            raise
        return is_done

    def _is_mended(self) -> bool:
        """Clear away what an exception left of a visit; False when another one came meanwhile: call it again."""
        try:
            if self._busy.acquire(blocking=False):  # it is ours already, or nobody's
                self._storage.mend()
                gate.leave()
                with suppress(RuntimeError):  # all our holds are released
                    while True:
                        self._busy.release()
        except BaseException:
            return False
        return True

    def relieved(self, leave_waiting: Callable[[], bool]) -> "DatabaseThread":
        """Return another thread for the jobs to come if this one can be left where it waits, else this one.

        Invariant: only one of the two does jobs. The one that was left learns of it by `LeftWaiting` when it comes back
        from its wait, and has touched nothing since then that others use.
        """
        with self._relieving:
            if not leave_waiting():
                return self
            other = DatabaseThread(self._thread.name, self._storage, jobs=self._jobs, is_stopped=self._is_stopped)
            self._is_relieved = True
        self._given = -1  # so that nobody visits
        return other

    def stop(self) -> None:
        """End the thread after the jobs that were submitted; later ones fail."""
        self._is_stopped = True
        self._jobs.put(None)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future, ticket = item
            self._take_connection()
            gate.enter(self._storage)
            self._storage.ticket = ticket
            try:
                result, error = job(), None
            except BaseException as raised:
                result, error = None, raised
            finally:
                if self._storage.ticket is ticket:  # otherwise it was taken, or this thread was left waiting
                    self._storage.ticket = None
                gate.leave()
                self._busy.release()
            if isinstance(error, LeftWaiting) and self._has_been_relieved():
                return
            self._done += 1
            with suppress(RuntimeError):  # the loop has ended: nobody is left to tell
                self._loop.call_soon_threadsafe(_resolve, future, result, error)
            del item, job, future, ticket, result, error  # otherwise this frame would keep them alive while it waits

    def _take_connection(self) -> None:
        if not self._busy.acquire(blocking=False):
            self.waits_for_visit = True
            self._busy.acquire()
            self.waits_for_visit = False

    def _has_been_relieved(self) -> bool:
        with self._relieving:
            return self._is_relieved


def _resolve(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
