"""The user's transactions, each on a connection from a pool or on the user's own."""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from psycopg import pq

from filao.codec import shown
from filao.connections import connection_of
from filao.engine import Operation, Receipt, Result, Send, Settle
from filao.engines.postgresql import verbs
from filao.engines.postgresql.links import Pool, PoolExhausted
from filao.engines.postgresql.main import Main
from filao.engines.postgresql.server import BEGIN, Connection, Server, in_time
from filao.engines.statements import check_statement, first_words, for_psycopg
from filao.errors import ConfigurationError, EngineError, EngineUnavailable, FilaoError
from filao.queue import not_found, rules_from_json

Apply = Callable[[Connection, Sequence[Operation]], Awaitable[list[Result]]]
"""Does operations in a transaction that is open on a connection."""

CONNECTIONS_MAX = 10  # for transactions, in one process
POOL_WAIT = 10.0  # seconds that a transaction waits for one of them
_PREPARES = re.compile(r"(PREPARE|DEALLOCATE|DISCARD)\b", re.IGNORECASE)


class TransactionPool:
    """Connections for the transactions of one process."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pool = Pool(server, CONNECTIONS_MAX)

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator[Connection]:
        """Begin a transaction, which commits when the block is left. An exception undoes it, and is raised as it is."""
        async with AsyncExitStack() as stack:
            with self._server.mapped(begun=False):
                connection = await self._taken(stack, begins=True)
            yield connection
            with self._server.mapped(), self._server.replicated(connection):
                async with in_time():
                    ended = await connection.execute("COMMIT")
            if ended.statusmessage != "COMMIT":
                raise EngineError(
                    f"{self._server.name}: a statement of this transaction had failed, so the server rolled all of it "
                    f"back. Nothing was done; let the error of that statement leave the block."
                )

    @asynccontextmanager
    async def connection(self, within: float) -> AsyncGenerator[Connection]:
        """Give a connection for statements of ours that commit themselves, each `within` so many seconds.

        Their errors become Filao's.
        """
        with self._server.mapped(begun=False) as attempt:
            async with AsyncExitStack() as stack:
                connection = await self._taken(stack, begins=False)
                self.soil(connection)
                await self._server.allow(connection, within)
                attempt.begun = True
                yield connection

    async def _taken(self, stack: AsyncExitStack, *, begins: bool) -> Connection:
        """Take a connection until the stack is left, on which a transaction `begins`; both have one time limit."""
        async with in_time():
            try:
                connection = await stack.enter_async_context(self._pool.use(POOL_WAIT))
            except PoolExhausted:
                raise EngineUnavailable(
                    f"{self._server.name}: no connection became free within {POOL_WAIT:g} s: {CONNECTIONS_MAX} "
                    "transactions of this process are open. Nothing was done; keep transactions short, and try again."
                ) from None
            if begins:
                await connection.execute(BEGIN)
                local = self._server.local_settings(ours=False)
                if local is not None:
                    await connection.execute(local.encode())
        return connection

    def soil(self, connection: Connection) -> None:
        """Clear away what a user's statements may have left on a connection before another user gets it."""
        self._pool.soil(connection)

    async def close(self, unused_for: float = 0.0) -> None:
        """Close the connections that nobody has used for so many seconds."""
        await self._pool.close(unused_for)


class PostgresqlTransactions:
    """See `filao.engine.Transactions`."""

    def __init__(
        self,
        main: Main,
        pool: TransactionPool,
        *,
        apply: Apply,
        committed: Callable[[Sequence[Operation]], Awaitable[None]],
    ) -> None:
        self._main = main
        self._server = main.server
        self._pool = pool
        self._apply = apply
        self._committed = committed

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator["PostgresqlTransaction"]:
        """Hold a transaction for the user's own statements, on a connection of its own."""
        async with self._pool.begin() as connection:
            within = PostgresqlTransaction(connection, self._apply)
            try:
                yield within
            except BaseException as error:
                if error is within.failed_by:
                    with self._server.mapped(begun=False, users=connection):
                        raise
                raise
            finally:
                within.failed_by = None  # or each would keep the other alive, by its traceback
                if within.has_executed:
                    self._pool.soil(connection)
                if within.has_prepared:
                    self._server.distrust_one(connection)
            within.check_open()
        await self._committed(within.done)

    def send_within(self, connection: object, operation: Send) -> list[Receipt] | FilaoError:
        """Send on the user's own connection, in the user's own transaction; those that wait find it by polling."""
        for error in verbs.unwritable([operation], self._server.charset).values():
            return error
        with self._server.mapped_within():
            given = connection_of(connection, needs_transaction=True)
            if given.paramstyle == "numeric_dollar":  # asyncpg's, which takes no array as text
                raise ConfigurationError(
                    "within= was given a connection of asyncpg, by which a send cannot join a transaction. Nothing was "
                    "sent; use a filao.Outbox, or psycopg"
                )
            is_ours = given.dialect == "postgresql" and given.execute(_IS_HERE).fetchone()[0]
            (about,) = _texts(given.execute(_ABOUT, (operation.queue,)).fetchall()) if is_ours else (None,)
            if about is None or about[2] != self._server.database:
                raise ConfigurationError(
                    f"within= was given a connection to another database than this broker's, {self._server.name}"
                )
            number, rules, _ = about
            if number is None:
                return not_found(operation.queue, [name for (name,) in _texts(given.execute(verbs.NAMES).fetchall())])
            salt = verbs.new_salt()
            parameters = verbs.send_parameters([operation], number, self._main.moment(), salt, later=True)
            rows = _texts(given.execute(verbs.SEND.replace("%s", "?"), parameters).fetchall())
        return verbs.receipts(rows, [operation], rules_from_json(operation.queue, rules), salt)[0]


class PostgresqlTransaction:
    """See `filao.engine.EngineTransaction`."""

    def __init__(self, connection: Connection, apply: Apply) -> None:
        self._connection = connection
        self._apply = apply
        self._ended_by: str | None = None
        self.failed_by: BaseException | None = None
        """The last error of the server or the driver: the others that leave the block are the user's."""
        self.has_executed: bool = False
        """Whether one of the user's statements has run, which may have left something on the connection."""
        self.has_prepared: bool = False
        """Whether one has changed the prepared statements, which are the driver's: the connection is not used again."""
        self.done: list[Operation] = []
        """Operations for which others are called after the commit."""

    async def execute(self, sql: str, parameters: Any) -> list[Any]:
        """Run one statement of the user's and return its rows."""
        self.check_open()
        check_statement(sql)
        statement, written = for_psycopg(sql, parameters)
        self.has_executed = True
        self.has_prepared = self.has_prepared or _PREPARES.match(first_words(sql)) is not None
        async with self._calling():
            try:
                async with self._connection.pipeline():  # the server takes one statement at a time then, as SQLite does
                    cursor = await self._connection.execute(statement.encode(), written)
            finally:
                if self._connection.info.transaction_status == pq.TransactionStatus.IDLE:
                    self._ended_by = sql
            self.check_open()
            return await cursor.fetchall() if cursor.description else []

    @asynccontextmanager
    async def _calling(self) -> AsyncGenerator[None]:
        """Bound what a block asks of the server, and note the error that it ends in."""
        try:
            async with in_time():
                yield
        except BaseException as error:
            self.failed_by = error
            raise

    def check_open(self) -> None:
        """Raise `EngineError` if one of the user's statements has ended this transaction."""
        if self._ended_by is not None:
            raise EngineError(
                f"the statement {shown(self._ended_by)} ended the transaction that Filao holds: what came before it "
                "may be stored, and what comes after it is refused. Leaving the block commits; an exception rolls "
                "back."
            )

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Do operations as part of this transaction."""
        self.check_open()
        async with self._calling():
            results = await self._apply(self._connection, operations)
        self.done += [operation for operation in operations if isinstance(operation, Send | Settle)]
        return results


def _texts(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows with text in place of bytes, which a connection with the client_encoding SQL_ASCII returns."""
    return [tuple(value.decode() if isinstance(value, bytes) else value for value in row) for row in rows]


_IS_HERE = "SELECT to_regclass('filao.queue') IS NOT NULL"
_ABOUT = """
    SELECT q.id, q.rules::text, m.value
    FROM filao.meta m LEFT JOIN filao.queue q ON q.name = ?
    WHERE m.name = 'database'
"""
