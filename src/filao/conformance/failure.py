"""What becomes of a message whose work failed: its place, its attempts, its death and its return."""

from dataclasses import dataclass
from typing import cast

from filao.conformance.stage import Stage, equal, needs, raises
from filao.engine import Feature, State
from filao.errors import ConfigurationError
from filao.queue import Queue


@dataclass(frozen=True)
class Claim:
    """A body with a type."""

    claim_id: int


@needs()
async def check_a_message_that_comes_back_keeps_its_place(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    await (await stage.back(queue)).release()
    await (await stage.back(queue)).nack(delay=0)
    equal(await stage.drain_back(queue), [1, 2, 3])


@needs(Feature.LEASES)
async def check_a_message_whose_lease_ran_out_keeps_its_place(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1, 2, 3)
    await stage.next(queue)
    await stage.advance(6)
    equal(await stage.drain(queue), [1, 2, 3])


@needs()
async def check_what_a_closed_broker_held_comes_back_to_its_place(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    async with stage.connect() as other:
        equal([message.body for message in await other.receive_many(queue.name, 2, wait=0)], [1, 2])
    equal(await stage.drain_back(queue), [1, 2, 3])


@needs()
async def check_each_failure_is_one_attempt(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=3)
    await stage.send(queue, 1)
    for attempt in (1, 2, 3):
        message = await stage.back(queue)
        equal(message.attempt, attempt)
        await message.nack(delay=0)
    await stage.nothing(queue)
    await stage.counted(queue, ready=0, dead=1)


@needs(Feature.DELAY, Feature.PLACE)
async def check_a_failed_message_returns_to_its_place_after_its_delay(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, 2, 3)
    await (await stage.next(queue)).nack(delay=5)
    await (await stage.next(queue)).ack()
    await stage.advance(5)
    equal(await stage.drain(queue), [1, 3])


@needs(Feature.LEASES, Feature.RELEASE)
async def check_release_uses_no_attempt_and_a_lost_lease_uses_one(stage: Stage) -> None:
    queue = await stage.queue(lease=5)
    await stage.send(queue, 1)
    for _ in range(10):
        message = await stage.next(queue)
        equal(message.attempt, 1)
        await message.release()
    await stage.next(queue)
    await stage.advance(6)
    equal((await stage.next(queue)).attempt, 2)


@needs(Feature.DELAY)
async def check_a_release_with_a_delay_comes_back_later_and_uses_no_attempt(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=2)
    await stage.send(queue, "not before tomorrow")
    for _ in range(3):
        message = await stage.next(queue)
        equal(message.attempt, 1)
        await message.release(delay=5)
        await stage.nothing(queue)
        await stage.advance(5 + 2 * stage.slack)
    message = await stage.next(queue)
    await raises(ConfigurationError, message.release(delay=-1), queue.name, "delay is -1")
    await raises(ConfigurationError, message.release(delay=cast("float", None)), queue.name, "delay is None")
    await raises(ConfigurationError, message.nack(delay=-1), queue.name, "delay is -1")
    await message.ack()


@needs(Feature.DELAY, Feature.PLACE, Feature.GROUPS, Feature.COUNTERS)
async def check_a_release_with_a_delay_keeps_its_place_and_its_group_waits(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=1)
    await stage.send(queue, 1, 2, group="g")
    await stage.send(queue, 3)
    await (await stage.next(queue)).release(delay=5)
    equal(await stage.drain(queue), [3])
    await stage.counted(queue, ready=0, delayed=1, blocked=1, released=1, nacked=0)
    await stage.advance(5)
    equal(await stage.drain(queue), [1, 2])


@needs(Feature.GROUPS, Feature.HISTORY)
async def check_spent_attempts_make_a_dead_letter_with_its_history(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=3)
    (name,) = await stage.send(queue, {"claim": 1}, headers={"h": "v"}, group="policy-1")
    for attempt in (1, 2, 3):
        message = await stage.next(queue)
        equal((message.attempt, message.id), (attempt, name))
        await message.nack(delay=0, reason=ValueError(f"failure {attempt}"))
    await stage.nothing(queue)
    (dead,) = await stage.broker.dead_letters(queue)
    equal((dead.id, dead.body, dead.headers, dead.reason), (name, {"claim": 1}, {"h": "v"}, "max_attempts"))
    equal((dead.group, dead.attempts, dead.state), ("policy-1", 3, State.DEAD))
    equal([(failure.attempt, failure.outcome) for failure in dead.history], [(n, "nacked") for n in (1, 2, 3)])
    equal("ValueError: failure 3" in dead.error, True)


@needs(Feature.LEASES, Feature.HISTORY)
async def check_lost_leases_spend_the_attempts_too(stage: Stage) -> None:
    queue = await stage.queue(lease=5, max_attempts=2)
    await stage.send(queue, "crashes everybody")
    for _ in range(2):
        await stage.next(queue)
        await stage.advance(6)
    await stage.nothing(queue)
    (dead,) = await stage.broker.dead_letters(queue)
    equal((dead.reason, [failure.outcome for failure in dead.history]), ("max_attempts", ["lease_expired"] * 2))


@needs(Feature.DEAD_LETTERS)
async def check_a_rejected_message_dies_at_once(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1)
    await (await stage.next(queue)).reject("no such policy")
    (dead,) = await stage.broker.dead_letters(queue)
    equal((dead.reason, dead.error, dead.attempts), ("rejected", "no such policy", 1))


@needs(Feature.DEAD_LETTERS)
async def check_dead_letters_of_a_typed_queue_are_of_its_type(stage: Stage) -> None:
    queue = await stage.queue()
    typed = Queue(queue.name, body=Claim)
    await stage.send(typed, Claim(7))
    await stage.send(queue, {"claim_id": "seven"}, b"\xff")
    for _ in range(3):
        await (await stage.next(queue)).reject("no such policy")
    found = await stage.broker.dead_letters(typed)
    equal([letter.body for letter in found], [Claim(7), {"claim_id": "seven"}, b"\xff"])
    found = await stage.broker.dead_letters(queue.name)
    equal([letter.body for letter in found], [{"claim_id": 7}, {"claim_id": "seven"}, b"\xff"])


@needs(Feature.HISTORY)
async def check_the_history_and_its_errors_are_bounded(stage: Stage) -> None:
    queue = await stage.queue(max_attempts=25)
    await stage.send(queue, 1)
    for attempt in range(1, 26):
        await (await stage.next(queue)).nack(delay=0, reason=f"{attempt} " + "é" * 20_000 + f" end of {attempt}")
    (dead,) = await stage.broker.dead_letters(queue)
    equal([failure.attempt for failure in dead.history], list(range(6, 26)))
    equal(all(len(failure.error.encode()) <= 8 * 1024 for failure in dead.history), True)
    equal(dead.error.endswith("end of 25"), True)


@needs(Feature.DEAD_LETTERS)
async def check_redrive_sends_dead_letters_back_in_order(stage: Stage) -> None:
    queue = await stage.queue()
    ids = await stage.send(queue, 1, 2, 3, 4)
    for _ in range(4):
        await (await stage.next(queue)).reject("not today")
    equal(await stage.broker.redrive(queue, ids=[ids[2]]), 1)
    equal(await stage.broker.redrive(queue, ids=["unknown", ids[2]]), 0)
    equal((await stage.next(queue)).body, 3)
    equal(await stage.broker.redrive(queue, limit=1), 1)
    equal(await stage.broker.redrive(queue), 2)
    message = await stage.next(queue)
    equal((message.body, message.attempt), (1, 1))
    equal(await stage.drain(queue), [2, 4])


@needs(Feature.DEAD_LETTERS)
async def check_redrive_can_mend_a_message_and_keeps_its_history(stage: Stage) -> None:
    queue = await stage.queue()
    (name,) = await stage.send(queue, {"amount": "12O"}, headers={"a": "b"})
    await (await stage.next(queue)).reject("no number")
    equal(await stage.broker.redrive(queue, ids=[name], body={"amount": 120}), 1)
    message = await stage.next(queue)
    equal((message.body, message.id, message.headers), ({"amount": 120}, name, {"a": "b"}))
    await message.reject("still wrong")
    (dead,) = await stage.broker.dead_letters(queue)
    equal(dead.error, "still wrong")
    if Feature.HISTORY in stage.broker.features:
        equal([failure.error for failure in dead.history], ["no number", "still wrong"])
    await raises(ConfigurationError, stage.broker.redrive(queue, body=1), "exactly one id")
