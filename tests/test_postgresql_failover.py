"""PostgreSQL when its server changes under us: promoted, restored, made anew, read-only, or back after a while."""

import asyncio
import struct
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

import filao
from filao.engines.postgresql import doctor, watch
from tests.conftest import engine_of, let_pass
from tests.support.proxy import Proxy
from tests.support.servers import Postgres, postgres_server, postgres_standby
from tests.support.working import until

pytestmark = pytest.mark.anyio

_names = count()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"failover{next(_names)}")


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("failover")
    let_pass(folder)
    return folder


@pytest.fixture
def primary(folder, postgres) -> Iterator[Postgres]:
    """Return a server of this test's own; `postgres` skips it where none is installed."""
    with postgres_server(folder / "primary") as server:
        yield server


async def test_a_standby_that_was_promoted_serves_those_who_wait(folder, primary) -> None:
    """Nothing of ours may need a restartpoint, which the standby has not had since the schema was made."""
    with postgres_standby(folder / "standby", primary) as standby:
        async with filao.connect(primary.url()) as broker:
            await broker.declare(filao.Queue("claims"))
            assert await broker.receive_from_queue("claims", wait=0.1) is None
            first = await broker.send_to_queue("claims", 1)
        with psycopg.connect(primary.url(), autocommit=True) as operator:
            (written,) = operator.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)
        with psycopg.connect(standby.url(), autocommit=True) as reader:
            async with asyncio.timeout(30):
                while reader.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (written,)).fetchone() != (True,):
                    await asyncio.sleep(0.01)
        primary.stop("immediate")
        standby.promote()
        async with filao.connect(standby.url()) as broker, filao.connect(standby.url()) as sender:
            message = await broker.receive_from_queue("claims", wait=0)
            assert message is not None
            assert message.id == first.id
            await message.ack()
            waiting = asyncio.create_task(broker.receive_from_queue("claims"))
            with psycopg.connect(standby.url(), autocommit=True) as operator:
                async with asyncio.timeout(10):
                    while operator.execute("SELECT count(*) FROM filao.waiting").fetchone() != (1,):
                        await asyncio.sleep(0.01)
                    await sender.send_to_queue("claims", 2)
                    assert (await waiting).body == 2
        primary.start()  # for the fixture to stop


async def test_what_a_synchronous_standby_need_not_have_is_not_confirmed(primary) -> None:
    """The server commits and only notes it, where an operator ends a wait for a standby that is away."""
    async with filao.connect(primary.url()) as broker:
        await broker.declare(filao.Queue("claims"))

        async def in_a_transaction() -> None:
            async with broker.transaction() as tx:
                await tx.send_to_queue("claims", 2)

        with psycopg.connect(primary.url(), autocommit=True) as operator:
            operator.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
            operator.execute("SELECT pg_reload_conf()")

            async def cut_off(send: Callable[[], Coroutine[Any, Any, object]]) -> None:
                cut = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                while True:  # a send that is done at once came before the server had heard of its standby
                    sending = asyncio.create_task(send())
                    while not sending.done() and not operator.execute(cut).fetchall():
                        await asyncio.sleep(0.01)
                    await sending

            async with asyncio.timeout(60):
                for send in (partial(broker.send_to_queue, "claims", 1), in_a_transaction):
                    with pytest.raises(filao.EngineUnavailable, match=r"synchronous standby.*open whether"):
                        await cut_off(send)
            operator.execute("ALTER SYSTEM RESET synchronous_standby_names")
            operator.execute("SELECT pg_reload_conf()")
        found = await broker.receive_many("claims", 100, wait=10)
        assert {message.body for message in found} == {1, 2}


async def test_a_process_takes_no_queue_of_a_schema_made_anew_for_the_one_it_knew(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        held = await broker.receive_from_queue("claims")
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("DROP SCHEMA filao CASCADE")
        async with filao.connect(url) as other:
            for name in ("letters", "bills"):
                await other.declare(filao.Queue(name))
            await other.send_to_queue("letters", "first")
            letter = await other.receive_from_queue("letters")
            with pytest.raises(filao.QueueNotFound, match="claims"):
                await broker.send_to_queue("claims", 2)
            with pytest.raises(filao.LeaseLost):
                await held.ack()
            assert (await other.stats("letters")).leased == 1
            await letter.ack()
            await other.declare(filao.Queue("claims"))
            await broker.send_to_queue("claims", 3)
            (message,) = await other.receive_many("claims", 1, wait=5)
            assert message.body == 3


async def test_what_is_restored_under_those_who_wait_is_found(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(3))
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("CREATE TABLE kept AS TABLE filao.message")
            await asyncio.gather(*(message.ack() for message in await broker.receive_many("claims", 3)))
            assert await broker.receive_from_queue("claims", wait=0) is None
            operator.execute("TRUNCATE filao.message, filao.waiting")
            operator.execute("INSERT INTO filao.message TABLE kept")
        assert [message.body for message in await broker.receive_many("claims", 3, wait=5)] == [0, 1, 2]


async def test_a_server_that_became_read_only_is_left_for_the_one_behind_the_same_name(url) -> None:
    """As a host name that points to the new primary: the session with the old one stays open, and refuses to write."""
    database = url.rpartition("/")[2]
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await engine_of(broker)._main.link._connection.execute("SET default_transaction_read_only = on")
        with pytest.raises(filao.EngineUnavailable, match=rf"{database}.*read-only.*Nothing was done"):
            await broker.send_to_queue("claims", 1)
        await broker.send_to_queue("claims", 2)
        async with broker.transaction() as tx:
            await tx.execute("SELECT 1")
        _, connection = engine_of(broker)._transactions._pool._free[0]
        await connection.execute("SET default_transaction_read_only = on")
        with pytest.raises(filao.EngineUnavailable, match="read-only"):
            async with broker.transaction() as tx:
                await tx.send_to_queue("claims", 3)
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 4)
        assert (await broker.stats("claims")).ready == 2


async def test_after_a_restart_nobody_is_struck_off_before_everybody_had_time_to_come_back(
    primary, monkeypatch
) -> None:
    monkeypatch.setattr(watch, "DEAD_AFTER", 0.0)
    with closing(Proxy(primary.port)) as proxy:
        async with filao.connect(primary.url()) as near, filao.connect(primary.url(port=proxy.port)) as far:
            await near.declare(filao.Queue("claims", lease=300))
            await near.send_to_queue("claims", 1)
            held = await far.receive_from_queue("claims")
            assert await near.receive_from_queue("claims", wait=0) is None
            before = engine_of(near)._listener._connection
            await asyncio.to_thread(primary.stop, "immediate")
            proxy.stall()  # it comes back later
            await asyncio.to_thread(primary.start)
            async with asyncio.timeout(30):
                while engine_of(near)._listener._connection in (None, before):
                    await asyncio.sleep(0.01)
                for _ in range(3):  # one finds who is missing, the next how long
                    await engine_of(near)._watch._look_after_all()
            proxy.go_on()
            await held.ack()
            assert (await near.stats("claims")).acked == 1

            monkeypatch.setattr(watch, "COME_BACK_WITHIN", 0.0)
            with psycopg.connect(primary.url(), autocommit=True) as operator:
                operator.execute("INSERT INTO filao.process (name, started_at, has_session) VALUES ('gone', 0, true)")
                for _ in range(3):
                    await engine_of(near)._watch._look_after_all()
                assert operator.execute("SELECT count(*) FROM filao.process WHERE name = 'gone'").fetchone() == (0,)


async def standby_reads(server: Postgres, slot: str, held: int) -> psycopg.pq.abc.PGconn:
    """Return the connection of a standby that tells, over a slot or without one, that it reads from `held` on."""
    standby = psycopg.pq.PGconn.connect(f"{server.url()}?replication=true&application_name=reader".encode())
    if slot:
        standby.exec_(f"CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL".encode())
    standby.exec_(f"START_REPLICATION {slot and f'SLOT {slot}'} PHYSICAL 0/1000000".encode())
    standby.put_copy_data(b"h" + struct.pack(">qIIII", 0, held, 0, 0, 0))
    standby.flush()
    told = "SELECT xmin::text FROM pg_replication_slots UNION SELECT backend_xmin::text FROM pg_stat_activity"
    with psycopg.connect(server.url(), autocommit=True) as operator:
        await until(lambda: (str(held),) in operator.execute(told).fetchall())
    return standby


async def leave_a_slot(server: Postgres, held: int) -> None:
    """Let a standby that read from transaction `held` on leave its slot behind, for good."""
    (await standby_reads(server, "gone", held)).finish()
    with psycopg.connect(server.url(), autocommit=True) as operator:
        operator.execute("ALTER SYSTEM SET max_slot_wal_keep_size = 0")
        operator.execute("SELECT pg_reload_conf()")

        def is_lost() -> bool:
            for statement in ("CREATE TABLE written ()", "DROP TABLE written", "SELECT pg_switch_wal()", "CHECKPOINT"):
                operator.execute(statement.encode())
            return operator.execute("SELECT wal_status FROM pg_replication_slots").fetchone() == ("lost",)

        await until(is_lost)


async def test_a_slot_that_was_left_behind_for_good_keeps_nobody_from_vacuuming(primary, monkeypatch) -> None:
    """It keeps nothing, but is listed with what it has kept."""
    monkeypatch.setattr(watch, "VACUUM_AFTER", -1)
    async with filao.connect(primary.url()) as broker:
        with psycopg.connect(primary.url(), autocommit=True) as operator:

            async def vacuumed() -> int:
                await engine_of(broker)._watch.vacuum()
                row = operator.execute("SELECT pg_stat_get_vacuum_count('filao.message'::regclass)").fetchone()
                return row[0] if row else 0

            (now,) = operator.execute("SELECT txid_current()").fetchone() or (0,)
            await leave_a_slot(primary, now)
            first = await vacuumed()
            await broker.declare(filao.Queue("claims"))
            assert await vacuumed() == first + 1


@pytest.mark.parametrize(("slot", "holder"), [("reads", "slot 'reads'"), ("", "the standby 'reader' (process ")])
async def test_the_doctor_names_a_standby_that_keeps_what_died(primary, monkeypatch, slot, holder) -> None:
    monkeypatch.setattr(doctor, "STANDBY_LATE", 1)
    async with filao.connect(primary.url()) as broker:

        async def told() -> list[str]:
            return [finding.text for finding in await broker.doctor() if finding.subject == "standbys"]

        assert await told() == []
        with psycopg.connect(primary.url(), autocommit=True) as operator:
            (now,) = operator.execute("SELECT txid_current()").fetchone() or (0,)
            standby = await standby_reads(primary, slot, now)
            operator.execute("SELECT txid_current()")
            (text,) = await told()
            assert holder in text
            assert "End the long query on" in text
            standby.finish()
            async with asyncio.timeout(20):
                while "End the long query on" in "".join(await told()):
                    await asyncio.sleep(0.01)
            for text in await told():
                operator.execute(text.partition("come back, or ")[2].rstrip(".").encode())
        assert await told() == []
