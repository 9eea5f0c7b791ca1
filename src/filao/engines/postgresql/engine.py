"""The PostgreSQL engine: many machines, one database.

A batch is one transaction and one round trip: its calls (`verbs.py`) of the functions in the database (`functions/`) go
out as one pipeline, on one connection. Those that wait are called after the commit. Users' transactions have
connections of their own, from a pool.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import LockNotAvailable, NoDataFound

from filao.engine import Abandoned, Batch, Feature, Operation, Receive, Result, Send, Submit
from filao.engines.postgresql import control, verbs
from filao.engines.postgresql.apart import Apart
from filao.engines.postgresql.control import SLICE, PostgresqlOperators
from filao.engines.postgresql.listener import Listener
from filao.engines.postgresql.main import MOMENT, Main
from filao.engines.postgresql.moving import PostgresqlMover
from filao.engines.postgresql.overview import PostgresqlOverview
from filao.engines.postgresql.schema import migrate
from filao.engines.postgresql.server import BEGIN, Connection, Server
from filao.engines.postgresql.transactions import PostgresqlTransactions, TransactionPool
from filao.engines.postgresql.watch import Watch
from filao.engines.rows import lease_lost
from filao.engines.waiters import Lines, Place
from filao.errors import EngineError, EngineUnavailable, FilaoError
from filao.guarded import for_ever
from filao.queue import Queue, not_found, rules_to_json

CALLED_WITHIN = 1.0  # seconds that a committed transaction of the user's takes more to call those that wait
UNUSED_MAX = 60.0  # seconds after which a connection of the pool that nobody used is closed


class PostgresqlEngine:
    """See `filao.engine.Engine`."""

    name = "PostgreSQL"
    features: frozenset[Feature] = frozenset(Feature)
    emulated: frozenset[Feature] = frozenset()
    concurrent_batches = 1

    def __init__(
        self,
        url: str,
        *,
        durable: bool = True,
        clock: Callable[[], float] = time.time,
        beside: Listener | None = None,
    ) -> None:
        self._server = Server(url, durable=durable)
        self._durable = durable
        self._clock = clock
        self._listener = Listener(self._server, self._heard)
        self._main = main = Main(self._server, clock, self._listener.greet)
        self._apart = Apart(self._server, self._batch)
        self._transactions = TransactionPool(self._server)
        self._watch = Watch(
            main,
            self._listener,
            self._heard,
            connection=self._transactions.connection,
            strike_off=partial(self._strike_off, died=True),
        )
        self._lines: Lines = Lines()
        self._numbers: dict[str, int] = {}
        self._rules: dict[str, Queue] = {}
        self._others: list[str] = []
        """The names of all queues, as of the last time that an undeclared one was asked for."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_listening = False
        self._is_closing = False
        self.operators: PostgresqlOperators = PostgresqlOperators(
            main, beside or self._listener, forget=self._numbers.clear
        )
        self.overview: PostgresqlOverview = PostgresqlOverview(main, self.operators.number)
        self.mover: PostgresqlMover = PostgresqlMover(
            main, self._transactions, apply=self._apply_within, operators=self.operators
        )
        self.transactions: PostgresqlTransactions = PostgresqlTransactions(
            main, self._transactions, apply=self._apply_within, committed=self._committed
        )

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and create or migrate the schema."""
        try:
            async with self._main.use() as connection:
                self._server.database = await migrate(connection, self._server)
                await self._main.time.compare(connection)
        except BaseException:
            await self._main.link.close()
            raise
        self._server.has_served = True
        self._start(for_ever("the watch over PostgreSQL's queues", self._watch.look))
        self._start(for_ever("the housekeeping of PostgreSQL's queues", self._keep_house))

    def sibling(self) -> "PostgresqlEngine":
        """Return an engine on the same database."""
        return PostgresqlEngine(self._server.url, durable=self._durable, clock=self._clock, beside=self._listener)

    async def close(self) -> None:
        """Give back the leases that are held, and end all connections."""
        self._is_closing = True  # nothing is leased any more: it would not be given back
        self._lines.close()
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._listener.process:
                with suppress(FilaoError):  # a lease that cannot be given back runs out, or another process ends it
                    async with self._server.one_call():
                        await self._strike_off(self._listener.process, died=False)
            await self._apart.close()
            await self._listener.close()
            await self._main.link.close()
            await self._transactions.close()
        finally:
            self._server.drop()

    def drop(self) -> None:
        """Close all connections after the event loop has ended."""
        self._server.drop()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the data plane ----------------------------------------------------------------------------------------------

    async def execute(self, batch: Batch) -> "list[Result | asyncio.Future[Result]]":
        """Do a batch as one transaction, with all that joins it while it waits for the connection."""
        async with self._main.use(batch.since) as connection:
            if self._is_closing:
                raise EngineUnavailable("the broker was closed meanwhile")
            if batch.receives and not self._listener.process:
                await self._listener.register(connection)
            if self._listener.process and not (self._is_listening or self._server.is_pooled):
                self._is_listening = True
                self._start(self._listener.run())
            may_receive = self._listener.process != 0
            operations = batch.take(lambda operation: may_receive or not isinstance(operation, Receive))
            return await self._together(connection, operations, batch.since)

    async def _together(
        self, connection: Connection, operations: Sequence[Operation], since: float
    ) -> "list[Result | asyncio.Future[Result]]":
        """Do operations as one batch, except those that must wait for a lock: their results come later."""
        results: dict[int, Result | asyncio.Future[Result]] = dict(verbs.unwritable(operations, self._server.charset))
        here = {
            place: operation
            for place, operation in enumerate(operations)
            if place not in results and not (self._apart.has(operation.queue) and verbs.lock_of(operation, self._rules))
        }
        for _ in range(2):  # of all, and of those that need no row's lock; if a table is locked, all wait elsewhere
            try:
                results |= zip(here, await self._batch(connection, list(here.values())), strict=True)
                break
            except LockNotAvailable:
                here = {
                    place: operation for place, operation in here.items() if not verbs.lock_of(operation, self._rules)
                }
        return [
            results[place]
            if place in results
            else self._apart.add(operation, verbs.lock_of(operation, self._rules) or (operation.queue, None), since)
            for place, operation in enumerate(operations)
        ]

    async def _batch(self, connection: Connection, operations: Sequence[Operation]) -> list[Result]:
        """Do operations as one transaction, and again if it lost against another."""
        if not operations:
            return []
        done = await self._main.retried(connection, lambda: self._do(connection, operations), self._numbers.clear)
        results = await self._results(connection, done.operations, done.calls, done.rows)
        if not done.unknown:
            return results
        rest = iter(results)
        return [
            self._not_found(operation) if operation.queue in done.unknown else next(rest) for operation in operations
        ]

    def _not_found(self, operation: Operation) -> FilaoError:
        """Return the error of an operation on a queue that nobody declared, or that was deleted with its messages."""
        if isinstance(operation, Send | Receive):
            return not_found(operation.queue, self._others)
        return lease_lost(operation.delivery, None, queue_deleted=True)

    async def _do(self, connection: Connection, operations: Sequence[Operation]) -> "_Done":
        unknown = await self._learn(connection, operations)
        known = [operation for operation in operations if operation.queue not in unknown]
        calls = verbs.calls(known, self._setting(later=False))
        fresh = [(self._numbers[queue], count) for queue, count in verbs.fresh(known).items()]
        with self._server.replicated(connection):
            return _Done(known, unknown, calls, await self._run(connection, calls, fresh))

    def _setting(self, *, later: bool) -> verbs.Setting:
        listener = self._listener
        about = (listener.process, listener.name, listener.next_token)
        moment = self._main.moment() if later else self._main.expected()
        return verbs.Setting(
            self._rules, self._numbers, self._server.database, *about, moment, later, self._server.charset.fitted
        )

    async def _learn(self, connection: Connection, operations: Sequence[Operation]) -> set[str]:
        """Learn the numbers of queues, and return the names that nobody declared."""
        unknown = {operation.queue for operation in operations} - self._numbers.keys()
        if unknown:
            for name, (number, rules) in (await control.queues(connection, unknown)).items():
                self._numbers[name], self._rules[name] = number, rules
            unknown -= self._numbers.keys()
        if unknown:
            self._others = await control.names(connection)
        return unknown

    async def _run(
        self, connection: Connection, calls: Sequence[verbs.Call], fresh: Sequence[tuple[int, int]]
    ) -> list[verbs.Rows]:
        """Make the calls in one transaction and, after its commit, call those that wait; all in one round trip.

        An error that is raised here means that it was not committed, or that nobody knows. If only the last call fails,
        nothing is raised, because the batch must not be done again; those that should have been called poll.
        """
        local = self._server.local_settings()
        committed: psycopg.AsyncCursor[Any] | None = None
        cursors: list[psycopg.AsyncCursor[Any]] = []
        try:
            async with connection.pipeline():
                await connection.execute(BEGIN)
                if local is not None:
                    await connection.execute(local.encode())
                cursors += [await connection.execute(call.sql.encode(), call.parameters) for call in calls]
                committed = await connection.execute("COMMIT")
                if fresh:
                    await connection.execute(verbs.CALL, ([queue for queue, _ in fresh], [count for _, count in fresh]))
        except psycopg.Error:
            if committed is None or committed.statusmessage != "COMMIT":
                raise
        return [await cursor.fetchall() for cursor in cursors]

    async def _results(
        self,
        connection: Connection,
        operations: Sequence[Operation],
        calls: Sequence[verbs.Call],
        rows: Sequence[verbs.Rows],
    ) -> list[Result]:
        results: list[Result] = [None] * len(operations)
        for call, found in zip(calls, rows, strict=True):
            for place, result in call.read(found).items():
                results[place] = result
        lost = [place for place, result in enumerate(results) if result is verbs.LOST]
        if lost:
            deliveries = [operation.delivery for operation in operations if not isinstance(operation, Send | Receive)]
            handles = [delivery.handle for delivery in deliveries]
            now: dict[int, tuple[str, int]] = {}
            with suppress(psycopg.Error):  # this only makes the error say more; the batch is done
                cursor = await connection.execute(verbs.WHERE_NOW, (handles,))
                now = {number: (state, attempts) for number, state, attempts in await cursor.fetchall()}
            for place in lost:
                operation = operations[place]
                assert not isinstance(operation, Send | Receive)
                results[place] = lease_lost(operation.delivery, now.get(operation.delivery.handle))
        return results

    async def _committed(self, operations: Sequence[Operation]) -> None:
        """Call those that wait for what a transaction of the user's has stored."""
        if fresh := verbs.fresh(operations):
            with suppress(FilaoError, TimeoutError):  # it is committed, and those that wait also poll
                async with asyncio.timeout(CALLED_WITHIN):  # a deleted queue has made this process forget all numbers
                    known = [self._numbers.get(queue) or await self.operators.number(queue) for queue in fresh]
                    await self._main.value(verbs.CALL, known, list(fresh.values()))

    async def _apply_within(self, connection: Connection, operations: Sequence[Operation]) -> list[Result]:
        """Do operations in a transaction that is open on a connection."""
        for error in verbs.unwritable(operations, self._server.charset).values():
            raise error
        unknown = await self._learn(connection, operations)
        if unknown:
            return [self._not_found(operation) for operation in operations]
        calls = verbs.calls(operations, self._setting(later=True))
        try:
            rows = [await (await connection.execute(call.sql.encode(), call.parameters)).fetchall() for call in calls]
        except NoDataFound:
            self._numbers.clear()
            return [verbs.deleted(operation) for operation in operations]
        return await self._results(connection, operations, calls, rows)

    # --- waking ------------------------------------------------------------------------------------------------------

    def waiter(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Place:
        """Take a place to wait for a queue."""
        return self._lines.place(receive, submit, abandoned)

    def _heard(self, number: int) -> None:
        """Let the line of a queue look; 0 stands for all queues."""
        for queue, line in self._lines.items():
            if number in (0, self._numbers.get(queue)):
                line.call()

    async def _keep_house(self) -> None:
        await self._watch.keep_house()
        async with self._main.use() as connection:
            await self._main.time.compare(connection)
        await self._transactions.close(UNUSED_MAX)

    async def _strike_off(self, process: int, *, died: bool) -> None:
        about = (process, MOMENT, died, SLICE)
        while int(await self._main.value("SELECT filao.strike_off(%s, %s, %s, %s)", *about)) == SLICE:
            pass

    # --- queues ------------------------------------------------------------------------------------------------------

    async def declare(self, queue: Queue) -> None:
        """Create the queue or give it these rules."""
        number = await self._main.value(
            "SELECT filao.declare(%s, %s::jsonb, %s)", queue.name, rules_to_json(queue), MOMENT
        )
        self._numbers[queue.name], self._rules[queue.name] = number, queue
        with suppress(EngineError):  # it is declared, and the next receive arranges what is left, or what others hold
            while await self._main.value(
                "SELECT filao.arrange_noted(%s, coalesce(%s, filao.clock()))", number, self._main.moment()
            ):
                pass  # in transactions of a bounded size

    async def find(self, queue: str) -> Queue:
        """Return a queue with its rules, from its row."""
        async with self._main.use() as connection:
            return await control.find(connection, queue)


class _Done(NamedTuple):
    """A batch that is committed, before it is read what came of it."""

    operations: Sequence[Operation]
    unknown: set[str]
    """Queues that nobody declared, whose operations were left out."""
    calls: Sequence[verbs.Call]
    rows: list[verbs.Rows]
