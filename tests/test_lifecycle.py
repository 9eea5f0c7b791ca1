"""Opening and closing: at module level, in loops and threads, at the end of the interpreter, across forks, under
signals.

Most of it can only be seen from outside, so programs are written down and run in a process of their own.
"""

import asyncio
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.engines.sqlite import files
from tests.conftest import engine_of

PATIENCE = 60.0  # seconds after which a program that hangs is killed, and its test fails
CLAIMS: filao.Queue = filao.Queue("claims", lease=3600)

PREAMBLE = """
import asyncio, gc, multiprocessing, os, random, signal, sys, threading, time
import filao, filao.sync
url = sys.argv[1]
claims = filao.Queue("claims", lease=3600)
def say(*words): print(*words, flush=True)
"""


def run(url: str | Path, program: str, code: int = 0) -> list[str]:
    """Run a program to its end, which must come, and return its lines."""
    text = PREAMBLE + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", text, str(url)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Exception in thread" not in done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def db(tmp_path: Path) -> Path:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(CLAIMS)
        broker.send_many(CLAIMS, range(3))
    return tmp_path / "claims.db"


def attempts(db: Path) -> list[int]:
    """Receive what is ready, and return how often each was delivered: leases that were given back have used none."""
    with filao.sync.connect(db) as broker:
        return [message.attempt for message in broker.receive_many(CLAIMS, 9, wait=0)]


# --- the end of the interpreter --------------------------------------------------------------------------------------

ENDS = {
    "end of the script": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an uncaught exception": ("raise KeyError(1)", 1),
    "sys.exit in a thread": ("threading.Thread(target=sys.exit).start()", 0),
    "daemon threads that wait": (
        """
        broker.receive_many("claims", 9)
        for _ in range(3): threading.Thread(target=lambda: broker.receive_from_queue("claims"), daemon=True).start()
        time.sleep(0.1)
        """,
        0,
    ),
    "daemon threads that send": (
        """
        def send():
            while True:
                broker.send_to_queue("other", 1)
        broker.declare(filao.Queue("other"))
        broker.receive_many("claims", 9)
        for _ in range(3): threading.Thread(target=send, daemon=True).start()
        time.sleep(0.1)
        """,
        0,
    ),
    "a daemon thread in a transaction": (
        """
        def hold():
            with broker.transaction() as tx:
                tx.execute("SELECT 1")
                inside.set()
                time.sleep(1000)
        inside = threading.Event()
        threading.Thread(target=hold, daemon=True).start()
        inside.wait()
        """,
        0,
    ),
    "a thread that is not done": (
        """
        def work():
            time.sleep(0.3)
            broker.send_to_queue("claims", 3)
        threading.Thread(target=work).start()
        """,
        0,
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_broker_that_is_left_open_closes_itself_when_the_interpreter_ends(db, how) -> None:
    ending, code = ENDS[how]
    program = f"""
broker = filao.sync.connect(url)
broker.open()
message = broker.receive_from_queue("claims")
{textwrap.dedent(ending)}
"""
    began = time.monotonic()
    run(db, program, code)
    assert time.monotonic() - began < 20  # it does not wait for a bound to run out
    assert attempts(db) == [1] * (4 if how == "a thread that is not done" else 3)
    assert [path.name for path in files.sidecar(db).iterdir() if path.is_fifo()] == []


def test_a_broker_that_is_left_open_on_a_server_closes_itself_too(url) -> None:
    program = """
        broker = filao.sync.connect(url)
        broker.open()
        broker.declare(claims)
        broker.send_to_queue(claims, 1)
        broker.receive_from_queue(claims)
    """
    run(url, program)
    assert attempts(url) == [1]


# --- at module level -------------------------------------------------------------------------------------------------


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


def test_a_path_means_the_same_file_wherever_the_process_goes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    broker = filao.sync.connect("claims.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with broker:
        broker.declare(CLAIMS)
    assert (tmp_path / "claims.db").exists()


# --- loops -----------------------------------------------------------------------------------------------------------


def test_a_broker_on_another_event_loop_is_refused_in_words(db) -> None:
    broker = filao.connect(db)
    asyncio.run(broker.open())
    for call in (broker.stats, lambda: broker.send_to_queue(CLAIMS, 1), broker.open, broker.transaction().__aenter__):
        with pytest.raises(filao.ConfigurationError, match="another event loop"):
            asyncio.run(call())
    asyncio.run(broker.close())  # whose loop has ended: it lets go
    asyncio.run(broker.close())
    assert asyncio.run(_reopened(broker)) == 3


async def _reopened(broker: filao.Broker) -> int:
    async with broker:
        return (await broker.stats(CLAIMS)).ready


@pytest.mark.anyio
async def test_two_tasks_that_open_a_broker_at_once_share_it(db) -> None:
    broker = filao.connect(db)
    await asyncio.gather(broker.open(), broker.open())
    assert (await broker.stats(CLAIMS)).ready == 3
    await broker.close()


# --- closing ---------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.2)
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
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "a transaction": begin,
        "a send": lambda: broker.send_to_queue(CLAIMS, 1),
        "a look": broker.stats,
        "a close": broker.close,
    }
    async with asyncio.timeout(5):
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


@contextmanager
def foreign_writer(db: Path) -> Iterator[None]:
    """Hold SQLite's write lock in another program."""
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN IMMEDIATE'); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(db)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as foreign:
        assert foreign.stdout is not None
        assert foreign.stdout.readline() == b"held\n"
        try:
            yield
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
    import fcntl

    with files.sidecar(db).joinpath("turnstile").open() as turnstile:
        try:
            fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.anyio
async def test_a_foreign_transaction_is_waited_for_no_longer_than_the_bound(db, monkeypatch) -> None:
    monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.3)
    broker = filao.connect(db)
    await broker.open()
    held = await broker.receive_from_queue(CLAIMS)
    with foreign_writer(db):
        async with asyncio.timeout(5):
            for call in (broker.send_to_queue(CLAIMS, 1), held.ack(), broker.transaction().__aenter__()):
                with pytest.raises(filao.EngineUnavailable, match="locked"):
                    await call
            await broker.close()
    assert engine_of(broker)._database.hold.db is None


# --- forks of the blocking twin --------------------------------------------------------------------------------------


def test_a_broker_opened_at_module_level_works_in_processes_that_are_forked(url) -> None:
    program = """
        broker = filao.sync.connect(url)
        broker.open()
        broker.declare(claims)
        from concurrent.futures import ThreadPoolExecutor
        def work(number):  # as a worker of a preloaded server, in four threads
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(lambda _: broker.send_to_queue("claims", number), range(4)))
            broker.receive_from_queue("claims").ack()
            sys.exit(0)
        children = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                work(number)
            children.append(child)
        say([os.waitpid(child, 0)[1] for child in children])
        broker.send_to_queue("claims", 9)
        say(broker.stats("claims").ready, broker.stats("claims").leased)
    """
    assert run(url, program) == ["[0, 0, 0]", "10 0"]


def test_a_broker_works_in_processes_of_multiprocessing(url) -> None:
    program = """
        broker = filao.sync.connect(url)
        def work(number):
            broker.send_to_queue("claims", number)
            broker.receive_from_queue("claims")  # and leaves it: the end gives it back
            return os.getpid()
        if __name__ == "__main__":
            broker.open()
            broker.declare(claims)
            context = multiprocessing.get_context("fork")
            with context.Pool(4) as pool:
                pool.map(work, range(20))
                pool.close()
                pool.join()
            say(broker.stats("claims").sent, {message.attempt for message in broker.receive_many("claims", 99)})
    """
    assert run(url, program) == ["20 {1}"]


def test_a_child_leaves_a_block_of_its_parents_and_cannot_use_what_its_parent_holds(url) -> None:
    program = """
        def told(call):
            try:
                call()
            except filao.ConfigurationError as error:
                return "forked" in str(error)
        with filao.sync.connect(url) as broker:
            broker.declare(claims)
            broker.send_to_queue(claims, 1)
            message = broker.receive_from_queue(claims)
            child = os.fork()
            if child == 0:
                say(told(message.ack), told(message.transaction().__enter__))
        if child == 0:
            sys.exit(0)
        say(os.waitpid(child, 0)[1])
        with broker:
            say(broker.stats("claims").ready)
    """
    assert run(url, program) == ["True True", "0", "1"]


SERVER_FORK = """
    claims = filao.Queue("claims", emulate=("delay",))
    broker = filao.sync.connect(url)
    broker.open()
    broker.declare(claims)
    broker.send_many(claims, range(2))
    message = broker.receive_from_queue(claims)
    inherited = broker._inner, broker._thread
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        import socket
        sockets = []
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                    sockets.append(socket.socket(fileno=os.dup(int(name))))
            except OSError:
                pass
        say([one.getpeername() for one in sockets if one.family in (socket.AF_INET, socket.AF_INET6)])
        other = broker.receive_from_queue(claims, wait=10)
        say(other.body)
        other.ack()
        del broker, inherited, message
        gc.collect()
        sys.exit(0)  # with all that a polite end does
    say(os.waitpid(child, 0)[1])
    message.ack()  # the parent's session lives
    say(broker.stats("claims").ready)
    broker.close()
"""


def test_a_child_shares_no_socket_with_its_parent_and_ends_no_session_of_its(postgres) -> None:
    url = postgres.create("forked")
    assert run(url, SERVER_FORK) == ["[]", "1", "0", "0"]


def test_a_child_ends_no_session_of_its_parents_on_rabbitmq(rabbitmq) -> None:
    assert run(rabbitmq.url(), SERVER_FORK) == ["[]", "1", "0", "0"]


def test_a_fork_undoes_a_transaction_of_its_own_thread_and_waits_for_those_of_others(db) -> None:
    program = """
        broker = filao.sync.connect(url)
        broker.open()
        def hold():
            with other.transaction() as tx:
                tx.send_to_queue("claims", "of another thread")
                inside.set()
                time.sleep(0.5)
        inside, other = threading.Event(), filao.sync.connect(url)
        other.open()
        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        thread.join()
        try:
            with broker.transaction() as tx:
                tx.send_to_queue("claims", "of this thread")
                if os.fork() == 0:
                    os._exit(0)
                os.wait()
        except filao.EngineUnavailable as error:
            say("forked" in str(error))
        say([message.body for message in broker.receive_many("claims", 9)])
    """
    assert run(db, program) == ["True", "[0, 1, 2, 'of another thread']"]


def test_two_hundred_forks_under_load_lose_nothing(db) -> None:
    """As many forks as a busy pre-forking server makes in a while, each child sending, beside threads that work."""
    program = """
        broker = filao.sync.connect(url)
        broker.open()
        broker.purge("claims")
        stop, sent, acked = threading.Event(), [], []
        def produce(name):
            while not stop.is_set():
                broker.send_to_queue("claims", name)
                sent.append(1)
        def consume():
            while not stop.is_set():
                message = broker.receive_from_queue("claims", wait=0.01)
                if message is not None:
                    message.ack()
                    acked.append(1)
        threads = [threading.Thread(target=produce, args=("parent",)) for _ in range(2)]
        threads += [threading.Thread(target=consume) for _ in range(2)]
        for thread in threads: thread.start()
        running, failed, children = 0, 0, 200
        for number in range(children):
            if os.fork() == 0:
                signal.alarm(50)  # should it hang
                broker.send_to_queue("claims", number)
                broker.close()
                os._exit(0)
            running += 1
            if running == 4:
                failed += os.wait()[1] != 0
                running -= 1
        for _ in range(running):
            failed += os.wait()[1] != 0
        stop.set()
        for thread in threads: thread.join()
        stats = broker.stats("claims")
        say(failed, stats.sent - 3 - len(sent) - children, stats.acked - len(acked), stats.leased)
        say(stats.sent - 3 > 200)
        broker.close()
    """
    assert run(db, program) == ["0 0 0 0", "True"]
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- signals ---------------------------------------------------------------------------------------------------------

ROUNDS = 1_000  # of each call; ten thousand were run by hand


@pytest.mark.parametrize("call", ["send", "receive", "ack", "transaction", "stats", "consume", "open"])
def test_an_exception_from_a_signals_handler_leaves_nothing_behind(db, call) -> None:
    program = f"""
        class Interrupt(Exception): pass
        armed = [False]
        def interrupt(*_):
            if armed[0]: raise Interrupt
        signal.signal(signal.SIGALRM, interrupt)
        broker = filao.sync.connect(url)
        broker.open()
        broker.purge("claims")
        def transact():
            with broker.transaction() as tx:
                tx.execute("SELECT 1")
                tx.send_to_queue("claims", 1)
        def consume():
            for message in broker.consume("claims", prefetch=2):
                message.ack()
                break
        def reopen():
            broker.close()
            broker.open()
        def fill():
            if {call!r} in ("receive", "ack", "consume"): broker.send_many("claims", range(3))
        calls = dict(send=lambda: broker.send_to_queue("claims", 1), stats=broker.stats, transaction=transact,
            receive=lambda: broker.receive_from_queue("claims", wait=0), consume=consume, open=reopen,
            ack=lambda: broker.receive_from_queue("claims").ack())
        rounds, interrupted = {ROUNDS if call != "open" else ROUNDS // 10}, 0
        for number in range(rounds):
            if number % 50 == 0: fill()
            armed[0] = True
            try:  # again after a while: what meets a finalizer is swallowed
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-3 if {call!r} != "open" else 2e-2), 0.05)
                try:
                    calls[{call!r}]()
                finally:
                    armed[0] = False
            except Interrupt:
                interrupted += 1
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        broker.open()
        stats = broker.stats("claims")  # it answers: nothing is locked
        with filao.sync.connect(url) as other:
            other.send_to_queue("claims", 1)
        began = time.monotonic()
        broker.close()
        say(interrupted > rounds // 50, time.monotonic() - began < 10)
        with filao.sync.connect(url) as other:
            say(other.stats("claims").leased)
    """
    assert run(db, program) == ["True True", "0"]


@pytest.mark.parametrize("at", ["enters", "is inside", "leaves"])
def test_ctrl_c_at_a_transaction_undoes_it_and_frees_the_file(db, at) -> None:
    held = {
        "enters": "with foreign: pass",
        "is inside": "time.sleep(1000)",
        "leaves": "pass",
    }[at]
    program = f"""
        import sqlite3
        broker = filao.sync.connect(url)
        broker.open()
        blocker = sqlite3.connect(url, isolation_level=None)
        if {at!r} == "enters": blocker.execute("BEGIN IMMEDIATE")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                with broker.transaction() as tx:
                    tx.send_to_queue("claims", "undone or not")
                    {held}
        except KeyboardInterrupt:
            if {at!r} == "enters": blocker.execute("ROLLBACK")
            with filao.sync.connect(url) as other:
                other.send_to_queue("claims", "after")
            began = time.monotonic()
            broker.close()
            say(time.monotonic() - began < 10)
    """
    assert run(db, program) == ["True"]
