"""The clock of a file: it runs evenly whatever happens to the wall clock, and follows it slowly.

Its time is `CLOCK_BOOTTIME`, which never jumps and counts while the machine sleeps, plus an offset that all processes
read in the file. When somebody sets the wall clock, the offset follows so slowly that no lease, time to live or delay
changes by more than a twentieth. After a restart of the machine it begins with the wall clock's time, but never before
the last time that the file has seen.

Containers of one machine may each have another boot id (systemd-nspawn, LXC), or not see it (`ProcSubset=pid`), or
have another `CLOCK_BOOTTIME` (a time namespace). So the kernel's own is counted, and a process that finds another boot
in the file takes that for its own if the file is in use: no process outlives a start of its machine.
"""

import logging
import math
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filao.checks import is_system_clock
from filao.guarded import Log

log: Log = Log(logging.getLogger("filao.sqlite"))

JUMP = 1_000  # milliseconds between the wall clock and ours that are taken for a jump
SLEW = 20  # ours follows by at most a twentieth of the time that passes
SLEWED_MAX = 60_000  # milliseconds of passed time that one transaction makes up for at most
NOTED_EVERY = 3_600_000  # milliseconds after which the time is written into the file again
UNKNOWN = "unknown"  # the boot of clocks that may jump
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
OFFSETS = Path("/proc/self/timens_offsets")
TIME, CHILDRENS_TIME = Path("/proc/self/ns/time"), Path("/proc/self/ns/time_for_children")
_OWN = secrets.token_hex(8)


class FileClock:
    """A file's clock as one process reads it.

    `wall` returns the seconds since 1970. A test's clock may have a `steady` clock and a `boot` of its own; without a
    `steady`, it is its own. `is_in_use` returns whether a process that receives from the file is known to live.
    """

    def __init__(self, wall: Callable[[], float], is_in_use: Callable[[sqlite3.Connection], bool]) -> None:
        is_system = is_system_clock(wall) and hasattr(time, "CLOCK_BOOTTIME")
        self._wall = wall
        self._is_in_use = is_in_use
        self.steady: Callable[[], float] = _boottime() if is_system else getattr(wall, "steady", wall)
        """Seconds that never jump, and go on while the machine sleeps."""
        self._boot = _boot() if is_system else str(getattr(wall, "boot", UNKNOWN))
        self._told = 0
        self._lead = math.inf
        """By how much the wall clock was ahead of the steady one at the last look; a jump changes it."""
        self._followed_from = 0
        """The steady time from which on the wall clock is followed: no jump is, before it was seen."""
        self._known: tuple[str, int, int] | None = None
        """The boot, the offset and the time that the file was last seen to hold."""

    def begin(self, db: sqlite3.Connection) -> bool:
        """Set the file's clock if this machine has started since it was set; return whether leases are void.

        Call this in a transaction.
        """
        wall, steady = _milliseconds(self._wall), _milliseconds(self.steady)
        found = _stored(db)
        if found is None:
            self._note(db, wall - steady, steady)
        elif not self._agrees(db, found[0]):
            _, offset, noted_at = found
            self._note(db, max(wall, offset + noted_at) - steady, steady)
            return True
        return False

    def has_begun(self, db: sqlite3.Connection) -> bool:
        """Return whether the file's clock is known to have been set since this machine started."""
        found = _stored(db)
        return found is not None and found[0] == self._boot

    def _agrees(self, db: sqlite3.Connection, boot: str) -> bool:
        """Return whether the file's clock was set since this machine started.

        If so, take over the name that the file has for that start.
        """
        if boot != self._boot and UNKNOWN not in (boot, self._boot) and self._is_in_use(db):
            self._boot = boot
        return boot == self._boot

    def now(self, db: sqlite3.Connection, *, writes: bool = False, again: bool = False) -> int:
        """Return the file's time in milliseconds since 1970; a transaction that `writes` also stores it now and then.

        `again`: nobody can have set the clock since the last such transaction.
        """
        wall, steady = _milliseconds(self._wall), _milliseconds(self.steady)
        found = self._known if again else _stored(db)
        if writes:
            self._known = found
        if found is None or not self._agrees(db, found[0]):
            return wall  # set meanwhile by one that calls this start otherwise, and found nobody who receives
        _, offset, noted_at = found
        lead = wall - steady
        ahead = lead - offset
        if abs(ahead) <= JUMP or abs(lead - self._lead) > JUMP:
            self._followed_from = steady
        self._lead = lead
        allowed = max(0, min(steady - max(noted_at, self._followed_from), SLEWED_MAX)) // SLEW
        step = max(-allowed, min(allowed, ahead))
        if writes and (step or steady - noted_at > NOTED_EVERY):
            self._note(db, offset + step, steady)
        if abs(ahead - self._told) > JUMP:
            self._tell(ahead)
        return steady + offset + step

    def ahead(self, db: sqlite3.Connection) -> float:
        """Return by how many seconds the wall clock is ahead of the file's."""
        return (_milliseconds(self._wall) - self.now(db)) / 1000

    def _note(self, db: sqlite3.Connection, offset: int, steady: int) -> None:
        db.execute("INSERT OR REPLACE INTO filao_meta VALUES ('clock', ?)", (f"{self._boot} {offset} {steady}",))
        self._known = (self._boot, offset, steady)

    def _tell(self, ahead: int) -> None:
        if abs(ahead) > abs(self._told):
            log.warning(
                "the wall clock jumped: it is %+.1f s from the time by which queues measure delays and times to live, "
                "which follows it by a twentieth of the time that passes. Leases are not affected.",
                ahead / 1000,
            )
        self._told = ahead


def _stored(db: sqlite3.Connection) -> tuple[str, int, int] | None:
    found = db.execute("SELECT value FROM filao_meta WHERE name = 'clock'").fetchone()
    if found is None:
        return None
    boot, offset, noted_at = found[0].split()
    return boot, int(offset), int(noted_at)


def _milliseconds(clock: Callable[[], float]) -> int:
    return round(clock() * 1000)


def _boot() -> str:
    """Return a text that changes with each start of the machine; where it is not told, one of this process's own."""
    told = ""
    with suppress(OSError, UnicodeDecodeError):
        told = BOOT_ID.read_text(encoding="ascii").strip()
    return told or _OWN


def _boottime() -> Callable[[], float]:
    """Return the machine's `CLOCK_BOOTTIME`, also in a time namespace, where it has an offset.

    What is told are its children's offsets. (https://man7.org/linux/man-pages/man7/time_namespaces.7.html)
    """
    ahead = 0.0
    with suppress(OSError, ValueError):
        is_its_own = TIME.readlink() == CHILDRENS_TIME.readlink()
        told = OFFSETS.read_text(encoding="ascii").splitlines() if is_its_own else []
        for clock, seconds, nanoseconds in map(str.split, told):
            if clock == "boottime":
                ahead = int(seconds) + int(nanoseconds) / 1e9
    return lambda: time.clock_gettime(time.CLOCK_BOOTTIME) - ahead
