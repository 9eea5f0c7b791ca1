"""What ten million waiting messages cost beside twenty thousand: a claim, a send, the file, the doctor.

`python -m bench.deep [--messages 10000000] [--within 300]`: it fills a file until it holds so many messages or the
seconds are over, and says how many came in. Then a shallow file and the deep one take turns, call by call, in this
thread; told are the least and the median of the CPU of each call, which other load on the machine changes less than
its time.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import filao
import filao.sync

BODY = b"x" * 256
QUEUE = "bench"
SHALLOW = 20_000
TOGETHER = 10_000  # messages in one send while a file is filled
ROUNDS = 2_000


def _fill(broker: filao.sync.Broker, messages: int, within: float) -> int:
    """Send so many messages, or as many as the seconds allow; return how many there are."""
    broker.declare(filao.Queue(QUEUE))
    until = time.monotonic() + within
    for _ in range(0, messages, TOGETHER):
        if time.monotonic() > until:
            break
        broker.send_many(QUEUE, [BODY] * TOGETHER)
    return broker.stats(QUEUE).ready


def _cost(call: Callable[[], object]) -> float:
    """Return the microseconds of CPU that a call takes in this thread."""
    began = time.thread_time()
    call()
    return 1e6 * (time.thread_time() - began)


def _compare(brokers: dict[str, filao.sync.Broker]) -> None:
    costs: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for name, broker in brokers.items():
            held: list[filao.sync.Message[Any]] = []
            calls: dict[str, Callable[[], object]] = {
                "send": partial(broker.send_to_queue, QUEUE, BODY),
                "claim": partial(_claim, broker, held),
                "ack": partial(_ack, held),
            }
            for call, do in calls.items():
                costs.setdefault((call, name), []).append(_cost(do))
    for (call, name), some in costs.items():
        print(f"{call:<6} {name:<8} least {min(some):6.1f} us  median {statistics.median(some):6.1f} us of CPU")


def _claim(broker: filao.sync.Broker, held: list[filao.sync.Message[Any]]) -> None:
    held.append(broker.receive_from_queue(QUEUE))


def _ack(held: list[filao.sync.Message[Any]]) -> None:
    held.pop().ack()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--within", type=float, default=300.0, help="seconds that filling the deep file may take")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        filao.sync.connect(Path(folder) / "shallow.db") as shallow,
        filao.sync.connect(Path(folder) / "deep.db") as deep,
    ):
        _fill(shallow, SHALLOW, options.within)
        began = time.monotonic()
        waiting = _fill(deep, options.messages, options.within)
        took = time.monotonic() - began
        size = sum(path.stat().st_size for path in Path(folder).glob("deep.db*") if path.is_file())
        print(f"{waiting:,} messages wait, sent at {waiting / took:,.0f}/s; {size / 2**20:,.0f} MiB on disk")
        _compare({"shallow": shallow, "deep": deep})
        began = time.monotonic()
        findings = deep.doctor()
        took = time.monotonic() - began
        print(f"the doctor took {took:.1f} s and found {len(findings)}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
