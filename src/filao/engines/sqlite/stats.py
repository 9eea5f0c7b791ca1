"""What a queue holds, by state: counters, ages, and who receives, each by a bounded number of look-ups at any depth.

`postgresql/functions/stats.sql` and `postgresql/control.py` are the same.
"""

import sqlite3
from collections import Counter

from filao.engine import LEASES_LOOKED_AT, QueueStats, Receiver, instant
from filao.engines.rows import age
from filao.engines.sqlite.books import COUNTERS, TOKEN_MIN, TOKENS_PER_PROCESS, Books, oldest_ready

RECEIVERS_MAX = 1_000  # waiting processes that are returned of one queue

_QUEUES = f"SELECT id, name, paused, {', '.join(COUNTERS)} FROM filao_queue"
_FIRST = {
    "blocked": "SELECT min(id) FROM filao_message INDEXED BY filao_blocked WHERE queue = ? AND state = 5",
    "dead": "SELECT min(id) FROM filao_message INDEXED BY filao_dead WHERE queue = ? AND state = 6",
}
_DUE = "SELECT min(at) FROM filao_message INDEXED BY filao_delayed WHERE queue = ? AND state = 3"
_LEASES = """
    SELECT sent_at, token
    FROM filao_message INDEXED BY filao_leased
    WHERE queue = ? AND state = 4
    ORDER BY at
    LIMIT ?
"""
_WAITING = "SELECT process FROM filao_waiting WHERE queue = ? LIMIT ?"
_PROCESS = "SELECT name, started_at, state, reported_at FROM filao_process WHERE id = ?"


def stats(books: Books, queue: str | None = None) -> list[QueueStats]:
    """Return the counters of every queue, by name, or of one. Raises `QueueNotFound`."""
    db, now = books.db, books.now
    if queue is None:
        found = db.execute(f"{_QUEUES} ORDER BY name").fetchall()
    else:
        found = db.execute(f"{_QUEUES} WHERE name = ?", (queue,)).fetchall()
        if not found:
            raise books.not_found(queue)
    return [
        _counted(db, now, number, name, paused=bool(paused), count=dict(zip(COUNTERS, counted, strict=True)))
        for number, name, paused, *counted in found
    ]


def _counted(
    db: sqlite3.Connection, now: int, number: int, name: str, *, paused: bool, count: dict[str, int]
) -> QueueStats:
    leases = db.execute(_LEASES, (number, LEASES_LOOKED_AT)).fetchall() if count["leased"] else []
    reasons = db.execute("SELECT reason, dead, died FROM filao_reason WHERE queue = ?", (number,)).fetchall()
    return QueueStats(
        name=name,
        paused=paused,
        oldest_ready_age=_age_of(db, now, oldest_ready(db, number) if count["ready"] else None),
        oldest_delayed_age=_overdue(db, now, number) if count["delayed"] else None,
        oldest_leased_age=age(now, min((sent_at for sent_at, _ in leases), default=None)),
        oldest_blocked_age=_age_of(db, now, _first(db, "blocked", number) if count["blocked"] else None),
        oldest_dead_age=_age_of(db, now, _first(db, "dead", number) if count["dead"] else None),
        dead_by_reason={reason: dead for reason, dead, _ in reasons if dead},
        died_by_reason={reason: died for reason, _, died in reasons if died},
        receivers=_receivers(db, now, number, [token for _, token in leases]),
        **count,
    )


def _first(db: sqlite3.Connection, state: str, queue: int) -> int | None:
    number: int | None = db.execute(_FIRST[state], (queue,)).fetchone()[0]
    return number


def _overdue(db: sqlite3.Connection, now: int, queue: int) -> float | None:
    due: int | None = db.execute(_DUE, (queue,)).fetchone()[0]
    return None if due is None or due > now else age(now, due)


def _age_of(db: sqlite3.Connection, now: int, number: int | None) -> float | None:
    if number is None:
        return None
    return age(now, db.execute("SELECT sent_at FROM filao_message WHERE id = ?", (number,)).fetchone()[0])


def _receivers(db: sqlite3.Connection, now: int, queue: int, tokens: list[int]) -> tuple[Receiver, ...]:
    """Return the processes that hold messages or stand on the waiting list, but none that was struck off."""
    held = Counter((token - TOKEN_MIN) // TOKENS_PER_PROCESS for token in tokens)
    waiting = [process for (process,) in db.execute(_WAITING, (queue, RECEIVERS_MAX))]
    receivers: list[Receiver] = []
    for process in dict.fromkeys([*waiting, *held]):
        found = db.execute(_PROCESS, (process,)).fetchone()
        if found is not None:
            name, started_at, state, reported_at = found
            ago = age(now, reported_at) if state else None
            receivers.append(Receiver(name, held[process], instant(started_at), state, ago))
    return tuple(sorted(receivers, key=lambda one: one.name))
