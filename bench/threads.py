"""What it costs when threads of one process send on one file: `python -m bench.threads [--threads 1 8 64]`.

huey stands beside it where it is installed, each of its threads on a connection of its own. Both take turns, and the
median of the rounds is told: sends a second, and the microseconds of CPU of one.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filao
import filao.sync
from bench.peers import QUEUE

BODY = b"x" * 256
ROUNDS = 5
SENDS = 4_000  # in a round

Send = Callable[[], object]


@contextmanager
def _filao(path: Path) -> Generator[Send]:
    with filao.sync.connect(path) as broker:
        broker.declare(filao.Queue(QUEUE))
        yield lambda: broker.send_to_queue(QUEUE, BODY)


@contextmanager
def _huey(path: Path) -> Generator[Send]:
    from huey.storage import SqliteStorage

    storage: Any = SqliteStorage(filename=str(path), fsync=True)
    yield lambda: storage.enqueue(BODY)
    storage.close()


def _round(send: Send, threads: int) -> tuple[float, float]:
    """Return the sends a second, and the microseconds of CPU of one."""

    def work() -> None:
        for _ in range(SENDS // threads):
            send()

    send()
    crew = [threading.Thread(target=work) for _ in range(threads)]
    began, cpu = time.perf_counter(), time.process_time()
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    done = SENDS // threads * threads
    return done / (time.perf_counter() - began), 1e6 * (time.process_time() - cpu) / done


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 8, 64])
    options = parser.parse_args()
    systems = {"Filao": _filao, "huey": _huey}
    try:
        import huey  # noqa: F401
    except ImportError as error:
        print(f"huey: skipped, because {error}")
        del systems["huey"]
    for threads in options.threads:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
        for _ in range(ROUNDS):
            for name, system in systems.items():
                with tempfile.TemporaryDirectory(dir=".") as folder, system(Path(folder) / "db") as send:
                    found[name].append(_round(send, threads))
        for name, rounds in found.items():
            rate, cpu = (statistics.median(figures) for figures in zip(*rounds, strict=True))
            print(f"{threads:>3} threads, {name:<6} {rate:8,.0f} sends a second, {cpu:6.1f} µs of CPU each")


if __name__ == "__main__":
    main()
