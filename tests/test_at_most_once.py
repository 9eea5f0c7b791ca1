"""At most once and cancellation: what was deleted for a call that was cancelled is the next call's."""

import asyncio
from typing import Any

import pytest

import filao
from filao.broker import session_of
from filao.engine import Delivery, Outcome

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
CLAIMS = filao.Queue("claims", backoff=filao.Backoff(first=0, jitter=0))


async def test_cancelling_loses_nothing_that_another_call_waits_for_or_will_ask_for(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        await _cancel_in_all_moments(broker)


async def test_cancelling_loses_nothing_on_rabbitmq(rabbitmq) -> None:
    async with filao.connect(rabbitmq.url()) as broker:
        await broker.declare(CLAIMS)
        await _cancel_in_all_moments(broker)


async def _cancel_in_all_moments(broker: filao.Broker) -> None:
    async def receive() -> Any:
        message = await broker.receive_from_queue(CLAIMS, wait=PATIENCE, guarantee="at-most-once")
        return None if message is None else message.body

    for turn in range(40):
        calls = [asyncio.ensure_future(receive())]
        if turn % 2:
            calls.append(asyncio.ensure_future(receive()))  # it waits already
        await broker.send_to_queue(CLAIMS, turn)
        await asyncio.sleep(turn / 10_000)  # in whatever moment that is
        calls[0].cancel()
        got: list[Any] = list(await asyncio.gather(calls[0], return_exceptions=True))
        if got != [turn] and len(calls) == 1:
            calls.append(asyncio.ensure_future(receive()))  # it comes after
        if got == [turn]:
            calls[-1].cancel()
        got += await asyncio.gather(*calls[1:], return_exceptions=True)
        assert [body for body in got if not isinstance(body, asyncio.CancelledError)] == [turn]


async def test_what_nobody_got_before_the_broker_closed_is_told(url, caplog) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        for turn in range(200):
            await broker.send_to_queue(CLAIMS, turn)
            call = asyncio.ensure_future(broker.receive_from_queue(CLAIMS, guarantee="at-most-once"))
            await asyncio.sleep(turn % 20 / 10_000)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            if not (await broker.stats(CLAIMS)).ready and call.cancelled():
                break
            await broker.purge(CLAIMS)
        else:
            pytest.skip("no call was cancelled in the right moment")
    assert "was received at most once, by a call that was cancelled" in caplog.text


async def test_what_was_deleted_is_had_though_others_wait_for_the_queue(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, ["yielded", "left"])
        both = broker.consume(CLAIMS, prefetch=2, guarantee="at-most-once")
        assert (await anext(both)).body == "yielded"
        await both.aclose()
        waiting = asyncio.ensure_future(broker.receive_from_queue(CLAIMS))
        assert await broker.receive_from_queue(CLAIMS, wait=0.01) is None  # so the other has looked, too
        message = await broker.receive_from_queue(CLAIMS, wait=PATIENCE, guarantee="at-most-once")
        assert message is not None
        assert message.body == "left"
        waiting.cancel()


async def test_what_was_deleted_comes_in_its_order_and_no_more_than_asked_for(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, range(4))
        messages = broker.consume(CLAIMS, prefetch=4, guarantee="at-most-once")
        assert (await anext(messages)).body == 0
        await messages.aclose()
        for left in ([1, 2], [3], []):
            came = await broker.receive_many(CLAIMS, 2, wait=0, guarantee="at-most-once")
            assert [message.body for message in came] == left


async def test_what_was_deleted_is_had_by_a_call_that_has_just_looked(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, ["yielded", "left"])
        both = broker.consume(CLAIMS, prefetch=2, guarantee="at-most-once")
        await anext(both)
        looking = asyncio.ensure_future(broker.receive_from_queue(CLAIMS, wait=PATIENCE, guarantee="at-most-once"))
        await asyncio.sleep(0)
        await both.aclose()
        message = await looking
        assert message is not None
        assert message.body == "left"


async def test_what_was_deleted_beside_a_message_that_could_not_be_is_had(url, monkeypatch) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        receipts = await broker.send_many(CLAIMS, range(3))
        session = session_of(broker)
        settle = session.settle

        def failing(delivery: Delivery, outcome: Outcome) -> Any:
            if delivery.id != receipts[1].id:
                return settle(delivery, outcome)
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(filao.EngineUnavailable("the server is away"))
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(session, "settle", failing)
            with pytest.raises(filao.EngineUnavailable, match="the server is away"):
                await broker.receive_many(CLAIMS, 3, guarantee="at-most-once")
        came = await broker.receive_many(CLAIMS, 3, wait=0, guarantee="at-most-once")
        assert [message.body for message in came] == [0, 2]
