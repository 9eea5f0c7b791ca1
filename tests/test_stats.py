"""What `stats` tells costs the same at any depth, and what was stored before it told so much is counted too."""

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

import filao
from filao.broker import session_of
from filao.engines.postgresql import schema
from filao.engines.sqlite import files
from filao.queue import rules_to_json
from tests.conftest import engine_of, on_connection

pytestmark = pytest.mark.anyio

QUEUE = filao.Queue("claims", lease=1000, max_attempts=1)
_SIZES = (20, 2_000)


async def _fill(broker: filao.Broker, size: int) -> None:
    """Let so many messages lie in each state, but for leases, of which there are as many as are looked at."""
    await broker.declare(QUEUE)
    await broker.send_many("claims", range(size))
    for _ in range(0, size, 1_000):
        messages = await broker.receive_many("claims", min(size, 1_000), wait=0)
        await asyncio.gather(*(message.reject("no") for message in messages))
    await broker.send_many("claims", range(size), group="policy")
    await broker.receive_many("claims", 1, wait=0)
    await broker.send_many("claims", range(size), delay=500)
    await broker.send_many("claims", range(size))
    stats = await broker.stats("claims")
    assert (stats.ready, stats.delayed, stats.dead, stats.blocked) == (size, size, size, size - 1)


async def test_on_sqlite_it_takes_as_many_steps_at_any_depth(tmp_path, clock) -> None:
    """Counts SQLite's own steps, which do not depend on the machine."""
    taken = []
    for size in _SIZES:
        async with filao.connect(tmp_path / f"{size}.db", clock=clock) as broker:
            await _fill(broker, size)
            steps = 0

            def count() -> None:
                nonlocal steps
                steps += 1

            await on_connection(broker, "set_progress_handler", count, 1)
            await broker.stats("claims")
            await on_connection(broker, "set_progress_handler", None, 1)
            taken.append(steps)
    assert taken[1] <= taken[0] * 1.2, taken


@asynccontextmanager
async def _an_old_transaction(url: str):
    """Keep a snapshot, so that no dead row can be removed."""
    async with await psycopg.AsyncConnection.connect(url) as old:
        await old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await old.execute("SELECT 1 FROM filao.meta")
        yield


async def _pages(broker: filao.Broker) -> int:
    """Return how many pages PostgreSQL reads to tell a queue's ages, in the session that told them last."""
    await broker.stats("claims")
    async with engine_of(broker)._main.use() as connection:
        return min([await _read(connection) for _ in range(3)])  # the first time it makes plans


async def _read(connection: Any) -> int:
    found = await connection.execute(
        """
        EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON)
        SELECT filao.ages(id, NULL, '{"ready": 1, "delayed": 1, "leased": 1, "blocked": 1, "dead": 1}')
        FROM filao.queue WHERE name = 'claims'
        """
    )
    return int((await found.fetchone())[0][0]["Plan"]["Shared Hit Blocks"])


async def test_on_postgresql_it_reads_as_many_pages_at_any_depth(postgres) -> None:
    read = []
    for size in _SIZES:
        url = postgres.create(f"stats{size}")
        async with filao.connect(url) as broker:
            await _fill(broker, size)
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                await connection.execute("VACUUM filao.message")
            read.append(await _pages(broker))
    assert read[1] <= read[0] * 1.5 + 20, read


async def test_on_postgresql_an_old_transaction_does_not_make_it_dear(postgres) -> None:
    url = postgres.create("stats_old")
    async with filao.connect(url) as broker:
        await _fill(broker, 20)
        before = await _pages(broker)
        async with _an_old_transaction(url):
            for group in (None, None, "other"):  # their messages leave dead rows among the ready, leased and blocked
                await broker.send_many("claims", range(100 if group else 1_000), priority=1, group=group)
                while (messages := await broker.receive_many("claims", 1_000, wait=0)) and messages[0].priority == 1:
                    await asyncio.gather(*(message.ack() for message in messages))
                await broker.stats("claims")
            assert await _pages(broker) <= before * 2 + 100


async def test_dead_letters_of_an_older_file_are_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "claims.db"
    before = files.MIGRATIONS.index(files._count_reasons)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for step in files.MIGRATIONS[:before]:
            step(db)
        db.execute("UPDATE filao_meta SET value = ? WHERE name = 'version'", (before,))
        db.execute(
            "INSERT INTO filao_queue (id, name, rules, dead) VALUES (1, 'claims', ?, 3)", (rules_to_json(QUEUE),)
        )
        for number, reason in enumerate(("rejected", "expired", "rejected"), 1):
            db.execute(
                "INSERT INTO filao_message VALUES (?, 1, 6, 0, 0, 0, 1, 0, 0, NULL, NULL, "
                "NULL, NULL, NULL, ?, 0, x'31', 1)",
                (number, reason),
            )
    async with filao.connect(path) as broker:
        stats = await broker.stats("claims")
    assert stats.dead_by_reason == stats.died_by_reason == {"expired": 1, "rejected": 2}


async def test_dead_letters_of_an_older_schema_are_counted_by_reason(postgres) -> None:
    url = postgres.create("stats_older")
    async with filao.connect(url) as broker:
        await broker.declare(QUEUE)
        await broker.send_many("claims", range(2))
        await (await broker.receive_from_queue("claims")).reject("no")
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM filao.counter WHERE name LIKE '%:%'")
        connection.execute("DROP INDEX filao.message_blocked")
        connection.execute("ALTER TYPE filao.seen DROP ATTRIBUTE blocked, DROP ATTRIBUTE noted")
        connection.execute(schema.STEPS[6].encode())
        connection.execute("ALTER TYPE filao.seen ADD ATTRIBUTE noted xid8")
    async with filao.connect(url) as broker:
        stats = await broker.stats("claims")
        assert stats.dead_by_reason == stats.died_by_reason == {"rejected": 1}
        assert (await broker.receive_from_queue("claims")).body == 1


async def test_a_worker_that_receives_says_how_it_is(url: str) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(QUEUE)
        await broker.send_to_queue("claims", 1)
        message = await broker.receive_from_queue("claims")
        await session_of(broker).report("ready and healthy, 1 of 'claims' running")
        (receiver,) = (await broker.stats("claims")).receivers
        assert (receiver.worker, receiver.held) == ("ready and healthy, 1 of 'claims' running", 1)
        assert receiver.reported_ago is not None
        assert receiver.reported_ago < 20
        await message.ack()


async def test_a_report_is_about_the_process_that_makes_it(url: str) -> None:
    async with filao.connect(url) as one, filao.connect(url) as other:  # of one host and pid, as in two containers
        await one.declare(QUEUE)
        await one.send_many("claims", [1, 2])
        held = [await broker.receive_from_queue("claims") for broker in (one, other)]
        sibling = session_of(one).sibling()
        assert sibling is not None
        await sibling.open()
        await sibling.report("ready and healthy")
        await sibling.close()
        receivers = (await one.stats("claims")).receivers
        assert sorted(receiver.worker for receiver in receivers) == ["", "ready and healthy"]
        assert len(held) == 2


async def test_the_doctor_says_of_each_queue_what_keeps_its_messages_from_being_worked_on(url: str) -> None:
    async with filao.connect(url) as broker:

        async def said(queue: str) -> tuple[str, str]:
            return next((one.level, one.text) for one in await broker.doctor() if one.subject == f"queue {queue}")

        await broker.declare(*(filao.Queue(name) for name in ("well", "stopped", "stuck", "sad")))
        for name in ("well", "stopped", "stuck", "sad"):
            await broker.send_to_queue(name, 1)
        await broker.pause("stopped")
        await (await broker.receive_from_queue("sad")).reject("no")
        await broker.receive_from_queue("stuck", lease=0.001)
        assert await said("well") == ("ok", "1 ready, 0 leased, 0 delayed")
        assert await said("stopped") == (
            "note",
            "paused, so nothing is delivered: 1 message until it is resumed",
        )
        assert await said("sad") == ("note", "1 dead letter")
        async with asyncio.timeout(60):
            while (found := await said("stuck"))[0] == "ok":
                await asyncio.sleep(0.01)
        assert found == (
            "warning",
            "1 lease that ran out: those who receive have not come for them: they are busy, or stuck",
        )
