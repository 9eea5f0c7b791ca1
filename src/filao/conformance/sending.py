"""What is stored and what is refused: duplicates, limits, wrong arguments, typed bodies."""

import asyncio
import dataclasses
import math
from collections.abc import Awaitable
from typing import Any

from filao.broker import Broker
from filao.conformance.stage import Stage, equal, needs, raises
from filao.engine import Feature
from filao.errors import ConfigurationError, MessageNotEncodable, MessageTooLarge, QueueFull, QueueNotFound
from filao.queue import Queue


@needs(Feature.DEDUPLICATION)
async def check_a_duplicate_send_returns_the_first_id(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=60)
    first = await stage.broker.send_to_queue(queue, 1, dedup_key="claim-7")
    again = await stage.broker.send_to_queue(queue, 2, dedup_key="claim-7")
    other = await stage.broker.send_to_queue(queue, 3, dedup_key="claim-8")
    equal((first.duplicate, again.duplicate, other.duplicate), (False, True, False))
    equal(again.id, first.id)
    equal(await stage.drain(queue), [1, 3])
    equal((await stage.broker.stats(queue)).duplicates, 1)


@needs(Feature.DEDUPLICATION)
async def check_a_key_is_remembered_while_pending_and_for_its_window_after(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=5, lease=100)
    await stage.send(queue, 1, dedup_key="k")
    await stage.advance(8)
    message = await stage.next(queue)
    await stage.advance(8)
    equal((await stage.broker.send_to_queue(queue, 2, dedup_key="k")).duplicate, True)
    await message.ack()
    await stage.advance(4.9 - stage.slack)
    equal((await stage.broker.send_to_queue(queue, 2, dedup_key="k")).duplicate, True)
    await stage.advance(0.1 + 2 * stage.slack)
    equal((await stage.broker.send_to_queue(queue, 2, dedup_key="k")).duplicate, False)


@needs(Feature.DEDUPLICATION)
async def check_a_send_repeated_with_its_message_id_is_stored_once(stage: Stage) -> None:
    queue = await stage.queue()
    first = await stage.broker.send_to_queue(queue, 1, message_id="claim-7")
    again = await stage.broker.send_to_queue(queue, 1, message_id="claim-7")
    equal((first.id, again.id, again.duplicate), ("claim-7", "claim-7", True))
    message = await stage.next(queue)
    equal(message.id, "claim-7")
    await message.ack()
    equal((await stage.broker.send_to_queue(queue, 1, message_id="claim-7")).duplicate, True)


@needs(Feature.DEDUPLICATION)
async def check_concurrent_duplicates_are_stored_once(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.connect() as other:
        sends = [
            broker.send_to_queue(queue.name, 1, dedup_key="k") for broker in (stage.broker, other) for _ in range(20)
        ]
        receipts = await asyncio.gather(*sends)
    equal(sum(not receipt.duplicate for receipt in receipts), 1)
    equal(len({receipt.id for receipt in receipts}), 1)


@needs()
async def check_a_body_at_its_limit_passes_and_one_above_does_not(stage: Stage) -> None:
    queue = await stage.queue(body_max=1000)
    await stage.send(queue, b"x" * 1000, "x" * 998)
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, b"x" * 1001), queue.name, "1,001", "1,000")
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue.name, "x" * 999), queue.name)
    await raises(MessageTooLarge, stage.broker.send_many(queue, [1, "x" * 999]))
    await stage.counted(queue, ready=2, sent=2)


@needs()
async def check_headers_have_limits(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_to_queue(queue, 1, headers={f"h{number}": "" for number in range(64)})
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, 1, headers={str(n): "" for n in range(65)}), "64")
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, 1, headers={"h": "x" * 8200}), "8,192")
    wrong: Any = {"h": 1}
    await raises(MessageNotEncodable, stage.broker.send_to_queue(queue, 1, headers=wrong), "'h'")


@needs()
async def check_what_json_cannot_hold_is_refused(stage: Stage) -> None:
    queue = await stage.queue()
    cycle: list[Any] = []
    cycle.append(cycle)
    for body in (object(), {"a": {1j}}, math.nan, {"deep": [math.inf]}, cycle, "\ud800"):
        await raises(MessageNotEncodable, stage.broker.send_to_queue(queue, body), queue.name)
    await stage.counted(queue, ready=0, sent=0)


@needs()
async def check_an_undeclared_queue_is_not_found_and_its_neighbours_are_named(stage: Stage) -> None:
    queue = await stage.queue()
    near = queue.name + "x"
    broker = stage.broker
    calls: list[Awaitable[Any]] = [broker.send_to_queue(near, 1), broker.receive_from_queue(near, wait=0)]
    calls += [broker.stats(near), broker.peek(near, state="dead"), broker.purge(near), broker.redrive(near)]
    if Feature.PAUSE in broker.features:
        calls += [broker.pause(near), broker.cancel(near, "1")]
    for call in calls:
        await raises(QueueNotFound, call, repr(near), repr(queue.name))


@needs()
async def check_wrong_arguments_are_named(stage: Stage) -> None:
    queue = await stage.queue()
    broker, name = stage.broker, queue.name
    wrong: Any
    for argument, wrong in (
        *(("delay", value) for value in (-1, math.nan, math.inf, "5", None, True)),
        *(("ttl", value) for value in (0, -1, math.nan, "5")),
        *(("priority", value) for value in (1.5, "1", None, True, 10**9)),
        *(("group", value) for value in ("", "x" * 257, 7, "\0", "\ud800")),
        *(("dedup_key", value) for value in ("", "x" * 257, 7)),
        *(("message_id", value) for value in ("", "x" * 257, 7)),
    ):
        await raises(ConfigurationError, broker.send_to_queue(name, 1, **{argument: wrong}), name, argument)
    for argument, wrong in (("wait", -1), ("wait", "1"), ("lease", 0), ("lease", -5), ("lease", 10**9)):
        await raises(ConfigurationError, broker.receive_from_queue(name, **{argument: wrong}), name, argument)
    for limit in (0, -1, 1.5, "1", None):
        wrong = limit
        await raises(ConfigurationError, broker.receive_many(name, wrong), name, "limit")
    wrong = "exactly-never"
    await raises(ConfigurationError, broker.receive_from_queue(name, guarantee=wrong), "guarantee")
    for wrong in ("no spaces", "", "x" * 129, "é", "a/b", None, 7):
        await raises(ConfigurationError, broker.send_to_queue(wrong, 1), "queue name")
    await stage.counted(queue, ready=0, sent=0)


@needs(Feature.MAX_LENGTH)
async def check_a_full_queue_refuses(stage: Stage) -> None:
    queue = await stage.queue(max_length=3)
    await stage.send(queue, 1, 2)
    await raises(QueueFull, stage.broker.send_many(queue, [3, 4]), queue.name, "3")
    await stage.send(queue, 3)
    await raises(QueueFull, stage.broker.send_to_queue(queue, 4), queue.name)
    message = await stage.next(queue)
    await raises(QueueFull, stage.broker.send_to_queue(queue, 4))
    await message.ack()
    await stage.send(queue, 4)
    equal(await stage.drain(queue), [2, 3, 4])


@needs(Feature.MAX_LENGTH)
async def check_max_length_is_exact_under_concurrency(stage: Stage) -> None:
    queue = await stage.queue(max_length=25)

    async def send(broker: Broker, body: int) -> bool:
        try:
            await broker.send_to_queue(queue.name, body)
        except QueueFull:
            return False
        return True

    async with stage.connect() as other:
        sends = [send(broker, body) for body in range(30) for broker in (stage.broker, other)]
        stored = sum(await asyncio.gather(*sends))
    stats = await stage.broker.stats(queue)
    equal((stored, stats.ready, stats.refused), (25, 25, 35))


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS)
async def check_a_full_queue_may_drop_the_oldest_to_the_dead_letters(stage: Stage) -> None:
    queue = await stage.queue(max_length=2, overflow="drop_oldest")
    await stage.send(queue, 1, 2, 3)
    dead = await stage.broker.dead_letters(queue)
    equal([(letter.body, letter.reason) for letter in dead], [(1, "overflow")])
    equal(await stage.drain(queue), [2, 3])


@dataclasses.dataclass(frozen=True)
class Claim:
    """A body type for the checks."""

    claim_id: int
    amount: float = 0.0


@needs()
async def check_a_typed_queue_gives_typed_bodies(stage: Stage) -> None:
    typed = dataclasses.replace(await stage.queue(), body=Claim)
    await stage.broker.declare(typed)
    await stage.broker.send_to_queue(typed, Claim(7, 12.5))
    message = await stage.broker.receive_from_queue(typed, wait=0)
    equal(message and message.body, Claim(7, 12.5))


@needs()
async def check_a_body_of_another_type_is_not_sent(stage: Stage) -> None:
    typed = Queue((await stage.queue()).name, Claim)
    wrong: Any
    for wrong in ({"claim_id": "seven"}, {}, 7, b"raw", None):
        await raises(MessageNotEncodable, stage.broker.send_to_queue(typed, wrong), typed.name, "Claim")


@needs(Feature.DEAD_LETTERS)
async def check_a_body_that_does_not_fit_the_type_is_dead_as_malformed(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, {"claim_id": "seven"}, {"claim_id": 8}, b"raw", {"claim_id": 9})
    typed = Queue(queue.name, Claim)
    message = await stage.broker.receive_from_queue(typed, wait=0)
    equal(message and message.body, Claim(8))
    message = await stage.broker.receive_from_queue(typed, wait=0, guarantee="at-most-once")
    equal(message and message.body, Claim(9))
    dead = await stage.broker.dead_letters(queue)
    equal(
        [(letter.body, letter.reason) for letter in dead], [({"claim_id": "seven"}, "malformed"), (b"raw", "malformed")]
    )
    equal("claim_id" in dead[0].error, True)
