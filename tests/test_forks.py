"""Across forks: nothing is lost, and a child has nothing of its parent's."""

import sqlite3
import time
from contextlib import closing
from functools import partial
from itertools import count
from textwrap import dedent

from filao.engines.sqlite.database import Database
from filao.forks import Gate
from tests.support.instructions import ALL, stopped_at
from tests.support.programs import db, run

__all__ = ["db"]


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


def test_a_child_opens_an_async_broker_that_was_closed_and_none_that_its_parent_has_open(db) -> None:
    program = """
        async def count(broker):
            async with broker:
                return (await broker.stats("claims")).ready
        broker, closed = filao.connect(url), filao.connect(url)
        asyncio.run(count(closed))
        loop = asyncio.new_event_loop()
        loop.run_until_complete(broker.open())
        child = os.fork()
        if child == 0:
            say(asyncio.run(count(closed)))
            try:
                asyncio.run(count(broker))
            except filao.ConfigurationError as error:
                say("forked" in str(error))
            sys.exit(0)
        say(os.waitpid(child, 0)[1])
        loop.run_until_complete(broker.close())
    """
    assert run(db, program) == ["3", "True", "0"]


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


def test_a_child_must_close_what_the_program_itself_had_open_before_it_opens_the_queue(db) -> None:
    program = """
        import sqlite3
        def told():
            try:
                with filao.sync.connect(url) as broker:
                    return broker.send_to_queue("claims", "of the child").duplicate
            except filao.ConfigurationError as error:
                return "that it has not" in str(error) and f"pid {os.getpid()}" in str(error)
        mine = sqlite3.connect(url)
        mine.execute("SELECT * FROM filao_queue").fetchall()
        say(told())
        if os.fork() == 0:
            say(told())
            mine.close()
            say(told())
            sys.stdout.flush()
            os._exit(0)
        os.wait()
        say(told())
    """
    assert run(db, program) == ["False", "True", "False", "False"]


HALF_OPEN = """
    from pathlib import Path
    from filao.engines.sqlite.engine import SqliteEngine
    made, opening, goes_on = [], threading.Event(), threading.Event()
    def make():
        made.append(1)
        if len(made) == 2:
            opening.set()
            goes_on.wait()
        return SqliteEngine(Path(url))
"""


def test_a_child_opens_a_broker_that_another_thread_of_its_parents_was_opening(db) -> None:
    program = """
        broker = filao.sync.connect(make)
        broker.open()
        broker.close()
        thread = threading.Thread(target=broker.open)
        thread.start()
        opening.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            broker.open()
            broker.send_to_queue("claims", 3)
            broker.close()
            os._exit(0)
        say(os.waitpid(child, 0)[1])
        goes_on.set()
        thread.join()
        say(broker.stats("claims").ready)
    """
    assert run(db, dedent(HALF_OPEN) + dedent(program)) == ["0", "4"]


def test_a_child_is_refused_an_async_broker_that_its_parent_was_opening(db) -> None:
    program = """
        broker = filao.connect(make)
        async def once():
            async with broker:
                pass
        asyncio.run(once())
        thread = threading.Thread(target=asyncio.run, args=(once(),))
        thread.start()
        opening.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                asyncio.run(broker.open())
            except filao.ConfigurationError as error:
                say("forked" in str(error))
            os._exit(0)
        say(os.waitpid(child, 0)[1])
        goes_on.set()
        thread.join()
        asyncio.run(once())
    """
    assert run(db, dedent(HALF_OPEN) + dedent(program)) == ["True", "0"]


def test_a_fork_bears_that_files_are_opened_at_any_instruction_before_it(tmp_path) -> None:
    """Otherwise it would come with files open: Python only prints what is raised before a fork."""

    def watched(gate: Gate, number: int) -> Database:
        database = Database(tmp_path / f"{number}.db", durable=True, clock=time.time, wake=lambda _: None)
        gate.watch(database)
        return database

    for at in count(1):
        gate = Gate()
        files = [watched(gate, number) for number in range(3)]
        shut = partial(gate.shut, in_transaction=False)
        is_met = stopped_at(shut, at, lambda: files.append(watched(gate, 3)), of=ALL)  # noqa: B023
        gate.open()
        if not is_met:
            break
    assert at > 50


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
