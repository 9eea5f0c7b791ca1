"""A process that receives, as the others see it: its number, its sign of life, and the channel on which it is called.

The sign of life is an advisory lock that its session holds, and its main connection too. The server frees it when both
have ended, however that happens, and a process that finds the lock free for a while may end the leases. A process that
lost its session and cannot open another is still seen to live by its main connection. Behind a pooler that gives each
transaction another connection there is neither lock nor channel: polling and the time of the leases have to do.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg

from filao.engines.postgresql.server import Connection, Server
from filao.guarded import check_cancelled, for_ever
from filao.process import process_name

ALIVE = 0x46696C61  # "Fila", the first key of the advisory locks that processes hold
RETRY_MAX = 5.0  # seconds between tries to reach the server again
_BE_SEEN = "SELECT pg_catalog.pg_advisory_unlock_all(), pg_catalog.pg_advisory_lock_shared(%s, %s)"
"""Holds the sign of life, and frees that of a number which the process had before."""


class Listener:
    """Holds the session of a process that receives."""

    def __init__(self, server: Server, call: Callable[[int], None]) -> None:
        self._server = server
        self._call = call
        self._connection: Connection | None = None
        self.name: str = process_name()
        self.process: int = 0
        """The number of this process; 0 before it first receives."""
        self._tokens = 0
        """Begins at random, so that the same number has other tokens in another database, or in one that was restored.
        """
        self._registered = asyncio.Event()
        self._reachable = asyncio.Event()
        """Set when the server has answered on another connection."""
        self.since: float = 0.0
        """When the session began, by the monotonic clock."""

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler stands before the server, so that no session of this process lasts."""
        return self._server.is_pooled

    @property
    def is_listening(self) -> bool:
        """Whether this process can be called."""
        return self.process != 0 and self._connection is not None and not self._connection.closed

    def next_token(self) -> int:
        """Return a token that no other lease ever had."""
        self._tokens = (self._tokens + 1) % 2**32
        return (self.process << 32) + self._tokens

    async def register(self, connection: Connection) -> None:
        """Enter this process among those that receive. If the main connection is lost meanwhile, it may be entered."""
        self._tokens = secrets.randbits(31)
        if self._server.is_pooled:
            self.process = await self._enter(connection, has_session=False)
        else:
            session = await self._server.connect()  # before the entry, so that no entry is left if this fails
            try:
                with self._server.mapped():
                    process = await self._enter(session, has_session=True)
                    await session.execute(f"LISTEN filao_{process}".encode())
                await self._hang_up()
            except BaseException:
                await session.close()
                raise
            self.process, self._connection, self.since = process, session, time.monotonic()
        self._registered.set()
        await self.greet(connection)

    async def _enter(self, connection: Connection, *, has_session: bool) -> int:
        """Enter this process; with a session, it shows its sign of life before others can see the entry."""
        async with connection.transaction():
            found = await connection.execute(
                "INSERT INTO filao.process (name, started_at, has_session) VALUES (%s, filao.clock(), %s) RETURNING id",
                (self.name, has_session),
            )
            row = await found.fetchone()
            if row is None:
                raise self._server.skipped("filao.process")
            process: int = row[0]
            if has_session:
                await connection.execute(_BE_SEEN, (ALIVE, process))
        return process

    async def _listen(self, process: int) -> None:
        """Begin another session for a process that is entered."""
        async with self._server.one_call():
            connection = await self._server.connect()
            try:
                await connection.execute(_BE_SEEN, (ALIVE, process))
                await connection.execute(f"LISTEN filao_{process}".encode())
                entered = "UPDATE filao.process SET has_session = true WHERE id = %s"
                found = await connection.execute(entered, (process,))
            except BaseException:
                await connection.close()
                raise
        if not found.rowcount:  # we were away for so long that we were struck off
            self.process = 0
            self._registered.clear()
        await self._hang_up()
        self._connection, self.since = connection, time.monotonic()

    async def run(self) -> None:
        """Hear calls for ever; when the session is lost, begin another."""
        await for_ever("the PostgreSQL listener", self._hear, wake=self._reachable, pause_max=RETRY_MAX)

    async def greet(self, main: Connection) -> None:
        """Show the sign of life on a new main connection, and try at once to reach the server for a session, too."""
        self._reachable.set()
        if self.process and not self._server.is_pooled:
            await main.execute(_BE_SEEN, (ALIVE, self.process))

    async def _hear(self) -> None:
        """Begin a session, or hear calls until it is lost."""
        connection = self._connection
        if connection is None or connection.closed:
            await self._registered.wait()  # if we were struck off, the next receive registers us again
            await self._listen(self.process)
            self._call(0)  # calls may have been missed meanwhile
            return
        try:
            with self._server.mapped():
                while not self._server.is_distrusted(connection):
                    async for notification in connection.notifies(timeout=RETRY_MAX):
                        self._call(_called(notification.payload))
                    check_cancelled()
        finally:
            await self._hang_up()

    async def close(self) -> None:
        """End the session."""
        await self._hang_up()

    async def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error, OSError):
                await connection.close()


def _called(payload: str) -> int:
    """Return the number of the queue that a call names, 0 for all queues: anybody may notify, and say anything."""
    return int(payload) if payload.isascii() and payload.isdigit() and len(payload) < 10 else 0
