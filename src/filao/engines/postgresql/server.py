"""The server: how it is reached, what it must be, and what its errors mean to a user of Filao."""

import asyncio
import select
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg.rows import tuple_row

from filao.errors import ConfigurationError, EngineError, EngineUnavailable
from filao.forks import cut_off, keep
from filao.urls import checked, shown_url

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
_STATUS = psycopg.pq.TransactionStatus

VERSION_MIN = 140_000  # stored generated columns and the record type of a table in SQL functions came with 12 and 14
CONNECTED_WITHIN = 10  # seconds
ANSWERS_WITHIN = 30.0  # seconds for a statement; a server that takes longer is as good as away
UNDONE_WITHIN = 1.0  # seconds for a rollback; else the connection is closed, which does the same
LOCKED_FOR = 10.0  # seconds that a statement waits for a row that somebody's transaction holds

_CONFIGURATION: tuple[tuple[type[psycopg.Error], str], ...] = (
    (
        errors.InsufficientPrivilege,
        "Grant it: GRANT CREATE ON DATABASE …; or, if schema filao exists, USAGE, and ALL on its TABLES and SEQUENCES.",
    ),
    (errors.InvalidCatalogName, "Create the database first: CREATE DATABASE …"),
    (errors.InvalidAuthorizationSpecification, "Mend the user name or the password in the URL, or pg_hba.conf."),
    (errors.ReadOnlySqlTransaction, "This server is a standby or read-only: connect to the primary."),
)
_REFUSALS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    " does not exist",
    "permission denied",
    "invalid ",
)


def _about(url: str) -> dict[str, Any] | None:
    """Return what a URL says, None where psycopg cannot read it: its message may hold the password, and is dropped."""
    try:
        return dict(conninfo.conninfo_to_dict(url))
    except psycopg.Error:
        return None


class Server:
    """A PostgreSQL database, by its URL."""

    def __init__(self, url: str, *, durable: bool) -> None:
        checked(url)
        about = _about(url)
        if about is None:
            raise ConfigurationError(
                f"the URL {shown_url(url)} cannot be read: a % in it begins no escape, or a setting behind its ? is none "
                f"of PostgreSQL's. Write % as %25"
            )
        self.url = url
        self.durable = durable
        host, port = about.get("host") or "localhost", about.get("port") or 5432
        self.name = f"PostgreSQL at {host}:{port}, database {about.get('dbname') or about.get('user') or '(default)'}"
        """What it is called in error texts; without the password."""
        self.is_pooled = False
        """A pooler stands before it that gives a transaction any connection, so that nothing outlives one."""
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()

    async def connect(self) -> Connection:
        """Open a connection that commits each statement, with the settings that the promises rest on."""
        with self.mapped():
            connection = await psycopg.AsyncConnection.connect(
                self.url,
                autocommit=True,
                connect_timeout=CONNECTED_WITHIN,
                row_factory=tuple_row,
                application_name="filao",
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=round(ANSWERS_WITHIN * 1000),
            )
            self._connections.add(connection)
            try:
                async with in_time():
                    await self.set_up(connection)
            except BaseException:
                await connection.close()
                raise
        return connection

    async def set_up(self, connection: Connection) -> None:
        """Check a new connection and give it the settings that the promises rest on."""
        if connection.info.server_version < VERSION_MIN:
            raise ConfigurationError(
                f"{self.name} is version {connection.info.server_version // 10_000}; Filao needs "
                f"{VERSION_MIN // 10_000} or newer"
            )
        found = await (
            await connection.execute("SELECT pg_backend_pid(), current_setting('synchronous_commit')")
        ).fetchone()
        assert found is not None
        backend, commits = found
        self.is_pooled = backend != connection.info.backend_pid
        if self.is_pooled:
            connection.prepare_threshold = (
                None  # a statement would be prepared on one server connection and run on another
            )
            return
        connection.prepare_threshold = 2
        commits = "off" if not self.durable else "on" if commits in ("off", "local") else commits
        await connection.execute(
            "SELECT set_config('synchronous_commit', %s, false), set_config('lock_timeout', %s, false), "
            "set_config('statement_timeout', %s, false), "
            "set_config('default_transaction_isolation', 'read committed', false)",
            (commits, f"{LOCKED_FOR:g}s", f"{ANSWERS_WITHIN:g}s"),
        )

    def drop(self) -> None:
        """Let go of all connections, in whatever state they are; the server undoes what was open there."""
        for connection in list(self._connections):
            connection.pgconn.finish()

    def abandon(self) -> None:
        """Cut a child off from the sessions of its parent: whatever ends there politely would end them."""
        for connection in list(self._connections):
            cut_off(connection.fileno)
            keep(connection)

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def mapped(self) -> Generator[None]:
        """Turn psycopg's errors into ours, which name the server and say what to do."""
        try:
            yield
        except psycopg.Error as error:
            raise self.engine_error(error) from error
        except TimeoutError as error:
            raise EngineUnavailable(f"{self.name} has not answered for {ANSWERS_WITHIN:g} s. {_DOUBT}") from error
        except OSError as error:
            raise EngineUnavailable(f"{self.name} cannot be reached: {error}. {_DOUBT}") from error

    def engine_error(self, error: psycopg.Error) -> EngineError | ConfigurationError:
        """Return what an error of the server means."""
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        for kind, advice in _CONFIGURATION:
            if isinstance(error, kind):
                return ConfigurationError(f"{self.name}: {said}. {advice}")
        if isinstance(error, psycopg.OperationalError) and any(refusal in str(error) for refusal in _REFUSALS):
            return ConfigurationError(f"{self.name} refused us: {said}. Mend the URL, or create what is missing.")
        if isinstance(error, errors.LockNotAvailable):
            return EngineError(
                f"{self.name}: another transaction has held a message, key or queue that this needs for {LOCKED_FOR:g} s. "
                f"Nothing was done; keep transactions short, and try again."
            )
        if isinstance(error, errors.DiskFull):
            return EngineError(f"{self.name}: its disk is full ({said}). Nothing was done; make room, and try again.")
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return EngineUnavailable(f"{self.name} is away: {said}. {_DOUBT}")
        return EngineError(f"{self.name}: {said}. Nothing was done.")


_DOUBT = (
    "If this was a send, it is open whether the message was stored: send it again with the same message_id, and it is "
    "stored once."
)


def in_time() -> asyncio.Timeout:
    """Return what raises `TimeoutError` in a block in which the server does not answer in time."""
    return asyncio.timeout(ANSWERS_WITHIN)


class Link:
    """A connection that is opened when it is needed, and anew after it was lost."""

    def __init__(self, server: Server, opened: Callable[[], None]) -> None:
        self._server = server
        self._opened = opened
        """Called when the server answers after it was lost."""
        self._connection: Connection | None = None
        self.lock = asyncio.Lock()
        """Held by whoever uses it."""

    @asynccontextmanager
    async def use(self) -> AsyncGenerator[Connection]:
        """Give the connection to one at a time; when something goes wrong with it, it is not used again."""
        async with self.lock:
            connection = await self._usable()
            try:
                with self._server.mapped():
                    async with in_time():
                        yield connection
            finally:
                if not await _is_idle(connection):
                    await self.close()

    async def _usable(self) -> Connection:
        connection = self._connection
        if connection is None or _is_lost(connection):
            await self.close()
            connection = self._connection = await self._server.connect()
            self._opened()
        return connection

    async def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class Pool:
    """Connections for transactions that may last, each opened as a `Link`'s is; those that came back are used again."""

    def __init__(self, server: Server, most: int) -> None:
        self._server = server
        self._room = asyncio.Semaphore(most)
        self._free: list[tuple[float, Connection]] = []
        """With the time of the last use, the last used at the end."""

    @asynccontextmanager
    async def use(self, wait: float) -> AsyncGenerator[Connection]:
        """Give a connection to its user alone. Raises `TimeoutError` when none became free within `wait` seconds."""
        async with asyncio.timeout(wait):
            await self._room.acquire()
        try:
            connection = await self._usable()
            try:
                yield connection
            finally:
                if await _is_idle(connection):
                    self._free.append((time.monotonic(), connection))
                else:
                    await connection.close()
        finally:
            self._room.release()

    async def _usable(self) -> Connection:
        while self._free:
            _, connection = self._free.pop()
            if not _is_lost(connection):
                return connection
            await connection.close()
        return await self._server.connect()

    async def close(self, unused_for: float = 0.0) -> None:
        """Close those that nobody has used for so many seconds."""
        until = time.monotonic() - unused_for
        old = [connection for used_at, connection in self._free if used_at <= until]
        self._free = [(used_at, connection) for used_at, connection in self._free if used_at > until]
        for connection in old:
            await connection.close()


async def _is_idle(connection: Connection) -> bool:
    """Return whether a connection can be used again; a transaction that an error has left open on it is rolled back.

    One that may be in the middle of something cannot.
    """
    if connection.closed:
        return False
    if connection.info.transaction_status in (_STATUS.INTRANS, _STATUS.INERROR):
        with suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(UNDONE_WITHIN):
                await connection.rollback()
    return connection.info.transaction_status == _STATUS.IDLE


def _is_lost(connection: Connection) -> bool:
    """Return whether a connection is closed, or its server has said something unasked, which can only be a farewell."""
    try:
        waiting = select.poll()
        waiting.register(connection.fileno(), select.POLLIN)
        return connection.closed or bool(waiting.poll(0))
    except (OSError, psycopg.OperationalError):
        return True
