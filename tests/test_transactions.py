"""Transactions of a broker's: which messages they acknowledge, on each engine that has them."""

import asyncio
from itertools import count
from pathlib import Path

import pytest

import filao
from filao.broker import session_of
from filao.message import Deferred
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio
_others = count()


@pytest.fixture
def elsewhere(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> str:
    """Return the URL of another storage of the same engine."""
    if not url.startswith("postgresql"):
        return str(tmp_path / "other.db")
    server: Postgres = request.getfixturevalue("postgres")
    return server.create(f"elsewhere{next(_others)}")


async def test_a_transaction_acknowledges_no_message_of_another_storage(url, elsewhere) -> None:
    """Both have a first process, which leases a first message."""
    async with filao.connect(url) as here, filao.connect(elsewhere) as there:
        held = []
        for broker in (here, there):
            await broker.declare(filao.Queue("claims"))
            await broker.send_to_queue("claims", 1)
            held.append(await broker.receive_from_queue("claims"))
        with pytest.raises(filao.ConfigurationError, match="received by another broker"):
            async with here.transaction() as tx:
                await tx.ack(held[1])
        for message in held:
            await message.ack()


async def test_a_transaction_acknowledges_what_another_broker_on_its_storage_holds(url) -> None:
    async with filao.connect(url) as broker, filao.connect(url) as other:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        message = await broker.receive_from_queue("claims")
        async with other.transaction() as tx:
            await tx.ack(message)
        assert message.settled
        assert (await broker.stats("claims")).acked == 1


async def test_a_handler_that_acknowledges_in_its_transaction_itself_has_its_work_kept(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as tx:
            await tx.execute("CREATE TABLE payment (claim INTEGER)")
        worker = filao.Worker(broker)

        @worker.consumer("claims", guarantee="exactly-once")
        async def pay(message: filao.Message, tx: filao.Transaction) -> None:
            await tx.execute("INSERT INTO payment VALUES (?)", (message.body,))
            await tx.ack(message)

        await broker.send_to_queue("claims", 7)
        assert [handled.how for handled in await worker.drain(limit=1)] == ["acked"]
        async with broker.transaction() as tx:
            assert [row[0] for row in await tx.execute("SELECT claim FROM payment")] == [7]


async def test_what_is_no_message_is_not_acknowledged(url) -> None:
    async with filao.connect(url) as broker:
        with pytest.raises(filao.ConfigurationError, match="give a message"):
            async with broker.transaction() as tx:
                await tx.ack("no message")  # type: ignore[arg-type]  # users are not all typed


async def test_what_begins_after_its_block_was_left_is_undone_and_holds_up_nobody(url) -> None:
    """As of a handler that was given up while it waited for its turn."""
    async with filao.connect(url) as broker, filao.connect(url) as other:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as before:
            await before.execute("SELECT 1")
            async with Deferred(session_of(broker).transactions("test").begin) as deferred:
                late = asyncio.ensure_future(deferred.execute("SELECT 1", ()))
                while not deferred.has_begun():
                    await asyncio.sleep(0)
        with pytest.raises(filao.ConfigurationError, match="has ended meanwhile"):
            await late
        async with asyncio.timeout(20):
            await other.send_to_queue("claims", 1)
            await broker.send_to_queue("claims", 2)


async def test_a_coroutine_that_is_closed_in_its_transaction_lets_others_go_on(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        begun = asyncio.Event()

        async def send() -> None:
            async with broker.transaction() as tx:
                await tx.send_to_queue("claims", 1)
                begun.set()
                await asyncio.get_running_loop().create_future()

        sending = send()
        task = asyncio.create_task(sending)
        async with asyncio.timeout(30):
            await begun.wait()
            sending.close()  # as a frame is that nobody holds any more: it can wait for nothing
            assert (await broker.stats("claims")).ready == 0
        task.cancel()
        await asyncio.wait([task])
        assert isinstance(task.exception(), RuntimeError)  # it had nothing left to run


async def test_a_broker_is_not_closed_in_its_own_transaction(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 1)
            with pytest.raises(filao.ConfigurationError, match="wait for the transaction that it is made in"):
                await broker.close()
        assert (await broker.stats("claims")).ready == 1
