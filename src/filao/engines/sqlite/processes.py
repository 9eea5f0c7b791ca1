"""The processes that receive, and how to clear up after them. `postgresql/functions/processes.sql` is the same."""

import sqlite3
from collections.abc import Iterator

from filao.engines.sqlite.books import Books, QueueRow, tokens
from filao.engines.sqlite.receive import lose_all
from filao.engines.sqlite.settle import release

WATCHED = 3  # processes that each one watches: those entered next, in a circle, so that watching costs all the same
LEASES_AT_ONCE = 2_000  # leases of one process that one transaction ends: some 40 ms of the write lock
TIDY_KEYS = 1_000  # forgotten deduplication keys, and events, deleted in one turn


def enter(books: Books, bell: str, name: str) -> int:
    """Enter a process among those that receive, and return its number."""
    entered = books.db.execute(
        "INSERT INTO filao_process (bell, name, started_at) VALUES (?, ?, ?) RETURNING id", (bell, name, books.now)
    ).fetchone()
    return int(entered[0])


def is_entered(books: Books, process: int, bell: str, name: str) -> bool:
    """Return whether a process is still entered as it was."""
    found = books.db.execute("SELECT bell, name FROM filao_process WHERE id = ?", (process,))
    return found.fetchall() == [(bell, name)]


def watched(books: Books, process: int) -> list[tuple[int, str]]:
    """Return the processes, with their bells, that this one watches; if it dies, its own watcher takes them over."""
    found: list[tuple[int, str]] = []
    for which in ("id > ?", "id < ?"):
        found += books.db.execute(
            f"SELECT id, bell FROM filao_process WHERE {which} AND bell <> '' ORDER BY id LIMIT {WATCHED}", (process,)
        )
    return found[:WATCHED]


def bells(db: sqlite3.Connection) -> list[str]:
    """Return the bells of the processes that are entered; one that could make none has an empty name for it."""
    return [bell for (bell,) in db.execute("SELECT bell FROM filao_process")]


def bury(books: Books, process: int) -> bool:
    """End a slice of the leases of a process that died; when none is left, strike it off and return True."""
    left = LEASES_AT_ONCE
    for row in _leasing(books):
        left -= lose_all(books, row, "token BETWEEN ? AND ?", tokens(process), "crashed", limit=left)
        if not left:
            return False
    _strike_off(books, process)
    return True


def resign(books: Books, process: int) -> bool:
    """Give back a slice of the leases of a process that leaves, attempts unused; when none is left, strike it off and
    return True.
    """
    left = LEASES_AT_ONCE
    for row in _leasing(books):
        held = books.entries(
            "INDEXED BY filao_leased WHERE queue = ? AND state = 4 AND token BETWEEN ? AND ? LIMIT ?",
            (row.id, *tokens(process), left),
        )
        for entry in held:
            release(books, row, entry, books.consumer_of(tokens(process)[0]))
        left -= len(held)
        if not left:
            return False
    _strike_off(books, process)
    return True


def _leasing(books: Books) -> Iterator[QueueRow]:
    """Yield the queues with leased messages; if a queue's rules are unreadable, its leases run out by themselves."""
    for (name,) in books.db.execute("SELECT name FROM filao_queue WHERE leased > 0").fetchall():
        row = books.legible(name)
        if row is not None:
            yield row


def void_leases(db: sqlite3.Connection, now: int) -> None:
    """Let all leases run out now, and strike all processes off the waiting lists, because none of them lives."""
    db.execute("UPDATE filao_message INDEXED BY filao_leased SET at = ? WHERE state = 4 AND at > ?", (now, now))
    db.execute("DELETE FROM filao_waiting")


def _strike_off(books: Books, process: int) -> None:
    books.db.execute("DELETE FROM filao_waiting WHERE process = ?", (process,))
    books.db.execute("DELETE FROM filao_process WHERE id = ?", (process,))


def report(books: Books, process: int, state: str) -> None:
    """Record how a process is doing."""
    books.db.execute("UPDATE filao_process SET state = ?, reported_at = ? WHERE id = ?", (state, books.now, process))


def forget_events(books: Books) -> bool:
    """Forget a slice of the events whose window is over; return whether there may be more."""
    forgotten = books.db.execute(
        f"DELETE FROM filao_event WHERE id IN (SELECT id FROM filao_event WHERE until <= ? LIMIT {TIDY_KEYS})",
        (books.now,),
    )
    return forgotten.rowcount == TIDY_KEYS


def forget_keys(books: Books) -> bool:
    """Forget a slice of the deduplication keys whose window is over; return whether there may be more."""
    forgotten = books.db.execute(
        f"""
        DELETE FROM filao_dedup
        WHERE (queue, kind, key) IN (
            SELECT queue, kind, key FROM filao_dedup WHERE until IS NOT NULL AND until <= ? LIMIT {TIDY_KEYS}
        )
        """,
        (books.now,),
    )
    return forgotten.rowcount == TIDY_KEYS
