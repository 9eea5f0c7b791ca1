"""The SQLite engine: one file, no server, many processes.

This is the side on the event loop. It hands batches to the database thread, where each is one transaction
(`database.py`) of the queue's verbs (`send.py`, `receive.py`, `settle.py`). It wakes those that wait: when the bell
rings, when something is due, and every now and then to find what rings no bell.

A batch that only receives is not flushed to the disk. A power cut that undoes its leases also ends their holder, and
the WAL keeps the order of commits, so the next flush carries them along. All else is durable before it returns.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from filao.engine import Abandoned, Batch, Extend, Feature, Operation, Receive, Result, Send, Settle, Submit
from filao.engines.sqlite import files, operators, verbs
from filao.engines.sqlite.books import Books
from filao.engines.sqlite.control import SqliteOperators
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.housekeeping import Housekeeper
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.moving import SqliteMover
from filao.engines.sqlite.overview import SqliteOverview
from filao.engines.sqlite.presence import Presence
from filao.engines.sqlite.receive import NOBODY, look
from filao.engines.sqlite.thread import Direct
from filao.engines.sqlite.transactions import SqliteTransactions
from filao.engines.waiters import Lines, Place
from filao.errors import EngineUnavailable, FilaoError
from filao.guarded import for_ever
from filao.process import process_name
from filao.queue import Queue

POLL_INTERVAL = 0.2  # seconds between looks for what rings no bell: deaths, and commits on the users' own connections
SLEPT = 0.5  # seconds by which the steady clock got ahead of the event loop's between two looks: the machine slept
BEGINS_WITHIN = 0.5  # seconds, at least, for a batch to begin, even if the last took as long as a call may wait
CLOSED_WITHIN = 1.0  # seconds kept for closing the file, however long giving back the leases takes


class SqliteEngine:
    """See `filao.engine.Engine`."""

    name = "SQLite"
    features: frozenset[Feature] = frozenset(Feature)
    emulated: frozenset[Feature] = frozenset()
    concurrent_batches = 1

    def __init__(
        self,
        path: Path,
        *,
        durable: bool = True,
        clock: Callable[[], float] = time.time,
        beside: Database | None = None,
    ) -> None:
        self._database = database = Database(path, durable=durable, clock=clock, wake=self._call_soon)
        self._hold = database.hold
        self._presence = Presence(database)
        self._beside = beside or database
        """The database whose leases this process holds: for a sibling, that of the engine that made it."""
        self._sibling = (
            None if path == files.MEMORY else lambda: SqliteEngine(path, durable=durable, clock=clock, beside=database)
        )
        self._lines: Lines = Lines()
        self._queue_names: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs = jobs = Jobs(database)
        self._housekeeper = Housekeeper(database, jobs)
        self.operators: SqliteOperators = SqliteOperators(self._hold, self._beside, jobs)
        self.overview: SqliteOverview = SqliteOverview(jobs)
        self.mover: SqliteMover = SqliteMover(path, self.operators, jobs)
        self.transactions: SqliteTransactions = SqliteTransactions(database, jobs)

    async def open(self) -> None:
        """Open the file, create or migrate its tables, and start the thread that writes."""
        self._loop = asyncio.get_running_loop()
        self._database.loop_thread = threading.get_ident()
        self._jobs.begin()
        try:
            await self._jobs.in_turn(self._database.open)
        except BaseException as error:
            closed = self._jobs.end(self._close_unheard)
            if isinstance(error, FilaoError):  # a cancelled caller waits for nothing
                await asyncio.wait([closed], timeout=CLOSED_WITHIN)
            raise
        self._ahead = self._hold.clock.steady() - self._loop.time()
        self._start(for_ever("the housekeeping of a SQLite file", self._housekeeper.keep))
        self._start(for_ever("the watch of a SQLite file", self._watch))

    def check_is_there(self) -> None:
        """Raise `EngineUnavailable` when the file is not there: opening would make another, empty one."""
        path = self._hold.path
        if path != files.MEMORY and not path.exists():
            raise EngineUnavailable(
                f"{path} is not there any more. Nothing was made in its place; move it back, or put a backup there: "
                "filao restore"
            )

    def sibling(self) -> "SqliteEngine | None":
        """Return an engine on the same file; None when it is in memory."""
        return self._sibling and self._sibling()

    async def close(self) -> None:
        """Send away those that wait, give back the leases that are held, and close the file, within one time limit.

        When that is over, or this is cancelled, the thread closes the file as soon as it can.
        """
        ends = time.monotonic() + files.BUSY_TIMEOUT
        until = ends - min(CLOSED_WITHIN, files.BUSY_TIMEOUT / 2)
        self._hold.is_closing = True
        self._lines.close()
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._jobs.relieve()
            await self._jobs.stop_looking(until)
            with suppress(FilaoError):  # what cannot be given back runs out
                while await self._jobs.alone(self._presence.resign, until):
                    pass
        finally:
            if self._hold.belfry.own is not None:
                self._loop.remove_reader(self._hold.belfry.own.reader)
            self._jobs.relieve()
            closed = self._jobs.end(self._database.close)
        await asyncio.wait([closed], timeout=max(ends - time.monotonic(), CLOSED_WITHIN))
        if not closed.done():
            raise _not_closed_yet(self._hold.path)
        closed.result()

    def _close_unheard(self) -> None:
        """Close the file after opening it failed; an error here is not raised, because that of opening is."""
        with suppress(FilaoError):
            self._database.close()

    def drop(self) -> None:
        """Close after the event loop has ended: the thread gives back the leases and closes the file."""

        def end() -> None:
            with suppress(FilaoError):
                while self._presence.resign():
                    pass
            self._database.close()

        self._hold.is_closing = True
        self._jobs.end(end)

    # --- the data plane ----------------------------------------------------------------------------------------------

    def execute(self, batch: Batch) -> Awaitable[list[Result]]:
        """Do a batch as one transaction, with all that joins it until its turn comes."""
        until = max(batch.since + files.BUSY_TIMEOUT, time.monotonic() + BEGINS_WITHIN)
        if self._jobs.gate.locked():
            return self._jobs.alone(partial(self._execute, batch), until)
        future: Direct[list[Result]] = Direct(self._loop)
        return self._jobs.thread.submit(
            partial(self._execute, batch), future, self._jobs.tickets.hand_out(until, future)
        )

    @property
    def takes_turns(self) -> bool:
        """Whether other processes wrote, too, between its last two transactions."""
        return self._database.takes_turns

    def at_once(self, operations: Sequence[Operation], results: list[Result]) -> bool:
        """Do a batch in the calling thread, if nobody is in the way."""
        return self._jobs.thread.visit(partial(self._at_once, operations, results))

    def _at_once(self, operations: Sequence[Operation], results: list[Result]) -> bool:
        kinds = set(map(type, operations))
        lessee = self._database.lessee
        if Receive in kinds and (lessee is NOBODY or any(map(self._is_behind, operations))):
            return False
        writes = kinds != {Receive}
        books = self._database.try_begin(durable=writes)
        if books is None:
            return False
        _apply(self._database, books, lambda: operations, results, self._queue_names)
        return True

    def _is_behind(self, operation: Operation) -> bool:
        """Return whether an operation would take messages for which others wait in line."""
        line = self._lines.get(operation.queue) if isinstance(operation, Receive) and operation.waiting else None
        return line is not None and line.wanted() > 0

    def _execute(self, batch: Batch) -> list[Result]:
        if batch.receives:
            self._register()
        takes: dict[type, bool] = dict.fromkeys((Send, Settle, Extend), batch.writes)
        takes[Receive] = self._database.lessee is not NOBODY
        books = self._database.begin(durable=batch.writes, keeps=True)
        results: list[Result] = []
        take = partial(batch.take, lambda operation: takes[type(operation)])
        _apply(self._database, books, take, results, self._queue_names)
        return results

    # --- waking ------------------------------------------------------------------------------------------------------

    def waiter(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Place:
        """Take a place to wait for a queue."""
        return self._lines.place(receive, submit, abandoned)

    def _register(self) -> None:
        if self._database.lessee is NOBODY:
            ticket = self._database.ticket
            self._presence.enter(process_name())
            bell = self._hold.belfry.own
            if bell is not None:
                self._loop.call_soon_threadsafe(self._loop.add_reader, bell.reader, self._hear)
            if not self._database.offer(ticket):  # the batch itself follows, and may have to wait for another turn
                raise self._jobs.refusal()

    def _hear(self) -> None:
        bell = self._hold.belfry.own
        if bell is not None:
            for queue in bell.heard():
                self._call(queue)

    def _call_soon(self, queue: int) -> None:
        self._loop.call_soon_threadsafe(self._call, queue)

    def _call(self, queue: int) -> None:
        name = self._queue_names.get(queue, "")
        line = self._lines.get(name)
        if line is not None and not line.call():
            self._start(self._pass_on(name))

    async def _pass_on(self, queue: str) -> None:
        """Let the next process be called, because nobody waits here any more."""
        with suppress(FilaoError):
            await self._jobs.alone(partial(self._presence.pass_on, queue))

    async def _watch(self) -> None:
        """Look for a lost file and, in a process that receives, for deaths and for commits that rang no bell."""
        await asyncio.sleep(POLL_INTERVAL)
        was, self._ahead = self._ahead, self._hold.clock.steady() - self._loop.time()
        has_slept = abs(self._ahead - was) > SLEPT  # the machine, and with it the loop's timers
        if has_slept or (self._hold.may_be_lost() and await self._is_lost()):
            self._lines.call()  # those that wait must learn of it
        if self._database.lessee is NOBODY:
            return
        with suppress(FilaoError):  # the callers of a storage that fails get its error
            while self._presence.may_have_moved() or self._presence.dead():
                quiet = [name for name, line in self._lines.items() if line.is_quiet()]
                for name, due_in in await self._jobs.alone(partial(self._look, quiet)):
                    self._tell(name, due_in)
                if not self._presence.dead():
                    break

    async def _is_lost(self) -> bool:
        try:
            await self._jobs.alone(self._hold.look)
        except FilaoError:
            return True
        return False

    def _look(self, waiting_for: Sequence[str] = ()) -> list[tuple[str, float | None]]:
        """Return the queues that have something for those that wait, and in how many seconds; also bury some dead."""
        moved = self._presence.has_moved()
        self._presence.bury_some()
        books = self._database.read()
        return [(queue, look(books, queue)) for queue in waiting_for] if moved else []

    def _tell(self, queue: str, due_in: float | None) -> None:
        line = self._lines[queue]
        if due_in == 0.0:
            line.call()
        else:
            line.look_in(due_in)

    # --- queues ------------------------------------------------------------------------------------------------------

    async def declare(self, queue: Queue) -> None:
        """Create the queue or give it these rules."""
        await self._jobs.change(lambda books: operators.declare(books, queue))

    async def find(self, queue: str) -> Queue:
        """Return a queue with its rules, from its row."""
        return await self._jobs.look_up(lambda books: books.row(queue).rules)

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _apply(
    database: Database,
    books: Books,
    take: Callable[[], Sequence[Operation]],
    results: list[Result],
    names: dict[int, str],
) -> None:
    """Do operations in a transaction that has begun, and commit it; an exception undoes it.

    What came of them, and the names of their queues, is there before it commits: from then on somebody may be called,
    and whoever interrupts this must find what was received.
    """
    try:
        results += verbs.apply(books, take(), database.lessee)
        names.update(books.names())
    except BaseException as error:
        database.undo(error)
    database.commit(books)


def _not_closed_yet(path: Path) -> EngineUnavailable:
    return EngineUnavailable(
        f"{path}: closing has waited {files.BUSY_TIMEOUT:g} seconds for another call of this broker that is at work. "
        f"The file is closed when that ends; what is still leased comes back when its leases run out."
    )
