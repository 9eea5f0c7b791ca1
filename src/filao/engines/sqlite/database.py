"""The file as one process holds it: a connection, its turnstile, and transactions that end cleanly whatever happens.

Everything here blocks, and runs in the engine's one database thread. A transaction is one turn at the turnstile, with
its books; those who must look again because of it are called as it commits.

Invariant: no job keeps a connection in a variable while it waits for its turn, because a fork may close it meanwhile
(`filao.forks`); what the next job needs, it opens again.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from filao.engine import OpenAgain
from filao.engines.sqlite import files, housekeeping, own, processes, scrutiny
from filao.engines.sqlite.bell import Belfry, Bell
from filao.engines.sqlite.books import Books, Known, check_stands
from filao.engines.sqlite.clock import FileClock
from filao.engines.sqlite.folder import Folder
from filao.engines.sqlite.ground import LOOKED_WITHIN, Ground, Loss
from filao.engines.sqlite.receive import Lessee
from filao.engines.sqlite.thread import Ticket
from filao.engines.sqlite.turnstile import Turnstile
from filao.engines.sqlite.waitlist import Call, calls
from filao.errors import ConfigurationError, EngineError, EngineUnavailable
from filao.forks import gate, keep

R = TypeVar("R")

WAL_SETTLED = 1.0  # seconds after the last change of the WAL during which each look goes into the database
BUSY_AGAIN = (0.001, 0.05)  # seconds before the second try to begin beside another program's transaction, and at most

_inherited: set[Path] = set()
"""Files that were open when this process was forked, as a job on them would not end: SQLite is mistaken about them."""


class Database:
    """One process's hold on a Filao file, or on a private one in memory."""

    def __init__(self, path: Path, *, durable: bool, clock: Callable[[], float], wake: Callable[[int], None]) -> None:
        self.path: Path = path
        self.folder: Folder | None = None
        """Where the turnstile and the bells are; None in memory and on Windows."""
        self.file: str = ""
        """The random name of the file, the first part of its message ids."""
        self.lessee: Lessee | None = None
        self.bell: Bell | None = None
        self.ticket: Ticket | None = None
        """Of the running job: see `SqliteEngine._in_turn`."""
        self.loop_thread: int = threading.get_ident()
        """See `filao.forks.Storage`."""
        self._durable = durable
        self._flushes = durable
        self.clock: FileClock = FileClock(clock)
        self._wake = wake
        self._wal = path
        self._given = path
        self._ground: Ground | None = None
        self._lost: Loss | None = None
        self._looked_at = 0.0
        self._is_suspicious = False
        self._turnstile = Turnstile(None)
        self._belfry: Belfry | None = None
        self._db: sqlite3.Connection | None = None
        self._books: Books | None = None
        """Of the transaction that is open."""
        self._kept: Known | None = None
        """By the books of the last transaction, when all that it wrote went through them: for the next."""
        self._kept_version = -1
        """SQLite's count of the commits by others when it committed."""
        self._undone_because = ""
        """Why the last one that did not commit was undone."""
        self._is_visited = False
        """Whether a visit may have something open: see `mend`."""
        self._has_failed = False
        """The disk failed: what the file holds must be looked at before it is used again."""
        self._seen_version = -1
        self._wal_changed = -1.0
        self._others: list[tuple[int, str]] = []

    # --- opening and closing -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the file, and create or migrate its tables."""
        if self.path != files.MEMORY:
            self._given = self.path.absolute()
            self.path = files.resolved(self.path)  # one file, one turnstile, by whatever path it is called
            files.check_path(self.path)
            gate.watch(self)
        with files.mapped(self.path):
            if self.path != files.MEMORY:
                files.check_is_database(self.path)
                files.create(self.path)
                self._wal = self.path.with_name(self.path.name + "-wal")
                if os.name == "posix":  # elsewhere SQLite's own locks and polling must do
                    self.folder = Folder(files.sidecar(self.path), self.path.stat())
                    self._turnstile = Turnstile(self.folder)
                    self._belfry = Belfry(self.folder)
            with self._turn():
                self._connect()

    def _connect(self) -> sqlite3.Connection:
        """Open the file, for the first time or again; in a turn."""
        if self.path in _inherited:
            raise ConfigurationError(
                f"{self.path} cannot be used in this process (pid {os.getpid()}): it was forked while a statement ran "
                f"there, and SQLite's locks would be wrong. Start the process again, or by spawn instead of fork."
            )
        if self._ground is not None and not self._ground.is_file_there():
            self._lost = self._ground.missing()
            self._check_lost()
        db = files.connect(self.path, full=self._durable, cookie=self._turnstile.noted())
        try:
            scrutiny.check(db, self.path)
            is_new = files.migrate(db, self.path)
            self._set_clock(db)
            if is_new:
                db.execute(
                    "PRAGMA wal_checkpoint(PASSIVE)"
                ).fetchall()  # so that the file itself can be told from others
            self.file = db.execute("SELECT value FROM filao_meta WHERE name = 'file'").fetchone()[0]
            if self.path != files.MEMORY:
                self._ground = Ground(self.path, self._given, self.folder.path if self.folder is not None else None)
                self._turnstile.note(self._ground.cookie)
                self._watch_bell()
            if self._has_failed:
                files.check_whole(db, self.path)
            files.set_patience(db, 0.0)
        except BaseException:
            db.close()
            raise
        self._db, self._kept = db, None
        self._flushes = self._durable
        self._seen_version = -1
        self._has_failed = False
        return db

    def _set_clock(self, db: sqlite3.Connection) -> None:
        """Set the file's clock after a start of the machine, which ended all that held leases: they are void."""
        if self.clock.has_begun(db):
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            bells = [bell for (bell,) in db.execute("SELECT bell FROM filao_process WHERE bell <> ''")]
            lives = self._belfry is not None and any(map(self._belfry.is_alive, bells))
            if self.clock.begin(db) and not lives:
                processes.void_leases(db, self.clock.now(db))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Let go of the file; the last process to do so writes its WAL back."""
        if self._belfry is not None:
            self._belfry.close()
        if self.bell is not None:
            self.bell.close()
            self.bell = None
        self._undo("its broker was closed in the middle of it")
        try:
            with files.mapped(self.path), self._turn():
                if self._db is not None:
                    self._let_go(self._db)
        finally:
            self._db = None
            self._turnstile.close()
            if self.folder is not None:
                self.folder.close()

    # --- forks: see `filao.forks.Storage` ----------------------------------------------------------------------------

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._books is not None

    def interrupt(self) -> None:
        """Let the statement that runs fail."""
        with suppress(sqlite3.Error):
            if self._db is not None:
                self._db.interrupt()

    def leave(self) -> None:
        """Close the connection, and undo what is open in it.

        Not in a turn: this thread may hold up the one whose turn it is. SQLite writes the WAL back only if nobody else
        has the file open, and keeps others out meanwhile.
        """
        self._undo(
            "this process forked in the middle of it, and no connection may be open across a fork. Fork before a "
            "transaction begins, or start processes by spawn"
        )
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                self._let_go(db)

    def inherit(self) -> None:
        """Forget in a child what is the parent's: its turn at the turnstile, its bell, the bells that it rings."""
        if self._db is not None:
            _inherited.add(self.path)
        keep(self._db)
        self._turnstile.close()
        if self._belfry is not None:
            self._belfry.close()
        if self.bell is not None:
            self.bell.let_go()
        if self.folder is not None:
            self.folder.close()

    # --- transactions ------------------------------------------------------------------------------------------------

    def write(self, *, durable: bool, keeps: bool = False) -> AbstractContextManager[Books]:
        """Open a transaction, as `begin` does, and commit it on leaving; an exception undoes it."""
        return self.ending(self.begin(durable=durable, keeps=keeps))

    @contextmanager
    def ending(self, books: Books) -> Generator[Books]:
        """Commit a transaction on leaving, and call those who must look again; an exception undoes it."""
        try:
            yield books
        except BaseException as error:
            self.undo(error)
        self.commit(books)

    def undo(self, error: BaseException) -> NoReturn:
        """Undo what was begun because of an error, and raise it, or ours for it."""
        self.roll_back(error)
        if isinstance(error, files.FAILURES):
            raise self._error(error) from error
        raise error

    def begin(self, *, durable: bool, keeps: bool = False) -> Books:
        """Wait for a turn and begin a transaction, which `commit` or `roll_back` ends.

        `keeps` says that the books learn of all that is written: the queue's verbs see to that. While another program's
        transaction is in the way, the turn is given up between two tries: nobody waits inside.
        """
        self._set_durable(durable=durable)
        assert self._books is None, "a transaction inside a transaction"
        until = time.monotonic() + files.BUSY_TIMEOUT if self.ticket is None else self.ticket.until
        pause, pause_max = BUSY_AGAIN
        began = time.monotonic()
        while True:
            self._check_lost()
            self._take_turn()
            try:
                return self._begin(keeps=keeps)
            except sqlite3.Error as error:
                if time.monotonic() > until:
                    raise self._error(error) from error
                if time.monotonic() - began > own.patience() and own.holds_lock(self.path):
                    raise EngineUnavailable(own.refusal(self.path)) from error
            with gate.outside(self):
                time.sleep(pause)
            pause = min(2 * pause, pause_max)

    def _set_durable(self, *, durable: bool) -> None:
        if self._db is not None and self._flushes != (durable and self._durable):
            with files.mapped(self.path):
                files.set_durable(self._db, durable=not self._flushes)
            self._flushes = not self._flushes

    def try_begin(self, *, durable: bool) -> Books | None:
        """Begin a transaction of the queue's verbs in a visit, if nobody is in the way; else return None."""
        if self._books is not None or self._db is None or self._lost is not None:
            return None
        self._is_visited = True
        if not self._turnstile.try_enter():
            self._is_visited = False
            return None
        try:
            self._set_durable(durable=durable)
            return self._begin(keeps=True)
        except sqlite3.Error as error:
            if not files.is_busy(error):
                raise
            self._is_visited = False
            return None

    def mend(self) -> None:
        """Undo what a visit has left, wherever it was interrupted."""
        if self._is_visited:
            self._books = self._kept = None
            with suppress(sqlite3.Error):
                if self._db is not None and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            self._turnstile.leave()
            self._is_visited = False

    def _begin(self, *, keeps: bool) -> Books:
        """Begin in a turn, which ends when that fails; an error that is not mapped says that somebody is in the way."""
        try:
            return self._begun(keeps=keeps)
        except BaseException as error:
            self.roll_back(error)
            if self._turnstile.is_held:
                self._turnstile.leave()
            if isinstance(error, files.FAILURES) and not files.is_busy(error):
                raise self._error(error) from error
            raise

    def _begun(self, *, keeps: bool) -> Books:
        """Begin, and go on with the books of the last transaction when nobody else has committed since."""
        self.take_ticket()
        db = self._db or self._connect()
        db.execute("BEGIN IMMEDIATE")
        self._books = books = Books(db, self.file, 0, keeps=keeps)
        if self._is_suspicious or time.monotonic() - self._looked_at > LOOKED_WITHIN:
            self.look()
        version: int = db.execute("PRAGMA data_version").fetchone()[0]
        kept = self._kept if version == self._kept_version else None
        self._kept, self._kept_version = None, version
        books.now = self.clock.now(db, writes=True, again=kept is not None)
        if kept is not None:
            books.known = kept.begin()
        return books

    def take_ticket(self) -> None:
        """Begin the running job for good: it waits for nobody from here on."""
        if self.ticket is not None and not self.ticket.take():
            raise EngineUnavailable("nobody waits for this any more")
        self.ticket = None

    def commit(self, books: Books) -> None:
        """Make it so, durably when the transaction was begun so."""
        self.check_open(books)
        try:
            check_stands(books)
            books.write_down()
            self._call(calls(books))
            books.db.execute("COMMIT")
            self.look()  # before anything is confirmed
        except BaseException as error:
            self.undo(error)
        self._books = None
        self._kept = books.known if books.keeps else None
        self._turnstile.leave()
        self._is_visited = False

    def check_open(self, books: Books) -> None:
        """Raise `EngineUnavailable` when a transaction is open no more: a fork or a close has ended it."""
        if books is not self._books:
            raise EngineUnavailable(
                f"{self.path}: nothing of this transaction was done: it was undone, because {self._undone_because}."
            )

    def roll_back(self, error: BaseException) -> None:
        """Undo what was begun, if anything was; and when the disk failed, never trust this connection again."""
        if isinstance(error, files.FAILURES) and files.is_broken(error) and self._db is not None:
            db, self._db, self._has_failed = self._db, None, True
            with suppress(sqlite3.Error):
                self._let_go(db)
        self._undo("it failed before")

    def _undo(self, because: str) -> None:
        """Undo the transaction that is open, if one is, and end its turn."""
        if self._books is None:
            return
        books, self._books, self._undone_because = self._books, None, because
        try:
            with suppress(sqlite3.Error):
                if books.db.in_transaction:
                    books.db.execute("ROLLBACK")
        finally:
            self._turnstile.leave()
            self._is_visited = False

    @contextmanager
    def _turn(self) -> Generator[None]:
        self._take_turn()
        try:
            yield
        finally:
            self._turnstile.leave()

    def _take_turn(self) -> None:
        if not self._turnstile.try_enter():
            with gate.outside(self):
                self._turnstile.enter()

    def look_up(self, work: Callable[[Books], R]) -> R:
        """Do what only looks. Nothing but what recovers or closes the file can be in the way, for a moment."""
        until = time.monotonic() + files.BUSY_TIMEOUT
        pause, pause_max = BUSY_AGAIN
        while True:
            with files.mapped(self.path):
                try:
                    return work(self.read())
                except sqlite3.Error as error:
                    if not files.is_busy(error) or time.monotonic() > until:
                        raise
            time.sleep(pause)
            pause = min(2 * pause, pause_max)

    def read(self) -> Books:
        """Return books for looking only: each statement sees what is committed, and nothing is written down."""
        self.look()
        return self.books_on(self._usable())

    def _usable(self) -> sqlite3.Connection:
        """Return the connection; opened afresh after a fork, or after the disk failed."""
        if self._db is not None:
            return self._db
        with files.mapped(self.path), self._turn():
            return self._connect()

    def books_on(self, db: sqlite3.Connection) -> Books:
        """Return books for a transaction that somebody else has begun, or for none."""
        return Books(db, self.file, self.clock.now(db))

    # --- the ground --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Raise `EngineError` when the file is no longer what was opened; what is confirmed after this is in it."""
        self._check_lost()
        if self._ground is not None and self._db is not None:
            self._lost = self._ground.look() or (self._ground.missing() if self._is_suspicious else None)
            self._is_suspicious = False
            self._looked_at = time.monotonic()
            self._check_lost()

    def may_be_lost(self) -> bool:
        """Return whether those who wait should look; costs no more than a few `stat`s, in any thread."""
        if self._ground is not None and self._db is not None and self._lost is None:
            self._is_suspicious = self._ground.missing() is not None
            return self._is_suspicious or self._ground.has_changed()
        return self._lost is not None

    def _check_lost(self) -> None:
        if self._lost is not None:
            again = self._ground is not None and self._ground.may_be_opened_again(self._lost)
            raise (OpenAgain if again else EngineError)(
                f"{self.path} {self._lost.what}. This call is not confirmed, and nothing more is done with the file "
                f"that was opened. What to do: stop the processes that use it, then {self._lost.remedy}."
            )

    def _error(self, error: Exception) -> EngineError:
        """Return our error for one of SQLite's, which may come of a file that is no longer what was opened."""
        try:
            self.look()
        except EngineError as lost:
            return lost
        return files.engine_error(self.path, error)

    def _let_go(self, db: sqlite3.Connection) -> None:
        """Close a connection, without writing its WAL into what may lie there now."""
        self._lost = self._lost or (self._ground.look() if self._ground is not None else None)
        if self._lost is not None and self._ground is not None:
            self._ground.let_go(db, self._lost)
        else:
            db.close()

    def _call(self, calls: Sequence[Call]) -> None:
        """Wake those who must look again; while we commit, they wake up, and then queue behind us at the turnstile."""
        own = self.lessee.process if self.lessee is not None else 0
        for process, bell, queue in calls:
            if process == own:
                self._wake(queue)
            elif bell and self._belfry is not None:
                self._belfry.ring(bell, queue)

    # --- processes ---------------------------------------------------------------------------------------------------

    def register(self, name: str) -> Lessee:
        """Enter this process among those that receive, with a bell where the file system has FIFOs."""
        if self.lessee is None:
            bell = self._hang_bell()
            try:
                with self.write(durable=False) as books:
                    process = processes.enter(books, bell.name if bell else "", name)
                    known = {row[0] for row in books.db.execute("SELECT bell FROM filao_process")}
            except BaseException:
                if bell is not None:
                    bell.close()
                raise
            self.bell = bell
            with files.mapped(self.path):
                self._watch_bell()
            self.lessee = Lessee(process, name)
            if self._belfry is not None:
                for forgotten in self._belfry.forgotten(known):
                    self._belfry.take_down(forgotten)
        return self.lessee

    def _watch_bell(self) -> None:
        """Notice when the bell is gone, and with it the folder."""
        if self.bell is not None and self._ground is not None and self.folder is not None:
            self._ground.watch(self.folder.path / self.bell.name)

    def _hang_bell(self) -> Bell | None:
        if self.folder is None or not hasattr(os, "mkfifo"):
            return None
        try:
            return Bell(self.folder)
        except OSError:
            return None  # a file system without FIFOs: polling finds what no bell tells

    def bury_some(self) -> None:
        """Take over a slice of the leases of a process that died; when none is left, watch others in its place."""
        for process, bell in self.dead_processes()[:1]:
            with self.write(durable=False) as books:
                is_done = processes.bury(books, process)
            if is_done:
                if self._belfry is not None:
                    self._belfry.take_down(bell)
                self._learn_others()

    def dead_processes(self, among: Sequence[tuple[int, str]] | None = None) -> list[tuple[int, str]]:
        """Return the processes, and their bells, that tell that they are dead: of those that this one watches, say."""
        belfry = self._belfry
        own = self.lessee.process if self.lessee is not None else 0
        if belfry is None:
            return []
        among = self._others if among is None else among
        return [(process, bell) for process, bell in among if process != own and bell and not belfry.is_alive(bell)]

    def misses(self, bell: str) -> bool:
        """Return whether a process that had this bell when it was last looked for may be dead, and shows it soon."""
        return self._belfry is not None and self._belfry.misses(bell)

    def may_have_moved(self) -> bool:
        """Return False when the WAL tells that nobody can have committed for a while; costs no more than a `stat`."""
        if self.path == files.MEMORY:
            return False
        try:
            changed = self._wal.stat().st_mtime
        except OSError:
            return True
        # A file's time is as coarse as the kernel's tick, so one look after the last change is not enough.
        was, self._wal_changed = self._wal_changed, changed
        return changed != was or abs(time.time() - changed) < WAL_SETTLED

    def has_moved(self) -> bool:
        """Return whether anyone else committed since the last call, and learn whom to watch."""
        with files.mapped(self.path):
            db = self._usable()
            version = db.execute("PRAGMA data_version").fetchone()[0]
            if version == self._seen_version:
                return False
            self._seen_version = version
        self._learn_others()
        return True

    def _learn_others(self) -> None:
        if self.lessee is not None:
            self._others = processes.watched(self.read(), self.lessee.process)

    # --- housekeeping ------------------------------------------------------------------------------------------------

    def tidy(self, *, idle: bool) -> bool:
        """Do a slice of what nobody waits for; return whether there is more to do."""
        with self.write(durable=False) as books:
            return housekeeping.tidy(books, idle=idle)

    def write_back(self) -> bool:
        """Copy the WAL into the file, so that what was given back leaves the disk, and return whether all of it was.

        It does not wait for those who read or write just now: others would wait for us at the turnstile.
        """
        with files.mapped(self.path), self._turn():
            if self._db is None:
                return True
            self.look()
            is_busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.look()
        return not is_busy
