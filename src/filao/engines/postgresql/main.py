"""The main connection of a process: batches go over it and, between them, single statements.

Each transaction on it says what time it expects (`clock.py`), and is done again if it lost against another. A statement
waits for a lock only briefly, again and again, because batches share the connection.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Final, TypeVar

from psycopg import AsyncCursor, DatabaseError, pq
from psycopg.errors import DeadlockDetected, LockNotAvailable, NoDataFound, SerializationFailure, UniqueViolation

from filao.checks import is_system_clock
from filao.engines.postgresql.clock import DIFFER, ServerClock
from filao.engines.postgresql.links import Link
from filao.engines.postgresql.server import BEGIN, LOCKED_BRIEFLY, LOCKED_FOR, Connection, Server

R = TypeVar("R")

TRIES = 5  # of a transaction that lost against another, so that nothing of it was done
UNLOCKED_POLL = 0.05  # seconds between looks whether a lock is free, such as that of a queue's senders
MOMENT: Final = object()
"""Stands, among the parameters of a statement, for the time that the call expects."""
_LOST = (DeadlockDetected, SerializationFailure, UniqueViolation, NoDataFound)


class Main:
    """The connection, and the time by which its statements go."""

    def __init__(
        self, server: Server, clock: Callable[[], float], opened: Callable[[Connection], Awaitable[None]]
    ) -> None:
        """`clock` is a test's, or the system's; `opened` is called with each new connection before it is used."""
        self.server: Server = server
        self.time: ServerClock = ServerClock(server.name)
        self.link: Link = Link(server, LOCKED_BRIEFLY, opened)
        self._clock = clock

    def use(self, since: float | None = None) -> AbstractAsyncContextManager[Connection]:
        """See `Link.use`."""
        return self.link.use(since)

    def moment(self) -> int | None:
        """Return the time of a test's clock; None: the server's own clock decides, jumped or not."""
        return None if is_system_clock(self._clock) else round(self._clock() * 1000)

    def expected(self) -> int | None:
        """Return the time that a call expects which can be made again: see `ServerClock`."""
        return self.time.moment() if is_system_clock(self._clock) else self.moment()

    async def value(self, sql: str, *parameters: Any) -> Any:
        """Run a statement as `row` does, and return the first value of its row."""
        return (await self.row(sql, *parameters))[0]

    async def row(self, sql: str, *parameters: Any) -> tuple[Any, ...]:
        """Run a statement with its parameters, `MOMENT` among them, as a transaction, and return its first row."""
        now = asyncio.get_running_loop().time
        since = now()
        while now() < since + LOCKED_FOR:
            async with self.use(since) as connection:

                async def run() -> tuple[Any, ...]:
                    given = [self.expected() if value is MOMENT else value for value in parameters]
                    with self.server.replicated(connection):
                        row: tuple[Any, ...] | None = await (await self._run(connection, sql, given)).fetchone()
                    return (None,) if row is None else row

                with suppress(LockNotAvailable):
                    return await self.retried(connection, run)
            await asyncio.sleep(UNLOCKED_POLL)
        raise self.server.engine_error(LockNotAvailable("a lock was not free in time"))

    async def _run(self, connection: Connection, sql: str, given: Sequence[Any]) -> AsyncCursor[tuple[Any, ...]]:
        """Run a statement as a transaction of its own, with our settings also behind a pooler, which keeps none."""
        local = self.server.local_settings()
        if local is None:
            return await connection.execute(sql.encode(), given)
        async with connection.pipeline():
            await connection.execute(BEGIN)
            await connection.execute(local.encode())
            found = await connection.execute(sql.encode(), given)
            await connection.execute("COMMIT")
        return found

    async def retried(
        self, connection: Connection, work: Callable[[], Awaitable[R]], forget: Callable[[], None] = lambda: None
    ) -> R:
        """Do the work of a transaction, and again if it lost, if a queue was deleted, or if the clocks differ.

        A unique violation means that a number which was drawn at random is taken. `forget` is called when a queue was
        deleted.
        """
        for _ in range(TRIES - 1):
            try:
                return await work()
            except LockNotAvailable:
                await _roll_back(connection)
                raise
            except DatabaseError as error:
                if not isinstance(error, _LOST) and error.sqlstate != DIFFER:
                    raise
                await _roll_back(connection)
                if isinstance(error, NoDataFound):
                    forget()
                if error.sqlstate == DIFFER:
                    await self.time.compare(connection, for_call=True)
        return await work()


async def _roll_back(connection: Connection) -> None:
    if connection.info.transaction_status != pq.TransactionStatus.IDLE:
        await connection.rollback()
