"""What operators see of a PostgreSQL database and do there.

The queries here change nothing. What changes something is a function of the database, called for slices of a bounded
size.
"""

import asyncio
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from filao.engine import EVENTS_MAX, Draft, Event, Finding, QueueStats, Receiver, State, StoredMessage, instant
from filao.engines import rows
from filao.engines.postgresql import verbs
from filao.engines.postgresql.doctor import examine
from filao.engines.postgresql.listener import Listener
from filao.engines.postgresql.main import MOMENT, UNLOCKED_POLL, Main
from filao.engines.postgresql.server import LOCKED_FOR, Connection
from filao.errors import ConfigurationError, EngineError
from filao.queue import Queue, check_halts, not_found, rules_from_json
from filao.slices import Tally

SLICE = 2_000  # messages that operators change in one transaction

_STATS = """
    SELECT q.name, q.paused, counters.counted, ages.*
    FROM filao.queue q, LATERAL (
      SELECT coalesce(jsonb_object_agg(c.name, c.value), '{}') AS counted
      FROM (SELECT name, sum(value)::bigint AS value FROM filao.counter WHERE queue = q.id GROUP BY name) AS c
    ) AS counters, LATERAL filao.ages(q.id, %s, counters.counted) AS ages
    WHERE q.name = coalesce(%s, q.name)
    ORDER BY q.name COLLATE "C"
"""
_PROCESSES = "SELECT id, name, started_at, state, reported_at, filao.clock() FROM filao.process WHERE id = ANY (%s)"
_COUNTED = ("ready", "delayed", "blocked", "leased", "dead")
ORDER = {"ready": "-priority, id", "delayed": "at, id", "leased": "at, id", "blocked": "grp, id", "dead": "id"}
"""How the messages of each state are listed."""
_EVENTS = """
    SELECT queue, at, what, attempt, who, detail
    FROM (
      SELECT * FROM filao.event
      WHERE message = %s AND until OPERATOR(pg_catalog.>) coalesce(%s, filao.clock()) ORDER BY id DESC LIMIT %s
    ) AS last
    ORDER BY id
"""
HISTORY = """
    (SELECT coalesce(json_agg(json_build_array(f.attempt, f.at, f.outcome, f.error, f.consumer) ORDER BY f.id), '[]')
     FROM filao.failure f WHERE f.message = m.id)
"""
"""The failed attempts of message `m`, the oldest first, as `rows.failures` reads them."""
_SEEN = f"""
    filao.name_of(m), coalesce((SELECT name FROM filao.process WHERE id = m.token >> 32), ''), {HISTORY}, {rows.COLUMNS}
"""


class PostgresqlOperators:
    """See `filao.engine.Operators`; it is also their `Pausing` and `Tracing`."""

    def __init__(
        self,
        main: Main,
        listener: Listener,
        *,
        forget: Callable[[], None],
    ) -> None:
        self._main = main
        self._server = main.server
        self._listener = listener
        self._forget = forget
        """Forgets the numbers of queues."""

    @property
    def pausing(self) -> Self:
        """Return itself."""
        return self

    @property
    def tracing(self) -> Self:
        """Return itself."""
        return self

    async def trace(self, message_id: str) -> list[Event]:
        """Return what happened to the messages with this id."""
        async with self._main.use() as connection:
            found = await connection.execute(_EVENTS, (message_id, self._main.moment(), EVENTS_MAX))
            return [Event(queue, instant(at), *event) for queue, at, *event in await found.fetchall()]

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        async with self._main.use() as connection:
            return [rules for _, rules in (await queues(connection)).values()]

    async def delete(self, queue: str) -> int:
        """Delete a queue that holds no message."""
        async with self._server.one_call():
            number = await self.number(queue)
            until = time.monotonic() + LOCKED_FOR
            while time.monotonic() < until:
                (held,) = await self._main.row("SELECT filao.delete(%s)", number)
                if held is not None:
                    self._forget()
                    return int(held)
                await asyncio.sleep(UNLOCKED_POLL)
        raise EngineError(
            f"{self._server.name}: queue {queue!r} was not deleted: transactions that have sent to it have been open "
            f"for {LOCKED_FOR:g} s. Nothing was done; delete it when its senders have stopped."
        )

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Read the counters of every queue, or of one."""
        async with self._server.one_call():
            await self._main.row("SELECT filao.expire_all(%s)", MOMENT)
            async with self._main.use() as connection:
                return await stats(connection, self._main.moment(), queue)

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages of one state in its order."""
        async with self._server.one_call():
            number = await self.number(queue)
            await self._main.row("SELECT filao.expire_all(%s)", MOMENT)
            async with self._main.use() as connection:
                return await peek(connection, (number, queue), state, limit=limit, after=after)

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Give dead letters back, each to its old place."""
        number = await self.number(queue)
        marked = await self._marked(number, [State.DEAD], ids, limit)
        new = (None, None, None) if edited is None else (edited.kind, edited.content, edited.headers)
        sql = "SELECT filao.redrive(%s, %s, %s::bigint[], %s::smallint, %s::bytea, %s)"
        return await self._in_slices(number, marked, lambda some: (sql, number, MOMENT, some, *new))

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete messages in these states."""
        number, purges, among = await self.number(queue), ids is None, list(map(str, states))
        marked = await self._marked(number, states, ids, None)
        sql = "SELECT filao.remove(%s, %s, %s::text[]::filao.state[], %s, %s::bigint[])"
        return await self._in_slices(number, marked, lambda some: (sql, number, MOMENT, among, purges, some))

    async def _marked(
        self, number: int, states: Sequence[State], ids: Sequence[str] | None, limit: int | None
    ) -> "array[int]":
        """Return the numbers of the messages that a command is about: fixed when it begins, or it might never end."""
        # No parameter is of a type of ours: what is prepared for one fails for ever once that type was made anew.
        sql = "SELECT filao.mark(%s, %s::text[]::filao.state[], %s::text[], %s)"
        (found,) = await self._main.row(sql, number, list(map(str, states)), None if ids is None else list(ids), limit)
        marked = array("q", found)
        if sys.byteorder == "little":
            marked.byteswap()
        return marked

    async def _in_slices(
        self, number: int, marked: "array[int]", change: Callable[[list[int]], tuple[Any, ...]]
    ) -> int:
        """Change many messages in transactions of a bounded size.

        Those that wait are called after each slice: it is there for them, whatever becomes of the rest.
        """
        with Tally() as tally:
            for first in range(0, len(marked), SLICE):
                (done,) = await self._main.row(*change(marked[first : first + SLICE].tolist()))
                tally.done += done
                await self._wake(number, done)
        return tally.done

    async def pause(self, queue: str, *, paused: bool) -> None:
        """Stop or resume deliveries."""
        async with self._server.one_call():
            number = await self.number(queue)
            sql = "UPDATE filao.queue SET paused = %s WHERE id = %s RETURNING id"
            (done,) = await self._main.row(sql, paused, number)
            if done is None and await self.number(queue) == number:  # which raises where it was deleted meanwhile
                raise self._server.skipped("filao.queue")
            await self._wake(number, 0 if paused else SLICE)

    async def pause_group(self, queue: str, group: str, *, paused: bool) -> None:
        """Halt a group, or let it go on."""
        async with self._server.one_call():
            number = await self.number(queue)
            if not paused:
                await self._main.row("SELECT filao.resume_group(%s, %s, %s)", number, MOMENT, group)
                await self._wake(number, 1)
                return
            async with self._main.use() as connection:
                check_halts(await find(connection, queue), group)
            await self._main.row("SELECT filao.halt_group(%s, %s, %s)", number, MOMENT, group)

    async def report(self, state: str) -> None:
        """Record how this process is doing, once it receives."""
        process = self._listener.process
        if process:
            sql = "UPDATE filao.process SET state = %s, reported_at = filao.clock() WHERE id = %s"
            async with self._main.use() as connection:
                await connection.execute(sql, (self._server.charset.fitted(state), process))

    async def doctor(self) -> list[Finding]:
        """Examine the database and say what an operator should know."""
        async with self._main.use() as connection:
            return await examine(connection, self._server, await stats(connection, self._main.moment()))

    async def number(self, queue: str) -> int:
        """Look up a queue's number; a known one may be that of a deleted queue."""
        async with self._main.use() as connection:
            found = await connection.execute("SELECT id FROM filao.queue WHERE name = %s", (queue,))
            row = await found.fetchone()
            if row is None:
                raise not_found(queue, await names(connection))
        return int(row[0])

    async def _wake(self, number: int, count: int) -> None:
        if count:
            await self._main.row(verbs.CALL, [number], [count])


async def queues(connection: Connection, wanted: Iterable[str] | None = None) -> dict[str, tuple[int, Queue]]:
    """Return every declared queue, or those of `wanted`, by name, with its number and its rules."""
    only, given = ("", ()) if wanted is None else ("WHERE name = ANY (%s)", (list(wanted),))
    sql = f'SELECT id, name, rules::text FROM filao.queue {only} ORDER BY name COLLATE "C"'
    found = await connection.execute(sql.encode(), given)
    return {name: (number, rules_from_json(name, rules)) for number, name, rules in await found.fetchall()}


async def names(connection: Connection) -> list[str]:
    """Return the names of all queues, for the error of one that is not declared."""
    return [name for (name,) in await (await connection.execute(verbs.NAMES.encode())).fetchall()]


async def find(connection: Connection, name: str) -> Queue:
    """Return a queue with its rules. Raises `QueueNotFound`."""
    found = await connection.execute("SELECT rules::text FROM filao.queue WHERE name = %s", (name,))
    row = await found.fetchone()
    if row is None:
        raise not_found(name, await names(connection))
    return rules_from_json(name, row[0])


async def stats(connection: Connection, moment: int | None, queue: str | None = None) -> list[QueueStats]:
    """Return the counters of every queue, by name, or of one. Raises `QueueNotFound`."""
    rows = await (await connection.execute(_STATS, (moment, queue))).fetchall()
    if queue is not None and not rows:
        raise not_found(queue, await names(connection))
    known = {process for *_, holding, waiting in rows for process in (*(holding or ()), *(waiting or ()))}
    processes: dict[int, tuple[Any, ...]] = {}
    if known:
        found = await (await connection.execute(_PROCESSES, (list(known),))).fetchall()
        processes = {number: tuple(told) for number, *told in found}
    return [_counted(row, processes) for row in rows]


def _counted(row: Sequence[Any], processes: Mapping[int, tuple[Any, ...]]) -> QueueStats:
    name, paused, counted, now, ready, delayed, leased, blocked, dead, holding, waiting = row
    held = Counter[int](holding or ())
    there = [process for process in {*held, *(waiting or ())} if process in processes]
    return QueueStats(
        name=name,
        paused=paused,
        oldest_ready_age=rows.age(now, ready),
        oldest_delayed_age=rows.age(now, delayed),
        oldest_leased_age=rows.age(now, leased),
        oldest_blocked_age=rows.age(now, blocked),
        oldest_dead_age=rows.age(now, dead),
        dead_by_reason=_by_reason("dead", counted),
        died_by_reason=_by_reason("died", counted),
        receivers=tuple(sorted((_receiver(held[one], processes[one]) for one in there), key=lambda one: one.name)),
        **dict.fromkeys(_COUNTED, 0) | {field: count for field, count in counted.items() if ":" not in field},
    )


def _receiver(held: int, process: Sequence[Any]) -> Receiver:
    name, started_at, state, reported_at, now = process
    return Receiver(name, held, instant(started_at), state, rows.age(now, reported_at) if state else None)


def _by_reason(counter: str, counted: Mapping[str, int]) -> dict[str, int]:
    counts = sorted((name.partition(":"), count) for name, count in counted.items() if count)
    return {reason: count for (name, colon, reason), count in counts if name == counter and colon}


async def peek(
    connection: Connection, queue: tuple[int, str], state: State, *, limit: int, after: str | None
) -> list[StoredMessage]:
    """Return messages of one state in its order, from behind the id `after`; `queue` is a number and a name."""
    number, name = queue
    after_it, last = await behind(connection, number, name, state, after)
    grouped = "AND grp IS NOT NULL" if state == State.BLOCKED else ""
    found = await connection.execute(
        f"""
        SELECT {_SEEN} FROM filao.message m
        WHERE queue = %s AND state OPERATOR(pg_catalog.=) '{State(state)}' {grouped} {after_it}
        ORDER BY {ORDER[state]} LIMIT %s
        """.encode(),
        (number, *last, limit),
    )
    return [_stored(name, state, fields) for fields in await found.fetchall()]


async def find_message(connection: Connection, queue: tuple[int, str], message_id: str) -> StoredMessage | None:
    """Return the message with this id, whatever its state; None when the queue has none."""
    number, name = queue
    found = await connection.execute(
        f"""
        SELECT m.state::text, {_SEEN} FROM filao.message m
        WHERE id = (SELECT filao.number_of(%s, %s)) AND queue = %s
        """.encode(),
        (number, message_id, number),
    )
    row = await found.fetchone()
    return None if row is None else _stored(name, State(row[0]), row[1:])


async def behind(
    connection: Connection, number: int, queue: str, state: State, after: str | None, *, by_id: bool = False
) -> tuple[str, tuple[Any, ...]]:
    """Return the condition that leaves out messages up to the one with the id `after`, and its parameters.

    With `by_id` they are in the order of sending.
    """
    if after is None:
        return "", ()
    order = "id" if by_id else ORDER[state]
    found = await connection.execute(
        f"""
        SELECT named.id, {order if order != "id" else "named.id"}
        FROM (SELECT filao.number_of(%s, %s) AS id) AS named LEFT JOIN filao.message USING (id)
        """.encode(),
        (number, after),
    )
    row = await found.fetchone()
    # An order by number alone, as that of dead letters, needs no more, even if the message is gone meanwhile.
    if row is None or row[0] is None or (order != "id" and row[1] is None):
        raise ConfigurationError(
            f"queue {queue!r}: there is no message {after!r} to go on behind; it may be gone by now. Start again "
            f"without after="
        )
    marks = ", ".join(["%s"] * len(row[1:]))
    return f"AND ({order}) > ({marks})", row[1:]


def _stored(queue: str, state: State, fields: Sequence[Any]) -> StoredMessage:
    name, consumer, history, *columns = fields
    return rows.stored(queue, name, state, columns, history=rows.failures(history), consumer=consumer)
