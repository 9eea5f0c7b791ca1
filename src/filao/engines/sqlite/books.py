"""The books of one SQLite transaction: each queue's row, read once, counted in memory, written back at the end.

`moves.py` moves messages from state to state. Books live as long as their transaction, which the caller opens and
commits.
"""

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from filao.errors import ConfigurationError, EngineError, QueueNotFound
from filao.queue import Queue, not_found, rules_from_json

READY, DELAYED, LEASED, BLOCKED, DEAD = 2, 3, 4, 5, 6
STATES = {READY: "ready", DELAYED: "delayed", LEASED: "leased", BLOCKED: "blocked", DEAD: "dead"}
NO_TOKEN = -(2**62)  # takes 8 bytes, as every token does, so that a lease is written in place
TOKEN_MIN = 2**62
TOKENS_PER_PROCESS = 2**32
NUMBERS_AHEAD = 100  # message numbers that are stored as given before they are: one write for so many lone sends
QUEUES_KEPT_MAX = 64  # queues whose rows a process keeps between transactions: some 100 KiB
DEDUP_KEY, MESSAGE_ID = 0, 1
_GIVEN_ID = re.compile(r"([0-9a-f]{16})-([0-9]{1,18})")

R = TypeVar("R")
COUNTERS = (
    *("ready", "delayed", "leased", "blocked", "dead"),
    *("sent", "duplicates", "refused", "received", "acked", "late", "nacked", "released", "lost"),
    *("died", "dropped", "redriven", "purged", "cancelled"),
)
_SELECT_QUEUE = f"SELECT id, rules, paused, {', '.join(COUNTERS)} FROM filao_queue WHERE name = ?"
_UPDATE_QUEUE = f"UPDATE filao_queue SET {', '.join(f'{name} = ?' for name in COUNTERS)} WHERE id = ?"
_COUNT_REASON = """
    INSERT INTO filao_reason (queue, reason, dead, died) VALUES (?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET dead = dead + excluded.dead, died = died + excluded.died
"""
_INSERT_EVENT = """
    INSERT INTO filao_event (queue, message, at, until, what, attempt, by, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
# Python releases its lock around each step of a statement, and must get it back from the busy event loop. So a
# statement takes many rows at once. There are few sizes, so that every statement is compiled once.
ROWS_AT_ONCE = (256, 64, 16, 4, 1)
_INSERTS = {
    rows: f"""
    INSERT INTO filao_message (id, queue, state, priority, at, token, attempts, failures, sent_at, expires_at,
                               grp, dedup_key, message_id, headers, kind, content, salt)
    VALUES {", ".join(["(?, ?, ?, ?, ?, ?, 0, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * rows)}
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
    name: str
    """Its public id."""


ENTRY = "id, state, attempts, grp, dedup_key, message_id, salt"


class QueueRow:
    """A queue's row while a transaction works on it."""

    __slots__ = (
        *("_loaded", "count", "delayed", "expires_from", "fresh", "id", "nobody_to_call", "paused", "promised_until"),
        *("reasons", "rules"),
    )

    def __init__(self, row: Sequence[int], rules: Queue) -> None:
        self.id: int = row[0]
        self.rules: Queue[Any] = rules
        self.paused: bool = bool(row[2])
        self._loaded = row[3:]
        self.count: dict[str, int] = dict(zip(COUNTERS, row[3:], strict=True))
        self.reasons: list[tuple[str, int, int]] = []
        """Changes to the counts of dead letters: the reason, how many more there are now, and how many have died."""
        self.fresh: bool = False
        """Whether a message has become ready, or was left by a receiver that took others."""
        self.delayed: int = 0
        """How many were delayed: those that wait must learn when each is due."""
        self.nobody_to_call: bool = False
        """Whether it is known that everybody on its waiting list has been called."""
        self.promised_until: int = 0
        """If there is nobody to call: the end of the last promise to those that were called."""
        self.expires_from: float = 0
        """Before this time, in milliseconds, none of its waiting messages can expire, as far as is known."""

    def pending(self) -> int:
        """Return how many messages count towards `max_length`."""
        count = self.count
        return count["ready"] + count["delayed"] + count["leased"] + count["blocked"]

    def tell(self, state: int) -> None:
        """Note for those that wait that a message came into this state."""
        self.fresh |= state == READY
        self.delayed += state == DELAYED

    def changes(self) -> tuple[int, ...] | None:
        """Return the counters to be written; None when they have not changed."""
        counted = tuple(self.count.values())
        if counted == self._loaded:
            return None
        self._loaded = counted
        return counted

    def begin(self) -> None:
        """Begin another transaction with what the last one knew."""
        self.fresh = False
        self.delayed = 0


class Known:
    """What books know of their file; it is valid until somebody else commits."""

    __slots__ = ("last", "noted", "queues")

    def __init__(self) -> None:
        self.queues: dict[str, QueueRow] = {}
        self.last: int | None = None
        """The last number given."""
        self.noted: int = 0
        """The last number that the file says is given."""

    def begin(self) -> "Known":
        """Return what another transaction may begin with."""
        if len(self.queues) > QUEUES_KEPT_MAX:
            self.queues.clear()
        return self


class Books:
    """The queues as one transaction sees and changes them."""

    def __init__(
        self, db: sqlite3.Connection, file: str, now: int, *, keeps: bool = False, known: Known | None = None
    ) -> None:
        """Begin with what is `known`; `keeps`: the next transaction may go on with what these books come to know."""
        self.db = db
        self.file = file
        self.now = now
        self.known: Known = Known() if known is None else known.begin()
        self._rows: dict[str, QueueRow] = {}
        """The rows of the queues that this transaction has looked at: only these can have changed."""
        self._inserts: list[tuple[object, ...]] = []
        self.events: list[tuple[object, ...]] = []
        """What happened to messages whose history is kept, to be written at the end."""
        self.keeps: bool = keeps
        self._salt: int | None = None
        self._prefix = ""
        self.occupied: set[tuple[int, str]] = set()
        """Groups that are known to have a message for which the next one must wait."""

    # --- the books themselves ----------------------------------------------------------------------------------------

    def queue(self, name: str) -> QueueRow | None:
        """Return the queue's row; None when it is not declared."""
        row = self._rows.get(name)
        if row is None:
            row = self.known.queues.get(name)
            if row is None:
                found = self.db.execute(_SELECT_QUEUE, (name,)).fetchone()
                if found is None:
                    return None
                row = self.known.queues[name] = QueueRow(found, read_rules(name, found[1]))
            row.begin()
            self._rows[name] = row
        return row

    def row(self, name: str) -> QueueRow:
        """Return the queue's row. Raises `QueueNotFound`."""
        row = self.queue(name)
        if row is None:
            raise self.not_found(name)
        return row

    def legible(self, name: str) -> QueueRow | None:
        """Return the queue's row; None if its rules are unreadable, which must not stop work for all queues."""
        try:
            return self.queue(name)
        except EngineError:
            return None

    def names(self) -> dict[int, str]:
        """Return the names of the queues that this transaction has looked at, by number."""
        return {row.id: name for name, row in self._rows.items()}

    def not_found(self, name: str) -> QueueNotFound:
        """Return the error for a queue that is not declared."""
        return not_found(name, (row[0] for row in self.db.execute("SELECT name FROM filao_queue")))

    def salted(self, number: int) -> tuple[str, int]:
        """Return the id that this transaction gives to its message with this number, and its salt.

        The salt is random and new for each transaction: nobody can guess it, and no copy of the file repeats it.
        """
        if self._salt is None:
            salt = os.urandom(8)
            self._salt = int.from_bytes(salt, "big") - 2**63
            self._prefix = f"{salt.hex()}-"
        return self._prefix + str(number), self._salt

    def name_of(self, number: int, message_id: str | None, salt: int | None) -> str:
        """Return a message's public id; ids of old versions have the file's name in place of a salt."""
        if message_id is not None:
            return message_id
        return f"{self.file if salt is None else _hexadecimal(salt)}-{number}"

    def number_of(self, row: QueueRow, name: str) -> int | None:
        """Return the number of the message with this public id; None when no message of the queue can have it."""
        found = self.db.execute(
            "SELECT id FROM filao_message INDEXED BY filao_named WHERE queue = ? AND message_id = ?", (row.id, name)
        ).fetchone()
        if found is not None:
            return int(found[0])
        given = _GIVEN_ID.fullmatch(name)
        if given is None:
            return None
        number = int(given[2])
        stored = self.db.execute("SELECT message_id, salt FROM filao_message WHERE id = ?", (number,)).fetchone()
        return number if stored is None or self.name_of(number, *stored) == name else None

    def next_number(self) -> int:
        """Return the next place in the order of sending."""
        known = self.known
        if known.last is None:
            found = self.db.execute("SELECT value FROM filao_meta WHERE name = 'last'").fetchone()
            known.last = known.noted = int(found[0])
        known.last += 1
        return known.last

    def insert(self, row: QueueRow, state: int, fields: tuple[object, ...]) -> None:
        """Store a new message with the next flush; `fields` are the columns of `_INSERT`."""
        self._inserts.append(fields)
        row.count["sent"] += 1
        row.count[STATES[state]] += 1
        row.tell(state)

    def flush(self) -> None:
        """Insert what was sent so far, so that statements see it."""
        if not self._inserts:
            return
        if len(self._inserts) == 1:  # a lone send: to slice it takes longer than to bind it
            self.db.execute(_INSERTS[1], self._inserts[0])
        else:
            for rows in slices(self._inserts):
                self.db.execute(_INSERTS[len(rows)], tuple(chain.from_iterable(rows)))
        self._inserts = []

    def write_down(self) -> None:
        """Write what was sent, noted and counted."""
        self.flush()
        if self.events:
            self.db.executemany(_INSERT_EVENT, self.events)
            self.events = []
        known = self.known
        if known.last is not None and known.last > known.noted:
            known.noted = known.last + NUMBERS_AHEAD * self.keeps
            self.db.execute("UPDATE filao_meta SET value = ? WHERE name = 'last'", (known.noted,))
        for row in self._rows.values():
            changes = row.changes()
            if changes is not None:
                self.db.execute(_UPDATE_QUEUE, (*changes, row.id))
            if row.reasons:
                self.db.executemany(_COUNT_REASON, [(row.id, *counted) for counted in row.reasons])
                row.reasons.clear()

    def note(self, row: QueueRow, name: str, what: str, attempt: int, *, by: str, detail: str = "") -> None:
        """Put an event into the history of a message, if its queue keeps one; see `filao.engine.Event`."""
        if row.rules.history:
            until = self.now + round(row.rules.history_window * 1000)
            self.events.append((row.rules.name, name, self.now, until, what, attempt, by, detail))

    def rows(self) -> Iterable[QueueRow]:
        """Return the rows of the queues that this transaction has looked at."""
        return self._rows.values()

    def entries(self, where: str, parameters: Sequence[object]) -> list[Entry]:
        """Return the stored messages that a clause (`INDEXED BY … WHERE …`) finds."""
        return [
            self.entry(fields) for fields in self.db.execute(f"SELECT {ENTRY} FROM filao_message {where}", parameters)
        ]

    def entry(self, fields: Sequence[Any]) -> Entry:
        """Return a stored message from the columns `ENTRY`."""
        number, state, attempts, group, dedup_key, message_id, salt = fields
        name = self.name_of(number, message_id, salt)
        return Entry(number, state, attempts, group, dedup_key, message_id, name)

    def count_move(self, row: QueueRow, was: int, state: int) -> None:
        """Count a message that went from one state to another."""
        if was in (LEASED, DEAD):
            row.expires_from = 0  # the message waits again, and may expire
        row.count[STATES[was]] -= 1
        row.count[STATES[state]] += 1
        row.tell(state)

    def count_alive(self, row: QueueRow, number: int) -> None:
        """Count a dead letter that leaves the dead, before its reason is forgotten."""
        (reason,) = self.db.execute("SELECT reason FROM filao_message WHERE id = ?", (number,)).fetchone()
        row.reasons.append((reason or "", -1, 0))

    def consumer_of(self, token: int) -> str:
        """Return the host and process that received the lease with this token."""
        process = (token - TOKEN_MIN) // TOKENS_PER_PROCESS
        found = self.db.execute("SELECT name FROM filao_process WHERE id = ?", (process,)).fetchone()
        return found[0] if found else ""


def check_stands(books: Books) -> None:
    """Raise `ConfigurationError` when one of the user's statements has ended the transaction of these books."""
    if not books.db.in_transaction:
        raise ConfigurationError(
            "a statement ended this transaction, as OR ROLLBACK and a trigger's RAISE(ROLLBACK) do: all that was done "
            "in it is undone, and nothing more can be. Leave the block; OR ABORT and RAISE(ABORT) undo one statement"
        )


def slices(rows: Sequence[R]) -> Iterator[Sequence[R]]:
    """Yield the rows in slices of as many as one statement takes."""
    first = 0
    for size in ROWS_AT_ONCE:
        while len(rows) - first >= size:
            yield rows[first : first + size]
            first += size


@lru_cache(maxsize=64)  # all messages of a batch share a salt
def _hexadecimal(salt: int) -> str:
    return f"{salt + 2**63:016x}"


def tokens(process: int) -> tuple[int, int]:
    """Return the first and the last token that a process can give to leases."""
    first = TOKEN_MIN + process * TOKENS_PER_PROCESS
    return first, first + TOKENS_PER_PROCESS - 1


def oldest_ready(db: sqlite3.Connection, queue: int) -> int | None:
    """Return the lowest number among the ready messages: one look-up for each priority in use.

    If more than 500 are in use, only the 250 highest and the 250 lowest of them are looked at.
    """
    oldest, priorities = db.execute(_OLDEST_FROM_THE_HIGHEST, (queue, queue, PRIORITIES_MAX, queue)).fetchone()
    if priorities < PRIORITIES_MAX:
        return None if oldest is None else int(oldest)
    other, _ = db.execute(_OLDEST_FROM_THE_LOWEST, (queue, queue, PRIORITIES_MAX, queue)).fetchone()
    return min(int(oldest), int(other))


PRIORITIES_MAX = 250  # priorities that are looked at from either end: under a millisecond
_OLDEST = """
    WITH RECURSIVE head (priority, n) AS (
        SELECT {end}(priority), 1 FROM filao_message INDEXED BY filao_ready WHERE queue = ? AND state = 2
        UNION ALL
        SELECT (
            SELECT {end}(priority) FROM filao_message INDEXED BY filao_ready
            WHERE queue = ? AND state = 2 AND priority {beyond} head.priority
        ), n + 1
        FROM head
        WHERE priority IS NOT NULL AND n < ?
    )
    SELECT min((
        SELECT min(id) FROM filao_message INDEXED BY filao_ready
        WHERE queue = ? AND state = 2 AND priority = head.priority
    )), count(priority)
    FROM head
"""
_OLDEST_FROM_THE_HIGHEST = _OLDEST.format(end="max", beyond="<")
_OLDEST_FROM_THE_LOWEST = _OLDEST.format(end="min", beyond=">")


@lru_cache(maxsize=1024)
def read_rules(name: str, rules: str) -> Queue:
    """Return the rules that a file holds. Raises `EngineError` for what no Filao wrote."""
    try:
        return rules_from_json(name, rules)
    except ConfigurationError as error:
        raise EngineError(
            f"the file's rules of queue {name!r} are unreadable: {error}. Declare the queue again; or run: filao doctor"
        ) from error
