"""What a lone call costs, beside a raw commit and huey's: `python -m bench.lone`, or `make bench ARGS="--only lone"`.

All stand in one process and take turns call by call, so that whatever disturbs the machine disturbs them alike. A
quarter of the calls are faster than the figure that is told: a busy disk makes the others longer, whosever they are.

`--cpu` tells what a call costs in CPU instead, of all threads, with the file in memory: the least of many short rounds,
for comparing two versions on a machine that is not quiet.
"""

import argparse
import asyncio
import gc
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import filao
import filao.sync
from bench.measures import Ground
from bench.peers import QUEUE

BODY = b"x" * 256
ROUNDS = 2_000
TOGETHER, SHORT_ROUNDS = 40, 80  # calls in a round for CPU, and rounds
QUEUES = 60  # that a process knows, at most a few fewer than it keeps in mind
MEMORY = Path("/dev/shm")
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


class _Costs:
    """The least that a call took, in microseconds of CPU, by its name."""

    def __init__(self) -> None:
        self.least: dict[str, float] = {}

    def note(self, name: str, began: float) -> None:
        """Learn that a round has ended."""
        took = 1e6 * (time.process_time() - began) / TOGETHER
        self.least[name] = min(took, self.least.get(name, took))

    def of(self, name: str, call: Call) -> None:
        """Measure a round of calls."""
        began = time.process_time()
        for _ in range(TOGETHER):
            call()
        self.note(name, began)

    async def of_async(self, name: str, call: Callable[[], Awaitable[object]]) -> None:
        """Measure a round of calls of the async face."""
        began = time.process_time()
        for _ in range(TOGETHER):
            await call()
        self.note(name, began)


async def _async_costs(costs: _Costs, path: Path) -> None:
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue(QUEUE))

        async def receive_and_ack() -> None:
            await (await broker.receive_from_queue(QUEUE)).ack()

        for _ in range(SHORT_ROUNDS):
            await costs.of_async("filao, send", lambda: broker.send_to_queue(QUEUE, BODY))
            await costs.of_async("filao, receive and ack", receive_and_ack)


def _receive(broker: filao.sync.Broker, held: list[filao.sync.Message[Any]]) -> None:
    held.append(broker.receive_from_queue(QUEUE))


def _ack(held: list[filao.sync.Message[Any]]) -> None:
    held.pop().ack()


def _cpu(folder: Path) -> dict[str, float]:
    """Return the microseconds of CPU of a lone call."""
    costs = _Costs()
    gc.disable()  # when it runs is chance
    with filao.sync.connect(folder / "filao.db") as broker:
        broker.declare(filao.Queue(QUEUE))
        for _ in range(SHORT_ROUNDS):
            held: list[filao.sync.Message[Any]] = []
            costs.of("filao.sync, send", lambda: broker.send_to_queue(QUEUE, BODY))
            costs.of("filao.sync, receive", partial(_receive, broker, held))
            costs.of("filao.sync, ack", partial(_ack, held))
            costs.of("filao.sync, send", lambda: broker.send_to_queue(QUEUE, BODY))
            costs.of("filao.sync, receive and ack", lambda: broker.receive_from_queue(QUEUE).ack())
        others = [filao.Queue(f"{QUEUE}.{number}") for number in range(QUEUES)]
        broker.declare(*others)
        for _ in range(SHORT_ROUNDS):
            for queue in others:
                broker.send_to_queue(queue, BODY)  # so that it is known: housekeeping forgets, once in a second
            costs.of(f"filao.sync, send, {QUEUES} queues", lambda: broker.send_to_queue(QUEUE, BODY))
    asyncio.run(_async_costs(costs, folder / "async.db"))
    return costs.least


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=ROUNDS)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=MEMORY if options.cpu else ".") as folder:
        found = _cpu(Path(folder)) if options.cpu else measured(Path(folder), options.rounds)
    for name, microseconds in sorted(found.items(), key=lambda one: one[1]):
        over = "of CPU" if options.cpu else f"{microseconds - found['raw commit']:+7.1f} over a raw commit"
        print(f"{name:<28} {microseconds:7.1f} µs   {over}")


if __name__ == "__main__":
    main()
