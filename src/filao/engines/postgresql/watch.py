"""What each process does for all: it calls those that nobody called, takes over from the dead, and tidies up.

See docs/decisions/taking-turns.md.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress

from filao.engines.postgresql.listener import ALIVE, Listener
from filao.engines.postgresql.main import MOMENT, Main
from filao.engines.postgresql.server import Connection
from filao.errors import FilaoError

POLL_INTERVAL = 0.5  # seconds between looks for what calls nobody: sends in users' transactions, and lost calls
DEAD_AFTER = 2.0  # seconds without a sign of life after which a process's leases are ended
COME_BACK_WITHIN = 15.0  # seconds for a process to be back after its session was lost: one try that hangs, one pause
OWN_POLL_INTERVAL = 10.0  # seconds between looks for itself of a process that can be called
LOOKING_MAX = 0.02  # of the time of all processes together, which matters where there are thousands of queues
TIDY_INTERVAL = 30.0  # seconds between rounds of housekeeping
VACUUM_INTERVAL = 3.0  # seconds between looks at dead rows; autovacuum looks once a minute, and a queue writes fast
VACUUM_AFTER = 50_000  # dead rows: some 20 MiB
VACUUM_WITHIN = 600.0  # seconds for a vacuum: what an hour of somebody's old transaction has left takes minutes
VACUUM_AT_REST = 1_000  # dead rows in a table at rest, whose end can then be cut off


class Watch:
    """One process's share of this work."""

    def __init__(
        self,
        main: Main,
        listener: Listener,
        call: Callable[[int], None],
        *,
        connection: Callable[[float], AbstractAsyncContextManager[Connection]],
        strike_off: Callable[[int], Awaitable[None]],
    ) -> None:
        self._main = main
        self._listener = listener
        self._call = call
        self._connection = connection
        self._strike_off = strike_off
        self._missed: dict[int, float] = {}
        """Processes that show no sign of life, and since when."""
        self._living = 1
        """Processes that receive here, as of the last look."""
        self._look_took = 0.0
        self._polled = 0.0
        self._tidied = time.monotonic()
        self._dead_rows = 0
        self._vacuumed_to = 0
        """The last vacuum has removed the rows that died before the transaction with this number."""

    async def look(self) -> None:
        """Take turns with the other processes in looking for all that wait; if nobody can call this one, also poll.

        However many processes there are, together they look about twice in POLL_INTERVAL. If one of them stands still,
        only its share of the looks is missed.
        """
        await asyncio.sleep(self._until_next_look())
        with suppress(FilaoError):  # the callers of a server that fails get its error
            if self._listener.process and not self._listener.is_pooled:
                await self._look_after_all()
        if not self._listener.is_listening or time.monotonic() - self._polled > OWN_POLL_INTERVAL:
            self._polled = time.monotonic()
            self._call(0)

    def _until_next_look(self) -> float:
        if not self._listener.is_listening:
            return POLL_INTERVAL
        if self._missed:  # whoever missed a process looks again soon: it may have come back
            return min(POLL_INTERVAL, DEAD_AFTER)
        return max(POLL_INTERVAL, self._look_took / LOOKING_MAX) * self._share() * random.uniform(0.5, 1.5)

    def _share(self) -> float:
        """Return by how much this process's intervals grow because others do the same work."""
        return max(1.0, self._living / 2)

    async def _look_after_all(self) -> None:
        """Call those that wait for what is there, and end the leases of processes that show no sign of life.

        After a restart of the server, or a failover, all sessions are young: the process that is back first must not
        end the leases of those that are still on their way.
        """
        began = time.monotonic()
        found = await self._main.row("SELECT * FROM filao.watch(%s, %s, %s)", self._listener.process, MOMENT, ALIVE)
        self._living, missing = found
        now = time.monotonic()
        self._look_took = now - began
        self._missed = {process: self._missed.get(process, now) for process in missing}
        for process, since in self._missed.items():
            if now - since >= DEAD_AFTER and now - self._listener.since >= COME_BACK_WITHIN:
                await self._strike_off(process)

    async def keep_house(self) -> None:
        """Every now and then forget what is old, in slices between which others have the connection, and vacuum."""
        await asyncio.sleep(min(TIDY_INTERVAL, VACUUM_INTERVAL) * self._share() * random.uniform(0.5, 1.5))
        if time.monotonic() - self._tidied > TIDY_INTERVAL * self._share():
            self._tidied = time.monotonic()
            upto = 0
            while upto is not None:
                (upto,) = await self._main.row("SELECT filao.tidy(%s, %s)", MOMENT, upto)
        await self.vacuum()

    async def vacuum(self) -> None:
        """Make the space of dead rows usable again, unless another process does; for a table at rest, give it back.

        While an old transaction keeps all that died since the last vacuum, another one would be in vain.
        """
        dead, horizon = await self._main.row(_DEAD_ROWS)
        before = self._dead_rows
        self._dead_rows = dead
        if horizon > self._vacuumed_to and (dead > VACUUM_AFTER or (dead == before and dead > VACUUM_AT_REST)):
            self._vacuumed_to = horizon
            async with self._connection(VACUUM_WITHIN) as connection, asyncio.timeout(VACUUM_WITHIN):
                await connection.execute("VACUUM (SKIP_LOCKED) filao.message")


_DEAD_ROWS = """
    SELECT n_dead_tup, pg_snapshot_xmax(pg_current_snapshot())::text::bigint - (
      SELECT max(age) FROM (
        SELECT greatest(age(backend_xmin), age(backend_xid)) FROM pg_stat_activity
        WHERE datname = current_database() OR backend_type = 'walsender'
        UNION ALL SELECT age(transaction) FROM pg_prepared_xacts WHERE database = current_database()
        UNION ALL SELECT age(xmin) FROM pg_replication_slots WHERE wal_status IS DISTINCT FROM 'lost'
      ) AS held (age)
    )
    FROM pg_stat_user_tables WHERE relid = 'filao.message'::regclass
"""
"""How many rows are dead, and the number of the oldest transaction whose snapshot is still in use.

A slot that is lost keeps nothing any more, but is listed with what it has kept until somebody drops it.
"""
