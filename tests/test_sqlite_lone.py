"""What a lone call costs on SQLite, counted where time would be noise; and that it is never paid with what is true."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import filao
from filao.engines.sqlite import housekeeping
from filao.errors import QueueFull, QueueNotFound
from tests.conftest import engine_of, on_connection

pytestmark = pytest.mark.anyio
FRAME = 4096 + 24  # bytes of a page in the WAL


async def counted(broker: filao.Broker, path: Path, call: Callable[[], Awaitable[object]]) -> tuple[list[str], int]:
    """Return the statements that a call makes, and the pages that it writes."""
    wal = path.with_name(path.name + "-wal")
    statements: list[str] = []
    before = wal.stat().st_size
    await on_connection(broker, "set_trace_callback", statements.append)
    try:
        await call()
    finally:
        await on_connection(broker, "set_trace_callback", None)
    return statements, (wal.stat().st_size - before) // FRAME


async def test_a_lone_send_makes_five_statements_and_writes_three_pages(tmp_path) -> None:
    path = tmp_path / "lone.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("q"))
        await broker.send_to_queue("q", "the first learns")
        # The housekeeping may come in between, once in a second.
        found = [await counted(broker, path, lambda: broker.send_to_queue("q", "lone")) for _ in range(5)]
        statements, pages = min(found, key=lambda one: len(one[0]))
        assert [statement.split()[0] for statement in statements] == ["BEGIN", "PRAGMA", "INSERT", "UPDATE", "COMMIT"]
        assert pages <= 3  # the message's, its index's, the counters'


async def test_a_lone_send_takes_three_turns_of_the_loop(tmp_path, monkeypatch) -> None:
    loop: Any = asyncio.get_running_loop()
    turns = 0

    def select(timeout: float | None) -> Any:
        nonlocal turns
        turns += 1
        return select_as_ever(timeout)

    select_as_ever = loop._selector.select
    async with filao.connect(tmp_path / "lone.db") as broker:
        await broker.declare(filao.Queue("q"))
        monkeypatch.setattr(loop._selector, "select", select)
        taken: list[int] = []
        for _ in range(5):  # the watch over other processes may come in between
            turns = 0
            await broker.send_to_queue("q", "lone")
            taken.append(turns)
        assert min(taken) <= 3  # its batch begins, its batch has ended, it goes on


async def test_a_lone_receive_and_its_ack_make_thirteen_statements_and_write_seven_pages(tmp_path) -> None:
    path = tmp_path / "lone.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("q"))
        await broker.send_many("q", list(range(6)))
        await (await broker.receive_from_queue("q")).ack()  # the first learns

        async def receive_and_ack() -> None:
            await (await broker.receive_from_queue("q")).ack()

        found = [await counted(broker, path, receive_and_ack) for _ in range(4)]
        statements, pages = min(found, key=lambda one: len(one[0]))
        receive = ["PRAGMA", "BEGIN", "PRAGMA", "SELECT", "UPDATE", "UPDATE", "COMMIT"]
        ack = ["PRAGMA", "BEGIN", "PRAGMA", "DELETE", "UPDATE", "COMMIT"]
        assert [statement.split()[0] for statement in statements] == receive + ack
        assert pages <= 7  # of a receive the message's, its two indexes', the counters'; an ack leaves one index alone


async def test_a_transaction_works_on_the_queues_that_it_is_about_however_many_are_known(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # it would forget them
    async with filao.connect(tmp_path / "lone.db") as broker:
        await broker.declare(*(filao.Queue(f"q{number}") for number in range(40)))
        for number in range(40):
            await broker.send_to_queue(f"q{number}", number)

        def look_at_one() -> tuple[int, list[str]]:
            with engine_of(broker)._database.write(durable=False, keeps=True) as books:
                books.row("q7")
                return len(books.known.queues), list(books.names().values())

        assert await engine_of(broker)._jobs.alone(look_at_one) == (40, ["q7"])


async def test_what_comes_back_expires_though_nothing_that_waited_could(tmp_path, clock) -> None:
    async with filao.connect(tmp_path / "lone.db", clock=clock) as broker:
        await broker.declare(filao.Queue("q"))
        await broker.send_to_queue("q", 1, ttl=10)
        await broker.send_to_queue("q", 2, ttl=5)
        message = await broker.receive_from_queue("q")
        clock.advance(6)
        for _ in range(2):  # the other expires; then nothing waits that could
            assert await broker.receive_from_queue("q", wait=0) is None
        await message.release()
        clock.advance(5)
        assert await broker.receive_from_queue("q", wait=0) is None
        stats = await broker.stats("q")
        assert (stats.ready, stats.dead) == (0, 2)


async def test_what_is_sent_expires_though_nothing_that_was_there_could(tmp_path, clock) -> None:
    async with filao.connect(tmp_path / "lone.db", clock=clock) as broker:
        await broker.declare(filao.Queue("q", max_length=2))
        await broker.send_many("q", [1, 2])
        with pytest.raises(QueueFull):  # nothing can expire
            await broker.send_to_queue("q", 3)
        await (await broker.receive_from_queue("q")).ack()
        await broker.send_to_queue("q", 3, ttl=10)
        clock.advance(11)
        await broker.send_to_queue("q", 4)
        stats = await broker.stats("q")
        assert (stats.ready, stats.dead) == (2, 1)


async def test_what_another_process_commits_is_known_at_the_next_send(tmp_path) -> None:
    path = tmp_path / "lone.db"
    async with filao.connect(path) as one, filao.connect(path) as other:
        await one.declare(filao.Queue("q"))
        await one.send_to_queue("q", 1)
        await other.declare(filao.Queue("q", max_length=1))
        with pytest.raises(QueueFull):
            await one.send_to_queue("q", 2)
        await other.delete_queue("q", messages=True)
        with pytest.raises(QueueNotFound):
            await one.send_to_queue("q", 3)


async def test_what_an_operator_does_here_is_known_at_the_next_receive(tmp_path) -> None:
    async with filao.connect(tmp_path / "lone.db") as broker:
        await broker.declare(filao.Queue("q"))
        await broker.send_to_queue("q", 1)
        await broker.pause("q")
        assert await broker.receive_from_queue("q", wait=0) is None
        await broker.resume("q")
        assert await broker.receive_from_queue("q", wait=0) is not None


async def test_senders_that_take_turns_keep_the_order_of_sending(tmp_path) -> None:
    path = tmp_path / "lone.db"
    async with filao.connect(path) as one, filao.connect(path) as other:
        await one.declare(filao.Queue("q"))
        for number in range(0, 20, 4):  # each twice, so that either also goes on with what it knows
            for broker, at in ((one, 0), (one, 1), (other, 2), (other, 3)):
                await broker.send_to_queue("q", number + at)
        assert [message.body for message in await one.receive_many("q", 20)] == list(range(20))
        assert (await other.stats("q")).sent == 20


async def test_a_transaction_that_is_undone_leaves_nothing_in_mind(tmp_path) -> None:
    async with filao.connect(tmp_path / "lone.db") as broker:
        await broker.declare(filao.Queue("q"))
        await broker.send_to_queue("q", 1)
        with pytest.raises(ZeroDivisionError):
            await send_in_vain(broker)
        await broker.send_to_queue("q", 3)
        stats = await broker.stats("q")
        assert (stats.sent, stats.ready) == (2, 2)


async def send_in_vain(broker: filao.Broker) -> None:
    async with broker.transaction() as transaction:
        await transaction.send_to_queue("q", 2)
        raise ZeroDivisionError


async def test_who_comes_to_wait_is_called_by_a_sender_who_knew_of_nobody(tmp_path) -> None:
    path = tmp_path / "lone.db"
    async with filao.connect(path) as sender, filao.connect(path) as other:
        await sender.declare(filao.Queue("q"))
        for receiver in (other, sender, other, sender):
            waiting = asyncio.ensure_future(receiver.receive_from_queue("q"))
            while not is_waited_for(path):
                await asyncio.sleep(0)
            statements, _ = await counted(sender, path, lambda: sender.send_to_queue("q", "news"))
            assert any("UPDATE filao_waiting" in statement for statement in statements)
            await (await waiting).ack()


def is_waited_for(path: Path) -> bool:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT 1 FROM filao_waiting WHERE called_at = 0").fetchone() is not None
