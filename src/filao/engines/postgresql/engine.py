"""The PostgreSQL engine: many machines, one database.

A batch is one transaction and one round trip: its calls (`verbs.py`) of the functions in the database (`functions/`) go
out as one pipeline, on one connection. Whoever waits is called after the commit. Users' transactions have connections
of their own, from a pool.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import LockNotAvailable

from filao.connections import connection_of
from filao.engine import (
    Abandoned,
    Batch,
    Draft,
    Feature,
    Finding,
    Memory,
    Operation,
    Packing,
    Parcel,
    QueueStats,
    Receipt,
    Receive,
    Result,
    Send,
    State,
    StoredMessage,
    Submit,
)
from filao.engines.postgresql import control, moving, verbs
from filao.engines.postgresql.apart import Apart
from filao.engines.postgresql.clock import MOMENT, ServerClock
from filao.engines.postgresql.doctor import examine
from filao.engines.postgresql.listener import Listener
from filao.engines.postgresql.schema import migrate
from filao.engines.postgresql.server import LOCKED_BRIEFLY, LOCKED_FOR, Connection, Link, Server, in_time
from filao.engines.postgresql.transactions import BEGIN, PostgresqlTransaction, Transactions, retried
from filao.engines.postgresql.watch import Watch
from filao.engines.rows import LEAVING, RowPacking, has_rival, is_new, sends, without_key
from filao.engines.waiters import Line, Place
from filao.errors import ConfigurationError, EngineError, EngineUnavailable, FilaoError
from filao.guarded import for_ever
from filao.queue import Queue, not_found, rules_from_json, rules_to_json

SLICE = 2_000  # messages that operators change in one transaction
UNUSED_MAX = 60.0  # seconds after which one that nobody used is closed
UNLOCKED_POLL = 0.05  # seconds between looks whether the senders of a queue that is to be deleted are done


class PostgresqlEngine:
    """See `filao.engine.Engine`."""

    name = "PostgreSQL"
    features: frozenset[Feature] = frozenset(Feature)
    emulated: frozenset[Feature] = frozenset()
    lanes = 1

    def __init__(self, url: str, *, durable: bool = True, clock: Callable[[], float] = time.time) -> None:
        self._server = Server(url, durable=durable)
        self._durable = durable
        self._clock = clock
        self._listener = Listener(self._server, self._heard)
        self._time = ServerClock(self._server.name)
        self._main = Link(self._server, LOCKED_BRIEFLY, self._listener.nudge)
        self._apart = Apart(self._server, self._batch)
        self._transactions = Transactions(self._server)
        strike_off = partial(self._strike_off, died=True)
        self._watch = Watch(
            self._listener,
            self._heard,
            row=self._row,
            connection=self._transactions.connection,
            strike_off=strike_off,
        )
        self._database = ""
        self._lines: dict[str, Line] = {}
        self._numbers: dict[str, int] = {}
        self._rules: dict[str, Queue] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_listening = False
        self._is_closing = False

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect, and create or migrate the schema."""
        try:
            async with self._main.use() as connection:
                self._database = await migrate(connection, self._server)
                await self._time.compare(connection)
        except BaseException:
            await self._main.close()
            raise
        self._server.has_served = True
        self._start(for_ever("the watch over PostgreSQL's queues", self._watch.look))
        self._start(for_ever("the housekeeping of PostgreSQL's queues", self._keep_house))

    def twin(self) -> "PostgresqlEngine":
        """Return an engine on the same database."""
        return PostgresqlEngine(self._server.url, durable=self._durable, clock=self._clock)

    async def close(self) -> None:
        """Give back the leases that are held, and end all connections."""
        self._is_closing = True  # from here on nothing is leased, or it would be after the leases were given back
        for line in self._lines.values():
            line.close()
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._listener.process:
                with suppress(FilaoError, TimeoutError):  # what it could not give back runs out, or is taken over
                    async with in_time():
                        await self._strike_off(self._listener.process, died=False)
            await self._apart.close()
            await self._listener.close()
            await self._main.close()
            await self._transactions.close()
        finally:
            self._server.drop()

    def drop(self) -> None:
        """Let go though the event loop has ended."""
        self._server.drop()

    def abandon(self) -> None:
        """Let go in a child after a fork."""
        self._server.abandon()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _moment(self) -> int | None:
        """Return the time of a clock that a test moves; None: the server's own decides, jumped or not."""
        return None if self._clock is time.time else round(self._clock() * 1000)

    def _expected(self) -> int | None:
        """Return what a call that can be made again says of the time: see `ServerClock`."""
        return self._time.moment() if self._clock is time.time else self._moment()

    # --- the data plane ----------------------------------------------------------------------------------------------

    async def execute(self, batch: Batch) -> "list[Result | asyncio.Future[Result]]":
        """Do a batch as one transaction, with what joined it while we waited for the connection."""
        async with self._main.use() as connection:
            if self._is_closing:
                raise EngineUnavailable("the broker was closed meanwhile")
            if batch.receives and not self._listener.process:
                await self._listener.register(connection)
                if not self._server.is_pooled and not self._is_listening:
                    self._is_listening = True
                    self._start(self._listener.run())
            may_receive = self._listener.process != 0
            operations = batch.take(lambda operation: may_receive or not isinstance(operation, Receive))
            return await self._together(connection, operations)

    async def _together(
        self, connection: Connection, operations: Sequence[Operation]
    ) -> "list[Result | asyncio.Future[Result]]":
        """Do operations as one batch, but for those that must wait for somebody's lock: their results come later."""
        results: dict[int, Result | asyncio.Future[Result]] = dict(verbs.unwritable(operations, self._server.charset))
        here = {
            place: operation
            for place, operation in enumerate(operations)
            if place not in results
            and not (self._apart.has(verbs.queue_of(operation)) and verbs.may_wait(operation, self._rules))
        }
        for _ in range(2):  # of all, and of those that need no row's lock; if a table is locked, all wait elsewhere
            try:
                results |= zip(here, await self._batch(connection, list(here.values())), strict=True)
                break
            except LockNotAvailable:
                here = {
                    place: operation for place, operation in here.items() if not verbs.may_wait(operation, self._rules)
                }
        return [
            results[place] if place in results else self._apart.add(operation)
            for place, operation in enumerate(operations)
        ]

    async def _batch(self, connection: Connection, operations: Sequence[Operation]) -> list[Result]:
        """Do operations as one transaction, again if it met another and lost."""
        if not operations:
            return []
        done = await retried(connection, lambda: self._do(connection, operations), self._time, self._numbers.clear)
        results = await self._results(connection, done.operations, done.calls, done.rows)
        if not done.unknown:
            return results
        rest = iter(results)
        return [
            self._not_found(operation) if verbs.queue_of(operation) in done.unknown else next(rest)
            for operation in operations
        ]

    def _not_found(self, operation: Operation) -> FilaoError:
        """Return the error of an operation on a queue that nobody declared, or that was deleted with what was
        leased.
        """
        if isinstance(operation, Send | Receive):
            return not_found(operation.queue, self._rules)
        return verbs.lease_lost(operation.delivery, None)

    async def _do(self, connection: Connection, operations: Sequence[Operation]) -> "_Done":
        unknown = await self._learn(connection, operations)
        known = [operation for operation in operations if verbs.queue_of(operation) not in unknown]
        calls = verbs.calls(known, self._setting(later=False))
        fresh = [(self._numbers[queue], count) for queue, count in verbs.fresh(known).items()]
        return _Done(known, unknown, calls, await self._run(connection, calls, fresh))

    def _setting(self, *, later: bool) -> verbs.Setting:
        listener = self._listener
        about = (listener.process, listener.name, listener.next_token)
        moment = self._moment() if later else self._expected()
        return verbs.Setting(
            self._rules, self._numbers, self._database, *about, moment, later, self._server.charset.fitted
        )

    async def _learn(self, connection: Connection, operations: Sequence[Operation]) -> set[str]:
        """Learn the numbers of queues, and return the names that nobody declared."""
        names = {verbs.queue_of(operation) for operation in operations}
        if not names <= self._numbers.keys():
            for name, (number, rules) in (await control.queues(connection)).items():
                self._numbers[name], self._rules[name] = number, rules
        return names - self._numbers.keys()

    async def _run(
        self, connection: Connection, calls: Sequence[verbs.Call], fresh: Sequence[tuple[int, int]]
    ) -> list[verbs.Rows]:
        """Make the calls in one transaction and, once it is committed, wake those who wait; all in one round trip.

        What is raised here was not committed, or it is open whether it was: a call that fails after the commit must not
        make anybody do it again. Whom it should have woken finds what there is by polling.
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
            with suppress(psycopg.Error):  # it only makes the error say more, and the batch is done
                cursor = await connection.execute(verbs.WHERE_NOW, (handles,))
                now = {number: (state, attempts) for number, state, attempts in await cursor.fetchall()}
            for place in lost:
                operation = operations[place]
                assert not isinstance(operation, Send | Receive)
                results[place] = verbs.lease_lost(operation.delivery, now.get(operation.delivery.handle))
        return results

    def send_within(self, connection: object, operation: Send) -> list[Receipt] | FilaoError:
        """Send on the user's own connection, in the user's own transaction; whoever waits finds it by polling."""
        given = connection_of(connection, needs_transaction=True)
        for error in verbs.unwritable([operation], self._server.charset).values():
            return error
        with self._server.mapped_within():
            is_ours = given.dialect == "postgresql" and given.execute(_IS_HERE).fetchone()[0]
            (about,) = _texts(given.execute(_ABOUT, (operation.queue,)).fetchall()) if is_ours else (None,)
            if about is None or about[2] != self._database:
                raise ConfigurationError(
                    f"within= was given a connection to another database than this broker's, {self._server.name}"
                )
            number, rules, _ = about
            if number is None:
                return not_found(operation.queue, self._rules)
            salt = verbs.new_salt()
            parameters = verbs.send_parameters([operation], number, self._moment(), salt, later=True)
            rows = _texts(given.execute(verbs.SEND.replace("%s", "?"), parameters).fetchall())
        return verbs.receipts(rows, [operation], rules_from_json(operation.queue, rules), salt)[0]

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[PostgresqlTransaction]:
        """Hold a transaction for the user's own statements, on a connection of its own."""
        async with self._transactions.begin() as connection:
            within = PostgresqlTransaction(connection, self.apply_within)
            try:
                yield within
            finally:
                if within.has_set:
                    self._server.distrust_one(connection)
            within.check_open()
        if fresh := verbs.fresh(within.done):
            with suppress(FilaoError):  # it is committed; whoever waits polls as well
                known = [self._numbers.get(queue) or await self._number(queue) for queue in fresh]  # a delete forgets
                await self._value(verbs.CALL, known, list(fresh.values()))

    async def apply_within(self, connection: Connection, operations: Sequence[Operation]) -> list[Result]:
        """Do operations in a transaction that is open on a connection."""
        for error in verbs.unwritable(operations, self._server.charset).values():
            raise error
        unknown = await self._learn(connection, operations)
        if unknown:
            return [self._not_found(operation) for operation in operations]
        calls = verbs.calls(operations, self._setting(later=True))
        rows = [await (await connection.execute(call.sql.encode(), call.parameters)).fetchall() for call in calls]
        return await self._results(connection, operations, calls, rows)

    # --- waking ------------------------------------------------------------------------------------------------------

    def waiter(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Place:
        """Take a place to wait for a queue."""
        line = self._lines.get(receive.queue)
        if line is None:
            line = self._lines[receive.queue] = Line(submit, abandoned)
        return line.place(receive)

    def _heard(self, number: int) -> None:
        """Let those in line for a queue look; 0 stands for all queues."""
        for queue, line in self._lines.items():
            if number in (0, self._numbers.get(queue)):
                line.call()

    async def _keep_house(self) -> None:
        await self._watch.keep_house()
        async with self._main.use() as connection:
            await self._time.compare(connection)
        await self._transactions.close(UNUSED_MAX)

    async def _strike_off(self, process: int, *, died: bool) -> None:
        about = (process, MOMENT, died, SLICE)
        while int(await self._value("SELECT filao.strike_off(%s, %s, %s, %s)", *about)) == SLICE:
            pass

    # --- the control plane -------------------------------------------------------------------------------------------

    async def declare(self, queue: Queue) -> None:
        """Create the queue or give it these rules."""
        number = await self._value("SELECT filao.declare(%s, %s::jsonb, %s)", queue.name, rules_to_json(queue), MOMENT)
        while await self._value("SELECT filao.arrange_noted(%s, coalesce(%s, filao.clock()))", number, self._moment()):
            pass  # in transactions of a bounded size; whatever others hold is arranged by whoever receives next
        self._numbers[queue.name], self._rules[queue.name] = number, queue

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        async with self._main.use() as connection:
            return [rules for _, rules in (await control.queues(connection)).values()]

    async def find(self, queue: str) -> Queue:
        """Return a queue with its rules, by one row."""
        async with self._main.use() as connection:
            return await control.find(connection, queue)

    async def delete(self, queue: str) -> int:
        """Delete a queue that holds no message."""
        number = await self._number(queue)
        for _ in range(round(LOCKED_FOR / UNLOCKED_POLL)):
            held = await self._value("SELECT filao.delete(%s)", number)
            if held is not None:
                self._numbers.clear()
                return int(held)
            await asyncio.sleep(UNLOCKED_POLL)
        raise EngineError(
            f"{self._server.name}: queue {queue!r} was not deleted: transactions that have "
            "sent to it have been open for "
            f"{LOCKED_FOR:g} s. Nothing was done; delete it when its senders have stopped."
        )

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Read the counters of every queue, or of one."""
        await self._value("SELECT filao.expire_all(%s)", MOMENT)
        async with self._main.use() as connection:
            return await control.stats(connection, self._moment(), queue)

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages of one state in its order."""
        number = await self._number(queue)
        await self._value("SELECT filao.expire_all(%s)", MOMENT)
        async with self._main.use() as connection:
            return await control.peek(connection, (number, queue), state, limit=limit, after=after)

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Give dead letters back, each to its old place."""
        number, chosen = await self._number(queue), None if ids is None else list(ids)
        new = (None, None, None) if edited is None else (edited.kind, edited.content, edited.headers)

        sql = "SELECT * FROM filao.redrive(%s, %s, %s::text[], %s, %s, %s, %s::smallint, %s::bytea, %s)"
        done = await self._in_slices(sql, (number, MOMENT, chosen), new, limit)
        await self._wake(number, done)
        return done

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete messages in these states."""
        number, chosen = await self._number(queue), None if ids is None else list(ids)
        sql = "SELECT * FROM filao.remove(%s, %s, %s::filao.state[], %s::text[], %s, %s, %s)"
        done = await self._in_slices(sql, (number, MOMENT, list(map(str, states)), chosen), (), None)
        await self._wake(number, done)
        return done

    async def _in_slices(self, sql: str, first: tuple[Any, ...], last: tuple[Any, ...], limit: int | None) -> int:
        """Change many messages in transactions of a bounded size: none that was sent, or died, after this began."""
        mark, after, total = await self._value("SELECT filao.mark()"), 0, 0
        while limit is None or total < limit:
            size = SLICE if limit is None else min(SLICE, limit - total)
            done, after = await self._row(sql, *first, after, mark, size, *last)
            if not done:
                break
            total += done
        return total

    async def pause(self, queue: str, *, paused: bool) -> None:
        """Stop or resume deliveries."""
        number = await self._number(queue)
        await self._value("UPDATE filao.queue SET paused = %s WHERE id = %s RETURNING id", paused, number)
        await self._wake(number, 0 if paused else SLICE)

    async def resume_group(self, queue: str, group: str) -> None:
        """Let a halted group go on."""
        number = await self._number(queue)
        await self._value("SELECT filao.resume_group(%s, %s, %s)", number, MOMENT, group)
        await self._wake(number, 1)

    def check(self, queue: Queue) -> None:
        """Accept every queue."""

    def check_draft(self, queue: Queue, draft: Draft) -> None:
        """Refuse text that the database's encoding cannot hold; a body is stored as bytes."""
        self._server.charset.check(queue.name, draft)

    async def identity(self) -> str:
        """Return the schema's own name, its database, and the run of its server: a copy has another of these."""
        return str(await self._value(_IDENTITY))

    @asynccontextmanager
    async def packing(self, queue: str) -> AsyncGenerator[Packing]:
        """Begin to carry a queue's messages elsewhere."""
        number = await self._number(queue)

        async def read(after: int, limit: int) -> list[Parcel]:
            async with self._main.use() as connection:
                return await moving.pack(connection, number, self._moment(), after, limit)

        async def held() -> int:
            return (await self.stats(queue))[0].leased

        yield RowPacking(read, partial(self.remove, queue, LEAVING), held)

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Store messages that came from elsewhere."""
        number = await self._number(queue)
        async with self._transactions.begin() as connection:
            results = await self.apply_within(connection, sends(queue, parcels))
            for place, parcel in enumerate(parcels):
                if has_rival(parcel, results[place]):
                    (results[place],) = await self.apply_within(connection, sends(queue, [without_key(parcel)]))
            new = [parcel for parcel, result in zip(parcels, results, strict=True) if is_new(result)]
            await moving.amend(connection, number, self._moment(), new)

    async def memory(self, queue: str) -> Memory:
        """Return the keys of messages that have ended, and the groups that are halted."""
        number = await self._number(queue)
        async with self._main.use() as connection:
            return await moving.memory(connection, number, self._moment())

    async def remember(self, queue: str, memory: Memory) -> None:
        """Remember what another engine remembered."""
        number = await self._number(queue)
        async with self._transactions.begin() as connection:
            await moving.remember(connection, number, self._moment(), memory)

    async def report(self, state: str) -> None:
        """Write down how this process is doing."""
        sql = "UPDATE filao.process SET state = %s, reported_at = filao.clock() WHERE name = %s"
        async with self._main.use() as connection:
            await connection.execute(sql, (self._server.charset.fitted(state), self._listener.name))

    async def doctor(self) -> list[Finding]:
        """Examine the database and say what an operator should know."""
        async with self._main.use() as connection:
            return await examine(connection, self._server)

    async def _number(self, queue: str) -> int:
        """Look a queue's number up: an operator's command must not meet another queue, nor what was deleted."""
        async with self._main.use() as connection:
            found = await control.queues(connection)
        if queue not in found:
            raise not_found(queue, found)
        return found[queue][0]

    async def _wake(self, number: int, count: int) -> None:
        if count:
            await self._value(verbs.CALL, [number], [count])

    async def _value(self, sql: str, *parameters: Any) -> Any:
        """Run a statement that is a transaction, and return its first value."""
        return (await self._row(sql, *parameters))[0]

    async def _row(self, sql: str, *parameters: Any) -> tuple[Any, ...]:
        """Run a statement that is a transaction, and return its first row; MOMENT among its parameters is what time it
        expects.

        It waits for locks briefly and without the connection, which is the batches', again and again.
        """
        for _ in range(round(LOCKED_FOR / UNLOCKED_POLL)):
            async with self._main.use() as connection:

                async def run() -> tuple[Any, ...]:
                    given = [self._expected() if value is MOMENT else value for value in parameters]
                    row: tuple[Any, ...] | None = await (await connection.execute(sql.encode(), given)).fetchone()
                    return (None,) if row is None else row

                with suppress(LockNotAvailable):
                    return await retried(connection, run, self._time)
            await asyncio.sleep(UNLOCKED_POLL)
        raise self._server.engine_error(LockNotAvailable("a lock was not free in time"))


class _Done(NamedTuple):
    """A batch that is committed, before it is read what came of it."""

    operations: Sequence[Operation]
    unknown: set[str]
    """Queues that nobody declared, whose operations were left out."""
    calls: Sequence[verbs.Call]
    rows: list[verbs.Rows]


def _texts(rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Return rows without bytes, as which a connection with the client_encoding SQL_ASCII gives text."""
    return [tuple(value.decode() if isinstance(value, bytes) else value for value in row) for row in rows]


_IDENTITY = """
    SELECT format('postgresql %%s %%s %%s', m.value, d.oid, extract(epoch FROM pg_postmaster_start_time()))
    FROM filao.meta m, pg_database d WHERE m.name = 'database' AND d.datname = current_database()
"""
_IS_HERE = "SELECT to_regclass('filao.queue') IS NOT NULL"
_ABOUT = """
    SELECT q.id, q.rules::text, m.value
    FROM filao.meta m LEFT JOIN filao.queue q ON q.name = ?
    WHERE m.name = 'database'
"""
