"""Opening and closing: at module level, in loops and in threads."""

import asyncio
import errno
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import filao
import filao.sync
from filao import loop_thread
from filao import session as session_module
from filao.engine import Batch, Receive, Result
from filao.engines.sqlite import files
from filao.session import Session
from tests.conftest import engine_of
from tests.support.memory import MemoryEngine, Store
from tests.support.programs import CLAIMS, PATIENCE, attempts, db

__all__ = ["db"]


def test_a_broker_that_gets_no_thread_says_so_and_keeps_no_other_from_its_end(db) -> None:
    script = """
    import sys, threading, filao, filao.sync
    broker = filao.sync.connect(sys.argv[1])
    broker.open()
    broker.declare(filao.Queue("q"))
    broker.send_to_queue("q", 1)
    held = broker.receive_from_queue("q")
    before = threading.stack_size(2**62)  # more than there is
    try:
        filao.sync.connect(sys.argv[1]).open()
    except filao.EngineUnavailable as error:
        print("cannot start a thread" in str(error))
    threading.stack_size(before)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), db], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ran.stdout, ran.stderr) == ("True\n", "")
    with filao.sync.connect(db) as broker:
        assert broker.stats("q").leased == 0


@pytest.mark.anyio
async def test_threads_that_became_greenlets_after_the_import_are_refused(db, monkeypatch) -> None:
    monkeypatch.setattr(
        threading, "get_ident", partial(threading.get_ident)
    )  # another function, as gevent's monkey.patch_all() does
    for open_it in (filao.sync.connect(db).open, filao.connect(db).open):
        with pytest.raises(filao.ConfigurationError, match=r"Nothing was done; patch first and import filao then"):
            await (open_it() or asyncio.sleep(0))


@pytest.mark.parametrize("options", [[], ["--processes", "2"]])
def test_a_worker_whose_module_patches_too_late_ends(db, tmp_path, options) -> None:
    (tmp_path / "late.py").write_text(f"""
import functools, threading, filao
threading.get_ident = functools.partial(threading.get_ident)
worker = filao.Worker({str(db)!r})
@worker.consumer(filao.Queue("q"))
async def handle(message): ...
""")
    program = [sys.executable, "-m", "filao", "work", "late:worker", *options]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr.count("patch first and import filao then")) == (3, 1), ran.stderr


@pytest.mark.anyio
async def test_a_second_event_loop_among_greenlets_is_refused(db, monkeypatch) -> None:
    monkeypatch.setattr(loop_thread, "start", lambda thread: thread.run())  # as a greenlet: in the caller's thread
    with pytest.raises(filao.ConfigurationError, match=r"greenlets, .*Nothing was done; use one blocking broker"):
        filao.sync.connect(db).open()


@pytest.mark.anyio
async def test_a_file_that_gets_no_thread_says_so(db) -> None:
    before = threading.stack_size(2**62)
    try:
        with pytest.raises(filao.EngineUnavailable, match="cannot start a thread"):
            await filao.connect(db).open()
    finally:
        threading.stack_size(before)


class Refused(MemoryEngine):
    """An engine of the user's own, whose server may not be reached."""

    async def open(self) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "a socket")


def test_what_opening_an_engine_raises_is_not_taken_for_a_loop_that_cannot_start() -> None:
    with pytest.raises(PermissionError, match="a socket"):
        filao.sync.connect(lambda: Refused(Store())).open()


def test_what_a_broker_held_is_given_back_though_its_loop_ended_in_the_midst_of_a_job(tmp_path) -> None:
    broker, job_ends = filao.connect(tmp_path / "claims.db"), threading.Event()

    async def leave_open() -> threading.Thread:
        await broker.open()
        await broker.declare(filao.Queue("claims", lease=3600))
        await broker.send_to_queue("claims", 1)
        assert await broker.receive_from_queue("claims") is not None
        engine_of(broker)._jobs.submit(lambda: job_ends.wait(PATIENCE))
        thread: threading.Thread = engine_of(broker)._jobs.thread._thread
        return thread

    thread = asyncio.run(leave_open())
    job_ends.set()
    asyncio.run(broker.close())
    thread.join(PATIENCE)
    with filao.sync.connect(tmp_path / "claims.db") as other:
        stats = other.stats("claims")
        assert (stats.leased, stats.ready, stats.released) == (0, 1, 1)


def test_a_broker_can_be_closed_and_opened_again(db) -> None:
    broker = filao.sync.connect(db)
    for _ in range(3):
        broker.open()
        broker.open()
        message = broker.receive_from_queue(CLAIMS)
        assert (message.body, message.attempt) == (0, 1)
        broker.close()
        broker.close()
    with pytest.raises(filao.ConfigurationError, match=r"closed: open it again.*broker\.open\(\)"):
        broker.stats()
    with broker:
        assert broker.stats(CLAIMS).ready == 3


@pytest.mark.anyio
async def test_an_async_broker_can_be_closed_and_opened_again(db) -> None:
    broker = filao.connect(db)
    for _ in range(3):
        async with broker:
            message = await broker.receive_from_queue(CLAIMS)
            assert (message.body, message.attempt) == (0, 1)
    with pytest.raises(filao.ConfigurationError, match="closed: open it again"):
        await broker.stats()


def test_a_broker_that_is_not_open_names_the_form_of_its_own_twin(db) -> None:
    with pytest.raises(filao.ConfigurationError, match=r"`with filao\.sync\.connect.*broker\.open\(\)"):
        filao.sync.connect(db).stats()
    with pytest.raises(filao.ConfigurationError, match=r"`async with filao\.connect"):
        asyncio.run(filao.connect(db).stats())


def test_a_block_does_not_close_a_broker_that_others_have_opened(db) -> None:
    broker = filao.sync.connect(db)
    broker.open()
    with pytest.raises(filao.ConfigurationError, match="open already"), broker:
        raise AssertionError("it was entered")
    assert broker.stats(CLAIMS).ready == 3
    broker.close()


def test_of_two_blocks_that_begin_together_the_second_is_refused(db) -> None:
    """The first that ended would close the broker in the midst of the other."""
    broker, together = filao.sync.connect(db), threading.Barrier(2)

    def enter() -> str:
        together.wait()
        try:
            broker.__enter__()
        except filao.ConfigurationError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as threads:
        entered, refusal = sorted(threads.map(lambda _: enter(), range(2)))
    assert not entered
    assert "open already" in refusal
    assert broker.stats(CLAIMS).ready == 3
    broker.close()


@pytest.mark.anyio
async def test_of_two_async_blocks_that_begin_together_the_second_is_refused(db) -> None:
    broker = filao.connect(db)
    first, second = await asyncio.gather(broker.__aenter__(), broker.__aenter__(), return_exceptions=True)
    assert first is broker
    assert isinstance(second, filao.ConfigurationError)
    assert "open already" in str(second)
    assert (await broker.stats(CLAIMS)).ready == 3
    await broker.close()


def test_a_path_means_the_same_file_wherever_the_process_goes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    broker = filao.sync.connect("claims.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with broker:
        broker.declare(CLAIMS)
    assert (tmp_path / "claims.db").exists()


def test_a_broker_on_another_event_loop_is_refused_in_words(db) -> None:
    broker = filao.connect(db)
    asyncio.run(broker.open())
    for call in (broker.stats, lambda: broker.send_to_queue(CLAIMS, 1), broker.open, broker.transaction().__aenter__):
        with pytest.raises(filao.ConfigurationError, match="another event loop"):
            asyncio.run(call())
    asyncio.run(broker.close())  # whose loop has ended: it lets go
    asyncio.run(broker.close())
    assert asyncio.run(_reopened(broker)) == 3


def test_where_no_event_loop_of_asyncio_runs_as_under_trio_that_is_said(db) -> None:
    worker = filao.Worker(db)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None: ...

    for call in (filao.connect(db).open, filao.connect(db).__aenter__, worker.run, worker.drain):
        with pytest.raises(filao.ConfigurationError, match=r"trio has another, .*Nothing was done; use asyncio\.run"):
            call().send(None)


async def _reopened(broker: filao.Broker) -> int:
    async with broker:
        return (await broker.stats(CLAIMS)).ready


@pytest.mark.anyio
async def test_two_tasks_that_open_a_broker_at_once_share_it(db) -> None:
    broker, before = filao.connect(db), set(threading.enumerate())
    for _ in range(2):  # the second time anew
        await asyncio.gather(broker.open(), broker.open(), broker.open())
        assert (await broker.stats(CLAIMS)).ready == 3
        await broker.close()
        async with asyncio.timeout(PATIENCE):
            while not set(threading.enumerate()) <= before:  # no thread is left of another engine
                await asyncio.sleep(0.005)


def test_threads_that_use_a_broker_while_it_is_closed_are_told_and_none_hangs(db) -> None:
    for _ in range(10):
        broker = filao.sync.connect(db)
        broker.open()
        begun = threading.Barrier(9)
        with ThreadPoolExecutor(8) as threads:
            uses = [threads.submit(_use, broker, begun, number) for number in range(8)]
            begun.wait()
            broker.close()
            for use in uses:
                assert isinstance(use.result(PATIENCE), filao.ConfigurationError)
    assert attempts(db)[:3] == [1, 1, 1]


def _use(broker: filao.sync.Broker, begun: threading.Barrier, number: int) -> BaseException:
    begun.wait()
    try:
        while True:
            match number % 4:
                case 0:
                    broker.send_to_queue(CLAIMS, number)
                case 1:
                    broker.receive_from_queue(CLAIMS, wait=0.001)
                case 2:
                    with broker.transaction() as transaction:
                        transaction.execute("SELECT 1")
                case _:
                    for message in broker.consume(CLAIMS):
                        message.release()
    except filao.EngineUnavailable as error:
        return filao.ConfigurationError(str(error))  # a transaction that the close has undone
    except BaseException as error:
        return error


class Stuck(MemoryEngine):
    """Ends neither what it does nor its own close, unless it is told to let go at once."""

    has_let_go = False

    async def execute(self, batch: Batch) -> Sequence[Result]:
        batch.take(lambda _: True)
        await asyncio.Event().wait()
        raise AssertionError

    async def close(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.has_let_go = True
            raise


@pytest.mark.anyio
async def test_a_close_ends_though_neither_what_was_begun_nor_the_engine_does(monkeypatch) -> None:
    monkeypatch.setattr(session_module, "CLOSES_WITHIN", 0.1)
    stuck = Stuck(Store())
    session = Session(lambda: stuck)
    await session.open()
    begun = session.submit(Receive("claims", 1))
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(filao.EngineUnavailable, match="has let go at once"):
            await session.close()
    assert stuck.has_let_go
    begun.cancel()


@pytest.mark.anyio
async def test_a_close_sends_home_those_who_wait(db) -> None:
    broker = filao.connect(db)
    await broker.open()
    await broker.receive_many(CLAIMS, 3)
    waiting = [asyncio.create_task(broker.receive_from_queue(CLAIMS)) for _ in range(3)]
    await asyncio.sleep(0)
    await broker.close()
    for task in waiting:
        with pytest.raises(filao.ConfigurationError, match="closed"):
            await task


@pytest.mark.anyio
@pytest.mark.parametrize("beside", ["a transaction", "a send", "a look", "a close"])
async def test_what_waits_for_a_transaction_of_its_own_broker_has_a_bound(db, monkeypatch, beside) -> None:
    broker = filao.connect(db)
    await broker.open()
    inside, goes_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with broker.transaction() as transaction:
            await transaction.execute("SELECT 1")
            inside.set()
            await goes_on.wait()

    async def begin() -> None:
        async with broker.transaction():
            raise AssertionError("it began")

    holding = asyncio.create_task(hold())
    await inside.wait()
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "a transaction": begin,
        "a send": lambda: broker.send_to_queue(CLAIMS, 1),
        "a look": broker.stats,
        "a close": broker.close,
    }
    async with asyncio.timeout(20):
        if beside == "a close":
            await broker.close()
        else:
            with pytest.raises(filao.EngineUnavailable, match="transaction of this broker"):
                await calls[beside]()
    goes_on.set()
    if beside == "a close":
        with pytest.raises(filao.FilaoError, match="closed"):
            await holding
    else:
        await holding
    await broker.close()
