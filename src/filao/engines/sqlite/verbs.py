"""Send, receive, settle and extend, in SQL, on the books of one transaction.

A lease is a row's token. Every statement that settles or extends compares it, and it is overwritten only when somebody
else receives the message: a settle that matches is therefore always safe, even late, and one that does not match
changes nothing.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from filao.draft import too_large
from filao.engine import (
    Ack,
    Delivery,
    Draft,
    Extend,
    Nack,
    Operation,
    Receipt,
    Receive,
    Received,
    Reject,
    Result,
    Send,
    Settle,
)
from filao.engines.line import deal
from filao.engines.sqlite import waiting
from filao.engines.sqlite.books import (
    BLOCKED,
    DELAYED,
    ENTRY,
    LEASED,
    NO_TOKEN,
    READY,
    ROWS_AT_ONCE,
    STATES,
    Books,
    Entry,
    QueueRow,
    keys,
    oldest_ready,
    slices,
    tokens,
)
from filao.errors import FilaoError, LeaseLost, QueueFull
from filao.queue import retry_delay

DUE_MAX = 5_000  # rows of a kind that one receive makes ready: about 50 ms of the write lock; the next one goes on

_DELIVERED = "id, priority, attempts, grp, dedup_key, message_id, headers, kind, content, sent_at, failures"
_LEASE = f"""
    UPDATE filao_message
    SET state = 4, at = ?, token = ?, attempts = attempts + 1
    WHERE id IN (
        SELECT id
        FROM filao_message INDEXED BY filao_ready
        WHERE queue = ? AND state = 2
        ORDER BY priority DESC, id
        LIMIT ?
    )
    RETURNING {_DELIVERED}
"""


_DELETES = {
    rows: f"""
    DELETE FROM filao_message
    WHERE id IN ({", ".join("?" * rows)})
      AND (id, token) IN (VALUES {", ".join(["(?, ?)"] * rows)})
      AND state = 4 AND at > ?
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


@dataclass(slots=True)
class Lessee:
    """The process that receives: its leases carry its number, so that they can be found when it dies."""

    process: int
    name: str
    leases: int = 0
    waits: set[int] = field(default_factory=set[int])
    """The queues on whose waiting lists it may stand."""

    def next_token(self) -> int:
        """Return a token that no other lease of this file ever had; those of one statement share it."""
        self.leases += 1
        return tokens(self.process)[0] + self.leases


def apply(books: Books, operations: Sequence[Operation], lessee: Lessee) -> list[Result]:
    """Do the operations in order, but receive last, so that what became ready in this batch is found."""
    results: list[Result] = [None] * len(operations)
    receives: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    acked = _ack_together(books, [operation for operation in operations if _is_plain_ack(operation)])
    extended = _extend_together(books, [operation for operation in operations if isinstance(operation, Extend)])
    for index, operation in enumerate(operations):
        if (acked and _is_plain_ack(operation)) or (extended and isinstance(operation, Extend)):
            continue
        if isinstance(operation, Send):
            results[index] = send(books, operation)
        elif isinstance(operation, Settle):
            results[index] = settle(books, operation, lessee)
        elif isinstance(operation, Receive):
            terms = (operation.queue, operation.lease)
            receives[terms].append(index)
        else:
            results[index] = extend(books, operation)
    for indexes in receives.values():
        asked = [operation for index in indexes if isinstance(operation := operations[index], Receive)]
        for index, result in zip(indexes, receive(books, asked, lessee), strict=True):
            results[index] = result
    return results


# --- send ------------------------------------------------------------------------------------------------------------


def send(books: Books, operation: Send) -> list[Receipt] | FilaoError:
    """Store the drafts that are not duplicates, all or none."""
    row = books.queue(operation.queue)
    if row is None:
        return books.not_found(operation.queue)
    refusal = _refusal(books, row, operation.drafts)
    if refusal is not None:
        return refusal
    return [_send_one(books, row, draft) for draft in operation.drafts]


def _send_one(books: Books, row: QueueRow, draft: Draft) -> Receipt:
    known = keys(draft.dedup_key, draft.message_id)
    first = books.remembered(row, known) if known else None
    if first is not None:
        row.count["duplicates"] += 1
        return Receipt(first, True)
    number = books.next_number()
    now = books.now
    at = now + round(draft.delay * 1000) if draft.delay else now
    state = READY if at == now else DELAYED
    if draft.group is not None:
        state = _state_in_group(books, row, draft.group, state)
    ttl = row.rules.ttl if draft.ttl is None else draft.ttl
    expires_at = None if ttl is None else now + round(ttl * 1000)
    place = (number, row.id, state, draft.priority, at, NO_TOKEN, now, expires_at, draft.group)
    books.insert(row, state, (*place, draft.dedup_key, draft.message_id, draft.headers, draft.kind, draft.content))
    name = books.name_of(number, draft.message_id)
    if known:
        books.remember(row, known, name)
    return Receipt(name)


def _state_in_group(books: Books, row: QueueRow, group: str, state: int) -> int:
    """Return the state of a group's new message: blocked, unless it is the first or waits for its own time."""
    if state == DELAYED and row.rules.group_failure == "skip":
        return DELAYED
    if (row.id, group) not in books.occupied:
        books.occupied.add((row.id, group))
        if not books.is_halted(row, group) and not _is_occupied(books, row, group):
            return state
    return BLOCKED


def _is_occupied(books: Books, row: QueueRow, group: str) -> bool:
    states = (READY, LEASED, BLOCKED) if row.rules.group_failure == "skip" else (READY, DELAYED, LEASED, BLOCKED)
    return any(books.first(row, group, state) is not None for state in states)


def _refusal(books: Books, row: QueueRow, drafts: Sequence[Draft]) -> FilaoError | None:
    rules = row.rules
    for draft in drafts:
        if len(draft.content) > rules.body_max:
            return too_large(rules.name, len(draft.content), rules.body_max)
    if rules.max_length is None:
        return None
    new = _count_new(books, row, drafts)
    if not new:
        return None
    surplus = row.pending() + new - rules.max_length
    if rules.overflow == "drop_oldest" and new <= rules.max_length:
        surplus -= _drop_oldest(books, row, surplus)
    if surplus <= 0:
        return None
    row.count["refused"] += len(drafts)
    return QueueFull(
        f"queue {rules.name!r} is full: {row.pending():,} messages wait or are being worked on, its max_length is "
        f"{rules.max_length:,}, and {new:,} more were sent. Nothing was stored. Add consumers, or send later."
    )


def _count_new(books: Books, row: QueueRow, drafts: Sequence[Draft]) -> int:
    seen: set[tuple[int, str]] = set()
    new = 0
    for draft in drafts:
        known = keys(draft.dedup_key, draft.message_id)
        new += not seen.intersection(known) and books.remembered(row, known) is None
        seen.update(known)
    return new


def _drop_oldest(books: Books, row: QueueRow, surplus: int) -> int:
    """Make up to `surplus` waiting messages dead letters, the oldest first, and return how many there were."""
    books.flush()
    for dropped in range(surplus):
        oldest = _oldest_waiting(books, row)
        if oldest is None:
            return dropped
        books.record(oldest, "overflow", "the queue was full and its rule is to drop the oldest", "")
        books.die(row, oldest, "overflow")
    return max(surplus, 0)


def _oldest_waiting(books: Books, row: QueueRow) -> Entry | None:
    number = oldest_ready(books.db, row.id)
    if number is not None:
        return books.entries("WHERE id = ?", (number,))[0]
    delayed = books.entries(
        "INDEXED BY filao_delayed WHERE queue = ? AND state = 3 ORDER BY at LIMIT 1",
        (row.id,),
    )
    return delayed[0] if delayed else None


# --- receive ---------------------------------------------------------------------------------------------------------


def receive(books: Books, asked: Sequence[Receive], lessee: Lessee) -> Sequence[Received | FilaoError]:
    """Serve receives of the same terms with one statement, and deal what it finds like cards."""
    row = books.queue(asked[0].queue)
    if row is None:
        return [books.not_found(asked[0].queue)] * len(asked)
    found = [] if row.paused else _lease(books, row, asked, lessee)
    hands = deal(found, [one.limit for one in asked])
    missed = [len(hand) < max(one.waiting, 1) for hand, one in zip(hands, asked, strict=True)]
    wanted = [
        one.limit - len(hand) if one.waiting and miss else 0
        for hand, one, miss in zip(hands, asked, missed, strict=True)
    ]
    _queue_up(books, row, lessee, sum(wanted), served=bool(found))
    if not any(missed):
        return [Received(hand) for hand in hands]
    due_in = time_to_due(books, row)
    return [Received(hand, due_in if miss else None) for hand, miss in zip(hands, missed, strict=True)]


def _lease(books: Books, row: QueueRow, asked: Sequence[Receive], lessee: Lessee) -> list[Delivery]:
    books.flush()
    make_due(books, row)
    limit = sum(one.limit for one in asked)
    if row.count["ready"] and all(one.waiting for one in asked):
        limit = min(limit, row.count["ready"] - waiting.promised(books, row, lessee.process))
    if not row.count["ready"] or limit <= 0:
        return []
    token = lessee.next_token()
    until = books.now + round((asked[0].lease or row.rules.lease) * 1000)
    found = books.db.execute(_LEASE, (until, token, row.id, limit)).fetchall()
    row.count["ready"] -= len(found)
    row.count["leased"] += len(found)
    row.count["received"] += len(found)
    row.fresh = True  # if any is left, it is for the next who waits
    found.sort(key=lambda fields: (-fields[1], fields[0]))
    return [_delivery(books, row.rules.name, token, fields) for fields in found]


def _queue_up(books: Books, row: QueueRow, lessee: Lessee, wants: int, *, served: bool) -> None:
    """Wait for so many messages; whoever was served does so behind the others."""
    if served and row.id in lessee.waits:
        waiting.leave(books, row, lessee.process)
        lessee.waits.discard(row.id)
    if wants:
        waiting.wait(books, row, lessee.process, wants)
        lessee.waits.add(row.id)


def _delivery(books: Books, queue: str, token: int, fields: Sequence[Any]) -> Delivery:
    number, priority, attempt, group, dedup_key, message_id, headers, kind, content, sent_at, failures = fields
    name = books.name_of(number, message_id)
    about = (priority, group, dedup_key, message_id, headers, kind, content, sent_at, failures)
    return Delivery(queue, name, number, token, attempt, *about, bool(failures) and books.has_crashed(number))


def make_due(books: Books, row: QueueRow) -> None:
    """Make ready what is due, delayed messages and those whose lease ran out; bury what outlived its ttl."""
    if row.count["delayed"]:
        for entry in books.entries(
            f"INDEXED BY filao_delayed WHERE queue = ? AND state = 3 AND at <= ? ORDER BY at LIMIT {DUE_MAX}",
            (row.id, books.now),
        ):
            books.give_back(row, entry)
    if row.count["leased"]:
        lose_all(books, row, "at <= ?", (books.now,), "lease_expired")
    _expire(books, row)


def lose_all(books: Books, row: QueueRow, which: str, parameters: tuple[object, ...], outcome: str) -> None:
    """End the leases of a queue that a clause finds, oldest first."""
    found = books.db.execute(
        f"""
        SELECT token, {ENTRY}
        FROM filao_message INDEXED BY filao_leased
        WHERE queue = ? AND state = 4 AND {which}
        ORDER BY at
        LIMIT {DUE_MAX}
        """,
        (row.id, *parameters),
    ).fetchall()
    for token, *fields in found:
        books.lose(row, Entry(*fields), token, outcome)


def _expire(books: Books, row: QueueRow) -> None:
    for entry in books.entries(
        f"""
        INDEXED BY filao_expiring
        WHERE queue = ? AND expires_at <= ? AND state IN (2, 3, 5)
        LIMIT {DUE_MAX}
        """,
        (row.id, books.now),
    ):
        if row.rules.on_expiry == "drop":
            books.delete(row, entry, "dropped")
        else:
            books.record(entry, "expired", "it outlived its ttl", "")
            books.die(row, entry, "expired")


def time_to_due(books: Books, row: QueueRow) -> float | None:
    """Return the seconds until the next delayed message or running lease is due, or what is promised to others is not."""
    found = books.db.execute(
        """
        SELECT min(at)
        FROM (
            SELECT min(at) AS at FROM filao_message INDEXED BY filao_delayed WHERE queue = ?1 AND state = 3
            UNION ALL
            SELECT min(at) AS at FROM filao_message INDEXED BY filao_leased WHERE queue = ?1 AND state = 4
        )
        """,
        (row.id,),
    ).fetchone()
    times = [] if found[0] is None else [max(0.0, (found[0] - books.now) / 1000)]
    if row.count["ready"] and not row.paused:
        times.append(waiting.PROMISED_FOR / 1000)
    return min(times, default=None)


# --- settle ----------------------------------------------------------------------------------------------------------


def settle(books: Books, operation: Settle, lessee: Lessee) -> FilaoError | None:
    """End a lease as its outcome says, unless it is no longer the caller's."""
    delivery, outcome = operation.delivery, operation.outcome
    row = books.queue(delivery.queue)
    if row is None:
        return books.not_found(delivery.queue)
    if isinstance(outcome, Ack) and _ack_in_time(books, delivery):
        row.count["leased"] -= 1
        row.count["acked"] += 1
        books.forget(row, _entry(delivery), had_failed=delivery.failures > 0)
        return None
    entry = _held(books, row, delivery)
    if entry is None:
        return _lease_lost(books, delivery)
    match outcome:
        case Ack():
            books.delete(row, entry, "acked")
        case Nack(delay, error):
            row.count["nacked"] += 1
            books.record(entry, "nacked", error, lessee.name)
            _fail(books, row, entry, delay)
        case Reject(error, malformed):
            reason = "malformed" if malformed else "rejected"
            books.record(entry, reason, error, lessee.name)
            books.die(row, entry, reason)
        case _:
            release(books, row, entry)
    return None


def release(books: Books, row: QueueRow, entry: Entry) -> None:
    """Give a leased message back as if it had not been delivered."""
    row.count["released"] += 1
    books.db.execute("UPDATE filao_message SET attempts = attempts - 1 WHERE id = ?", (entry.number,))
    books.give_back(row, entry)


def _is_plain_ack(operation: Operation) -> bool:
    """Return whether it is an ack that has nothing to clear up but its message."""
    if not isinstance(operation, Settle) or not isinstance(operation.outcome, Ack):
        return False
    about = operation.delivery
    return about.group is None and about.dedup_key is None and about.message_id is None and not about.failures


def _ack_together(books: Books, acks: Sequence[Operation]) -> bool:
    """Delete the messages of many acks with a few statements; if one of them is not in time, undo it and return False."""
    deliveries = [ack.delivery for ack in acks if isinstance(ack, Settle)]
    if not _all_in_time(books, _DELETES, (), deliveries):
        return False
    for delivery in deliveries:
        row = books.queue(delivery.queue)
        assert row is not None, "it held a message"
        row.count["leased"] -= 1
        row.count["acked"] += 1
    return True


def _extend_together(books: Books, extends: Sequence[Extend]) -> bool:
    """Extend many leases by the same time with a few statements, or none and return False."""
    if len({extend.seconds for extend in extends}) != 1:
        return False
    until = books.now + round(extends[0].seconds * 1000)
    return _all_in_time(books, _EXTENDS, (until,), [extend.delivery for extend in extends])


def _all_in_time(
    books: Books, statements: Mapping[int, str], first: tuple[int, ...], deliveries: Sequence[Delivery]
) -> bool:
    """Change many messages with a few statements; if one of their leases is not running, undo it and return False."""
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


def _ack_in_time(books: Books, delivery: Delivery) -> bool:
    """Delete a message whose lease is running: the whole of most acks."""
    deleted = books.db.execute(
        "DELETE FROM filao_message WHERE id = ? AND token = ? AND state = 4 AND at > ?",
        (delivery.handle, delivery.token, books.now),
    )
    return deleted.rowcount == 1


def _held(books: Books, row: QueueRow, delivery: Delivery) -> Entry | None:
    """Return the message if this delivery's lease is still the last one; count it when its time had run out."""
    found = books.db.execute(
        f"SELECT at, {ENTRY} FROM filao_message WHERE id = ? AND token = ?",
        (delivery.handle, delivery.token),
    ).fetchone()
    if found is None:
        return None
    at, *fields = found
    entry = Entry(*fields)
    row.count["late"] += entry.state != LEASED or at <= books.now
    return entry


def _fail(books: Books, row: QueueRow, entry: Entry, delay: float | None) -> None:
    again = retry_delay(row.rules, entry.attempts, random.random())
    if again is None:
        books.die(row, entry, "max_attempts")
        return
    wait = round((again if delay is None else delay) * 1000)
    books.give_back(row, entry, at=books.now + wait if wait else None)


def extend(books: Books, operation: Extend) -> FilaoError | None:
    """Let a lease end so many seconds from now; a lease that ran out but was not taken over runs again."""
    delivery = operation.delivery
    row = books.queue(delivery.queue)
    if row is None:
        return books.not_found(delivery.queue)
    entry = _held(books, row, delivery)
    if entry is None or entry.state == BLOCKED:  # blocked: its group went on without it
        return _lease_lost(books, delivery)
    books.db.execute(
        "UPDATE filao_message SET state = 4, at = ? WHERE id = ? AND token = ?",
        (books.now + round(operation.seconds * 1000), delivery.handle, delivery.token),
    )
    books.count_move(row, entry.state, LEASED)
    return None


def _entry(delivery: Delivery) -> Entry:
    return Entry(delivery.handle, LEASED, delivery.attempt, delivery.group, delivery.dedup_key, delivery.message_id)


def _lease_lost(books: Books, delivery: Delivery) -> LeaseLost:
    found = books.db.execute("SELECT state, attempts FROM filao_message WHERE id = ?", (delivery.handle,)).fetchone()
    if found is None:
        now = "it is gone: somebody else finished it, or it was purged"
    elif found[0] == LEASED:
        now = f"another consumer holds it, as attempt {found[1]}"
    else:
        now = f"it is {STATES[found[0]]} again" if found[0] == READY else f"it is {STATES[found[0]]}"
    return LeaseLost(
        f"message {delivery.id} of queue {delivery.queue!r}: the lease of attempt {delivery.attempt} was lost; {now}. "
        f"Nothing was changed. Work that takes longer than the queue's lease must extend it."
    )
