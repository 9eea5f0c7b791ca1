"""No statement on the way of a message may walk past others: each is watched, and its plan is asked for."""

import sqlite3

import pytest

import filao
from tests.conftest import on_connection

pytestmark = pytest.mark.anyio


async def _live(broker: filao.Broker, clock) -> None:
    """Do all that can happen to a message."""
    queue = filao.Queue("claims", lease=5, max_attempts=2, ttl=1000, backoff=filao.Backoff(first=1, jitter=0))
    await broker.declare(queue, filao.Queue("small", max_length=3, overflow="drop_oldest", on_expiry="drop", ttl=10))
    for number in range(30):
        group = f"policy-{number % 5}" if number % 2 else None
        await broker.send_to_queue("claims", number, group=group, dedup_key=str(number), priority=number % 3)
    await broker.send_many("small", range(3))
    await broker.send_many("small", range(3))
    await broker.send_to_queue("claims", "later", delay=50, message_id="named")
    for settle in ("ack", "nack", "reject", "release") * 3:
        (message,) = await broker.receive_many("claims", 1, wait=0)
        await message.extend(5)
        await getattr(message, settle)()
    await broker.receive_many("claims", 3, wait=0)
    clock.advance(20)
    await broker.receive_many("claims", 3, wait=0)
    await broker.receive_many("small", 3, wait=0.001)
    clock.advance(20)
    await broker.receive_many("claims", 100, wait=0)
    await broker.stats()
    await broker.redrive("claims", limit=2)
    await broker.redrive("claims", ids=["named"])
    await broker.cancel("claims", "named")
    for state in filao.State:
        page = await broker.peek("claims", state=state, limit=2)
        if page:
            await broker.peek("claims", state=state, limit=2, after=page[-1].id)
    await broker.stats()
    await broker.resume("claims", group="policy-1")
    await broker.purge("claims")
    await broker.purge("claims", state="dead")


async def test_every_statement_finds_its_rows_through_an_index(tmp_path, clock) -> None:
    seen: set[str] = set()
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await on_connection(broker, "set_trace_callback", seen.add)
        await _live(broker, clock)
        await on_connection(broker, "set_trace_callback", None)
    queries = [sql for sql in seen if sql.split()[0] in ("SELECT", "UPDATE", "DELETE") and "filao_message" in sql]
    assert len(queries) > 30
    db = sqlite3.connect(tmp_path / "claims.db")
    for sql in queries:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
        walks = [step for step in plan if "SCAN filao_message" in step]
        sorts = [step for step in plan if "TEMP B-TREE" in step and "last term" not in step.lower()]
        assert not walks, (sql, plan)
        assert not sorts, (sql, plan)
    db.close()


@pytest.mark.parametrize("state", ["leased", "delayed", "blocked", "dead"])
async def test_a_claim_reads_as_many_pages_whatever_lies_in_the_queue(tmp_path, clock, state) -> None:
    """Counts SQLite's own steps, which do not depend on the machine."""
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("claims", lease=1000))
        empty = await _steps_of_a_claim(broker)
        if state == "leased":
            await broker.send_many("claims", range(5000))
            await broker.receive_many("claims", 5000)
        elif state == "delayed":
            await broker.send_many("claims", range(5000), delay=500)
        elif state == "blocked":
            await broker.send_many("claims", range(5000), group="policy")
            await broker.receive_from_queue("claims")
        else:
            await broker.send_many("claims", range(5000), ttl=1)
            clock.advance(2)
            await broker.receive_many("claims", 1, wait=0)
        assert getattr(await broker.stats("claims"), state) >= 4999
        assert await _steps_of_a_claim(broker) <= empty * 1.5


async def _steps_of_a_claim(broker: filao.Broker) -> int:
    await broker.send_to_queue("claims", "the one", priority=1)
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    await on_connection(broker, "set_progress_handler", count, 1)
    (message,) = await broker.receive_many("claims", 1, wait=0)
    await on_connection(broker, "set_progress_handler", None, 1)
    assert message.body == "the one"
    await message.ack()
    return steps
