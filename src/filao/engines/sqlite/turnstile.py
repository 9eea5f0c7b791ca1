"""The turnstile: processes take turns to write, in about the order in which they came.

SQLite's own busy handler lets waiters sleep and try again, and whichever comes at the right moment goes first: among
eight busy writers some starve for seconds. A blocking `flock` on a file beside the database queues them in the kernel,
which also frees it when its holder dies. It is taken around every write, checkpoint and close. So our processes never
checkpoint and commit at the same instant, which can corrupt the WAL before SQLite 3.51.3.
(https://www.sqlite.org/wal.html, "The WAL-reset bug")

Only a turn ends a blocking `flock`, and none comes while another process stands still in its own. So a thread that
waits in vain can be left there: another thread does its work, at the same turnstile opened anew.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from filao.engines.sqlite.folder import TURNSTILE, Folder

if sys.platform != "win32":  # there SQLite's own locks must do
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

_NOTE = Struct("<3Q")
TRIED_EVERY = 0.002  # seconds, by those that must not block: often enough to find a gap between others' turns


class Noted(NamedTuple):
    """What was known of the file when it was last opened; 0: nothing."""

    cookie: int = 0
    """The count of changes of its schema."""
    inode: int = 0


NOTHING = Noted()


class LeftWaiting(BaseException):
    """A turn has come to a thread that was left waiting for it: the thread must end and touch nothing."""


class Turnstile:
    """Lets one process at a time through; without a folder, everybody."""

    def __init__(self, folder: Folder | None) -> None:
        self.is_held: bool = False
        self.is_waited_at: bool = False
        """Whether a thread blocks here until its turn comes."""
        self._is_left = False
        self._deciding = threading.Lock()
        """Held while it is decided whether that thread gets its turn, or was left."""
        self._file = -1
        if folder is not None and sys.platform != "win32":
            self._file = folder.open_turnstile()

    def enter(self, is_over: Callable[[], bool]) -> bool:
        """Wait in line for this process's turn, unless `is_over` before it waits; return whether the turn has come.

        Raises `LeftWaiting` when it comes after `leave_waiting`.
        """
        if sys.platform != "win32" and self._file >= 0:
            self.is_waited_at = True  # before `is_over`, so that one of this thread and `leave_waiting` sees the other
            try:
                if is_over():
                    return False
                flock(self._file, LOCK_EX)
            finally:
                with self._deciding:
                    self.is_waited_at = False
                if self._is_left:
                    self.leave()
                    self.close()
                    raise LeftWaiting
        self.is_held = True
        return True

    def enter_by(self, is_over: Callable[[], bool]) -> bool:
        """Try to take a turn until `is_over`, in the gaps that those in line leave; return whether it was taken."""
        while not self.try_enter():
            if is_over():
                return False
            time.sleep(TRIED_EVERY)
        return True

    def leave_waiting(self) -> bool:
        """Leave the thread that waits here, which closes this when its turn comes; return False when none waits."""
        with self._deciding:
            self._is_left = self.is_waited_at
            return self._is_left

    def try_enter(self) -> bool:
        """Take a turn if nobody has it; return whether it was taken."""
        if sys.platform != "win32" and self._file >= 0:
            try:
                flock(self._file, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                return False
        self.is_held = True
        return True

    def leave(self) -> None:
        """End the turn."""
        self.is_held = False
        if sys.platform != "win32" and self._file >= 0:
            flock(self._file, LOCK_UN)

    def note(self, noted: "Noted") -> None:
        """Write down what is known of the database, for the next process that opens it."""
        if self._file >= 0:
            os.pwrite(self._file, _NOTE.pack(noted.cookie, noted.inode, os.fstat(self._file).st_ino), 0)

    def noted(self) -> "Noted":
        """Return what was written down; without the inode if the turnstile is a copy: the database is one, too."""
        if self._file < 0:
            return NOTHING
        cookie, inode, own = _NOTE.unpack(os.pread(self._file, _NOTE.size, 0).ljust(_NOTE.size, b"\0"))
        return Noted(cookie, inode if own == os.fstat(self._file).st_ino else 0)

    def close(self) -> None:
        """Forget the file; it stays where it is, because another process may be waiting at it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_passable(folder: Path, within: float) -> bool:
    """Return whether a turn comes `within` so many seconds, so that no process stands still in one."""
    if sys.platform == "win32":
        return True
    file = os.open(folder / TURNSTILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    until = time.monotonic() + within
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                flock(file, LOCK_EX | LOCK_NB)
                return True
            if time.monotonic() > until:
                return False
            time.sleep(TRIED_EVERY)
    finally:
        os.close(file)
