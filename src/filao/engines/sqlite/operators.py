"""What operators do, in SQL: declare, look, redrive, remove, pause. `postgresql/functions/operators.sql` is the same.

Like the verbs, these run on the books of a transaction, so that the counters stay exact.
"""

import json
import sqlite3
from array import array
from collections.abc import Sequence
from typing import Any

from filao.engine import EDITED, EVENTS_MAX, Draft, Event, Failure, State, StoredMessage, instant
from filao.engines import rows
from filao.engines.sqlite import moves
from filao.engines.sqlite.books import STATES, Books, Entry, QueueRow, read_rules
from filao.errors import ConfigurationError, EngineError
from filao.process import process_name
from filao.queue import Queue, check_halts, rules_from_json, rules_to_json

NUMBERS = {name: number for number, name in STATES.items()}

_INDEXES = {"ready": "ready", "delayed": "delayed", "leased": "leased", "dead": "dead", "blocked": "grouped"}
_WHERE = {
    "ready": "state = 2",
    "delayed": "state = 3",
    "leased": "state = 4",
    "blocked": "state = 5 AND grp IS NOT NULL",
    "dead": "state = 6",
}
_ORDER = {"ready": "priority DESC, id", "delayed": "at, id", "leased": "at, id", "blocked": "grp, id", "dead": "id"}
_SEEN = f"id, message_id, salt, state, token, {rows.COLUMNS}"


def declare(books: Books, queue: Queue) -> None:
    """Create the queue or give it these rules."""
    try:
        before = books.queue(queue.name)
    except EngineError:
        before = None  # the stored rules are unreadable: these replace them
    books.db.execute(
        """
        INSERT INTO filao_queue (name, rules) VALUES (?, ?)
        ON CONFLICT (name) DO UPDATE SET rules = excluded.rules
        """,
        (queue.name, rules_to_json(queue)),
    )
    if before is None:
        return
    changed = before.rules.group_failure != queue.group_failure or before.rules.group_dead != queue.group_dead
    before.rules = rules_from_json(queue.name, rules_to_json(queue))
    if changed:
        _arrange_all(books, before)


def delete(books: Books, row: QueueRow) -> int:
    """Delete a queue that holds no message, with all that is remembered of it; return how many it holds."""
    held = row.pending() + row.count["dead"]
    if not held:
        for table in ("dedup", "halted", "waiting", "reason"):
            books.db.execute(f"DELETE FROM filao_{table} WHERE queue = ?", (row.id,))
        books.db.execute("DELETE FROM filao_queue WHERE id = ?", (row.id,))
    return held


def _arrange_all(books: Books, row: QueueRow) -> None:
    if row.rules.group_dead == "continue":
        books.db.execute("DELETE FROM filao_halted WHERE queue = ?", (row.id,))
    groups = books.db.execute(
        "SELECT DISTINCT grp FROM filao_message INDEXED BY filao_grouped WHERE queue = ? AND grp IS NOT NULL",
        (row.id,),
    )
    for (group,) in groups.fetchall():
        moves.arrange(books, row, group)


def queues(db: sqlite3.Connection) -> list[Queue]:
    """Return every declared queue with its rules, by name."""
    return [read_rules(*found) for found in db.execute("SELECT name, rules FROM filao_queue ORDER BY name")]


def outlived(books: Books) -> list[str]:
    """Return the queues with messages that outlived their ttl and were not ended yet; one look-up for each that may."""
    found = books.db.execute(
        """
        WITH RECURSIVE expiring (queue) AS (
            SELECT min(queue) FROM filao_message INDEXED BY filao_expiring
            WHERE expires_at IS NOT NULL AND state IN (2, 3, 5)
            UNION ALL
            SELECT (
                SELECT min(queue) FROM filao_message INDEXED BY filao_expiring
                WHERE queue > expiring.queue AND expires_at IS NOT NULL AND state IN (2, 3, 5)
            )
            FROM expiring
            WHERE expiring.queue IS NOT NULL
        )
        SELECT name
        FROM expiring
        JOIN filao_queue ON filao_queue.id = expiring.queue
        WHERE EXISTS (
            SELECT 1 FROM filao_message INDEXED BY filao_expiring
            WHERE queue = expiring.queue AND expires_at <= ? AND state IN (2, 3, 5)
        )
        """,
        (books.now,),
    )
    return [name for (name,) in found]


def peek(books: Books, row: QueueRow, state: State, limit: int, after: str | None) -> list[StoredMessage]:
    """Return messages of one state in its order; `after` is the id of the last one seen."""
    source, parameters = listed(books, row, state, after)
    found = books.db.execute(f"SELECT {_SEEN} {source} LIMIT ?", (*parameters, limit)).fetchall()
    return [_stored(books, row, fields) for fields in found]


def listed(books: Books, row: QueueRow, state: State, after: str | None) -> tuple[str, tuple[object, ...]]:
    """Return the clauses that select the messages of one state in its order, and their parameters."""
    skipped, parameters = _behind(books, row, state, after)
    source = f"""
        FROM filao_message INDEXED BY filao_{_INDEXES[state]}
        WHERE queue = ? AND {_WHERE[state]} {skipped}
        ORDER BY {_ORDER[state]}
    """
    return source, (row.id, *parameters)


def find(books: Books, row: QueueRow, message_id: str) -> StoredMessage | None:
    """Return the message with this id; None when the queue has none."""
    number = books.number_of(row, message_id)
    fields = books.db.execute(
        f"SELECT {_SEEN} FROM filao_message WHERE id = ? AND queue = ?", (number, row.id)
    ).fetchone()
    return None if fields is None else _stored(books, row, fields)


def place_of(books: Books, row: QueueRow, after: str) -> int:
    """Return the number of the message with the id `after`. Raises `ConfigurationError` when there is none."""
    number = books.number_of(row, after)
    if number is None:
        raise _no_place(row, after)
    return number


def _behind(books: Books, row: QueueRow, state: State, after: str | None) -> tuple[str, tuple[object, ...]]:
    if after is None:
        return "", ()
    number = place_of(books, row, after)
    last = books.db.execute("SELECT priority, at, grp FROM filao_message WHERE id = ?", (number,)).fetchone()
    if state == State.DEAD:  # ordered by number alone, so a dead letter that was redriven meanwhile still serves
        return "AND id > ?", (number,)
    if last is None:
        raise _no_place(row, after)
    priority, at, group = last
    match state:
        case State.READY:
            return "AND (-priority, id) > (?, ?)", (-priority, number)
        case State.BLOCKED:
            return "AND (grp, id) > (?, ?)", (group, number)
        case _:
            return "AND (at, id) > (?, ?)", (at, number)


def _no_place(row: QueueRow, after: str) -> ConfigurationError:
    return ConfigurationError(
        f"queue {row.rules.name!r}: there is no message {after!r} to go on behind; it may be gone by now. Start again "
        f"without after="
    )


def _stored(books: Books, row: QueueRow, fields: Sequence[Any]) -> StoredMessage:
    number, message_id, salt, state, token, *columns = fields
    name, held = books.name_of(number, message_id, salt), state == NUMBERS["leased"]
    consumer, failed = books.consumer_of(token) if held else "", history(books.db, number)
    return rows.stored(row.rules.name, name, State(STATES[state]), columns, history=failed, consumer=consumer)


def history(db: sqlite3.Connection, number: int) -> tuple[Failure, ...]:
    """Return the failed attempts of a message, the oldest first."""
    return rows.failures(
        db.execute(
            "SELECT attempt, at, outcome, error, consumer FROM filao_failure WHERE message = ? ORDER BY id", (number,)
        )
    )


def trace(books: Books, message_id: str) -> list[Event]:
    """Return what happened to the messages with this id, the oldest event first."""
    found = books.db.execute(
        """
        SELECT queue, at, what, attempt, by, detail
        FROM filao_event INDEXED BY filao_events
        WHERE message = ? AND until > ?
        ORDER BY id DESC
        LIMIT ?
        """,
        (message_id, books.now, EVENTS_MAX),
    ).fetchall()
    return [Event(queue, instant(at), *event) for queue, at, *event in reversed(found)]


def chosen(
    books: Books, row: QueueRow, states: Sequence[State], ids: Sequence[str] | None, limit: int
) -> Sequence[int]:
    """Return the numbers of the messages that a command will touch, each once; those that come later stay untouched."""
    if ids is not None:
        numbers = [number for name in ids if (number := books.number_of(row, name)) is not None]
        what, values = _among(row, numbers, states)
        named = books.db.execute(f"SELECT id FROM filao_message {what} LIMIT ?", (*values, limit))
        return [number for (number,) in named]
    found = array("q")
    for state in states:
        named = books.db.execute(
            f"""
            SELECT id
            FROM filao_message INDEXED BY filao_{_INDEXES[state]}
            WHERE queue = ? AND {_WHERE[state]}
            ORDER BY {_ORDER[state]}
            LIMIT ?
            """,
            (row.id, limit - len(found)),
        )
        found.extend(number for (number,) in named)
    return found


def _still(books: Books, row: QueueRow, numbers: Sequence[int], states: Sequence[State]) -> list[Entry]:
    """Return the chosen messages that are still in one of these states, in the order of sending."""
    return books.entries(*_among(row, numbers, states))


def _among(row: QueueRow, numbers: Sequence[int], states: Sequence[State]) -> tuple[str, tuple[str, int]]:
    """Return the clause, and its values, for those of the messages with these numbers that are in these states."""
    allowed = ", ".join(str(NUMBERS[state]) for state in states)
    clause = f"WHERE id IN (SELECT value FROM json_each(?)) AND queue = ? AND state IN ({allowed}) ORDER BY id"
    return clause, (json.dumps(list(numbers)), row.id)


def redrive(books: Books, row: QueueRow, numbers: Sequence[int], edited: Draft | None) -> int:
    """Give dead letters back with fresh attempts, each to its old place."""
    entries, by = _still(books, row, numbers, [State.DEAD]), process_name()
    for entry in entries:
        books.count_alive(row, entry.number)
        books.db.execute(
            "UPDATE filao_message SET attempts = 0, reason = NULL, expires_at = NULL WHERE id = ?", (entry.number,)
        )
        if edited is not None:
            books.db.execute(
                "UPDATE filao_message SET kind = ?, content = ?, headers = coalesce(?, headers) WHERE id = ?",
                (edited.kind, edited.content, edited.headers, entry.number),
            )
        if entry.dedup_key is not None:
            moves.remember_again(books, row, entry.dedup_key, entry.name)
        moves.give_back(books, row, entry)
        books.note(row, entry.name, "redriven", 0, by=by, detail="" if edited is None else EDITED)
    row.count["redriven"] += len(entries)
    return len(entries)


def remove(books: Books, row: QueueRow, numbers: Sequence[int], states: Sequence[State], *, purges: bool) -> int:
    """Delete messages in these states; a consumer that holds one loses its lease."""
    entries, by = _still(books, row, numbers, states), process_name()
    for entry in entries:
        moves.delete(books, row, entry, "purged" if purges else "cancelled", by)
        if purges:  # a purged queue starts afresh: the same messages may be sent again at once
            moves.unlearn(books, row, moves.keys(entry.dedup_key, entry.message_id), entry.name)
    return len(entries)


def pause(books: Books, row: QueueRow, *, paused: bool) -> None:
    """Stop or resume deliveries; those that wait look again when they resume."""
    books.db.execute("UPDATE filao_queue SET paused = ? WHERE id = ?", (int(paused), row.id))
    row.paused = paused
    row.fresh = True
    row.delayed += row.count["delayed"] + row.count["leased"]


def halt_group(books: Books, row: QueueRow, group: str) -> None:
    """Stop a group, as a dead letter of it does."""
    check_halts(row.rules, group)
    books.db.execute("INSERT OR IGNORE INTO filao_halted (queue, grp) VALUES (?, ?)", (row.id, group))
    moves.arrange(books, row, group)


def resume_group(books: Books, row: QueueRow, group: str) -> None:
    """Let a halted group go on."""
    books.db.execute("DELETE FROM filao_halted WHERE queue = ? AND grp = ?", (row.id, group))
    moves.arrange(books, row, group)
