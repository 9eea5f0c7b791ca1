"""What idle consumers cost a PostgreSQL server, and how long a message takes to one of them.

`python -m bench.idle [--consumers 8 200] [--seconds 20]`: so many brokers wait for one queue, spread over a few
processes. It prints the server's share of a core, its commits a second, and the wait from a send to its receipt, of
brokers that have mostly received before, so that their connections have compiled what they run.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
from tests.support.servers import postgres_server

import filao
from bench.measures import Ground

PROCESSES = 4
SENDS = 100
GAP = 0.05  # seconds between two sends
WAITING_WITHIN = 120.0  # seconds until all wait


def _wait(url: str, count: int, received: Any) -> None:
    asyncio.run(_consume(url, count, received))


async def _consume(url: str, count: int, received: Any) -> None:
    async with AsyncExitStack() as stack:
        brokers = [await stack.enter_async_context(filao.connect(url)) for _ in range(count)]

        async def one(broker: filao.Broker) -> None:
            while True:
                message = await broker.receive_from_queue("idle")
                received.put(time.monotonic() - float(message.body))
                await message.ack()

        await asyncio.gather(*(one(broker) for broker in brokers))


def cpu(postmaster: int) -> float:
    """Return the CPU seconds of a server and its backends, those that ended included."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if path.parent.name == str(postmaster):
            ticks += sum(map(int, fields[11:15]))
        elif fields[1] == str(postmaster):
            ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def idle(ground: Ground) -> dict[str, Any]:
    """Return what 8 and what 200 idle consumers cost."""
    return {str(count): measure(count, max(5.0, 30 * ground.scale)) for count in (8, 200)}


def measure(count: int, seconds: float) -> dict[str, float]:
    """Let so many brokers wait, and return what that costs."""
    folder = Path("/tmp") / f"filao-bench-{os.getpid()}-{time.monotonic_ns()}"
    with postgres_server(folder) as server, psycopg.connect(server.url(), autocommit=True) as operator:
        operator.execute("ALTER SYSTEM SET max_connections = 1000")
        operator.close()
        server.stop()
        server.start()
        postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        return asyncio.run(_measure(server.create("idle"), postmaster, count, seconds))


async def _measure(url: str, postmaster: int, count: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    received = context.Queue()
    shares = [len(range(first, count, PROCESSES)) for first in range(min(PROCESSES, count))]
    processes = [context.Process(target=_wait, args=(url, share, received), daemon=True) for share in shares]
    async with filao.connect(url) as sender, await psycopg.AsyncConnection.connect(url, autocommit=True) as operator:
        await sender.declare(filao.Queue("idle"))

        async def value(sql: str) -> float:
            row = await (await operator.execute(sql.encode())).fetchone()
            return float(row[0]) if row else 0.0

        for process in processes:
            process.start()
        try:
            async with asyncio.timeout(WAITING_WITHIN):
                while await value("SELECT count(*) FROM filao.waiting") < count:  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(0.2)
            await asyncio.sleep(2)
            commits = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            before, used, began = await value(commits), cpu(postmaster), time.monotonic()
            await asyncio.sleep(seconds)
            core = (cpu(postmaster) - used) / (time.monotonic() - began)
            rate = (await value(commits) - before) / (time.monotonic() - began)
            for gap, sends in ((GAP / 5, 2 * count), (GAP, SENDS)):  # the first for nearly all to have received
                for _ in range(sends):
                    await sender.send_to_queue("idle", b"%.6f" % time.monotonic())
                    await asyncio.sleep(gap)
                waits = [await asyncio.to_thread(received.get, True, 30) for _ in range(sends)]
            connections = await value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'filao'")
        finally:
            for process in processes:
                process.kill()
                process.join()
    return {
        "core": core,
        "commits": rate,
        "median": statistics.median(waits) * 1000,
        "p95": statistics.quantiles(waits, n=20)[-1] * 1000,
        "connections": connections,
    }


def main() -> None:
    """Run it, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--consumers", type=int, nargs="+", default=[8, 200])
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    print(json.dumps({count: measure(count, options.seconds) for count in options.consumers}, indent=1))


if __name__ == "__main__":
    main()
