"""Calls from threads into an event loop: when the loop ends, and in the midst of what they would wait for."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import filao
import filao.sync
from filao.calls import ENDED, Call, Caller, undo_held
from filao.engines.sqlite import files
from filao.forks import gate
from tests.conftest import untraced
from tests.support.instructions import ALL, interrupted, stopped_at


def test_a_call_that_comes_while_the_loop_ends_is_refused(tmp_path) -> None:
    """What begins after the loop has ended its tasks would not be ended by anyone."""
    broker = filao.sync.connect(tmp_path / "claims.db")
    broker.open()
    caller = broker._caller
    answers: list[str] = []

    def come_late() -> None:
        try:
            caller.call(asyncio.sleep, 0)
        except filao.ConfigurationError as error:
            answers.append(str(error))

    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:  # the loop has ended its tasks, and now ends its generators
            late = threading.Thread(target=come_late)
            late.start()
            late.join(5)
            answers.append("the loop goes on ending")

    opened = generator()

    async def enter() -> None:
        await anext(opened)

    caller.call(enter)
    broker.close()
    assert answers == [ENDED, "the loop goes on ending"]


def test_a_thread_that_has_the_identity_of_a_loops_that_has_ended_is_told_that_it_has() -> None:
    """Identities are given again; this thread stands for the other, as the loop was made here."""
    loop = asyncio.new_event_loop()
    caller = Caller(loop, loop_thread=threading.get_ident())
    with pytest.raises(filao.ConfigurationError, match="in the midst"):
        caller.check_thread()
    caller.end()
    loop.close()
    with pytest.raises(filao.ConfigurationError, match="closed meanwhile"):
        caller.call(asyncio.sleep, 0)


def test_an_end_that_meets_the_beginning_of_a_call_leaves_no_task() -> None:
    loop = asyncio.new_event_loop()
    at, is_met = 0, True
    while is_met:
        at, caller = at + 1, Caller(loop)
        is_met = stopped_at(partial(begin, caller), at, caller.end)
        loop.run_until_complete(asyncio.sleep(0))
        assert not is_met or not asyncio.all_tasks(loop), at
    assert at > 10
    for task in asyncio.all_tasks(loop):  # of the call that met no end
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_what_a_thread_holds_is_undone_though_brokers_are_opened_meanwhile() -> None:
    loop = asyncio.new_event_loop()
    callers = [Caller(loop), Caller(loop)]
    at = 1
    while stopped_at(partial(undo_held, 1), at, lambda: callers.append(Caller(loop)), of=ALL):
        del callers[2:]
        at += 1
    assert at > 10
    loop.close()


@untraced
def test_an_exception_that_meets_the_making_of_a_block_leaves_no_other_behind(monkeypatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: told.append(what.exc_type))
    loop = asyncio.new_event_loop()
    at = 1
    while interrupted(partial(Caller(loop).held, asyncio.Lock, id, list), at):
        at += 1
    loop.close()
    assert at > 1
    assert set(told) <= {KeyboardInterrupt}, "it met the end of the block itself"


def begin(caller: Caller) -> None:
    with suppress(filao.ConfigurationError):
        caller.begin(Call(caller.loop, asyncio.sleep, (3600,), None, caller.forget_call))


CALLS: dict[str, Callable[[filao.sync.Broker], Any]] = {
    "send": lambda broker: broker.send_to_queue("other", 1),
    "receive": lambda broker: broker.receive_from_queue("other"),
    "stats": lambda broker: broker.stats(),
    "transaction": lambda broker: broker.transaction().__enter__(),
    "close": lambda broker: broker.close(),
}


@pytest.fixture
def broker(tmp_path):
    with filao.sync.connect(tmp_path / "claims.db") as opened:
        opened.declare(filao.Queue("claims"), filao.Queue("other"))
        yield opened


def refused(call: Callable[[], object], told: list[str]) -> None:
    try:
        call()
    except filao.ConfigurationError as error:
        told.append(str(error))


@pytest.mark.parametrize("call", CALLS)
def test_a_call_from_an_observer_is_refused_because_it_would_wait_for_itself(broker, call: str) -> None:
    told: list[str] = []

    class Calling:
        def operated(self, done: filao.Operated) -> None:
            refused(lambda: CALLS[call](broker), told)
            assert done.queue == "claims"

        def began(self, delivery: object) -> None: ...
        def ended(self, *_: object) -> None: ...

    broker.observers.add(Calling())
    broker.send_to_queue("claims", 1)
    assert broker.stats("claims").ready == 1  # told by then
    assert "in the midst of another one" in told[0]
    assert broker.stats("other").sent == 0


@pytest.mark.parametrize("call", CALLS)
def test_a_call_from_what_a_statement_binds_is_refused(broker, monkeypatch, call: str) -> None:
    told: list[str] = []

    class Calling:
        def __conform__(self, _: object) -> str:
            refused(lambda: CALLS[call](broker), told)
            return "bound"

    with broker.transaction() as tx:
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 1.0)
        assert tx.execute("SELECT ?", (Calling(),)) == [("bound",)]
    assert "in the midst of another one" in told[0]


def test_a_call_from_a_collection_in_the_midst_of_a_lone_call_is_refused(broker) -> None:
    told: list[str] = []

    def collecting(*_: object) -> None:
        if not told and threading.get_ident() in gate._inside:
            told.append("")
            refused(lambda: CALLS["stats"](broker), told)

    broker.send_to_queue("claims", 1)
    threshold = gc.get_threshold()
    gc.callbacks.append(collecting)
    gc.set_threshold(1)
    try:
        broker.send_to_queue("claims", 2)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(collecting)
    assert "in the midst of another one" in told[1]
    assert broker.stats("claims").ready == 2
