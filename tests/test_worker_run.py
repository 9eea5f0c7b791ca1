"""One attempt at one message, by each of the three guarantees."""

import asyncio

import pytest

import filao
import filao.sync
from filao.broker import session_of
from filao.engine import Delivery, Outcome, Result
from filao.worker import outage
from tests.support.working import AGAIN, CLAIMS, PATIENCE, broker, running, until, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


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


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (filao.EngineError("the disk is full"), (["released", "acked"], [1])),
        (filao.LeaseLost("another consumer holds it"), (["lost"], [])),
    ],
)
async def test_what_cannot_be_deleted_before_its_handler_is_not_handled(
    url, broker, monkeypatch, error, wanted
) -> None:
    worker, seen, fails = filao.Worker(broker), [], [error]
    settle = session_of(broker).settle

    def failing(delivery: Delivery, outcome: Outcome) -> "asyncio.Future[Result]":
        if not fails:
            return settle(delivery, outcome)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        answer.set_exception(fails.pop())
        return answer

    monkeypatch.setattr(session_of(broker), "settle", failing)

    @worker.consumer(CLAIMS, guarantee="at-most-once")
    async def handle(message: filao.Message) -> None:
        seen.append(message.attempt)

    await broker.send_to_queue("claims", 1)
    assert ([handled.how for handled in await worker.drain()], seen) == wanted


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


async def test_a_settle_that_fails_because_the_disk_is_full_is_tried_again(url, broker, monkeypatch) -> None:
    session, worker = session_of(broker), filao.Worker(url)
    settle, failures = session.settle, [filao.EngineError("the disk is full") for _ in range(2)]

    def fail_twice(delivery: Delivery, outcome: Outcome) -> asyncio.Future[Result]:
        if not failures:
            return settle(delivery, outcome)
        failed: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        failed.set_exception(failures.pop())
        return failed

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None: ...

    await broker.send_to_queue("claims", 1)
    monkeypatch.setattr(session, "settle", fail_twice)
    monkeypatch.setattr(outage, "RETRY_FIRST", 0.001)
    assert [handled.how for handled in await worker.drain(broker)] == ["acked"]
    assert (await broker.stats("claims")).acked == 1


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


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)  # SQLite checks at the commit only what it was asked to
async def test_exactly_once_has_failed_when_its_work_cannot_be_committed(url, broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE payment (claim INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS, guarantee="exactly-once")
    async def handle(message: filao.Message, tx: filao.Transaction) -> None:
        await tx.execute("INSERT INTO payment VALUES (1), (1)")

    await broker.send_to_queue("claims", 1)
    (handled,) = await worker.drain()
    assert (handled.how, "payment" in handled.error) == ("retried", True)
    stats = await broker.stats("claims")
    assert (stats.delayed, stats.nacked) == (1, 1)


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
