"""What is remembered of a message's life, if its queue says so."""

import asyncio
from typing import Any

from filao.conformance.stage import Stage, equal, needs
from filao.engine import Event, Feature
from filao.errors import LeaseLost, QueueFull
from filao.process import process_name
from filao.queue import Backoff

_AT_ONCE = Backoff(first=0)


async def _told(stage: Stage, message: str) -> list[tuple[str, int, str]]:
    """Return what is remembered of a message: what happened, in which attempt, and more of it."""
    return [(event.what, event.attempt, event.detail) for event in await stage.broker.trace(message)]


@needs(Feature.TRACE, Feature.LEASES, Feature.RELEASE, Feature.DEAD_LETTERS)
async def check_a_history_tells_what_happened_to_a_message_and_who_did_it(stage: Stage) -> None:
    queue = await stage.queue(history=True, max_attempts=2, backoff=_AT_ONCE)
    (name,) = await stage.send(queue, 1)
    message = await stage.next(queue)
    await message.extend(45)
    await message.nack(reason="no ink")
    await (await stage.next(queue)).release()
    await (await stage.next(queue)).nack(reason="no paper")
    await stage.broker.redrive(queue)
    await (await stage.next(queue)).ack()
    equal(
        await _told(stage, name),
        [
            *[("sent", 0, ""), ("received", 1, ""), ("extended", 1, "45"), ("nacked", 1, "no ink")],
            *[("received", 2, ""), ("released", 2, ""), ("received", 2, "")],
            *[("nacked", 2, "no paper"), ("died", 2, "max_attempts"), ("redriven", 0, "")],
            *[("received", 1, ""), ("acked", 1, "")],
        ],
    )
    events = await stage.broker.trace(name)
    equal({event.by for event in events if event.what != "died"}, {process_name()})
    equal({event.queue for event in events}, {queue.name})
    equal([event.at for event in events], sorted(event.at for event in events))


@needs(Feature.TRACE, Feature.LEASES, Feature.TTL, Feature.MAX_LENGTH)
async def check_a_history_tells_what_time_and_room_did_to_a_message(stage: Stage) -> None:
    queue = await stage.queue(history=True, max_length=1, overflow="drop_oldest", lease=0.2)
    lost, full = (await stage.send(queue, 1))[0], await stage.queue(history=True, max_length=1, overflow="drop_oldest")
    await stage.next(queue)
    await stage.advance(0.3)
    again = await stage.back(queue)
    await again.reject("torn")
    equal(
        await _told(stage, lost),
        [
            *[("sent", 0, ""), ("received", 1, ""), ("lease_expired", 1, ""), ("received", 2, "")],
            *[("rejected", 2, "torn"), ("died", 2, "rejected")],
        ],
    )
    pushed, old = await stage.send(full, 1), await stage.send(full, 2, ttl=0.2)
    equal([what for what, *_ in await _told(stage, pushed[0])], ["sent", "overflow", "died"])
    await stage.advance(0.3)
    await stage.nothing(full)
    equal([what for what, *_ in await _told(stage, old[0])], ["sent", "expired", "died"])


@needs(Feature.TRACE, Feature.LEASES, Feature.PEEK)
async def check_what_is_done_together_and_by_operators_is_remembered_of_each_message(stage: Stage) -> None:
    queue = await stage.queue(history=True)
    names = [receipt.id for receipt in await stage.broker.send_many(queue, range(6))]
    held = await stage.broker.receive_many(queue, 3, wait=0)
    await asyncio.gather(*(message.extend(60) for message in held))
    await asyncio.gather(*(message.ack() for message in held))
    for name in names[:3]:
        equal([what for what, *_ in await _told(stage, name)], ["sent", "received", "extended", "acked"])
    await stage.broker.cancel(queue, names[3])
    await stage.broker.purge(queue)
    equal([what for what, *_ in await _told(stage, names[3])], ["sent", "cancelled"])
    equal([what for what, *_ in await _told(stage, names[4])], ["sent", "purged"])


@needs(Feature.TRACE, Feature.DEAD_LETTERS)
async def check_a_history_tells_that_a_message_came_back_with_another_body(stage: Stage) -> None:
    queue = await stage.queue(history=True, max_attempts=1)
    (name,) = await stage.send(queue, 1)
    await (await stage.next(queue)).reject("no")
    await stage.broker.redrive(queue, ids=[name])
    equal((await _told(stage, name))[-1], ("redriven", 0, ""))
    await (await stage.next(queue)).reject("no")
    await stage.broker.redrive(queue, ids=[name], body=2)
    equal((await _told(stage, name))[-1], ("redriven", 0, "edited"))


@needs(Feature.TRACE, Feature.TRANSACTIONS)
async def check_what_is_undone_has_no_history(stage: Stage) -> None:
    queue = await stage.queue(history=True)
    (name,) = await stage.send(queue, 1)
    message = await stage.next(queue)
    sent: list[Any] = []

    class Undone(Exception):
        pass

    for error in (Undone, None):
        try:
            async with message.transaction() as transaction:
                sent.append(await transaction.send_to_queue(queue, 2))
                if error is not None:
                    raise error
        except Undone:
            pass
    equal([await _told(stage, one.id) for one in sent], [[], [("sent", 0, "")]])
    equal([what for what, *_ in await _told(stage, name)], ["sent", "received", "acked"])
    try:
        await message.ack()
    except LeaseLost:
        equal([what for what, *_ in await _told(stage, name)], ["sent", "received", "acked"])
    else:
        raise AssertionError("a message was acknowledged twice")


@needs(Feature.TRACE)
async def check_a_history_is_kept_for_its_window_though_its_queue_is_gone(stage: Stage) -> None:
    queue = await stage.queue(history=True, history_window=0.4)
    (name,) = await stage.send(queue, 1)
    await (await stage.next(queue)).ack()
    await stage.broker.delete_queue(queue)
    stage.declared.remove(queue)
    equal([what for what, *_ in await _told(stage, name)], ["sent", "received", "acked"])
    await stage.advance(0.5)
    equal(await _told(stage, name), [])


@needs(Feature.TRACE)
async def check_without_the_rule_nothing_is_remembered(stage: Stage) -> None:
    queue = await stage.queue()
    (name,) = await stage.send(queue, 1)
    await (await stage.next(queue)).ack()
    equal(await stage.broker.trace(name), [])
    none: list[Event] = await stage.broker.trace("claim-that-never-was")
    equal(none, [])


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS, Feature.COUNTERS)
async def check_a_send_that_finds_no_room_counts_no_death(stage: Stage) -> None:
    queue = await stage.queue(max_length=3, overflow="drop_oldest", history=Feature.TRACE in stage.broker.features)
    ready = (await stage.send(queue, *range(3)))[2]
    await stage.broker.receive_many(queue, 2, wait=0)
    try:
        await stage.broker.send_many(queue, range(2))
    except QueueFull:
        stats = await stage.broker.stats(queue)
        equal(stats.dead + sum(stats.dead_by_reason.values()) + sum(stats.died_by_reason.values()), 0)
        if Feature.TRACE in stage.broker.features:
            equal([what for what, *_ in await _told(stage, ready)], ["sent"])
    else:
        raise AssertionError("two messages had room where one could be dropped")
