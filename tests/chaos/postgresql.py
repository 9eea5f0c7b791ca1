"""What happens to PostgreSQL: sessions that end, servers that stop, connections that run out, transactions that stay
open.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psycopg

from tests.chaos.account import Chaos, scenario, under_load
from tests.support.load import QUEUE
from tests.support.proxy import Proxy
from tests.support.servers import Postgres, free_port, postgres_server, postgres_standby

HELD = 10.0  # seconds for which what holds things up stays
HIGH = 10.0  # seconds of the highest load
SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'chaos'"


@contextmanager
def _database(folder: Path) -> Iterator[tuple[Postgres, str]]:
    with postgres_server(folder / "server") as server:
        yield server, server.create("chaos")


@contextmanager
def _operator(server: Postgres, database: str = "postgres") -> Iterator["psycopg.Connection[tuple[object, ...]]"]:
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        yield connection


def _connected(server: Postgres) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(server.url())


async def _restarted(folder: Path, mode: str, times: int) -> Chaos:
    with _database(folder) as (server, url):
        async with under_load(url) as chaos:
            for _ in range(times):
                await asyncio.to_thread(server.stop, mode)
                await asyncio.to_thread(server.start)
                await chaos.recovered()
        return chaos


@scenario("PostgreSQL")
async def restart_fast(folder: Path) -> Chaos:
    """Stop the server (`fast`: it ends all sessions and writes all down) and start it, three times."""
    return await _restarted(folder, "fast", 3)


@scenario("PostgreSQL")
async def restart_immediate(folder: Path) -> Chaos:
    """Crash the server (`immediate`) and start it, three times."""
    return await _restarted(folder, "immediate", 3)


@scenario("PostgreSQL")
async def backend_kill(folder: Path) -> Chaos:
    """Terminate all sessions, once."""
    with _database(folder) as (server, url), _operator(server) as operator:
        async with under_load(url) as chaos:
            operator.execute(SESSIONS)
            await chaos.recovered()
        return chaos


@scenario("PostgreSQL")
async def repeated_kills(folder: Path) -> Chaos:
    """Terminate all sessions ten times, each time as soon as work goes on."""
    with _database(folder) as (server, url), _operator(server) as operator:
        async with under_load(url) as chaos:
            for _ in range(10):
                operator.execute(SESSIONS)
                await chaos.recovered()
        return chaos


@scenario("PostgreSQL")
async def idle_in_transaction(folder: Path) -> Chaos:
    """Leave somebody's REPEATABLE READ transaction open and idle; work goes on all the while."""
    with _database(folder) as (server, url):
        async with under_load(url) as chaos:
            with psycopg.connect(server.url("chaos")) as analyst:
                analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                analyst.execute("SELECT count(*) FROM filao.message")
                before = chaos.acked
                await asyncio.sleep(HELD)
                chaos.remarks.append(f"{(chaos.acked - before) / HELD:,.0f} acknowledged per second meanwhile")
            await chaos.recovered()
        return chaos


@scenario("PostgreSQL")
async def pool_exhaustion(folder: Path) -> Chaos:
    """Terminate our sessions while others take every connection that the server has; then the others leave."""
    with _database(folder) as (server, url), _operator(server) as operator:
        async with under_load(url) as chaos:
            with ExitStack() as others:
                until = time.monotonic() + HELD
                while time.monotonic() < until:
                    with suppress(psycopg.OperationalError):
                        while True:
                            others.enter_context(closing(await asyncio.to_thread(_connected, server)))
                    operator.execute(SESSIONS)  # who then takes the free places first?
                chaos.remarks.append(f"{chaos.load.errors['EngineUnavailable']} calls were told that it is away")
            await chaos.recovered()
        return chaos


@scenario("PostgreSQL")
async def high_load(folder: Path) -> Chaos:
    """Do as much as the machine can, on four queues at once, until the backlog is handled."""
    with _database(folder) as (_, url):
        async with AsyncExitStack() as stack:
            queues = [replace(QUEUE, name=f"claims.{number}") for number in range(4)]
            first, *others = [await stack.enter_async_context(under_load(url, queue=queue)) for queue in queues]
            first.others += others
            before = first.acked
            await asyncio.sleep(HIGH)
            first.remarks.append(f"{(first.acked - before) / HIGH:,.0f} acknowledged per second")
            await first.recovered()
        return first


@scenario("PostgreSQL")
async def clock_jumps(folder: Path) -> Chaos:
    """Set the server's wall clock by an hour and by a year, forward and back; nothing is delivered again for it."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")  # of the package faketime
    offset = folder / "offset"
    offset.write_text("+0")
    server = Postgres(folder / "server", free_port())
    server.initialise()
    server.environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    server.start()
    try:
        async with under_load(server.create("chaos")) as chaos:
            for jump in ("+3600", "+0", "-3600", "+31536000", "-31536000", "+0"):
                offset.write_text(jump)
                await chaos.recovered()
            await asyncio.sleep(1)
            chaos.remarks.append(f"{chaos.again} delivered again by six jumps")
    finally:
        server.environment = {}
        await asyncio.to_thread(server.stop, "immediate")
    return chaos


@scenario("PostgreSQL")
async def standby_promotion(folder: Path) -> Chaos:
    """Crash the primary and promote its synchronous standby, to which the name leads from then on."""
    with _database(folder) as (primary, _), postgres_standby(folder / "standby", primary) as standby:
        with _operator(primary) as operator:
            operator.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            operator.execute("SELECT pg_reload_conf()")
        with closing(Proxy(primary.port)) as name:
            async with under_load(primary.url("chaos", name.port)) as chaos:
                await asyncio.to_thread(primary.stop, "immediate")
                await asyncio.to_thread(standby.promote)
                name.lead_to(standby.port)
                await chaos.recovered()
        await asyncio.to_thread(primary.start)  # for the block to stop
        return chaos
