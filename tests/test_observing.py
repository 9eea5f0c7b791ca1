"""The one seam for what watches: what it is told, what it costs when it is off, and that it fails nobody."""

import asyncio
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import filao
import filao.sync
from filao.engine import Delivery
from filao.prometheus.worker import WorkerMetrics

pytestmark = pytest.mark.anyio


class Notebook:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.operations: list[filao.Operated] = []
        self.runs: list[tuple[str, str]] = []

    def operated(self, done: filao.Operated) -> None:
        self.operations.append(done)

    def began(self, delivery: Delivery) -> None:
        self.runs.append((delivery.id, "began"))

    def ended(self, delivery: Delivery, how: str, seconds: float) -> None:
        assert seconds >= 0
        self.runs.append((delivery.id, how))

    def told(self) -> list[tuple[str, int, str]]:
        return [(done.verb, done.messages, done.error) for done in self.operations]


class Failing(Notebook):
    def operated(self, done: filao.Operated) -> None:
        raise RuntimeError(f"no ink for {done}")


async def test_an_observer_is_told_of_each_kind_of_operation(url) -> None:
    notebook = Notebook()
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", max_length=2))
        broker.observers.add(notebook)
        await broker.send_many("claims", [1, 2])
        with pytest.raises(filao.QueueFull):
            await broker.send_to_queue("claims", 3)
        message = await broker.receive_from_queue("claims")
        await message.extend(30)
        await message.ack()
        await (await broker.receive_from_queue("claims")).ack()
        assert await broker.receive_from_queue("claims", wait=0) is None  # which is not told
        broker.observers.remove(notebook)
        await broker.send_to_queue("claims", 4)
    assert notebook.told() == [
        *[("send", 2, ""), ("send", 0, "QueueFull"), ("receive", 1, ""), ("extend", 1, ""), ("settle", 1, "")],
        *[("receive", 1, ""), ("settle", 1, "")],
    ]
    assert all(done.queue == "claims" and done.seconds > 0 for done in notebook.operations)


async def test_calls_that_share_a_commit_are_told_as_one(tmp_path) -> None:
    notebook = Notebook()
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(notebook)
        await asyncio.gather(*(broker.send_to_queue("claims", number) for number in range(5)))
    assert [(done.operations, done.messages) for done in notebook.operations] == [(5, 5)]


async def test_what_one_batch_does_to_several_queues_is_told_apart(tmp_path) -> None:
    notebook = Notebook()
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"), filao.Queue("letters"), filao.Queue("full", max_length=1))
        await broker.send_to_queue("full", 0)
        broker.observers.add(notebook)
        sends = [broker.send_many("claims", [1, 2]), broker.send_many("letters", [3]), broker.send_to_queue("full", 4)]
        await asyncio.gather(*sends, return_exceptions=True)
        receives = [broker.receive_many(name, 9) for name in ("claims", "letters")]
        held = [message for messages in await asyncio.gather(*receives) for message in messages]
        await asyncio.gather(*(message.ack() for message in held))
    told = {(done.verb, done.queue, done.operations, done.messages, done.error) for done in notebook.operations}
    assert told == {
        *(("send", "claims", 1, 2, ""), ("send", "letters", 1, 1, ""), ("send", "full", 1, 0, "QueueFull")),
        *(("receive", "claims", 1, 2, ""), ("receive", "letters", 1, 1, "")),
        *(("settle", "claims", 2, 2, ""), ("settle", "letters", 1, 1, "")),
    }


async def test_an_observer_that_fails_is_complained_of_once_and_fails_no_message(tmp_path, caplog) -> None:
    caplog.set_level(logging.ERROR, "filao.observing")
    notebook = Notebook()
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(Failing())
        broker.observers.add(notebook)
        for number in range(3):
            await broker.send_to_queue("claims", number)
    assert len(notebook.operations) == 3
    assert len([record for record in caplog.records if "no ink" in str(record.exc_info)]) == 1


class Stumbling:
    """A tracer that fails wherever it is asked; `late`: only when it is told how an operation ended."""

    def __init__(self, *, late: bool = False) -> None:
        self._late = late

    def asked(self, _: str, operation: Any) -> Any:
        return (operation, self.fail) if self._late else self.fail()

    def fail(self, *_: object) -> Any:
        raise RuntimeError("no ink")

    received = handling = handled = fail


@pytest.mark.parametrize("late", [False, True])
async def test_a_tracer_that_fails_is_complained_of_once_and_fails_no_message(url, caplog, late) -> None:
    worker = filao.Worker(url)
    worker.observers.append(Stumbling(late=late))

    @worker.consumer(filao.Queue("claims"))
    async def handle(message: filao.Message[int]) -> None: ...

    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(worker.observers[0])
        await broker.send_many("claims", range(3))
        message = await broker.receive_from_queue("claims")
        async with message.transaction() as transaction:
            await transaction.send_to_queue("claims", 3)
        assert [handled.how for handled in await worker.drain(broker)] == ["acked"] * 3
    assert len([record for record in caplog.records if record.name == "filao.observing"]) == 1


class Leaving:
    """An observer that raises what is no `Exception`, wherever it is told."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def operated(self, *_: object) -> None:
        raise self._error

    began = ended = operated


@pytest.mark.parametrize("error", [SystemExit("no ink"), asyncio.CancelledError("no ink"), GeneratorExit("no ink")])
async def test_an_observer_that_would_end_the_program_fails_no_message_either(tmp_path, caplog, error) -> None:
    worker = filao.Worker(tmp_path / "claims.db")
    worker.observers.append(Leaving(error))

    @worker.consumer(filao.Queue("claims"))
    async def handle(message: filao.Message[int]) -> None: ...

    async with filao.connect(tmp_path / "claims.db") as broker, asyncio.timeout(60):
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(worker.observers[0])
        await asyncio.gather(*(broker.send_to_queue("claims", number) for number in range(3)))
        assert [handled.how for handled in await worker.drain(broker)] == ["acked"] * 3
        assert (await broker.stats("claims")).leased == 0
    assert len([record for record in caplog.records if record.name == "filao.observing"]) == 1


async def test_an_observer_is_told_how_each_run_began_and_ended(tmp_path) -> None:
    notebook = Notebook()
    worker = filao.Worker(tmp_path / "claims.db")
    worker.observers.append(notebook)

    @worker.consumer(filao.Queue("claims", max_attempts=1))
    async def handle(message: filao.Message[str]) -> None:
        if message.body == "bad":
            raise ValueError(message.body)

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        good, bad = [(await broker.send_to_queue("claims", body)).id for body in ("good", "bad")]
        await worker.drain(broker)
        assert not broker.observers
    assert notebook.runs == [(good, "began"), (good, "acked"), (bad, "began"), (bad, "dead")]


def test_the_blocking_twin_tells_too(tmp_path) -> None:
    notebook = Notebook()
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.observers.add(notebook)
        broker.send_to_queue("claims", 1)
    assert notebook.told() == [("send", 1, "")]


async def test_a_worker_measures_its_handlers(tmp_path) -> None:
    measures = WorkerMetrics()
    worker = filao.Worker(tmp_path / "claims.db")
    worker.observers.append(measures)

    @worker.consumer(filao.Queue("claims"))
    async def handle(message: filao.Message[int]) -> None:
        assert 'filao_worker_busy_slots{queue="claims"} 1.0' in measures.text().decode()

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(3))
        assert [handled.how for handled in await worker.drain(broker)] == ["acked"] * 3
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(measures.text().decode())
        for sample in family.samples
    }
    assert found["filao_handler_seconds_count", "acked", "claims"] == 3
    assert found["filao_message_wait_seconds_count", "claims"] == 3
    assert found["filao_worker_busy_slots", "claims"] == 0
    assert found["filao_operation_messages_total", "settle"] == 3
