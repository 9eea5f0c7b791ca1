"""The worker as a program declares and runs it, and what a wrong use of it says."""

import logging
from dataclasses import dataclass

import pytest

import filao
from tests.support.working import CLAIMS, Claim, broker, plain, refused, running

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


@dataclass
class Letter:
    """Nothing tells it apart from a claim in JSON."""

    text: str


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


async def test_an_unknown_queue_is_said_at_the_start_with_its_neighbours(url, broker) -> None:
    worker = filao.Worker(url)
    worker.consumer("claimz")(plain)
    with pytest.raises(filao.QueueNotFound, match="'claimz' is not declared"):
        await worker.run()


async def test_a_handlers_type_that_nothing_can_read_is_refused_at_the_start(url, broker) -> None:
    worker = filao.Worker(url)

    @worker.consumer("claims")
    async def handle(message: filao.Message[Claim | Letter]) -> None: ...

    for working in (worker.run(signals=False), worker.drain()):
        with pytest.raises(filao.ConfigurationError, match=r"Claim \| .*Letter cannot be the type of a queue's bodies"):
            await working


async def test_a_worker_opens_a_broker_that_is_not_open_and_closes_it_again(url, broker) -> None:
    shared = filao.connect(url)
    worker = filao.Worker(shared)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        if message.body == 1:
            await shared.send_to_queue(CLAIMS, 2)

    await broker.send_to_queue(CLAIMS, 1)
    for until_idle in (True, False):
        await (worker.run(until_idle=True, signals=False) if until_idle else worker.drain())
        with pytest.raises(filao.ConfigurationError, match="is closed"):
            await shared.stats()
    assert (await broker.stats(CLAIMS)).acked == 2


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


async def test_what_fails_with_an_error_of_several_lines_is_logged_by_the_one_that_names_it(
    url, broker, caplog
) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        raise ValueError("there is one\nDETAIL:  Key (id)=(1) already exists.")  # as PostgreSQL writes them

    await broker.send_to_queue("claims", 1)
    with caplog.at_level(logging.WARNING):
        await worker.drain()
    assert "attempt 1 failed: ValueError: there is one\n" in caplog.text


async def test_what_fails_is_logged_with_its_message_and_queue(url, broker, caplog) -> None:
    worker = filao.Worker(url)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        raise ValueError("why")

    receipt = await broker.send_to_queue("claims", 1)
    with caplog.at_level(logging.WARNING):
        await worker.drain()
    assert f"message {receipt.id} of 'claims', attempt 1 failed: ValueError: why" in caplog.text
