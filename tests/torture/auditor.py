"""The auditor: it compares the counters with what is there, again and again, in one read transaction of its own
connection.

It alone knows the tables. What it finds it writes down; the checker makes it a broken promise.
"""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from tests.torture.history import History
from tests.torture.scene import BILLS, LETTERS, Pen, Scene

PACE = 0.3  # seconds from one audit to the next
STATES = ("ready", "delayed", "leased", "blocked", "dead")
KEPT = (*STATES, "acked", "dropped", "purged", "cancelled")
LENGTH_MAX = {queue.name: queue.max_length or 0 for queue in (LETTERS, BILLS)}
Books = dict[str, dict[str, int]]

_COUNTED_FILE = f"SELECT name, {', '.join((*KEPT, 'sent'))} FROM filao_queue"
_THERE_FILE = """
    SELECT q.name, CASE m.state WHEN 2 THEN 'ready' WHEN 3 THEN 'delayed' WHEN 4 THEN 'leased' WHEN 5 THEN 'blocked'
                   ELSE 'dead' END, count(*)
    FROM filao_message m LEFT JOIN filao_queue q ON q.id = m.queue GROUP BY 1, 2
"""
_STRAYS_FILE = "SELECT count(*) FROM filao_failure WHERE message NOT IN (SELECT id FROM filao_message)"
_COUNTED_SERVER = """
    SELECT q.name, c.name, sum(c.value)::bigint FROM filao.queue q JOIN filao.counter c ON c.queue = q.id GROUP BY 1, 2
"""
_THERE_SERVER = """
    SELECT q.name, m.state::text, count(*) FROM filao.message m LEFT JOIN filao.queue q ON q.id = m.queue GROUP BY 1, 2
"""
_STRAYS_SERVER = (
    "SELECT count(*) FROM filao.failure f WHERE NOT EXISTS (SELECT FROM filao.message WHERE id = f.message)"
)


def play(scene: Scene) -> None:
    """Audit until killed."""
    pen = Pen(scene, History(scene.histories / scene.name))
    with _connected(scene) as connection:
        while True:
            began = pen.begin("audit")
            complaints = list(_audit_file(connection) if scene.is_file else _audit_server(connection))
            pen.end(began, "done", {"text": "; ".join(complaints)})
            time.sleep(PACE)


@contextmanager
def _connected(scene: Scene) -> Iterator[Any]:
    if scene.is_file:
        with closing(sqlite3.connect(scene.db, isolation_level=None, timeout=30)) as file:
            yield file
        return
    import psycopg

    with psycopg.connect(str(scene.db), autocommit=True) as server:
        yield server


def _audit_file(file: sqlite3.Connection) -> Iterator[str]:
    file.execute("BEGIN")
    counted = {name: dict(zip((*KEPT, "sent"), row, strict=True)) for name, *row in file.execute(_COUNTED_FILE)}
    there = file.execute(_THERE_FILE).fetchall()
    (strays,) = file.execute(_STRAYS_FILE).fetchone()
    file.execute("COMMIT")
    yield from complaints_of(counted, there, strays)


def _audit_server(server: Any) -> Iterator[str]:
    counted: Books = {}
    with server.transaction():
        server.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        for name, counter, value in server.execute(_COUNTED_SERVER).fetchall():
            counted.setdefault(name, {})[counter] = value
        there = server.execute(_THERE_SERVER).fetchall()
        (strays,) = server.execute(_STRAYS_SERVER).fetchone()
    yield from complaints_of(counted, there, strays)


def complaints_of(counted: Books, rows: list[tuple[str | None, str, int]], strays: int) -> Iterator[str]:
    """Compare the books with what is there."""
    there: dict[str | None, Counter[str]] = {name: Counter() for name in counted}
    for name, state, count in rows:
        there.setdefault(name, Counter())[state] = count
    for name, states in there.items():
        books = counted.get(name or "", {})
        if name is None:
            yield f"{states.total()} messages are of no queue"
            continue
        for state in STATES:
            if states[state] != books.get(state, 0):
                yield f"{name}: {books.get(state, 0)} {state} by the counters, {states[state]} there"
        if books.get("sent", 0) != sum(books.get(state, 0) for state in KEPT):
            yield f"{name}: the counters don't add up: {books}"
        length = states.total() - states["dead"]
        if length > LENGTH_MAX.get(name, length):
            yield f"{name}: {length} wait or are leased, of {LENGTH_MAX[name]} allowed"
    if strays:
        yield f"{strays} failures are of no message"
