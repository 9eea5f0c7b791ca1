"""Worker frameworks: jobs a second enqueued, each confirmed durable, and worked on by two processes."""

import asyncio
import importlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filao
from bench.jobs.tally import Tally, read
from bench.measures import ROUNDS, Ground

JOBS = 10_000
MORE = {"Filao": 6}  # times as many, so that it too takes some seconds
ENDS_WITHIN = 120.0  # seconds
FRAMEWORKS = {"Filao": "filao", "huey": "huey", "Dramatiq": "dramatiq", "Celery": "celery"}
ON_RABBITMQ = ("Dramatiq", "Celery")


def working(ground: Ground) -> dict[str, Any]:
    """Jobs a second enqueued and processed; whether a handler that burns CPU keeps its lease; a worker's memory."""
    rates: dict[str, dict[str, list[float]]] = {"enqueue": {}, "process": {}}
    names = [name for name in FRAMEWORKS if is_there(name, ground)]
    for _ in range(ROUNDS):
        for name in names:
            count = max(500, round(JOBS * MORE.get(name, 1) * ground.scale))
            enqueued, processed = _measure(ground, name, count)
            rates["enqueue"].setdefault(name, []).append(enqueued)
            rates["process"].setdefault(name, []).append(processed)
    found: dict[str, Any] = {
        what: {name: statistics.median(figures) for name, figures in by_name.items()} for what, by_name in rates.items()
    }
    return found | {"burning": asyncio.run(_burning(ground)), "memory": _memory(ground)}


def is_there(name: str, ground: Ground) -> bool:
    """Return whether a framework can be measured; if not, print why."""
    try:
        importlib.import_module(FRAMEWORKS[name])
    except ImportError as error:
        print(f"{name}: skipped, because {error}")
        return False
    return name not in ON_RABBITMQ or "RabbitMQ" in ground.ports


def _measure(ground: Ground, name: str, count: int) -> tuple[float, float]:
    folder = _place(ground)
    command = [sys.executable, "-m", "bench.jobs", FRAMEWORKS[name], str(count)]
    said = subprocess.run(command, env=_environment(ground, folder), check=True, capture_output=True, text=True).stdout
    with _workers(ground, folder, importlib.import_module(f"bench.jobs.{FRAMEWORKS[name]}_app").COMMAND):
        done = _wait_for(folder, count + 1)  # and the one that connected
    return float(said), (done.jobs - 1) / (done.last - done.first)


def _place(ground: Ground) -> Path:
    folder = ground.folder / f"jobs-{time.monotonic_ns()}"
    folder.mkdir()
    return folder


def _environment(ground: Ground, folder: Path) -> dict[str, str]:
    return os.environ | {"BENCH_FOLDER": str(folder), "BENCH_RABBITMQ": ground.ports.get("RabbitMQ", "")}


@contextmanager
def _workers(ground: Ground, folder: Path, command: list[str]) -> Generator["subprocess.Popen[bytes]"]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=_environment(ground, folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(folder: Path, count: int) -> Tally:
    until = time.monotonic() + ENDS_WITHIN
    while (done := read(folder)).jobs < count:
        if time.monotonic() > until:
            raise RuntimeError(
                f"{done.jobs} of {count} jobs after {ENDS_WITHIN:g} s: {(folder / 'log').read_text()[-500:]}"
            )
        time.sleep(0.02)
    return done


async def _burning(ground: Ground) -> dict[str, int]:
    """Return how many leases two handlers lost that burn CPU for three times their lease, one after the other."""
    folder = _place(ground)
    async with filao.connect(folder / "filao.db") as broker:
        await broker.declare(filao.Queue("jobs"), filao.Queue("burning", lease=1.0))
        await broker.send_many("burning", range(2))
        with _workers(ground, folder, ["filao", "work", "bench.jobs.filao_app:worker"]):
            while (stats := await broker.stats("burning")).acked < 2 and not stats.dead:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    return {"lost": stats.lost, "received": stats.received}


def _memory(ground: Ground) -> list[int]:
    """Return the resident pages of a worker process after each tenth of 200,000 messages."""
    folder, count, pages = _place(ground), max(2_000, round(200_000 * ground.scale)), list[int]()
    command = [sys.executable, "-m", "bench.jobs", "filao", str(count)]
    subprocess.run(command, env=_environment(ground, folder), check=True, capture_output=True)
    with _workers(ground, folder, ["filao", "work", "bench.jobs.filao_app:worker"]) as process:
        for tenth in range(1, 11):
            _wait_for(folder, count * tenth // 10)
            pages.append(int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1]))
    return pages
