"""The server's clock, as one process sees it: whether it runs like the process's own clock, which never jumps.

Each call that moves messages says what time it expects. If the server's clock is more than JUMP from that, the server
does nothing. The process then compares the clocks, notes a jump in the database, so that the queues' time goes on as if
there had been none, and calls again. See `filao.now` and docs/decisions/clock.md.
"""

import logging
import time

from psycopg import errors

from filao.engines.postgresql.server import Connection
from filao.guarded import Log

log: Log = Log(logging.getLogger("filao.postgresql"))

JUMP = 1_000  # milliseconds between the clocks that are taken for a jump; filao.now has the same
DRIFT = 0.001  # of the time since they were compared, by which two clocks may drift apart without a jump
JUMPS_MAX = 3  # jumps that are noted in a row; after that the clock is taken as it is
DIFFER = "FL001"  # the SQLSTATE of a call that met a clock which may have jumped
_CLOCK: int | None = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))


class ServerClock:
    """What one process knows of the server's clock."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._offset: tuple[float, float] | None = None
        """By how many milliseconds the server's even clock is ahead of ours, at least and at most; None: unknown."""
        self._compared = 0.0
        self._jumped: int | None = None
        self._is_fresh = False

    def moment(self) -> int | None:
        """Return the time that a call expects; None: unknown, or the clocks were just compared for this call."""
        if self._offset is None or self._is_fresh:
            self._is_fresh = False
            return None
        return -round(_now() + sum(self._offset) / 2)

    async def compare(self, connection: Connection, *, for_call: bool = False) -> None:
        """Compare the clocks, and note a jump. `for_call`: the next call takes the clock as it is.

        So does a role that has no right to compare them.
        """
        try:
            for _ in range(JUMPS_MAX):
                by = await self._look(connection)
                if not by:
                    break
                await connection.execute("SELECT filao.note_jump(%s, %s)", (self._jumped, by))
        except errors.InsufficientPrivilege:
            self._offset = None
        self._is_fresh = for_call

    async def _look(self, connection: Connection) -> int:
        """Return by how many milliseconds the server's clock jumped; 0 when it need not have.

        The server read its clock at some moment between our question and its answer. So its offset from ours is only
        known as an interval, and only an interval apart from the last one is a jump.
        """
        asked = _now()
        row = await (await connection.execute("SELECT even, jumped FROM filao.even_clock()")).fetchone()
        assert row is not None
        even, jumped = int(row[0]), int(row[1])
        came = _now()
        self._tell(jumped)
        least, most = even - came, even - asked
        if self._offset is not None:
            drift = DRIFT * (came - self._compared)
            before, after = self._offset[0] - drift, self._offset[1] + drift
            if least - after > JUMP or before - most > JUMP:
                return round((least + most - before - after) / 2)
            if max(least, before) <= min(most, after):
                least, most = max(least, before), min(most, after)
        self._offset, self._compared = (least, most), came
        return 0

    def _tell(self, jumped: int) -> None:
        by = 0 if self._jumped is None else jumped - self._jumped
        self._jumped = jumped
        if by:
            log.warning(
                "the wall clock of %s jumped by %+.1f s. The time by which queues measure follows it by a twentieth of "
                "the time that passes: leases are not affected, delays and times to live hardly.",
                self._server,
                by / 1000,
            )


def _now() -> float:
    return (time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)) * 1000
