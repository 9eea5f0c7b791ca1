"""What operators see and do."""

import asyncio
import dataclasses
import os
import socket
import time
from typing import Any

from filao.conformance.stage import SOON, Stage, add_up, equal, needs, raises
from filao.engine import Feature, State
from filao.errors import ConfigurationError, LeaseLost, QueueNotFound
from filao.queue import Queue


@needs(Feature.PEEK, Feature.DELAY)
async def check_peek_shows_each_state_in_pages_and_changes_nothing(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(5))
    await stage.send(queue, "later", delay=60)
    held = await stage.next(queue)
    page = await stage.broker.peek(queue, limit=3)
    equal([message.body for message in page], [1, 2, 3])
    equal([message.body for message in await stage.broker.peek(queue, after=page[-1].id)], [4])
    equal([message.body for message in await stage.broker.peek(queue, state="delayed")], ["later"])
    (leased,) = await stage.broker.peek(queue, state="leased")
    equal((leased.id, leased.attempts), (held.id, 1))
    await raises(ConfigurationError, stage.broker.peek(queue, state="asleep"), "asleep")
    await raises(ConfigurationError, stage.broker.peek(queue, after="nonsense"), "nonsense", queue.name)
    await stage.counted(queue, ready=4, delayed=1, leased=1, received=1)


@needs(Feature.PEEK)
async def check_peek_tells_who_holds_a_message(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2)
    await stage.next(queue)
    (leased,) = await stage.broker.peek(queue, state="leased")
    equal(leased.consumer, f"{socket.gethostname()}:{os.getpid()}")
    (ready,) = await stage.broker.peek(queue)
    equal(ready.consumer, "")


@needs()
async def check_declare_is_idempotent_and_changes_rules(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=2)
    await stage.send(queue, 1)
    await stage.broker.declare(queue)
    changed = dataclasses.replace(queue, max_attempts=7, body_max=1000)
    await stage.broker.declare(changed)
    async with stage.connect() as other:
        (seen,) = [known for known in await other.queues() if known.name == queue.name]
    equal(seen, changed)
    equal(await stage.drain(queue), [1])


@needs()
async def check_purge_deletes_what_is_ready(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    held = await stage.next(queue)
    equal(await stage.broker.purge(queue), 2)
    await stage.nothing(queue)
    await held.ack()
    await stage.send(queue, 4)
    equal(await stage.drain(queue), [4])


@needs()
async def check_a_deleted_queue_is_gone(stage: Stage) -> None:
    queue, other_queue = await stage.queue(), await stage.queue()
    await stage.send(queue, 1, 2)
    await stage.send(other_queue, 3)
    async with stage.connect() as other:
        await other.send_to_queue(queue.name, 3)
        await raises(ConfigurationError, stage.broker.delete_queue(queue), queue.name, "3")
        equal(await stage.drain(queue), [1, 2, 3])
        await stage.broker.delete_queue(queue)
        for call in (stage.broker.stats(queue), stage.broker.send_to_queue(queue, 4), stage.broker.delete_queue(queue)):
            await raises(QueueNotFound, call, queue.name)
        await raises(QueueNotFound, other.send_to_queue(queue.name, 4), queue.name)
        await raises(QueueNotFound, other.receive_from_queue(queue.name, wait=0), queue.name)
    await stage.broker.declare(queue)
    await stage.counted(queue, ready=0, sent=0, acked=0)
    await stage.send(queue, 5)
    await stage.broker.delete_queue(queue, messages=True)
    equal(await stage.drain(other_queue), [3])


@needs(Feature.DELAY, Feature.PEEK)
async def check_purge_deletes_what_waits(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    await stage.send(queue, 4, delay=60)
    held = await stage.next(queue)
    equal(await stage.broker.purge(queue), 3)
    await stage.nothing(queue)
    await held.ack()
    stats = await stage.broker.stats(queue)
    equal((stats.purged, stats.acked, stats.ready, stats.delayed), (3, 1, 0, 0))
    equal(stats.dead_by_reason, {})


@needs(Feature.GROUPS, Feature.ATOMIC, Feature.PEEK)
async def check_a_purge_of_a_state_leaves_what_it_lets_through(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_many(queue, [1, 2, 3], group="a")
    await stage.send(queue, 4)
    equal(await stage.broker.purge(queue, state="ready"), 2)
    equal(await stage.drain(queue), [2, 3])


@needs(Feature.ATOMIC, Feature.COUNTERS)
async def check_a_purge_ends_though_others_send(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_many(queue, range(5_000))
    purging = asyncio.ensure_future(stage.broker.purge(queue))
    sent = 0
    async with stage.connect() as other:
        while not purging.done() and sent < 100_000:
            await other.send_many(queue.name, range(2_500))
            sent += 2_500
    purged = await purging
    equal(purged <= 5_000 + 2 * 2_500, True)  # what was sent before it began, at most
    await stage.counted(queue, ready=5_000 + sent - purged, purged=purged)


@needs(Feature.DEAD_LETTERS)
async def check_a_dead_letter_named_twice_is_redriven_once(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2)
    for message in await stage.broker.receive_many(queue, 2, wait=0):
        await message.reject("no")
    first, second = [letter.id for letter in await stage.broker.dead_letters(queue)]
    equal(await stage.broker.redrive(queue, ids=[first, first, second, "claim-9", first]), 2)
    await stage.counted(queue, ready=2, dead=0, redriven=2)


@needs(Feature.DEAD_LETTERS)
async def check_of_the_dead_letters_named_the_first_few_can_be_redriven(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *range(6))
    for message in await stage.broker.receive_many(queue, 6, wait=0):
        await message.reject("no")
    ids = [letter.id for letter in await stage.broker.dead_letters(queue)]
    (waiting,) = await stage.send(queue, 6)
    equal(await stage.broker.redrive(queue, ids=[waiting, ids[4], ids[3], ids[1]], limit=2), 2)
    equal(sorted(await stage.drain(queue)), [1, 3, 6])  # of an engine without old places, 6 is the first
    equal(await stage.broker.redrive(queue, ids=ids[:2], limit=2), 1)
    equal(await stage.drain(queue), [0])
    equal([letter.body for letter in await stage.broker.dead_letters(queue)], [2, 4, 5])


@needs(Feature.DEAD_LETTERS)
async def check_an_id_that_no_message_can_have_is_of_none(stage: Stage) -> None:
    queue, broker = await stage.queue(max_attempts=1), stage.broker
    await stage.send(queue, 1)
    await (await stage.next(queue)).reject("no")
    for strange in ("", "\0", "a\0b", "\ud800"):
        equal(await broker.redrive(queue, ids=[strange]), 0)
        equal(await broker.discard(queue, ids=[strange]), 0)
        await raises(ConfigurationError, broker.peek(queue, state=State.DEAD, after=strange), queue.name)
        await raises(ConfigurationError, broker.redrive(queue, ids=[strange], body=2), queue.name)
        if Feature.PEEK in broker.features:
            equal(await broker.cancel(queue, strange), False)
        if Feature.TRACE in broker.features:
            equal(await broker.trace(strange), [])
        if Feature.PAUSE in broker.features:
            await raises(ConfigurationError, broker.pause(queue, group=strange), queue.name)
            await raises(ConfigurationError, broker.resume(queue, group=strange), queue.name)


@needs(Feature.GROUPS, Feature.PAUSE)
async def check_a_group_that_is_paused_waits_alone_until_it_is_resumed(stage: Stage) -> None:
    queue = await stage.queue(group_dead="halt")
    for body, group in ((1, "one"), (2, "one"), (3, "two"), (0, "ready")):
        await stage.send(queue, body, group=group)
    held = await stage.next(queue)
    for group in ("one", "ready"):
        await stage.broker.pause(queue, group=group)
    await held.ack()
    await stage.send(queue, 4, group="one")
    await stage.send(queue, 5, group="nobody")
    equal(await stage.drain(queue), [3, 5])
    await stage.counted(queue, blocked=3, ready=0)
    await stage.broker.resume(queue, group="one")
    equal(await stage.drain(queue), [2, 4])
    await stage.broker.resume(queue, group="ready")
    equal(await stage.drain(queue), [0])
    goes_on = await stage.queue()
    await raises(ConfigurationError, stage.broker.pause(goes_on, group="one"), goes_on.name, "group_dead")


@needs(Feature.DEAD_LETTERS)
async def check_a_dead_letter_that_is_discarded_is_gone_and_the_others_stay(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    for message in await stage.broker.receive_many(queue, 3, wait=0):
        await (message.ack() if message.body == 2 else message.reject("no"))
    await stage.send(queue, 4)
    first, last = await stage.broker.dead_letters(queue)
    equal(await stage.broker.discard(queue, ids=[first.id, first.id, "claim-9"]), 1)
    equal([letter.id for letter in await stage.broker.dead_letters(queue)], [last.id])
    await stage.counted(queue, ready=1, dead=1, cancelled=1)


@needs(Feature.FENCING, Feature.LEASES)
async def check_the_lease_of_a_message_whose_queue_was_deleted_is_lost(stage: Stage) -> None:
    for declared_again in (False, True):
        queue = await stage.queue()
        await stage.send(queue, 1)
        message = await stage.next(queue)
        await stage.broker.delete_queue(queue, messages=True)
        if declared_again:
            await stage.broker.declare(queue)
            await stage.send(queue, 2)
        for settle in (message.ack(), message.nack(), message.extend(5)):
            await raises(LeaseLost, settle, queue.name, message.id)
        if declared_again:
            await stage.counted(queue, ready=1, acked=0, late=0)


@needs(Feature.DEDUPLICATION)
async def check_what_was_purged_may_be_sent_again(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, dedup_key="k")
    equal(await stage.broker.purge(queue), 1)
    equal((await stage.broker.send_to_queue(queue, 1, dedup_key="k")).duplicate, False)


@needs(Feature.DEAD_LETTERS)
async def check_dead_letters_can_be_purged(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1)
    await (await stage.next(queue)).reject("no")
    equal((await stage.broker.purge(queue), await stage.broker.purge(queue, state="dead")), (0, 1))
    equal(await stage.broker.dead_letters(queue), [])


@needs(Feature.PEEK)
async def check_cancel_deletes_one_message_that_waits(stage: Stage) -> None:
    queue = await stage.queue()
    first, second = await stage.send(queue, 1, 2)
    held = await stage.next(queue)
    equal((held.id, await stage.broker.cancel(queue, first)), (first, False))
    equal((await stage.broker.cancel(queue, second), await stage.broker.cancel(queue, second)), (True, False))
    await held.ack()
    await stage.counted(queue, ready=0, acked=1, cancelled=1)


@needs(Feature.PAUSE)
async def check_a_paused_queue_takes_but_does_not_give(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1)
    await stage.broker.pause(queue)
    await stage.send(queue, 2)
    await stage.nothing(queue)
    equal((await stage.broker.stats(queue)).paused, True)
    waiting = asyncio.ensure_future(stage.broker.receive_from_queue(queue, wait=SOON))
    await asyncio.sleep(0)
    await stage.broker.resume(queue)
    message = await waiting
    equal(message and message.body, 1)


@needs(Feature.DELAY, Feature.PEEK, Feature.COUNTERS, Feature.LEASES, Feature.GROUPS)
async def check_the_counters_add_up(stage: Stage) -> None:
    queue = await stage.queue(lease=5, max_attempts=2)
    ids = await stage.send(queue, *range(12))
    await stage.send(queue, "later", delay=100)
    await stage.send(queue, "a", "b", group="g")
    for settle in ("ack", "nack", "reject", "release"):
        await getattr(await stage.next(queue), settle)()
    await stage.next(queue)
    await stage.advance(6)
    await stage.next(queue)
    await stage.broker.cancel(queue, ids[-1])
    await stage.broker.purge(queue, state="dead")
    add_up(await stage.broker.stats(queue))
    names = [stats.name for stats in await stage.broker.stats()]
    equal(names, sorted(names))


@needs(Feature.COUNTERS)
async def check_the_age_of_a_queue_is_that_of_its_oldest_message(stage: Stage) -> None:
    queue = await stage.queue()
    equal((await stage.broker.stats(queue)).oldest_ready_age, None)
    await stage.send(queue, 1)
    await stage.advance(10)
    await stage.send(queue, 2)
    age = (await stage.broker.stats(queue)).oldest_ready_age
    equal(age is not None and 10 <= age < 11, True)


@needs(Feature.COUNTERS, Feature.GROUPS, Feature.LEASES, Feature.DELAY)
async def check_the_oldest_of_each_state_tells_its_age(stage: Stage) -> None:
    queue = await stage.queue(lease=1000, max_attempts=1)
    stats = await stage.broker.stats(queue)
    equal([stats.oldest_age(state) for state in State], [None] * 5)
    await stage.send(queue, "dies")
    await stage.advance(1)
    await stage.send(queue, "is held", group="g")
    await stage.advance(1)
    await stage.send(queue, "is blocked", group="g")
    await stage.advance(1)
    await stage.send(queue, "is due", delay=5)
    await (await stage.next(queue)).reject("no")
    held = await stage.next(queue)
    await stage.advance(3)
    await stage.send(queue, "is ready")
    await _aged(stage, queue, dead=6, leased=5, blocked=4, ready=0)
    await stage.advance(4)
    await _aged(stage, queue, dead=10, leased=9, blocked=8, ready=4, delayed=2)
    await held.ack()
    await stage.drain(queue)
    await _aged(stage, queue, dead=10)
    for body in ("again", "and again"):  # what came back is found though nothing was seen there
        await stage.send(queue, body, group="g")
    await _aged(stage, queue, dead=10, ready=0, blocked=0)
    await stage.broker.redrive(queue)
    await _aged(stage, queue, ready=10, blocked=0)


async def _aged(stage: Stage, queue: Queue[Any], **wanted: float) -> None:
    """Find these ages, in seconds, and no others."""
    stats = await stage.broker.stats(queue)
    found = {state.value: age for state in State if (age := stats.oldest_age(state)) is not None}
    equal(found.keys(), wanted.keys())
    late = {state: age for state, age in found.items() if not wanted[state] <= age < wanted[state] + 1 + stage.slack}
    equal(late, {})


@needs(Feature.COUNTERS, Feature.DEAD_LETTERS, Feature.TTL)
async def check_dead_letters_are_counted_by_reason(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=1)
    await stage.send(queue, 1, 2, 3)
    await stage.send(queue, 4, ttl=1)
    await (await stage.next(queue)).reject("no")
    await (await stage.next(queue)).reject("no")
    await (await stage.next(queue)).nack()
    await stage.advance(2)
    stats = await stage.broker.stats(queue)
    equal(stats.dead_by_reason, {"expired": 1, "max_attempts": 1, "rejected": 2})
    equal((stats.dead, stats.died_by_reason), (4, stats.dead_by_reason))
    await stage.broker.redrive(queue, limit=1)
    await stage.broker.purge(queue, state="dead")
    stats = await stage.broker.stats(queue)
    equal((len(stats.dead_by_reason), stats.died), (0, 4))
    equal(stats.died_by_reason, {"expired": 1, "max_attempts": 1, "rejected": 2})


@needs(Feature.COUNTERS, Feature.LEASES)
async def check_the_processes_that_receive_are_told_with_what_they_hold(stage: Stage) -> None:
    queue, other = await stage.queue(), await stage.queue()
    equal((await stage.broker.stats(queue)).receivers, ())
    await stage.send(queue, 1, 2, 3)
    held = [await stage.next(queue), await stage.next(queue)]
    (receiver,) = (await stage.broker.stats(queue)).receivers
    equal((receiver.name, receiver.held, receiver.worker), (f"{socket.gethostname()}:{os.getpid()}", 2, ""))
    for message in held:
        await message.ack()
    equal((await stage.broker.stats(queue)).receivers, ())
    waiting = asyncio.ensure_future(stage.broker.receive_from_queue(other, wait=SOON))
    until = time.monotonic() + SOON
    while True:
        receivers = (await stage.broker.stats(other)).receivers
        if receivers or time.monotonic() > until:
            break
        await asyncio.sleep(0.01)
    equal([(one.name, one.held) for one in receivers], [(receiver.name, 0)])
    await stage.send(other, 1)
    await waiting


@needs()
async def check_a_closed_broker_says_so(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.connect() as other:
        await other.send_to_queue(queue.name, 1)
        message = await other.receive_from_queue(queue.name, wait=0)
        waiting = asyncio.ensure_future(other.receive_from_queue(queue.name))
        await asyncio.sleep(0)
    for call in (other.send_to_queue(queue.name, 1), other.receive_from_queue(queue.name), other.stats(), waiting):
        await raises(ConfigurationError, call, "closed")
    if message is not None:
        await raises(ConfigurationError, message.ack(), "closed")
    stage.unused(await stage.back(queue))  # closing gave it back
