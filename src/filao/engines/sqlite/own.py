"""Whether it is a transaction of this very process that keeps a file locked: it may be waiting for the call that waits
for it.

Linux tells who holds which lock, in /proc/locks (https://man7.org/linux/man-pages/man5/proc_locks.5.html); elsewhere
the wait ends with its bound. Opening the file to ask would drop the process's own locks.
"""

import os
import threading
from pathlib import Path

_LOCKS = Path("/proc/locks")
_WRITING = 120  # the byte of the -shm that a writer locks in WAL mode (https://www.sqlite.org/walformat.html#locks)
ALONE_WAITS = 0.2  # seconds, where no other thread could end the transaction; a task of the same loop still may
OTHERS_WAIT = 5.0  # seconds, where another thread may hold it; none should keep a file's only write lock for so long


def patience() -> float:
    """Return for how many seconds a lock of this process's own may be another's business that ends."""
    others = [thread for thread in threading.enumerate() if not thread.name.startswith("filao")]
    return ALONE_WAITS if len(others) <= 1 else OTHERS_WAIT


def holds_lock(path: Path) -> bool:
    """Return whether this process holds the file's write lock; False where the system does not tell."""
    try:
        shared = path.with_name(path.name + "-shm").stat()
        lines = _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return False
    place = f"{os.major(shared.st_dev):02x}:{os.minor(shared.st_dev):02x}:{shared.st_ino}"
    return any(_is_ours(line.split(), place) for line in lines)


def _is_ours(fields: list[str], place: str) -> bool:
    """Read a line such as `1: POSIX ADVISORY WRITE 4711 fe:00:1234 120 120`; `->` stands in those who only wait."""
    if len(fields) != 8 or fields[1] != "POSIX" or fields[3] != "WRITE":
        return False
    if fields[4] != str(os.getpid()) or fields[5] != place or not fields[6].isdecimal():
        return False
    return int(fields[6]) <= _WRITING and (fields[7] == "EOF" or int(fields[7]) >= _WRITING)


def refusal(path: Path) -> str:
    """Return what to say of it."""
    return (
        f"{path} is locked by a transaction of this very process (pid {os.getpid()}), on a "
        "connection that is not the broker's. "
        f"Nothing was done. If the transaction is the caller's own, it would wait for this call, and this call for it: "
        "send with within= that connection, or end the transaction first; open brokers and "
        "declare queues before it begins."
    )
