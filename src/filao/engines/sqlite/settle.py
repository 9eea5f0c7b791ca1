"""Settling and extending. `postgresql/functions/settle.sql` is the same in SQL.

A lease is a row's token. Every statement that settles or extends compares it, and only another receive of the message
overwrites it: so a settle whose token matches is always safe, even late, and one whose token does not changes nothing.
"""

import random
from collections.abc import Mapping, Sequence

from filao.engine import Ack, Delivery, Extend, Nack, Operation, Reject, Release, Settle
from filao.engines.rows import lease_lost
from filao.engines.sqlite import moves
from filao.engines.sqlite.books import (
    BLOCKED,
    ENTRY,
    LEASED,
    ROWS_AT_ONCE,
    STATES,
    Books,
    Entry,
    QueueRow,
    slices,
)
from filao.engines.sqlite.receive import Lessee
from filao.errors import FilaoError, LeaseLost
from filao.process import process_name
from filao.queue import retry_delay

_DELETES = {
    rows: f"""
    DELETE FROM filao_message
    WHERE id IN ({", ".join("?" * rows)})
      AND (id, token) IN (VALUES {", ".join(["(?, ?)"] * rows)})
      AND state = 4 AND at > ? AND failures = 0
    """
    for rows in ROWS_AT_ONCE
}


_EXTENDS = {
    rows: f"""
    UPDATE filao_message
    SET at = ?
    WHERE id IN ({", ".join("?" * rows)})
      AND (id, token) IN (VALUES {", ".join(["(?, ?)"] * rows)})
      AND state = 4 AND at > ?
    """
    for rows in ROWS_AT_ONCE
}


def settle(books: Books, operation: Settle, lessee: Lessee) -> FilaoError | None:
    """End a lease with an outcome, unless it is no longer the caller's."""
    delivery, outcome = operation.delivery, operation.outcome
    row = books.queue(delivery.queue)
    if row is None:
        return lease_lost(delivery, None, queue_deleted=True)
    if isinstance(outcome, Ack) and _ack_in_time(books, delivery):
        row.count["leased"] -= 1
        row.count["acked"] += 1
        if not is_plain_ack(operation):
            moves.forget(books, row, _entry(delivery), had_failed=delivery.failures > 0)
        if row.rules.history:
            books.note(row, delivery.id, "acked", delivery.attempt, by=lessee.name or process_name())
        return None
    entry = _held(books, row, delivery)
    if entry is None:
        return _lease_lost(books, delivery)
    match outcome:
        case Ack():
            moves.delete(books, row, entry, "acked", lessee.name)
        case Nack(delay, error):
            row.count["nacked"] += 1
            moves.record(books, row, entry, "nacked", error, consumer=lessee.name)
            _fail(books, row, entry, delay)
        case Reject(error, malformed):
            reason = "malformed" if malformed else "rejected"
            moves.record(books, row, entry, reason, error, consumer=lessee.name)
            moves.die(books, row, entry, reason)
        case Release(delay):
            release(books, row, entry, lessee.name, delay)
    return None


def release(books: Books, row: QueueRow, entry: Entry, by: str, delay: float = 0.0) -> None:
    """Give a leased message back as if it had not been delivered."""
    row.count["released"] += 1
    books.note(row, entry.name, "released", entry.attempts, by=by)
    books.db.execute("UPDATE filao_message SET attempts = attempts - 1 WHERE id = ?", (entry.number,))
    moves.give_back(books, row, entry, at=_due(books, delay))


def _ack_in_time(books: Books, delivery: Delivery) -> bool:
    """Delete a message whose lease is running: most acks do no more than that.

    If it has failed since it was received, as when its lease ran out and was extended late, there is more to clear up.
    """
    deleted = books.db.execute(
        "DELETE FROM filao_message WHERE id = ? AND token = ? AND state = 4 AND at > ? AND failures = ?",
        (delivery.handle, delivery.token, books.now, delivery.failures),
    )
    return deleted.rowcount == 1


def _held(books: Books, row: QueueRow, delivery: Delivery) -> Entry | None:
    """Return the message if this delivery's lease is still the last one; count it as late if it had run out."""
    found = books.db.execute(
        f"SELECT at, {ENTRY} FROM filao_message WHERE id = ? AND token = ?",
        (delivery.handle, delivery.token),
    ).fetchone()
    if found is None:
        return None
    at, *fields = found
    entry = books.entry(fields)
    row.count["late"] += entry.state != LEASED or at <= books.now
    return entry


def _fail(books: Books, row: QueueRow, entry: Entry, delay: float | None) -> None:
    again = retry_delay(row.rules, entry.attempts, random.random())
    if again is None:
        moves.die(books, row, entry, "max_attempts")
        return
    moves.give_back(books, row, entry, at=_due(books, again if delay is None else delay))


def _due(books: Books, delay: float) -> int | None:
    """Return the time after so many seconds; None for no delay."""
    wait = round(delay * 1000)
    return books.now + wait if wait else None


def extend(books: Books, operation: Extend, lessee: Lessee) -> FilaoError | None:
    """Let a lease end so many seconds from now; a lease that ran out but was not taken over runs again."""
    delivery = operation.delivery
    row = books.queue(delivery.queue)
    if row is None:
        return lease_lost(delivery, None, queue_deleted=True)
    entry = _held(books, row, delivery)
    if entry is None or entry.state == BLOCKED:  # blocked: its group has gone on without it
        return _lease_lost(books, delivery)
    books.db.execute(
        "UPDATE filao_message SET state = 4, at = ? WHERE id = ? AND token = ?",
        (books.now + round(operation.seconds * 1000), delivery.handle, delivery.token),
    )
    books.count_move(row, entry.state, LEASED)
    _note_extended(books, row, operation, lessee)
    return None


def _note_extended(books: Books, row: QueueRow, extend: Extend, lessee: Lessee) -> None:
    if row.rules.history:
        by = lessee.name or process_name()  # a keeper's engine is not entered among those that receive
        books.note(row, extend.delivery.id, "extended", extend.delivery.attempt, by=by, detail=f"{extend.seconds:g}")


def _entry(delivery: Delivery) -> Entry:
    about = (delivery.group, delivery.dedup_key, delivery.message_id, delivery.id)
    return Entry(delivery.handle, LEASED, delivery.attempt, *about)


def _lease_lost(books: Books, delivery: Delivery) -> LeaseLost:
    found = books.db.execute("SELECT state, attempts FROM filao_message WHERE id = ?", (delivery.handle,)).fetchone()
    return lease_lost(delivery, None if found is None else (STATES[found[0]], found[1]))


def is_plain_ack(operation: Operation) -> bool:
    """Return whether an operation is an ack that has only its message to delete."""
    if not isinstance(operation, Settle) or not isinstance(operation.outcome, Ack):
        return False
    about = operation.delivery
    return about.group is None and about.dedup_key is None and about.message_id is None and not about.failures


def ack_together(books: Books, acks: Sequence[Operation], lessee: Lessee) -> bool:
    """Delete the messages of many acks with a few statements, or none of them and return False if one is too late."""
    deliveries = [ack.delivery for ack in acks if isinstance(ack, Settle)]
    if not _all_in_time(books, _DELETES, (), deliveries):
        return False
    for delivery in deliveries:
        row = books.queue(delivery.queue)
        assert row is not None, "it held a message"
        row.count["leased"] -= 1
        row.count["acked"] += 1
        if row.rules.history:
            books.note(row, delivery.id, "acked", delivery.attempt, by=lessee.name or process_name())
    return True


def extend_together(books: Books, extends: Sequence[Extend], lessee: Lessee) -> bool:
    """Extend many leases by the same time with a few statements, or none and return False."""
    if len(extends) < 2 or len({extend.seconds for extend in extends}) != 1:
        return False
    until = books.now + round(extends[0].seconds * 1000)
    if not _all_in_time(books, _EXTENDS, (until,), [extend.delivery for extend in extends]):
        return False
    for extend in extends:
        row = books.queue(extend.delivery.queue)
        assert row is not None, "it holds a message"
        _note_extended(books, row, extend, lessee)
    return True


def _all_in_time(
    books: Books, statements: Mapping[int, str], first: tuple[int, ...], deliveries: Sequence[Delivery]
) -> bool:
    """Change many messages with a few statements, or none and return False if one of their leases is not running."""
    if len(deliveries) < 2:
        return False
    books.db.execute("SAVEPOINT together")
    changed = 0
    for some in slices(deliveries):
        pairs = [value for delivery in some for value in (delivery.handle, delivery.token)]
        changed += books.db.execute(statements[len(some)], (*first, *pairs[::2], *pairs, books.now)).rowcount
    if changed < len(deliveries):
        books.db.execute("ROLLBACK TO together")
    books.db.execute("RELEASE together")
    return changed == len(deliveries)
