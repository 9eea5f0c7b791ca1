"""The server: how it is reached, what it must be, and what its errors mean to a user of Filao."""

import asyncio
import select
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg.rows import tuple_row

from filao.errors import ConfigurationError, EngineError, EngineUnavailable

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

VERSION_MIN = 140_000  # stored generated columns and the record type of a table in SQL functions came with 12 and 14
CONNECTED_WITHIN = 10  # seconds
ANSWERS_WITHIN = 30.0  # seconds for a statement; a server that takes longer is as good as away
LOCKED_FOR = 10.0  # seconds that a statement waits for a row that somebody's transaction holds

_CONFIGURATION: tuple[tuple[type[psycopg.Error], str], ...] = (
    (
        errors.InsufficientPrivilege,
        "Grant it: GRANT CREATE ON DATABASE …, or GRANT USAGE, and all on the tables of schema filao.",
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


class Server:
    """A PostgreSQL database, by its URL."""

    def __init__(self, url: str, *, durable: bool) -> None:
        try:
            about = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            raise ConfigurationError(f"the PostgreSQL URL cannot be read: {str(error).strip()}") from None
        self.url = url
        self.durable = durable
        host, port = about.get("host") or "localhost", about.get("port") or 5432
        self.name = f"PostgreSQL at {host}:{port}, database {about.get('dbname') or about.get('user') or '(default)'}"
        """What it is called in error texts; without the password."""
        self.is_pooled = False
        """A pooler stands before it that gives a transaction any connection, so that nothing outlives one."""

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
            try:
                async with asyncio.timeout(ANSWERS_WITHIN):
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
            "set_config('statement_timeout', %s, false)",
            (commits, f"{LOCKED_FOR:g}s", f"{ANSWERS_WITHIN:g}s"),
        )

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


class Link:
    """A connection that is opened when it is needed, and anew after it was lost."""

    def __init__(self, server: Server) -> None:
        self._server = server
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
                    async with asyncio.timeout(ANSWERS_WITHIN):
                        yield connection
            except BaseException:
                await self._mend(connection)
                raise

    async def _usable(self) -> Connection:
        connection = self._connection
        if connection is None or connection.closed or _is_hung_up(connection):
            await self.close()
            connection = self._connection = await self._server.connect()
        return connection

    async def _mend(self, connection: Connection) -> None:
        """After an error, leave no transaction open; a connection that may be in the middle of something is dropped."""
        idle = psycopg.pq.TransactionStatus.IDLE
        if connection.closed or connection.info.transaction_status == idle:
            return
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
            with suppress(psycopg.Error, TimeoutError):
                async with asyncio.timeout(1):
                    await connection.rollback()
                    return
        await self.close()

    async def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def abandon(self) -> None:
        """Forget the connection in a child after a fork: closing it would end the parent's session."""
        _ABANDONED.append(self._connection)
        self._connection = None


_ABANDONED: list[object] = []  # what a child process inherited and must never close


def _is_hung_up(connection: Connection) -> bool:
    """Return whether the server has said something unasked, which can only be a farewell."""
    try:
        return bool(select.select([connection.fileno()], [], [], 0)[0])
    except (OSError, ValueError):
        return True
