"""Transactions of a broker's: which messages they acknowledge, on each engine that has them."""

import asyncio
from itertools import count
from pathlib import Path

import pytest

import filao
import filao.sync
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


async def test_a_call_that_would_wait_for_another_brokers_transaction_around_it_is_refused_at_once(tmp_path) -> None:
    file = tmp_path / "claims.db"
    async with filao.connect(file) as broker, filao.connect(file) as other:
        await broker.declare(filao.Queue("claims"))
        await other.send_to_queue("claims", 1)
        message = await other.receive_from_queue("claims")
        third = filao.connect(file)
        async with broker.transaction() as tx:
            for call in (other.send_to_queue("claims", 2), message.ack(), third.open()):
                with pytest.raises(filao.ConfigurationError, match=r"another broker.*the same file.*own methods"):
                    await call
            assert (await other.stats("claims")).leased == 1  # a look waits for nobody
            await tx.ack(message)
        async with filao.connect("sqlite://:memory:") as memory, memory.transaction():
            await other.send_to_queue("claims", 3)
            async with filao.connect("sqlite://:memory:") as another:
                await another.declare(filao.Queue("claims"))


def test_a_blocking_broker_is_not_opened_inside_a_transaction_for_which_it_would_wait(tmp_path) -> None:
    file = tmp_path / "claims.db"
    other = filao.sync.connect(file)
    with filao.sync.connect(file) as broker:
        broker.declare(filao.Queue("claims"))
        with broker.transaction() as tx:
            tx.send_to_queue("claims", 1)
            with pytest.raises(filao.ConfigurationError, match="another broker of this program"):
                other.open()
        with other:
            assert other.stats("claims").ready == 1


async def test_on_postgresql_another_broker_of_the_program_need_not_wait_for_a_transaction(postgres) -> None:
    url = postgres.create(f"elsewhere{next(_others)}")
    async with filao.connect(url) as broker, filao.connect(url) as other:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 1)
            await other.send_to_queue("claims", 2)


async def test_an_exactly_once_handler_is_told_at_once_that_its_programs_broker_would_wait_for_it(tmp_path) -> None:
    file = tmp_path / "claims.db"
    blocking = filao.sync.connect(file)
    await asyncio.to_thread(blocking.open)
    worker = filao.Worker(file)

    @worker.consumer(filao.Queue("claims", max_attempts=1), guarantee="exactly-once")
    def pay(message: filao.sync.Message, tx: filao.sync.Transaction) -> None:
        blocking.send_to_queue("claims", "before the first statement", delay=60)
        tx.execute("CREATE TABLE payment (claim INTEGER)")
        blocking.send_to_queue("claims", "never")

    async with filao.connect(file) as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        await broker.send_to_queue("claims", 1)
        (handled,) = await worker.drain()
        assert (handled.how, "use the transaction's own methods" in handled.error) == ("dead", True)
        assert (await broker.stats("claims")).delayed == 1
    await asyncio.to_thread(blocking.close)


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
