"""A bell for each process: a FIFO beside the database that wakes its owner, and shows when its owner is dead.

The owner holds the reading end. Others ring by writing the number of a queue into it, when they commit what the owner
waits for. When the owner dies, however that happens, the kernel closes the reading end, and opening the FIFO for
writing fails: a bell that cannot be rung belongs to a dead process, whose leases may be taken over at once. Bells only
make this faster: a lease also ends when its time is over, and without bells everything still works.
"""

import errno
import os
import secrets
import struct
import time
from collections.abc import Collection, Iterable

from filao.engines.sqlite.folder import Folder

_RING = struct.Struct("=q")
_READ_MAX = 4096  # bytes: takes all rings that came together
_ROPES_MAX = 256  # writing ends that are kept open
MISSED_FOR = 1.0  # seconds that a bell must be gone: by then its owner, if it lives, has noticed and stopped working
_ENTERED_WITHIN = 60.0  # seconds, at most, between making a bell and entering its owner in the file


class Bell:
    """The bell of this process."""

    def __init__(self, folder: Folder) -> None:
        self.name: str = secrets.token_hex(8)
        self._folder = folder
        self.reader: int = folder.make_bell(self.name)
        self._writer = -1
        try:
            # A writer of our own: otherwise the reader would see "end of file" whenever nobody is ringing.
            self._writer = folder.open_bell(self.name)
        except BaseException:
            self.close()
            raise

    def heard(self) -> set[int]:
        """Return the numbers of the queues that others rang for since the last call."""
        try:
            rings = os.read(self.reader, _READ_MAX)
        except BlockingIOError:
            return set()
        whole = len(rings) - len(rings) % _RING.size  # something else may have written to it
        return {number for (number,) in _RING.iter_unpack(rings[:whole])}

    def close(self) -> None:
        """Close the bell and remove it."""
        self._folder.remove_bell(self.name)
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends but leave the FIFO to its owner: for a child after a fork."""
        for end in (self.reader, self._writer):
            if end >= 0:
                os.close(end)
        self.reader = self._writer = -1


class Belfry:
    """The bells beside a file: this process's own, and those of others, which it rings.

    Without a folder there are none, and nobody is known to be dead.
    """

    def __init__(self, folder: Folder | None) -> None:
        self.own: Bell | None = None
        """The bell of this process, once the process is entered among those that receive."""
        self._folder = folder
        self._ropes: dict[str, int] = {}
        """The writing ends that are open, by name: whoever was rung once will be rung again."""
        self._missed: dict[str, float] = {}
        """The bells that are not where they should be, and since when (`time.monotonic`)."""

    def make(self) -> Bell | None:
        """Make a bell for this process; None where bells cannot be made. The caller sets `own` once others know of it.

        Raises `OSError` when no file descriptor is left: that passes, but None would mean no bell for ever.
        """
        if self._folder is None or not hasattr(os, "mkfifo"):
            return None
        try:
            return Bell(self._folder)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None  # a file system without FIFOs; there polling has to do

    def ring(self, name: str, queue: int) -> None:
        """Wake the owner of a bell. It never fails: a ring is a hint, and a commit must not depend on it."""
        try:
            rope = self._ropes.get(name, -1)
            os.write(rope if rope >= 0 else self._take(name), _RING.pack(queue))
        except BlockingIOError:
            pass  # its FIFO is full of rings and needs no more
        except OSError:
            self._drop(name)  # the owner is dead, or no descriptor is left: a living owner will find out by polling

    def is_alive(self, name: str) -> bool:
        """Return whether the process that owns this bell lives; True whenever that cannot be told.

        The bell of a living process is made before the process is entered and removed after it is struck off, and a
        process that loses its bell stops working (see `ground.py`). So the owner of a bell that is gone for a while is
        dead, too.
        """
        if self._folder is None:
            return True
        try:
            os.close(self._folder.open_bell(name))
        except FileNotFoundError:
            return time.monotonic() - self._missed.setdefault(name, time.monotonic()) < MISSED_FOR
        except OSError as error:
            return error.errno not in (errno.ENXIO, errno.EINVAL, errno.ELOOP)  # nobody reads it, or it is no bell
        self._missed.pop(name, None)
        return True

    def answers(self, name: str) -> bool:
        """Return whether the process that owns this bell lives; False whenever that cannot be told."""
        try:
            if self._folder is not None:
                os.close(self._folder.open_bell(name))
        except OSError:
            return False
        return self._folder is not None

    def dead(self, among: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return those of these processes, given with their bells, that are known to be dead; never this one."""
        own = self.own.name if self.own is not None else ""
        return [(process, bell) for process, bell in among if bell not in ("", own) and not self.is_alive(bell)]

    def misses(self, name: str) -> bool:
        """Return whether a bell was not where it should be when it was last looked for."""
        return name in self._missed

    def take_down(self, name: str) -> None:
        """Remove the bell of a process that died."""
        self._drop(name)
        self._missed.pop(name, None)
        if self._folder is not None:
            self._folder.remove_bell(name)

    def forgotten(self, known: Collection[str]) -> list[str]:
        """Return the bells of processes that died before they were entered anywhere."""
        if self._folder is None:
            return []
        before = time.time() - _ENTERED_WITHIN
        unknown = [name for name, made_at in self._folder.bells() if made_at < before and name not in known]
        return [name for name in unknown if not self.is_alive(name)]

    def close(self) -> None:
        """Close and remove this process's own bell, and close the others."""
        own, self.own = self.own, None
        self.let_go()
        if own is not None:
            own.close()

    def let_go(self) -> None:
        """Close all bells but remove none: for a child after a fork."""
        for name in list(self._ropes):
            self._drop(name)
        if self.own is not None:
            self.own.let_go()

    def _take(self, name: str) -> int:
        if self._folder is None:
            raise FileNotFoundError(name)
        if len(self._ropes) >= _ROPES_MAX:
            self._drop(next(iter(self._ropes)))
        self._ropes[name] = rope = self._folder.open_bell(name)
        return rope

    def _drop(self, name: str) -> None:
        rope = self._ropes.pop(name, -1)
        if rope >= 0:
            os.close(rope)
