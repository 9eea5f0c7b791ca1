"""Transactions on the file, one at a time, which end cleanly whatever happens.

Everything here blocks, and runs in the engine's one database thread, or in a visit of it. A transaction is one turn at
the turnstile, with its books; processes that must look again because of it are called as it commits.

Invariant: an open transaction has the turn from `begin` to its end; without one, others may have it.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from filao.engines.sqlite import files, own
from filao.engines.sqlite.books import Books, Known, check_stands
from filao.engines.sqlite.hold import Hold
from filao.engines.sqlite.receive import NOBODY, Lessee
from filao.engines.sqlite.thread import Ticket
from filao.engines.sqlite.waitlist import Call, calls
from filao.errors import EngineUnavailable
from filao.forks import gate

R = TypeVar("R")

BUSY_AGAIN = (0.001, 0.05)  # seconds between two tries while another program's transaction is open: first, and at most


class Database:
    """The transactions of one process on its hold on a file."""

    def __init__(self, path: Path, *, durable: bool, clock: Callable[[], float], wake: Callable[[int], None]) -> None:
        self.hold: Hold = Hold(path, durable=durable, clock=clock)
        self.lessee: Lessee = NOBODY
        """This process as one that receives, once it is entered: see `presence.py`."""
        self.ticket: Ticket | None = None
        """See `filao.engines.sqlite.thread.Visited`."""
        self.loop_thread: int = threading.get_ident()
        """See `filao.forks.Storage`."""
        self._wake = wake
        self._books: Books | None = None
        """The books of the transaction that is open."""
        self._kept: Known | None = None
        """What the books of the last transaction knew, for the next, when all that it wrote went through them."""
        self._kept_at: tuple[sqlite3.Connection, int] | None = None
        """The connection of that transaction, and SQLite's count there of commits by others."""
        self.takes_turns: bool = False
        """Whether others had committed between the last two transactions."""
        self.has_written: bool = False
        """Whether anything but receives was committed since the housekeeper last asked."""
        self._undone_because = ""
        """Why the last transaction that did not commit was undone."""
        self._is_visited = False
        """Whether a visit may have something open: see `mend`."""

    def open(self) -> None:
        """Open the file, and create or migrate its tables."""
        if self.hold.path != files.MEMORY:
            gate.watch(self)
        self.hold.open()
        self._insist(self.hold.prepare)
        self._insist(self.usable)

    def close(self) -> None:
        """Close the file; the last process to do so writes its WAL back."""
        self._undo("its broker was closed in the middle of it")
        self.hold.close()

    # --- forks: see `filao.forks.Storage` ----------------------------------------------------------------------------

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._books is not None

    def interrupt(self) -> None:
        """Let the running statement fail. For any thread."""
        self.hold.interrupt()

    def leave(self) -> None:
        """Undo the open transaction and close the connection."""
        self._undo(
            "this process forked in the middle of it, and no connection may be open across a fork. Fork before a "
            "transaction begins, or start processes by spawn"
        )
        self.hold.leave()

    def inherit(self) -> None:
        """In a child process: forget what belongs to the parent."""
        self.hold.inherit()

    # --- transactions ------------------------------------------------------------------------------------------------

    @contextmanager
    def write(self, *, durable: bool, keeps: bool = False) -> Generator[Books]:
        """Open a transaction, as `begin` does, and commit it on leaving; an exception undoes it."""
        books = self.begin(durable=durable, keeps=keeps)
        try:
            yield books
        except BaseException as error:
            self.undo(error)
        self.commit(books)

    def undo(self, error: BaseException) -> NoReturn:
        """Undo the open transaction because of an error, and raise that, as Filao's own if it is the storage's."""
        self.roll_back(error)
        if isinstance(error, files.FAILURES):
            raise self.hold.error(error) from error
        raise error

    def begin(self, *, durable: bool, keeps: bool = False) -> Books:
        """Wait for a turn and begin a transaction, which `commit` or `roll_back` ends.

        `keeps`: all that is written goes through the books, as the queue's verbs make sure.
        """
        self.hold.set_durable(durable=durable)
        assert self._books is None, "a transaction inside a transaction"

        def attempt() -> Books:
            self._take_turn()
            return self._begin(keeps=keeps)

        return self._insist(attempt)

    def _insist(self, attempt: Callable[[], R]) -> R:
        """Try until no other program's transaction is in the way.

        Invariant: between two tries this process has no turn, and the ticket of its job can be taken. So nobody waits
        inside the turnstile, and every wait has a bound.
        """
        hold, ticket, began = self.hold, self.ticket, time.monotonic()
        until = began + files.BUSY_TIMEOUT if ticket is None else ticket.until
        pause, pause_max = BUSY_AGAIN
        while True:
            try:
                return attempt()
            except OSError as error:
                raise files.os_error(hold.path, error) from error
            except files.FAILURES as error:
                is_late = time.monotonic() > until or (ticket is not None and ticket.is_over)
                if is_late or not files.is_busy(error) or not self.offer(ticket):
                    raise hold.error(error) from error
                if time.monotonic() - began > own.patience() and own.holds_lock(hold.path):
                    raise EngineUnavailable(own.refusal(hold.path)) from error
            with gate.outside():
                time.sleep(pause)
            pause = min(2 * pause, pause_max)

    def leave_waiting(self) -> bool:
        """Leave behind the thread that waits for a job that was given up; False if none does. On the event loop."""
        ticket = self.ticket  # which the running job may take meanwhile
        if ticket is None or not ticket.is_over or not self.hold.leave_waiting():
            return False
        self.ticket = None
        return True

    def write_back(self) -> bool:
        """See `Hold.write_back`."""
        self._take_turn()
        try:
            return self.hold.write_back()
        finally:
            self.hold.turnstile.leave()

    def _take_turn(self) -> None:
        """Wait for a turn, and take the running job's ticket: from here on it waits for nobody else."""
        self.hold.check_lost()
        self.hold.take_turn(self.ticket)
        try:
            self._take_ticket()
        except BaseException:
            self.hold.turnstile.leave()
            raise

    def _take_ticket(self) -> None:
        if self.ticket is not None and not self.ticket.take():
            raise EngineUnavailable("nobody waits for this any more")
        self.ticket = None

    def offer(self, ticket: Ticket | None) -> bool:
        """Give the ticket of the running job back, if the job has taken it; return False when its time is over."""
        was_taken, self.ticket = self.ticket is None, ticket
        return ticket is None or not was_taken or ticket.give_back()

    def try_begin(self, *, durable: bool) -> Books | None:
        """Begin a transaction of the queue's verbs in a visit, if nobody is in the way; else return None."""
        hold = self.hold
        if self._books is not None or hold.db is None or hold.lost is not None or hold.is_closing:
            return None
        self._is_visited = True
        if not hold.turnstile.try_enter():
            self._is_visited = False
            return None
        try:
            hold.set_durable(durable=durable)
            return self._begin(keeps=True)
        except sqlite3.Error as error:
            if not files.is_busy(error):
                raise
            self._is_visited = False
            return None

    def mend(self) -> None:
        """Undo what is left of a visit, wherever it was interrupted."""
        if self._is_visited:
            self._books = self._kept = None
            with suppress(sqlite3.Error):
                if self.hold.db is not None and self.hold.db.in_transaction:
                    self.hold.db.execute("ROLLBACK")
            self.hold.turnstile.leave()
            self._is_visited = False

    def _begin(self, *, keeps: bool) -> Books:
        """Begin in a turn, and end the turn when that fails. An error of SQLite's own means that the file is busy."""
        try:
            return self._begun(keeps=keeps)
        except BaseException as error:
            self.roll_back(error)
            if self.hold.turnstile.is_held:
                self.hold.turnstile.leave()
            if isinstance(error, files.FAILURES) and not files.is_busy(error):
                raise self.hold.error(error) from error
            raise

    def _begun(self, *, keeps: bool) -> Books:
        """Begin, and go on with the books of the last transaction when nobody else has committed since."""
        hold = self.hold
        db = hold.db or hold.connect()
        db.execute("BEGIN IMMEDIATE")
        kept, self._kept = self._kept, None
        self._books = books = Books(db, hold.name, 0, keeps=keeps, known=kept)
        at = (db, db.execute("PRAGMA data_version").fetchone()[0])
        self.takes_turns = others_wrote = at != self._kept_at
        if others_wrote:
            kept, books.known = None, Known()
        hold.look_before_write(others_wrote=others_wrote)
        self._kept_at = at
        books.now = hold.clock.now(db, writes=True, again=kept is not None)
        return books

    def commit(self, books: Books) -> None:
        """Commit, durably if the transaction was begun so, and call the processes that must look again."""
        self.check_open(books)
        try:
            check_stands(books)
            books.write_down()
            self._call(calls(books))
            books.db.execute("COMMIT")
            self.hold.look_at_commit()
        except BaseException as error:
            self.undo(error)
        self._books = None
        self._kept = books.known if books.keeps else None
        self.has_written |= self.hold.confirms
        self.hold.turnstile.leave()
        self._is_visited = False

    def check_open(self, books: Books) -> None:
        """Raise `EngineUnavailable` when a fork or a close has ended the transaction."""
        if books is not self._books:
            raise EngineUnavailable(
                f"{self.hold.path}: nothing of this transaction was done: it was undone, because "
                f"{self._undone_because}."
            )

    def roll_back(self, error: BaseException) -> None:
        """Undo the open transaction, if there is one; if the disk failed, never use this connection again."""
        if isinstance(error, files.FAILURES) and files.is_broken(error) and self.hold.db is not None:
            self.hold.break_off()
        self._undo("it failed before")

    def _undo(self, because: str) -> None:
        """Undo the open transaction, if there is one, and end its turn."""
        if self._books is None:
            return
        books, self._books, self._undone_because = self._books, None, because
        try:
            with suppress(sqlite3.Error):
                if books.db.in_transaction:
                    books.db.execute("ROLLBACK")
        finally:
            self.hold.turnstile.leave()
            self._is_visited = False

    def _call(self, calls: Sequence[Call]) -> None:
        """Wake the processes that must look again: while we commit, they wake up and wait behind us for a turn."""
        for process, bell, queue in calls:
            if process == self.lessee.process:
                self._wake(queue)
            elif bell:
                self.hold.belfry.ring(bell, queue)

    # --- looking -----------------------------------------------------------------------------------------------------

    def look_up(self, work: Callable[[Books], R]) -> R:
        """Do work that only reads. Only a program that recovers or closes the file can be in its way, for a moment.

        The work may take its time, as the doctor's does: once it has begun, it waits for nobody else.
        """

        def attempt() -> R:
            books = self.read()
            self._take_ticket()
            return work(books)

        return self._insist(attempt)

    def read(self) -> Books:
        """Return books for reading only: each statement sees what is committed, and nothing is written back."""
        self.hold.look()
        return self.books_on(self.usable())

    def usable(self) -> sqlite3.Connection:
        """Return the connection. It is opened in a turn: at first, after a fork, and after the disk failed."""
        if self.hold.db is not None:
            return self.hold.db
        self._take_turn()
        try:
            return self.hold.connect()
        finally:
            self.hold.turnstile.leave()

    def books_on(self, db: sqlite3.Connection) -> Books:
        """Return books for a transaction that others have begun, or for reads outside of any."""
        return Books(db, self.hold.name, self.hold.clock.now(db))
