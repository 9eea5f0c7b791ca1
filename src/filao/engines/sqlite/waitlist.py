"""The waiting list: which processes to call when a queue gets something, and for how much.

The processes that have waited longest are called first, as many as what is ready needs. What a process is called for is
promised to it for a moment, so that a busier one, which comes by before it has woken up, does not jump the queue:
without the promise, the load would settle on the processes that already run. A process that does not come in that time
is stopped or blocked: it is no longer waited for, and is not called again until it comes and waits anew.
"""

from typing import NamedTuple

from filao.engines.sqlite.books import Books, QueueRow

PROMISED_FOR = 100  # milliseconds: a hundred times what waking takes; a process that takes longer is stopped, or dead
_CALLED_MAX = 100  # processes that one transaction calls, to bound its work: each of them calls the next


class Call(NamedTuple):
    """A process to wake, and for which queue."""

    process: int
    bell: str
    queue: int


def wait(books: Books, row: QueueRow, process: int, wants: int) -> None:
    """Put a process on the list, or let it wait again if it was called in vain; it keeps its place."""
    books.db.execute(
        """
        INSERT INTO filao_waiting (queue, since, process, wants, called_at)
        VALUES (?, (SELECT coalesce(max(since), 0) + 1 FROM filao_waiting WHERE queue = ?), ?, ?, 0)
        ON CONFLICT DO UPDATE SET wants = excluded.wants, called_at = 0
        WHERE wants <> excluded.wants OR called_at <> 0
        """,  # a look in vain writes nothing
        (row.id, row.id, process, wants),
    )
    row.nobody_to_call = False


def leave(books: Books, row: QueueRow, process: int) -> None:
    """Strike a process off the list: it got something, or no longer waits."""
    books.db.execute("DELETE FROM filao_waiting WHERE queue = ? AND process = ?", (row.id, process))


def promised(books: Books, row: QueueRow, process: int) -> int:
    """Return how many messages a process must leave to others; 0 if it was called itself."""
    if row.nobody_to_call and books.now > row.promised_until:
        return 0
    own, others = books.db.execute(
        """
        SELECT total(wants) FILTER (WHERE process = ?), total(wants) FILTER (WHERE process <> ?)
        FROM filao_waiting
        WHERE queue = ? AND called_at BETWEEN ? AND ?
        """,
        (process, process, row.id, books.now - PROMISED_FOR, books.now),
    ).fetchone()
    return 0 if own else int(others)


def calls(books: Books) -> list[Call]:
    """Choose the processes to call for what this transaction did, and note that they were called."""
    rows = [
        row
        for row in books.rows()
        if not row.nobody_to_call and not row.paused and (row.delayed or (row.fresh and row.count["ready"] > 0))
    ]
    return [call for row in rows for call in _called(books, row)]


def _waiting(books: Books, row: QueueRow) -> list[tuple[int, str, int, int]]:
    """Return the processes that have waited longest: number, bell, messages wanted, and whether it was just called."""
    return books.db.execute(
        f"""
        SELECT p.id, p.bell, w.wants, w.called_at BETWEEN ? AND ?
        FROM filao_waiting w
        JOIN filao_process p ON p.id = w.process
        WHERE w.queue = ? AND (w.called_at = 0 OR w.called_at BETWEEN ? AND ?)
        ORDER BY w.since
        LIMIT {_CALLED_MAX}
        """,
        (books.now - PROMISED_FOR, books.now, row.id, books.now - PROMISED_FOR, books.now),
    ).fetchall()


def _called(books: Books, row: QueueRow) -> list[Call]:
    """Choose those that have waited longest: enough for what is ready, and one for each message that was delayed."""
    waiting = _waiting(books, row)
    ready = row.count["ready"] - sum(wants for *_, wants, called in waiting if called)
    delayed = row.delayed
    chosen: list[Call] = []
    for process, bell, wants, called in waiting:
        if ready <= 0 and delayed <= 0:
            break
        if not called:
            chosen.append(Call(process, bell, row.id))
            ready -= wants
            delayed -= 1
    reached = len(waiting) < _CALLED_MAX and all(bell for _, bell, *_ in waiting)
    row.nobody_to_call = reached and len(chosen) + sum(called for *_, called in waiting) == len(waiting)
    row.promised_until = books.now + PROMISED_FOR if waiting else 0
    if not chosen:
        return chosen
    now = books.now
    promise = "UPDATE filao_waiting SET called_at = ? WHERE queue = ? AND process = ?"
    books.db.executemany(promise, [(now if call.bell else 0, row.id, call.process) for call in chosen])
    return chosen
