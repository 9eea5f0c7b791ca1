"""Sending: room, deduplication, storing. `postgresql/functions/send.sql` is the same in SQL."""

from collections.abc import Sequence

from filao.draft import too_large
from filao.engine import Draft, Receipt, Send
from filao.engines.sqlite import moves
from filao.engines.sqlite.books import BLOCKED, DELAYED, LEASED, NO_TOKEN, READY, Books, Entry, QueueRow, oldest_ready
from filao.errors import FilaoError, QueueFull


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
    known = moves.keys(draft.dedup_key, draft.message_id)
    first = moves.remembered(books, row, known) if known else None
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
        moves.remember(books, row, known, name)
    return Receipt(name)


def _state_in_group(books: Books, row: QueueRow, group: str, state: int) -> int:
    """Return the state of a group's new message: blocked, unless it is the first or waits for its own time."""
    if state == DELAYED and row.rules.group_failure == "skip":
        return DELAYED
    if (row.id, group) not in books.occupied:
        books.occupied.add((row.id, group))
        if not moves.is_halted(books, row, group) and not _is_occupied(books, row, group):
            return state
    return BLOCKED


def _is_occupied(books: Books, row: QueueRow, group: str) -> bool:
    states = (READY, LEASED, BLOCKED) if row.rules.group_failure == "skip" else (READY, DELAYED, LEASED, BLOCKED)
    return any(moves.first(books, row, group, state) is not None for state in states)


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
        known = moves.keys(draft.dedup_key, draft.message_id)
        new += not seen.intersection(known) and moves.remembered(books, row, known) is None
        seen.update(known)
    return new


def _drop_oldest(books: Books, row: QueueRow, surplus: int) -> int:
    """Make up to `surplus` waiting messages dead letters, the oldest first, and return how many there were."""
    books.flush()
    for dropped in range(surplus):
        oldest = _oldest_waiting(books, row)
        if oldest is None:
            return dropped
        moves.record(books, oldest, "overflow", "the queue was full and its rule is to drop the oldest", "")
        moves.die(books, row, oldest, "overflow")
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
