"""PostgreSQL, one server for all: Filao, a plain SKIP LOCKED queue written by hand on psycopg, and pgqueuer.

procrastinate and awa are measured too where they are installed (`pip install procrastinate awa-pg`).
"""

import asyncio
import importlib
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.support.servers import Postgres, postgres_server

import filao
from bench.measures import ROUNDS, Ground

BODY = b"x" * 256
TASKS = 64
SENT = {"Filao": 40_000, "by hand": 8_000, "pgqueuer": 8_000, "procrastinate": 2_000, "awa": 2_000}
DEEP = 1_000_000
CLAIMS = 300  # whose median is a claim's cost
THROUGH = 500_000  # messages whose traces in the table are measured
SETTLED_WITHIN = 15.0  # seconds that the housekeeping has for what is left

BY_HAND = ("procrastinate", "awa")  # peers that are installed by hand

Peer = Callable[[str, int], Coroutine[Any, Any, tuple[float, float]]]
Found = dict[str, dict[str, float]]


def postgresql(ground: Ground) -> dict[str, Any]:
    """Rates with 64 producers and with one consumer, a claim's cost at depth, and how large the table gets."""
    # The server's own user must reach its data, so they lie outside of the folder of the run, which only we can read.
    folder = Path("/tmp") / f"filao-bench-{time.monotonic_ns()}"
    with postgres_server(folder) as server:
        return asyncio.run(_measure(ground, server))


async def _measure(ground: Ground, server: Postgres) -> dict[str, Any]:
    rates: dict[str, dict[str, list[float]]] = {"send": {}, "drain": {}}
    for number in range(ROUNDS):
        for name, peer in _there().items():
            count = max(300, round(SENT[name] * ground.scale))
            send, drain = await peer(server.create(f"round{number}-{name.replace(' ', '')}".lower()), count)
            rates["send"].setdefault(name, []).append(send)
            rates["drain"].setdefault(name, []).append(drain)
    found: dict[str, Any] = {
        what: {name: statistics.median(figures) for name, figures in by_name.items()} for what, by_name in rates.items()
    }
    url = server.create("deep")
    shallow = await _claim_cost(url, 2 * CLAIMS)
    found["claim"] = {"shallow": shallow, "deep": await _claim_cost(url, max(CLAIMS, round(DEEP * ground.scale)))}
    found["table"] = await _table_after(server.create("through"), max(1_000, round(THROUGH * ground.scale)))
    return found


async def _timed(count: int, work: Callable[[], Awaitable[object]]) -> float:
    began = time.monotonic()
    await work()
    return count / (time.monotonic() - began)


async def _all(count: int, send: Callable[[int], Awaitable[object]]) -> None:
    numbers = iter(range(count))

    async def work(task: int) -> None:
        for _ in numbers:
            await send(task)

    await asyncio.gather(*(work(task) for task in range(TASKS)))


# --- the peers -------------------------------------------------------------------------------------------------------


async def _filao(url: str, count: int) -> tuple[float, float]:
    left = count

    async def consume() -> None:
        nonlocal left
        while left > 0:
            message = await broker.receive_from_queue(queue, wait=0)
            if message is None:
                return
            await message.ack()
            left -= 1

    async def drain() -> None:
        await asyncio.gather(*(consume() for _ in range(TASKS)))

    async with filao.connect(url) as broker:
        queue: filao.Queue = filao.Queue("bench")
        await broker.declare(queue)
        sent = await _timed(count, lambda: _all(count, lambda _: broker.send_to_queue(queue, BODY)))
        return sent, await _timed(count, drain)


async def _by_hand(url: str, count: int) -> tuple[float, float]:
    import psycopg

    connections = [await psycopg.AsyncConnection.connect(url, autocommit=True) for _ in range(TASKS)]
    await connections[0].execute("CREATE TABLE job (id bigserial PRIMARY KEY, body bytea NOT NULL)")
    take = "DELETE FROM job WHERE id = (SELECT id FROM job ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING body"

    async def send(task: int) -> None:
        await connections[task].execute("INSERT INTO job (body) VALUES (%s)", (BODY,))

    async def consume(connection: Any) -> None:
        while True:
            async with connection.transaction():
                if (await (await connection.execute(take)).fetchone()) is None:
                    return

    async def drain() -> None:
        await asyncio.gather(*(consume(connection) for connection in connections))

    try:
        return await _timed(count, lambda: _all(count, send)), await _timed(count, drain)
    finally:
        for connection in connections:
            await connection.close()


async def _pgqueuer(url: str, count: int) -> tuple[float, float]:
    import asyncpg
    from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver, AsyncpgPoolDriver
    from pgqueuer.domain.types import QueueExecutionMode
    from pgqueuer.qm import QueueManager
    from pgqueuer.queries import Queries

    connection = await asyncpg.connect(url)
    async with asyncpg.create_pool(url, min_size=TASKS, max_size=TASKS) as pool:
        await Queries(AsyncpgDriver(connection)).install()
        queries = Queries(AsyncpgPoolDriver(pool))
        sent = await _timed(count, lambda: _all(count, lambda _: queries.enqueue("bench", BODY)))
    manager = QueueManager(Queries(AsyncpgDriver(connection)))

    @manager.entrypoint("bench")  # type: ignore[untyped-decorator]  # see pyproject.toml
    async def handle(job: Any) -> None:
        pass

    drained = await _timed(count, lambda: manager.run(mode=QueueExecutionMode.drain, batch_size=TASKS))
    await connection.close()
    return sent, drained


async def _procrastinate(url: str, count: int) -> tuple[float, float]:
    procrastinate: Any = importlib.import_module("procrastinate")
    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=TASKS)
    app = procrastinate.App(connector=connector)

    @app.task(name="bench", queue="bench")  # type: ignore[untyped-decorator]  # it is installed by hand
    async def handle(body: str) -> None:
        pass

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        sent = await _timed(count, lambda: _all(count, lambda _: handle.defer_async(body=BODY.decode())))
        work = partial(app.run_worker_async, wait=False, concurrency=TASKS, install_signal_handlers=False)
        return sent, await _timed(count, work)


@dataclass
class Bench:
    """A job of awa's, whose kind is its name."""

    body: str


async def _awa(url: str, count: int) -> tuple[float, float]:
    awa: Any = importlib.import_module("awa")
    left, done = count, asyncio.Event()
    client = awa.AsyncClient(url)
    await client.migrate()

    @client.task(Bench, queue="bench")  # type: ignore[untyped-decorator]  # as above
    async def handle(job: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async def drain() -> None:
        await client.start([("bench", TASKS)])
        await done.wait()

    job = Bench(BODY.decode())
    try:
        sent = await _timed(count, lambda: _all(count, lambda _: client.insert(job, queue="bench")))
        return sent, await _timed(count, drain)
    finally:
        await client.shutdown()


PEERS = {"Filao": _filao, "by hand": _by_hand, "pgqueuer": _pgqueuer, "procrastinate": _procrastinate, "awa": _awa}


def _there() -> dict[str, Peer]:
    """Return the peers that can be measured here."""
    return {name: peer for name, peer in PEERS.items() if name not in BY_HAND or find_spec(name)}


# --- depth and size --------------------------------------------------------------------------------------------------


async def _claim_cost(url: str, depth: int) -> float:
    """Return the milliseconds of a receive, in the median, with so many messages waiting."""
    async with filao.connect(url) as broker:
        queue: filao.Queue = filao.Queue("bench")
        await broker.declare(queue)
        while (waiting := (await broker.stats(queue)).ready) < depth:
            await broker.send_many(queue, [BODY] * min(10_000, depth - waiting))
        times: list[float] = []
        for _ in range(CLAIMS):
            began = time.monotonic()
            message = await broker.receive_from_queue(queue)
            times.append((time.monotonic() - began) * 1000)
            await message.ack()
    return statistics.median(times)


async def _table_after(url: str, count: int) -> dict[str, float]:
    """Send so many messages while they are consumed, and return how many MiB the table took at most, and takes then."""
    import psycopg

    left, most = count, 0.0

    async def consume() -> None:
        nonlocal left
        while left > 0:
            message = await broker.receive_from_queue(queue, wait=1)
            if message is not None:
                await message.ack()
                left -= 1

    async with filao.connect(url) as broker, await psycopg.AsyncConnection.connect(url, autocommit=True) as observer:
        queue: filao.Queue = filao.Queue("bench")
        await broker.declare(queue)

        async def size() -> float:
            row = await (await observer.execute("SELECT pg_total_relation_size('filao.message')")).fetchone()
            return float(row[0]) / 2**20 if row else 0.0

        work = asyncio.gather(
            _all(count, lambda _: broker.send_to_queue(queue, BODY)), *(consume() for _ in range(TASKS))
        )
        while not work.done():
            await asyncio.wait([work], timeout=0.5)
            most = max(most, await size())
        await work
        until = time.monotonic() + SETTLED_WITHIN
        while time.monotonic() < until and await size() > most / 2:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.5)
        return {"most": most, "after": await size()}
