"""The turnstile: processes take turns to write, in about the order in which they came.

SQLite's own busy handler lets waiters sleep and try again, and one that comes at the right moment goes first: among
eight busy writers some starve for seconds. A blocking `flock` on a file beside the database queues them in the kernel,
which also frees it when its holder dies. It is taken around every write, checkpoint and close, and so keeps ours from
checkpointing and committing at the same instant, which SQLite before 3.51.3 can answer with a corrupt WAL.
(https://www.sqlite.org/wal.html, "The WAL-reset bug")
"""

import contextlib
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path

from filao.engines.sqlite.folder import TURNSTILE, Folder

if sys.platform != "win32":  # there SQLite's own locks must do
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

_NOTE = 8  # bytes
TRIED_EVERY = 0.002  # seconds, by a caller that only wants to know whether it would get through


class Turnstile:
    """Lets one process at a time through; `None` as its folder lets everybody through."""

    def __init__(self, folder: Folder | None) -> None:
        self.is_held: bool = False
        self._file = -1
        if folder is not None and sys.platform != "win32":
            self._file = folder.open_turnstile()

    @contextlib.contextmanager
    def turn(self) -> Generator[None]:
        """Wait for this process's turn, and end it on leaving. Not for two threads at once."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Wait for this process's turn."""
        if sys.platform != "win32" and self._file >= 0:
            flock(self._file, LOCK_EX)
        self.is_held = True

    def try_enter(self) -> bool:
        """Take a turn if it is nobody's just now; return whether it is this process's."""
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

    def note(self, number: int) -> None:
        """Leave a number here for those who come later."""
        if self._file >= 0:
            os.pwrite(self._file, number.to_bytes(_NOTE, "little"), 0)

    def noted(self) -> int:
        """Return the number that was left here; 0 when there is none."""
        return int.from_bytes(os.pread(self._file, _NOTE, 0), "little") if self._file >= 0 else 0

    def close(self) -> None:
        """Forget the file; it stays where it is, because another process may be waiting at it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_passable(folder: Path, within: float) -> bool:
    """Return whether a turn comes `within` so many seconds: whether no process stands still in one."""
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
