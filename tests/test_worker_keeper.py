"""Leases are kept while handlers work, whatever they do to the event loop and the interpreter."""

import asyncio
import dataclasses
import threading
import time

import pytest

import filao
import filao.sync
from filao.engine import Delivery
from filao.session import Session
from filao.worker import keeper
from filao.worker import run as run_module
from tests.support.working import PATIENCE, SHORT, broker, until

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_a_handler_longer_than_its_lease_keeps_it(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(SHORT, concurrency=2)
    async def handle(message: filao.Message) -> None:
        await asyncio.sleep(1.0)

    await broker.send_many("claims", [1, 2])
    await worker.drain()
    stats = await broker.stats("claims")
    assert (stats.acked, stats.received, stats.lost, stats.late) == (2, 2, 0, 0)


@pytest.mark.parametrize("bodies", [[0], [0, 1, 2, 3], [1, 2, 3, 0]])
async def test_a_handler_that_blocks_the_loop_keeps_its_lease_and_its_neighbours(url, broker, bodies) -> None:
    worker = filao.Worker(url)

    @worker.consumer(dataclasses.replace(SHORT, lease=0.8), concurrency=4)  # a busy disk may take half of it to flush
    async def handle(message: filao.Message) -> None:
        if message.body == 0:
            time.sleep(1.2)  # noqa: ASYNC251  # what must not be done, and is

    await broker.send_many("claims", bodies)
    await worker.drain()
    stats = await broker.stats("claims")
    assert (stats.acked, stats.received, stats.lost, stats.late) == (len(bodies), len(bodies), 0, 0)


async def test_a_handler_that_keeps_the_interpreter_busy_keeps_its_lease(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(dataclasses.replace(SHORT, lease=1.0), concurrency=2)
    def handle(message: filao.sync.Message) -> None:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            pass

    await broker.send_many("claims", [1, 2])
    await worker.drain()
    stats = await broker.stats("claims")
    assert (stats.acked, stats.received, stats.lost) == (2, 2, 0)


async def test_in_memory_leases_are_kept_too() -> None:
    async with filao.connect("sqlite://:memory:") as broker:
        worker = filao.Worker(broker)

        @worker.consumer(SHORT)
        async def handle(message: filao.Message) -> None:
            await asyncio.sleep(1.0)

        await broker.declare(SHORT)
        await broker.send_to_queue("claims", 1)
        assert [handled.how for handled in await worker.drain()] == ["acked"]
        assert (await broker.stats("claims")).late == 0


@pytest.mark.parametrize("name", [":memory:", "claims.db"])
async def test_a_worker_that_gets_no_thread_of_its_own_says_so(tmp_path, name) -> None:
    """One thread extends leases, except those in memory; another watches the loop."""
    async with filao.connect("sqlite://:memory:" if name == ":memory:" else tmp_path / name) as broker:
        worker = filao.Worker(broker)

        @worker.consumer(filao.Queue("claims"))
        async def handle(message: filao.Message) -> None: ...

        before = threading.stack_size(2**62)  # more than there is
        try:
            with pytest.raises(filao.EngineUnavailable, match="cannot start a thread"):
                await worker.drain()
        finally:
            threading.stack_size(before)
        assert await worker.drain() == []


async def test_a_worker_whose_thread_is_a_greenlet_is_refused_before_it_receives(url, broker, monkeypatch) -> None:
    worker = filao.Worker(url)

    @worker.consumer(SHORT)
    async def handle(message: filao.Message) -> None: ...

    await broker.send_to_queue("claims", 1)
    monkeypatch.setattr(keeper, "start", lambda thread: thread.run())  # as a greenlet: in the caller's thread
    with pytest.raises(filao.ConfigurationError, match=r"greenlets, .*Nothing was done; run the worker in a process"):
        await worker.run()
    assert (await broker.stats("claims")).received == 0


async def test_leases_are_kept_though_extending_and_reporting_fail_for_a_while(url, broker, monkeypatch) -> None:
    worker, extend, extended = filao.Worker(url), Session.extend, []

    async def failing_first(session: Session, delivery: Delivery, seconds: float) -> None:
        extended.append(delivery.id)
        if len(extended) == 1:
            raise filao.EngineUnavailable("the server is away")
        await extend(session, delivery, seconds)

    async def failing(session: Session, state: str) -> None:
        raise filao.EngineUnavailable("the server is away")

    monkeypatch.setattr(Session, "extend", failing_first)
    monkeypatch.setattr(Session, "report", failing)

    @worker.consumer(dataclasses.replace(SHORT, lease=1.5))
    async def handle(message: filao.Message) -> None:
        await until(lambda: len(extended) == 4)  # once in vain

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["acked"]
    stats = await broker.stats("claims")
    assert (stats.received, stats.late) == (1, 0)


async def test_a_handler_that_blocks_the_loop_past_its_timeout_is_kept_no_longer(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(run_module, "ENDS_WITHIN", 0.1)
    worker, taken = filao.Worker(url), threading.Event()

    def take() -> None:
        with filao.sync.connect(url) as other:
            if (message := other.receive_from_queue("claims", wait=PATIENCE)) is not None:
                message.ack()
                taken.set()

    taking = threading.Thread(target=take)

    @worker.consumer(SHORT, timeout=0.1)
    async def handle(message: filao.Message) -> None:
        taking.start()
        assert taken.wait(PATIENCE)

    await broker.send_to_queue("claims", 1)
    try:
        assert [handled.how for handled in await worker.drain()] == ["lost"]
    finally:
        taking.join()
