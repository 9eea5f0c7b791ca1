"""Work that nobody waits for: to end, forget and give back what is over, in slices that cost others little."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TypeVar

from filao.engines.sqlite import moves, operators, own, processes
from filao.engines.sqlite.books import Books
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.jobs import Jobs
from filao.errors import FilaoError
from filao.guarded import Log

log: Log = Log(logging.getLogger("filao.sqlite"))

R = TypeVar("R")

TIDIES_WITHIN = 0.25  # seconds that it waits for a turn, because looks wait behind it in the same thread
TIDY_EVERY = 1.0  # seconds between rounds of housekeeping, after a write of ours
TIDY_SLICES_BUSY = 4  # slices of a few milliseconds in one round under traffic, twice as many when they were not enough
TIDY_SLICES_MAX = 100  # slices in one round: all of a second, and so the most in one without traffic
FREE_PAGES_KEPT = 256  # 1 MiB is not worth the work of giving it back
FREE_PAGES_BUSY = 2_560  # 10 MiB that stay free under traffic
TIDY_PAGES = 500  # pages given back to the file system in one turn: a few milliseconds of the write lock
TIDY_EXPIRED = 500  # messages that outlived their ttl and are ended in one turn: some 10 ms of the write lock


def tidy(books: Books, *, idle: bool) -> bool:
    """Do a slice; return whether there is more to do.

    Under traffic, as many pages stay free as are in use, because they will soon be used again.
    """
    more = processes.forget_keys(books) | processes.forget_events(books)
    legible = filter(None, map(books.legible, operators.outlived(books)))
    for row in islice(legible, 1):
        more |= bool(moves.let_expire(books, row, TIDY_EXPIRED))
    free, pages = (books.db.execute(f"PRAGMA {name}_count").fetchone()[0] for name in ("freelist", "page"))
    if free > (FREE_PAGES_KEPT if idle else max(FREE_PAGES_BUSY, pages - free)):
        books.db.execute(f"PRAGMA incremental_vacuum({TIDY_PAGES})").fetchall()
        more |= books.db.execute("PRAGMA freelist_count").fetchone()[0] < free
    return more


class Housekeeper:
    """Tidies up, from the event loop, while its file is open."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs
        self._slices = TIDY_SLICES_BUSY
        """In one round under traffic: as many as keep up with what it leaves behind."""
        self._is_behind = False
        """Whether the last round left anything to do."""
        self._is_wal_told = False
        """Whether the log says that the WAL is too large."""

    async def keep(self) -> None:
        """Tidy up, in a round: a little each second under traffic, and the rest in the first second without."""
        await asyncio.sleep(TIDY_EVERY)
        self._tell_of_wal()
        idle = self._has_been_idle()
        if not idle or self._is_behind:
            self._is_behind = True
            with suppress(FilaoError):
                self._is_behind = await self._round(idle=idle)

    def _has_been_idle(self) -> bool:
        """Return whether nothing was written since the last call."""
        if not self._database.has_written:
            return True
        self._database.has_written = False  # only now: what is committed before this belongs to the present round
        return False

    async def _round(self, *, idle: bool) -> bool:
        """Return whether there is more to do in the next round."""
        more = True
        for _ in range(TIDY_SLICES_MAX if idle else self._slices):
            more = await self._soon(partial(self.tidy_some, idle=idle))
            if not more or (idle and self._database.has_written):
                break
        self._slices = min(2 * self._slices, TIDY_SLICES_MAX) if more else max(TIDY_SLICES_BUSY, self._slices // 2)
        if not idle or more or self._database.has_written:
            return True
        return not await self._soon(self._database.write_back)

    def _tell_of_wal(self) -> None:
        """Log once that the WAL has grown too large, before it fills the disk."""
        path = self._database.hold.path
        is_large = own.wal_size(path) > own.WAL_NOTABLE
        if is_large and not self._is_wal_told:
            log.warning("the WAL of %s has %s", path, own.why_wal_grows(path))
        self._is_wal_told = is_large

    def _soon(self, job: Callable[[], R]) -> Awaitable[R]:
        return self._jobs.alone(job, time.monotonic() + TIDIES_WITHIN)

    def tidy_some(self, *, idle: bool) -> bool:
        """Do a slice in a transaction of its own; return whether there is more to do."""
        with self._database.write(durable=False) as books:
            return tidy(books, idle=idle)
