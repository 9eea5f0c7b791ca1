"""The threads of plain handlers: an interrupt hits the function that it is meant for, or none."""

import asyncio
import threading
import weakref
from collections.abc import Generator
from contextvars import ContextVar

import pytest

from filao.worker.threads import Call, InterruptedHandlerError, Threads
from tests.support.working import PATIENCE

pytestmark = pytest.mark.anyio
VARIABLE: ContextVar[str] = ContextVar("VARIABLE")


@pytest.fixture
def threads() -> Generator[Threads]:
    threads = Threads("ours")
    yield threads
    threads.close()


async def answer(call: Call) -> object:
    """Return or raise what a call did."""
    async with asyncio.timeout(PATIENCE):
        return await call.future


async def test_a_function_that_was_interrupted_before_it_began_never_runs() -> None:
    ran: list[int] = []
    call = Call(asyncio.get_running_loop(), lambda: ran.append(1))
    call.interrupt()
    with pytest.raises(InterruptedHandlerError):
        call.run()
    assert ran == []


async def test_an_interrupt_that_comes_after_the_end_hits_nothing_that_the_thread_does_then() -> None:
    call = Call(asyncio.get_running_loop(), lambda: "done")
    call.run()
    call.interrupt()
    for _ in range(1000):
        pass
    assert await answer(call) == "done"


async def test_a_thread_is_used_again_but_not_once_it_was_interrupted(threads) -> None:
    begun = threading.Event()

    def spin() -> None:
        begun.set()
        while True:
            pass

    used = [await answer(threads.start(threading.current_thread)) for _ in range(2)]
    assert used[0] is used[1]
    call = threads.start(spin)
    await asyncio.to_thread(begun.wait, PATIENCE)
    call.interrupt()
    with pytest.raises(InterruptedHandlerError):
        await answer(call)
    assert await answer(threads.start(threading.current_thread)) not in used


async def test_a_call_that_nobody_waits_for_any_more_holds_up_no_other(threads) -> None:
    ending = threading.Event()
    call = threads.start(ending.wait, PATIENCE)
    call.future.cancel()
    await asyncio.sleep(0)  # until that is told
    try:
        assert await answer(threads.start(threading.current_thread)) is not None
        assert not ending.is_set()
    finally:
        ending.set()


async def test_a_function_sees_the_context_of_who_started_it(threads) -> None:
    for value in ("one", "another"):
        VARIABLE.set(value)
        assert await answer(threads.start(VARIABLE.get)) == value


async def test_an_idle_thread_keeps_nothing_of_what_it_ran(threads) -> None:
    class Given:
        pass

    async def run() -> "weakref.ref[Given]":
        given = Given()
        await answer(threads.start(id, given))
        return weakref.ref(given)

    kept = await run()
    async with asyncio.timeout(PATIENCE):
        while kept() is not None:
            await asyncio.sleep(0.01)


async def test_idle_threads_end_when_they_are_closed(threads) -> None:
    used = await answer(threads.start(threading.current_thread))
    threads.close()
    assert isinstance(used, threading.Thread)
    await asyncio.to_thread(used.join, PATIENCE)
    assert not used.is_alive()
