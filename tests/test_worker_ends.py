"""Whatever ends a handler, and however: its message is settled, its worker goes on, and what it says is true."""

import asyncio
import concurrent.futures
import dataclasses
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import filao
import filao.sync
from filao.broker import session_of
from filao.worker import handling as handling_module
from tests.conftest import untraced
from tests.support.working import AGAIN, CLAIMS, PATIENCE, broker, running, shift_of, until, until_stats

pytestmark = pytest.mark.anyio
__all__ = ["broker"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot be printed")

    __repr__ = __str__


class NoText:
    def __str__(self) -> str:
        raise RuntimeError("cannot be printed")

    def __bool__(self) -> bool:
        raise RuntimeError("nor asked")

    __repr__ = __str__


class EndsPrograms(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    def __getattr__(self, name: str) -> object:
        raise KeyboardInterrupt

    __repr__ = __str__


class KeepsItsTraceback(Exception):
    def with_traceback(self, _: object) -> Any:
        raise RuntimeError("as it is")


async def cancels_itself(message: filao.Message) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def interrupts_in_a_task(message: filao.Message) -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(interrupt())


async def returns_a_coroutine(message: filao.Message) -> Any:
    return asyncio.sleep(0)


async def returns_a_future(message: filao.Message) -> Any:
    return asyncio.get_running_loop().create_future()


def returns_an_executors_future(message: filao.sync.Message) -> Any:
    return concurrent.futures.Future[None]()


def returns_an_awaitable(message: filao.sync.Message) -> Any:
    class Awaitable:
        def __await__(self) -> Any:
            yield

    return Awaitable()


def returns_a_generator(message: filao.sync.Message) -> Any:
    return (number for number in range(3))


def raising(error: Any, *, plain: bool = False) -> Callable[..., Any]:
    async def handle(message: filao.Message) -> None:
        raise error

    def handle_in_a_thread(message: filao.sync.Message) -> None:
        raise error

    return handle_in_a_thread if plain else handle


ENDS: dict[str, tuple[Callable[..., Any], str]] = {
    "a cancellation of itself": (cancels_itself, "delayed"),
    "an interrupt": (raising(KeyboardInterrupt()), "delayed"),
    "an interrupt in a thread": (raising(KeyboardInterrupt(), plain=True), "delayed"),
    "an interrupt in a task": (interrupts_in_a_task, "delayed"),
    "an interrupt in a group": (raising(BaseExceptionGroup("two", [KeyboardInterrupt(), SystemExit(3)])), "delayed"),
    "a generator's exit": (raising(GeneratorExit()), "delayed"),
    "a generator's exit in a thread": (raising(GeneratorExit(), plain=True), "delayed"),
    "a reason that is a number": (raising(filao.Reject(404)), "dead"),
    "a retry for a number": (raising(filao.Retry(404, delay=60)), "delayed"),
    "a reason that cannot be printed": (raising(filao.Reject(NoText())), "dead"),
    "an error that cannot be printed": (raising(Unprintable()), "delayed"),
    "a reason that ends programs": (raising(filao.Reject(EndsPrograms())), "delayed"),
    "an error that ends programs": (raising(EndsPrograms()), "delayed"),
    "an error that keeps its traceback": (raising(KeepsItsTraceback()), "delayed"),
    "a reason that cannot be encoded": (raising(filao.Reject("\ud800 \0 5 €")), "dead"),
    "an error that cannot be encoded": (raising(ValueError("\ud800 \0 5 €")), "delayed"),
    "a coroutine returned": (returns_a_coroutine, "delayed"),
    "a future returned": (returns_a_future, "delayed"),
    "an executor's future returned": (returns_an_executors_future, "delayed"),
    "an awaitable returned": (returns_an_awaitable, "delayed"),
    "a generator returned": (returns_a_generator, "delayed"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_a_handler_that_ends_oddly_has_failed_and_its_worker_goes_on(url, broker, caplog, end) -> None:
    handler, state = ENDS[end]
    worker = filao.Worker(url)
    worker.consumer(CLAIMS, timeout=None)(handler)
    other: list[int] = []

    @worker.consumer(filao.Queue("letters"))
    async def write(message: filao.Message) -> None:
        other.append(message.body)

    async with running(worker) as task:
        await broker.send_to_queue("claims", 1)
        await until_stats(broker, "claims", **{state: 1})
        await broker.send_to_queue("letters", 2)
        await until(lambda: other)
        assert not task.done()
        assert (await broker.stats("claims")).leased == 0
        await until(lambda: not shift_of(worker)._shared.keeper._kept)
    assert "Logging error" not in caplog.text


async def test_an_interrupt_of_a_handler_uses_its_attempts_and_then_it_is_dead(url, broker) -> None:
    worker = filao.Worker(url)
    worker.consumer(AGAIN)(raising(KeyboardInterrupt()))
    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, dead=1)
    (letter,) = await broker.dead_letters("claims")
    assert (letter.attempts, letter.reason) == (3, "max_attempts")


@untraced
@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_a_hung_exactly_once_handler_is_undone_and_holds_up_nobody(
    url, broker, monkeypatch, caplog, kind
) -> None:
    monkeypatch.setattr(handling_module, "ENDS_WITHIN", 0.1)
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE payment (claim INTEGER)")
    worker, began, end, refused = filao.Worker(url), threading.Event(), threading.Event(), []

    async def stubborn(message: filao.Message, tx: filao.Transaction) -> None:
        await tx.execute("INSERT INTO payment VALUES (1)")
        began.set()
        while not end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        try:
            await tx.execute("INSERT INTO payment VALUES (2)")
        except filao.ConfigurationError as error:
            refused.append(error)

    def deaf(message: filao.sync.Message, tx: filao.sync.Transaction) -> None:
        tx.execute("INSERT INTO payment VALUES (1)")
        began.set()
        try:
            end.wait(PATIENCE)
        finally:
            try:
                tx.execute("INSERT INTO payment VALUES (2)")
            except filao.ConfigurationError as error:
                refused.append(error)

    handler = stubborn if kind == "coroutine" else deaf
    worker.consumer(CLAIMS, guarantee="exactly-once", timeout=0.2)(handler)
    await broker.send_to_queue("claims", 1)
    try:
        async with running(worker):
            await until(began.is_set)
            await until_stats(broker, delayed=1, nacked=1)
            async with asyncio.timeout(PATIENCE):
                await broker.send_to_queue("claims", 2, delay=60)
            async with broker.transaction() as tx:
                assert await tx.execute("SELECT * FROM payment") == []
            assert "still runs; the message was settled without it (retried)" in caplog.text
            end.set()
            await until(lambda: refused)
        async with broker.transaction() as tx:
            assert await tx.execute("SELECT * FROM payment") == []
    finally:
        end.set()


@untraced
@pytest.mark.parametrize("of", ["its message", "a broker of its own"])
async def test_a_transaction_that_a_hung_plain_handler_began_itself_is_undone_and_holds_up_nobody(
    url, broker, monkeypatch, of
) -> None:
    monkeypatch.setattr(handling_module, "ENDS_WITHIN", 0.1)
    worker, began, end, refused = filao.Worker(url), threading.Event(), threading.Event(), []
    blocking = filao.sync.connect(url)
    await asyncio.to_thread(blocking.open)

    def deaf(message: filao.sync.Message) -> None:
        begin = message.transaction if of == "its message" else blocking.transaction
        try:
            with begin() as tx:
                tx.send_to_queue("claims", "never", delay=60)
                began.set()
                try:
                    end.wait(PATIENCE)
                finally:
                    try:
                        tx.send_to_queue("claims", "never", delay=60)
                    except filao.ConfigurationError as error:
                        refused.append(error)
        except filao.ConfigurationError as error:
            refused.append(error)

    worker.consumer(CLAIMS, timeout=0.2)(deaf)
    await broker.send_to_queue("claims", 1)
    try:
        async with running(worker):
            await until(began.is_set)
            async with asyncio.timeout(PATIENCE / 2):
                await broker.send_to_queue("claims", 2, delay=60)
            await until_stats(broker, delayed=2, nacked=1)
            end.set()
            await until(lambda: refused)
        await until_stats(broker, sent=2, nacked=1)
    finally:
        end.set()
        await asyncio.to_thread(blocking.close)


async def test_a_lease_that_the_handlers_own_settle_ended_is_not_told_as_lost(url, broker, caplog) -> None:
    short = dataclasses.replace(CLAIMS, lease=0.3)
    worker, after = filao.Worker(url), []

    @worker.consumer(short)
    async def handle(message: filao.Message) -> None:
        await message.ack()
        await asyncio.sleep(1.0)  # the lease would have run out three times
        after.append(message.body)

    await broker.declare(short)
    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until(lambda: after)
    assert "lost" not in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        filao.EngineError("the disk is full"),
        filao.ConfigurationError("the user may not write there"),
        filao.QueueNotFound("the queue of its dead letters is not there"),
    ],
)
async def test_what_cannot_be_settled_for_now_is_settled_later_and_not_handled_again(
    url, broker, monkeypatch, error
) -> None:
    worker, handled, fails = filao.Worker(broker), [], [4]
    settle = session_of(broker).settle

    def failing(delivery: Any, outcome: Any) -> Any:
        if fails[0]:
            fails[0] -= 1
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(error)
            return answer
        return settle(delivery, outcome)

    @worker.consumer(CLAIMS, concurrency=4)
    async def handle(message: filao.Message) -> None:
        handled.append(message.body)
        monkeypatch.setattr(session_of(broker), "settle", failing)

    await broker.send_many("claims", [1, 2, 3, 4])
    async with running(worker):
        await until_stats(broker, acked=4)
    assert sorted(handled) == [1, 2, 3, 4]
    assert (await broker.stats("claims")).received == 4


async def test_a_settle_is_not_repeated_once_its_program_has_closed_the_broker(
    url, broker, monkeypatch, caplog
) -> None:
    own = filao.connect(url)
    await own.open()
    worker, tried = filao.Worker(own, grace=PATIENCE), asyncio.Event()
    settle = session_of(own).settle

    def failing(delivery: Any, outcome: Any) -> Any:
        if not session_of(own).is_open:
            return settle(delivery, outcome)
        tried.set()
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(filao.EngineUnavailable("the server is away"))
        return answer

    monkeypatch.setattr(session_of(own), "settle", failing)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None: ...

    await broker.send_to_queue("claims", 1)
    run = asyncio.ensure_future(worker.run(signals=False))
    async with asyncio.timeout(PATIENCE):
        await tried.wait()
        await own.close()
        with pytest.raises(filao.ConfigurationError, match="this broker is closed"):
            await run
    assert "its program closed the broker while it was handled" in caplog.text


async def test_decisions_are_told_in_one_line_and_failures_with_the_handlers_traceback(url, broker, caplog) -> None:
    caplog.set_level(logging.DEBUG, "filao.worker")
    steers = {"retry": filao.Retry("the service rests", delay=60), "reject": filao.Reject("no such policy")}
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        if message.body == "fails":
            raise ValueError("a real failure")
        if message.body in steers:
            raise steers[message.body]

    await broker.send_many("claims", ["fine", "fails", *steers])
    await worker.drain()
    told = [record for record in caplog.records if record.name == "filao.worker" and "message" in record.message]
    lines = [f"{record.levelname} {record.message.partition(': ')[2]}" for record in told if not record.exc_info]
    assert "DEBUG acked" in lines
    assert "INFO again in 60 s, attempt 2 of 3: the service rests" in lines
    assert "INFO a dead letter: no such policy" in lines
    (failure,) = [record for record in told if record.exc_info]
    assert failure.levelname == "WARNING"
    assert failure.exc_info is not None
    trace = failure.exc_info[2]
    assert trace is not None
    assert trace.tb_frame.f_code.co_name == "handle"


async def test_a_filter_of_the_log_that_fails_keeps_no_message(url, broker, capsys) -> None:
    worker, log = filao.Worker(url), logging.getLogger("filao.worker")

    @worker.consumer(CLAIMS, timeout=None)
    async def handle(message: filao.Message) -> None:
        if message.body == "fails":
            raise ValueError("a real failure")
        raise filao.Reject("no such policy")

    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("the filter fails")

    await broker.send_many("claims", ["fails", "rejected"])
    log.addFilter(fail)
    try:
        async with running(worker):
            await until_stats(broker, delayed=1, dead=1)
    finally:
        log.removeFilter(fail)
    assert "the filter fails" in capsys.readouterr().err


async def test_an_error_of_until_is_the_error_of_the_run(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        pass

    def until_what() -> bool:
        raise ValueError("what?")

    await broker.send_to_queue("claims", 1)
    with pytest.raises(ValueError, match=r"^what\?$"):
        async with asyncio.timeout(PATIENCE):
            await worker.run(until=until_what)
    assert (await broker.stats("claims")).acked == 1


async def test_an_until_that_has_no_more_to_say_ends_its_run(url, broker) -> None:
    worker, answers = filao.Worker(url), iter([False])

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        pass

    await broker.send_many("claims", [1, 2])
    with pytest.raises(RuntimeError, match="StopIteration"):
        async with asyncio.timeout(PATIENCE):
            await worker.run(until=lambda: next(answers))
    assert (await broker.stats("claims")).acked == 2


async def test_a_worker_that_is_cancelled_gives_back_what_it_holds(url, broker) -> None:
    worker, began = filao.Worker(url, grace=0), asyncio.Event()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        began.set()
        await asyncio.Event().wait()

    await broker.send_to_queue("claims", 1)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(PATIENCE):
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    stats = await broker.stats("claims")
    assert (stats.ready, stats.leased, stats.released) == (1, 0, 1)


async def test_a_worker_that_is_cancelled_again_while_its_receives_end_gives_back_what_it_holds(url, broker) -> None:
    worker, began, ended = filao.Worker(url), asyncio.Event(), asyncio.Event()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await broker.send_to_queue("claims", 1)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(PATIENCE):
        await began.wait()
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended.is_set()
    stats = await broker.stats("claims")
    assert (stats.ready, stats.leased, stats.released) == (1, 0, 1)


async def test_a_worker_that_is_cancelled_again_while_its_handlers_may_finish_ends_them(url, broker, caplog) -> None:
    caplog.set_level(logging.INFO, "filao.worker")
    worker, began, ended = filao.Worker(broker, grace=3600), asyncio.Event(), asyncio.Event()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await broker.send_to_queue("claims", 1)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(PATIENCE):
        await began.wait()
        task.cancel()
        await until(lambda: "1 message may finish" in caplog.text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended.wait()


async def test_a_loop_that_runs_tasks_eagerly_loses_no_place(url, broker) -> None:
    eager = getattr(asyncio, "eager_task_factory", None)
    if eager is None:
        pytest.skip("this Python has no eager tasks")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        pass

    loop = asyncio.get_running_loop()
    loop.set_task_factory(eager)
    try:
        await broker.send_many("claims", range(20))
        async with running(worker):
            await until_stats(broker, acked=20)
    finally:
        loop.set_task_factory(None)


def has_ended(child: int, ended: list[tuple[int, int]]) -> bool:
    """Return whether a child of ours has ended, and note how."""
    ended.append(os.waitpid(child, os.WNOHANG))
    return ended[-1][0] != 0


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
@pytest.mark.parametrize(("end", "code"), [("return", 0), ("raise", 1), ("exit", 3)])
async def test_a_child_that_a_handler_forks_ends_with_it(url, broker, end, code, kind) -> None:
    children: list[int] = []
    worker = filao.Worker(url)

    def thread(message: filao.sync.Message) -> None:
        fork()

    async def coroutine(message: filao.Message) -> None:
        fork()

    def fork() -> None:
        if child := os.fork():
            children.append(child)
        elif end == "raise":
            raise ValueError(end)
        elif end == "exit":
            sys.exit(code)

    worker.consumer("claims")(coroutine if kind == "coroutine" else thread)
    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, acked=1)
    ended: list[tuple[int, int]] = []
    try:
        await until(lambda: has_ended(children[0], ended))
    finally:
        if not ended[-1][0]:
            os.kill(children[0], signal.SIGKILL)
            os.waitpid(children[0], 0)  # noqa: ASYNC222  # it was killed
    assert os.waitstatus_to_exitcode(ended[-1][1]) == code
