"""The side on the event loop: transactions of the user's are left alone, the dead are buried, nobody waits for ever."""

import asyncio
import errno
import os
import sqlite3
import threading
import time
from contextlib import closing, suppress
from functools import partial
from typing import Any

import pytest

import filao
from filao.broker import session_of
from filao.engines.sqlite import control, files, housekeeping
from filao.engines.sqlite import engine as sqlite_engine
from filao.engines.sqlite import processes as processes_module
from filao.engines.sqlite.presence import Presence
from filao.engines.sqlite.thread import Tickets
from tests.conftest import engine_of, on_connection

pytestmark = pytest.mark.anyio


CORPSE = "0123456789abcdef"  # the bell of a process that is dead


def leave_a_corpse(path) -> None:
    """Enter a process that is dead: nobody has its bell."""
    db = sqlite3.connect(path)
    with db:
        db.execute(f"INSERT INTO filao_process (bell, name, started_at) VALUES ('{CORPSE}', 'elsewhere:1', 0)")
    db.close()
    with suppress(FileExistsError):
        os.mkfifo(path.with_name(path.name + "-filao") / CORPSE)


def processes(path) -> int:
    count: int
    db = sqlite3.connect(path)
    ((count,),) = db.execute(f"SELECT count(*) FROM filao_process WHERE bell = '{CORPSE}'")
    db.close()
    return count


async def test_housekeeping_waits_for_a_transaction_of_the_users(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 0.001)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        waiting = asyncio.ensure_future(broker.receive_from_queue("claims"))
        leave_a_corpse(path)
        async with broker.transaction() as transaction:
            await transaction.execute("CREATE TABLE mine (number INTEGER)")
            for number in range(300):
                await transaction.execute("INSERT INTO mine VALUES (?)", (number,))
                engine_of(broker)._database.has_written = number % 2 == 0
            await transaction.send_to_queue("claims", "sent with it")
        assert (await waiting).body == "sent with it"
        async with broker.transaction() as transaction:
            assert await transaction.execute("SELECT count(*) FROM mine") == [(300,)]


async def test_a_group_with_thousands_of_delayed_messages_can_be_declared_anew(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(1500), group="policy-12", delay=3600)
        stats = await broker.stats("claims")
        assert (stats.delayed, stats.blocked) == (1, 1499)
        await broker.declare(filao.Queue("claims", group_failure="skip"))
        stats = await broker.stats("claims")
        assert (stats.delayed, stats.blocked) == (1500, 0)


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


async def test_a_bell_that_may_not_be_removed_is_left_and_its_dead_owner_is_buried(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    path, unlink = tmp_path / "claims.db", os.unlink

    def denied(name: str, **options: Any) -> None:
        if name == CORPSE:
            raise PermissionError(errno.EPERM, "Operation not permitted", name)
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", denied)
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        assert await broker.receive_from_queue("claims", wait=0) is None
        for _ in range(2):  # the watch goes on after the first
            leave_a_corpse(path)
            async with asyncio.timeout(30):
                while await asyncio.to_thread(processes, path):
                    pass


@pytest.mark.parametrize("at", ["watch", "housekeeping"])
async def test_no_unforeseen_error_ends_what_a_file_needs_in_the_background(tmp_path, monkeypatch, caplog, at) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 0.001)
    turns: list[str] = []

    def unforeseen(*_: object, **__: object) -> bool:
        turns.append(at)
        raise MemoryError

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        assert await broker.receive_from_queue("claims", wait=0) is None
        monkeypatch.setattr(*((Presence, "dead") if at == "watch" else (housekeeping, "tidy")), unforeseen)
        async with asyncio.timeout(30):
            while len(turns) < 3:
                await broker.send_to_queue("claims", 1)
    assert f"the {at} of a SQLite file failed and goes on: 'MemoryError: '" in caplog.text


async def test_a_group_that_a_transaction_has_emptied_begins_with_what_it_sends_next() -> None:
    async with filao.connect("sqlite://:memory:") as broker:
        await broker.declare(filao.Queue("claims", max_length=1, overflow="drop_oldest"))
        async with broker.transaction() as tx:
            for body, group in ((1, "g"), (2, None), (3, "g")):
                await tx.send_to_queue("claims", body, group=group)
        message = await broker.receive_from_queue("claims", wait=0)
        assert message is not None
        assert message.body == 3


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


LASTING = [
    "PRAGMA query_only = ON",
    "EXPLAIN PRAGMA query_only = ON",
    "-- a remark\n; pragma locking_mode = exclusive",
    "CREATE TEMP TRIGGER never BEFORE INSERT ON filao_message BEGIN SELECT RAISE(ABORT, 'never'); END",
    "CREATE TEMP TABLE filao_message (id INTEGER)",
]


@pytest.mark.parametrize("statement", LASTING)
@pytest.mark.parametrize("end", ["committed", "undone"])
async def test_what_a_statement_leaves_on_the_connection_ends_with_its_transaction(tmp_path, statement, end) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        with suppress(filao.EngineError, ZeroDivisionError):  # one makes even its own transaction fail
            async with broker.transaction() as tx:
                await tx.execute(statement)
                _ = 1 / (end == "committed")
        await broker.send_to_queue("claims", 1)
        async with filao.connect(tmp_path / "claims.db") as other:
            await other.send_to_queue("claims", 2)
        assert [(await broker.receive_from_queue("claims")).body for _ in range(2)] == [1, 2]


async def test_a_statement_that_may_leave_something_costs_no_message_in_memory() -> None:
    async with filao.connect("sqlite://:memory:") as broker:
        await broker.declare(filao.Queue("claims"))
        async with broker.transaction() as tx:
            await tx.execute("CREATE TABLE paid (claim INTEGER)")
            await tx.execute("INSERT INTO paid VALUES (7)")
            await tx.send_to_queue("claims", 1)
        async with broker.transaction() as tx:
            assert await tx.execute("SELECT claim FROM paid") == [(7,)]
        assert (await broker.receive_from_queue("claims")).body == 1


@pytest.mark.parametrize("statement", LASTING)
async def test_what_a_statement_leaves_ends_with_its_transaction_in_memory_too(statement) -> None:
    async with filao.connect("sqlite://:memory:") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        held = await broker.receive_from_queue("claims")
        with suppress(filao.EngineError):  # one makes even its own transaction fail
            async with broker.transaction() as tx:
                await tx.execute(statement)
        await held.ack()
        await broker.send_to_queue("claims", 2)
        assert (await broker.receive_from_queue("claims")).body == 2


async def test_a_queue_whose_rules_are_unreadable_stops_no_other(tmp_path, filao_clock) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path, clock=filao_clock) as broker:
        await broker.declare(filao.Queue("broken"), filao.Queue("claims"))
        for queue in ("broken", "claims"):
            await broker.send_to_queue(queue, "held")
            await broker.receive_from_queue(queue)
            await broker.send_to_queue(queue, "expires", ttl=1)
        with closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE filao_queue SET rules = '?' WHERE name = 'broken'")
        filao_clock.advance(2)
        assert (await broker.stats("claims")).dead == 1
        assert [letter.body for letter in await broker.dead_letters("claims")] == ["expires"]
        await broker.send_to_queue("claims", "expires", ttl=1)
        filao_clock.advance(2)
        while await engine_of(broker)._jobs.alone(partial(engine_of(broker)._housekeeper.tidy_some, idle=True)):
            pass
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT dead FROM filao_queue WHERE name = 'claims'").fetchone() == (2,)
    async with filao.connect(path, clock=filao_clock) as broker:
        assert [message.body for message in await broker.receive_many("claims", 9, wait=0)] == ["held"]


async def test_a_purge_that_fails_half_way_tells_what_is_done(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(control, "SLICE", 2)
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", [1, 2, 3])
        with closing(sqlite3.connect(tmp_path / "claims.db")) as other:
            other.execute(
                """
                CREATE TRIGGER stays BEFORE DELETE ON filao_message
                WHEN OLD.content = CAST('3' AS BLOB) BEGIN SELECT RAISE(ABORT, 'it stays'); END
                """
            )
        with pytest.raises(filao.EngineError, match=r"^2 messages are done, and will stay so.*it stays"):
            await broker.purge("claims")
        assert (await broker.stats("claims")).ready == 1


@pytest.mark.parametrize("name", ["claims.db", ":memory:"])
async def test_a_checkpoint_in_a_transaction_is_told_that_it_cannot_run_there(tmp_path, name) -> None:
    path = tmp_path / name if name == "claims.db" else name
    async with filao.connect(path) as broker, broker.transaction() as tx:
        with pytest.raises(filao.EngineError, match="needs what its own connection is using") as refused:
            await tx.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert not isinstance(refused.value, filao.EngineUnavailable)  # the same call will not succeed later


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


async def test_a_call_that_waits_too_long_for_its_turn_gives_up_and_was_not_done(tmp_path, monkeypatch) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker, filao.connect(tmp_path / "claims.db") as other:
        await broker.declare(filao.Queue("claims"))
        async with other.transaction():
            with monkeypatch.context() as patch:
                patch.setattr(files, "BUSY_TIMEOUT", 0.05)
                with pytest.raises(
                    filao.EngineUnavailable, match=r"claims\.db has been locked.* broker of this process"
                ):
                    await broker.send_to_queue("claims", "given up")
        await broker.send_to_queue("claims", "done")
        assert [message.body for message in await broker.receive_many("claims", 9, wait=0)] == ["done"]


async def test_a_purge_of_many_messages_lets_others_write_in_between(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(control, "SLICE", 10)
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
    monkeypatch.setattr(control, "SLICE", 5)
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


async def test_a_closing_process_gives_back_all_that_it_holds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processes_module, "LEASES_AT_ONCE", 10)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(35))
        assert len(await broker.receive_many("claims", 35)) == 35
    async with filao.connect(path) as broker:
        assert [message.attempt for message in await broker.receive_many("claims", 40, wait=0)] == [1] * 35


async def test_a_report_is_about_the_process_that_makes_it(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as one, filao.connect(path) as other:  # of one host and pid, as in two containers
        await one.declare(filao.Queue("claims"))
        for broker in (one, other):
            await broker.receive_from_queue("claims", wait=0)
        sibling = session_of(one).sibling()
        assert sibling is not None
        await sibling.open()
        await sibling.report("ready and healthy")
        await sibling.close()
        async with one.transaction() as tx:
            states = await tx.execute("SELECT state FROM filao_process ORDER BY id")
        assert states == [("ready and healthy",), ("",)]


async def test_those_who_wait_write_nothing_while_others_send(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sqlite_engine, "POLL_INTERVAL", 0.001)
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker, filao.connect(path) as other:
        names = [f"claims.{number}" for number in range(20)]
        await broker.declare(*(filao.Queue(name) for name in [*names, "busy"]))
        waiting = [asyncio.ensure_future(broker.receive_from_queue(name)) for name in names]
        await until_waiting(path, 20)
        begun: list[str] = []
        looked: list[str] = []

        def trace(sql: str) -> None:
            begun.extend([sql] * sql.startswith("BEGIN"))
            looked.extend([sql] * ("data_version" in sql))

        await on_connection(broker, "set_trace_callback", trace)
        async with asyncio.timeout(30):
            while len(looked) < 10:
                await other.send_to_queue("busy", 1)
        assert begun == []
        await other.send_to_queue("claims.7", "seven", delay=0.01)
        async with asyncio.timeout(30):
            assert (await waiting[7]).body == "seven"
        for one in waiting:
            one.cancel()


async def test_a_message_whose_lease_was_extended_late_leaves_no_failure_behind(tmp_path, clock) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("claims", lease=5))
        await broker.send_many("claims", [1, 2, 3])
        messages = await broker.receive_many("claims", 3)
        await broker.pause("claims")
        clock.advance(6)
        await broker.resume("claims")
        await broker.send_to_queue("claims", "first", priority=1)
        assert (await broker.receive_from_queue("claims")).body == "first"  # the others were looked over
        await asyncio.gather(*(message.extend(5) for message in messages))
        await messages[0].ack()
        await asyncio.gather(*(message.ack() for message in messages[1:]))
        async with broker.transaction() as tx:
            assert await tx.execute("SELECT count(*) FROM filao_failure") == [(0,)]
        assert (await broker.stats("claims")).acked == 3


async def test_housekeeping_comes_under_steady_traffic(tmp_path, monkeypatch, clock) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 0.001)
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("claims", dedup_window=5))
        for number in range(5):
            await broker.send_to_queue("claims", number, dedup_key=f"key {number}", ttl=20)
        assert len(await broker.receive_many("claims", 2)) == 2
        for message in await broker.receive_many("claims", 2):
            await message.ack()
        clock.advance(21)

        async def left() -> tuple[int, int]:
            async with broker.transaction() as tx:
                ((keys,),) = await tx.execute("SELECT count(*) FROM filao_dedup")
                ((expired,),) = await tx.execute("SELECT count(*) FROM filao_message WHERE expires_at < 1700000021000")
            return keys, expired

        async with asyncio.timeout(30):
            while (await left())[0] > 2:  # those of the leased
                await broker.send_to_queue("claims", "more")


async def test_housekeeping_keeps_up_with_what_steady_traffic_leaves_behind(tmp_path, monkeypatch, clock) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # this test does its rounds
    monkeypatch.setattr(processes_module, "TIDY_KEYS", 10)
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("claims", dedup_window=5))
        await broker.send_many("claims", [filao.Outgoing(key, dedup_key=str(key)) for key in range(200)])
        await asyncio.gather(*(message.ack() for message in await broker.receive_many("claims", 200)))
        clock.advance(6)
        left = []
        for _ in range(3):
            await engine_of(broker)._housekeeper._round(idle=False)
            async with broker.transaction() as tx:
                left += await tx.execute("SELECT count(*) FROM filao_dedup")
        assert left == [(160,), (80,), (0,)]


async def test_the_age_of_a_queue_costs_the_same_whatever_its_priorities(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        steps: list[int] = []
        for queue, priorities in (("some", 1_000), ("many", 3_000)):
            await broker.declare(filao.Queue(queue))
            await asyncio.gather(*(broker.send_to_queue(queue, 1, priority=priority) for priority in range(priorities)))
            count = [0]

            def step(count=count) -> None:
                count[0] += 1

            await on_connection(broker, "set_progress_handler", step, 1)
            assert (await broker.stats(queue)).oldest_ready_age is not None
            await on_connection(broker, "set_progress_handler", None, 1)
            steps.append(count[0])
            await broker.purge(queue)
        assert steps[1] < steps[0] * 1.2


async def test_the_first_use_of_a_name_reads_one_row(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(*(filao.Queue(f"claims.{number}") for number in range(200)))
    async with filao.connect(path) as broker:
        seen: list[str] = []
        await on_connection(broker, "set_trace_callback", seen.append)
        await broker.send_to_queue("claims.7", 7)
        assert not [sql for sql in seen if "filao_queue" in sql and " WHERE " not in sql]


async def test_who_takes_long_but_waits_for_nobody_is_not_given_up(tmp_path, monkeypatch) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        engine = engine_of(broker)
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 2.0)
        begun, may_end = asyncio.Event(), threading.Event()

        def examine(_: object) -> str:
            engine._loop.call_soon_threadsafe(begun.set)
            may_end.wait(30)
            return "examined"

        looking = asyncio.ensure_future(engine._jobs.look_up(examine))
        await begun.wait()
        engine._jobs.tickets.give_up(time.monotonic() + 60)
        may_end.set()
        assert await looking == "examined"


async def test_who_has_not_begun_in_time_is_told_and_the_others_are_waited_for() -> None:
    tickets, loop, now = (
        Tickets(lambda: filao.EngineUnavailable("too late"), lambda: None),
        asyncio.get_running_loop(),
        time.monotonic(),
    )
    late, begun, patient, ended = [loop.create_future() for _ in range(4)]
    for future in (ended, late, begun):
        ticket = tickets.hand_out(now + 3600, future)
    ticket.take()
    tickets.hand_out(now + 7200, patient)
    ended.set_result(None)
    tickets.give_up(now + 3601)
    assert isinstance(late.exception(), filao.EngineUnavailable)
    assert not begun.done()
    assert not patient.done()
    tickets.give_up(now + 7201)
    assert isinstance(patient.exception(), filao.EngineUnavailable)
    assert tickets._timer is None


async def test_who_may_wait_for_a_moment_only_is_not_kept_by_the_timer_of_others() -> None:
    tickets, loop, now = (
        Tickets(lambda: filao.EngineUnavailable("too late"), lambda: None),
        asyncio.get_running_loop(),
        time.monotonic(),
    )
    patient, hurried = loop.create_future(), loop.create_future()
    tickets.hand_out(now + 3600, patient)
    tickets.hand_out(now + 0.001, hurried)
    with pytest.raises(filao.EngineUnavailable):
        async with asyncio.timeout(20):
            await hurried
    assert not patient.done()
    patient.cancel()
    tickets.close()


async def test_a_closed_broker_leaves_no_timer(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        engine = engine_of(broker)
        await broker.declare(filao.Queue("claims"))
    timer = engine._jobs.tickets._timer
    assert timer is not None
    assert timer.cancelled()


async def test_the_connection_is_replaced_after_the_disk_failed(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        database = engine_of(broker)._database
        before = database.hold.db
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC"

        def fail() -> None:
            with database.write(durable=True):
                raise error

        with pytest.raises(filao.EngineUnavailable, match="disk"):
            await engine_of(broker)._jobs.alone(fail)
        await broker.send_to_queue("claims", 2)
        assert database.hold.db is not before
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


async def test_a_queue_that_is_sent_to_while_it_is_deleted_says_so(tmp_path, monkeypatch) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        emptied = control.SqliteOperators.remove

        async def remove(*arguments):
            done = await emptied(*arguments)
            await broker.send_to_queue("claims", 2)  # somebody else's, at the worst moment
            return done

        monkeypatch.setattr(control.SqliteOperators, "remove", remove)
        with pytest.raises(filao.ConfigurationError, match=r"1 message came into it since.*Stop its senders"):
            await broker.delete_queue("claims", messages=True)
