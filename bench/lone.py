"""What a lone call costs, beside a raw commit and huey's: `python -m bench.lone`, or `make bench ARGS="--only lone"`.

All stand in one process and take turns call by call, so that whatever disturbs the machine disturbs them alike. A
quarter of the calls are faster than the figure that is told: a busy disk makes the others longer, whosever they are.
"""

import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filao
import filao.sync
from bench.measures import Ground
from bench.peers import QUEUE

BODY = b"x" * 256
ROUNDS = 2_000
Call = Callable[[], object]


def lone(ground: Ground) -> dict[str, float]:
    """Return the microseconds of a lone send, and of a lone receive with its ack, by who does it."""
    return measured(Path(ground.place("Filao")), ground.count(ROUNDS))


def measured(folder: Path, rounds: int) -> dict[str, float]:
    """Measure in a folder; huey where it is installed."""
    with (
        filao.sync.connect(folder / "filao.db") as broker,
        asyncio.Runner() as runner,
        _raw(folder) as commit,
    ):
        broker.declare(filao.Queue(QUEUE))
        alone = filao.connect(folder / "async.db")
        runner.run(alone.open())
        runner.run(alone.declare(filao.Queue(QUEUE)))
        calls: dict[str, Call] = {
            "raw commit": commit,
            "filao.sync, send": lambda: broker.send_to_queue(QUEUE, BODY),
            "filao.sync, receive and ack": lambda: broker.receive_from_queue(QUEUE).ack(),
        }
        calls |= _huey(folder)
        times: dict[str, list[float]] = {name: [] for name in (*calls, "filao, send")}
        for _ in range(rounds + 50):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
            times["filao, send"].append(runner.run(_timed(alone)))
        runner.run(alone.close())
    return {name: 1e6 * sorted(some[50:])[len(some[50:]) // 4] for name, some in times.items()}


async def _timed(broker: filao.Broker) -> float:
    await asyncio.sleep(0)  # the loop runs, as it does in a program that is at work
    began = time.perf_counter()
    await broker.send_to_queue(QUEUE, BODY)
    return time.perf_counter() - began


@contextmanager
def _raw(folder: Path) -> Generator[Call]:
    """Commit the same row by hand, durably."""
    db = sqlite3.connect(folder / "raw.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE message (id INTEGER PRIMARY KEY, queue INTEGER, state INTEGER, body BLOB)")

    def commit() -> None:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO message (queue, state, body) VALUES (1, 2, ?)", (BODY,))
        db.execute("COMMIT")

    try:
        yield commit
    finally:
        db.close()


def _huey(folder: Path) -> dict[str, Call]:
    try:
        from huey.storage import SqliteStorage
    except ImportError as error:
        print(f"huey: skipped, because {error}")
        return {}
    storage: Any = SqliteStorage(filename=str(folder / "huey.db"), fsync=True)
    return {"huey, enqueue": lambda: storage.enqueue(BODY), "huey, dequeue": storage.dequeue}


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = measured(Path(folder), rounds)
    for name, microseconds in sorted(found.items(), key=lambda one: one[1]):
        print(f"{name:<28} {microseconds:7.1f} µs   {microseconds - found['raw commit']:+7.1f} over a raw commit")


if __name__ == "__main__":
    main()
