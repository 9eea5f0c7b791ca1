"""What the dashboard costs: the time of each page, the processor's time for it, and ten open tabs for half a minute.

Run: python -m bench.dashboard [--engine postgresql] [--waiting 1000000]
"""

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import httpx
from tests.support.servers import postgres_server

import filao

QUEUES, DEAD, ROUNDS, TABS, TABS_FOR = 1_000, 10_000, 20, 10, 30.0
ERRORS = (ValueError("bad amount"), KeyError("policy"), RuntimeError("no answer"), "duplicate")
TICKS = os.sysconf("SC_CLK_TCK")


async def _fill(url: str, waiting: int) -> None:
    """Half of what waits is in one queue, the rest in all; so are the dead letters."""
    names = [f"queue{number:04}" for number in range(QUEUES)]
    async with filao.connect(url, durability="relaxed") as broker:
        await broker.declare(*(filao.Queue(name, max_attempts=1) for name in names))
        for first in range(0, DEAD, 1_000):
            name = names[0] if first < DEAD // 2 else names[1 + first // 1_000]
            await broker.send_many(name, [{"claim_id": number} for number in range(1_000)])
            messages = await broker.receive_many(name, 1_000)
            await asyncio.gather(*(one.reject(ERRORS[place % 4]) for place, one in enumerate(messages)))
        for _ in range(0, waiting // 2, 10_000):
            await broker.send_many(names[0], [{"claim_id": number} for number in range(10_000)])
        for name in names:
            await broker.send_many(name, [{"claim_id": number} for number in range(waiting // 2 // QUEUES)])


@contextmanager
def _served(url: str) -> Generator[tuple[str, int]]:
    """Run a dashboard; yield its address and its process."""
    command = [sys.executable, "-m", "filao", "dashboard", url, "--listen", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"http://\S+", process.stderr.readline())
        assert found
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield found[0], process.pid
        finally:
            process.send_signal(signal.SIGINT)


def _cpu(process: int) -> float:
    """Return the seconds of the processor that a process has had."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _memory(process: int) -> float:
    """Return megabytes that are its own or shared."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _pages(address: str, process: int) -> None:
    with httpx.Client(base_url=address, timeout=60) as client:
        began = time.monotonic()
        client.get("/en/queues")
        print(f"the first page after {time.monotonic() - began:.1f} s")
        client.get("/en/dead")
        time.sleep(5)
        listed = client.get("/en/queue?name=queue0000&state=ready").text
        after = re.findall(r"after=([\w-]+)", listed)[0]
        message = re.findall(r"message\?queue=queue0000&amp;id=([\w-]+)", listed)[0]
        for path in (
            *(
                "queues",
                "queues?sort=dead&q=00",
                "queue?name=queue0000",
                f"queue?name=queue0000&state=ready&after={after}",
            ),
            *("queue?name=queue0000&state=dead", "queue?name=queue0000&header=tenant", "processes", "dead", "log"),
            f"message?queue=queue0000&id={message}",
        ):
            times, cpu = [], _cpu(process)
            for _ in range(ROUNDS):
                began = time.monotonic()
                assert client.get(f"/en/{path}").status_code == 200, path
                times.append(time.monotonic() - began)
            shown = re.sub("after=.*|id=.*", "...", path)
            print(
                f"{shown:<44} median {1e3 * median(times):6.1f} ms, cpu {1e3 * (_cpu(process) - cpu) / ROUNDS:5.1f} ms"
            )


async def _tab(address: str, path: str, until: float) -> None:
    async with httpx.AsyncClient(base_url=address, timeout=None) as client:
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                async with client.stream("GET", f"/en/{path}?live=stream") as answer:
                    async for _ in answer.aiter_bytes():
                        if time.monotonic() > until:
                            return


async def _tabs(address: str, process: int) -> None:
    before, until = _cpu(process), time.monotonic() + TABS_FOR
    paths = ("queues", "dead", "processes")
    async with asyncio.TaskGroup() as group:
        for number in range(TABS):
            group.create_task(_tab(address, paths[number % 3], until))
    print(f"{TABS} tabs: {100 * (_cpu(process) - before) / TABS_FOR:.1f} % of a core, {_memory(process):.0f} MB")


def main() -> None:
    """Fill a store, and ask its dashboard."""
    options = argparse.ArgumentParser()
    options.add_argument("--engine", choices=("sqlite", "postgresql"), default="sqlite")
    options.add_argument("--waiting", type=int, default=1_000_000)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if chosen.engine == "sqlite":
            _measure(f"{folder}/claims.db", chosen.waiting)
        else:
            with postgres_server(Path(folder) / "server") as server:
                _measure(server.create("bench"), chosen.waiting)


def _measure(url: str, waiting: int) -> None:
    asyncio.run(_fill(url, waiting))
    print(f"{waiting:,} waiting, {DEAD:,} dead letters, {QUEUES:,} queues; load {os.getloadavg()[0]:.1f}")
    with _served(url) as (address, process):
        print(f"before anybody asked: {_memory(process):.0f} MB")
        _pages(address, process)
        asyncio.run(_tabs(address, process))


if __name__ == "__main__":
    main()
