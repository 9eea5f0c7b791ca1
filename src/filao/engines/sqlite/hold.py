"""The file as one process holds it: a connection, what that stands on, its turn to write, and the bells beside it.

Everything here blocks and runs in the engine's one database thread, unless its docstring says otherwise.

Invariant: no job keeps the connection in a variable while it waits for its turn, because a fork may close it meanwhile
(`filao.forks`). The next job opens it again.
"""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filao.engine import OpenAgain
from filao.engines.sqlite import files, ground, own, processes, scrutiny
from filao.engines.sqlite.bell import Belfry
from filao.engines.sqlite.clock import FileClock
from filao.engines.sqlite.folder import TURNSTILE, Folder, share
from filao.engines.sqlite.ground import LOOKED_WITHIN, Ground, Loss
from filao.engines.sqlite.thread import Ticket
from filao.engines.sqlite.turnstile import Noted, Turnstile
from filao.errors import ConfigurationError, EngineError, EngineUnavailable
from filao.forks import gate, keep

TURN_TO_CLOSE_WITHIN = 0.5  # seconds that closing waits for its turn

_inherited: set[Path] = set()
"""Files that could not be closed before this process was forked: SQLite is mistaken about its locks on them."""


class Hold:
    """One process's hold on a Filao file, or on a private one in memory."""

    def __init__(self, path: Path, *, durable: bool, clock: Callable[[], float]) -> None:
        self.path: Path = path
        self.name: str = ""
        """The random name of the file, with which the ids of messages from old versions begin."""
        self.clock: FileClock = FileClock(clock, lambda db: any(map(self.belfry.answers, processes.bells(db))))
        self.turnstile: Turnstile = Turnstile(None)
        self.belfry: Belfry = Belfry(None)
        self.db: sqlite3.Connection | None = None
        """None until it is opened, and again after a fork or when the disk failed."""
        self.lost: Loss | None = None
        """What happened to the file that was opened; None while it is still there."""
        self.is_closing: bool = False
        """Whether no thread may wait in line any more, and no visit begin: what it leased would not be given back."""
        self._left: Turnstile | None = None
        """A turnstile at which a thread was left waiting."""
        self._given = path
        self._folder: Folder | None = None
        """Where the turnstile and the bells are; None in memory and on Windows."""
        self._durable = durable
        self._flushes: bool | None = durable
        """Whether commits are flushed; None: unknown, because a visit was interrupted while it changed that."""
        self.confirms: bool = True
        """Whether a caller will be told that the next commit is durable."""
        self._has_failed = False
        """Whether the disk failed, so that the file must be checked before it is used again."""
        self._ground: Ground | None = None
        self._looked_at = 0.0
        self._is_suspicious = False

    # --- opening and closing -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Resolve the path of the file, and check that it can be used."""
        if self.path != files.MEMORY:
            self._given = self.path.absolute()
            self.path = files.resolved(self.path)  # one file, one turnstile, by whatever path it is called
            files.check_path(self.path)

    def prepare(self) -> None:
        """Look at the file, make it if there is none, and open the folder beside it.

        Raises SQLite's own error when another program keeps it locked: then nothing was done, and the call can be
        repeated.
        """
        if self.path == files.MEMORY:
            return
        files.check_is_database(self.path)
        files.create(self.path)
        if os.name == "posix":  # elsewhere SQLite's own locks and polling must do
            self._folder = Folder(files.sidecar(self.path), self.path.stat())
            self.turnstile = Turnstile(self._folder)
            self.belfry = Belfry(self._folder)

    def connect(self) -> sqlite3.Connection:
        """Open the connection, for the first time or again. Called in a turn."""
        if self.path in _inherited:
            raise ConfigurationError(
                f"{self.path} cannot be used in this process (pid {os.getpid()}): it was forked while the file was "
                f"open, because a statement ran there, or because Python was told of the fork only afterwards, as by a "
                f"server written in C; SQLite's locks would be wrong. Start the process again, or by spawn instead of "
                f"fork; let such a server load the program after it has forked."
            )
        if self._ground is not None and not self._ground.is_file_there():
            self.lost = self._ground.missing()
            self.check_lost()
        others = self.turnstile_path is not None and ground.is_open(self.path.with_name(self.path.name + "-shm"))
        db = files.connect(self.path, full=self._durable, noted=self.turnstile.noted())
        try:
            if others:
                self._check_locks()
            self._begin(db)
        except BaseException:
            db.close()
            raise
        self.db = db
        self._flushes = self._durable
        self._has_failed = False
        return db

    def _check_locks(self) -> None:
        """Raise `ConfigurationError` when SQLite believes in locks of another connection that this process lacks."""
        if self.turnstile_path is not None and not own.has_open(self.path, self.turnstile_path):
            raise ConfigurationError(
                f"{self.path} cannot be used in this process (pid {os.getpid()}) yet: a connection of the program's "
                f"own is open on it, for which SQLite believes to have locks that it has not, so that what is sent "
                f"could be lost. It was open when this process was forked, or the file was copied here meanwhile. "
                f"Nothing was done: close that connection, here or before the fork (in Django: "
                f"django.db.connections.close_all()), and open the queue then."
            )

    def _begin(self, db: sqlite3.Connection) -> None:
        """Check what was opened, and bring it up to date."""
        scrutiny.check(db, self.path)
        has_changed = files.migrate(db, self.path)
        self._set_clock(db)
        if has_changed:  # so that the file itself, not only its WAL, can be told from others
            db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        self.name = db.execute("SELECT value FROM filao_meta WHERE name = 'file'").fetchone()[0]
        if self.path != files.MEMORY:
            if self._folder is not None:
                _share_wal(self.path)
            self._ground = Ground(self.path, self._given, self._folder.path if self._folder is not None else None)
            self.turnstile.note(Noted(self._ground.cookie, self._ground.inode))
            self.watch_bell()
        if self._has_failed:
            files.check_whole(db, self.path)

    def _set_clock(self, db: sqlite3.Connection) -> None:
        """Set the file's clock after a start of the machine."""
        if self.clock.has_begun(db):
            return
        db.execute("BEGIN IMMEDIATE")
        try:
            self.agree_on_clock(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def agree_on_clock(self, db: sqlite3.Connection) -> None:
        """In a transaction, set the clock after a start of the machine; leases are void if their holders are dead."""
        if self.clock.begin(db) and not any(not bell or self.belfry.is_alive(bell) for bell in processes.bells(db)):
            processes.void_leases(db, self.clock.now(db))

    def set_durable(self, *, durable: bool) -> None:
        """Choose whether the next commit is flushed to the disk."""
        self.confirms, flushes = durable, durable and self._durable
        if self.db is not None and self._flushes is not flushes:
            self._flushes = None
            try:
                files.set_durable(self.db, durable=flushes)
            except files.FAILURES as error:
                raise files.engine_error(self.path, error) from error
            self._flushes = flushes

    def renew(self) -> None:
        """Close a connection on which one of the user's statements may have left something.

        The next job opens the file again. A database in memory would be gone with its connection, so it is copied to
        another one; if memory does not suffice for both, it stays where it is.
        """
        if self.path != files.MEMORY:
            self.leave()
        elif self.db is not None:
            with suppress(sqlite3.Error):
                self.db, left = files.moved(self.db, full=self._durable), self.db
                self._flushes = self._durable
                left.close()

    def break_off(self) -> None:
        """Close a connection whose disk failed, for good; the next one first checks the file."""
        db, self.db, self._has_failed = self.db, None, True
        if db is not None:
            with suppress(sqlite3.Error):
                self._let_go(db)

    def close(self) -> None:
        """Close the file; the last process to do so writes its WAL back.

        This happens in a turn, or without one if none comes soon: see `leave`.
        """
        self.belfry.close()
        until = time.monotonic() + TURN_TO_CLOSE_WITHIN
        try:
            if self.db is not None:
                with gate.outside():
                    self.turnstile.enter_by(lambda: time.monotonic() > until)
            db, self.db = self.db, None  # a fork may have closed it meanwhile
            if db is not None:
                with files.mapped(self.path):
                    self._let_go(db)
        finally:
            if self.turnstile.is_held:
                self.turnstile.leave()
            self.turnstile.close()
            if self._folder is not None:
                self._folder.close()

    def _let_go(self, db: sqlite3.Connection) -> None:
        """Close a connection, without writing its WAL into another file that may lie there now."""
        self.lost = self.lost or (self._ground.look() if self._ground is not None else None)
        if self.lost is not None and self._ground is not None:
            self._ground.let_go(db, self.lost)
        else:
            db.close()

    # --- turns -------------------------------------------------------------------------------------------------------

    @property
    def turnstile_path(self) -> Path | None:
        """Where the turnstile is; None where there is none."""
        return None if self._folder is None else self._folder.path / TURNSTILE

    def take_turn(self, ticket: Ticket | None = None) -> None:
        """Wait for a turn, which `turnstile.leave` ends; meanwhile no transaction is open here.

        It waits in line, where the kernel keeps the order. But while a file is opened or closed no thread may block in
        the line, nor while another one is left waiting there: then it tries again and again until the time is over.
        """
        if self.turnstile.try_enter():
            return
        with gate.outside():
            until = time.monotonic() + files.BUSY_TIMEOUT if ticket is None else ticket.until
            may_not_block = self._ground is None or self.is_closing or self._is_left_waiting()
            enter = self.turnstile.enter_by if may_not_block else self.turnstile.enter
            if not enter(lambda: time.monotonic() > until or (ticket is not None and ticket.is_over)):
                raise self.refusal()

    def _is_left_waiting(self) -> bool:
        return self._left is not None and self._left.is_waited_at

    def leave_waiting(self) -> bool:
        """Leave the thread that waits for a turn, so that another can use the file; return False when none waits."""
        if self._folder is None or not self.turnstile.is_waited_at:
            return False
        try:
            anew = Turnstile(self._folder)
        except (OSError, EngineError):  # no descriptor is left, or something else was put in its place
            return False
        if not self.turnstile.leave_waiting():
            anew.close()
            return False
        self._left, self.turnstile = self.turnstile, anew
        return True

    def refusal(self) -> EngineUnavailable:
        """Return the error of a call for which no turn has come in time; it names what is in the way."""
        path, seconds, turnstile = self.path, f"{files.BUSY_TIMEOUT:g} seconds", self.turnstile_path
        if turnstile is not None and own.has_turn(turnstile):
            return EngineUnavailable(
                f"{path} has been locked for {seconds} by another broker of this process, in a transaction or a call "
                f"that takes long. Nothing was done; end that first, or use that broker for both."
            )
        if own.holds_lock(path):
            return EngineUnavailable(own.refusal(path))
        return EngineUnavailable(
            f"{path} has been locked for {seconds} by {own.in_the_way(path, turnstile)}, which may be paused or stuck "
            f"in a transaction. Nothing was done; let it go on, or end it."
        )

    # --- forks: see `filao.forks.Storage` ----------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Make the running statement fail. May be called from any thread."""
        db = self.db  # which its own thread may let go meanwhile
        if db is not None:
            with suppress(sqlite3.Error):
                db.interrupt()

    def leave(self) -> None:
        """Close the connection, without a turn: this thread may be the one for which the turn's holder waits.

        SQLite writes the WAL back only if no other process has the file open, and keeps others out meanwhile.
        """
        db, self.db = self.db, None
        if db is not None:
            with suppress(sqlite3.Error):
                self._let_go(db)

    def inherit(self) -> None:
        """In a child: forget what is the parent's, namely its turn, its bell and the bells that it rings."""
        if self.db is not None:
            _inherited.add(self.path)
        keep(self.db)
        for turnstile in (self.turnstile, self._left):
            if turnstile is not None:
                turnstile.close()
        self.belfry.let_go()
        if self._folder is not None:
            self._folder.close()

    # --- the ground --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Raise `EngineError` when the file is no longer what was opened. What was committed before this is in it."""
        if self.lost is None and self._ground is not None and self.db is not None:
            found = self._ground.look() or (self._ground.missing() if self._is_suspicious else None)
            self.lost = self.lost or found  # another thread may have found it meanwhile
            self._is_suspicious = False
            self._looked_at = time.monotonic()
        if self.lost is not None:
            self.check_lost()

    def look_before_write(self, *, others_wrote: bool) -> None:
        """Look, unless that was done a moment ago. If others wrote, look at the WAL in any case: it may be damaged."""
        self.look_if_due()
        if others_wrote and self._ground is not None:
            self.lost = self._ground.look_at_wal() or self.lost
            self.check_lost()

    def look_at_commit(self) -> None:
        """Look before a commit is confirmed; a commit that confirms nothing need not look each time."""
        (self.look if self.confirms else self.look_if_due)()

    def look_if_due(self) -> None:
        """Look, unless that was done a moment ago."""
        if self._is_suspicious or time.monotonic() - self._looked_at > LOOKED_WITHIN:
            self.look()

    def may_be_lost(self) -> bool:
        """Return whether a look is due for those that wait. It costs no more than a few `stat`s, in any thread."""
        if self._ground is not None and self.db is not None and self.lost is None:
            self._is_suspicious = self._ground.missing() is not None
            return self._is_suspicious or self._ground.has_changed()
        return self.lost is not None

    def check_lost(self) -> None:
        """Raise `EngineError` when the file is known to be no longer what was opened."""
        if self.lost is not None:
            again = self._ground is not None and self._ground.may_be_opened_again(self.lost)
            raise (OpenAgain if again else EngineError)(
                f"{self.path} {self.lost.what}. This call is not confirmed, and nothing more is done with the file "
                f"that was opened. What to do: stop the processes that use it, then {self.lost.remedy}."
            )

    def error(self, error: Exception) -> EngineError:
        """Return our error for one of SQLite's: if the file is no longer what was opened, the error says that."""
        try:
            self.look()
        except EngineError as lost:
            return lost
        if files.was_interrupted(error):
            return _interrupted(self.path, by_close=self.is_closing)
        return files.engine_error(self.path, error)

    def watch_bell(self) -> None:
        """Check from now on that this process's own bell, and so its folder, is still there."""
        if self.belfry.own is not None and self._ground is not None and self._folder is not None:
            self._ground.watch(self._folder.path / self.belfry.own.name)

    # --- housekeeping ------------------------------------------------------------------------------------------------

    def write_back(self) -> bool:
        """Copy the WAL into the file, so that free space leaves the disk; return whether all of it was copied.

        Called in a turn. It does not wait for readers, because others would wait for this turn meanwhile.
        """
        if self.db is None:
            return True
        with files.mapped(self.path):
            self.look()
            is_busy, *_ = self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self.look()
        return not is_busy


def _interrupted(path: Path, *, by_close: bool) -> EngineUnavailable:
    why, remedy = (
        ("its broker was closed meanwhile, so this call was interrupted", "open the broker again, or another")
        if by_close
        else ("this process forked and waited no longer for this call, so it was interrupted", "try again")
    )
    return EngineUnavailable(f"{path}: {why}. Nothing of it was done; {remedy}.")


def _share_wal(path: Path) -> None:
    """Let the group of a shared file use its WAL: SQLite leaves it to the group of the process that makes it."""
    about = path.stat()
    for part in ("-wal", "-shm"):
        share(path.with_name(path.name + part), about)
