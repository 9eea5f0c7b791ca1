"""What a burst costs PostgreSQL under an old transaction, by backend and by index.

`python -m bench.burst [--messages 300000]`: so many messages go through a queue in each of two databases of one server;
in one of them somebody holds a transaction meanwhile, so that all that died is still there. Then bursts follow in
turns. CPU is told, not time, and its least of many rounds, because other load on the machine changes that little.
"""

import argparse
import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import psycopg
from tests.support.servers import postgres_server

import filao
from bench.old_transactions import BURST, TASKS, old_transaction

ROUNDS = 8
SENDERS = 1_000
_THROUGH = """
    DO $$
    DECLARE
      q   integer := (SELECT id FROM filao.queue);
      ids bigint[];
    BEGIN
      SET synchronous_commit = off;
      FOR i IN 1 .. {batches} LOOP
        PERFORM * FROM filao.send(
          q, NULL, false, 1, ARRAY[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], array_fill(1::smallint, ARRAY[10]),
          array_fill('1234567.123456'::bytea, ARRAY[10]), NULL, NULL, NULL, NULL, NULL, NULL, NULL
        );
        COMMIT;
        ids := ARRAY(SELECT r.id FROM filao.receive(q, NULL, 1, NULL, i, 10, 0) AS r WHERE r.id IS NOT NULL);
        COMMIT;
        PERFORM * FROM filao.settle(
          q, NULL, false, '', ids, array_fill(i::bigint, ARRAY[10]), array_fill('ack'::text, ARRAY[10]), NULL, NULL
        );
        COMMIT;
      END LOOP;
    END $$
"""
_READ = """
    SELECT indexrelname, idx_tup_read, idx_blks_hit + idx_blks_read
    FROM pg_stat_user_indexes JOIN pg_statio_user_indexes USING (indexrelid, indexrelname)
    UNION ALL
    SELECT relname, n_tup_ins + n_tup_upd + n_tup_del, heap_blks_hit + heap_blks_read
    FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid, relname)
"""
_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'filao %' AND datname = current_database()"


class Side:
    """One of the databases, with a broker that sends and one that receives."""

    def __init__(self, url: str, sender: filao.Broker, consumer: filao.Broker) -> None:
        self.url = url
        self.least: list[float] = []
        """The least CPU of its backends for each message, in microseconds, the busiest first."""
        self._sender, self._consumer = sender, consumer

    async def burst(self, messages: int = BURST) -> None:
        """Send and handle so many messages."""
        numbers = iter(range(messages))

        async def one() -> None:
            for _ in numbers:
                message = await self._consumer.receive_from_queue("bench")
                await message.ack()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(TASKS):
                tasks.create_task(one())
            for _ in range(0, messages, SENDERS):
                await asyncio.gather(*(self._sender.send_to_queue("bench", b"1234567.123456") for _ in range(SENDERS)))

    async def measured(self) -> None:
        """Measure a burst."""
        await self.burst(SENDERS)  # what the other side's has left in the caches goes
        before = self._cpu()
        await self.burst()
        used = sorted((after - before.get(pid, 0) for pid, after in self._cpu().items()), reverse=True)[:2]
        self.least = [min(pair) for pair in zip(used, self.least or used, strict=True)]

    async def read(self) -> dict[str, tuple[float, float]]:
        """Return for each index what it returned in a burst, and for each table what changed, and pages of it read."""
        before = self._read_so_far()
        await self.burst()
        await asyncio.sleep(2)  # a backend reports once a second
        after = self._read_so_far()
        return {
            name: ((entries - before[name][0]) / BURST, (pages - before[name][1]) / BURST)
            for name, (entries, pages) in after.items()
        }

    def _cpu(self) -> dict[int, float]:
        with psycopg.connect(self.url) as connection:
            pids = [pid for (pid,) in connection.execute(_BACKENDS).fetchall()]
        return {pid: int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1_000 / BURST for pid in pids}

    def _read_so_far(self) -> dict[str, tuple[int, int]]:
        with psycopg.connect(self.url) as connection:
            return {name: (entries, pages) for name, entries, pages in connection.execute(_READ).fetchall()}


async def _measure(urls: dict[str, str], messages: int, rounds: int) -> None:
    async with AsyncExitStack() as stack:
        sides: dict[str, Side] = {}
        for name, url in urls.items():
            sender, consumer = [await stack.enter_async_context(filao.connect(url)) for _ in range(2)]
            await sender.declare(filao.Queue("bench"))
            sides[name] = Side(url, sender, consumer)
        await stack.enter_async_context(old_transaction(urls["under"]))
        for side in sides.values():
            async with await psycopg.AsyncConnection.connect(side.url, autocommit=True) as connection:
                await connection.execute(_THROUGH.format(batches=messages // 10).encode())
        with psycopg.connect(urls["without"], autocommit=True) as connection:
            connection.execute("VACUUM filao.message")
        for _ in range(rounds):
            for side in sides.values():
                await side.measured()
        for name, side in sides.items():
            consumer_cpu, sender_cpu = side.least
            print(f"{name}: {consumer_cpu:.1f} us of the consumer's backend, {sender_cpu:.1f} of the sender's")
            for what, (entries, pages) in sorted((await side.read()).items()):
                if entries + pages > 0.1:
                    print(f"  {what:<20} {entries:6.2f} entries {pages:6.2f} pages")


def main() -> None:
    """Start a server, and print what was found, for each message."""
    parser = argparse.ArgumentParser(prog="python -m bench.burst", description=__doc__)
    parser.add_argument("--messages", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    folder = Path("/tmp") / f"filao-burst-{time.monotonic_ns()}"  # the server's own user must reach it
    with postgres_server(folder) as server:
        urls = {name: server.create(name) for name in ("without", "under")}
        asyncio.run(_measure(urls, options.messages, options.rounds))


if __name__ == "__main__":
    main()
