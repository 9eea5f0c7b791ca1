"""Receiving: what is due, the lease, the waiting list. `postgresql/functions/receive.sql` is the same in SQL."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from filao.engine import Delivery, Receive, Received
from filao.engines.sqlite import moves, waitlist
from filao.engines.sqlite.books import ENTRY, ROWS_AT_ONCE, TOKENS_PER_PROCESS, Books, QueueRow, slices, tokens
from filao.engines.waiters import deal
from filao.errors import FilaoError

# Looked for first, and then leased by their numbers: RETURNING is a trigger, and costs a quarter more than this does.
_NEXT = """
    SELECT id, attempts + 1, priority, grp, dedup_key, message_id, headers, kind, content, sent_at, failures, salt
    FROM filao_message INDEXED BY filao_ready
    WHERE queue = ? AND state = 2 AND (expires_at IS NULL OR expires_at > ?)
    ORDER BY priority DESC, id
    LIMIT ?
"""
_LEASES = {
    rows: f"""
    UPDATE filao_message
    SET state = 4, at = ?, token = ?, attempts = attempts + 1
    WHERE id IN ({", ".join("?" * rows)})
    """
    for rows in ROWS_AT_ONCE
}


@dataclass(slots=True)
class Lessee:
    """The process that receives: its leases carry its number, so that they can be found when it dies."""

    process: int
    name: str
    leases: int = field(default_factory=lambda: secrets.randbits(31))
    """How many, counted from a random number, so that in a restored file the same process number has other tokens."""
    waits: set[int] = field(default_factory=set[int])
    """The queues on whose waiting lists it may stand."""

    def next_token(self) -> int:
        """Return a token that no other lease ever had; those of one statement share it."""
        self.leases = (self.leases + 1) % TOKENS_PER_PROCESS
        return tokens(self.process)[0] + self.leases


NOBODY: Lessee = Lessee(0, "")
"""A process that has not entered itself among those that receive."""


def receive(books: Books, asked: Sequence[Receive], lessee: Lessee) -> Sequence[Received | FilaoError]:
    """Serve receives of the same terms with one look, and deal what it finds like cards."""
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
    # A message is leased to one process, by a token that no lease had before, and never past a promise: what others
    # were called for is left to them while the promise lasts.
    books.flush()
    make_due(books, row)
    limit = sum(one.limit for one in asked)
    if row.count["ready"] and all(one.waiting for one in asked):
        limit = min(limit, row.count["ready"] - waitlist.promised(books, row, lessee.process))
    if not row.count["ready"] or limit <= 0:
        return []
    token = lessee.next_token()
    until = books.now + round((asked[0].lease or row.rules.lease) * 1000)
    found = books.db.execute(_NEXT, (row.id, books.now, limit)).fetchall()
    for some in slices(found):
        books.db.execute(_LEASES[len(some)], (until, token, *[number for number, *_ in some]))
    row.count["ready"] -= len(found)
    row.count["leased"] += len(found)
    row.count["received"] += len(found)
    row.fresh = True  # if any is left, it is for the next who waits
    leased = [_delivery(books, row.rules.name, token, fields) for fields in found]
    if row.rules.history:
        for delivery in leased:
            books.note(row, delivery.id, "received", delivery.attempt, by=lessee.name)
    return leased


def _queue_up(books: Books, row: QueueRow, lessee: Lessee, wants: int, *, served: bool) -> None:
    """Put the process on the queue's waiting list for so many messages; at its end if it was served."""
    if served and row.id in lessee.waits:
        waitlist.leave(books, row, lessee.process)
        lessee.waits.discard(row.id)
    if wants:
        waitlist.wait(books, row, lessee.process, wants)
        lessee.waits.add(row.id)


def _delivery(books: Books, queue: str, token: int, fields: Sequence[Any]) -> Delivery:
    number, attempt, priority, group, dedup_key, message_id, headers, kind, content, sent_at, failures, salt = fields
    name = books.name_of(number, message_id, salt)
    about = (priority, group, dedup_key, message_id, headers, kind, content, sent_at, failures)
    return Delivery(queue, name, number, token, attempt, *about, bool(failures) and moves.has_crashed(books, number))


def make_due(books: Books, row: QueueRow) -> None:
    """Make ready what is due: delayed messages, and those whose lease ran out. Bury what outlived its ttl."""
    # Every ready message may be leased, so none is ready that is not due, that another holds, or that outlived its ttl.
    # The number of each kind is bounded; what is left is still due, and the next receive goes on with it.
    if row.count["delayed"]:
        for entry in books.entries(
            f"INDEXED BY filao_delayed WHERE queue = ? AND state = 3 AND at <= ? ORDER BY at LIMIT {moves.DUE_MAX}",
            (row.id, books.now),
        ):
            moves.give_back(books, row, entry)
    if row.count["leased"]:
        lose_all(books, row, "at <= ?", (books.now,), "lease_expired")
    moves.let_expire(books, row)


def lose_all(
    books: Books,
    row: QueueRow,
    which: str,
    parameters: tuple[object, ...],
    outcome: str,
    *,
    limit: int = moves.DUE_MAX,
) -> int:
    """End up to `limit` leases of a queue that a clause finds, the oldest first, and return how many there were."""
    found = books.db.execute(
        f"""
        SELECT token, {ENTRY}
        FROM filao_message INDEXED BY filao_leased
        WHERE queue = ? AND state = 4 AND {which}
        ORDER BY at
        LIMIT ?
        """,
        (row.id, *parameters, limit),
    ).fetchall()
    for token, *fields in found:
        moves.lose(books, row, books.entry(fields), token, outcome)
    return len(found)


def look(books: Books, queue: str) -> float | None:
    """Return in how many seconds those who wait should look: at once (0), or not before they are called (None).

    It takes nothing and writes nothing. It is for commits that rang no bell.
    """
    row = books.legible(queue)
    if row is None:
        return 0.0  # so that those who wait learn that it was deleted, or what is wrong with it
    if row.paused or not row.pending():
        return None
    return 0.0 if row.count["ready"] else time_to_due(books, row)


def time_to_due(books: Books, row: QueueRow) -> float | None:
    """Return the seconds until the next delayed message or running lease is due, or until promises to others end.

    None while the queue is paused: resuming it calls those who wait.
    """
    if row.paused:
        return None
    found = books.db.execute(
        """
        SELECT min(at)
        FROM (
            SELECT min(at) AS at FROM filao_message INDEXED BY filao_delayed WHERE queue = ? AND state = 3
            UNION ALL
            SELECT min(at) AS at FROM filao_message INDEXED BY filao_leased WHERE queue = ? AND state = 4
        )
        """,
        (row.id, row.id),
    ).fetchone()
    times = [] if found[0] is None else [max(0.0, (found[0] - books.now) / 1000)]
    if row.count["ready"]:
        times.append(waitlist.PROMISED_FOR / 1000)
    return min(times, default=None)
