"""Which process keeps a file locked, and whether this process has the lock that SQLite believes it has.

If it is this very process, the call that waits for the lock may be one that the lock's holder waits for. And after a
fork, the child's SQLite believes in a lock that only the parent has.

Linux lists the holders of locks in /proc/locks (https://man7.org/linux/man-pages/man5/proc_locks.5.html); elsewhere the
wait ends with its bound. Opening the file to ask would drop the process's own locks.
"""

import os
import threading
from pathlib import Path

from filao.engines.sqlite import mounts
from filao.printable import printable

_LOCKS = Path("/proc/locks")
_READING = range(123, 128)  # the bytes of the -shm, one of which each reader keeps locked in WAL mode (as below)
_WRITING = 120  # the byte of the -shm that a writer locks in WAL mode (https://www.sqlite.org/walformat.html#locks)
_OPEN = 128  # the byte of the -shm that is locked by all who have it open, so that nobody truncates it
_EXCLUSIVE = 2**30  # the byte of the file that is locked in exclusive mode (https://www.sqlite.org/fileformat.html)
WAL_NOTABLE = 64 * 1024 * 1024  # bytes of a WAL that is not written back as it should be
ALONE_WAITS = 0.2  # seconds, where no other thread could end the transaction; a task of the same loop still may
OTHERS_WAIT = 5.0  # seconds, where another thread may hold it; none should keep a file's only write lock for so long


def patience() -> float:
    """Return for how many seconds to wait for a lock of this process's own, in case another thread or task ends it."""
    others = [thread for thread in threading.enumerate() if not thread.name.startswith("filao")]
    return ALONE_WAITS if len(others) <= 1 else OTHERS_WAIT


def holds_lock(path: Path) -> bool:
    """Return whether this process holds the file's write lock; False where the system does not tell."""
    return _me() in _holders("POSIX", path.with_name(path.name + "-shm"), _WRITING)


def has_turn(turnstile: Path) -> bool:
    """Return whether any broker of this process has the turn; False where the system does not tell."""
    return _me() in _holders("FLOCK", turnstile, 0)


def has_open(path: Path, turnstile: Path) -> bool:
    """Return whether this process, which has the file open, has the lock that belongs to it. Call this in a turn.

    It is True where the system does not tell, because there it does not tell who has the turn either.
    """
    shm = path.with_name(path.name + "-shm")
    return _me() in _holders("POSIX", shm, _OPEN, "READ") or not has_turn(turnstile)


def in_the_way(path: Path, turnstile: Path | None = None) -> str:
    """Return in words which processes keep others from writing: "another process" where the system does not tell."""
    found = _holders("POSIX", path.with_name(path.name + "-shm"), _WRITING) | _holders("POSIX", path, _EXCLUSIVE)
    if turnstile is not None:
        found |= _holders("FLOCK", turnstile, 0)
    return _named(found) or "another process"


def wal_size(path: Path) -> int:
    """Return how many bytes the WAL of a file has."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except OSError:
        return 0


def why_wal_grows(path: Path) -> str:
    """Return in words why a WAL is larger than it should be."""
    shm = path.with_name(path.name + "-shm")
    readers = {pid for byte in _READING for pid in _holders("POSIX", shm, byte, "READ")}
    return (
        f"{wal_size(path):,} bytes, and it grows: most likely somebody reads in one transaction for long, until "
        f"whose end it cannot be written back. Those that read at this moment: "
        f"{_named(readers) or 'the system does not tell'}"
    )


def _me() -> int:
    """Return this process's number as /proc has it, which may be that of another namespace of processes."""
    try:
        return int(Path("/proc/self").readlink().name)
    except (OSError, ValueError):
        return os.getpid()


def _holders(kind: str, file: Path, byte: int, purpose: str = "WRITE") -> set[int]:
    """Return the processes that have locked a byte of a file; `purpose` is WRITE for themselves, READ with others.

    A line looks like `1: POSIX ADVISORY WRITE 4711 fe:00:1234 120 120`; one of a process that only waits has a `->`
    more.
    """
    try:
        number, device = file.stat().st_ino, mounts.device(file)
        lines = _LOCKS.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return set()
    place = f"{os.major(device):02x}:{os.minor(device):02x}:{number}"
    locks = [fields for line in lines if len(fields := line.split()) == 8]
    return {
        int(pid)
        for _, how, _, what, pid, where, first, last in locks
        if (how, what, where) == (kind, purpose, place)
        and pid.isdecimal()
        and first.isdecimal()
        and int(first) <= byte
        and (last == "EOF" or byte <= int(last))
    }


def _named(processes: set[int]) -> str:
    return " and ".join(f"process {pid} ({_name(pid)})" for pid in sorted(processes))


def _name(pid: int) -> str:
    """Return a process's name without its arguments, which may hold a password."""
    try:
        return printable(Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return "of another user, or over by now"


def refusal(path: Path) -> str:
    """Return the text of the error when this process's own transaction keeps the file locked."""
    return (
        f"{path} is locked by a transaction of this very process (pid {os.getpid()}), on a connection that is not the "
        "broker's. Nothing was done. If the transaction is the caller's own, it would wait for this call, and this "
        "call for it: send with within= that connection, or end the transaction first; open brokers and declare "
        "queues before it begins."
    )
