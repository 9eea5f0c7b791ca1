"""One run of a worker: how it stops, what it waits for, and when it is healthy."""

import asyncio
import threading

import pytest

import filao
import filao.sync
from filao.worker import shift as shift_module
from tests.conftest import engine_of
from tests.support.working import CLAIMS, PATIENCE, broker, running, shift_of, until, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_stopping_lets_what_runs_finish_and_takes_no_more(url, broker) -> None:
    worker, go_on = filao.Worker(url), asyncio.Event()

    @worker.consumer(CLAIMS, concurrency=2)
    async def handle(message: filao.Message) -> None:
        await go_on.wait()

    await broker.send_many("claims", range(5))
    async with running(worker) as task:
        await until_stats(broker, leased=2)
        worker.stop()
        await broker.send_to_queue("claims", 6)
        go_on.set()
        async with asyncio.timeout(PATIENCE):
            await task
        stats = await broker.stats("claims")
        assert (stats.acked, stats.ready, stats.leased) == (2, 4, 0)


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
@pytest.mark.parametrize("how", ["grace", "at once"])
async def test_what_does_not_finish_is_given_back_its_attempt_unused(url, broker, kind, how) -> None:
    worker, began = filao.Worker(url, grace=0.05 if how == "grace" else 3600), threading.Event()

    async def coroutine(message: filao.Message) -> None:
        began.set()
        await asyncio.Event().wait()

    def thread(message: filao.sync.Message) -> None:
        began.set()
        while True:
            pass

    worker.consumer(CLAIMS)(coroutine if kind == "coroutine" else thread)
    await broker.send_to_queue("claims", 1)
    async with running(worker) as task:
        await until(began.is_set)
        worker.stop()
        if how == "at once":
            await asyncio.sleep(0)
            worker.stop()
        async with asyncio.timeout(PATIENCE):
            await task
    message = await broker.receive_from_queue("claims", wait=0)
    assert message is not None
    assert message.attempt == 1


async def test_a_shared_broker_stays_open_and_holds_nothing(url, broker) -> None:
    worker = filao.Worker(broker, grace=0)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        await asyncio.Event().wait()

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, leased=1)
    assert (await broker.stats("claims")).ready == 1


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_it_goes_on_when_its_engine_is_back(url, broker, monkeypatch) -> None:
    worker = filao.Worker(broker)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        pass

    engine = engine_of(broker)
    execute, fails = engine._database.begin, [5]

    def begin(*, durable: bool, **rest: bool) -> object:
        if fails[0]:
            fails[0] -= 1
            raise filao.EngineUnavailable("the disk is away")
        return execute(durable=durable, **rest)

    async with running(worker):
        monkeypatch.setattr(engine._database, "begin", begin)
        await until(lambda: not fails[0])
        await broker.send_to_queue("claims", 1)
        await until_stats(broker, acked=1)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_an_ack_is_tried_again_while_the_engine_is_away(url, broker, monkeypatch) -> None:
    worker, fails = filao.Worker(broker), [3]
    engine = engine_of(broker)
    begin = engine._database.begin

    def failing(*, durable: bool, **rest: bool) -> object:
        if fails[0] and durable:
            fails[0] -= 1
            raise filao.EngineUnavailable("the disk is away")
        return begin(durable=durable, **rest)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        monkeypatch.setattr(engine._database, "begin", failing)

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until(lambda: worker.handled)
    stats = await broker.stats("claims")
    assert (stats.acked, stats.received, fails) == (1, 1, [0])


async def test_a_consumer_that_cannot_poll_is_unhealthy(url, broker, monkeypatch) -> None:
    worker = filao.Worker(broker)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        pass

    assert not worker.status().ready
    async with running(worker):
        assert worker.status().healthy
        shift_of(worker).pools[0].polled_at -= 31
        status = worker.status()
        assert (status.ready, status.healthy) == (True, False)
        assert "'claims' has not managed to poll for 31 s" in status.problems[0]


async def test_a_consumer_that_had_no_room_to_look_is_healthy(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(shift_module, "SILENT_AFTER", 0.2)
    worker, end = filao.Worker(broker), asyncio.Event()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        await end.wait()

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until(lambda: worker.status().running["claims"])
        pool = shift_of(worker).pools[0]
        pool.polled_at -= 60
        assert worker.status().healthy
        end.set()
        await until(lambda: not worker.status().running["claims"])
        assert worker.status().healthy


async def test_a_consumer_whose_queue_is_deleted_is_healthy(url, broker, caplog) -> None:
    worker = filao.Worker(broker)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None: ...

    async with running(worker):
        await broker.delete_queue("claims")
        await until(lambda: "receiving from 'claims' fails" in caplog.text)
        shift_of(worker).pools[0].polled_at -= 60
        await until(lambda: worker.status().healthy)  # its engine has answered


async def test_a_worker_that_has_ended_leaves_no_thread(url, broker) -> None:
    worker, before = filao.Worker(url), set(threading.enumerate())

    @worker.consumer(CLAIMS)
    def handle(message: filao.sync.Message) -> None: ...

    await broker.send_to_queue("claims", 1)
    await worker.drain()
    await until(lambda: set(threading.enumerate()) <= before)
