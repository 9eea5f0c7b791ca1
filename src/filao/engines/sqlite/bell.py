"""A bell for each process: a FIFO beside the database that wakes its owner, and that tells when its owner is dead.

The owner holds the reading end. Others ring by writing the number of a queue into it, after the commit that gave the
owner something to look for. The kernel closes the reading end when the owner dies, however it dies, and from then on
opening the FIFO for writing fails: so a bell that nobody can ring belongs to a dead process, whose leases may be taken
over at once. This is only an accelerator. A lease that runs out is the truth, and without bells everything still works.
"""

import errno
import os
import secrets
import struct
from pathlib import Path

_RING = struct.Struct("=q")
_READ_MAX = 4096  # bytes: a FIFO's reader takes all rings that came together


class Bell:
    """The bell of this process."""

    def __init__(self, folder: Path) -> None:
        self.name = secrets.token_hex(8)
        self._path = folder / self.name
        os.mkfifo(self._path, 0o600)
        self.reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # A writer of our own: otherwise the reader would see "end of file" whenever nobody is ringing.
        self._writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def heard(self) -> set[int]:
        """Return the queues that were rung for since the last call."""
        try:
            rings = os.read(self.reader, _READ_MAX)
        except BlockingIOError:
            return set()
        return {number for (number,) in _RING.iter_unpack(rings)}

    def close(self) -> None:
        """Take the bell down."""
        self._path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Close this process's ends, and leave the FIFO to the process that owns it: for a child after a fork."""
        for end in (self.reader, self._writer):
            if end >= 0:
                os.close(end)
        self.reader = self._writer = -1


def ring(folder: Path, name: str, queue: int) -> None:
    """Wake the owner of a bell; whoever is dead or has a full FIFO of rings needs no more of them."""
    try:
        writer = os.open(folder / name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return
        raise
    try:
        os.write(writer, _RING.pack(queue))
    except (BlockingIOError, BrokenPipeError):
        pass
    finally:
        os.close(writer)


def is_alive(folder: Path, name: str) -> bool:
    """Return whether the process that owns this bell lives; True whenever that cannot be told."""
    try:
        os.close(os.open(folder / name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENXIO, errno.ENOENT)
    return True
