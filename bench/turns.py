"""What a send costs in CPU when several processes take turns on one file: `python -m bench.turns [--processes 2 8]`.

For comparing two versions on a machine that is not quiet: run them in turns, and read the least. The shares tell
whether the turns are fair.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import filao
import filao.sync
from bench.peers import QUEUE

BODY = b"x" * 256
ENDED_WITHIN = 60.0  # seconds, beyond those that are measured


def _send(path: str, seconds: float, start: Any, told: Any) -> None:
    with filao.sync.connect(path) as broker:
        broker.send_to_queue(QUEUE, BODY)
        start.wait(ENDED_WITHIN)
        count, began, until = 0, time.process_time(), time.monotonic() + seconds
        while time.monotonic() < until:
            broker.send_to_queue(QUEUE, BODY)
            count += 1
        told.put((count, time.process_time() - began))


def measured(processes: int, seconds: float) -> tuple[float, float, float]:
    """Return the microseconds of CPU of a send, and the smallest and the largest share of all sends."""
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = str(Path(folder) / "filao.db")
        with filao.sync.connect(path) as broker:
            broker.declare(filao.Queue(QUEUE))
        start, told = spawned.Barrier(processes), spawned.Queue()
        crew = [spawned.Process(target=_send, args=(path, seconds, start, told)) for _ in range(processes)]
        for process in crew:
            process.start()
        found = [told.get(timeout=seconds + ENDED_WITHIN) for _ in crew]
        for process in crew:
            process.join()
    counts = [count for count, _ in found]
    return 1e6 * sum(cpu for _, cpu in found) / sum(counts), min(counts) / sum(counts), max(counts) / sum(counts)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    for processes in options.processes:
        cpu, least, most = measured(processes, options.seconds)
        print(f"{processes} processes: {cpu:7.1f} µs of CPU for a send, shares {least:.3f} to {most:.3f}")


if __name__ == "__main__":
    main()
