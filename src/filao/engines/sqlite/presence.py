"""This process among the others that have the file open: it enters itself, and watches some of them.

Processes watch each other in a circle. When one dies, which its bell shows, a process that watches it ends its leases.
A commit on the user's own connection rings no bell, but SQLite's count of the commits by others shows it.
"""

import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress

from filao.engines.sqlite import files, ground, processes, waitlist
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.receive import NOBODY, Lessee

WAL_SETTLED = 1.0  # seconds after the last change of the WAL during which each look goes into the database


class Presence:
    """What one process knows of those that receive from the same file, including itself."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._hold = database.hold
        self._others: Sequence[tuple[int, str]] = []
        """The processes, and their bells, that this one watches."""
        self._entered: tuple[int, str, str] = (0, "", "")
        """How this process was entered: its number, its bell and its name."""
        self._seen: tuple[sqlite3.Connection, int] | None = None
        """A connection, and the count of commits by others there, at the last look."""
        self._wal_changed = -1.0

    def enter(self, name: str) -> Lessee:
        """Enter this process among those that receive, with a bell where the file system has FIFOs."""
        database, belfry = self._database, self._hold.belfry
        if database.lessee is not NOBODY:
            return database.lessee
        with files.mapped(self._hold.path):
            bell = belfry.make()
        try:
            with database.write(durable=False) as books:
                self._hold.agree_on_clock(books.db)  # before it takes leases: another may have set it meanwhile
                rung_by = bell.name if bell is not None else ""
                process = processes.enter(books, rung_by, name)
                known = {row[0] for row in books.db.execute("SELECT bell FROM filao_process")}
            belfry.own = bell
            with files.mapped(self._hold.path):
                self._hold.watch_bell()
        except BaseException:  # one that was entered is dead without its bell, and the next try enters another
            belfry.own = None
            if bell is not None:
                bell.close()
            raise
        database.lessee, self._entered = Lessee(process, name), (process, rung_by, name)
        with suppress(OSError):  # the next process that enters looks again
            for forgotten in belfry.forgotten(known):
                belfry.take_down(forgotten)
        return database.lessee

    def resign(self) -> bool:
        """Give back a slice of the leases of this process; return whether there are more."""
        if self._database.lessee is NOBODY:
            return False
        with self._database.write(durable=False) as books:
            return not processes.resign(books, self._database.lessee.process)

    def pass_on(self, queue: str) -> None:
        """Let the next process be called, because nobody waits for this queue here any more."""
        if self._database.lessee is not NOBODY:
            with self._database.write(durable=False) as books:
                waitlist.leave(books, books.row(queue), self._database.lessee.process)
                books.row(queue).fresh = True

    def dead(self) -> list[tuple[int, str]]:
        """Return the watched processes that are dead, with their bells. May be called in any thread."""
        return self._hold.belfry.dead(self._others)

    def bury_some(self) -> None:
        """End a slice of the leases of a process that died; when none is left, watch others in its place."""
        for process, bell in self.dead()[:1]:
            with self._database.write(durable=False) as books:
                is_done = processes.bury(books, process)
            if is_done:
                self._hold.belfry.take_down(bell)
                self._learn_others()

    def may_have_moved(self) -> bool:
        """Return False when the WAL shows that nobody has committed for a while. It costs no more than a `stat`."""
        if self._hold.path == files.MEMORY:
            return False
        try:
            changed = os.stat(f"{self._hold.path}-wal").st_mtime  # noqa: PTH116 - often: a Path costs as much as this
        except OSError:
            return True
        # A file's time is as coarse as the kernel's tick, so a single look after the last change is not enough.
        was, self._wal_changed = self._wal_changed, changed
        return changed != was or abs(time.time() - changed) < WAL_SETTLED

    def has_moved(self) -> bool:
        """Return whether anybody else has committed since the last call; if so, learn whom to watch."""
        with files.mapped(self._hold.path):
            db = self._database.usable()
            seen = (db, db.execute("PRAGMA data_version").fetchone()[0])
            if seen == self._seen:
                return False
            self._seen = seen
        self._learn_others()
        return True

    def _learn_others(self) -> None:
        """Learn whom to watch. A process whose own entry is gone may share its number, and so its leases, with another
        that was entered since.
        """
        if self._database.lessee is not NOBODY:
            books = self._database.read()
            if not processes.is_entered(books, *self._entered):
                self._hold.lost = self._hold.lost or ground.RESTORED
                self._hold.check_lost()
            self._others = processes.watched(books, self._database.lessee.process)
