"""What stands around a worker's handlers: lifespans and middleware."""

import asyncio
import threading
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

import pytest

import filao
import filao.sync
from filao.worker import surroundings
from filao.worker.worker import Worker

pytestmark = pytest.mark.anyio

T = TypeVar("T")
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


@pytest.mark.parametrize("ended_by", ["its timeout", "the worker's stop"])
@pytest.mark.parametrize("of", ["a coroutine", "a thread"])
@pytest.mark.parametrize("middleware", ["asynchronous", "plain"])
async def test_middleware_that_swallows_everything_makes_no_work_done_that_was_cut_off(
    broker, middleware, of, ended_by
) -> None:
    worker, began = Worker(broker, grace=0), asyncio.Event()

    def swallow(message):
        with suppress(BaseException):
            yield

    async def swallow_on_loop(message):
        with suppress(BaseException):
            yield

    worker.middleware(swallow if middleware == "plain" else swallow_on_loop)
    loop = asyncio.get_running_loop()

    async def endless(message: filao.Message) -> None:
        began.set()
        await asyncio.Event().wait()

    def endless_in_a_thread(message: filao.sync.Message) -> None:
        loop.call_soon_threadsafe(began.set)
        while True:
            pass

    handler = endless if of == "a coroutine" else endless_in_a_thread
    worker.consumer(QUEUE, timeout=0.05 if ended_by == "its timeout" else None)(handler)
    await broker.send_to_queue(QUEUE, 7)
    running = asyncio.create_task(worker.run(until=lambda: True, signals=False))
    await began.wait()
    if ended_by == "the worker's stop":
        worker.stop()
    async with asyncio.timeout(30):
        await running
    stats = await broker.stats(QUEUE)
    failed = ended_by == "its timeout"
    assert (stats.acked, stats.delayed, stats.ready) == (0, int(failed), int(not failed))


async def test_middleware_on_the_loop_that_hangs_after_a_plain_handler_ends_with_the_timeout(broker) -> None:
    worker = Worker(broker)

    @worker.middleware
    async def hangs(message: filao.Message):
        yield
        await asyncio.Event().wait()

    @worker.consumer(QUEUE, timeout=0.05)
    def pay(message: filao.sync.Message) -> None: ...

    await broker.send_to_queue(QUEUE, 7)
    assert [handled.how for handled in await worker.drain()] == ["retried"]
    assert not worker.has_hung


@pytest.mark.parametrize("where", ["before it yields", "after it has yielded"])
async def test_a_lifespan_that_swallows_its_cancellation_is_left_behind(broker, monkeypatch, where) -> None:
    monkeypatch.setattr(surroundings, "ENDS_WITHIN", 0.05)
    monkeypatch.setattr(surroundings, "GIVEN_UP_AFTER", 0.05)
    worker, at_work, end = Worker(broker), asyncio.Event(), asyncio.Event()

    async def go_on() -> None:
        at_work.set()
        while not end.is_set():
            with suppress(asyncio.CancelledError):
                await end.wait()

    @worker.lifespan
    async def stubborn():
        if where == "before it yields":
            await go_on()
        yield
        if where == "after it has yielded":
            await go_on()

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None: ...

    running = asyncio.create_task(worker.run(signals=False, ready=worker.stop))
    await at_work.wait()
    worker.stop()
    try:
        async with asyncio.timeout(30):
            await running
        assert worker.has_hung
    finally:
        end.set()


async def test_what_fails_in_a_lifespans_task_group_stops_the_worker_and_is_raised(broker) -> None:
    worker, fail = Worker(broker), asyncio.Event()

    @worker.lifespan
    async def group():
        async def fails() -> None:
            await fail.wait()
            raise OSError("the bank is closed")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())
            yield tasks

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message, tasks: asyncio.TaskGroup) -> None: ...

    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(30):
            await worker.run(signals=False, ready=fail.set)
    assert [str(error) for error in raised.value.exceptions] == ["the bank is closed"]


async def test_handlers_see_what_a_lifespan_sets_in_its_context_and_others_do_not(broker) -> None:
    worker, seen = Worker(broker), []
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")

    @worker.lifespan
    async def of_a_tenant():
        token = tenant.set("insurer")
        yield
        tenant.reset(token)

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None:
        seen.append(tenant.get())

    await broker.send_to_queue(QUEUE, 7)
    await worker.drain()
    assert (seen, tenant.get()) == (["insurer"], "nobody")


class Pool(Generic[T]):
    """Generic, as psycopg's pool of connections is."""


class Pays(Protocol):
    def pay(self) -> None: ...


async def test_a_handler_may_ask_for_a_generic_class_but_for_none_that_cannot_be_told(broker) -> None:
    worker, seen, pool = Worker(broker), [], Pool[int]()

    @worker.lifespan
    async def open_pool():
        yield pool

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message, pool: Pool[int]) -> None:
        seen.append(pool)

    await broker.send_to_queue(QUEUE, 7)
    await worker.drain()
    assert seen == [pool]

    async def pay_by(message: filao.Message, bank: Pays) -> None: ...

    with pytest.raises(filao.ConfigurationError, match=r"pay_by asks for bank: Pays.*runtime_checkable"):
        Worker(broker).consumer(QUEUE)(pay_by)


async def test_a_worker_can_be_stopped_from_another_thread(broker) -> None:
    worker = Worker(broker)

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None:
        threading.Thread(target=worker.stop).start()

    await broker.send_to_queue(QUEUE, 7)
    asyncio.get_running_loop().set_debug(True)  # it refuses what only looks as if it worked
    async with asyncio.timeout(30):
        await worker.run(signals=False)


@pytest.mark.parametrize("wrong", [len, 7, print])
async def test_what_is_no_generator_function_is_refused(broker, wrong) -> None:
    with pytest.raises(filao.ConfigurationError, match="generator function"):
        Worker(broker).middleware(wrong)
    with pytest.raises(filao.ConfigurationError, match="generator function"):
        Worker(broker).lifespan(wrong)


async def ends_at_once(message: Any = None):
    if message == "never":
        yield


async def yields_again(*_: Any):
    with suppress(ValueError):
        yield
    yield


def plainly_ends_at_once(message: Any = None):
    if message == "never":
        yield


def plainly_yields_again(*_: Any):
    with suppress(ValueError):
        yield
    yield


YIELDS = [
    (ends_at_once, "ended without a yield"),
    (yields_again, "yielded a second time"),
    (plainly_ends_at_once, "ended without a yield"),
    (plainly_yields_again, "yielded a second time"),
]


@pytest.mark.parametrize(("wrong", "what"), YIELDS)
async def test_a_lifespan_that_does_not_yield_once_is_told_by_name(broker, wrong, what) -> None:
    worker = Worker(broker)
    worker.lifespan(wrong)

    @worker.consumer(QUEUE)
    async def pay(message: filao.Message) -> None: ...

    with pytest.raises(filao.ConfigurationError, match=f"lifespan {wrong.__name__} has {what}; it must yield exactly"):
        await worker.drain()


@pytest.mark.parametrize(("wrong", "what"), YIELDS)
@pytest.mark.parametrize("fails", [False, True])
async def test_middleware_that_does_not_yield_once_is_told_by_name_in_the_dead_letter(
    broker, wrong, what, fails
) -> None:
    worker, queue = Worker(broker), filao.Queue("once", max_attempts=1)
    worker.middleware(wrong)

    @worker.consumer(queue)
    async def pay(message: filao.Message) -> None:
        if fails:
            raise ValueError("no such claim")

    await broker.declare(queue)
    await broker.send_to_queue(queue, 1)
    await worker.drain()
    (letter,) = await broker.dead_letters(queue)
    assert f"middleware {wrong.__name__} has {what}; it must yield exactly once" in letter.error
    assert ("no such claim" in letter.error) == (fails and "yields" in wrong.__name__)
