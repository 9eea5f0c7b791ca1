"""`filao.testing`: what programs test themselves with. (The fixtures are known from `conftest.py`.)"""

import asyncio

import pytest

import filao
import filao.sync
from filao.testing import drain

LETTERS = filao.Queue("letters", max_attempts=2, backoff=filao.Backoff(first=60, jitter=0))


def failing(*, coroutine: bool) -> filao.Worker:
    worker = filao.Worker("unused.db")

    async def on_loop(message: filao.Message) -> None:
        raise OSError("no paper")

    def in_thread(message: filao.sync.Message) -> None:
        raise OSError("no paper")

    worker.consumer(LETTERS)(on_loop if coroutine else in_thread)
    return worker


def test_attempts_are_spent_and_backoffs_pass_without_a_sleep(filao_broker, filao_clock) -> None:
    filao_broker.declare(LETTERS)
    for coroutine in (True, False):
        worker = failing(coroutine=coroutine)
        filao_broker.send_to_queue(LETTERS, "to Ana")
        assert [handled.how for handled in drain(worker, filao_broker)] == ["retried"]
        assert drain(worker, filao_broker) == []
        filao_clock.advance(60)
        assert [handled.how for handled in drain(worker, filao_broker)] == ["dead"]
    assert len(filao_broker.dead_letters(LETTERS)) == 2


def test_delays_leases_and_times_to_live_follow_the_clock(filao_broker, filao_clock) -> None:
    filao_broker.declare(filao.Queue("claims", lease=30, ttl=1000))
    filao_broker.send_to_queue("claims", 1, delay=5)
    assert filao_broker.receive_from_queue("claims", wait=0) is None
    filao_clock.advance(5)
    assert filao_broker.receive_from_queue("claims", wait=0).attempt == 1
    filao_clock.advance(31)
    assert filao_broker.receive_from_queue("claims", wait=0).attempt == 2
    filao_clock.advance(2000)
    assert filao_broker.receive_from_queue("claims", wait=0) is None
    assert [letter.reason for letter in filao_broker.dead_letters("claims")] == ["expired"]


def test_a_worker_is_drained_on_its_own_storage(tmp_path) -> None:
    worker, seen = filao.Worker(tmp_path / "claims.db"), []

    @worker.consumer(LETTERS)
    def note(message: filao.sync.Message) -> None:
        seen.append(message.body)

    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(LETTERS)
        broker.send_to_queue(LETTERS, 7)
    assert [handled.how for handled in drain(worker)] == ["acked"]
    assert seen == [7]


def test_a_wrong_use_of_drain_is_told_what_to_write(filao_broker) -> None:
    worker = failing(coroutine=True)

    async def on_a_loop() -> None:
        drain(worker)

    with pytest.raises(filao.ConfigurationError, match=r"runs on an event loop: await worker\.drain"):
        asyncio.run(on_a_loop())
    with pytest.raises(filao.ConfigurationError, match=r"give a filao\.sync\.Broker, or await worker\.drain"):
        drain(worker, filao.connect("sqlite://:memory:"))  # type: ignore[arg-type]
    with pytest.raises(filao.ConfigurationError, match=r"filao\.testing\.drain\(worker, broker\)"):
        asyncio.run(worker.drain(filao_broker))
    with pytest.raises(filao.ConfigurationError, match=r"cannot share a filao\.sync\.Broker"):
        filao.Worker(filao_broker)
