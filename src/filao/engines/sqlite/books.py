"""The books of one SQLite transaction: each queue's row, read once, counted in memory, written back at the end.

What moves a message from state to state stands in `moves.py`. Books live as long as the transaction that they belong to,
whose opening and commit are the caller's.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

from filao.errors import QueueNotFound
from filao.queue import Queue, not_found, rules_from_json

READY, DELAYED, LEASED, BLOCKED, DEAD = 2, 3, 4, 5, 6
STATES = {READY: "ready", DELAYED: "delayed", LEASED: "leased", BLOCKED: "blocked", DEAD: "dead"}
NO_TOKEN = -(2**62)  # 8 bytes, as every token, so that a lease is written in place
TOKEN_MIN = 2**62  # and so is a lease's
TOKENS_PER_PROCESS = 2**32
DEDUP_KEY, MESSAGE_ID = 0, 1

R = TypeVar("R")
COUNTERS = (
    *("ready", "delayed", "leased", "blocked", "dead"),
    *("sent", "duplicates", "refused", "received", "acked", "late", "nacked", "released", "lost"),
    *("died", "dropped", "redriven", "purged", "cancelled"),
)
_SELECT_QUEUE = f"SELECT id, rules, paused, {', '.join(COUNTERS)} FROM filao_queue WHERE name = ?"
_UPDATE_QUEUE = f"UPDATE filao_queue SET {', '.join(f'{name} = ?' for name in COUNTERS)} WHERE id = ?"
# Python gives its lock up around each step of a statement, and must get it back from the busy event loop: so a statement
# takes many rows at once. The sizes are few, so that every statement is compiled once.
ROWS_AT_ONCE = (256, 64, 16, 4, 1)
_INSERTS = {
    rows: f"""
    INSERT INTO filao_message (id, queue, state, priority, at, token, attempts, failures, sent_at, expires_at,
                               grp, dedup_key, message_id, headers, kind, content)
    VALUES {", ".join(["(?, ?, ?, ?, ?, ?, 0, 0, ?, ?, ?, ?, ?, ?, ?, ?)"] * rows)}
    """
    for rows in ROWS_AT_ONCE
}


class Entry(NamedTuple):
    """What the moves need to know of a stored message; `ENTRY` selects it."""

    number: int
    state: int
    attempts: int
    group: str | None
    dedup_key: str | None
    message_id: str | None


ENTRY = "id, state, attempts, grp, dedup_key, message_id"


class QueueRow:
    """A queue's row while a transaction works on it."""

    __slots__ = ("_loaded", "count", "delayed", "fresh", "id", "paused", "rules")

    def __init__(self, row: Sequence[int], rules: Queue) -> None:
        self.id = row[0]
        self.rules = rules
        self.paused = bool(row[2])
        self._loaded = row[3:]
        self.count = dict(zip(COUNTERS, row[3:], strict=True))
        self.fresh = False
        """Whether a message has become ready, or was left by one who took others."""
        self.delayed = 0
        """How many were delayed: those who wait must learn when each is due."""

    def pending(self) -> int:
        """Return how many messages count towards `max_length`."""
        count = self.count
        return count["ready"] + count["delayed"] + count["leased"] + count["blocked"]

    def tell(self, state: int) -> None:
        """Note what those who wait should know: a message that came into this state."""
        self.fresh |= state == READY
        self.delayed += state == DELAYED

    def changes(self) -> tuple[int, ...] | None:
        """Return the counters when they have changed."""
        counted = tuple(self.count.values())
        return None if counted == self._loaded else counted


class Books:
    """The queues as one transaction sees and changes them."""

    def __init__(self, db: sqlite3.Connection, file: str, now: int) -> None:
        self.db = db
        self.file = file
        self.now = now
        self._queues: dict[str, QueueRow] = {}
        self._inserts: list[tuple[object, ...]] = []
        self._last: int | None = None
        self.occupied: set[tuple[int, str]] = set()
        """Groups that are known to have a message that the next one must wait for."""

    # --- the books themselves ----------------------------------------------------------------------------------------

    def queue(self, name: str) -> QueueRow | None:
        """Return the queue's row; None when it is not declared."""
        row = self._queues.get(name)
        if row is None:
            found = self.db.execute(_SELECT_QUEUE, (name,)).fetchone()
            if found is None:
                return None
            row = self._queues[name] = QueueRow(found, _rules(name, found[1]))
        return row

    def names(self) -> dict[int, str]:
        """Return the queues that were looked at."""
        return {row.id: name for name, row in self._queues.items()}

    def not_found(self, name: str) -> QueueNotFound:
        """Return the error for a queue that is not declared."""
        return not_found(name, (row[0] for row in self.db.execute("SELECT name FROM filao_queue")))

    def name_of(self, number: int, message_id: str | None) -> str:
        """Return a message's public id."""
        return message_id if message_id is not None else f"{self.file}-{number}"

    def next_number(self) -> int:
        """Return the next place in the order of sending."""
        if self._last is None:
            found = self.db.execute("SELECT value FROM filao_meta WHERE name = 'last'").fetchone()
            self._last = int(found[0])
        self._last += 1
        return self._last

    def insert(self, row: QueueRow, state: int, fields: tuple[object, ...]) -> None:
        """Store a new message with the next flush; `fields` are the columns of `_INSERT`."""
        self._inserts.append(fields)
        row.count["sent"] += 1
        row.count[STATES[state]] += 1
        row.tell(state)

    def flush(self) -> None:
        """Insert what was sent so far, so that statements see it."""
        for rows in slices(self._inserts):
            self.db.execute(_INSERTS[len(rows)], tuple(chain.from_iterable(rows)))
        self._inserts = []

    def write_down(self) -> None:
        """Write what was sent and counted."""
        self.flush()
        if self._last is not None:
            self.db.execute("UPDATE filao_meta SET value = ? WHERE name = 'last'", (self._last,))
        for row in self._queues.values():
            changes = row.changes()
            if changes is not None:
                self.db.execute(_UPDATE_QUEUE, (*changes, row.id))

    def rows(self) -> Iterable[QueueRow]:
        """Return the queues that were looked at."""
        return self._queues.values()

    def entries(self, where: str, parameters: Sequence[object]) -> list[Entry]:
        """Return the stored messages that a clause (`INDEXED BY … WHERE …`) finds."""
        return [Entry(*fields) for fields in self.db.execute(f"SELECT {ENTRY} FROM filao_message {where}", parameters)]

    def count_move(self, row: QueueRow, was: int, state: int) -> None:
        """Count a message that went from one state to another."""
        row.count[STATES[was]] -= 1
        row.count[STATES[state]] += 1
        row.tell(state)

    def consumer_of(self, token: int) -> str:
        """Return the host and process that a lease was given to."""
        process = (token - TOKEN_MIN) // TOKENS_PER_PROCESS
        found = self.db.execute("SELECT name FROM filao_process WHERE id = ?", (process,)).fetchone()
        return found[0] if found else ""


def slices(rows: Sequence[R]) -> Iterator[Sequence[R]]:
    """Yield the rows in slices of as many as one statement takes."""
    first = 0
    for size in ROWS_AT_ONCE:
        while len(rows) - first >= size:
            yield rows[first : first + size]
            first += size


def tokens(process: int) -> tuple[int, int]:
    """Return the first and the last token that the leases of a process can have."""
    first = TOKEN_MIN + process * TOKENS_PER_PROCESS
    return first, first + TOKENS_PER_PROCESS - 1


def oldest_ready(db: sqlite3.Connection, queue: int) -> int | None:
    """Return the lowest number among the ready messages: one look-up for each priority in use."""
    oldest: int | None = None
    found = _first_below(db, queue, 2**62)
    while found is not None:
        priority, number = found
        oldest = number if oldest is None else min(oldest, number)
        found = _first_below(db, queue, priority)
    return oldest


def _first_below(db: sqlite3.Connection, queue: int, priority: int) -> tuple[int, int] | None:
    found: tuple[int, int] | None = db.execute(
        """
        SELECT priority, id
        FROM filao_message INDEXED BY filao_ready
        WHERE queue = ? AND state = 2 AND priority < ?
        ORDER BY priority DESC, id
        LIMIT 1
        """,
        (queue, priority),
    ).fetchone()
    return found


@lru_cache(maxsize=1024)
def _rules(name: str, rules: str) -> Queue:
    return rules_from_json(name, rules)
