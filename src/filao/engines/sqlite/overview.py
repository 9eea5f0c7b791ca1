"""What the dashboard sees of a file: lists without bodies, single messages, waiting groups, the log of what was done.

`postgresql/overview.py` is the same.
"""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from filao.codec import seen_headers
from filao.engine import State, StoredMessage, instant
from filao.engines.sqlite import operators
from filao.engines.sqlite.books import BLOCKED, DELAYED, LEASED, READY, STATES, Books, QueueRow
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.moves import first, is_halted
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

_ERROR = f"""
    coalesce((SELECT CASE WHEN length(error) <= {ERROR_SEEN} THEN error
                     ELSE substr(error, 1, {ERROR_HEAD}) || char(10) || substr(error, -{ERROR_TAIL}) END
              FROM filao_failure INDEXED BY filao_failures
              WHERE message = filao_message.id ORDER BY id DESC LIMIT 1), '')
"""
_SEEN = f"""
    id, message_id, salt, length(content), headers, attempts, priority, grp, sent_at, at, reason, token, {_ERROR}
"""


class SqliteOverview:
    """See `filao.overview.Overview`."""

    sees: tuple[State, ...] = tuple(State)
    glance_max: int = GLANCE_MAX

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.log: SqliteLog = SqliteLog(jobs)

    async def now(self) -> datetime:
        """Return the file's time."""
        return await self._jobs.look_up(lambda books: instant(books.now))

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return messages of one state, without their bodies."""
        return await self._jobs.look_up(
            lambda books: glance(books, books.row(queue), state, limit=limit, after=after, group=group)
        )

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one message."""
        return await self._jobs.look_up(lambda books: operators.find(books, books.row(queue), message_id))

    async def held_groups(self, queue: str) -> list[HeldGroup]:
        """Return groups that wait, and why."""
        return await self._jobs.look_up(lambda books: held_groups(books, books.row(queue)))


class SqliteLog:
    """See `filao.overview.Log`."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    async def begin(self, deed: Deed) -> int:
        """Write a deed into the log before it is done."""
        return await self._jobs.change(lambda books: _begin(books, deed))

    async def record(self, number: int, done: int, outcome: str = "") -> None:
        """Record how far a deed has come."""
        await self._jobs.change(lambda books: _record(books, number, done, outcome))

    async def deeds(self, limit: int, before: int | None = None) -> Sequence[Deed]:
        """Return entries of the log, newest first."""
        return await self._jobs.look_up(lambda books: _deeds(books.db, limit, before))


def glance(
    books: Books, row: QueueRow, state: State, *, limit: int, after: str | None, group: str | None
) -> list[Glimpse]:
    """Return messages of one state in its order, blocked ones and those of one group in the order of sending."""
    if group is None and state is not State.BLOCKED:
        source, parameters = operators.listed(books, row, state, after)
    else:
        number = 0 if after is None else operators.place_of(books, row, after)
        index, of_group, groups = ("blocked", "", ()) if group is None else ("grouped", "AND grp = ?", (group,))
        source = f"""
            FROM filao_message INDEXED BY filao_{index}
            WHERE queue = ? AND state = {operators.NUMBERS[state]} {of_group} AND id > ?
            ORDER BY id
        """
        parameters = (row.id, *groups, number)
    found = books.db.execute(f"SELECT {_SEEN} {source} LIMIT ?", (*parameters, min(limit, GLANCE_MAX)))
    return [_glimpse(books, state, fields) for fields in found.fetchall()]


def _glimpse(books: Books, state: State, fields: Sequence[Any]) -> Glimpse:
    number, message_id, salt, size, headers, attempts, priority, group, sent_at, at, reason, token, error = fields
    return Glimpse(
        books.name_of(number, message_id, salt),
        size,
        seen_headers(headers),
        attempts,
        priority,
        group,
        instant(sent_at),
        instant(at),
        reason,
        error,
        books.consumer_of(token) if state is State.LEASED else "",
    )


def held_groups(books: Books, row: QueueRow) -> list[HeldGroup]:
    """Return the groups of the blocked messages that were sent first."""
    found = books.db.execute(
        """
        SELECT grp FROM filao_message INDEXED BY filao_blocked
        WHERE queue = ? AND state = 5 AND grp IS NOT NULL ORDER BY id LIMIT ?
        """,
        (row.id, BLOCKED_LOOKED_AT),
    )
    waiting = Counter(group for (group,) in found.fetchall())
    return [HeldGroup(group, _why(books, row, group), count) for group, count in waiting.most_common()]


def _why(books: Books, row: QueueRow, group: str) -> str:
    if is_halted(books, row, group):
        return "halted"
    heads = {state: first(books, row, group, state) for state in (LEASED, READY, DELAYED, BLOCKED)}
    return next((STATES[state] for state in (LEASED, READY, DELAYED) if heads[state] is not None), "halted")


def _begin(books: Books, deed: Deed) -> int:
    (number,) = books.db.execute(
        "INSERT INTO filao_audit (at, who, what, queue, about, wanted) VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
        (books.now, deed.who, deed.what, deed.queue, deed.about, deed.wanted),
    ).fetchone()
    books.db.execute("DELETE FROM filao_audit WHERE id <= ?", (number - DEEDS_KEPT,))
    return int(number)


def _record(books: Books, number: int, done: int, outcome: str) -> None:
    books.db.execute(
        "UPDATE filao_audit SET done = ?, outcome = ?, ended_at = ? WHERE id = ?",
        (done, outcome, books.now if outcome else None, number),
    )


def _deeds(db: sqlite3.Connection, limit: int, before: int | None) -> list[Deed]:
    found = db.execute(
        f"SELECT {DEED} FROM filao_audit WHERE id < ? ORDER BY id DESC LIMIT ?",
        (2**62 if before is None else before, limit),
    )
    return [deed_of(row) for row in found]
