"""What the dashboard sees of a database: lists without bodies, one message, groups that wait, the log of what was done.

`sqlite/overview.py` is the same.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from filao.codec import seen_headers
from filao.engine import State, StoredMessage, instant
from filao.engines.postgresql import control
from filao.engines.postgresql.clock import MOMENT
from filao.engines.postgresql.server import Link
from filao.overview import (
    BLOCKED_LOOKED_AT,
    DEED,
    DEEDS_KEPT,
    ERROR_TAIL,
    GLANCE_MAX,
    Deed,
    Glimpse,
    HeldGroup,
    deed_of,
)

_SEEN = f"""
    filao.name_of(m), length(m.content), m.headers, m.attempts, m.priority, m.grp, m.sent_at, m.at, m.reason,
    coalesce((SELECT right(f.error, {ERROR_TAIL}) FROM filao.failure f
              WHERE f.message = m.id ORDER BY f.id DESC LIMIT 1), ''),
    coalesce((SELECT name FROM filao.process WHERE id = m.token >> 32), '')
"""
_HELD = """
    SELECT held.grp, held.waiting,
      EXISTS (SELECT FROM filao.halted h WHERE h.queue = %(queue)s AND h.grp = held.grp),
      EXISTS (SELECT FROM filao.message m WHERE m.queue = %(queue)s AND m.grp = held.grp AND m.state = 'leased'),
      EXISTS (SELECT FROM filao.message m WHERE m.queue = %(queue)s AND m.grp = held.grp AND m.state = 'ready'),
      EXISTS (SELECT FROM filao.message m WHERE m.queue = %(queue)s AND m.grp = held.grp AND m.state = 'delayed')
    FROM (
      SELECT b.grp, count(*) AS waiting
      FROM (SELECT grp FROM filao.message
            WHERE queue = %(queue)s AND state = 'blocked' AND grp IS NOT NULL ORDER BY id LIMIT %(most)s) AS b
      GROUP BY 1
    ) AS held
    ORDER BY held.waiting DESC, held.grp
"""
_DEEDS = f"SELECT {DEED} FROM filao.audit WHERE id < %s ORDER BY id DESC LIMIT %s"

Row = Callable[..., Awaitable[tuple[Any, ...]]]
"""Runs a statement that is a transaction, and returns its first row."""


class PostgresqlOverview:
    """See `filao.overview.Overview`."""

    sees = tuple(State)

    def __init__(self, link: Link, number: Callable[[str], Awaitable[int]], row: Row) -> None:
        self._link = link
        self._number = number
        self.log: PostgresqlLog = PostgresqlLog(link, row)

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return messages of one state, without their bodies."""
        number = await self._number(queue)
        async with self._link.use() as connection:
            behind, last = await control.behind(connection, number, queue, state, after, in_group=group is not None)
            of_group, groups = ("", ()) if group is None else ("AND grp = %s", (group,))
            grouped = "AND grp IS NOT NULL" if state is State.BLOCKED else ""
            order = control.ORDER[state] if group is None else "id"
            found = await connection.execute(
                f"""
                SELECT {_SEEN} FROM filao.message m
                WHERE queue = %s AND state OPERATOR(pg_catalog.=) '{State(state)}' {grouped} {of_group} {behind}
                ORDER BY {order} LIMIT %s
                """.encode(),
                (number, *groups, *last, min(limit, GLANCE_MAX)),
            )
            return [_glimpse(state, fields) for fields in await found.fetchall()]

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one message."""
        number = await self._number(queue)
        async with self._link.use() as connection:
            return await control.find_message(connection, (number, queue), message_id)

    async def held_groups(self, queue: str) -> list[HeldGroup]:
        """Return groups that wait, and why."""
        number = await self._number(queue)
        async with self._link.use() as connection:
            found = await connection.execute(_HELD, {"queue": number, "most": BLOCKED_LOOKED_AT})
            return [HeldGroup(group, _why(*why), waiting) for group, waiting, *why in await found.fetchall()]


class PostgresqlLog:
    """See `filao.overview.Log`."""

    def __init__(self, link: Link, row: Row) -> None:
        self._link = link
        self._row = row

    async def begin(self, deed: Deed) -> int:
        """Write a deed down before it is done."""
        about = (deed.who, deed.what, deed.queue, deed.about, deed.wanted)
        (number,) = await self._row("SELECT filao.begin_deed(%s, %s, %s, %s, %s, %s, %s)", MOMENT, *about, DEEDS_KEPT)
        return int(number)

    async def record(self, number: int, done: int, outcome: str = "") -> None:
        """Write down how far a deed has come."""
        await self._row("SELECT filao.record_deed(%s, %s, %s, %s)", MOMENT, number, done, outcome)

    async def deeds(self, limit: int, before: int | None = None) -> Sequence[Deed]:
        """Return entries of the log, the latest first."""
        async with self._link.use() as connection:
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


def _why(is_halted: bool, has_leased: bool, has_ready: bool, has_delayed: bool) -> str:  # noqa: FBT001  # columns
    if is_halted:
        return "halted"
    return "leased" if has_leased else "ready" if has_ready else "delayed" if has_delayed else "halted"
