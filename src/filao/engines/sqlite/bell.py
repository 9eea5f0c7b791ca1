"""A bell for each process: a FIFO beside the database that wakes its owner, and that tells when its owner is dead.

The owner holds the reading end. Others ring by writing the number of a queue into it, when they commit what gives the
owner something to look for. The kernel closes the reading end when the owner dies, however it dies, and from then on
opening the FIFO for writing fails: so a bell that nobody can ring belongs to a dead process, whose leases may be taken
over at once. This is only an accelerator. A lease that runs out is the truth, and without bells everything still works.
"""

import errno
import os
import secrets
import struct
import time
from collections.abc import Collection, Iterable

from filao.engines.sqlite.folder import Folder

_RING = struct.Struct("=q")
_READ_MAX = 4096  # bytes: a FIFO's reader takes all rings that came together
_ROPES_MAX = 256  # writing ends that are kept open
MISSED_FOR = 1.0  # seconds that a bell must be gone: by then its owner, if it lives, has noticed and works no more
_ENTERED_WITHIN = 60.0  # seconds from the hanging of a bell until its owner is entered, at most


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
        """Return the queues that were rung for since the last call."""
        try:
            rings = os.read(self.reader, _READ_MAX)
        except BlockingIOError:
            return set()
        whole = len(rings) - len(rings) % _RING.size  # something else may have written to it
        return {number for (number,) in _RING.iter_unpack(rings[:whole])}

    def close(self) -> None:
        """Take the bell down."""
        self._folder.remove_bell(self.name)
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends, and leave the FIFO to the process that owns it: for a child after a fork."""
        for end in (self.reader, self._writer):
            if end >= 0:
                os.close(end)
        self.reader = self._writer = -1


class Belfry:
    """The bells beside a file: this process's own, and those of the others, as this one rings them.

    Without a folder there are none, and nobody is known to be dead.
    """

    def __init__(self, folder: Folder | None) -> None:
        self.own: Bell | None = None
        """The bell of this process, once it is entered among those that receive."""
        self._folder = folder
        self._ropes: dict[str, int] = {}
        """The writing ends that were opened: a process that was rung for once will be again."""
        self._missed: dict[str, float] = {}
        """The bells that are not where they should be, and since when (`time.monotonic`)."""

    def make(self) -> Bell | None:
        """Make a bell for this process; None where there are none. It is its `own` once others can know of it.

        Raises `OSError` when no file descriptor is left, which passes: without a bell, it would have none for ever.
        """
        if self._folder is None or not hasattr(os, "mkfifo"):
            return None
        try:
            return Bell(self._folder)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None  # a file system without FIFOs: polling finds what no bell tells

    def ring(self, name: str, queue: int) -> None:
        """Wake the owner of a bell. Never fails: a ring is a hint, and a commit must not depend on it."""
        try:
            rope = self._ropes.get(name, -1)
            os.write(rope if rope >= 0 else self._take(name), _RING.pack(queue))
        except BlockingIOError:
            pass  # its FIFO is full of rings: it needs no more of them
        except OSError:
            self._drop(name)  # it is dead, or we have no file descriptor left: one that lives finds it by polling

    def is_alive(self, name: str) -> bool:
        """Return whether the process that owns this bell lives; True whenever that cannot be told.

        A living process has its bell here from before it was entered until after it was struck off, and one that loses
        it stops to work (see `ground.py`). So a bell that is gone for a while belongs to the dead too.
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

    def dead(self, among: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return the processes, of those with these bells, that tell that they are dead; this one never does."""
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
        """Take this process's own bell down, and let go of all the others."""
        own, self.own = self.own, None
        self.let_go()
        if own is not None:
            own.close()

    def let_go(self) -> None:
        """Let go of all the bells, and leave this process's own where it is: for a child after a fork."""
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
