"""What each process does for all: it calls those who wait for what nobody called them for, sees to the dead, and tidies
up.

See docs/decisions/taking-turns.md.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from filao.engines.postgresql.clock import MOMENT
from filao.engines.postgresql.listener import ALIVE, Listener
from filao.engines.postgresql.server import Connection, in_time
from filao.errors import FilaoError

POLL_INTERVAL = 0.5  # seconds between looks for what calls nobody: sends in users' transactions, and whatever got lost
DEAD_AFTER = 2.0  # seconds without a sign of life after which a process's leases are taken over
COME_BACK_WITHIN = 15.0  # seconds for a process to be back after its session was lost: one try that hangs, one pause
OWN_POLL_INTERVAL = 10.0  # seconds between looks of a process that is called, for itself
LOOKING_MAX = 0.02  # of the time, by all processes together, which matters where there are thousands of queues
TIDY_INTERVAL = 30.0  # seconds between rounds of housekeeping
VACUUM_INTERVAL = 3.0  # seconds between looks at what is dead; autovacuum looks once a minute, and a queue writes fast
VACUUM_AFTER = 50_000  # dead rows: some 20 MiB
VACUUM_AT_REST = 1_000  # dead rows when nothing has changed between two looks: the end of the table can be cut off then


class Watch:
    """One process's share of it."""

    def __init__(
        self,
        listener: Listener,
        call: Callable[[int], None],
        *,
        row: Callable[..., Awaitable[tuple[Any, ...]]],
        connection: Callable[[], AbstractAsyncContextManager[Connection]],
        strike_off: Callable[[int], Awaitable[None]],
    ) -> None:
        self._listener = listener
        self._call = call
        self._row = row
        """Run a statement that is a transaction, on the connection that all share, and return its first row."""
        self._connection = connection
        self._strike_off = strike_off
        self._missed: dict[int, float] = {}
        """Processes that showed no sign of life, and since when."""
        self._living = 1
        """Processes that receive here, as of the last look."""
        self._look_took = 0.0
        self._polled = 0.0
        self._tidied = time.monotonic()
        self._dead_rows = 0
        self._vacuumed_to = 0
        """What died before this transaction was removed, as far as it could be."""

    async def look(self) -> None:
        """Take turns with the others in looking after all who wait; where nobody can call this process, poll for
        itself.

        However many processes there are, together they look about twice in POLL_INTERVAL; one that stands still is
        missed by its share of the looks.
        """
        await asyncio.sleep(self._until_next_look())
        with suppress(FilaoError):  # a server that fails says so to those who call it
            if self._listener.process and not self._listener.is_pooled:
                await self._look_after_all()
        if not self._listener.is_listening or time.monotonic() - self._polled > OWN_POLL_INTERVAL:
            self._polled = time.monotonic()
            self._call(0)

    def _until_next_look(self) -> float:
        if not self._listener.is_listening:
            return POLL_INTERVAL
        if self._missed:  # so that the one that missed a process sees to it, or that it came back
            return min(POLL_INTERVAL, DEAD_AFTER)
        return max(POLL_INTERVAL, self._look_took / LOOKING_MAX) * self._share() * random.uniform(0.5, 1.5)

    def _share(self) -> float:
        """Return how many times as long this process may leave what any of those who live could do."""
        return max(1.0, self._living / 2)

    async def _look_after_all(self) -> None:
        """Have those called who wait for what is there, and take over the leases of those that show no life.

        After a restart of the server, or a failover, all sessions are young: a process that is back first must not take
        over the leases of those that are still on their way.
        """
        began = time.monotonic()
        found = await self._row("SELECT * FROM filao.watch(%s, %s, %s)", self._listener.process, MOMENT, ALIVE)
        self._living, missing = found
        now = time.monotonic()
        self._look_took = now - began
        self._missed = {process: self._missed.get(process, now) for process in missing}
        for process, since in self._missed.items():
            if now - since >= DEAD_AFTER and now - self._listener.since >= COME_BACK_WITHIN:
                await self._strike_off(process)

    async def keep_house(self) -> None:
        """Every now and then forget what is old, a little at a time, between which others have the connection; and
        vacuum.
        """
        await asyncio.sleep(min(TIDY_INTERVAL, VACUUM_INTERVAL) * self._share() * random.uniform(0.5, 1.5))
        if time.monotonic() - self._tidied > TIDY_INTERVAL * self._share():
            self._tidied = time.monotonic()
            upto = 0
            while upto is not None:
                (upto,) = await self._row("SELECT filao.tidy(%s, %s)", MOMENT, upto)
        await self.vacuum()

    async def vacuum(self) -> None:
        """Let the room of what is gone be used again, unless another process is at it; of a table at rest, give it
        back.

        While an old transaction keeps what died since the last time, it would be in vain.
        """
        dead, horizon = await self._row(_DEAD_ROWS)
        before = self._dead_rows
        self._dead_rows = dead
        if horizon > self._vacuumed_to and (dead > VACUUM_AFTER or (dead == before and dead > VACUUM_AT_REST)):
            self._vacuumed_to = horizon
            async with self._connection() as connection, in_time():
                await connection.execute("VACUUM (SKIP_LOCKED) filao.message")


_DEAD_ROWS = """
    SELECT n_dead_tup, pg_snapshot_xmax(pg_current_snapshot())::text::bigint - (
      SELECT max(age) FROM (
        SELECT greatest(age(backend_xmin), age(backend_xid)) FROM pg_stat_activity
        WHERE datname = current_database() OR backend_type = 'walsender'
        UNION ALL SELECT age(transaction) FROM pg_prepared_xacts WHERE database = current_database()
        UNION ALL SELECT age(xmin) FROM pg_replication_slots
      ) AS held (age)
    )
    FROM pg_stat_user_tables WHERE relid = 'filao.message'::regclass
"""
"""How many rows are dead, and the number of the oldest transaction that anybody may still see the state of."""
