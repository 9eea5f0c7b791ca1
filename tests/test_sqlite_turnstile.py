"""Nobody waits inside the turnstile for a lock that another program has on the file."""

import asyncio
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.engine import Batch
from filao.engines.sqlite import files, housekeeping
from filao.engines.sqlite.backup import back_up
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.folder import Folder
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.thread import Ticket
from filao.engines.sqlite.turnstile import Turnstile
from tests.conftest import engine_of, on_connection
from tests.support.instructions import stopped_at
from tests.support.programs import CLAIMS, db

if sys.platform != "win32":
    import fcntl

__all__ = ["db"]


WRITES = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN IMMEDIATE')"
HAS_TURN = "import fcntl, sys; turn = open(sys.argv[1] + '-filao/turnstile'); fcntl.flock(turn, fcntl.LOCK_EX)"


@contextmanager
def foreign_writer(db: Path, code: str = WRITES) -> Iterator[int]:
    """Hold SQLite's write lock, or the turnstile, in another program."""
    command = [sys.executable, "-c", f"{code}; print('held', flush=True); sys.stdin.read()", str(db)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as foreign:
        assert foreign.stdout is not None
        assert foreign.stdout.readline() == b"held\n"
        try:
            yield foreign.pid
        finally:
            foreign.communicate()


@pytest.mark.anyio
async def test_nobody_waits_inside_the_turnstile_for_a_foreign_transaction(db, monkeypatch) -> None:
    async with filao.connect(db) as first:
        with foreign_writer(db):
            sending = asyncio.create_task(first.send_to_queue(CLAIMS, 1))
            passed = 0
            for _ in range(500):
                await asyncio.sleep(0.001)
                passed += _is_free(db)
            assert passed > 100
            assert not sending.done()
        await sending


def _is_free(db: Path) -> bool:
    with files.sidecar(db).joinpath("turnstile").open() as turnstile:
        try:
            fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.anyio
async def test_a_foreign_transaction_is_waited_for_no_longer_than_the_bound(db, monkeypatch) -> None:
    broker = filao.connect(db)
    await broker.open()
    held = await broker.receive_from_queue(CLAIMS)
    with foreign_writer(db):
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.3)
        async with asyncio.timeout(20):
            for call in (broker.send_to_queue(CLAIMS, 1), held.ack(), broker.transaction().__aenter__()):
                with pytest.raises(filao.EngineUnavailable, match="locked"):
                    await call
            await broker.close()
    assert engine_of(broker)._database.hold.db is None


@contextmanager
def standing_still_in_a_turn(db: Path) -> Iterator[None]:
    """Hold the turnstile, as another process does that is stopped in its turn."""
    with files.sidecar(db).joinpath("turnstile").open() as turnstile:
        until = time.monotonic() + 20
        while True:
            try:
                fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < until
        yield


@pytest.mark.anyio
async def test_who_met_a_foreign_transaction_waits_no_longer_for_a_turn_than_others(db, monkeypatch) -> None:
    async with filao.connect(db) as broker, asyncio.timeout(20):
        begun: list[str] = []
        await on_connection(broker, "set_trace_callback", begun.append)
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 1.0)
        with foreign_writer(db):
            sending = asyncio.create_task(broker.send_to_queue(CLAIMS, 1))
            while "BEGIN IMMEDIATE" not in begun:
                await asyncio.sleep(0.001)
            standing = standing_still_in_a_turn(db)
            standing.__enter__()
        with pytest.raises(filao.EngineUnavailable, match="locked"):
            await sending
        standing.__exit__(None, None, None)


@pytest.mark.anyio
async def test_who_must_open_the_file_again_waits_no_longer_for_a_turn_than_others(db, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # or it may open the file
    async with filao.connect(db) as broker, asyncio.timeout(20):
        async with broker.transaction() as tx:
            await tx.execute("PRAGMA user_version")  # its connection is not used again
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.1)
        with standing_still_in_a_turn(db), pytest.raises(filao.EngineUnavailable, match="has been locked"):
            await broker.queues()


@pytest.mark.anyio
async def test_nobody_waits_inside_the_turnstile_while_a_file_is_opened(db) -> None:
    broker = filao.connect(db)
    with closing(sqlite3.connect(db, isolation_level=None)) as machine:
        machine.execute("DELETE FROM filao_meta WHERE name = 'clock'")  # it was started since, and that is to be noted
    with foreign_writer(db):
        opening = asyncio.create_task(broker.open())
        passed = 0
        async with asyncio.timeout(20):
            while passed < 100:
                await asyncio.sleep(0.001)
                passed += _is_free(db)
        assert not opening.done()
    await opening
    await broker.close()


@pytest.mark.anyio
async def test_a_call_behind_a_long_look_of_its_own_broker_is_told_so(db, monkeypatch) -> None:
    async with filao.connect(db) as broker:
        may_end = threading.Event()
        looking = asyncio.create_task(engine_of(broker)._jobs.look_up(lambda _: may_end.wait(20)))
        while not engine_of(broker)._jobs.is_looking:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.05)
        for call in (broker.send_to_queue(CLAIMS, 1), broker.stats(CLAIMS)):
            with pytest.raises(filao.EngineUnavailable, match="another call of this broker has been at work"):
                await call
        may_end.set()
        assert await looking


@pytest.mark.anyio
async def test_a_backup_waits_no_longer_for_a_turn_than_calls_do(db, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.1)
    async with asyncio.timeout(20):
        with standing_still_in_a_turn(db), pytest.raises(filao.EngineUnavailable, match="has been locked"):
            await asyncio.to_thread(back_up, db, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.anyio
async def test_a_look_of_several_parts_waits_no_longer_than_one_call(db, monkeypatch) -> None:
    begun, over = asyncio.Event(), asyncio.Event()

    async def hold(broker: filao.Broker) -> None:
        async with broker.transaction() as tx:
            await tx.execute("SELECT 1")
            begun.set()
            await over.wait()

    async with filao.connect(db) as broker, asyncio.timeout(20):
        holding = asyncio.create_task(hold(broker))
        await begun.wait()
        for look in (broker.stats, broker.peek, broker.purge):
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.1)
            looking = asyncio.create_task(look(CLAIMS))
            await asyncio.sleep(0)
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 1_000.0)  # for what has a limit of its own from now on
            with pytest.raises(filao.EngineUnavailable, match="a transaction of this broker"):
                await looking
        over.set()
        await holding


@pytest.mark.anyio
async def test_a_batch_counts_its_wait_from_when_its_first_came_to_the_line(db, monkeypatch) -> None:
    async with filao.connect(db) as broker, asyncio.timeout(20):
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 1_000.0)
        batch = Batch(receives=False, writes=True, take=lambda _: [], since=time.monotonic() - 1_000.0)
        with standing_still_in_a_turn(db), pytest.raises(filao.EngineUnavailable, match="has been locked"):
            await engine_of(broker).execute(batch)


@pytest.mark.anyio
@pytest.mark.parametrize("code", [WRITES, HAS_TURN])
async def test_who_has_waited_too_long_is_told_for_which_process(db, monkeypatch, code) -> None:
    async with filao.connect(db) as broker, asyncio.timeout(20):
        with foreign_writer(db, code) as pid:
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
            with pytest.raises(filao.EngineUnavailable, match=rf"locked .*by .*process {pid} \("):
                await broker.send_to_queue(CLAIMS, 1)


# --- beside a process that stands still in its turn ------------------------------------------------------------------


@contextmanager
def stopped_in_its_turn(db: Path) -> Iterator[int]:
    """Have another process stand still (SIGSTOP) in its turn, in a transaction; it goes on at the end."""
    with foreign_writer(db, f"{HAS_TURN}; {WRITES}") as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
            yield pid
        finally:
            os.kill(pid, signal.SIGCONT)


def left_of(db: Path) -> tuple[int, int]:
    """Return how many threads and descriptors this process has for a file; of the latter none where nothing tells."""
    threads = sum(thread.name == f"filao {db.name}" for thread in threading.enumerate())
    folder, found = Path("/proc/self/fd"), 0
    for name in folder.iterdir() if folder.exists() else ():
        with suppress(OSError):
            found += str(name.readlink()).startswith(str(db))
    return threads, found


async def until_left(db: Path, *wanted: int) -> None:
    async with asyncio.timeout(20):
        while left_of(db)[: len(wanted)] != wanted:
            await asyncio.sleep(0.01)


@pytest.fixture
def alone(db: Path) -> Path:
    """Return a file by whose name no other test's threads are called: they are counted by it."""
    there = db.with_name(f"{secrets.token_hex(4)}.db")
    files.sidecar(db).rename(files.sidecar(there))
    return db.rename(there)


@pytest.mark.anyio
async def test_looks_go_on_beside_a_process_that_stands_still_and_all_goes_on_with_it(alone, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)
    async with filao.connect(alone) as broker, asyncio.timeout(60):
        with stopped_in_its_turn(alone) as pid:
            for _ in range(3):
                monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
                with pytest.raises(filao.EngineUnavailable, match=rf"locked .*by .*process {pid} \("):
                    await broker.send_to_queue(CLAIMS, 1)
                monkeypatch.setattr(files, "BUSY_TIMEOUT", 1_000.0)
                async with asyncio.timeout(20):
                    assert (await broker.stats(CLAIMS)).ready == 3
                    assert len(await broker.peek(CLAIMS)) == 3
                    assert len(await broker.queues()) == 1
            assert left_of(alone)[0] <= 2  # one at most was left in line
            sending = asyncio.create_task(broker.send_to_queue(CLAIMS, 2))
        await sending
        assert [message.body for message in await broker.peek(CLAIMS)] == [0, 1, 2, 2]
        await until_left(alone, 1)
    await until_left(alone, 0, 0)


def test_a_blocking_broker_looks_beside_a_process_that_stands_still_too(alone, monkeypatch) -> None:
    with filao.sync.connect(alone) as broker:
        with stopped_in_its_turn(alone):
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
            with pytest.raises(filao.EngineUnavailable, match="has been locked"):
                broker.send_to_queue(CLAIMS, 1)
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 20.0)
            assert broker.stats(CLAIMS).ready == 3
        broker.receive_from_queue(CLAIMS).ack()


@pytest.mark.anyio
async def test_a_connect_that_failed_beside_a_process_that_stands_still_leaves_nothing(alone, monkeypatch) -> None:
    await until_left(alone, 0, 0)
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.1)
    with stopped_in_its_turn(alone) as pid:
        for _ in range(2):
            with pytest.raises(filao.EngineUnavailable, match=rf"locked .*by .*process {pid} \("):
                await filao.connect(alone).open()
            assert left_of(alone)[1] == 0
        await until_left(alone, 0, 0)


@pytest.mark.anyio
@pytest.mark.parametrize("sends", [False, True], ids=["", "after a refused send"])
async def test_a_broker_closes_beside_a_process_that_stands_still(alone, monkeypatch, sends) -> None:
    broker = filao.connect(alone)
    await broker.open()
    held = {message.id for message in await broker.receive_many(CLAIMS, 3)}
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
    with stopped_in_its_turn(alone):
        if sends:
            with pytest.raises(filao.EngineUnavailable, match="has been locked"):
                await broker.send_to_queue(CLAIMS, 1)
        async with asyncio.timeout(20):
            await broker.close()
        async with asyncio.timeout(20):
            while left_of(alone)[0] > sends:  # one at most was left in line
                await asyncio.sleep(0.01)
    await until_left(alone, 0, 0)
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 20.0)
    async with filao.connect(alone) as other, asyncio.timeout(20):
        assert (await other.receive_from_queue(CLAIMS)).id in held  # its holder has let go of its bell


@pytest.mark.anyio
async def test_a_look_does_not_wait_for_housekeeping_beside_a_foreign_transaction(alone, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 0.01)
    async with filao.connect(alone) as broker, asyncio.timeout(20):
        with foreign_writer(alone):
            engine_of(broker)._database.has_written = True
            while engine_of(broker)._database.ticket is None:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(files, "BUSY_TIMEOUT", 1_000.0)
            assert (await broker.stats(CLAIMS)).ready == 3


EXCLUSIVE = WRITES.replace("db.execute(", "db.execute('PRAGMA locking_mode = EXCLUSIVE'); db.execute(")


@pytest.mark.anyio
async def test_opening_a_file_that_another_program_has_for_itself_can_be_cancelled(alone, monkeypatch) -> None:
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 1_000.0)
    with foreign_writer(alone, EXCLUSIVE):
        opening = asyncio.create_task(filao.connect(alone).open())
        while left_of(alone)[0] == 0:
            await asyncio.sleep(0.001)
        opening.cancel()
        await until_left(alone, 0, 0)


def test_nobody_stands_in_line_for_what_was_given_up_just_before(tmp_path) -> None:
    first, second = (Turnstile(Folder(tmp_path, tmp_path.stat())) for _ in range(2))
    assert first.try_enter()
    assert not second.enter(lambda: True)
    assert not second.leave_waiting()
    first.leave()
    assert second.enter(lambda: False)
    first.close()
    second.close()


def test_other_threads_may_look_at_what_the_files_own_thread_lets_go(tmp_path) -> None:
    """Nothing but Python's lock keeps two looks at one attribute together, and a free-threaded Python has none."""
    database = Database(tmp_path / "claims.db", durable=True, clock=time.time, wake=lambda _: None)
    database.open()
    at, is_met = 0, True
    while is_met:
        at += 1
        database.usable()
        is_met = stopped_at(database.interrupt, at, database.hold.leave)
    assert at > 5
    at, is_met = 0, True
    while is_met:
        at += 1
        database.ticket = Ticket(0.0)
        database.ticket.expire()
        is_met = stopped_at(database.leave_waiting, at, partial(setattr, database, "ticket", None))
    assert at > 5
    database.close()


def test_a_commit_that_meets_the_housekeepers_look_is_seen_by_this_or_the_next(tmp_path) -> None:
    database = Database(tmp_path / "claims.db", durable=True, clock=time.time, wake=lambda _: None)
    housekeeper = housekeeping.Housekeeper(database, Jobs(database))
    looks: list[bool] = []

    def look() -> None:
        looks.append(housekeeper._has_been_idle())

    at, is_met = 0, True
    while is_met:
        at += 1
        database.has_written = False
        looks.clear()
        is_met = stopped_at(look, at, partial(setattr, database, "has_written", True))
        look()
        assert all(looks) is not is_met, at
    assert at > 5
