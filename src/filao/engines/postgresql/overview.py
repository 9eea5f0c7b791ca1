"""What the dashboard sees of a database: lists without bodies, single messages, waiting groups, the log.

`sqlite/overview.py` is the same.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from filao.codec import seen_headers
from filao.engine import State, StoredMessage, instant
from filao.engines.postgresql import control
from filao.engines.postgresql.main import MOMENT, Main
from filao.overview import (
    BLOCKED_LOOKED_AT,
    DEED,
    DEEDS_KEPT,
    ERROR_HEAD,
    ERROR_SEEN,
    ERROR_TAIL,
    GLANCE_MAX,
    Deed,
    Glimpse,
    HeldGroup,
    deed_of,
)

_SEEN = f"""
    filao.name_of(m), length(m.content), m.headers, m.attempts, m.priority, m.grp, m.sent_at, m.at, m.reason,
    coalesce((SELECT CASE WHEN length(f.error) <= {ERROR_SEEN} THEN f.error
                     ELSE concat(left(f.error, {ERROR_HEAD}), chr(10), right(f.error, {ERROR_TAIL})) END
              FROM filao.failure f
              WHERE f.message = m.id ORDER BY f.id DESC LIMIT 1), ''),
    coalesce((SELECT name FROM filao.process WHERE id = m.token >> 32), '')
"""
_HELD = """
    SELECT grp, count(*), filao.why_held(%(queue)s, grp)
    FROM (SELECT grp FROM filao.message
          WHERE queue = %(queue)s AND state = 'blocked' AND grp IS NOT NULL ORDER BY id LIMIT %(most)s) AS b
    GROUP BY 1 ORDER BY 2 DESC, 1
"""
_DEEDS = f"SELECT {DEED} FROM filao.audit WHERE id < %s ORDER BY id DESC LIMIT %s"


class PostgresqlOverview:
    """See `filao.overview.Overview`."""

    sees: tuple[State, ...] = tuple(State)
    glance_max: int = GLANCE_MAX

    def __init__(self, main: Main, number: Callable[[str], Awaitable[int]]) -> None:
        self._main = main
        self._server = main.server
        self._number = number
        self.log: PostgresqlLog = PostgresqlLog(main)

    async def now(self) -> datetime:
        """Return the queues' time."""
        return instant(await self._main.value("SELECT coalesce(%s, filao.clock())", self._main.moment()))

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return messages of one state, without their bodies."""
        async with self._server.one_call():
            number = await self._number(queue)
            async with self._main.use() as connection:
                by_id = group is not None or state is State.BLOCKED
                behind, last = await control.behind(connection, number, queue, state, after, by_id=by_id)
                given: tuple[Any, ...] = (number,)
                where = f"queue = %s AND state OPERATOR(pg_catalog.=) '{State(state)}'"
                if group is not None:
                    where = "id = ANY (ARRAY(SELECT filao.of_group(%s, %s, %s, %s, %s)))"
                    given = (number, group, str(state), last[0] if last else 0, min(limit, GLANCE_MAX))
                elif state in (State.LEASED, State.DELAYED):  # their index has no ids: the first are put in order
                    some = f"SELECT id FROM filao.message WHERE {where} AND at >= %s ORDER BY at LIMIT {GLANCE_MAX}"
                    where, given = f"id = ANY (ARRAY({some}))", (number, last[0] if last else 0)
                order = "id" if by_id else control.ORDER[state]
                found = await connection.execute(
                    f"SELECT {_SEEN} FROM filao.message m WHERE {where} {behind} ORDER BY {order} LIMIT %s".encode(),
                    (*given, *last, min(limit, GLANCE_MAX)),
                )
                return [_glimpse(state, fields) for fields in await found.fetchall()]

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one message."""
        async with self._server.one_call():
            number = await self._number(queue)
            async with self._main.use() as connection:
                return await control.find_message(connection, (number, queue), message_id)

    async def held_groups(self, queue: str) -> list[HeldGroup]:
        """Return groups that wait, and why."""
        async with self._server.one_call():
            number = await self._number(queue)
            async with self._main.use() as connection:
                found = await connection.execute(_HELD, {"queue": number, "most": BLOCKED_LOOKED_AT})
                return [HeldGroup(group, why, waiting) for group, waiting, why in await found.fetchall()]


class PostgresqlLog:
    """See `filao.overview.Log`."""

    def __init__(self, main: Main) -> None:
        self._main = main

    async def begin(self, deed: Deed) -> int:
        """Write a deed into the log before it is done."""
        about = (deed.who, deed.what, deed.queue, deed.about, deed.wanted)
        (number,) = await self._main.row(
            "SELECT filao.begin_deed(%s, %s, %s, %s, %s, %s, %s)", MOMENT, *about, DEEDS_KEPT
        )
        return int(number)

    async def record(self, number: int, done: int, outcome: str = "") -> None:
        """Record how far a deed has come."""
        await self._main.row("SELECT filao.record_deed(%s, %s, %s, %s)", MOMENT, number, done, outcome)

    async def deeds(self, limit: int, before: int | None = None) -> Sequence[Deed]:
        """Return entries of the log, newest first."""
        async with self._main.use() as connection:
            found = await connection.execute(_DEEDS.encode(), (2**62 if before is None else before, limit))
            return [deed_of(row) for row in await found.fetchall()]


def _glimpse(state: State, fields: Sequence[Any]) -> Glimpse:
    name, size, headers, attempts, priority, group, sent_at, at, reason, error, consumer = fields
    return Glimpse(
        name,
        size,
        seen_headers(headers),
        attempts,
        priority,
        group,
        instant(sent_at),
        instant(at),
        reason,
        error,
        consumer if state is State.LEASED else "",
    )
