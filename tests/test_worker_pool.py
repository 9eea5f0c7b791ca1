"""Who may start: what a worker claims, and whose turn it is."""

import asyncio

import pytest

import filao
from filao.engine import Operation, Release, Result, Settle
from filao.engines.sqlite import processes
from filao.message import delivery_of
from filao.worker.pool import Turns
from tests.conftest import engine_of
from tests.support.memory import MemoryEngine, Store
from tests.support.working import CLAIMS, broker, running, shift_of, until, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_it_claims_only_what_it_can_start_now(url, broker) -> None:
    worker, go_on, began = filao.Worker(url), asyncio.Event(), []

    @worker.consumer(CLAIMS, concurrency=3)
    async def handle(message: filao.Message) -> None:
        began.append(message.body)
        await go_on.wait()

    await broker.send_many("claims", range(10))
    async with running(worker):
        await until_stats(broker, leased=3, ready=7)
        await until(lambda: len(began) == 3)
        assert worker.status().running == {"claims": 3}
        go_on.set()
        await until_stats(broker, acked=10)
    assert began == list(range(10))


async def test_queues_that_share_a_worker_get_their_weights(url, broker) -> None:
    worker, order = filao.Worker(url, concurrency=1), []
    heavy, light = filao.Queue("heavy"), filao.Queue("light")
    await broker.declare(heavy, light)
    await broker.send_many("heavy", range(60))
    await broker.send_many("light", range(60))

    @worker.consumer(heavy, weight=3)
    async def handle_heavy(message: filao.Message) -> None:
        order.append("heavy")

    @worker.consumer(light, weight=1)
    async def handle_light(message: filao.Message) -> None:
        order.append("light")

    assert len(await worker.drain()) == 120
    assert 55 <= order[:80].count("heavy") <= 61
    async with running(worker):
        await broker.send_to_queue("light", 1)
        await until_stats(broker, "light", acked=61)
        await broker.send_to_queue("heavy", 1)
        await until_stats(broker, "heavy", acked=61)


class TakesNothingBack(MemoryEngine):
    """Fails in the moment in which a message is released."""

    def _result(self, operation: Operation) -> Result:
        if isinstance(operation, Settle) and isinstance(operation.outcome, Release):
            return filao.EngineUnavailable("the disk is away")
        return super()._result(operation)


def test_a_queue_that_was_empty_saves_up_no_turns() -> None:
    turns = Turns({"busy": 1.0, "empty": 1.0})
    for _ in range(100):
        turns.took("busy", 1)
        turns.had_nothing("empty")
    took = []
    for _ in range(4):
        took.append(turns.order()[0])
        turns.took(took[-1], 1)
    assert sorted(took) == ["busy", "busy", "empty", "empty"]


async def test_a_message_too_many_that_cannot_be_given_back_ends_no_worker() -> None:
    broker = filao.connect(lambda: TakesNothingBack(Store()))
    worker, begun, go_on = filao.Worker(broker, concurrency=1), [], asyncio.Event()

    @worker.consumer(filao.Queue("first"))
    async def handle_first(message: filao.Message) -> None:
        begun.append(message.queue)
        await go_on.wait()

    @worker.consumer(filao.Queue("second"))
    async def handle_second(message: filao.Message) -> None:
        begun.append(message.queue)

    async with broker, running(worker):
        lines = engine_of(broker).lines
        await until(lambda: len([line for line in lines.values() if line.is_quiet()]) == 2)
        await asyncio.gather(broker.send_to_queue("first", 1), broker.send_to_queue("second", 1))  # both come at once
        await until(lambda: begun)
        go_on.set()
        await broker.send_to_queue("second", 2)
        await until(lambda: begun == ["first", "second"])


async def test_a_waiting_worker_with_several_queues_loses_nothing(url, broker) -> None:
    worker, seen = filao.Worker(url, concurrency=2), []
    names = [f"queue{number}" for number in range(5)]
    await broker.declare(*map(filao.Queue, names))

    for name in names:

        async def handle(message: filao.Message) -> None:
            seen.append((message.queue, message.body))

        worker.consumer(name)(handle)
    async with running(worker):
        for number in range(20):
            await asyncio.gather(*(broker.send_to_queue(name, number) for name in names))
        await until(lambda: len(seen) == 100)
    assert sorted(seen) == sorted((name, number) for name in names for number in range(20))
    stats = await broker.stats()
    assert sum(queue.received - queue.released for queue in stats) == 100


def bury(dying: filao.Broker) -> None:
    """Take back what a broker holds, as another process does when that of the broker is dead."""
    database = engine_of(dying)._database
    with database.write(durable=True) as books:
        processes.bury(books, database.lessee.process)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_what_may_have_killed_its_process_is_handled_alone(url, broker) -> None:
    worker, held = filao.Worker(url), []
    await broker.declare(filao.Queue("other"))

    async def handle(message: filao.Message) -> None:
        await asyncio.sleep(0.01)
        if delivery_of(message).crashed:
            held.append(sum(stats.leased for stats in await broker.stats()))

    worker.consumer(CLAIMS, concurrency=4)(handle)
    worker.consumer("other", concurrency=4)(handle)
    await broker.send_many("claims", range(3))
    async with filao.connect(url) as dying:
        await dying.receive_many("claims", 3)
        await broker.send_many("claims", range(10))
        await broker.send_many("other", range(10))
        bury(dying)
    async with running(worker):
        await until_stats(broker, acked=13)
        await until_stats(broker, "other", acked=10)
    assert held == [1, 1, 1]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_what_comes_together_with_a_suspect_is_not_handled_beside_it(url, broker) -> None:
    worker, at_work, beside, is_over = filao.Worker(url), set(), [], asyncio.Event()

    @worker.consumer(CLAIMS, concurrency=4)
    async def handle(message: filao.Message) -> None:
        at_work.add(message.body)
        if message.body == "suspect":
            for _ in range(100):  # turns of the loop, in which the others would begin
                await asyncio.sleep(0)
            beside.append(at_work - {"suspect"})
            is_over.set()
        await is_over.wait()

    await broker.send_many("claims", ["suspect", 1, 2, 3])
    async with filao.connect(url) as dying:
        assert (await dying.receive_from_queue("claims")).body == "suspect"
        bury(dying)
    async with running(worker):
        stats = await until_stats(broker, acked=4)
    assert beside == [set()]
    assert stats.received - stats.released == 5


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_consumers_that_may_not_look_beside_a_suspect_are_healthy(url, broker) -> None:
    worker, began, end = filao.Worker(url), asyncio.Event(), asyncio.Event()
    await broker.declare(filao.Queue("other"))

    async def handle(message: filao.Message) -> None:
        began.set()
        await end.wait()

    worker.consumer(CLAIMS, concurrency=2)(handle)
    worker.consumer("other", concurrency=2)(handle)
    await broker.send_to_queue("claims", "suspect")
    async with filao.connect(url) as dying:
        await dying.receive_from_queue("claims")
        bury(dying)
    async with running(worker):
        await until(began.is_set)
        for pool in shift_of(worker).pools:
            pool.polled_at -= 60
        assert worker.status().healthy
        end.set()
        await until(lambda: worker.status().healthy and not any(worker.status().running.values()))


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # it looks inside
async def test_a_suspect_that_has_not_begun_is_given_back_when_its_worker_stops(url, broker, caplog) -> None:
    worker, end, seen = filao.Worker(url, grace=3600), asyncio.Event(), []

    @worker.consumer(CLAIMS, concurrency=2)
    async def handle(message: filao.Message) -> None:
        seen.append(message.body)
        await end.wait()

    await broker.send_many("claims", ["suspect", "at work"])
    async with filao.connect(url) as dying:
        await dying.receive_from_queue("claims")
        async with running(worker):
            await until(lambda: seen)
            bury(dying)
            await until(lambda: "it is handled alone" in caplog.text)
            worker.stop()
            stats = await until_stats(broker, ready=1, leased=1)
            end.set()
    assert (seen, stats.released) == (["at work"], 1)
