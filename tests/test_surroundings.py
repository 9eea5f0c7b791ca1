"""What stands around a worker's handlers: lifespans and middleware."""

import asyncio
import threading
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

import filao
import filao.sync
from filao.worker.worker import Worker

pytestmark = pytest.mark.anyio

QUEUE = filao.Queue("claims", max_attempts=3, backoff=filao.Backoff(first=60, jitter=0))


class Bank:
    """What a lifespan opens."""

    def __init__(self) -> None:
        self.is_open = True
        self.paid: list[Any] = []


@pytest.fixture
async def broker(tmp_path):
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(QUEUE)
        yield broker


async def test_a_lifespan_is_open_while_handlers_run_and_is_given_by_type(broker) -> None:
    worker, banks = Worker(broker), []

    @worker.lifespan
    async def bank():
        opened = Bank()
        banks.append(opened)
        yield opened
        opened.is_open = False

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message, bank: Bank) -> None:
        assert bank.is_open
        bank.paid.append(message.body)

    await broker.send_many(QUEUE, [1, 2])
    await worker.drain()
    assert [(bank.paid, bank.is_open) for bank in banks] == [([1, 2], False)]


async def test_a_plain_handler_and_one_with_a_transaction_get_it_too(broker) -> None:
    worker, other = Worker(broker), filao.Queue("other")

    @worker.lifespan
    def bank():
        yield Bank()

    @worker.consumer(QUEUE)
    def pay(message: filao.sync.Message, bank: Bank) -> None:
        bank.paid.append(message.body)

    @worker.consumer(other, guarantee="exactly-once")
    async def book(message: filao.Message, transaction: filao.Transaction, *, bank: Bank) -> None:
        bank.paid.append(message.body)

    await broker.declare(other)
    await broker.send_to_queue(QUEUE, 1)
    await broker.send_to_queue(other, 2)
    assert [handled.how for handled in await worker.drain()] == ["acked", "acked"]


async def test_what_no_lifespan_gives_is_refused_when_the_worker_starts(broker) -> None:
    worker = Worker(broker)

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message, bank: Bank) -> None: ...

    with pytest.raises(filao.ConfigurationError, match=r"pay asks for bank: Bank.*give nothing.*@worker\.lifespan"):
        await worker.drain()


async def test_what_a_lifespan_raises_ends_the_worker_and_closes_those_before_it(broker) -> None:
    worker, ended = Worker(broker), []

    @worker.lifespan
    async def first():
        yield
        ended.append("first")

    @worker.lifespan
    async def second():
        if ended == []:
            raise RuntimeError("no such bank")
        yield

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None: ...

    with pytest.raises(RuntimeError, match="no such bank"):
        await worker.run(signals=False)
    assert ended == ["first"]


async def test_a_worker_can_be_stopped_while_its_lifespan_opens(broker) -> None:
    worker, opening = Worker(broker), asyncio.Event()

    @worker.lifespan
    async def never():
        opening.set()
        await asyncio.Event().wait()
        yield

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None: ...

    running = asyncio.create_task(worker.run(signals=False))
    await opening.wait()
    worker.stop()
    async with asyncio.timeout(30):
        await running


async def test_a_worker_that_is_told_to_stop_when_its_lifespan_has_just_opened_ends(broker, caplog) -> None:
    worker, closed = filao.Worker(broker), []

    @worker.lifespan
    async def stops():
        worker.stop()
        await asyncio.sleep(0)  # so that it is heard in the very turn in which this is open
        yield
        closed.append(True)

    @worker.consumer("claims")
    async def handle(message: filao.Message) -> None: ...

    async with asyncio.timeout(30):
        await worker.run()
    assert closed
    assert "Exception in callback" not in caplog.text


async def test_middleware_is_around_each_handler_the_first_outermost(broker) -> None:
    worker, seen = Worker(broker), []

    @worker.middleware
    async def outer(message: filao.Message):
        seen.append(f"outer {message.body}")
        yield
        seen.append("outer ends")

    @worker.middleware
    @asynccontextmanager
    async def inner(message: filao.Message):
        seen.append("inner")
        yield
        seen.append("inner ends")

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None:
        seen.append("pay")

    await broker.send_to_queue(QUEUE, 7)
    await worker.drain()
    assert seen == ["outer 7", "inner", "pay", "inner ends", "outer ends"]


async def test_plain_middleware_runs_in_the_thread_of_a_plain_handler(broker) -> None:
    worker, threads = Worker(broker), []

    @worker.middleware
    def noted(message):
        assert isinstance(message, filao.sync.Message)
        threads.append(threading.get_ident())
        yield
        threads.append(threading.get_ident())

    @worker.consumer(QUEUE)
    def pay(message: filao.sync.Message) -> None:
        threads.append(threading.get_ident())

    await broker.send_to_queue(QUEUE, 7)
    await worker.drain()
    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_middleware_sees_what_a_handler_raises_and_what_it_lets_through_decides(broker) -> None:
    worker, seen = Worker(broker), []

    @worker.middleware
    async def reported(message: filao.Message):
        try:
            yield
        except ZeroDivisionError as error:
            seen.append(error)
            raise filao.Reject("cannot be paid") from error

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None:
        raise ZeroDivisionError

    await broker.send_to_queue(QUEUE, 7)
    assert [handled.how for handled in await worker.drain()] == ["dead"]
    assert [type(error) for error in seen] == [ZeroDivisionError]
    (letter,) = await broker.dead_letters(QUEUE)
    assert letter.reason == "rejected"


async def test_middleware_that_swallows_an_error_lets_the_message_be_acknowledged(broker) -> None:
    worker = Worker(broker)

    @worker.middleware
    def careless(message):
        with suppress(ValueError):
            yield

    @worker.consumer(QUEUE)
    def pay(message: filao.sync.Message) -> None:
        raise ValueError

    await broker.send_to_queue(QUEUE, 7)
    assert [handled.how for handled in await worker.drain()] == ["acked"]


@pytest.mark.parametrize("wrong", [len, 7, print])
async def test_what_is_no_generator_function_is_refused(broker, wrong) -> None:
    with pytest.raises(filao.ConfigurationError, match="generator function"):
        Worker(broker).middleware(wrong)
    with pytest.raises(filao.ConfigurationError, match="generator function"):
        Worker(broker).lifespan(wrong)
