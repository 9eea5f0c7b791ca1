"""Groups, delays and times to live."""

from filao.conformance.stage import Stage, equal, needs, raises
from filao.engine import Feature
from filao.errors import LeaseLost
from filao.queue import Backoff


@needs(Feature.GROUPS)
async def check_a_group_has_one_message_out_at_a_time_in_order(stage: Stage) -> None:
    queue = await stage.queue()
    for body in (1, 2, 3):
        await stage.send(queue, f"a{body}", group="a")
        await stage.send(queue, f"b{body}", group="b")
    await stage.send(queue, "free")
    first = await stage.broker.receive_many(queue, 10, wait=0)
    equal([message.body for message in first], ["a1", "b1", "free"])
    await first[1].ack()
    second = await stage.broker.receive_many(queue, 10, wait=0)
    equal([message.body for message in second], ["b2"])
    await first[0].release()
    equal((await stage.next(queue)).body, "a1")


@needs(Feature.GROUPS)
async def check_one_batch_does_not_break_a_group(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_many(queue, range(5), group="g")
    for body in range(5):
        (message,) = await stage.broker.receive_many(queue, 5, wait=0)
        equal(message.body, body)
        await message.ack()


@needs(Feature.GROUPS, Feature.DELAY)
async def check_a_failing_head_blocks_its_group(stage: Stage) -> None:
    queue = await stage.queue(group_failure="block")
    await stage.send(queue, 1, 2, group="g")
    await stage.send(queue, 3, group="h")
    for _ in "gh":
        await (await stage.next(queue)).nack(delay=5)
    await stage.send(queue, 4, group="h")
    await stage.nothing(queue)
    await stage.advance(5)
    equal(await stage.drain(queue), [1, 2, 3, 4])


@needs(Feature.GROUPS, Feature.DELAY)
async def check_a_message_whose_turn_comes_before_it_is_due_waits(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, group="g")
    await stage.send(queue, 2, group="g", delay=5)
    await stage.send(queue, 3, group="g")
    equal(await stage.drain(queue), [1])
    await stage.advance(5)
    equal(await stage.drain(queue), [2, 3])


@needs(Feature.GROUPS, Feature.DELAY)
async def check_a_failing_head_is_skipped_where_the_queue_says_so(stage: Stage) -> None:
    queue = await stage.queue(group_failure="skip")
    await stage.send(queue, 1, 2, 3, group="g")
    await (await stage.next(queue)).nack(delay=5)
    second = await stage.next(queue)
    equal(second.body, 2)
    await stage.advance(5)
    await stage.nothing(queue)  # it is due, but its group is at work
    await second.ack()
    equal(await stage.drain(queue), [1, 3])
    await stage.send(queue, 4, group="g")
    await (await stage.next(queue)).nack(delay=5)
    await stage.send(queue, 5, group="g")
    equal(await stage.drain(queue), [5])


@needs(Feature.GROUPS, Feature.DELAY, Feature.LEASES, Feature.FENCING)
async def check_a_lease_that_ran_out_is_not_extended_once_its_group_has_gone_on(stage: Stage) -> None:
    queue = await stage.queue(group_failure="skip", lease=5)
    await stage.send(queue, 1, 2, group="g")
    await (await stage.next(queue)).nack(delay=6)
    slow = await stage.next(queue)
    await stage.advance(6)
    head = await stage.next(queue)
    equal((slow.body, head.body), (2, 1))
    await raises(LeaseLost, slow.extend(5))
    await head.ack()
    equal(await stage.drain(queue), [2])


@needs(Feature.GROUPS)
async def check_a_group_goes_on_behind_a_dead_letter(stage: Stage) -> None:
    queue = await stage.queue(group_dead="continue")
    await stage.send(queue, 1, 2, group="g")
    await (await stage.next(queue)).reject("poison")
    equal(await stage.drain(queue), [2])


@needs(Feature.GROUPS)
async def check_a_group_halts_behind_a_dead_letter_until_it_is_resumed(stage: Stage) -> None:
    queue = await stage.queue(group_dead="halt")
    await stage.send(queue, 1, 2, group="g")
    await stage.send(queue, "other", group="h")
    await (await stage.next(queue)).reject("poison")
    await stage.send(queue, 3, group="g")
    equal(await stage.drain(queue), ["other"])
    await stage.broker.redrive(queue)
    await stage.nothing(queue)
    await stage.broker.resume(queue, group="g")
    equal(await stage.drain(queue), [1, 2, 3])


@needs(Feature.GROUPS, Feature.DEAD_LETTERS, Feature.DELAY, Feature.COUNTERS, Feature.PEEK)
async def check_a_redriven_message_goes_before_the_rest_of_its_group(stage: Stage) -> None:
    queue = await stage.queue()
    *_, last = await stage.send(queue, 1, 2, 3, 4, group="g")
    equal(await stage.broker.cancel(queue, last), True)
    await (await stage.next(queue)).reject("poison")
    await stage.broker.redrive(queue)
    await stage.counted(queue, ready=1, blocked=2)
    await (await stage.next(queue)).reject("poison")
    await (await stage.next(queue)).nack(delay=5)
    await stage.broker.redrive(queue)
    await stage.counted(queue, ready=1, delayed=0, blocked=2)
    equal(await stage.drain(queue), [1])
    await stage.advance(5)
    equal(await stage.drain(queue), [2, 3])


@needs(Feature.GROUPS, Feature.TRANSACTIONS)
async def check_what_a_transaction_sends_to_a_group_follows_the_head_that_it_acks_then(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, group="g")
    (head,) = await stage.broker.receive_many(queue, 1, wait=0)
    async with stage.broker.transaction() as tx:
        await tx.send_to_queue(queue, 2, group="g")
        await tx.ack(head)
    equal(await stage.drain(queue), [2])


@needs(Feature.GROUPS, Feature.FENCING)
async def check_a_group_whose_head_was_lost_starts_with_it_again(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1, 2, group="g")
    lost = await stage.next(queue)
    await stage.advance(6)
    again = await stage.next(queue)
    equal((again.body, again.attempt), (1, 2))
    await raises(LeaseLost, lost.ack())
    await stage.nothing(queue)
    await again.ack()
    equal(await stage.drain(queue), [2])


@needs(Feature.DELAY)
async def check_a_delayed_message_comes_when_it_is_due(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, "later", delay=10)
    await stage.send(queue, "now")
    equal(await stage.drain(queue), ["now"])
    await stage.advance(9.9 - stage.slack)
    await stage.nothing(queue)
    await stage.advance(0.1 + 2 * stage.slack)
    equal(await stage.drain(queue), ["later"])


@needs(Feature.DELAY)
async def check_backoff_grows_to_its_ceiling(stage: Stage) -> None:
    queue = await stage.queue(backoff=Backoff(first=1, factor=2, ceiling=3, jitter=0), max_attempts=9)
    await stage.send(queue, 1)
    for wait in (1, 2, 3, 3):
        await (await stage.next(queue)).nack()
        await stage.advance(max(0, wait - 0.1 - stage.slack))
        await stage.nothing(queue)
        await stage.advance(0.1 + 2 * stage.slack)


@needs(Feature.TTL, Feature.DEAD_LETTERS)
async def check_a_message_that_outlived_its_ttl_is_dead_not_delivered(stage: Stage) -> None:
    queue = await stage.queue(ttl=10)
    await stage.send(queue, "by rule")
    await stage.send(queue, "its own", ttl=100)
    await stage.advance(10 + stage.slack)
    equal(await stage.drain(queue), ["its own"])
    (dead,) = await stage.broker.dead_letters(queue)
    equal((dead.body, dead.reason), ("by rule", "expired"))
    await stage.broker.redrive(queue)
    equal(await stage.drain(queue), ["by rule"])
    await stage.send(queue, "later")
    await stage.advance(10 + stage.slack)
    await stage.nothing(queue)
    equal([letter.body for letter in await stage.broker.dead_letters(queue)], ["later"])


@needs(Feature.DROP)
async def check_a_queue_may_drop_what_expired(stage: Stage) -> None:
    queue = await stage.queue(ttl=10, on_expiry="drop")
    await stage.send(queue, 1, 2)
    await stage.advance(11)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, dropped=2, dead=0)


@needs(Feature.TTL, Feature.GROUPS, Feature.COUNTERS)
async def check_the_messages_of_a_group_that_expire_at_once_are_counted_once(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3, group="g", ttl=5)
    await stage.send(queue, 4, group="g")
    await stage.advance(6)
    equal((await stage.next(queue)).body, 4)
    await stage.counted(queue, ready=0, blocked=0, leased=1, dead=3)


@needs(Feature.TTL)
async def check_ttl_never_fires_while_leased(stage: Stage) -> None:
    queue = await stage.queue(ttl=10)
    await stage.send(queue, 1, 2)
    working = await stage.next(queue)
    back = await stage.next(queue)
    await stage.advance(20)
    await stage.nothing(queue)
    await working.ack()
    await back.release()
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, dead=1, acked=1)


@needs(Feature.TTL, Feature.LEASES)
async def check_a_lease_that_ends_after_the_ttl_brings_nothing_back(stage: Stage) -> None:
    queue = await stage.queue(ttl=10, lease=5)
    await stage.send(queue, 1)
    await stage.next(queue)
    await stage.advance(11)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, leased=0, dead=1)


@needs(Feature.TTL, Feature.LEASES)
async def check_however_many_expire_at_once_none_is_delivered(stage: Stage) -> None:
    queue = await stage.queue(max_length=10_000)
    await stage.broker.send_many(queue, range(6_000), ttl=10)
    await stage.send(queue, "fresh")
    await stage.advance(11)
    equal((await stage.next(queue)).body, "fresh")
    await stage.nothing(queue)
