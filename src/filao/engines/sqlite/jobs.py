"""Jobs: what the event loop asks of the database's thread, each begun within a time limit or never.

A job waits for its turn to write, but not for ever: another process may stand still in its own. While a transaction of
the user's has the thread, nothing else is done there.

Invariant: whoever needs the thread for several jobs that belong together, as a transaction does, keeps it to itself
(`kept`). A job that is done `alone` waits for that; one that is `submit`ted belongs to whoever keeps it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from filao.engines.sqlite import files
from filao.engines.sqlite.books import Books
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.thread import DatabaseThread, Tickets
from filao.errors import EngineUnavailable
from filao.guarded import look_away

R = TypeVar("R")

INTERRUPTED_EVERY = 0.01  # seconds between interruptions of a look for which a close waits


class Jobs:
    """The jobs of one engine on its database, from `begin` to `end`."""

    def __init__(self, database: Database) -> None:
        self.is_in_transaction: bool = False
        """Whether a transaction of the user's is open: everything else waits for it."""
        self.is_looking: bool = False
        """Whether a job that only looks is running."""
        self._database = database
        self._hold = database.hold
        self.gate: asyncio.Lock = asyncio.Lock()
        """Held by work that keeps the thread for several jobs that belong together."""

    def begin(self) -> None:
        """Start the thread. Raises `EngineUnavailable` when none can be had."""
        self._loop = asyncio.get_running_loop()
        self.thread: DatabaseThread = DatabaseThread(f"filao {self._hold.path.name}", self._database)
        self.tickets: Tickets = Tickets(self.refusal, self.relieve)

    def end(self, last: Callable[[], None]) -> "asyncio.Future[None]":
        """Run the last job behind all others, in no turn and without a limit, and end the thread."""
        ended = self.thread.submit(last)
        ended.add_done_callback(self._ended)
        self.thread.stop()
        return ended

    def _ended(self, last: "asyncio.Future[None]") -> None:
        """Stop the timer, and take the error of a last job for which nobody waits."""
        self.tickets.close()
        look_away(last)

    # --- single jobs -------------------------------------------------------------------------------------------------

    def submit(self, job: Callable[[], R]) -> "asyncio.Future[R]":
        """Run a job of an open transaction, which has the turn, for whoever keeps the thread."""
        return self.thread.submit(job)

    def in_turn(self, job: Callable[[], R], until: float | None = None) -> "asyncio.Future[R]":
        """Run a job that waits for a turn to write, until (monotonic) it must have begun: in 30 s unless it is given.

        A batch does the same without this call (`SqliteEngine.execute`).
        """
        future: asyncio.Future[R] = self._loop.create_future()
        until = time.monotonic() + files.BUSY_TIMEOUT if until is None else until
        return self.thread.submit(job, future, self.tickets.hand_out(until, future))

    async def alone(self, job: Callable[[], R], until: float | None = None) -> R:
        """Run a job in its turn, but never inside a transaction of the user's."""
        until = time.monotonic() + files.BUSY_TIMEOUT if until is None else until
        async with self.kept(until):
            return await self.in_turn(job, until)

    async def change(self, work: Callable[[Books], R], until: float | None = None) -> R:
        """Do work that changes something, as a durable transaction, `alone`."""

        def job() -> R:
            with self._database.write(durable=True) as books:
                return work(books)

        return await self.alone(job, until)

    async def look_up(self, work: Callable[[Books], R], until: float | None = None) -> R:
        """Do work that changes nothing, `alone`."""

        def begun(books: Books) -> R:
            self.is_looking = True
            return work(books)

        def job() -> R:
            try:
                return self._database.look_up(begun)
            finally:
                self.is_looking = False

        return await self.alone(job, until)

    # --- the thread --------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def kept(self, until: float) -> AsyncGenerator[None]:
        """Keep the thread to the caller, once nobody else does, which must be before `until`."""
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self.gate.acquire()
        except TimeoutError:
            raise self.refusal() from None
        try:
            yield
        finally:
            self.gate.release()

    async def stop_looking(self, until: float) -> None:
        """Make a job that only looks fail, by interrupting its statements."""
        while self.is_looking and time.monotonic() < until:
            self._hold.interrupt()
            await asyncio.sleep(INTERRUPTED_EVERY)

    def relieve(self) -> None:
        """Go on in another thread if the present one waits in line for a job that was given up."""
        with suppress(EngineUnavailable):  # no thread can be started: the present one goes on when its turn comes
            self.thread = self.thread.relieved(self._database.leave_waiting)

    def refusal(self) -> EngineUnavailable:
        """Return the error of a call that has not begun in time; it names what is in the way."""
        path, seconds = self._hold.path, f"{files.BUSY_TIMEOUT:g} seconds"
        if self.is_in_transaction:
            return EngineUnavailable(
                f"{path}: a transaction of this broker has been open for {seconds}, and all else waits for it. Nothing "
                f"was done; do what is slow before a transaction begins."
            )
        if self.thread.waits_for_visit:
            return EngineUnavailable(
                f"{path}: a call that another thread of this process makes has been at work for {seconds}, and all "
                f"else waits for it: the disk does not answer, or that thread was stopped, as by a debugger. Nothing "
                f"of this call was done; try again when that has ended."
            )
        if self.is_looking or self._hold.turnstile.is_held:
            return EngineUnavailable(
                f"{path}: another call of this broker has been at work for {seconds}, and all else waits for it: a "
                f"look at the whole file, as the doctor's, or its tables are being brought up to date. Nothing of this "
                f"call was done; try again when that has ended."
            )
        return self._hold.refusal()
