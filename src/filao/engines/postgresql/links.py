"""Connections that are used again: the one of a link, and those of a pool. What went wrong with one ends it."""

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import psycopg

from filao.engines.postgresql.server import UNDONE_WITHIN, Connection, Server

_STATUS = psycopg.pq.TransactionStatus


class Link:
    """A connection that is opened when it is needed, and again after it was lost."""

    def __init__(
        self, server: Server, locked_for: float, opened: Callable[[Connection], Awaitable[None]] | None = None
    ) -> None:
        self._server = server
        self._locked_for = locked_for
        self._opened = opened
        """Is called with each new connection before it is used."""
        self._connection: Connection | None = None
        self.lock: asyncio.Lock = asyncio.Lock()
        """Held by the user of the connection."""

    @asynccontextmanager
    async def use(self, since: float | None = None) -> AsyncGenerator[Connection]:
        """Give the connection to one user at a time; when something goes wrong with it, it is not used again.

        Waiting for it, opening it and using it share one time limit: see `Server.one_call`.
        """
        async with self._server.one_call(since, begun=False) as attempt, self.lock:
            connection = await self._usable()
            attempt.begun = True
            try:
                yield connection
            finally:
                if not await _is_idle(connection):
                    await self.close()

    async def _usable(self) -> Connection:
        connection = self._connection
        if connection is None or self._server.is_lost(connection):
            await self.close()
            connection = await self._server.connect(locked_for=self._locked_for)
            self._connection = connection
            if self._opened is not None:
                try:
                    await self._opened(connection)
                except BaseException:
                    await self.close()
                    raise
        return connection

    async def close(self) -> None:
        """Close the connection; `use` opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class PoolExhausted(Exception):
    """All connections of a pool were in use for too long."""


class Pool:
    """Connections for transactions that may last, opened when they are needed; those that came back are used again."""

    def __init__(self, server: Server, most: int) -> None:
        self._server = server
        self._room = asyncio.Semaphore(most)
        self._free: list[tuple[float, Connection]] = []
        """With the time of their last use, the last used at the end."""
        self._soiled: weakref.WeakSet[Connection] = weakref.WeakSet()

    @asynccontextmanager
    async def use(self, wait: float) -> AsyncGenerator[Connection]:
        """Give a connection to one user. Raises `PoolExhausted` when none became free within `wait` seconds."""
        try:
            async with asyncio.timeout(wait):
                await self._room.acquire()
        except TimeoutError:
            raise PoolExhausted from None
        try:
            connection = await self._usable()
            try:
                yield connection
            finally:
                await self._take_back(connection)
        finally:
            self._room.release()

    def soil(self, connection: Connection) -> None:
        """Clean a connection that is in use when it comes back."""
        self._soiled.add(connection)

    async def _take_back(self, connection: Connection) -> None:
        is_fit = False
        try:
            is_fit = await _is_idle(connection) and await self._is_clean(connection)
        finally:
            if is_fit:
                self._free.append((time.monotonic(), connection))
            else:
                await connection.close()

    async def _is_clean(self, connection: Connection) -> bool:
        if connection not in self._soiled:
            return True
        self._soiled.discard(connection)
        try:
            async with asyncio.timeout(UNDONE_WITHIN):
                await self._server.clean(connection)
        except (psycopg.Error, TimeoutError):
            return False
        return True

    async def _usable(self) -> Connection:
        while self._free:
            _, connection = self._free.pop()
            if not self._server.is_lost(connection):
                return connection
            await connection.close()
        return await self._server.connect(is_ours=False)

    async def close(self, unused_for: float = 0.0) -> None:
        """Close the free connections that nobody has used for so many seconds."""
        until = time.monotonic() - unused_for
        old = [connection for used_at, connection in self._free if used_at <= until]
        self._free = [(used_at, connection) for used_at, connection in self._free if used_at > until]
        for connection in old:
            await connection.close()


async def _is_idle(connection: Connection) -> bool:
    """Return whether a connection can be used again; first roll back a transaction that an error left open on it.

    A connection in the middle of a statement cannot be used again.
    """
    if connection.closed:
        return False
    if connection.info.transaction_status in (_STATUS.INTRANS, _STATUS.INERROR):
        with suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(UNDONE_WITHIN):
                await connection.rollback()
    return connection.info.transaction_status == _STATUS.IDLE
