"""The worker, in this process: outcomes, clocks, capacity, stopping, and what a wrong use of it says."""

import asyncio
import dataclasses
import functools
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

import filao
import filao.sync
from filao.engines.sqlite import processes
from filao.message import delivery_of
from filao.worker import handling as handling_module
from filao.worker import shift as shift_module
from filao.worker.shift import Shift
from filao.worker.worker import Worker
from tests.conftest import engine_of

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
CLAIMS = filao.Queue("claims", max_attempts=3, backoff=filao.Backoff(first=60, jitter=0))
AGAIN = dataclasses.replace(CLAIMS, backoff=filao.Backoff(first=0.01, jitter=0))


@dataclasses.dataclass
class Claim:
    number: int
    amount: float = 0.0


@pytest.fixture
async def broker(url) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        yield broker


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # what happens in other threads sets no events
            await asyncio.sleep(0.005)


async def until_stats(broker: filao.Broker, queue: str = "claims", **wanted: int) -> filao.QueueStats:
    async with asyncio.timeout(PATIENCE):
        while True:
            stats = await broker.stats(queue)
            if all(getattr(stats, name) == count for name, count in wanted.items()):
                return stats
            await asyncio.sleep(0.005)


def shift_of(worker: Worker) -> Shift:
    """Look inside: return what a worker is doing."""
    shift = getattr(worker._status, "__self__", None)
    assert isinstance(shift, Shift)
    return shift


@asynccontextmanager
async def running(worker: Worker) -> AsyncGenerator["asyncio.Task[None]"]:
    ready = asyncio.Event()
    task = asyncio.create_task(worker.run(ready=ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        yield task
    finally:
        worker.stop()
        async with asyncio.timeout(PATIENCE):
            await task


# --- outcomes --------------------------------------------------------------------------------------------------------


async def test_returning_acknowledges(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message[Claim]) -> None:
        seen.append(message.body)

    await broker.send_to_queue("claims", {"number": 7})
    (handled,) = await worker.drain()
    assert seen == [Claim(7)]
    assert (handled.queue, handled.how, handled.attempt, handled.error) == ("claims", "acked", 1, "")
    assert (await broker.stats("claims")).acked == 1


async def test_raising_tries_again_and_then_it_is_a_dead_letter_with_the_traceback(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(AGAIN)
    async def handle(message: filao.Message) -> None:
        raise ValueError("no such policy")

    await broker.send_to_queue("claims", 1)
    async with running(worker):
        await until_stats(broker, dead=1)
    (dead,) = await broker.dead_letters("claims")
    assert (dead.reason, dead.attempts) == ("max_attempts", 3)
    assert "ValueError: no such policy" in dead.error
    assert "in handle" in dead.error


STEERS = [
    (filao.Retry("later", delay=60), "retried", "delayed"),
    (filao.Retry, "retried", "delayed"),
    (filao.Reject("never"), "dead", "dead"),
    (filao.Reject, "dead", "dead"),
]


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
@pytest.mark.parametrize(("steer", "how", "state"), STEERS)
async def test_a_handler_steers(url, broker, steer, how, state, raised) -> None:  # noqa: PLR0917  # pytest names them
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        if raised:
            raise steer
        return steer

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert handled.how == how
    assert getattr(await broker.stats("claims"), state) == 1


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
async def test_release_gives_it_back_without_using_an_attempt(url, broker, raised) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        if raised:
            raise filao.Release
        return filao.Release()

    await broker.send_to_queue("claims", 1)
    handled = await worker.drain(limit=9)
    assert [one.how for one in handled] == ["released"] * 9
    assert [one.attempt for one in handled] == [1] * 9


async def test_a_message_is_put_off_with_no_attempt_used(url, broker, caplog) -> None:
    caplog.set_level("INFO", "filao.worker")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> filao.Release | None:
        return None if message.body == "done" else filao.Release(delay=3600)

    await broker.send_many("claims", ["later", "done"])
    assert [one.how for one in await worker.drain()] == ["released", "acked"]
    (waiting,) = await broker.peek("claims", state="delayed")
    assert (waiting.body, waiting.attempts, waiting.history) == ("later", 0, ())
    assert "again in 3600 s, the attempt not counted" in caplog.text
    with pytest.raises(filao.ConfigurationError, match="delay is -1"):
        filao.Release(delay=-1)


async def test_exceptions_are_mapped_to_outcomes_the_most_specific_first(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(
        CLAIMS, outcomes={LookupError: filao.Reject, OSError: filao.Retry(delay=60), KeyError: filao.Retry(delay=50)}
    )
    async def handle(message: filao.Message) -> None:
        raise {"key": KeyError("a"), "index": IndexError("b"), "os": ConnectionError("c")}[message.body]

    await broker.send_many("claims", ["key", "index", "os"])
    assert [handled.how for handled in await worker.drain()] == ["retried", "dead", "retried"]
    (dead,) = await broker.dead_letters("claims")
    assert "IndexError: b" in dead.error


async def test_a_retry_with_a_negative_delay_is_the_handlers_error(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> object:
        return filao.Retry(delay=-1)

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, "delay is -1" in handled.error) == ("retried", True)


async def test_a_handler_may_settle_by_itself(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        await message.reject("by hand")

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["settled"]
    assert (await broker.stats("claims")).dead == 1


async def test_a_body_that_does_not_fit_the_handlers_type_is_a_dead_letter(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer("claims")
    async def handle(message: filao.Message[Claim]) -> None:
        seen.append(message.body.number)

    await broker.send_to_queue("claims", {"number": "seven"})
    await broker.send_to_queue("claims", {"number": 8})
    await worker.drain()
    (dead,) = await broker.dead_letters("claims")
    assert (seen, dead.reason, dead.attempts) == ([8], "malformed", 1)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()], ids=repr)
async def test_a_handler_that_would_end_the_process_fails_like_any_other(url, broker, error) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, concurrency=2)
    async def handle(message: filao.Message) -> None:
        if message.body == 1:
            raise error

    await broker.send_many("claims", [1, 2])
    assert sorted(handled.how for handled in await worker.drain()) == ["acked", "retried"]


async def test_a_task_that_a_handler_leaves_behind_is_reported_once(url, broker, caplog) -> None:
    worker, leaked = filao.Worker(url), []

    async def forgotten() -> None:
        await asyncio.Event().wait()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        leaked.append(asyncio.create_task(forgotten()))

    await broker.send_many("claims", [1, 2])
    assert [handled.how for handled in await worker.drain()] == ["acked", "acked"]
    reports = [record for record in caplog.records if "left a task running" in record.message]
    assert len(reports) == 1
    assert "forgotten" in reports[0].message
    for task in leaked:
        task.cancel()


# --- plain functions -------------------------------------------------------------------------------------------------


async def test_a_plain_function_runs_in_a_thread_with_the_blocking_message(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    @worker.consumer(CLAIMS)
    def handle(message: filao.sync.Message[Claim]) -> None:
        message.extend(60)
        seen.append((message.body, threading.current_thread() is threading.main_thread()))

    await broker.send_to_queue("claims", {"number": 7})
    assert [handled.how for handled in await worker.drain()] == ["acked"]
    assert seen == [(Claim(7), False)]


async def test_a_plain_wrapper_of_a_coroutine_function_fails_instead_of_doing_nothing(url, broker) -> None:
    worker, ran = filao.Worker(url), []

    async def real(message: filao.Message) -> None:
        ran.append(message.body)

    worker.consumer(CLAIMS)(lambda message: real(message))  # noqa: PLW0108  # the mistake
    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, ran) == ("retried", [])
    assert "returned a coroutine that nobody runs" in handled.error


async def test_partial_functions_and_objects_that_can_be_called_are_handlers(url, broker) -> None:
    worker, seen = filao.Worker(url), []

    async def handle(kept: list[Any], message: filao.Message[Claim]) -> None:
        kept.append(message.body)

    class Handler:
        async def __call__(self, message: filao.Message[Claim]) -> None:
            seen.append(message.body)

    worker.consumer(CLAIMS)(functools.partial(handle, seen))
    worker.consumer(filao.Queue("letters"))(Handler())
    for queue in ("claims", "letters"):
        await broker.declare(filao.Queue(queue))
        await broker.send_to_queue(queue, {"number": 7})
    await worker.drain()
    assert seen == [Claim(7), Claim(7)]


async def test_plain_functions_run_at_the_same_time(url, broker) -> None:
    worker, meeting = filao.Worker(url), threading.Barrier(3, timeout=PATIENCE)

    @worker.consumer(CLAIMS, concurrency=3)
    def handle(message: filao.sync.Message) -> None:
        meeting.wait()

    await broker.send_many("claims", range(6))
    assert [handled.how for handled in await worker.drain()] == ["acked"] * 6


async def test_a_plain_function_that_raises_stop_iteration_fails(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    def handle(message: filao.sync.Message) -> None:
        raise StopIteration

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["retried"]


# --- the two clocks --------------------------------------------------------------------------------------------------

SHORT = dataclasses.replace(CLAIMS, lease=0.3)


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

    @worker.consumer(SHORT, concurrency=4)
    async def handle(message: filao.Message) -> None:
        if message.body == 0:
            time.sleep(1.0)  # noqa: ASYNC251  # what must not be done, and is

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

    worker.consumer(CLAIMS, timeout=0.05)(stubborn if kind == "coroutine" else deaf)
    await broker.send_many("claims", ["hangs", "first", "second"])
    try:
        async with running(worker):
            await until_stats(broker, delayed=1, acked=2)
            assert seen == ["hangs", "first", "second"]
            assert worker.status().running == {"claims": 0}
            end.set()
    finally:
        end.set()


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


# --- capacity --------------------------------------------------------------------------------------------------------


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
        database = engine_of(dying)._database
        await broker.send_many("claims", range(10))
        await broker.send_many("other", range(10))
        with database.write(durable=True) as books:  # as another process does when this one is dead
            processes.bury(books, database.lessee.process)
    async with running(worker):
        await until_stats(broker, acked=13)
        await until_stats(broker, "other", acked=10)
    assert held == [1, 1, 1]


# --- guarantees ------------------------------------------------------------------------------------------------------


async def test_at_most_once_is_gone_before_the_handler_runs(url, broker) -> None:
    worker, during = filao.Worker(url), []

    @worker.consumer(CLAIMS, guarantee="at-most-once")
    async def handle(message: filao.Message) -> None:
        during.append((await broker.stats("claims")).acked)
        raise ValueError

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["failed"]
    stats = await broker.stats("claims")
    assert (during, stats.acked, stats.dead, stats.delayed) == ([1], 1, 0, 0)


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_exactly_once_commits_the_work_the_sends_and_the_ack_together(url, broker, kind) -> None:
    await broker.declare(filao.Queue("letters"))
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE payment (claim INTEGER PRIMARY KEY)")
    worker = filao.Worker(url)

    async def coroutine(message: filao.Message, tx: filao.Transaction) -> None:
        await tx.execute("INSERT INTO payment VALUES (?)", (message.body,))
        await tx.send_to_queue("letters", message.body)
        if message.body == 2 and message.attempt == 1:
            raise ValueError("after the work")

    def thread(message: filao.sync.Message, tx: filao.sync.Transaction) -> None:
        tx.execute("INSERT INTO payment VALUES (?)", (message.body,))
        tx.send_to_queue("letters", message.body)
        if message.body == 2 and message.attempt == 1:
            raise ValueError("after the work")

    worker.consumer(AGAIN, guarantee="exactly-once", concurrency=2)(coroutine if kind == "coroutine" else thread)
    await broker.send_many("claims", [1, 2, 3])
    async with running(worker):
        await until_stats(broker, acked=3)
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT claim FROM payment ORDER BY claim") == [(1,), (2,), (3,)]
    assert (await broker.stats("letters")).sent == 3


async def test_stopping_loses_nothing_that_is_received_at_most_once(url, broker) -> None:
    ran: list[int] = []
    await broker.send_many("claims", range(300))
    while (await broker.stats("claims")).ready:
        worker = filao.Worker(url)

        @worker.consumer(CLAIMS, guarantee="at-most-once", concurrency=4)
        async def handle(message: filao.Message) -> None:
            ran.append(message.body)

        before = len(ran)
        async with running(worker):
            await until(lambda: len(ran) > before)  # noqa: B023  # and stop in whatever moment it is
    assert sorted(ran) == list(range(300))


async def test_exactly_once_acknowledges_also_what_needed_no_statement(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> None:
        pass

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["acked"]


async def test_exactly_once_undoes_the_work_of_a_handler_that_steers_away(url, broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE payment (claim INTEGER)")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> object:
        await tx.execute("INSERT INTO payment VALUES (1)")
        return filao.Reject("on second thoughts")

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["dead"]
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT * FROM payment") == []


async def test_exactly_once_makes_nobody_wait_before_its_first_statement(url, broker) -> None:
    worker, began, go_on = filao.Worker(url), asyncio.Event(), asyncio.Event()

    @worker.consumer(CLAIMS, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> None:
        began.set()
        await go_on.wait()

    await broker.send_to_queue("claims", 1)
    async with running(worker), asyncio.timeout(PATIENCE):
        await began.wait()
        await broker.send_to_queue("claims", 2)
        go_on.set()
        await until_stats(broker, acked=2)


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_exactly_once_extends_its_message_before_its_first_statement(url, broker, kind) -> None:
    worker = filao.Worker(url)

    async def coroutine(message: filao.Message, tx: filao.Transaction) -> None:
        await message.extend(60)
        await tx.execute("SELECT 1")

    def thread(message: filao.sync.Message, tx: filao.sync.Transaction) -> None:
        message.extend(60)
        tx.execute("SELECT 1")

    worker.consumer(CLAIMS, guarantee="exactly-once")(coroutine if kind == "coroutine" else thread)
    await broker.send_to_queue("claims", 1)
    async with running(worker), asyncio.timeout(PATIENCE):
        await until_stats(broker, acked=1)


async def test_exactly_once_undoes_the_work_when_the_lease_was_lost(url, broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE payment (claim INTEGER)")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> None:
        await broker.purge("claims", state="leased")
        await tx.execute("INSERT INTO payment VALUES (1)")

    await broker.send_to_queue("claims", 1)
    assert [handled.how for handled in await worker.drain()] == ["lost"]
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT * FROM payment") == []


# --- stopping --------------------------------------------------------------------------------------------------------


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


# --- outages ---------------------------------------------------------------------------------------------------------


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


# --- wrong use -------------------------------------------------------------------------------------------------------


def refused(register: Callable[[Worker], Any]) -> str:
    with pytest.raises(filao.ConfigurationError) as refusal:
        register(filao.Worker("claims.db"))
    return str(refusal.value)


async def of_two(message: filao.Message, other) -> None: ...  # nothing says what a lifespan should give
async def of_none() -> None: ...
async def of_an_int(message: int) -> None: ...
async def of_sync(message: filao.sync.Message) -> None: ...
def of_async(message: filao.Message) -> None: ...
async def generator(message: filao.Message) -> Any:
    yield message


async def of_claims(message: filao.Message[Claim]) -> None: ...
async def plain(message: filao.Message) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (of_two, "the handler of_two cannot be called as async def of_two(message)"),
        (of_none, "the handler of_none cannot be called as async def of_none(message)"),
        (of_an_int, "asks for <class 'int'>; it gets a message"),
        (of_sync, "is a coroutine function, which gets a filao.Message"),
        (of_async, "is a plain function, which gets a filao.sync.Message"),
        (generator, "is a generator"),
        (7, "a handler must be a function, not 7"),
    ],
)
def test_a_wrong_handler_is_refused_when_it_is_registered(function, text) -> None:
    assert text in refused(lambda worker: worker.consumer("claims")(function))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": 2.5}, "concurrency is 2.5"),
        ({"timeout": -1}, "timeout is -1"),
        ({"guarantee": "once"}, "guarantee is 'once'"),
        ({"weight": 0}, "weight is 0"),
        ({"outcomes": {ValueError: 7}}, "maps <class 'ValueError'> to 7"),
        ({"outcomes": {"ValueError": filao.Retry}}, "maps 'ValueError' to"),
    ],
)
def test_a_wrong_option_is_refused_when_it_is_given(options, text) -> None:
    assert text in refused(lambda worker: worker.consumer("claims", **options)(plain))


def test_annotations_that_only_a_type_checker_can_read_refuse_no_handler_but_for_the_messages() -> None:
    async def handle(message: filao.Message[Claim], other: "Unknown" = 1) -> "Unknown": ...  # type: ignore[name-defined]  # noqa: F821

    async def wrong(message: "filao.Message[Unknown]") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    filao.Worker("claims.db").consumer("claims")(handle)
    with pytest.raises(filao.ConfigurationError, match=r"annotation that cannot be read, message: filao.Message\[Unk"):
        filao.Worker("claims.db").consumer("claims")(wrong)


def test_two_consumers_of_one_queue_are_refused() -> None:
    worker = filao.Worker("claims.db")
    worker.consumer("claims")(plain)
    with pytest.raises(filao.ConfigurationError, match="queue 'claims' has a consumer in this worker already, plain"):
        worker.consumer("claims")


def test_two_consumers_that_were_prepared_before_either_was_given_are_refused_too() -> None:
    worker = filao.Worker("claims.db")
    first, second = worker.consumer("claims"), worker.consumer("claims")

    async def handle(message: filao.Message) -> None:
        pass

    first(handle)
    with pytest.raises(filao.ConfigurationError, match="has a consumer in this worker already"):
        second(handle)


def test_a_handler_of_another_type_than_its_queue_is_refused() -> None:
    assert "queue 'claims' has <class 'int'>" in refused(
        lambda worker: worker.consumer(filao.Queue("claims", body=int))(of_claims)  # type: ignore[arg-type]  # which type checkers see, too
    )


def test_an_exactly_once_handler_must_take_the_transaction() -> None:
    text = refused(lambda worker: worker.consumer("claims", guarantee="exactly-once")(plain))
    assert "async def plain(message, transaction)" in text


async def test_an_unknown_queue_is_said_at_the_start_with_its_neighbours(url, broker) -> None:
    worker = filao.Worker(url)
    worker.consumer("claimz")(plain)
    with pytest.raises(filao.QueueNotFound, match="'claimz' is not declared"):
        await worker.run()


async def test_a_worker_without_consumers_is_refused(url) -> None:
    with pytest.raises(filao.ConfigurationError, match="has no consumers"):
        await filao.Worker(url).run()


async def test_a_worker_runs_once_at_a_time(url, broker) -> None:
    worker = filao.Worker(url)
    worker.consumer(CLAIMS)(plain)
    async with running(worker):
        with pytest.raises(filao.ConfigurationError, match="runs already"):
            await worker.drain()
    assert await worker.drain() == []


async def test_what_fails_is_logged_with_its_message_and_queue(url, broker, caplog) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        raise ValueError("why")

    receipt = await broker.send_to_queue("claims", 1)
    with caplog.at_level(logging.WARNING):
        await worker.drain()
    assert f"message {receipt.id} of 'claims', attempt 1 failed: ValueError: why" in caplog.text
