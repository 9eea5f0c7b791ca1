"""The user's transactions: on the file's one writing connection, or on a connection of the user's that a send joins."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from filao.engine import Operation, Receipt, Result, Send
from filao.engines.sqlite import files, verbs
from filao.engines.sqlite.books import Books, check_stands
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.foreign import open_transaction
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.send import send
from filao.engines.statements import check_statement
from filao.errors import FilaoError
from filao.guarded import look_away

R = TypeVar("R")

_LEAVE_TRACES = ("PRAGMA", "EXPLAIN", "CREATE", "ANALYZE")
"""Statements that may leave something on their connection after the transaction: a setting, a temporary table. SQLite
obeys a pragma when it is parsed, so even one that is only explained.
"""


class SqliteTransactions:
    """See `filao.engine.Transactions`."""

    def __init__(self, database: Database, jobs: Jobs) -> None:
        self._database = database
        self._jobs = jobs

    @asynccontextmanager
    async def begin(self) -> AsyncGenerator["SqliteTransaction"]:
        """Hold the file for the user's own statements; every other writer waits until this ends."""
        until = time.monotonic() + files.BUSY_TIMEOUT
        async with self._jobs.kept(until):
            transaction: SqliteTransaction | None = None
            try:
                books = await self._jobs.in_turn(lambda: self._database.begin(durable=True), until)
                transaction = SqliteTransaction(self._database, self._jobs, books)
                self._jobs.is_in_transaction = True
                yield transaction
            except BaseException as error:
                # The thread does jobs in order, so this one ends what has begun. A cancelled caller does not wait, and
                # one that is closed cannot.
                undone = self._jobs.submit(partial(self._end, transaction, partial(self._database.roll_back, error)))
                undone.add_done_callback(look_away)
                if not isinstance(error, asyncio.CancelledError | GeneratorExit):
                    await asyncio.wait([undone])
                raise
            await self._jobs.submit(partial(self._end, transaction, partial(self._database.commit, books)))

    def _end(self, transaction: "SqliteTransaction | None", end: Callable[[], None]) -> None:
        """End a transaction, and make sure that the next one finds nothing of its statements on the connection."""
        try:
            end()
        finally:
            self._jobs.is_in_transaction = False
            if transaction is not None and transaction.leaves_traces:
                self._database.hold.renew()

    def send_within(self, connection: object, operation: Send) -> list[Receipt] | FilaoError:
        """Send on the user's own connection, in the user's own transaction; waiting processes find it by polling."""
        database = self._database
        database.hold.look()
        with files.mapped(database.hold.path):
            books = database.books_on(open_transaction(connection, database.hold.path))
            receipts = send(books, operation)
            books.write_down()
        return receipts


class SqliteTransaction:
    """See `filao.engine.EngineTransaction`."""

    def __init__(self, database: Database, jobs: Jobs, books: Books) -> None:
        self._database = database
        self._jobs = jobs
        self._books = books
        self.leaves_traces: bool = False
        """Whether its connection must not be used again."""

    async def execute(self, sql: str, parameters: Any) -> list[Any]:
        """Run one statement of the user's and return its rows."""
        self.leaves_traces |= check_statement(sql) in _LEAVE_TRACES
        return await self._do(lambda: self._books.db.execute(sql, parameters).fetchall())

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Do operations as part of this transaction."""
        return await self._do(lambda: verbs.apply(self._books, operations, self._database.lessee))

    async def _do(self, job: Callable[[], R]) -> R:
        def mapped() -> R:
            self._database.check_open(self._books)
            with files.mapped(self._database.hold.path):
                check_stands(self._books)
                try:
                    return job()
                finally:
                    check_stands(self._books)  # otherwise what follows would be stored without what came before

        return await self._jobs.submit(mapped)
