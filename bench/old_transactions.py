"""A queue under somebody's old transaction: what a claim costs, and what gets through, while no dead row can be
removed.

`python -m bench.old_transactions [--seconds 600] [--rate 1000]` runs it alone. Each peer gets a database of its own. It
is measured for a quarter of the time without the transaction, then with an idle REPEATABLE READ transaction held open.
awa is measured where it is installed (`pip install awa-pg`).
"""

import argparse
import asyncio
import importlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from tests.support.servers import postgres_server

import filao
from bench.measures import Ground

SECONDS = 600.0  # that the transaction is held
RATE = 1_000  # messages a second
TICK = 0.01  # seconds between two sends of some messages
BURST = 20_000  # messages that are then handled as fast as can be
BURSTS = 5  # one after the other, of which the median counts
TASKS = 64

Mark = Callable[[float], None]
"""Called for each received message, with the time when it was sent."""


class Peer(NamedTuple):
    """A peer, which sends messages with the time in each, and handles them until it is cancelled."""

    send: Callable[[list[bytes]], Awaitable[object]]
    consume: Callable[[Mark], Awaitable[object]]


def old_transactions(ground: Ground) -> dict[str, Any]:
    """Latency and rates of each peer, without and with an old transaction."""
    return measure(max(4.0, SECONDS * ground.scale), RATE)


def measure(seconds: float, rate: int) -> dict[str, Any]:
    """Run all peers, one after the other, on one server."""
    # The server's own user must reach its data, so they lie outside of the folder of the run, which only we can read.
    folder = Path("/tmp") / f"filao-bench-{os.getpid()}-{time.monotonic_ns()}"
    with postgres_server(folder) as server:
        found = {}
        for name, peer in PEERS.items():
            try:
                found[name] = asyncio.run(_measure(server.create(f"old-{name}".lower()), peer, seconds, rate))
            except ImportError as error:
                print(f"{name}: skipped, because {error}")
        return found


async def _measure(url: str, peer: Callable[[str], Any], seconds: float, rate: int) -> dict[str, Any]:
    waits: list[tuple[float, float]] = []
    """When a message was received, and how long it had waited."""

    def mark(sent_at: float) -> None:
        waits.append((time.monotonic(), time.monotonic() - sent_at))

    async with peer(url) as (send, consume):
        consuming = asyncio.ensure_future(consume(mark))
        try:
            await _paced(send, 2, rate)  # to warm up
            before = await _phase(send, waits, seconds / 4, rate)
            async with old_transaction(url):
                during = await _phase(send, waits, seconds, rate)
        finally:
            consuming.cancel()
            with suppress(asyncio.CancelledError):
                await consuming
    return {"without": before, "with": during}


@asynccontextmanager
async def old_transaction(url: str) -> AsyncGenerator[None]:
    """Hold a transaction open, as an analyst or a dump does."""
    async with await psycopg.AsyncConnection.connect(url) as holder:
        await holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await holder.execute("SELECT count(*) FROM pg_class")
        yield


async def _phase(
    send: Callable[[list[bytes]], Awaitable[object]], waits: list[tuple[float, float]], seconds: float, rate: int
) -> dict[str, float]:
    """Send at a steady rate, then in bursts, and return what was found."""
    waits.clear()
    sent = await _paced(send, seconds, rate)
    until = time.monotonic() + 30
    while len(waits) < sent and time.monotonic() < until:  # noqa: ASYNC110  # the consumer only marks
        await asyncio.sleep(TICK)
    received = len(waits)
    last = [wait * 1000 for at, wait in waits if at > waits[-1][0] - seconds / 4]
    quantiles = statistics.quantiles(last, n=100)
    return {
        "median": quantiles[49],
        "p99": quantiles[98],
        "handled": received / sent,
        "burst": statistics.median([await _burst(send, waits) for _ in range(BURSTS)]),
    }


async def _burst(send: Callable[[list[bytes]], Awaitable[object]], waits: list[tuple[float, float]]) -> float:
    """Send as fast as can be, and return how many were handled in a second."""
    waits.clear()
    began = time.monotonic()
    for _ in range(0, BURST, 1_000):
        await send([b"%.6f" % time.monotonic()] * 1_000)
    while len(waits) < BURST and time.monotonic() < began + 120:  # noqa: ASYNC110  # the consumer only marks
        await asyncio.sleep(TICK)
    return len(waits) / (time.monotonic() - began)


async def _paced(send: Callable[[list[bytes]], Awaitable[object]], seconds: float, rate: int) -> int:
    began, sent = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        due = round(passed * rate) - sent
        if due:
            await send([b"%.6f" % time.monotonic() for _ in range(due)])
            sent += due
        await asyncio.sleep(TICK)
    return sent


# --- peers -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _filao(url: str) -> AsyncGenerator[Peer]:
    queue: filao.Queue = filao.Queue("bench")
    async with filao.connect(url) as sender, filao.connect(url) as consumer:
        await sender.declare(queue)

        async def send(bodies: list[bytes]) -> None:
            await asyncio.gather(*(sender.send_to_queue(queue, body) for body in bodies))

        async def one(mark: Mark) -> None:
            while True:
                message = await consumer.receive_from_queue(queue)
                mark(float(message.body))
                await message.ack()

        async def consume(mark: Mark) -> None:
            await asyncio.gather(*(one(mark) for _ in range(TASKS)))

        yield Peer(send, consume)


@asynccontextmanager
async def _pgqueuer(url: str) -> AsyncGenerator[Peer]:
    import asyncpg
    from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
    from pgqueuer.qm import QueueManager
    from pgqueuer.queries import Queries

    sending, consuming = await asyncpg.connect(url), await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(sending))
    await queries.install()
    manager = QueueManager(Queries(AsyncpgDriver(consuming)))

    async def send(bodies: list[bytes]) -> None:
        await queries.enqueue(["bench"] * len(bodies), bodies, [0] * len(bodies))

    async def consume(mark: Mark) -> None:
        @manager.entrypoint("bench")  # type: ignore[untyped-decorator]  # see pyproject.toml
        async def handle(job: Any) -> None:
            mark(float(job.payload))

        await manager.run(batch_size=TASKS)

    try:
        yield Peer(send, consume)
    finally:
        await sending.close()
        await consuming.close()


@dataclass
class Sent:
    """A job of awa's, whose kind is its name."""

    at: float


@asynccontextmanager
async def _awa(url: str) -> AsyncGenerator[Peer]:
    awa: Any = importlib.import_module("awa")
    marks: list[Mark] = []
    async with awa.AsyncClient(url) as sender, awa.AsyncClient(url) as consumer:
        await sender.migrate()

        @consumer.task(Sent, queue="bench")  # type: ignore[untyped-decorator]  # awa is not installed by default
        async def handle(job: Any) -> None:
            marks[0](job.args.at)

        async def send(bodies: list[bytes]) -> None:
            await sender.enqueue_many_copy([Sent(float(body)) for body in bodies], queue="bench")

        async def consume(mark: Mark) -> None:
            marks.append(mark)
            await asyncio.Event().wait()

        await consumer.start([("bench", TASKS)])  # with its first worker it begins to use the tables that do not bloat
        try:
            yield Peer(send, consume)
        finally:
            await consumer.shutdown()


PEERS = {"Filao": _filao, "pgqueuer": _pgqueuer, "awa": _awa}


def main() -> None:
    """Run it alone, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.old_transactions", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the transaction is held")
    parser.add_argument("--rate", type=int, default=RATE, help="messages a second")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    for name in PEERS.keys() - set(options.only):
        del PEERS[name]
    print(json.dumps(measure(options.seconds, options.rate), indent=1))


if __name__ == "__main__":
    main()
