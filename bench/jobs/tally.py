"""How many jobs each worker process has done, and when its first and its last: in a file that all can read
meanwhile.
"""

import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(os.environ.get("BENCH_FOLDER", "."))
_SLOT = struct.Struct("=ddQ")
_slots: dict[int, tuple[mmap.mmap, float, int]] = {}
_lock = threading.Lock()  # a peer's handlers run in threads; held for no longer than a step, and never across a fork


class Tally(NamedTuple):
    """What all processes have done."""

    jobs: int
    first: float
    last: float
    """Monotonic times."""
    processes: int


def count() -> None:
    """Count a job that this process has done."""
    with _lock:
        pid, now = os.getpid(), time.monotonic()
        if pid not in _slots:  # a process that was forked has a slot of its own
            path = FOLDER / f"{pid}.tally"
            path.write_bytes(bytes(_SLOT.size))
            with path.open("r+b") as file:
                _slots[pid] = (mmap.mmap(file.fileno(), _SLOT.size), now, 0)
        slot, first, done = _slots[pid]
        _slots[pid] = (slot, first, done + 1)
        _SLOT.pack_into(slot, 0, first, now, done + 1)


def read(folder: Path) -> Tally:
    """Add up what the processes have done."""
    slots = [_SLOT.unpack(path.read_bytes()) for path in folder.glob("*.tally") if path.stat().st_size == _SLOT.size]
    busy = [slot for slot in slots if slot[2]]
    firsts, lasts = [slot[0] for slot in busy], [slot[1] for slot in busy]
    return Tally(sum(slot[2] for slot in busy), min(firsts, default=0.0), max(lasts, default=0.0), len(busy))
