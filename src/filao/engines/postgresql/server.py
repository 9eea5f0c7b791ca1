"""The server: how it is reached, what it must be, and what its errors mean to a user of Filao."""

import asyncio
import logging
import re
import select
import weakref
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg.abc import RV, PQGen
from psycopg.rows import tuple_row

from filao.codec import shown
from filao.connections import driver_error, refused
from filao.engines.postgresql.charset import Charset
from filao.errors import ConfigurationError, EngineError, EngineUnavailable, FilaoError, MessageNotEncodable
from filao.forks import cut_off, gate, keep
from filao.process import process_name
from filao.urls import checked, shown_url

logging.getLogger("psycopg").addHandler(logging.NullHandler())  # without it, what is raised here would be printed too

VERSION_MIN = 140_000  # stored generated columns and the record type of a table in SQL functions came with 12 and 14
VERSION_TIMED = 170_000  # where whole transactions got a time limit
CONNECTED_WITHIN = 10  # seconds
ANSWERS_WITHIN = 30.0  # seconds for all that a call asks of the server and waits for
UNDONE_WITHIN = 1.0  # seconds for a rollback, or to cancel a statement; after that, closing the connection does it
LOCKED_FOR = 10.0  # seconds that an operation waits for a row that another transaction holds
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # whatever the database's default is
LOCKED_BRIEFLY = 0.2  # seconds that a batch waits for one; then what needs it waits elsewhere: see `apart.py`

_CONFIGURATION: tuple[tuple[type[psycopg.Error], str], ...] = (
    (
        errors.InsufficientPrivilege,
        (
            "Grant it: GRANT CREATE ON DATABASE …; or, if schema filao exists, USAGE on it, EXECUTE on its FUNCTIONS "
            "and SELECT on its TABLES; see SECURITY.md for what a sender, a receiver and an operator need."
        ),
    ),
    (errors.InvalidCatalogName, "Create the database first: CREATE DATABASE …"),
    (errors.InvalidAuthorizationSpecification, "Mend the user name or the password in the URL, or pg_hba.conf."),
)
_UNDONE: tuple[tuple[type[psycopg.Error] | UnionType, str], ...] = (
    (
        errors.LockNotAvailable,
        (
            "another transaction has held a message, key or queue that this needs for too long. Nothing was done; keep "
            "transactions short, and try again. If it is the caller's own, send with within= that connection."
        ),
    ),
    (errors.DiskFull, "its disk is full. Nothing was done; make room, and try again."),
    (
        errors.OutOfMemory,
        "it has no memory left for this. Nothing was done; close what you can, or raise what it names.",
    ),
    (
        errors.SerializationFailure | errors.DeadlockDetected,
        (
            "other transactions came first, again and again. Nothing was done; in a transaction of your own, roll it "
            "back and do it again."
        ),
    ),
    (errors.QueryCanceled, "it took too long, or an operator ended it. Nothing was done."),
    (
        errors.InvalidSqlStatementName | errors.DuplicatePreparedStatement,
        "a pooler lost what its driver had prepared. Nothing was done; open it with prepare_threshold=None.",
    ),
    (
        errors.UndefinedFunction,
        "its schema filao is of another version than this process. Nothing was done; upgrade Filao here, and restart.",
    ),
)
"""Errors after which the server has undone everything, and what to do."""
_SKIPPED = "FL002"
"""The SQLSTATE of a call whose rows something else skipped: see `filao.skipped`."""
_SKIPPED_BY = (
    "what is not Filao's skips rows of its tables, such as a trigger, a rule or row security. Nothing was done; `filao "
    "doctor` names it: drop it, and try again."
)
_SKIPPED_AT = ("ExecWithCheckOptions", "RewriteQuery")
"""Where the server itself refuses what row security, or a rule, would skip."""
_CLEAN = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; SELECT pg_catalog.pg_advisory_unlock_all(); "
    "DISCARD SEQUENCES; DISCARD TEMP"
)
"""What DISCARD ALL does, except for plans and prepared statements, which are the driver's."""
_REFUSALS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    " does not exist",
    "permission denied",
    "invalid ",
)
"""The driver drops the code of an error that it meets while it connects, so these are known by their words, in English.
"""
_TLS = re.compile(
    r"certificate file|certificate verify|server certificate|client certificate|private key|does not support SSL|"
    r"SSL error: \S+ alert|certificate present"
)
"""The driver's and the server's words where no TLS connection can be made."""
_READ_ONLY_BY = ("in_hot_standby", "default_transaction_read_only")
"""Settings with which all transactions are read-only."""
_ANSWERED = re.compile(r" failed: \S+:  ")
"""What the server itself said to a connection: how severe it is, and why, in its language."""


class Connection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection that ends soon when its call is cancelled, which also happens when the call's time is over."""

    is_alone: bool = False
    """Whether the server has committed, but somebody ended its wait for a synchronous standby, which it only notes."""
    is_given_up: bool = False
    """Whether the present wait has closed it, because its call was cancelled."""

    async def wait(self, gen: PQGen[RV], *arguments: Any, **keywords: Any) -> RV:
        """Wait for an answer. When a cancelled call closed the connection, older drivers raise that it is closed."""
        try:
            return await super().wait(gen, *arguments, **keywords)
        except psycopg.OperationalError as error:
            if self.is_given_up:
                raise asyncio.CancelledError from error
            raise
        finally:
            self.is_given_up = False

    async def cancel_safe(self, *, timeout: float = UNDONE_WITHIN) -> None:
        """Ask the server to end its statement; if it does not answer soon, close, where the driver would wait 10 s.

        With a libpq older than 17 close at once: it has no limit for this, and may hold up all threads meanwhile.
        """
        try:
            psycopg.capabilities.has_cancel_safe(check=True)
            await super().cancel_safe(timeout=min(timeout, UNDONE_WITHIN))
        except psycopg.Error:
            self.is_given_up = True
            self.pgconn.finish()
            raise


def _hear(connection: "weakref.ref[Connection]", notice: psycopg.errors.Diagnostic) -> None:
    told = connection()
    if told is not None and notice.source_function == "SyncRepWaitForLSN":  # its words are in the server's language
        told.is_alone = True


def _about(url: str) -> dict[str, Any] | None:
    """Return the settings in a URL, or None where psycopg cannot read it; its error may quote the password: drop it."""
    try:
        return dict(conninfo.conninfo_to_dict(url))
    except (psycopg.Error, UnicodeDecodeError):
        return None


@dataclass
class Attempt:
    """Whether the server may have begun with what was asked of it when an error comes."""

    begun: bool


class Server:
    """A PostgreSQL database, by its URL."""

    def __init__(self, url: str, *, durable: bool) -> None:
        checked(url)
        about = _about(url)
        if about is None:
            raise ConfigurationError(
                f"the URL {shown_url(url)} cannot be read: a % in it begins no escape of UTF-8, or a setting behind "
                "its ? is none of PostgreSQL's. Write % as %25"
            )
        self.url = url
        self.durable = durable
        host, port = about.get("host") or "localhost", about.get("port") or 5432
        self.name: str = (
            f"PostgreSQL at {host}:{port}, database {about.get('dbname') or about.get('user') or '(default)'}"
        )
        """Its name in error texts, without the password."""
        self.is_pooled: bool = False
        """Whether a pooler gives each transaction any connection, so that nothing on a connection outlasts it."""
        self.has_served = False
        """Whether it has worked for this process before, so that an error may be temporary."""
        self.charset: Charset = Charset("UTF8")
        """Which text it can hold."""
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._distrusted: weakref.WeakSet[Connection] = weakref.WeakSet()
        self.database: str = ""
        """The random name that the database got when its schema was created."""
        self._settings: weakref.WeakKeyDictionary[Connection, str] = weakref.WeakKeyDictionary()
        """The statement that gives a connection its settings; a connection behind a pooler has none."""
        gate.connect(self)

    async def connect(self, *, is_ours: bool = True, locked_for: float = LOCKED_FOR) -> Connection:
        """Open a connection that commits each statement, with the settings that the promises rest on.

        `is_ours`: no statement of a user's runs on it. `locked_for`: how many seconds a statement waits for a lock.
        """
        async with self.one_call(begun=False):
            connection = await Connection.connect(
                self.url,
                autocommit=True,
                connect_timeout=CONNECTED_WITHIN,
                row_factory=tuple_row,
                application_name=f"filao {process_name()}",
                client_encoding="UTF8",
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=round(ANSWERS_WITHIN * 1000),
            )
            connection.add_notice_handler(partial(_hear, weakref.ref(connection)))
            self._connections.add(connection)
            try:
                await self.set_up(connection, is_ours=is_ours, locked_for=locked_for)
            except BaseException:
                await connection.close()
                raise
        return connection

    @asynccontextmanager
    async def one_call(self, since: float | None = None, *, begun: bool = True) -> AsyncGenerator[Attempt]:
        """Give all that a block asks of the server and waits for one time limit, and turn its errors into ours.

        The limit is ANSWERS_WITHIN, counted from `since` by the loop's clock. Blocks within a block share its limit:
        however many parts a call has, its caller waits no longer.
        """
        with self.mapped(begun=begun) as attempt:
            async with in_time(since):
                yield attempt

    @contextmanager
    def replicated(self, connection: Connection) -> Generator[None]:
        """Raise `EngineUnavailable` behind a commit whose wait for a synchronous standby somebody has ended."""
        connection.is_alone = False
        yield
        if connection.is_alone:
            raise EngineUnavailable(
                f"{self.name} has committed, but somebody ended its wait for a synchronous standby: what a failover "
                f"brings may lack this. {_doubt(begun=True)}"
            )

    async def set_up(self, connection: Connection, *, is_ours: bool, locked_for: float) -> None:
        """Check a new connection and give it the settings that the promises rest on."""
        if connection.info.server_version < VERSION_MIN:
            raise ConfigurationError(
                f"{self.name} is version {connection.info.server_version // 10_000}; Filao needs "
                f"{VERSION_MIN // 10_000} or newer"
            )
        self.charset = Charset(connection.info.parameter_status("server_encoding") or "UTF8")
        found = await (
            await connection.execute(
                "SELECT pg_catalog.pg_backend_pid(), pg_catalog.current_setting('synchronous_commit')"
            )
        ).fetchone()
        assert found is not None
        backend, commits = found
        self.is_pooled = backend != connection.info.backend_pid
        if self.is_pooled:
            connection.prepare_threshold = None  # what is prepared on one server connection would be run on another
            return
        connection.prepare_threshold = 2
        commits = "off" if not self.durable else "on" if commits in ("off", "local") else commits
        settings = {
            "synchronous_commit": commits,
            "lock_timeout": f"{locked_for:g}s",
            "statement_timeout": f"{ANSWERS_WITHIN:g}s",
            "default_transaction_isolation": "read committed",
            "idle_session_timeout": "0",  # a process that waits is idle, and its sessions are its sign of life
            "array_nulls": "on",  # what a message lacks is NULL, where another of its batch has it
        }
        if is_ours:  # so that nobody can shadow an operator or a function that we use
            settings["search_path"] = "pg_catalog, pg_temp"
            settings["idle_in_transaction_session_timeout"] = "0"  # our transactions have a limit of their own
            if connection.info.server_version >= VERSION_TIMED:
                settings["transaction_timeout"] = "0"
        calls = [f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in settings.items()]
        self._settings[connection] = f"SELECT {', '.join(calls)}"
        await connection.execute(self._settings[connection].encode())

    async def allow(self, connection: Connection, seconds: float) -> None:
        """Let each statement on a connection take so long, until it is cleaned; behind a pooler we set no limits."""
        if connection in self._settings:
            allowed = f"SELECT pg_catalog.set_config('statement_timeout', '{seconds:g}s', false)"
            if connection.info.server_version >= VERSION_TIMED:  # as each statement is a transaction
                allowed += ", pg_catalog.set_config('transaction_timeout', '0', false)"
            await connection.execute(allowed.encode())

    async def clean(self, connection: Connection) -> None:
        """Clear away what a user's statements may have left on a connection; behind a pooler, the pooler does that.

        These are settings, a role, locks, temporary tables and cursors.
        """
        if connection in self._settings:
            await connection.execute(f"{_CLEAN}; {self._settings[connection]}".encode(), prepare=False)

    def local_settings(self, *, ours: bool = True) -> str | None:
        """Return the statement with which a transaction begins behind a pooler, which keeps no settings; else None.

        `ours`: the transaction runs no statement of a user's.
        """
        if not self.is_pooled:
            return None
        settings = {"lock_timeout": f"{LOCKED_BRIEFLY if ours else LOCKED_FOR:g}s", "array_nulls": "on"}
        if ours:
            settings["search_path"] = "pg_catalog, pg_temp"
        if self.durable:
            settings["synchronous_commit"] = "on"
        calls = [f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in settings.items()]
        return f"SELECT {', '.join(calls)}"

    def distrust(self) -> None:
        """Use no connection again that is open now, because its server can no longer write."""
        self._distrusted.update(self._connections)

    def distrust_one(self, connection: Connection) -> None:
        """Do not use a connection again, because a user's statement has changed what cannot be undone."""
        self._distrusted.add(connection)

    def is_lost(self, connection: Connection) -> bool:
        """Return whether a connection is closed or distrusted, or its server has sent something unasked: a goodbye."""
        try:
            waiting = select.poll()
            waiting.register(connection.fileno(), select.POLLIN)
            return connection.closed or connection in self._distrusted or bool(waiting.poll(0))
        except (OSError, psycopg.OperationalError):
            return True

    def is_distrusted(self, connection: Connection) -> bool:
        """Return whether a connection must be closed, even if it seems to work."""
        return connection in self._distrusted

    def drop(self) -> None:
        """Close all connections at once, whatever they are doing; the server undoes what was open there."""
        for connection in list(self._connections):
            connection.pgconn.finish()

    def inherit(self) -> None:
        """In a child: cut it off from its parent's sessions, which a polite goodbye of the child's would end."""
        for connection in list(self._connections):
            cut_off(connection.fileno)
            keep(connection)

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def mapped(self, *, begun: bool = True, users: Connection | None = None) -> Generator[Attempt]:
        """Turn psycopg's errors into ours, which name the server and say what to do.

        The block sets `begun` once it asks the server for anything that matters; before that, nothing was done.
        `users`: the connection whose transaction a user's own statements may have made read-only.
        """
        attempt = Attempt(begun)
        try:
            yield attempt
        except psycopg.Error as error:
            if isinstance(error, errors.ReadOnlySqlTransaction):
                if users is not None and self._writes_by_default(users):
                    raise self._read_only_transaction("this transaction", "done") from error
                self.distrust()
            raise self.engine_error(error, begun=attempt.begun) from error
        except TimeoutError as error:
            raise self.unanswered(begun=attempt.begun) from error
        except OSError as error:
            raise EngineUnavailable(f"{self.name} cannot be reached: {error}. {_doubt(begun=attempt.begun)}") from error

    def unanswered(self, *, begun: bool) -> EngineUnavailable:
        """Return the error of a call whose time is over."""
        return EngineUnavailable(f"{self.name} has not answered for {ANSWERS_WITHIN:g} s. {_doubt(begun=begun)}")

    @contextmanager
    def mapped_within(self) -> Generator[None]:
        """Turn the errors of a user's own connection into ours, whatever library raised them.

        They say nothing about the server, which other connections reach.
        """
        try:
            yield
        except FilaoError:
            raise
        except Exception as error:
            raise self._within_error(error) from error

    def _within_error(self, error: Exception) -> FilaoError:
        if (wrong := driver_error(error, UnicodeEncodeError)) is not None:
            return MessageNotEncodable(
                f"{self.name}: the client_encoding of the within= connection cannot hold "
                f"{shown(wrong.object[wrong.start : wrong.end])}. Nothing was sent; set its client_encoding to UTF8."
            )
        drivers = driver_error(error, psycopg.Error)
        if isinstance(drivers, errors.ReadOnlySqlTransaction):
            return self._read_only_transaction("the transaction of the within= connection", "sent")
        if drivers is None:
            return refused(error)
        found = self.engine_error(drivers, begun=False)  # a connection that is lost takes its transaction with it
        if not isinstance(found, EngineUnavailable):
            return found
        return EngineUnavailable(
            f"{self.name}: the within= connection cannot be used: {_said_by(drivers)}. If it is closed, its "
            f"transaction is undone: begin again on another one. Nothing was done."
        )

    def engine_error(self, error: psycopg.Error, *, begun: bool = True) -> EngineError | ConfigurationError:
        """Return what an error of the server means."""
        said = _said_by(error)
        if (wrong := _wrong_with_tables(error, said)) is not None:
            return EngineError(f"{self.name}: {wrong} It said: {said}")
        for kind, advice in _CONFIGURATION:
            if isinstance(error, kind):
                return ConfigurationError(f"{self.name}: {said}. {advice}")
        if isinstance(error, errors.ReadOnlySqlTransaction):
            return self._read_only(said)
        if "statement pooling" in said:
            return ConfigurationError(
                f"{self.name}: {said}. A pooler before it pools statements, and Filao needs transactions: set its "
                f"pool_mode to transaction or session. Nothing was done."
            )
        if not begun and isinstance(error, psycopg.OperationalError) and _TLS.search(said):
            return EngineUnavailable(
                f"{self.name}: no TLS connection could be made: {said}. Nothing was done. The server's certificate "
                f"must be valid for the host in the URL, and be signed by the authority in sslrootcert=; sslcert= and "
                f"sslkey= name your own."
            )
        if isinstance(error, psycopg.OperationalError) and any(refusal in str(error) for refusal in _REFUSALS):
            return ConfigurationError(f"{self.name} refused us: {said}. Mend the URL, or create what is missing.")
        for kinds, text in _UNDONE:
            if isinstance(error, kinds):
                return EngineError(f"{self.name}: {text} It said: {said}")
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and not _is_of_statement(error):
            what = "refused us" if _ANSWERED.search(said) else "is away"
            return EngineUnavailable(f"{self.name} {what}: {said}. {_doubt(begun=begun)}")
        return EngineError(f"{self.name}: {said}. Nothing was done.")

    def skipped(self, table: str) -> EngineError:
        """Return the error of a statement that wrote no row where it had to: see `filao.skipped`."""
        return EngineError(f"{self.name}: {_SKIPPED_BY} It was in {table}.")

    def _writes_by_default(self, connection: Connection) -> bool:
        """Return whether a transaction on a connection can write unless it was told otherwise.

        The server reports both settings whenever they change; a pooler may repeat those of another server.
        """
        settings = (connection.info.parameter_status(name) for name in _READ_ONLY_BY)
        return not self.is_pooled and all(setting == "off" for setting in settings)

    def _read_only_transaction(self, whose: str, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.name}: {whose} is read-only by its own settings. Nothing was {what}; use one that may write."
        )

    def _read_only(self, said: str) -> EngineError | ConfigurationError:
        if not self.has_served:
            return ConfigurationError(
                f"{self.name}: {said}. This server is a standby or read-only: connect to the primary, or turn "
                f"default_transaction_read_only off."
            )
        return EngineUnavailable(
            f"{self.name} is read-only by now: {said}. Nothing was done. The next call connects anew, and reaches the "
            f"primary as soon as the URL leads there; if it is the primary, turn default_transaction_read_only off."
        )


def _said_by(error: psycopg.Error) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _wrong_with_tables(error: psycopg.Error, said: str) -> str | None:
    """Return what somebody has done to Filao's tables, and what to do about it; None: nothing that is known."""
    if error.sqlstate == _SKIPPED or error.diag.source_function in _SKIPPED_AT:
        return _SKIPPED_BY
    if isinstance(error, errors.UniqueViolation) and error.diag.schema_name == "filao":
        return (
            "a number that a sequence gave is in use, as in a logical replica, to which sequences do not come. Nothing "
            "was done; `filao doctor` says how to set them."
        )
    if isinstance(error, errors.InvalidSchemaName | errors.UndefinedTable) and re.search(r"\bfilao\b", said):
        return (
            "its schema filao is not there: was the database dropped, or put in the place of another? Nothing was "
            "done; restore it, or open a broker anew, which makes it, empty."
        )
    return None


def _is_of_statement(error: psycopg.Error) -> bool:
    """Return whether the server refused a statement and is there still; not so what a pooler says, or a shutdown."""
    return error.diag.severity_nonlocalized == "ERROR" and (error.sqlstate or "")[:2] not in ("08", "57")


def _doubt(*, begun: bool) -> str:
    if not begun:
        return "Nothing was done."
    return (
        "If this was a send, it is open whether the message was stored: send it again with the same message_id, and "
        "it is stored once."
    )


def in_time(since: float | None = None) -> asyncio.Timeout:
    """Return a block that raises `TimeoutError` when it outlasts a call that began at `since`, or now."""
    return asyncio.timeout_at(end_of_call(asyncio.get_running_loop().time() if since is None else since))


def end_of_call(since: float) -> float:
    """Return when a call must have ended that began at `since`."""
    return since + ANSWERS_WITHIN
