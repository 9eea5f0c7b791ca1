"""The history of messages beside the contract: what it leaves behind, what it costs, and how operators read it."""

import asyncio
import json
import subprocess
import sys

import pytest

import filao
import filao.sync
from filao.testing import Clock
from tests.conftest import engine_of

pytestmark = pytest.mark.anyio

HISTORY = filao.Queue("claims", history=True, history_window=60.0)
PATIENCE = 60.0


async def test_what_failed_and_is_acked_at_last_leaves_no_failure_behind(url) -> None:
    failures = "filao.failure" if url.startswith("postgresql") else "filao_failure"
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", backoff=filao.Backoff(first=0)))
        await broker.send_many("claims", [1, 2, 3])
        for message in await broker.receive_many("claims", 3):
            await message.nack(reason="once")
        alone, *together = await broker.receive_many("claims", 3)
        await alone.ack()
        await asyncio.gather(*(message.ack() for message in together))
        async with broker.transaction() as tx:
            assert await tx.execute(f"SELECT count(*) FROM {failures}") == [(0,)]


async def test_events_that_were_kept_long_enough_leave_the_file(tmp_path) -> None:
    clock = Clock()
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(HISTORY)
        await broker.send_many("claims", range(1_500))
        clock.advance(61)
        engine = engine_of(broker)
        async with asyncio.timeout(PATIENCE):
            while await engine._jobs.look_up(_events):
                await engine._jobs.alone(lambda: engine._housekeeper.tidy_some(idle=False))


def _events(books) -> int:
    return int(books.db.execute("SELECT count(*) FROM filao_event").fetchone()[0])


async def test_events_that_were_kept_long_enough_leave_the_database(postgres) -> None:
    async with filao.connect(postgres.create("history_tidy")) as broker:
        await broker.declare(filao.Queue("claims", history=True, history_window=0.001))
        await broker.send_many("claims", range(1_500))
        main = engine_of(broker)._main
        upto: int | None = 0
        while upto is not None:
            (upto,) = await main.row("SELECT filao.tidy(NULL, %s)", upto)
        assert await main.row("SELECT count(*) FROM filao.event") == (0,)


async def test_a_user_s_own_transaction_is_named_as_its_connection_is(postgres) -> None:
    import psycopg

    url = postgres.create("history_within")
    async with filao.connect(url) as broker:
        await broker.declare(HISTORY)
        with psycopg.connect(url, application_name="portal") as connection, connection.transaction():
            receipt = await broker.send_to_queue("claims", 7, within=connection)
        (event,) = await broker.trace(receipt.id)
    assert (event.what, event.by) == ("sent", "portal")


async def test_a_queue_that_begins_to_remember_remembers_from_then_on(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        receipt = await broker.send_to_queue("claims", 7)
        await broker.declare(HISTORY)
        await (await broker.receive_from_queue("claims")).ack()
        assert [event.what for event in await broker.trace(receipt.id)] == ["received", "acked"]


async def test_one_id_in_two_queues_has_the_events_of_both(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(HISTORY, filao.Queue("letters", history=True))
        for queue in ("claims", "letters"):
            await broker.send_to_queue(queue, 7, message_id="claim-7")
        assert [event.queue for event in await broker.trace("claim-7")] == ["claims", "letters"]


async def test_on_rabbitmq_a_history_is_refused_by_its_name(rabbitmq) -> None:
    async with filao.connect(rabbitmq.url()) as broker:
        assert filao.Feature.TRACE not in broker.features
        with pytest.raises(filao.UnsupportedFeature, match="history=True"):
            await broker.declare(filao.Queue("traced", history=True, backoff=filao.Backoff(first=0)))
        with pytest.raises(filao.UnsupportedFeature, match=r"RabbitMQ remembers no history"):
            await broker.trace("claim-7")


@pytest.mark.parametrize("rules", [{"history": 1.5}, {"history": "yes"}, {"history_window": 0}])
def test_a_rule_that_is_none_is_refused(rules) -> None:
    with pytest.raises(filao.ConfigurationError, match="history"):
        filao.Queue("claims", **rules)


def _filao(*arguments: str, folder) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "filao", *arguments]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_the_command_line_declares_a_history_and_prints_it(tmp_path) -> None:
    declared = json.loads(_filao("declare", "claims.db", "claims", "--history", folder=tmp_path).stdout)
    assert (declared["history"], declared["history_window"]) == (True, 604_800)
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        receipt = broker.send_to_queue("claims", 7)
    told = _filao("trace", "claims.db", receipt.id, folder=tmp_path)
    assert [(event["what"], event["queue"]) for event in map(json.loads, told.stdout.splitlines())] == [
        ("sent", "claims")
    ]
    unknown = _filao("trace", "claims.db", "claim-7", folder=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "--history" in unknown.stderr
