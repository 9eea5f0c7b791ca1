"""What its storage, its host and its children do to a worker that runs: it waits, it says so once, and it goes on."""

import asyncio
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import psycopg
import pytest

import filao
from filao.broker import session_of
from filao.engines.sqlite import backup
from filao.worker import keeper as keeper_module
from filao.worker import outage as outage_module
from filao.worker import pulse as pulse_module
from filao.worker import shift as shift_module
from filao.worker.signals import _Signals, told_by_signals
from tests.support.instructions import stopped_at
from tests.support.working import CLAIMS, PATIENCE, broker, running, until, until_stats

pytestmark = pytest.mark.anyio
__all__ = ["broker"]

LETTERS = filao.Queue("letters")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_module, "RETRY_MAX", 0.2)


def handling(url: str | filao.Broker, *queues: filao.Queue[Any], concurrency: int | None = None) -> filao.Worker:
    worker = filao.Worker(url, concurrency=concurrency)
    for queue in queues:

        @worker.consumer(queue.name)
        async def handle(message: filao.Message) -> None:
            pass

    return worker


# --- storage ---------------------------------------------------------------------------------------------------------


async def test_a_worker_ends_when_another_file_lies_in_the_place_of_its_own(tmp_path) -> None:
    db, copy = tmp_path / "claims.db", tmp_path / "claims.backup"
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
    await asyncio.to_thread(backup.back_up, db, copy)
    worker, ready = handling(str(db), CLAIMS), asyncio.Event()
    async with asyncio.timeout(PATIENCE):
        working = asyncio.create_task(worker.run(ready=ready.set))
        await ready.wait()
        await asyncio.to_thread(backup.restore, copy, db)
        with pytest.raises(filao.EngineError, match="open it again"):
            await working


async def test_a_worker_waits_while_its_file_is_away_and_ends_when_it_is_back(tmp_path, caplog) -> None:
    db, away = tmp_path / "claims.db", tmp_path / "away.db"
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
    worker, ready = handling(str(db), CLAIMS), asyncio.Event()
    async with asyncio.timeout(PATIENCE):
        working = asyncio.create_task(worker.run(ready=ready.set))
        await ready.wait()
        db.rename(away)
        await until(lambda: "receiving from 'claims' fails" in caplog.text)
        assert not working.done()
        assert not db.exists()
        away.rename(db)
        with pytest.raises(filao.EngineError, match="was moved"):
            await working


async def test_a_worker_waits_while_its_file_is_not_sound(tmp_path, caplog) -> None:
    db = tmp_path / "claims.db"
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
    async with running(handling(str(db), CLAIMS)) as working:
        db.with_name("claims.db-wal").unlink()  # the last process that closes the file writes it back
        await until(lambda: "receiving from 'claims' fails" in caplog.text)
        assert not working.done()


@pytest.mark.parametrize("concurrency", [None, 2], ids=["apart", "shared"])
async def test_a_deleted_queue_is_waited_for_and_ends_no_other(url, broker, caplog, concurrency) -> None:
    await broker.declare(LETTERS)
    worker = handling(url, CLAIMS, LETTERS, concurrency=concurrency)
    async with running(worker) as task:
        await broker.delete_queue("claims")
        await until(lambda: "receiving from 'claims' fails" in caplog.text)
        await broker.send_to_queue("letters", 1)
        await until_stats(broker, "letters", acked=1)
        assert worker.status().healthy
        await broker.declare(CLAIMS)
        await broker.send_to_queue("claims", 1)
        await until_stats(broker, acked=1)
        assert not task.done()
    assert caplog.text.count("receiving from 'claims' fails") == 1
    assert "receiving from 'claims' works again" in caplog.text


CUTS = {
    "read-only": (
        "ALTER DATABASE {0} SET default_transaction_read_only = on",
        "ALTER DATABASE {0} RESET default_transaction_read_only",
    ),
    "missing": ("ALTER DATABASE {0} RENAME TO {0}_away", "ALTER DATABASE {0}_away RENAME TO {0}"),
}


class Hasty(filao.Broker):
    """One whose queue somebody else deletes as soon as it was declared."""

    async def declare(self, *queues: filao.Queue[Any]) -> None:
        await super().declare(*queues)
        await super().delete_queue(LETTERS)


async def test_a_queue_that_is_deleted_while_the_worker_that_declares_it_starts_is_waited_for(url, broker) -> None:
    async with Hasty(session_of(filao.connect(url))) as hasty:
        worker, ready, handled = filao.Worker(hasty), asyncio.Event(), asyncio.Event()

        @worker.consumer(LETTERS)
        async def handle(message: filao.Message) -> None:
            handled.set()

        async with asyncio.timeout(PATIENCE):
            working = asyncio.create_task(worker.run(ready=ready.set))
            await asyncio.wait([working, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
            await broker.declare(LETTERS)
            await broker.send_to_queue(LETTERS, 1)
            await asyncio.wait([working, asyncio.create_task(handled.wait())], return_when=asyncio.FIRST_COMPLETED)
            worker.stop()
            await working
    assert handled.is_set()


@pytest.mark.parametrize("cut", CUTS)
async def test_a_database_that_is_read_only_or_missing_for_a_while_is_waited_for(postgres, caplog, cut) -> None:
    name = f"cut_{cut.replace('-', '_')}"
    url = postgres.create(name)
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
    away, back = (statement.format(name) for statement in CUTS[cut])
    async with running(handling(url, CLAIMS)) as task:
        with psycopg.connect(postgres.url(), autocommit=True) as admin:
            _cut(admin, name, away)
            await until(lambda: " fails" in caplog.text)
            assert not task.done()
            _cut(admin, name, back)
        await until(lambda: " works again" in caplog.text)
        async with filao.connect(url) as broker:
            await broker.send_to_queue("claims", 1)
            await until_stats(broker, acked=1)
        assert not task.done()


def _cut(admin: "psycopg.Connection[Any]", name: str, statement: str) -> None:
    """Do something to a database, and end the sessions in it; some may come in between, which prevents a change of
    name.
    """
    for _ in range(200):
        with suppress(psycopg.errors.ObjectInUse):
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            admin.execute(statement.encode())
            break
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))


async def test_a_schema_that_was_dropped_and_made_anew_is_received_from(postgres, caplog) -> None:
    url = postgres.create("schema_dropped")
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
    async with running(handling(url, CLAIMS)) as task:
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("DROP SCHEMA filao CASCADE")
        await until(lambda: " fails" in caplog.text)
        async with filao.connect(url) as broker:
            await broker.declare(CLAIMS)
            await broker.send_to_queue("claims", 1)
            await until_stats(broker, acked=1)
        assert not task.done()


async def test_a_queue_of_rabbitmq_that_is_deleted_for_a_while_is_waited_for(rabbitmq, caplog) -> None:
    url = rabbitmq.url()
    async with filao.connect(url) as broker:
        plain = filao.Queue("worker.deleted", backoff=filao.Backoff(first=0, jitter=0))
        await broker.declare(plain)
        async with running(handling(url, plain)) as task:
            await broker.delete_queue(plain)
            await until(lambda: " fails" in caplog.text)
            await broker.declare(plain)
            await broker.send_to_queue(plain, 1)
            async with asyncio.timeout(PATIENCE):
                while (await broker.stats(plain)).ready:
                    await asyncio.sleep(0.05)
            assert not task.done()


async def test_until_idle_a_queue_that_could_never_be_received_from_is_not_waited_for(url, broker, caplog) -> None:
    await broker.declare(LETTERS)
    await broker.send_many("claims", list(range(3)))
    worker = handling(url, LETTERS, CLAIMS)

    @worker.lifespan
    async def delete() -> AsyncGenerator[None]:
        await broker.delete_queue("letters")
        yield

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(filao.QueueNotFound, match="letters"):
            await worker.run(until_idle=True, signals=False)
    assert worker.handled == 3
    assert "trying again" not in caplog.text


async def test_until_idle_a_queue_that_was_received_from_is_waited_for(url, broker, caplog) -> None:
    await broker.declare(LETTERS)
    await broker.send_to_queue("letters", "first")
    worker = filao.Worker(url)

    @worker.consumer("letters")
    async def handle(message: filao.Message) -> None:
        if message.body == "first":
            await message.ack()
            await broker.delete_queue("letters")

    async with asyncio.timeout(PATIENCE):
        working = asyncio.create_task(worker.run(until_idle=True, signals=False))
        await until(lambda: "receiving from 'letters' fails" in caplog.text)
        await broker.declare(LETTERS)
        await broker.send_to_queue("letters", "second")
        assert await working
    assert worker.handled == 2


async def test_an_error_at_the_start_comes_as_itself(url) -> None:
    with pytest.raises(filao.QueueNotFound):
        await handling(url, CLAIMS).run()


async def test_a_broker_that_its_program_closes_ends_the_worker_with_that_error(url) -> None:
    broker = filao.connect(url)
    async with broker:
        await broker.declare(CLAIMS)
        ready = asyncio.Event()
        task = asyncio.create_task(handling(broker, CLAIMS).run(ready=ready.set))
        await ready.wait()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(filao.ConfigurationError, match="this broker is closed"):
            await task


async def test_what_was_handled_while_the_broker_was_closed_comes_again_as_the_log_says(url, caplog) -> None:
    broker, held, closed = filao.connect(url), asyncio.Event(), asyncio.Event()
    worker = filao.Worker(broker)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        held.set()
        await closed.wait()

    async with broker:
        await broker.declare(CLAIMS)
        receipt = await broker.send_to_queue(CLAIMS, 1)
        task = asyncio.create_task(worker.run())
        await held.wait()
    closed.set()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(filao.ConfigurationError, match="this broker is closed"):
            await task
    assert f"message {receipt.id} of 'claims', attempt 1 comes again" in caplog.text
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    async with filao.connect(url) as other:
        again = await other.receive_from_queue(CLAIMS, wait=PATIENCE)
        assert again is not None
        assert again.attempt == 1


@contextmanager
def locked(path: str) -> Generator[None]:
    other = sqlite3.connect(path)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_keeper_that_waits_for_a_lock_does_not_make_the_loop_look_blocked(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(pulse_module, "TICK", 0.05)
    monkeypatch.setattr(shift_module, "BLOCKED_AFTER", 0.5)
    monkeypatch.setattr(keeper_module, "REPORT_EVERY", 0.05)
    worker = handling(url, CLAIMS)
    async with running(worker):
        with locked(url):
            await asyncio.sleep(1.5)  # what does not happen meanwhile cannot be waited for
            assert worker.status().healthy, worker.status().problems


async def test_an_idle_worker_whose_engine_has_one_connection_is_healthy(monkeypatch) -> None:
    monkeypatch.setattr(pulse_module, "TICK", 0.05)
    monkeypatch.setattr(shift_module, "BLOCKED_AFTER", 0.3)
    async with filao.connect("sqlite://:memory:") as broker:
        await broker.declare(CLAIMS)
        worker = handling(broker, CLAIMS)
        async with running(worker):
            await asyncio.sleep(1.0)  # as above
            assert worker.status().healthy, worker.status().problems


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def host() -> AsyncGenerator[list[int]]:
    """Be a program with a handler of its own for SIGTERM."""
    told: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        told.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    yield told
    assert signal.getsignal(signal.SIGTERM) is handle
    signal.signal(signal.SIGTERM, before)


async def test_a_signal_stops_all_workers_of_a_process_and_reaches_its_host(url, broker, host) -> None:
    await broker.declare(LETTERS)
    async with running(handling(url, CLAIMS)) as first, running(handling(url, LETTERS)) as second:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(first, second)
    assert host == [signal.SIGTERM]


async def test_a_worker_that_has_ended_leaves_the_signals_to_those_that_run(url, broker, host) -> None:
    await broker.declare(LETTERS)
    async with running(handling(url, CLAIMS)) as going_on:
        first = handling(url, LETTERS)
        async with running(first) as ended:
            first.stop()
            await ended
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                await going_on
    assert host == [signal.SIGTERM]


async def test_a_signal_handler_that_the_program_sets_while_its_worker_runs_stays(url, broker) -> None:
    def handle(number: int, frame: FrameType | None) -> None: ...

    before = signal.getsignal(signal.SIGTERM)
    try:
        async with running(handling(url, CLAIMS)):
            signal.signal(signal.SIGTERM, handle)
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_worker_without_signals_leaves_them_to_its_host(url, broker, host) -> None:
    worker, ready = handling(url, CLAIMS), asyncio.Event()
    task = asyncio.create_task(worker.run(signals=False, ready=ready.set))
    await ready.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: host)
    await broker.send_to_queue("claims", 1)
    await until_stats(broker, acked=1)
    worker.stop()
    async with asyncio.timeout(PATIENCE):
        await task


async def test_a_signal_handler_of_the_hosts_loop_is_called_too(url, broker) -> None:
    told: list[int] = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.append, 1)
    try:
        async with running(handling(url, CLAIMS)) as task:
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                await task
        await until(lambda: told)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: len(told) == 2)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("is_ignored", [True, False])
async def test_a_hangup_that_would_not_end_the_program_stops_no_worker(url, broker, is_ignored) -> None:
    told: list[int] = []
    given = signal.SIG_IGN if is_ignored else lambda number, _: told.append(number)
    before = signal.signal(signal.SIGHUP, given)  # as nohup ignores it, and a server reads its configuration again
    try:
        async with running(handling(url, CLAIMS)) as task:
            os.kill(os.getpid(), signal.SIGHUP)
            await broker.send_to_queue("claims", 1)
            await until_stats(broker, acked=1)
            assert not task.done()
        assert signal.getsignal(signal.SIGHUP) == given
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told == ([] if is_ignored else [signal.SIGHUP])


def _how_signals_are(pipe: Any) -> None:
    woken = signal.set_wakeup_fd(-1)
    are = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    is_clean = are == [signal.SIG_DFL, signal.default_int_handler]
    is_clean &= signal.getsignal(signal.SIGHUP) in (signal.SIG_DFL, signal.SIG_IGN)  # as under nohup
    pipe.send((is_clean, woken, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
    signal.pause()


def _work_in_a_child(pipe: Any) -> None:
    async def work() -> None:
        told = asyncio.Event()
        with told_by_signals(told.set):
            pipe.send(None)
            await told.wait()

    asyncio.run(work())


async def _forks(
    url: str, broker: filao.Broker, kind: str, target: Callable[[Any], None]
) -> list[tuple[Any, int | None]]:
    """Return what children told that two handlers forked and ended by SIGTERM, and their exit codes."""
    worker, seen = filao.Worker(url), list[tuple[Any, int | None]]()
    forking = multiprocessing.get_context("fork")

    def fork() -> None:
        ours, theirs = forking.Pipe()
        child = forking.Process(target=target, args=(theirs,))
        child.start()
        assert ours.poll(PATIENCE)
        told = ours.recv()
        child.terminate()
        child.join(PATIENCE)
        seen.append((told, child.exitcode))

    async def coroutine(message: filao.Message) -> None:
        fork()

    def thread(message: filao.sync.Message) -> None:
        fork()

    worker.consumer(CLAIMS)(coroutine if kind == "coroutine" else thread)
    await broker.send_many("claims", [1, 2])
    async with running(worker) as task:
        await until(lambda: len(seen) == 2)
        await until_stats(broker, acked=2)
        assert not task.done()
    assert threading.current_thread() is threading.main_thread()
    return seen


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # no connection of the server's is shared with a child
async def test_a_child_of_a_handler_has_clean_signals_and_its_worker_goes_on(url, broker, kind) -> None:
    assert await _forks(url, broker, kind, _how_signals_are) == [((True, -1, set()), -signal.SIGTERM)] * 2


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_signal_to_a_child_of_a_handler_is_none_to_the_loop_of_its_host(url, broker) -> None:
    told: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, told.append, number)
    try:
        assert await _forks(url, broker, "coroutine", _how_signals_are) == [((True, -1, set()), -signal.SIGTERM)] * 2
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: told)
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
    assert told == [signal.SIGUSR1]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_child_of_a_handler_can_run_a_worker_that_signals_stop(url, broker) -> None:
    assert await _forks(url, broker, "coroutine", _work_in_a_child) == [(None, 0)] * 2


FORKED = """
import os, signal, sys
masks = []
os.register_at_fork(before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, [])))  # called after filao's
from filao.worker.signals import clean_forks
with clean_forks():
    if not os.fork():
        sys.exit()
    os.wait()
assert {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} <= masks[0], masks
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""


def test_of_workers_that_begin_or_end_together_in_threads_each_counts() -> None:
    signals = _Signals()
    stays = ExitStack()

    def begins_and_ends() -> None:
        with signals.clean_forks():
            pass

    at, is_met = 0, True
    while is_met:
        at += 1
        is_met = stopped_at(begins_and_ends, at, partial(stays.enter_context, signals.clean_forks()))
        assert signals._shifts or not is_met, at
        is_met = stopped_at(begins_and_ends, at, stays.close)
        assert not signals._shifts or not is_met, at
    assert at > 10


async def test_no_signal_comes_while_a_handler_forks() -> None:
    ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", FORKED], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
