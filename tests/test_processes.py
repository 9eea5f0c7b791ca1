"""Many processes on one file: foreign writers, forks, deaths, pauses, and waking each other. All of them are real.

The other processes run short scripts that take turns with the test: they `say` a line when something has happened, and
`hear` one when they may go on. While one waits to hear, it stands still with all that it holds.
"""

import asyncio
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
from msgspec import structs

import filao
from filao.batching import Batcher
from filao.broker import session_of
from filao.engines.sqlite import files

pytestmark = pytest.mark.anyio

PATIENCE = 20.0  # seconds after which a process that hangs is killed, and its test fails
CLAIMS: filao.Queue = filao.Queue("claims", lease=3600)

PREAMBLE = """
import asyncio, gc, os, resource, signal, sqlite3, sys
import filao
from filao.broker import session_of
from filao.engines.sqlite import engine, files
db = sys.argv[1]
claims = filao.Queue("claims", lease=3600)
def say(*words): print(*words, flush=True)
def hear(): return sys.stdin.readline()
async def outcome(call):
    try:
        await call
    except filao.FilaoError as error:
        return type(error).__name__
    return "done"
"""


class Other:
    """Another process, in which a script runs."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    async def says(self) -> str:
        """Wait for its next line."""
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, f"the other process ended, with status {self._process.wait()}"
        return line.strip()

    def may_go_on(self) -> None:
        """Give it a line to hear."""
        assert self._process.stdin is not None
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()

    def is_killed(self) -> None:
        """Kill it, and wait until it is dead."""
        self._process.kill()
        self._process.wait()

    async def ends(self) -> None:
        """Wait until it has ended well."""
        assert await asyncio.to_thread(self._process.wait) == 0


@contextmanager
def other(db: Path, script: str) -> Iterator[Other]:
    """Run a script, the body of an `async def`, in a process of its own."""
    program = f"{PREAMBLE}\nasync def main():\n{textwrap.indent(textwrap.dedent(script), '    ')}\nasyncio.run(main())"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program, db], text=True, **pipes)  # type: ignore[call-overload]
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        yield Other(process)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.fixture
async def broker(tmp_path: Path):
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(CLAIMS)
        yield broker


@pytest.fixture
def db(broker: filao.Broker, tmp_path: Path) -> Path:
    return tmp_path / "claims.db"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # other processes set no events
            await asyncio.sleep(0.01)


def is_waited_for(db: Path) -> bool:
    """Return whether a process has asked to be woken."""
    with closing(sqlite3.connect(db)) as connection:
        return bool(connection.execute("SELECT count(*) FROM filao_waiting").fetchone()[0])


def someone_writes(db: Path) -> bool:
    """Return whether a process of ours stands in the turnstile."""
    with files.sidecar(db).joinpath("turnstile").open() as turnstile:
        try:
            fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def wait_for_one(broker: filao.Broker) -> filao.Message:
    """Receive, waiting to be woken: a wait that ran out would look once more."""
    async with asyncio.timeout(PATIENCE):
        message = await broker.receive_from_queue(CLAIMS)
    assert message is not None
    return message


# --- a foreign writer ------------------------------------------------------------------------------------------------

FOREIGN_WRITER = """
    connection = sqlite3.connect(db, isolation_level=None)
    connection.execute("CREATE TABLE claim (id INTEGER)")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO claim VALUES (7)")
    say("writing")
    hear()
    connection.execute("COMMIT")
    say("committed")
"""


async def test_senders_wait_for_a_long_transaction_of_a_foreign_writer(broker, db) -> None:
    with other(db, FOREIGN_WRITER) as foreign:
        assert await foreign.says() == "writing"
        sends = [asyncio.create_task(broker.send_to_queue(CLAIMS, number)) for number in range(5)]
        batcher = session_of(broker)._batcher
        assert isinstance(batcher, Batcher)
        await until(lambda: bool(batcher._doing))  # it tries again and again, and stands in nobody's way
        assert not any(send.done() for send in sends)
        foreign.may_go_on()
        assert await foreign.says() == "committed"
        await asyncio.gather(*sends)
    assert (await broker.stats(CLAIMS)).sent == 5


async def test_a_foreign_writer_that_does_not_end_is_a_clear_error_and_nothing_is_lost(db, monkeypatch) -> None:
    async with filao.connect(db) as first, filao.connect(db) as second:
        await first.send_to_queue(CLAIMS, "before")
        held = await wait_for_one(second)
        with other(db, FOREIGN_WRITER) as foreign:
            assert await foreign.says() == "writing"
            with monkeypatch.context() as patch:
                patch.setattr(files, "BUSY_TIMEOUT", 0.2)
                calls = [first.send_to_queue(CLAIMS, "refused"), second.send_to_queue(CLAIMS, "refused"), held.ack()]
                for error in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(error, filao.EngineUnavailable)
                    assert "locked" in str(error)
            foreign.may_go_on()
            assert await foreign.says() == "committed"
        await first.send_to_queue(CLAIMS, "after")
        await held.ack()
        stats = await second.stats(CLAIMS)
        assert (stats.sent, stats.ready, stats.leased, stats.acked) == (2, 1, 0, 1)


STANDS_STILL = """
    async with filao.connect(db) as broker, broker.transaction():
        say("writing")
        hear()
"""


@pytest.mark.parametrize("call", ["send", "receive", "stats", "declare", "open", "close"])
async def test_a_process_that_stands_still_while_it_writes_does_not_hang_the_others(db, monkeypatch, call) -> None:
    broker, newcomer = filao.connect(db), filao.connect(db)
    await broker.open()
    calls = {
        "send": lambda: broker.send_to_queue(CLAIMS, "refused"),
        "receive": lambda: broker.receive_from_queue(CLAIMS, wait=0),
        "stats": lambda: broker.stats(CLAIMS),
        "declare": lambda: broker.declare(CLAIMS),
        "open": newcomer.open,
        "close": broker.close,
    }
    with other(db, STANDS_STILL) as still:
        assert await still.says() == "writing"
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.1)
        async with asyncio.timeout(20):
            with pytest.raises(filao.EngineUnavailable, match=r"by process \d+"):
                await broker.send_to_queue(CLAIMS, "refused")
            with suppress(filao.EngineUnavailable):
                await calls[call]()
    await newcomer.close()
    await broker.close()


# --- creating and migrating ------------------------------------------------------------------------------------------

CREATOR = """
    def add_a_table(connection): connection.execute("CREATE TABLE filao_added (id INTEGER)")
    files.migrate.__defaults__ = ((*files.MIGRATIONS, add_a_table),)
    say("ready")
    hear()
    async with filao.connect(db) as broker:
        await broker.declare(claims)
        await broker.send_to_queue(claims, os.getpid())
"""


@pytest.mark.parametrize("before", ["no file", "a file of the user's", "a file of an older version"])
async def test_eight_processes_create_and_migrate_a_file_at_once(tmp_path, before) -> None:
    db = tmp_path / "claims.db"
    if before == "a file of an older version":
        async with filao.connect(db) as older:
            await older.declare(filao.Queue("older"))
    elif before == "a file of the user's":
        with closing(sqlite3.connect(db)) as connection:
            connection.execute("CREATE TABLE claim (id INTEGER)")
    with ExitStack() as stack:
        creators = [stack.enter_context(other(db, CREATOR)) for _ in range(8)]
        for creator in creators:
            assert await creator.says() == "ready"
        for creator in creators:
            creator.may_go_on()
        for creator in creators:
            await creator.ends()
    with closing(sqlite3.connect(db)) as connection:
        pids = {int(content) for (content,) in connection.execute("SELECT content FROM filao_message")}
        assert pids == {creator.pid for creator in creators}
        assert files.schema_version(connection) == len(files.MIGRATIONS) + 1
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- forks -----------------------------------------------------------------------------------------------------------


FORK = """
    async with filao.connect(db) as broker:
        message = await broker.receive_from_queue(claims)
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # should it hang
            say(*[await outcome(call) for call in (broker.send_to_queue(claims, 7), message.ack(), broker.stats())])
            await broker.close()
            del broker, message
            gc.collect()
            os._exit(0)
        say("the child ended with", os.waitpid(child, 0)[1])
        hear()
        await broker.send_to_queue(claims, "sent by the parent")
        await message.ack()
        say("acked")
"""


async def test_a_forked_child_cannot_use_its_parents_broker_and_the_parent_goes_on(broker, db) -> None:
    await broker.send_to_queue(CLAIMS, "held")
    with other(db, FORK) as parent:
        assert await parent.says() == "ConfigurationError ConfigurationError ConfigurationError"
        assert await parent.says() == "the child ended with 0"
        parent.may_go_on()
        assert await parent.says() == "acked"
        await parent.ends()
    assert (await wait_for_one(broker)).body == "sent by the parent"


FORK_IN_TRANSACTION = """
    async with filao.connect(db) as broker:
        try:
            async with broker.transaction() as transaction:
                await transaction.send_to_queue(claims, "undone")
                child = os.fork()
                if child == 0:
                    signal.alarm(10)  # should it hang
                    say(await outcome(transaction.execute("SELECT 1")), await outcome(broker.stats()))
                    async def send():
                        async with filao.connect(db) as own:
                            await own.send_to_queue(claims, "sent by the child")
                    import threading
                    thread = threading.Thread(target=asyncio.run, args=(send(),))
                    thread.start()
                    thread.join()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                {then}
        except filao.EngineUnavailable as error:
            say("forked" in str(error), error)
        await broker.send_to_queue(claims, "sent by the parent")
"""


@pytest.mark.parametrize("then", ["pass", "await transaction.execute('SELECT 1')"])
async def test_a_fork_in_a_transaction_undoes_it_says_so_and_leaves_both_able_to_write(broker, db, then) -> None:
    with other(db, FORK_IN_TRANSACTION.format(then=then)) as parent:
        assert await parent.says() == "ConfigurationError ConfigurationError"
        assert (await parent.says()).startswith("True")
        await parent.ends()
    assert not someone_writes(db)
    bodies = [message.body for message in await broker.receive_many(CLAIMS, 9)]
    assert bodies == ["sent by the child", "sent by the parent"]


async def test_nothing_of_the_file_is_open_across_a_fork(broker, db) -> None:
    script = """
        def opened():
            names = []
            for number in os.listdir("/proc/self/fd"):
                try:
                    names.append(os.readlink(f"/proc/self/fd/{number}"))
                except OSError:
                    pass  # the folder's own
            return sorted(name.removeprefix(db) for name in names if name.startswith(db))
        async with filao.connect(db) as broker:
            await broker.receive_from_queue(claims)
            before = opened()
            if os.fork() == 0:
                say(opened())
                os._exit(0)
            os.wait()
            await broker.stats()
            say(opened() == before)
    """
    await broker.send_to_queue(CLAIMS, "held")
    with other(db, script) as parent:
        assert await parent.says() == "[]"
        assert await parent.says() == "True"
        await parent.ends()


async def test_what_a_child_confirms_lasts_though_its_parent_and_all_others_close_the_file(db, broker) -> None:
    script = """
        is_open, opens = os.pipe()
        async with filao.connect(db) as broker:
            if os.fork() == 0:
                signal.alarm(30)  # should it hang
                import threading
                async def send():
                    async with filao.connect(db) as own:
                        os.write(opens, b"1")
                        hear()
                        for number in range(5):
                            await own.send_to_queue(claims, number)
                        say("sent")
                        hear()
                thread = threading.Thread(target=asyncio.run, args=(send(),))
                thread.start()
                thread.join()
                os._exit(0)
            os.read(is_open, 1)
        say("closed")
        os.wait()
    """
    with other(db, script) as parent:
        assert await parent.says() == "closed"
        await broker.close()
        parent.may_go_on()
        assert await parent.says() == "sent"
        with closing(sqlite3.connect(db)) as passer_by:  # as `filao stats` would
            assert passer_by.execute("SELECT count(*) FROM filao_message").fetchone() == (5,)
        parent.may_go_on()
        await parent.ends()
    with closing(sqlite3.connect(db)) as afterwards:
        assert afterwards.execute("SELECT count(*) FROM filao_message").fetchone() == (5,)


async def test_a_forked_child_does_not_keep_the_leases_of_its_dead_parent(broker, db) -> None:
    await broker.send_to_queue(CLAIMS, "claim")
    script = """
        async with filao.connect(db) as broker:
            message = await broker.receive_from_queue(claims)
            if os.fork() == 0:
                signal.alarm(60)
                say(os.getpid())
                signal.pause()
            hear()
    """
    with other(db, script) as parent:
        child = int(await parent.says())
        try:
            parent.is_killed()
            message = await wait_for_one(broker)
            assert message.attempt == 2
        finally:
            os.kill(child, signal.SIGKILL)


# --- deaths and pauses -----------------------------------------------------------------------------------------------

HOLDER = """
    async with filao.connect(db) as broker:
        message = await broker.receive_from_queue(claims)
        say(message.id)
        hear()
"""


async def test_another_consumer_gets_a_killed_ones_message_without_waiting_for_its_lease(broker, db) -> None:
    receipt = await broker.send_to_queue(CLAIMS, "claim")
    with other(db, HOLDER) as holder:
        assert await holder.says() == receipt.id
        waits = asyncio.create_task(wait_for_one(broker))
        await until(lambda: is_waited_for(db))
        assert not waits.done()
        holder.is_killed()
        message = await waits
    assert (message.id, message.attempt) == (receipt.id, 2)
    await message.ack()


async def test_a_consumer_that_comes_after_a_death_takes_over_too(broker, db) -> None:
    receipt = await broker.send_to_queue(CLAIMS, "claim")
    with other(db, HOLDER) as holder:
        assert await holder.says() == receipt.id
        holder.is_killed()
    assert (await wait_for_one(broker)).attempt == 2


async def test_the_dead_leave_nothing_beside_the_file(broker, db) -> None:
    await broker.send_to_queue(CLAIMS, "claim")
    assert await broker.receive_from_queue(filao.Queue("claims"), wait=0, lease=0.001) is not None
    alive = set(files.sidecar(db).iterdir())
    with other(db, HOLDER) as holder:
        await holder.says()
        assert set(files.sidecar(db).iterdir()) > alive
        holder.is_killed()
    await wait_for_one(broker)
    await until(lambda: set(files.sidecar(db).iterdir()) == alive)


@pytest.mark.parametrize(
    "settling",
    ["ack()", "nack()", "nack(delay=0)", "reject()", "release()", "extend(60)", "transaction().__aenter__()"],
)
async def test_a_paused_consumer_whose_message_was_taken_over_can_change_nothing(broker, db, settling) -> None:
    await broker.send_to_queue(CLAIMS, "claim")
    script = f"""
        async with filao.connect(db) as broker:
            message = await broker.receive_from_queue(claims, lease=0.2)
            say("holding")
            hear()
            say(await outcome(message.{settling}))
            hear()
    """
    with other(db, script) as paused:
        assert await paused.says() == "holding"
        os.kill(paused.pid, signal.SIGSTOP)
        message = await wait_for_one(broker)
        before = await broker.stats(CLAIMS)
        paused.may_go_on()
        os.kill(paused.pid, signal.SIGCONT)
        assert await paused.says() == "LeaseLost"
        after = await broker.stats(CLAIMS)
        ages = {"oldest_leased_age": None, "receivers": ()}  # which go on
        assert structs.replace(after, **ages) == structs.replace(before, **ages)
        assert (message.attempt, after.leased) == (2, 1)
        await message.ack()


async def test_a_paused_consumer_whose_message_nobody_took_may_still_ack(broker, db) -> None:
    await broker.send_to_queue(CLAIMS, "claim")
    script = """
        async with filao.connect(db) as broker:
            message = await broker.receive_from_queue(claims, lease=0.001)
            while (await broker.receive_from_queue(filao.Queue("other"), wait=0.01)) is not None: pass
            say(await outcome(message.ack()))
    """
    await broker.declare(filao.Queue("other"))
    with other(db, script) as late:
        assert await late.says() == "done"
    stats = await broker.stats(CLAIMS)
    assert (stats.acked, stats.late) == (1, 1)


# --- waking ----------------------------------------------------------------------------------------------------------


async def test_a_send_wakes_a_consumer_that_waits_in_another_process(broker, db) -> None:
    script = """
        engine.POLL_INTERVAL = 3600  # so that nothing but the bell can wake it
        async with filao.connect(db) as broker:
            message = await broker.receive_from_queue(claims)
            say(message.body)
            await message.ack()
    """
    with other(db, script) as consumer:
        await until(lambda: is_waited_for(db))
        await broker.send_to_queue(CLAIMS, "claim")
        assert await consumer.says() == "claim"
        await consumer.ends()


async def test_a_consumer_finds_by_polling_what_a_foreign_connection_committed(broker, db) -> None:
    script = """
        connection = sqlite3.connect(db)
        async with filao.connect(db) as broker:
            connection.execute("BEGIN IMMEDIATE")
            await broker.send_to_queue(claims, "claim", within=connection)
            say("sent")
            hear()
            connection.commit()
    """
    waits = asyncio.create_task(wait_for_one(broker))
    await until(lambda: is_waited_for(db))
    with other(db, script) as foreign:
        assert await foreign.says() == "sent"
        assert not waits.done()
        foreign.may_go_on()
        message = await waits
        assert message.body == "claim"
        await message.ack()
        await foreign.ends()


async def test_a_bell_that_cannot_be_rung_does_not_undo_or_repeat_what_was_committed(broker, db) -> None:
    script = """
        async with filao.connect(db) as broker:
            await broker.stats()
            hear()
            opened = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            try:
                while True: opened.append(os.dup(0))
            except OSError: pass
            outcomes = await asyncio.gather(*(outcome(broker.send_to_queue(claims, n)) for n in range(5)))
            for file in opened: os.close(file)
            say(*outcomes)
    """
    with other(db, script) as sender:
        waits = asyncio.create_task(wait_for_one(broker))
        await until(lambda: is_waited_for(db))
        sender.may_go_on()
        assert await sender.says() == "done done done done done"
        await sender.ends()
        await waits
    assert (await broker.stats(CLAIMS)).sent == 5
