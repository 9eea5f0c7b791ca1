"""The books of one SQLite transaction: each queue's row, read once, counted in memory, written back at the end.

Here stands how a message moves from state to state, what that does to the counters, to its group and to those who
wait. The verbs of the queue (`verbs.py`) and of its operators (`control.py`) are written with these moves. Books live
as long as the transaction that they belong to, whose opening and commit are the caller's.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

from filao.engine import HISTORY_MAX
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

    # --- moves -------------------------------------------------------------------------------------------------------

    def entries(self, where: str, parameters: Sequence[object]) -> list[Entry]:
        """Return the stored messages that a clause (`INDEXED BY … WHERE …`) finds."""
        return [Entry(*fields) for fields in self.db.execute(f"SELECT {ENTRY} FROM filao_message {where}", parameters)]

    def _current(self, entry: Entry) -> Entry:
        """Return an entry as it is now: another move in its group may have let it through or held it back."""
        if entry.group is None:
            return entry
        return Entry(*self.db.execute(f"SELECT {ENTRY} FROM filao_message WHERE id = ?", (entry.number,)).fetchone())

    def count_move(self, row: QueueRow, was: int, state: int) -> None:
        """Count a message that went from one state to another."""
        row.count[STATES[was]] -= 1
        row.count[STATES[state]] += 1
        row.tell(state)

    def give_back(self, row: QueueRow, entry: Entry, *, at: int | None = None, token: int = NO_TOKEN) -> None:
        """Let a message return to its old place, ready now or delayed until `at`, behind those of its group."""
        entry = self._current(entry)
        state = READY if at is None else DELAYED
        if entry.group is not None and state == READY:
            state = BLOCKED  # `arrange` lets it through when it is its turn
        self.db.execute(
            "UPDATE filao_message SET state = ?, at = ?, token = ? WHERE id = ?",
            (state, self.now if at is None else at, token, entry.number),
        )
        self.count_move(row, entry.state, state)
        if entry.group is not None:
            self.arrange(row, entry.group)

    def die(self, row: QueueRow, entry: Entry, reason: str) -> None:
        """Make a message a dead letter."""
        entry = self._current(entry)
        self.db.execute(
            "UPDATE filao_message SET state = 6, at = ?, token = ?, reason = ? WHERE id = ?",
            (self.now, NO_TOKEN, reason, entry.number),
        )
        self.count_move(row, entry.state, DEAD)
        row.count["died"] += 1
        if entry.dedup_key is not None:  # its message_id stays known as long as the dead letter lies there
            self.start_window(row, keys(entry.dedup_key, None), self.name_of(entry.number, entry.message_id))
        if entry.group is not None:
            if row.rules.group_dead == "halt":
                self.db.execute("INSERT OR IGNORE INTO filao_halted (queue, grp) VALUES (?, ?)", (row.id, entry.group))
            self.arrange(row, entry.group)

    def delete(self, row: QueueRow, entry: Entry, counter: str) -> None:
        """Remove a message for good, and count it under `counter`."""
        entry = self._current(entry)
        self.db.execute("DELETE FROM filao_message WHERE id = ?", (entry.number,))
        row.count[STATES[entry.state]] -= 1
        row.count[counter] += 1
        self.forget(row, entry, had_failed=True)

    def forget(self, row: QueueRow, entry: Entry, *, had_failed: bool) -> None:
        """Clear up behind a message that is gone."""
        if had_failed:
            self.db.execute("DELETE FROM filao_failure WHERE message = ?", (entry.number,))
        if entry.dedup_key is not None or entry.message_id is not None:
            name = self.name_of(entry.number, entry.message_id)
            self.start_window(row, keys(entry.dedup_key, entry.message_id), name)
        if entry.group is not None:
            self.arrange(row, entry.group)

    def lose(self, row: QueueRow, entry: Entry, token: int, outcome: str) -> None:
        """End a lease whose consumer said nothing: the attempt is used; the next consumer, or death, takes the message.

        The token stays until somebody receives the message, so that a late ack of work that was done still counts.
        """
        row.count["lost"] += 1
        self.record(entry, outcome, "", self.consumer_of(token))
        if entry.attempts >= row.rules.max_attempts:
            self.die(row, entry, "max_attempts")
        else:
            self.give_back(row, entry, token=token)

    def consumer_of(self, token: int) -> str:
        """Return the host and process that a lease was given to."""
        process = (token - TOKEN_MIN) // TOKENS_PER_PROCESS
        found = self.db.execute("SELECT name FROM filao_process WHERE id = ?", (process,)).fetchone()
        return found[0] if found else ""

    def record(self, entry: Entry, outcome: str, error: str, consumer: str) -> None:
        """Put a failed attempt into the message's history, which keeps the last 20."""
        self.db.execute(
            "INSERT INTO filao_failure (message, attempt, at, outcome, error, consumer) VALUES (?, ?, ?, ?, ?, ?)",
            (entry.number, entry.attempts, self.now, outcome, error, consumer),
        )
        self.db.execute("UPDATE filao_message SET failures = failures + 1 WHERE id = ?", (entry.number,))
        self.db.execute(
            """
            DELETE FROM filao_failure
            WHERE id IN (SELECT id FROM filao_failure WHERE message = ? ORDER BY id DESC LIMIT -1 OFFSET ?)
            """,
            (entry.number, HISTORY_MAX),
        )

    def has_crashed(self, number: int) -> bool:
        """Return whether a message's last failure was the death of its consumer."""
        found = self.db.execute(
            "SELECT outcome FROM filao_failure WHERE message = ? ORDER BY id DESC LIMIT 1", (number,)
        ).fetchone()
        return found is not None and found[0] == "crashed"

    # --- groups ------------------------------------------------------------------------------------------------------

    def arrange(self, row: QueueRow, group: str) -> None:
        """Let the first message of a group through and hold back the others; nobody moves while one is leased."""
        self.flush()
        self.occupied.discard((row.id, group))
        leased, ready, delayed, blocked = (self.first(row, group, s) for s in (LEASED, READY, DELAYED, BLOCKED))
        if leased is not None:
            return
        if row.rules.group_failure == "skip":
            delayed = None  # a failed or delayed message is overtaken, not waited for
        head = min((n for n in (ready, delayed, blocked) if n is not None), default=None)
        if self.is_halted(row, group):
            head = None
        if ready is not None and ready != head:
            self._set_state(row, ready, READY, BLOCKED)
        if delayed is not None and delayed != head and head is not None:
            self._set_state(row, delayed, DELAYED, BLOCKED)
        if head is not None and head == blocked:
            due = self._at(head) <= self.now
            self._set_state(row, head, BLOCKED, READY if due else DELAYED)
            if not due and row.rules.group_failure == "skip":
                self.arrange(row, group)

    def is_halted(self, row: QueueRow, group: str) -> bool:
        """Return whether a dead letter stopped this group."""
        if row.rules.group_dead != "halt":
            return False
        halted = self.db.execute("SELECT 1 FROM filao_halted WHERE queue = ? AND grp = ?", (row.id, group))
        return halted.fetchone() is not None

    def first(self, row: QueueRow, group: str, state: int) -> int | None:
        found = self.db.execute(
            """
            SELECT min(id)
            FROM filao_message INDEXED BY filao_grouped
            WHERE queue = ? AND grp = ? AND state = ?
            """,
            (row.id, group, state),
        ).fetchone()
        number: int | None = found[0]
        return number

    def _at(self, number: int) -> int:
        at: int = self.db.execute("SELECT at FROM filao_message WHERE id = ?", (number,)).fetchone()[0]
        return at

    def _set_state(self, row: QueueRow, number: int, was: int, state: int) -> None:
        self.db.execute("UPDATE filao_message SET state = ? WHERE id = ?", (state, number))
        self.count_move(row, was, state)

    # --- deduplication -----------------------------------------------------------------------------------------------

    def remembered(self, row: QueueRow, wanted: Iterable[tuple[int, str]]) -> str | None:
        """Return the id of the message that came first under one of these keys; None when all are new."""
        for kind, key in wanted:
            found = self.db.execute(
                """
                SELECT message
                FROM filao_dedup
                WHERE queue = ? AND kind = ? AND key = ? AND (until IS NULL OR until > ?)
                """,
                (row.id, kind, key, self.now),
            ).fetchone()
            if found is not None:
                name: str = found[0]
                return name
        return None

    def remember(self, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
        """Know these keys as long as their message is pending."""
        for kind, key in wanted:
            self.db.execute(
                "INSERT OR REPLACE INTO filao_dedup (queue, kind, key, message) VALUES (?, ?, ?, ?)",
                (row.id, kind, key, name),
            )

    def remember_again(self, row: QueueRow, dedup_key: str, name: str) -> None:
        """Know the key of a message that came back from the dead, unless another message has taken it."""
        self.db.execute(
            """
            INSERT INTO filao_dedup (queue, kind, key, message) VALUES (?, ?, ?, ?)
            ON CONFLICT DO UPDATE SET message = excluded.message, until = NULL
            WHERE message = excluded.message OR until <= ?
            """,
            (row.id, DEDUP_KEY, dedup_key, name, self.now),
        )

    def unlearn(self, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
        """Forget the keys of a message at once."""
        for kind, key in wanted:
            self.db.execute(
                "DELETE FROM filao_dedup WHERE queue = ? AND kind = ? AND key = ? AND message = ?",
                (row.id, kind, key, name),
            )

    def start_window(self, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
        """Let the keys of a message that has ended be forgotten after the queue's window."""
        until = self.now + round(row.rules.dedup_window * 1000)
        for kind, key in wanted:
            self.db.execute(
                "UPDATE filao_dedup SET until = ? WHERE queue = ? AND kind = ? AND key = ? AND message = ?",
                (until, row.id, kind, key, name),
            )


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


def keys(dedup_key: str | None, message_id: str | None) -> list[tuple[int, str]]:
    """Return the keys under which a message is remembered."""
    pairs = ((DEDUP_KEY, dedup_key), (MESSAGE_ID, message_id))
    return [(kind, key) for kind, key in pairs if key is not None]


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
