"""Sends that join a transaction of the user's: they appear when it commits, or never."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import aiosqlite
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import filao
import filao.sync
from filao.broker import session_of
from filao.engine import Send
from filao.engines.sqlite import own

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker(tmp_path):
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        yield broker


async def waiting(broker: filao.Broker) -> int:
    return (await broker.stats("claims")).ready


async def test_a_send_appears_with_the_commit_of_a_sqlite3_connection(broker, tmp_path) -> None:
    connection = sqlite3.connect(tmp_path / "claims.db")
    connection.execute("CREATE TABLE claim (id INTEGER)")
    with connection:
        connection.execute("INSERT INTO claim VALUES (7)")
        receipt = await broker.send_to_queue("claims", {"claim_id": 7}, within=connection)
        assert await waiting(broker) == 0
    message = await broker.receive_from_queue("claims")
    assert (message.id, message.body) == (receipt.id, {"claim_id": 7})
    connection.close()


async def test_a_send_disappears_with_a_rollback(broker, tmp_path) -> None:
    connection = sqlite3.connect(tmp_path / "claims.db")
    await broker.send_to_queue("claims", 7, within=connection, dedup_key="k")
    connection.rollback()
    connection.close()
    assert await waiting(broker) == 0
    assert not (await broker.send_to_queue("claims", 7, dedup_key="k")).duplicate


async def test_a_waiting_consumer_finds_what_such_a_commit_brought(broker, tmp_path) -> None:
    receiving = asyncio.ensure_future(broker.receive_from_queue("claims"))
    connection = sqlite3.connect(tmp_path / "claims.db")
    await broker.send_to_queue("claims", 7, within=connection)
    connection.commit()
    connection.close()
    assert (await receiving).body == 7


async def test_a_transaction_that_began_with_a_read_is_told_to_begin_anew(broker, tmp_path) -> None:
    connection = sqlite3.connect(tmp_path / "claims.db", isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM filao_queue").fetchall()
    await broker.send_to_queue("claims", "meanwhile")
    with pytest.raises(filao.EngineError, match=r"began with a read.*begin anew, with BEGIN IMMEDIATE") as raised:
        await broker.send_to_queue("claims", 7, within=connection)
    assert type(raised.value) is filao.EngineError  # the same call would never succeed
    connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    await broker.send_to_queue("claims", 7, within=connection)
    connection.execute("COMMIT")
    connection.close()
    assert await waiting(broker) == 2


async def send_where_nothing_may_be_written(broker: filao.Broker, path: Path, how: str) -> None:
    if how == "own transaction":
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 1)
            await tx.execute("PRAGMA query_only = ON")  # it commits nothing then
    elif how == "sqlalchemy":
        engine = sqlalchemy.create_engine(f"sqlite:///{path}", poolclass=sqlalchemy.NullPool)
        with engine.connect() as held:
            held.exec_driver_sql("PRAGMA query_only = ON")
            await broker.send_to_queue("claims", 1, within=held)
    else:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode={how}", uri=True)) as given:
            given.execute(f"PRAGMA query_only = {int(how == 'rw')}")
            await broker.send_to_queue("claims", 1, within=given)


@pytest.mark.parametrize("how", ["rw", "ro", "sqlalchemy", "own transaction"])
async def test_a_connection_that_refuses_to_write_is_blamed_and_no_permissions(broker, tmp_path, how) -> None:
    with pytest.raises(filao.EngineError, match=r"this connection refuses to.*query_only.*Nothing was done; .*\.$"):
        await send_where_nothing_may_be_written(broker, tmp_path / "claims.db", how)
    assert await waiting(broker) == 0
    await broker.send_to_queue("claims", 2)


@pytest.mark.parametrize("kind", ["connection", "session"])
async def test_sqlalchemy_holds_the_transaction(broker, tmp_path, kind) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'claims.db'}")
    held = engine.connect() if kind == "connection" else Session(engine)
    with held:
        held.execute(sqlalchemy.text("CREATE TABLE claim (id INTEGER)"))
        await broker.send_to_queue("claims", 1, within=held)
        held.rollback()
        assert await waiting(broker) == 0
        held.execute(sqlalchemy.text("CREATE TABLE other (id INTEGER)"))
        await broker.send_to_queue("claims", 2, within=held)
        held.commit()
    engine.dispose()
    assert (await broker.receive_from_queue("claims", wait=0)).body == 2


async def test_what_is_sent_before_any_statement_is_committed_by_sqlalchemys_connection(broker, tmp_path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'claims.db'}")
    with engine.connect() as connection:
        await broker.send_to_queue("claims", 1, within=connection)
        connection.commit()
    with engine.connect() as connection:
        await broker.send_to_queue("claims", 2, within=connection)
        connection.rollback()
    engine.dispose()
    assert [stored.body for stored in await broker.peek("claims")] == [1]


async def test_what_sqlalchemy_says_instead_of_joining_ends_in_our_error(broker, tmp_path) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'claims.db'}")
    closed = engine.connect()
    closed.close()
    failed = Session(engine)
    failed.connection().invalidate()
    for held in (closed, failed):
        with pytest.raises(filao.EngineError, match=r"within=.*sqlalchemy\.exc\..*Nothing was sent"):
            await broker.send_to_queue("claims", 1, within=held)
    failed.close()
    engine.dispose()
    assert await waiting(broker) == 0


async def test_an_asynchronous_connection_is_refused_with_the_right_form(broker, tmp_path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'claims.db'}")
    async with engine.connect() as connection:
        with pytest.raises(filao.ConfigurationError, match=r"AsyncConnection is asynchronous.*run_sync"):
            await broker.send_to_queue("claims", 1, within=connection)
    await engine.dispose()


async def test_aiosqlites_connection_is_refused_with_what_to_use(broker, tmp_path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'claims.db'}")
    joined = partial(session_of(broker).transactions("").send_within, operation=Send("claims", ()))
    with pytest.raises(filao.ConfigurationError, match=r"aiosqlite keeps its.*use a filao\.Outbox"):
        async with engine.connect() as connection:
            await connection.run_sync(joined)
    await engine.dispose()
    async with aiosqlite.connect(tmp_path / "claims.db") as alone:
        with pytest.raises(filao.ConfigurationError, match=r"aiosqlite keeps its.*use a filao\.Outbox"):
            await broker.send_to_queue("claims", 1, within=alone)


async def test_the_rules_hold_within_a_transaction_too(broker, tmp_path) -> None:
    await broker.declare(filao.Queue("small", max_length=1, body_max=10), filao.Queue("wide", body_max=500_000))
    connection = sqlite3.connect(tmp_path / "claims.db")
    with pytest.raises(filao.QueueNotFound, match="claims"):
        await broker.send_to_queue("claim", 1, within=connection)
    async with filao.connect(tmp_path / "claims.db") as other:  # it has not asked for the rules yet, and cannot now
        with pytest.raises(filao.MessageTooLarge, match="small"):
            await other.send_to_queue("small", "x" * 20, within=connection)
        await other.send_to_queue("wide", "x" * 400_000, within=connection)  # more than queues usually allow
    await broker.send_to_queue("small", 1, within=connection)
    with pytest.raises(filao.QueueFull, match="small"):
        await broker.send_to_queue("small", 1, within=connection)
    connection.rollback()
    connection.close()


@pytest.mark.parametrize("wrong", ["text", 7, [], object()])
async def test_what_is_no_connection_is_refused(broker, wrong) -> None:
    with pytest.raises(filao.ConfigurationError, match="within="):
        await broker.send_to_queue("claims", 1, within=wrong)


async def test_a_connection_on_another_file_is_refused(broker, tmp_path) -> None:
    for place in (tmp_path / "other.db", ":memory:"):
        connection = sqlite3.connect(place)
        with pytest.raises(filao.ConfigurationError, match=r"claims\.db"):
            await broker.send_to_queue("claims", 1, within=connection)
        connection.close()


async def test_a_connection_without_a_transaction_is_refused(broker, tmp_path) -> None:
    connection = sqlite3.connect(tmp_path / "claims.db", isolation_level=None)
    with pytest.raises(filao.ConfigurationError, match="BEGIN IMMEDIATE"):
        await broker.send_to_queue("claims", 1, within=connection)
    connection.execute("BEGIN IMMEDIATE")
    await broker.send_to_queue("claims", 1, within=connection)
    connection.execute("COMMIT")
    connection.close()
    assert await waiting(broker) == 1


FORGOTTEN = r"transaction of this very process.*send with within="


@pytest.fixture
def alone(monkeypatch) -> None:
    """Let no thread count that the test runner has started."""
    monkeypatch.setattr(own, "OTHERS_WAIT", own.ALONE_WAITS)


async def test_a_send_that_forgot_within_is_told_at_once_whose_lock_it_is(broker, tmp_path, alone) -> None:
    connection = sqlite3.connect(tmp_path / "claims.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(filao.EngineUnavailable, match=FORGOTTEN):
        await broker.send_to_queue("claims", 1)
    with pytest.raises(filao.EngineUnavailable, match=FORGOTTEN):
        await broker.declare(filao.Queue("others"))
    await broker.send_to_queue("claims", 2, within=connection)
    connection.execute("COMMIT")
    connection.close()
    assert (await broker.receive_from_queue("claims", wait=0)).body == 2


def test_the_blocking_twin_tells_it_too(tmp_path, alone) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        connection = sqlite3.connect(tmp_path / "claims.db")
        with connection:
            connection.execute("CREATE TABLE claim (id INTEGER)")
            connection.execute("INSERT INTO claim VALUES (1)")
            with pytest.raises(filao.EngineUnavailable, match=FORGOTTEN):
                broker.send_to_queue("claims", 1)
        connection.close()


def test_a_send_waits_for_the_transaction_of_another_thread(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        begun = threading.Event()

        def hold() -> None:
            connection = sqlite3.connect(tmp_path / "claims.db", isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            begun.set()
            time.sleep(2 * own.ALONE_WAITS)  # what this is about is time that passes
            connection.execute("COMMIT")
            connection.close()

        holding = threading.Thread(target=hold)
        holding.start()
        begun.wait()
        broker.send_to_queue("claims", 1)
        holding.join()
        assert broker.stats("claims").ready == 1


def test_the_lock_of_another_process_is_not_taken_for_ones_own(tmp_path) -> None:
    path = tmp_path / "claims.db"
    with filao.sync.connect(path) as broker:
        broker.declare(filao.Queue("claims"))
        hold = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); input()"
        )
        other = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert not own.holds_lock(path)
        other.communicate(b"\n")
