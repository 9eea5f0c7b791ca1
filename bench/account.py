"""Where PostgreSQL's time goes: CPU of our process and of the server for each message, and which functions use it.

`python -m bench.account [--messages 20000]`: sends by 64 tasks, a drain by 64 tasks, lone sends, and the same sends by
hand. CPU is told, not time, because other load on the machine changes it little; the two cores of a machine divided by
what both need together is the rate that cannot be passed. `--parts` tells instead what a lone send's parts cost the
server when it calls them itself in a loop: the least of many rounds, which other load changes least.
"""

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Awaitable
from pathlib import Path

from tests.support.servers import postgres_server

import filao
from bench.idle import cpu

BODY = b"x" * 256
TASKS = 64
LONE = 1_000
FUNCTIONS_TOLD = 12
LOOPS, ROUNDS = 400, 12
PARTS = {
    "filao.send": """
        PERFORM * FROM filao.send(q, -even, false, 1, '{0}', '{1}', ARRAY[body], NULL, NULL, NULL, NULL, NULL, NULL,
                                  NULL)
    """,
    "a bare INSERT of that row": """
        INSERT INTO filao.message (id, queue, state, kind, priority, at, sent_at, content, salt)
        VALUES (nextval('filao.number'), q, 'ready', 1, 0, even, even, body, 1)
    """,
    "filao.count": """
        PERFORM filao.count(q, ARRAY['sent', 'ready', 'delayed', 'blocked', 'duplicates'], ARRAY[1, 1, 0, 0, 0])
    """,
    "filao.now": "PERFORM filao.now(-even)",
    "filao.call": "PERFORM filao.call(ARRAY[q], ARRAY[1])",
}


class _Account:
    def __init__(self, postmaster: int) -> None:
        self._postmaster = postmaster

    async def of(self, what: str, messages: int, work: Awaitable[object]) -> None:
        """Print what some work costs for each message, in microseconds."""
        began, theirs, ours = time.perf_counter(), cpu(self._postmaster), time.process_time()
        await work
        took, theirs, ours = time.perf_counter() - began, cpu(self._postmaster) - theirs, time.process_time() - ours
        us = 1e6 / messages
        print(f"{what:<22} {took * us:7.1f} us  client {ours * us:6.1f}  server {theirs * us:6.1f}", flush=True)


async def _send(broker: filao.Broker, messages: int, tasks: int = TASKS) -> None:
    numbers = iter(range(messages))

    async def work() -> None:
        for _ in numbers:
            await broker.send_to_queue("account", BODY)

    await asyncio.gather(*(work() for _ in range(tasks)))


async def _drain(broker: filao.Broker) -> None:
    async def work() -> None:
        while (message := await broker.receive_from_queue("account", wait=0)) is not None:
            await message.ack()

    await asyncio.gather(*(work() for _ in range(TASKS)))


async def _by_hand(url: str, messages: int, account: _Account) -> None:
    import psycopg

    connections = [await psycopg.AsyncConnection.connect(url, autocommit=True) for _ in range(TASKS)]
    await connections[0].execute("CREATE TABLE job (id bigserial PRIMARY KEY, body bytea NOT NULL)")

    async def send(connection: psycopg.AsyncConnection, count: int) -> None:
        for _ in range(count):
            await connection.execute("INSERT INTO job (body) VALUES (%s)", (BODY,))

    async def sends() -> None:
        await asyncio.gather(*(send(connection, messages // TASKS) for connection in connections))

    await send(connections[0], 50)
    await account.of("by hand, lone INSERT", LONE, send(connections[0], LONE))
    await account.of("by hand, 64 INSERTs", messages // TASKS * TASKS, sends())
    for connection in connections:
        await connection.close()


async def _functions(url: str, messages: int) -> None:
    """Print where the server's time goes, by function; what it calls in SQL counts as its own."""
    import psycopg

    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        found = await connection.execute(
            "SELECT funcname, calls, self_time, total_time FROM pg_stat_user_functions ORDER BY 3 DESC LIMIT %s",
            (FUNCTIONS_TOLD,),
        )
        for name, calls, own, total in await found.fetchall():
            each = 1000 / messages
            print(
                f"  {name:<20} {calls:>8,} calls {own * each:7.2f} us own {total * each:7.2f} us in all, each message"
            )


def _parts(url: str) -> None:
    """Print what the server's own CPU is for each part of a lone send."""
    import psycopg

    least: dict[str, float] = {}
    with psycopg.connect(url, autocommit=True) as connection:
        clock = Path(f"/proc/{connection.info.backend_pid}/schedstat")
        for part in [*PARTS] * ROUNDS:
            began = int(clock.read_text().split()[0])
            connection.execute(f"""
                DO $$
                DECLARE
                  q integer := (SELECT id FROM filao.queue);
                  even bigint := (SELECT even FROM filao.even_clock());
                  body bytea := decode(repeat('78', {len(BODY)}), 'hex');
                BEGIN
                  FOR i IN 1 .. {LOOPS} LOOP
                    {PARTS[part]};
                  END LOOP;
                END $$
            """)
            took = (int(clock.read_text().split()[0]) - began) / 1_000 / LOOPS
            least[part] = min(took, least.get(part, took))
    for part, took in least.items():
        print(f"{part:<26} {took:7.1f} us of the server's CPU (least of {ROUNDS})")


async def _declared(url: str) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("account"))


async def _measure(url: str, by_hand: str, account: _Account, messages: int) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("account"))
        await _send(broker, 500)
        await _drain(broker)
        for _ in range(2):
            await account.of("send, 64 tasks", messages, _send(broker, messages))
            await account.of("drain, 64 tasks", messages, _drain(broker))
        await account.of("lone send", LONE, _send(broker, LONE, tasks=1))
        await _drain(broker)
        profile = cProfile.Profile(time.thread_time)
        profile.enable()
        await _send(broker, messages)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        await _drain(broker)
    await _by_hand(by_hand, messages // 4, account)
    await _functions(url, 3 * messages)


def main() -> None:
    """Start a server that counts its functions' time, and print the account."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    folder = Path("/tmp") / f"filao-account-{time.monotonic_ns()}"  # the server's own user must reach it
    with postgres_server(folder) as server:
        import psycopg

        if options.parts:
            asyncio.run(_declared(url := server.create("parts")))
            _parts(url)
            return
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET track_functions = 'pl'")
            connection.execute("SELECT pg_reload_conf()")
        postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        account = _Account(postmaster)
        asyncio.run(_measure(server.create("ours"), server.create("theirs"), account, options.messages))


if __name__ == "__main__":
    main()
