"""Whether it is this very process that keeps a file locked: a transaction of its own may be waiting for the call that
waits for it.

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
    return any(
        int(first) <= _WRITING and (last == "EOF" or int(last) >= _WRITING)
        for first, last in _held("POSIX", path.with_name(path.name + "-shm"))
    )


def has_turn(turnstile: Path) -> bool:
    """Return whether this process has the turn, in whatever broker; False where the system does not tell."""
    return bool(_held("FLOCK", turnstile))


def _held(kind: str, file: Path) -> list[tuple[str, str]]:
    """Return which bytes of a file this process has locked for itself, from the first to the last.

    A line is such as `1: POSIX ADVISORY WRITE 4711 fe:00:1234 120 120`; `->` stands in those who only wait.
    """
    try:
        about = file.stat()
        lines = _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    ours = [kind, "WRITE", str(os.getpid()), place]
    found = [fields for line in lines if len(fields := line.split()) == 8]
    return [(first, last) for _, kind, _, *held, first, last in found if [kind, *held] == ours and first.isdecimal()]


def refusal(path: Path) -> str:
    """Return what to say of it."""
    return (
        f"{path} is locked by a transaction of this very process (pid {os.getpid()}), on a "
        "connection that is not the broker's. "
        f"Nothing was done. If the transaction is the caller's own, it would wait for this call, and this call for it: "
        "send with within= that connection, or end the transaction first; open brokers and "
        "declare queues before it begins."
    )
