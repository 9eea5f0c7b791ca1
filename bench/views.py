"""A Django view that sends one message, under gunicorn with threads: requests a second, and how long one takes."""

import http.client
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.measures import ROUNDS, Ground
from bench.working import is_there

SYSTEMS = ("Filao", "huey", "Dramatiq")
THREADS = 8  # of gunicorn, ...
CLIENTS = 8  # ... and as many who ask, each again as soon as it was answered
REQUESTS = 4_000
STARTS_WITHIN = 30.0  # seconds
PATIENCE = 30.0  # seconds for one answer


def views(ground: Ground) -> dict[str, dict[str, float]]:
    """Return requests a second and milliseconds (median, p99) by what sends, the median of rounds taken in turns."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS if is_there(name, ground)}
    for _ in range(ROUNDS):
        for name, found in rounds.items():
            with _served(ground, name) as port:
                _ask(port, CLIENTS * 20)
                found.append(_ask(port, ground.count(REQUESTS)))
    return {
        name: {what: statistics.median(one[what] for one in found) for what in found[0]}
        for name, found in rounds.items()
    }


@contextmanager
def _served(ground: Ground, name: str) -> Generator[int]:
    folder = ground.folder / f"view-{time.monotonic_ns()}"
    folder.mkdir()
    port = _free_port()
    served = [
        "--worker-class",
        "gthread",
        "--threads",
        str(THREADS),
        "--bind",
        f"127.0.0.1:{port}",
        "--keep-alive",
        "60",
    ]
    environment = os.environ | {
        "BENCH_SYSTEM": name,
        "BENCH_FOLDER": str(folder),
        "BENCH_RABBITMQ": ground.ports.get("RabbitMQ", ""),
    }
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "gunicorn", *served, "bench.jobs.view:application"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(port, process, folder / "log")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"gunicorn does not serve: {log.read_text()[-500:]}") from None
            time.sleep(0.05)
        else:
            return


def _ask(port: int, count: int) -> dict[str, float]:
    """Ask so many times, from as many threads as there are clients, each on a connection of its own."""
    times: list[float] = []
    failures: list[Any] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for _ in range(count // CLIENTS):
            began = time.perf_counter()
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            times.append(time.perf_counter() - began)
            if answer.status != http.client.NO_CONTENT:
                failures.append(answer.status)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failures or not times:
        raise RuntimeError(f"{len(failures)} requests were not answered as they should: {failures[:3]}")
    times.sort()
    return {
        "rate": len(times) / seconds,
        "median": 1000 * statistics.median(times),
        "p99": 1000 * times[int(len(times) * 0.99)],
    }
