"""The blocking twin: the same names, many threads, and its own thread for connections of the user's."""

import asyncio
import inspect
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import filao
import filao.sync
from tests.support.memory import MemoryEngine, Store
from tests.support.programs import run

DOOR = {  # what a user may call, as the reference says it: the same on both faces
    "Broker": {
        *("open", "close", "observers", "features", "emulated"),
        *("declare", "queues", "delete_queue"),
        *("send_to_queue", "send_many", "receive_from_queue", "receive_many", "consume", "transaction"),
        *(
            "stats",
            "peek",
            "dead_letters",
            "redrive",
            "purge",
            "cancel",
            "discard",
            "trace",
            "pause",
            "resume",
            "doctor",
        ),
    },
    "Message": {
        *("body", "id", "queue", "attempt", "headers", "group", "priority", "sent_at", "settled"),
        *("ack", "nack", "reject", "release", "extend", "transaction"),
    },
    "Transaction": {"execute", "send_to_queue", "send_many", "ack"},
}


def _public(owner: object) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


@pytest.mark.anyio
async def test_users_see_what_is_theirs_and_nothing_else(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        message = await broker.receive_from_queue("claims")
        async with message.transaction() as transaction:
            found = {type(one).__name__: _public(one) for one in (broker, message, transaction)}
    assert found == DOOR


def test_users_of_the_blocking_twin_see_the_same(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_to_queue("claims", 1)
        message = broker.receive_from_queue("claims")
        with message.transaction() as transaction:
            found = {type(one).__name__: _public(one) for one in (broker, message, transaction)}
    assert found == DOOR


def test_the_package_names_what_its_signatures_do() -> None:
    names = {"Durability", "Guarantee", "Outcomes", "Outgoing", "Status", "WorkerGuarantee", "__version__"}
    assert names <= set(filao.__all__)


NAMES = [(owner, name) for owner, names in DOOR.items() for name in sorted(names)]
OF_ITS_OWN = {"open", "close", "observers"}  # they say of loops and threads what is true on one face only


@pytest.mark.parametrize(("owner", "name"), NAMES)
def test_both_faces_take_the_same_and_say_the_same(owner: str, name: str) -> None:
    ours, theirs = (inspect.getattr_static(getattr(face, owner), name) for face in (filao, filao.sync))
    if inspect.isfunction(ours):
        assert not inspect.iscoroutinefunction(theirs)
        assert _parameters(theirs) == _parameters(ours)
    if name not in OF_ITS_OWN and inspect.getdoc(ours):  # a slot has none
        assert inspect.getdoc(theirs) == inspect.getdoc(ours)


def _parameters(function: Callable[..., Any]) -> list[tuple[object, ...]]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [(p.name, p.kind, p.default, str(p.annotation).replace("filao.sync", "filao.message")) for p in found]


def test_a_sends_bodies_are_read_in_the_callers_thread(tmp_path) -> None:
    read_in = []

    def bodies() -> Iterator[int]:
        read_in.append(threading.get_ident())
        yield 1

    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_many("claims", bodies())
        broker.send_many(queue="claims", bodies=bodies())
        with broker.transaction() as transaction:
            transaction.send_many("claims", bodies())
    assert read_in == [threading.get_ident()] * 3


def test_many_threads_share_one_broker(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker, ThreadPoolExecutor(16) as threads:
        broker.declare(filao.Queue("claims"))
        list(threads.map(lambda body: broker.send_to_queue("claims", body), range(400)))

        def consume(_: int) -> list[int]:
            bodies = []
            while (message := broker.receive_from_queue("claims", wait=0)) is not None:
                bodies.append(message.body)
                message.ack()
            return bodies

        received = [body for bodies in threads.map(consume, range(16)) for body in bodies]
    assert sorted(received) == list(range(400))


def test_consume_yields_and_gives_back_what_it_did_not(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_many("claims", range(3))
        for message in broker.consume("claims", prefetch=3):
            message.ack()
            break
        assert [message.body for message in broker.receive_many("claims", 9, wait=0)] == [1, 2]


def test_a_send_within_a_transaction_uses_the_callers_thread(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        connection = sqlite3.connect(tmp_path / "claims.db")  # sqlite3 refuses to be used from another thread
        broker.send_to_queue("claims", 1, within=connection)
        broker.send_many("claims", [2, 3], within=connection)
        assert broker.stats("claims").ready == 0
        connection.commit()
        connection.close()
        assert [message.body for message in broker.receive_many("claims", 9, wait=0)] == [1, 2, 3]


def test_a_call_inside_its_own_transaction_is_refused(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        with broker.transaction() as transaction:
            assert transaction.execute("SELECT 1") == [(1,)]
            with pytest.raises(filao.ConfigurationError, match="transaction"):
                broker.stats()
        assert broker.stats("claims").sent == 0


def test_a_thread_that_begins_in_anothers_transaction_is_not_in_it(tmp_path, monkeypatch) -> None:
    """As the threads of a free-threaded Python do, say of a pool that grows: they begin in a copy of the context."""
    monkeypatch.setenv("PYTHON_THREAD_INHERIT_CONTEXT", "1")
    program = """
        from concurrent.futures import ThreadPoolExecutor
        from contextvars import copy_context
        broker = filao.sync.connect(url)
        broker.open()
        broker.declare(claims)
        broker.send_to_queue("claims", 1)
        message, begins = broker.receive_from_queue("claims"), threading.Event()
        def work():
            begins.set()
            message.ack()
            broker.send_to_queue("claims", 3)
            with broker.transaction() as transaction:
                transaction.send_to_queue("claims", 4)
        def copied():
            try:
                broker.stats("claims")
            except filao.ConfigurationError as error:
                say("made in" in str(error))
        pool = ThreadPoolExecutor(1)
        pool.submit(say, "a pool").result()
        with broker.transaction() as transaction:
            transaction.send_to_queue("claims", 2)
            thread = threading.Thread(target=copy_context().run, args=(copied,))
            thread.start()
            thread.join()  # as its context says
            pool.submit(copy_context().run, copied).result()
            thread = threading.Thread(target=work)
            thread.start()
            begins.wait()
        thread.join()
        say(broker.stats("claims").sent, broker.stats("claims").acked)
    """
    assert run(tmp_path / "claims.db", program) == ["a pool", "True", "True", "4 1"]


def test_a_broker_that_was_never_opened_says_so() -> None:
    broker = filao.sync.connect("sqlite://:memory:")
    with pytest.raises(filao.ConfigurationError, match="not open"):
        broker.stats()
    broker.close()


def test_a_broker_that_cannot_open_leaves_no_thread_behind(tmp_path) -> None:
    with pytest.raises(filao.ConfigurationError, match="folder"), filao.sync.connect(tmp_path):
        raise AssertionError("it opened")


def test_consume_ends_when_nothing_came_for_a_while(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_many("claims", [1, 2, 3])
        seen = []
        for message in broker.consume("claims", prefetch=2, wait=0.01):
            seen.append(message.body)
            message.ack()
        assert seen == [1, 2, 3]
        assert list(broker.consume("claims", wait=0)) == []


class EndsSlowly(MemoryEngine):
    """Meets Ctrl-C while it looks for a queue, and takes some turns of the loop to end, as a server's client does."""

    async def find(self, queue: str) -> filao.Queue:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
        return filao.Queue(queue)


def test_ctrl_c_in_a_loop_over_messages_is_no_other_error() -> None:
    with filao.sync.connect(lambda: EndsSlowly(Store())) as broker, pytest.raises(KeyboardInterrupt):
        for _ in broker.consume("claims"):
            pass


def test_ctrl_c_in_the_instant_before_a_wait_ends_it() -> None:
    """Under uvloop, which begins a call while its caller is still on the way to wait."""
    run(
        "",
        """
        import uvloop
        from filao import calls
        from tests.support.memory import MemoryEngine, Store
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        calls.LOOKED_AFTER = 0.05

        class Interrupts(MemoryEngine):
            async def find(self, queue):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                await asyncio.Event().wait()

        for _ in range(40):
            with filao.sync.connect(lambda: Interrupts(Store())) as broker:
                try:
                    broker.receive_from_queue("claims")
                except KeyboardInterrupt:
                    pass
        """,
    )
