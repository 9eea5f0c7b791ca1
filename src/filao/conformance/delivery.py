"""From send to ack: order, waiting, one consumer at a time, and calls that are cancelled."""

import asyncio
from contextlib import suppress
from typing import Any

from filao.broker import Broker
from filao.conformance.stage import SOON, Stage, equal, needs, raises
from filao.engine import Feature
from filao.errors import LeaseLost
from filao.message import Message
from filao.queue import Queue


@needs()
async def check_a_message_is_sent_received_acknowledged_and_gone(stage: Stage) -> None:
    queue = await stage.queue()
    receipt = await stage.broker.send_to_queue(queue.name, {"claim_id": 7}, headers={"trace": "a"})
    message = await stage.next(queue)
    equal((message.id, message["claim_id"], message.headers), (receipt.id, 7, {"trace": "a"}))
    equal((message.attempt, message.queue, receipt.duplicate), (1, queue.name, False))
    await stage.nothing(queue)
    await message.ack()
    equal(message.settled, True)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, sent=1, acked=1, leased=0)


@needs()
async def check_a_message_outlives_the_broker_that_sent_it(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.connect() as other:
        receipt = await other.send_to_queue(queue.name, "kept")
    equal((await stage.next(queue)).id, receipt.id)


@needs()
async def check_messages_come_in_the_order_of_sending(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(50))
    equal(await stage.drain(queue), list(range(50)))


@needs(Feature.PRIORITIES)
async def check_priority_goes_before_order(stage: Stage) -> None:
    queue = await stage.queue()
    for body, priority in (("low", -5), ("first", 0), ("urgent", 9), ("second", 0), ("urgent too", 9)):
        await stage.broker.send_to_queue(queue, body, priority=priority)
    equal(await stage.drain(queue), ["urgent", "urgent too", "first", "second", "low"])


@needs()
async def check_every_kind_of_body_comes_back_as_it_was(stage: Stage) -> None:
    queue = await stage.queue()
    bodies: list[Any] = [
        None,
        True,
        0,
        -1,
        2**53,
        1.5,
        "",
        "é\U0001f600\u2028",
        [],
        {},
        {"a": [1, {"b": None}]},
        b"",
        b"\x00\xff",
    ]
    await stage.send(queue, *bodies)
    for body in bodies:
        message = await stage.next(queue)
        equal((message.body, message.body.__class__), (body, body.__class__))
        await message.ack()


@needs()
async def check_send_many_is_in_order_and_one_receipt_each(stage: Stage) -> None:
    queue = await stage.queue()
    receipts = await stage.broker.send_many(queue, range(10))
    equal(len({receipt.id for receipt in receipts}), 10)
    equal(await stage.broker.send_many(queue, []), [])
    messages = await stage.broker.receive_many(queue, 20, wait=0)
    equal([message.body for message in messages], list(range(10)))
    equal([message.id for message in messages], [receipt.id for receipt in receipts])


@needs()
async def check_receive_many_takes_no_more_than_its_limit(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    equal([message.body for message in await stage.broker.receive_many(queue, 2, wait=0)], [1, 2])
    equal([message.body for message in await stage.broker.receive_many(queue, 2, wait=0)], [3])
    equal(await stage.broker.receive_many(queue, 2, wait=0), [])


@needs()
async def check_a_waiting_consumer_is_woken_by_a_send(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.connect() as other:
        waiting = asyncio.ensure_future(other.receive_from_queue(queue.name, wait=SOON))
        await asyncio.sleep(0)
        await stage.send(queue, "wake up")
        message = await waiting
        equal(message and message.body, "wake up")


@needs()
async def check_a_waiting_consumer_is_woken_by_its_own_broker_each_time(stage: Stage) -> None:
    queue = await stage.queue()
    for body in range(3):
        await stage.send(queue, "there")
        equal(await stage.drain(queue), ["there"])
        waiting = asyncio.ensure_future(stage.broker.receive_from_queue(queue, wait=SOON))
        for _ in range(3):
            await stage.broker.stats(queue)  # meanwhile it has looked in vain
        await stage.send(queue, body)
        message = await waiting
        equal(message and message.body, body)
        if message is not None:
            await message.ack()


@needs()
async def check_a_wait_that_runs_out_returns_none(stage: Stage) -> None:
    queue = await stage.queue()
    equal(await stage.broker.receive_from_queue(queue, wait=0.01), None)
    equal(await stage.broker.receive_many(queue, 5, wait=0.01), [])


@needs()
async def check_consume_yields_message_after_message(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(7))
    bodies: list[Any] = []
    async for message in stage.broker.consume(queue, prefetch=3):
        bodies.append(message.body)
        await message.ack()
        if len(bodies) == 7:
            break
    equal(bodies, list(range(7)))


@needs()
async def check_consume_ends_when_nothing_came_for_its_wait(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(3))
    bodies: list[Any] = []
    async for message in stage.broker.consume(queue, prefetch=2, wait=0.01):
        bodies.append(message.body)
        await message.ack()
    equal(bodies, list(range(3)))


@needs()
async def check_the_shortest_wait_finds_what_is_there(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(3))
    one = await stage.broker.receive_from_queue(queue, wait=1e-6)
    both = await stage.broker.receive_many(queue, 3, wait=1e-6)
    equal([message.body for message in ([one] if one else []) + both], [0, 1, 2])


@needs()
async def check_leaving_consume_gives_back_what_was_not_yielded(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, "taken", "fetched ahead", "fetched ahead too")
    messages = stage.broker.consume(queue, prefetch=3)
    await (await anext(messages)).ack()
    await messages.aclose()
    left = [await stage.next(queue), await stage.next(queue)]
    equal([message.body for message in left], ["fetched ahead", "fetched ahead too"])
    stage.unused(*left)


@needs()
async def check_competing_consumers_never_share_a_message(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_many(queue, range(200))
    received: list[Any] = []

    async def consume(broker: Broker) -> None:
        while (message := await broker.receive_from_queue(queue.name, wait=0)) is not None:
            received.append(message.body)
            await message.ack()

    async with stage.connect() as second, stage.connect() as third:
        await asyncio.gather(*(consume(broker) for broker in (stage.broker, second, third) for _ in range(4)))
    equal(sorted(received), list(range(200)))


@needs(Feature.FENCING)
async def check_a_late_settle_changes_nothing_once_another_has_the_message(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "contested")
    for settle in ("ack", "nack", "reject", "release"):
        zombie = await stage.next(queue)
        await stage.advance(6)
        owner = await stage.next(queue)
        await raises(LeaseLost, getattr(zombie, settle)(), zombie.id, queue.name)
        await raises(LeaseLost, zombie.extend(10), zombie.id)
        await owner.release()
    await stage.advance(6)
    last = await stage.next(queue)
    await last.ack()
    await stage.nothing(queue)


@needs(Feature.FENCING)
async def check_a_late_extend_is_refused_beside_one_of_the_lease_that_followed(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "contested")
    zombie = await stage.next(queue)
    await stage.advance(6)
    owner = await stage.next(queue)
    await stage.send(queue, *range(20))
    others = await stage.broker.receive_many(queue, 20)
    extends = [message.extend(10) for message in others]  # while the first are under way, those behind them gather
    *told, late, last = await asyncio.gather(*extends, zombie.extend(10), owner.extend(10), return_exceptions=True)
    equal((told, type(late), last), ([None] * len(others), LeaseLost, None))
    await stage.advance(9)
    await owner.ack()
    await stage.counted(queue, ready=0, leased=len(others), acked=1, late=0)


@needs(Feature.FENCING)
async def check_a_late_ack_is_accepted_while_nobody_took_the_message(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "slow")
    slow = await stage.next(queue)
    await stage.advance(6)
    await slow.ack()
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, acked=1, late=1)


@needs(Feature.FENCING)
async def check_a_lease_is_over_at_its_end(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1, 2, 3, 4)
    alone, *together, _ = [await stage.next(queue) for _ in range(4)]
    await stage.advance(5)
    await alone.ack()
    first = stage.broker.send_to_queue(queue, 5)  # while which is done the two acks gather to one batch
    await asyncio.gather(first, *(message.ack() for message in together))
    equal((await stage.next(queue)).body, 4)
    await stage.counted(queue, ready=1, acked=3, late=3)


async def _seen_to_be_late(stage: Stage, queue: Queue[Any]) -> Message[Any]:
    """Return a message whose lease of 5 s is over, and was made ready."""
    await stage.send(queue, 1, 2)
    await stage.next(queue)
    slow = await stage.next(queue)
    await stage.advance(6)
    equal((await stage.next(queue)).body, 1)  # the consumer that took it has made the other ready too
    return slow


@needs(Feature.FENCING)
async def check_a_lease_that_was_seen_to_be_over_can_be_extended(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    slow = await _seen_to_be_late(stage, queue)
    await slow.extend(10)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, leased=2)


@needs(Feature.LEASES)
async def check_leases_that_are_extended_together_end_each_in_its_time(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1, 2)
    brief, long = [await stage.next(queue) for _ in range(2)]
    first = stage.broker.send_to_queue(queue, 3)  # while which is done the two gather to one batch
    await asyncio.gather(first, long.extend(20), brief.extend(5))
    await stage.advance(6)
    equal(await stage.drain(queue), [1, 3])
    await long.ack()


@needs(Feature.FENCING)
async def check_a_late_ack_beside_that_of_the_owner_is_refused(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1, 2)
    for zombie_first in (True, False):
        zombie = await stage.next(queue)
        await stage.advance(6)
        owner = await stage.next(queue)
        asked = [zombie, owner] if zombie_first else [owner, zombie]
        first = stage.broker.send_to_queue(queue, 3)  # while which is done the two acks gather to one batch
        _, *ended = await asyncio.gather(first, *(message.ack() for message in asked), return_exceptions=True)
        equal([isinstance(end, LeaseLost) for end in ended], [zombie_first, not zombie_first])


@needs(Feature.FENCING)
async def check_of_two_settles_of_one_lease_one_is_refused(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    for other in ("ack", "nack", "release"):
        message = await stage.next(queue)
        first = stage.broker.send_to_queue(queue, 4)  # while which is done the two gather to one batch
        asked: list[Any] = [first, getattr(message, other)(), message.ack()]
        ended = await asyncio.gather(*asked, return_exceptions=True)
        equal([isinstance(end, LeaseLost) for end in ended].count(True), 1)


@needs(Feature.FENCING)
async def check_a_late_ack_is_accepted_though_its_message_was_seen_to_be_late(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    slow = await _seen_to_be_late(stage, queue)
    equal((await stage.broker.stats(queue)).ready, 1)
    await slow.ack()
    await stage.nothing(queue)


@needs()
async def check_a_message_is_settled_once(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1)
    message = await stage.next(queue)
    await message.ack()
    for again in (message.ack, message.nack, message.reject, message.release):
        await raises(LeaseLost, again(), message.id, "already acked,")
    await raises(LeaseLost, message.extend(5), "already acked, so it can no longer be extended.")


@needs(Feature.LEASES)
async def check_an_extended_lease_lasts(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, "long work")
    message = await stage.next(queue)
    await stage.advance(4)
    await message.extend(5)
    await stage.advance(4)
    await stage.nothing(queue)
    await stage.advance(2)
    equal((await stage.next(queue)).attempt, 2)


@needs(Feature.LEASES)
async def check_a_lease_of_its_own_length_is_kept(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1)
    await stage.next(queue, lease=10)
    await stage.advance(8)
    await stage.nothing(queue)
    await stage.advance(4)
    equal((await stage.next(queue)).attempt, 2)


@needs()
async def check_at_most_once_is_never_delivered_again(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, "once")
    async with stage.connect() as other:
        message = await other.receive_from_queue(queue.name, wait=0, guarantee="at-most-once")
        if message is None:
            raise AssertionError(f"nothing to receive from {queue.name}")
        await message.ack()  # so that the same code runs under either guarantee
        await raises(LeaseLost, message.nack(), "at most once")
    await stage.advance(queue.lease if Feature.LEASES in stage.broker.features else 0)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, acked=1)


@needs()
async def check_cancelling_a_receive_loses_nothing(stage: Stage) -> None:
    queue = await stage.queue()
    for turns in range(25):
        await stage.send(queue, turns)
        receiving = asyncio.ensure_future(stage.broker.receive_from_queue(queue))
        for _ in range(turns):
            await asyncio.sleep(0)
        receiving.cancel()
        with suppress(asyncio.CancelledError):
            await (await receiving).release()
        message = await stage.broker.receive_from_queue(queue, wait=SOON)
        if message is None:
            raise AssertionError(f"message {turns} is missing")
        equal(message.body, turns)
        stage.unused(message)
        await message.ack()


@needs()
async def check_cancelling_one_of_many_waiting_leaves_the_others(stage: Stage) -> None:
    queue = await stage.queue()
    waiting = [asyncio.ensure_future(stage.broker.receive_from_queue(queue, wait=SOON)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await stage.send(queue, "a", "b")
    received = [await waiting[1], await waiting[2]]
    equal(sorted(message.body for message in received if message is not None), ["a", "b"])
