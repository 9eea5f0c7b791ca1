"""The side on the event loop: transactions of the user's are left alone, the dead are buried, nobody waits for ever."""

import asyncio
import os
import sqlite3

import pytest

import filao
from filao.engines.sqlite import engine as sqlite_engine
from filao.engines.sqlite import files
from tests.conftest import engine_of

pytestmark = pytest.mark.anyio


def leave_a_corpse(path) -> None:
    """Enter a process that is dead: nobody has its bell."""
    db = sqlite3.connect(path)
    with db:
        db.execute("INSERT INTO filao_process (bell, name, started_at) VALUES ('nobody', 'elsewhere:1', 0)")
    db.close()
    os.mkfifo(path.with_name(path.name + "-filao") / "nobody")


def processes(path) -> int:
    count: int
    db = sqlite3.connect(path)
    ((count,),) = db.execute("SELECT count(*) FROM filao_process WHERE bell = 'nobody'")
    db.close()
    return count


async def test_housekeeping_waits_for_a_transaction_of_the_users(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    monkeypatch.setattr(sqlite_engine, "IDLE_BEFORE_TIDY", 0.001)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        waiting = asyncio.ensure_future(broker.receive_from_queue("claims"))
        leave_a_corpse(path)
        async with broker.transaction() as transaction:
            await transaction.execute("CREATE TABLE mine (number INTEGER)")
            for number in range(300):
                await transaction.execute("INSERT INTO mine VALUES (?)", (number,))
                engine_of(broker)._untidy = number % 2 == 0
            await transaction.send_to_queue("claims", "sent with it")
        assert (await waiting).body == "sent with it"
        async with broker.transaction() as transaction:
            assert await transaction.execute("SELECT count(*) FROM mine") == [(300,)]


async def test_a_waiting_consumer_buries_the_dead(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        leave_a_corpse(path)
        waiting = asyncio.ensure_future(broker.receive_from_queue("claims"))
        async with asyncio.timeout(30):
            while await asyncio.to_thread(processes, path):
                pass
        waiting.cancel()


async def test_a_busy_consumer_buries_the_dead_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        assert await broker.receive_from_queue("claims", wait=0) is None  # it receives, but never waits
        leave_a_corpse(path)
        async with asyncio.timeout(30):
            while await asyncio.to_thread(processes, path):
                pass


async def test_a_cancelled_transaction_is_undone_and_lets_others_write(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker, filao.connect(tmp_path / "claims.db") as other:
        await broker.declare(filao.Queue("claims"))
        inside = asyncio.Event()

        async def hold() -> None:
            async with broker.transaction() as transaction:
                await transaction.send_to_queue("claims", 1)
                inside.set()
                await asyncio.Event().wait()

        holding = asyncio.ensure_future(hold())
        await inside.wait()
        sending = asyncio.ensure_future(other.send_to_queue("claims", 2))
        holding.cancel()
        await sending
        assert (await broker.stats("claims")).sent == 1
        await broker.send_to_queue("claims", 3)


@pytest.mark.parametrize(
    "statement",
    ["INSERT OR ROLLBACK INTO paid VALUES (7)", "INSERT INTO refused VALUES (7)", "INSERT INTO paid VALUES (8)"],
)
async def test_a_statement_that_ended_the_transaction_undoes_all_of_it(tmp_path, statement) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as tx:
            await tx.execute("CREATE TABLE paid (claim INTEGER UNIQUE)")
            await tx.execute("CREATE TABLE refused (claim INTEGER)")
            await tx.execute("INSERT INTO paid VALUES (7)")
            for table, condition in (("refused", "1"), ("paid", "new.claim = 8")):
                await tx.execute(
                    f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} WHEN {condition} "
                    "BEGIN SELECT RAISE(ROLLBACK, 'no'); END"
                )
        await broker.send_to_queue("claims", "work")
        message = await broker.receive_from_queue("claims")
        transaction = message.transaction()
        tx = await transaction.__aenter__()
        await tx.send_to_queue("claims", "answer")
        await tx.execute("INSERT INTO paid VALUES (1)")
        with pytest.raises(filao.ConfigurationError, match="ended this transaction"):
            await tx.execute(statement)
        for call in (tx.execute("INSERT INTO paid VALUES (2)"), tx.send_to_queue("claims", "answer")):
            with pytest.raises(filao.ConfigurationError, match="nothing more"):
                await call
        with pytest.raises(filao.ConfigurationError, match="undone"):
            await transaction.__aexit__(None, None, None)
        assert not message.settled
        stats = await broker.stats("claims")
        assert (stats.sent, stats.leased) == (1, 1)
        await message.ack()
        async with broker.transaction() as tx:
            assert await tx.execute("SELECT claim FROM paid") == [(7,)]


async def test_a_transaction_cancelled_while_it_waits_for_its_turn_takes_none(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker, filao.connect(tmp_path / "claims.db") as other:
        await broker.declare(filao.Queue("claims"))

        async def hold() -> None:
            async with broker.transaction():
                raise AssertionError("it began")

        async with other.transaction() as transaction:
            holding = asyncio.ensure_future(hold())
            await transaction.execute("SELECT 1")
            holding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await holding
        await other.send_to_queue("claims", 1)
        await broker.send_to_queue("claims", 2)
        assert (await broker.stats("claims")).sent == 2


async def test_whoever_waits_too_long_for_its_turn_gives_up_and_was_not_done(tmp_path, monkeypatch) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker, filao.connect(tmp_path / "claims.db") as other:
        await broker.declare(filao.Queue("claims"))
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.05)
        async with other.transaction():
            with pytest.raises(filao.EngineUnavailable, match=r"claims\.db has been locked"):
                await broker.send_to_queue("claims", "given up")
        await broker.send_to_queue("claims", "done")
        assert [message.body for message in await broker.receive_many("claims", 9, wait=0)] == ["done"]


async def test_a_purge_of_many_messages_lets_others_write_in_between(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "SLICE", 10)
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(35))
        await broker.send_many("claims", range(25), delay=60, group="g")
        assert await broker.purge("claims") == 60
        await broker.send_many("claims", range(35))
        for message in await broker.receive_many("claims", 35):
            await message.reject("no")
        assert await broker.redrive("claims", limit=12) == 12
        assert await broker.redrive("claims") == 23
        assert (await broker.stats("claims")).ready == 35


async def test_a_redrive_takes_each_dead_letter_once_though_it_dies_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "SLICE", 5)
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(35))

        async def reject_all() -> None:
            async for message in broker.consume("claims"):
                await message.reject("no")

        rejecting = asyncio.ensure_future(reject_all())
        async with asyncio.timeout(30):
            while (await broker.stats("claims")).dead < 35:
                pass
            assert await broker.redrive("claims") == 35
        rejecting.cancel()


async def test_ids_that_were_given_before_there_were_salts_stay_valid(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", [1, 2, 3])
        async with broker.transaction() as tx:
            ((file,),) = await tx.execute("SELECT value FROM filao_meta WHERE name = 'file'")
            await tx.execute("UPDATE filao_message SET salt = NULL WHERE id < 3")
        assert [message.id for message in await broker.peek("claims")][:2] == [f"{file}-1", f"{file}-2"]
        assert [message.body for message in await broker.peek("claims", after=f"{file}-1")] == [2, 3]
        assert not await broker.cancel("claims", f"{file}-3")  # it has a salt of its own
        assert await broker.cancel("claims", f"{file}-2")


async def test_the_connection_is_replaced_after_the_disk_failed(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        database = engine_of(broker)._database
        before = database._db
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC"

        def fail() -> None:
            with database.write(durable=True):
                raise error

        with pytest.raises(filao.EngineUnavailable, match="disk"):
            await engine_of(broker)._alone(fail)
        await broker.send_to_queue("claims", 2)
        assert database._db is not before
        assert (await broker.stats("claims")).ready == 2


async def test_a_call_for_one_who_left_goes_on_to_the_next(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 3600.0)  # nothing but the call tells
    path = tmp_path / "claims.db"
    async with filao.connect(path) as first, filao.connect(path) as second, filao.connect(path) as sender:
        await sender.declare(filao.Queue("claims"))
        left = asyncio.ensure_future(first.receive_from_queue("claims"))
        await until_waiting(path, 1)
        stays = asyncio.ensure_future(second.receive_from_queue("claims"))
        await until_waiting(path, 2)
        left.cancel()
        await sender.send_to_queue("claims", 7)
        async with asyncio.timeout(30):
            assert (await stays).body == 7


async def until_waiting(path, count: int) -> None:
    async with asyncio.timeout(30):
        while await asyncio.to_thread(_waiting, path) < count:
            pass


def _waiting(path) -> int:
    count: int
    db = sqlite3.connect(path)
    ((count,),) = db.execute("SELECT count(*) FROM filao_waiting")
    db.close()
    return count
