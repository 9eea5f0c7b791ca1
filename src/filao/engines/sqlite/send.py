"""Sending: room, deduplication, storing. `postgresql/functions/send.sql` is the same in SQL."""

from collections.abc import Sequence

from filao.draft import too_large
from filao.engine import Draft, Receipt, Send
from filao.engines.sqlite import moves
from filao.engines.sqlite.books import BLOCKED, DELAYED, LEASED, NO_TOKEN, READY, Books, Entry, QueueRow, oldest_ready
from filao.errors import FilaoError
from filao.process import process_name
from filao.queue import full


def send(books: Books, operation: Send) -> list[Receipt] | FilaoError:
    """Store the drafts that are not duplicates, all or none."""
    row = books.queue(operation.queue)
    if row is None:
        return books.not_found(operation.queue)
    drafts = operation.drafts
    for draft in drafts:
        if len(draft.content) > row.rules.body_max:
            return too_large(row.rules.name, len(draft.content), row.rules.body_max)
    claims = [moves.keys(draft.dedup_key, draft.message_id) for draft in drafts]
    came_first = _came_first(books, row, claims) if any(claims) else [None] * len(drafts)
    new = came_first.count(None)
    if row.rules.max_length is not None and new and not _has_room(books, row, new, row.rules.max_length):
        row.count["refused"] += len(drafts)
        return full(row.rules, row.pending(), new)
    receipts: list[Receipt] = []
    for draft, claimed, first in zip(drafts, claims, came_first, strict=True):
        if first is None:
            receipts.append(_store(books, row, draft, claimed))
        else:
            row.count["duplicates"] += 1
            receipts.append(Receipt(first if isinstance(first, str) else receipts[first].id, True))
    return receipts


def _came_first(books: Books, row: QueueRow, claims: Sequence[Sequence[tuple[int, str]]]) -> list[str | int | None]:
    """Return for each draft what it is a duplicate of: a message's id, or another draft's place; None when it is new.

    The drafts are decided in order, and only a new one claims its keys against those behind it. All this is decided
    before room is made: a message that is dropped for it frees no key for this send, and exactly the new are stored.
    """
    claimed: dict[tuple[int, str], int] = {}
    found: list[str | int | None] = []
    for place, wanted in enumerate(claims):
        first: str | int | None = None
        for key in wanted:
            first = claimed[key] if key in claimed else moves.remembered(books, row, *key)
            if first is not None:
                break
        else:
            for key in wanted:
                claimed[key] = place
        found.append(first)
    return found


def _store(books: Books, row: QueueRow, draft: Draft, claimed: Sequence[tuple[int, str]]) -> Receipt:
    number = books.next_number()
    now = books.now
    at = now + round(draft.delay * 1000) if draft.delay else now
    state = READY if at == now else DELAYED
    if draft.group is not None:
        state = _state_in_group(books, row, draft.group, state)
    ttl = row.rules.ttl if draft.ttl is None else draft.ttl
    expires_at = None if ttl is None else now + round(ttl * 1000)
    if expires_at is not None:
        row.expires_from = min(row.expires_from, expires_at)
    name, salt = books.salted(number) if draft.message_id is None else (draft.message_id, None)
    place = (number, row.id, state, draft.priority, at, NO_TOKEN, now, expires_at, draft.group)
    content = (draft.dedup_key, draft.message_id, draft.headers, draft.kind, draft.content, salt)
    books.insert(row, state, (*place, *content))
    if claimed:
        moves.remember(books, row, claimed, name)
    if row.rules.history:
        books.note(row, name, "sent", 0, by=process_name())
    return Receipt(name)


def _state_in_group(books: Books, row: QueueRow, group: str, state: int) -> int:
    """Return the state of a group's new message: blocked, unless it is the first, or delayed where groups skip."""
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


def _has_room(books: Books, row: QueueRow, new: int, most: int) -> bool:
    """Make room for so many new messages, or return False: expired ones go first, then those that may be dropped."""
    while row.pending() + new > most and moves.let_expire(books, row):
        pass
    surplus = row.pending() + new - most
    drops = row.rules.overflow == "drop_oldest" and new <= most
    return surplus <= 0 or (drops and _drop_oldest(books, row, surplus))


def _drop_oldest(books: Books, row: QueueRow, surplus: int) -> bool:
    """Make so many waiting messages dead letters, the oldest first; or none, and return False, if there are fewer."""
    books.flush()
    counted, reasons, events = dict(row.count), len(row.reasons), len(books.events)
    books.db.execute("SAVEPOINT room")
    for _ in range(surplus):
        oldest = _oldest_waiting(books, row)
        if oldest is None:
            books.db.execute("ROLLBACK TO room")
            books.db.execute("RELEASE room")
            row.count = counted
            del row.reasons[reasons:], books.events[events:]
            return False
        moves.record(
            books, row, oldest, "overflow", "the queue was full and its rule is to drop the oldest", consumer=""
        )
        moves.die(books, row, oldest, "overflow")
    books.db.execute("RELEASE room")
    return True


def _oldest_waiting(books: Books, row: QueueRow) -> Entry | None:
    number = oldest_ready(books.db, row.id)
    if number is not None:
        return books.entries("WHERE id = ?", (number,))[0]
    delayed = books.entries(
        "INDEXED BY filao_delayed WHERE queue = ? AND state = 3 ORDER BY at LIMIT 1",
        (row.id,),
    )
    return delayed[0] if delayed else None
