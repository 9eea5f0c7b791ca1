"""How a message moves from state to state, and what that does to the counters, to its group and to those that wait.

The verbs of the queue (`send.py`, `receive.py`, `settle.py`) and of its operators (`operators.py`) are written with
these moves, on the books of one transaction. `postgresql/functions/moves.sql` says the same in the same order.
"""

import math
from collections.abc import Iterable

from filao.engine import HISTORY_MAX
from filao.engines.sqlite.books import (
    BLOCKED,
    DEAD,
    DEDUP_KEY,
    DELAYED,
    LEASED,
    MESSAGE_ID,
    NO_TOKEN,
    READY,
    STATES,
    Books,
    Entry,
    QueueRow,
)

DUE_MAX = 5_000  # delays, leases and ttls, each, that one receive ends: about 50 ms of the write lock
_EXPIRED = "INDEXED BY filao_expiring WHERE queue = ? AND expires_at <= ? AND state IN (2, 3, 5)"
_SOONEST = """
    SELECT min(expires_at)
    FROM filao_message INDEXED BY filao_expiring
    WHERE queue = ? AND expires_at IS NOT NULL AND state IN (2, 3, 5)
"""
_EXPIRED_ONE = "WHERE queue = ? AND expires_at <= ? AND state IN (2, 3, 5) AND id = ?"

# --- groups -----------------------------------------------------------------------------------------------------------


def first(books: Books, row: QueueRow, group: str, state: int) -> int | None:
    """Return the number of a group's first message in a state."""
    found = books.db.execute(
        """
        SELECT min(id)
        FROM filao_message INDEXED BY filao_grouped
        WHERE queue = ? AND grp = ? AND state = ?
        """,
        (row.id, group, state),
    ).fetchone()
    number: int | None = found[0]
    return number


def _at(books: Books, number: int) -> int:
    at: int = books.db.execute("SELECT at FROM filao_message WHERE id = ?", (number,)).fetchone()[0]
    return at


def _set_state(books: Books, row: QueueRow, number: int, was: int, state: int) -> None:
    books.db.execute("UPDATE filao_message SET state = ? WHERE id = ?", (state, number))
    books.count_move(row, was, state)


def is_halted(books: Books, row: QueueRow, group: str) -> bool:
    """Return whether this group is halted, by a dead letter or an operator."""
    if row.rules.group_dead != "halt":
        return False
    halted = books.db.execute("SELECT 1 FROM filao_halted WHERE queue = ? AND grp = ?", (row.id, group))
    return halted.fetchone() is not None


def arrange(books: Books, row: QueueRow, group: str) -> None:
    """Let the first message of a group through and hold back the others; none moves while one is leased.

    Invariant: at most one message of a group is ready, delayed or leased, its head; all others are blocked. (Where a
    failing head is skipped, delayed messages do not count.) A halted group has no head. Call this after each move of a
    message with a group.
    """
    books.flush()
    books.occupied.discard((row.id, group))
    while _arrange_once(books, row, group):
        pass


def _arrange_once(books: Books, row: QueueRow, group: str) -> bool:
    """Do what `arrange` does; return whether the head has stepped aside, because it is not due, for another one."""
    skips = row.rules.group_failure == "skip"
    leased, ready, delayed, blocked = (first(books, row, group, s) for s in (LEASED, READY, DELAYED, BLOCKED))
    if leased is not None:
        return False
    if skips:
        delayed = None  # a failed or delayed message is overtaken, not waited for
    head = min((n for n in (ready, delayed, blocked) if n is not None), default=None)
    if is_halted(books, row, group):
        head = None
    if ready is not None and ready != head:
        _set_state(books, row, ready, READY, BLOCKED)
    if delayed is not None and delayed != head and head is not None:
        _set_state(books, row, delayed, DELAYED, BLOCKED)
    if head is None or head != blocked:
        return False
    due = _at(books, head) <= books.now
    _set_state(books, row, head, BLOCKED, READY if due else DELAYED)
    return skips and not due


# --- deduplication ----------------------------------------------------------------------------------------------------


def keys(dedup_key: str | None, message_id: str | None) -> list[tuple[int, str]]:
    """Return the keys under which a message is remembered."""
    if dedup_key is None and message_id is None:
        return []
    pairs = ((DEDUP_KEY, dedup_key), (MESSAGE_ID, message_id))
    return [(kind, key) for kind, key in pairs if key is not None]


def remembered(books: Books, row: QueueRow, kind: int, key: str) -> str | None:
    """Return the id of the message that came first under this key; None when it is new."""
    found = books.db.execute(
        """
        SELECT message, until
        FROM filao_dedup
        WHERE queue = ? AND kind = ? AND key = ? AND (until IS NULL OR until > ?)
        """,
        (row.id, kind, key, books.now),
    ).fetchone()
    if found is None:
        return None
    name: str = found[0]
    if found[1] is None and _has_expired(books, row, name):
        return remembered(books, row, kind, key)  # again: a dead letter is still remembered under its message_id
    return name


def remember(books: Books, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
    """Remember these keys while their message is pending."""
    for kind, key in wanted:
        books.db.execute(
            "INSERT OR REPLACE INTO filao_dedup (queue, kind, key, message) VALUES (?, ?, ?, ?)",
            (row.id, kind, key, name),
        )


def remember_again(books: Books, row: QueueRow, dedup_key: str, name: str) -> None:
    """Remember the key of a message that came back from the dead, unless another message has taken it."""
    books.db.execute(
        """
        INSERT INTO filao_dedup (queue, kind, key, message) VALUES (?, ?, ?, ?)
        ON CONFLICT DO UPDATE SET message = excluded.message, until = NULL
        WHERE message = excluded.message OR until <= ?
        """,
        (row.id, DEDUP_KEY, dedup_key, name, books.now),
    )


def unlearn(books: Books, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
    """Forget the keys of a message at once."""
    for kind, key in wanted:
        books.db.execute(
            "DELETE FROM filao_dedup WHERE queue = ? AND kind = ? AND key = ? AND message = ?",
            (row.id, kind, key, name),
        )


def start_window(books: Books, row: QueueRow, wanted: Iterable[tuple[int, str]], name: str) -> None:
    """Remember the keys of a message that has ended for the queue's window, and no longer."""
    until = books.now + round(row.rules.dedup_window * 1000)
    for kind, key in wanted:
        books.db.execute(
            "UPDATE filao_dedup SET until = ? WHERE queue = ? AND kind = ? AND key = ? AND message = ?",
            (until, row.id, kind, key, name),
        )


# --- moves ------------------------------------------------------------------------------------------------------------


def _current(books: Books, entry: Entry) -> Entry:
    """Return an entry as it is now: another move in its group may have let it through or held it back."""
    if entry.group is None:
        return entry
    return books.entries("WHERE id = ?", (entry.number,))[0]


def record(books: Books, row: QueueRow, entry: Entry, outcome: str, error: str, *, consumer: str) -> None:
    """Put a failed attempt into the message's history, which keeps the last 20."""
    books.note(row, entry.name, outcome, entry.attempts, by=consumer, detail=error)
    books.db.execute(
        "INSERT INTO filao_failure (message, attempt, at, outcome, error, consumer) VALUES (?, ?, ?, ?, ?, ?)",
        (entry.number, entry.attempts, books.now, outcome, error, consumer),
    )
    books.db.execute("UPDATE filao_message SET failures = failures + 1 WHERE id = ?", (entry.number,))
    books.db.execute(
        """
        DELETE FROM filao_failure
        WHERE id IN (SELECT id FROM filao_failure WHERE message = ? ORDER BY id DESC LIMIT -1 OFFSET ?)
        """,
        (entry.number, HISTORY_MAX),
    )


def has_crashed(books: Books, number: int) -> bool:
    """Return whether a message's last failure was the death of its consumer."""
    found = books.db.execute(
        "SELECT outcome FROM filao_failure WHERE message = ? ORDER BY id DESC LIMIT 1", (number,)
    ).fetchone()
    return found is not None and found[0] == "crashed"


def give_back(books: Books, row: QueueRow, entry: Entry, *, at: int | None = None, token: int = NO_TOKEN) -> None:
    """Return a message to its old place, ready now or delayed until `at`; in a group, when it is its turn."""
    entry = _current(books, entry)
    state = READY if at is None else DELAYED
    if entry.group is not None and state == READY:
        state = BLOCKED  # `arrange` lets it through when it is its turn
    books.db.execute(
        "UPDATE filao_message SET state = ?, at = ?, token = ? WHERE id = ?",
        (state, books.now if at is None else at, token, entry.number),
    )
    books.count_move(row, entry.state, state)
    if entry.group is not None:
        arrange(books, row, entry.group)


def die(books: Books, row: QueueRow, entry: Entry, reason: str) -> None:
    """Make a message a dead letter."""
    entry = _current(books, entry)
    books.db.execute(
        "UPDATE filao_message SET state = 6, at = ?, token = ?, reason = ? WHERE id = ?",
        (books.now, NO_TOKEN, reason, entry.number),
    )
    books.count_move(row, entry.state, DEAD)
    row.count["died"] += 1
    row.reasons.append((reason, 1, 1))
    books.note(row, entry.name, "died", entry.attempts, by="", detail=reason)
    if entry.dedup_key is not None:  # its message_id stays known while it is a dead letter
        start_window(books, row, keys(entry.dedup_key, None), entry.name)
    if entry.group is not None:
        if row.rules.group_dead == "halt":
            books.db.execute("INSERT OR IGNORE INTO filao_halted (queue, grp) VALUES (?, ?)", (row.id, entry.group))
        arrange(books, row, entry.group)


def forget(books: Books, row: QueueRow, entry: Entry, *, had_failed: bool) -> None:
    """Clear up after a message that is gone."""
    if had_failed:
        books.db.execute("DELETE FROM filao_failure WHERE message = ?", (entry.number,))
    if entry.dedup_key is not None or entry.message_id is not None:
        dedup_key = None if entry.state == DEAD else entry.dedup_key  # whose window began when it died
        start_window(books, row, keys(dedup_key, entry.message_id), entry.name)
    if entry.group is not None:
        arrange(books, row, entry.group)


def expire(books: Books, row: QueueRow, entry: Entry) -> None:
    """End a message that outlived its ttl: it counts for nothing from now on, and its key is free at once.

    If it becomes a dead letter, its message_id stays known.
    """
    if row.rules.on_expiry == "drop":
        delete(books, row, entry, "dropped", "")
        unlearn(books, row, keys(entry.dedup_key, entry.message_id), entry.name)
    else:
        record(books, row, entry, "expired", "it outlived its ttl", consumer="")
        die(books, row, entry, "expired")
        unlearn(books, row, keys(entry.dedup_key, None), entry.name)


def let_expire(books: Books, row: QueueRow, limit: int = DUE_MAX) -> int:
    """End up to `limit` messages that outlived their ttl, and return how many there were."""
    if books.now < row.expires_from:
        return 0
    books.flush()
    soonest = books.db.execute(_SOONEST, (row.id,)).fetchone()[0]
    row.expires_from = math.inf if soonest is None else soonest
    if books.now < row.expires_from:
        return 0
    expired = books.entries(f"{_EXPIRED} LIMIT ?", (row.id, books.now, limit))
    for entry in expired:
        expire(books, row, entry)
    return len(expired)


def _has_expired(books: Books, row: QueueRow, name: str) -> bool:
    """End the message with this id if it has outlived its ttl; return whether it has."""
    expired = books.entries(_EXPIRED_ONE, (row.id, books.now, books.number_of(row, name)))
    for entry in expired:
        expire(books, row, entry)
    return bool(expired)


def delete(books: Books, row: QueueRow, entry: Entry, counter: str, by: str) -> None:
    """Remove a message for good, and count it under `counter`."""
    books.note(row, entry.name, counter, entry.attempts, by=by)
    entry = _current(books, entry)
    if entry.state == DEAD:
        books.count_alive(row, entry.number)
    books.db.execute("DELETE FROM filao_message WHERE id = ?", (entry.number,))
    row.count[STATES[entry.state]] -= 1
    row.count[counter] += 1
    forget(books, row, entry, had_failed=True)


def lose(books: Books, row: QueueRow, entry: Entry, token: int, outcome: str) -> None:
    """End a lease that nobody settled: its attempt is used, and the message is ready again, or dead.

    The token stays until another consumer receives the message, so that a late ack of finished work still counts.
    """
    row.count["lost"] += 1
    record(books, row, entry, outcome, "", consumer=books.consumer_of(token))
    if entry.attempts >= row.rules.max_attempts:
        die(books, row, entry, "max_attempts")
    else:
        give_back(books, row, entry, token=token)
