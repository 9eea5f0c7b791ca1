"""Handlers that are told to end: by their timeout, or because their lease is another's."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import pytest

import filao
import filao.sync
from filao.worker import handling as handling_module
from filao.worker import shift as shift_module
from filao.worker.threads import Call, InterruptedHandlerError, _work
from tests.conftest import untraced
from tests.support.instructions import instructions, stopped_at
from tests.support.working import CLAIMS, PATIENCE, SHORT, broker, running, until, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_a_hung_coroutine_ends_at_its_timeout_and_has_failed(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, timeout=0.05)
    async def handle(message: filao.Message) -> None:
        await asyncio.Event().wait()

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert handled.how == "retried"
    assert handled.error == "TimeoutError: the handler ran longer than its timeout of 0.05 s"


async def test_a_hung_thread_is_interrupted_at_its_timeout_and_has_failed(url, broker) -> None:
    worker, interrupted = filao.Worker(url), []

    @worker.consumer(CLAIMS, timeout=0.05)
    def handle(message: filao.sync.Message) -> None:
        try:
            while True:
                pass
        finally:
            interrupted.append(message.id)

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, interrupted) == ("retried", [handled.id])


@untraced
async def test_a_plain_handler_that_is_interrupted_between_any_two_instructions_has_ended() -> None:
    loop = asyncio.get_running_loop()

    def handled() -> tuple[Call, Callable[[], None]]:
        call, calls = Call(loop, lambda: "done"), SimpleQueue[Call | None]()
        calls.put(call)
        calls.put(None)
        return call, partial(_work, calls)

    def interrupt(call: Call) -> None:
        if not call._lock.locked():  # otherwise another thread would wait
            call.interrupt()

    _, work = handled()
    count = instructions(work)
    assert count > 50
    for at in range(1, count + 1):
        call, work = handled()
        # In a thread of its own: Python 3.11 cannot interrupt one that once failed to start another, which a test did.
        thread = threading.Thread(target=stopped_at, args=(work, at, partial(interrupt, call)), daemon=True)
        thread.start()
        await asyncio.wait([call.future], timeout=PATIENCE)
        thread.join(PATIENCE)  # early releases of Python 3.12 crash where two threads are traced at once
        assert call.future.done(), at
        error = call.future.exception()
        assert isinstance(error, InterruptedHandlerError) if error is not None else call.future.result() == "done"


@pytest.mark.parametrize("guarantee", ["at-least-once", "at-most-once"])
async def test_a_handler_for_which_no_thread_can_be_started_has_not_failed(url, broker, caplog, guarantee) -> None:
    worker, handled = filao.Worker(url), []

    @worker.consumer(CLAIMS, guarantee=guarantee)
    def handle(message: filao.sync.Message) -> None:
        handled.append(message.body)

    async with running(worker):
        before = threading.stack_size(2**62)  # more than there is
        try:
            await broker.send_to_queue("claims", 1)
            await until(lambda: "cannot start a thread" in caplog.text)
        finally:
            threading.stack_size(before)
        await until(lambda: handled)
        await until_stats(broker, acked=1)
    stats = await broker.stats("claims")
    assert (stats.nacked, stats.received - stats.released) == (0, 1)


STUBBORN = [
    "coroutine",
    pytest.param("thread", marks=pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer stops the loop")),
]

"""Under a tracer (coverage, on 3.11) the loop stands still while a thread that waits in C is to be interrupted."""


@pytest.mark.parametrize("kind", STUBBORN)
async def test_a_handler_that_does_not_end_is_settled_without_it(url, broker, monkeypatch, caplog, kind) -> None:
    monkeypatch.setattr(handling_module, "ENDS_WITHIN", 0.05)
    worker, end = filao.Worker(url), threading.Event()

    async def stubborn(message: filao.Message) -> None:
        while not end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    def deaf(message: filao.sync.Message) -> None:
        end.wait(PATIENCE)  # an interruption comes when this call into C has ended

    worker.consumer(CLAIMS, timeout=0.05)(stubborn if kind == "coroutine" else deaf)
    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, delayed=1, nacked=1)
        await until(lambda: "still runs; the message was settled without it" in caplog.text)
        end.set()
        await until(lambda: worker.handled)
    assert (await broker.stats("claims")).nacked == 1


@pytest.mark.parametrize("kind", STUBBORN)
async def test_a_handler_that_does_not_end_leaves_its_place_to_others(url, broker, monkeypatch, kind) -> None:
    monkeypatch.setattr(handling_module, "ENDS_WITHIN", 0.05)
    worker, end, seen = filao.Worker(url), threading.Event(), []

    async def stubborn(message: filao.Message) -> None:
        seen.append(message.body)
        while message.body == "hangs" and not end.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    def deaf(message: filao.sync.Message) -> None:
        seen.append(message.body)
        if message.body == "hangs":
            end.wait(PATIENCE)

    # Long enough for the others to begin and end on a busy machine: one that times out comes again much later.
    worker.consumer(CLAIMS, timeout=0.5)(stubborn if kind == "coroutine" else deaf)
    await broker.send_many("claims", ["hangs", "first", "second"])
    try:
        async with running(worker):
            await until_stats(broker, delayed=1, acked=2)
            assert seen == ["hangs", "first", "second"]
            assert worker.status().running == {"claims": 0}
            end.set()
    finally:
        end.set()


async def test_a_process_is_unhealthy_while_too_many_handlers_do_not_end(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(handling_module, "ENDS_WITHIN", 0.05)
    monkeypatch.setattr(shift_module, "HUNG_MAX", 0)
    worker, end = filao.Worker(url), asyncio.Event()

    @worker.consumer(CLAIMS, timeout=0.05)
    async def stubborn(message: filao.Message) -> None:
        while not end.is_set():
            with suppress(asyncio.CancelledError):
                await end.wait()

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until(lambda: not worker.status().healthy)
        assert "handlers have not ended though they were told to" in worker.status().problems[0]
        end.set()
        await until(lambda: worker.status().healthy)


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_a_lost_lease_cancels_its_handler(url, broker, kind) -> None:
    worker, began, cancelled = filao.Worker(url), threading.Event(), []

    async def coroutine(message: filao.Message) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(message.id)

    def thread(message: filao.sync.Message) -> None:
        began.set()
        try:
            while True:
                time.sleep(0.001)
        finally:
            cancelled.append(message.id)

    worker.consumer(SHORT)(coroutine if kind == "coroutine" else thread)
    receipt = await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until(began.is_set)
        await broker.purge("claims", state="leased")  # an operator takes it away
        await until(lambda: cancelled)
        await until(lambda: worker.handled)
    assert cancelled == [receipt.id]
