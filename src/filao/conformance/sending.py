"""What is stored and what is refused: duplicates, limits, wrong arguments, typed bodies."""

import asyncio
import dataclasses
import math
from collections.abc import Awaitable
from contextlib import AsyncExitStack, suppress
from typing import Any

from filao.broker import Broker
from filao.conformance.stage import Stage, equal, needs, raises
from filao.draft import Outgoing
from filao.engine import Feature, Receipt
from filao.errors import (
    ConfigurationError,
    MessageError,
    MessageNotEncodable,
    MessageTooLarge,
    QueueFull,
    QueueNotFound,
)
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
    await stage.counted(queue, ready=0, duplicates=1)


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


@needs(Feature.DEDUPLICATION, Feature.DEAD_LETTERS)
async def check_the_key_of_a_dead_letter_is_not_remembered_anew_when_that_is_discarded(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=5)
    dead = await stage.broker.send_to_queue(queue, 1, dedup_key="k", message_id="claim-7")
    await (await stage.next(queue)).reject("no such policy")
    await stage.advance(4.9 - stage.slack)
    equal(await stage.broker.discard(queue, ids=[dead.id]), 1)
    equal((await stage.broker.send_to_queue(queue, 2, dedup_key="k")).duplicate, True)
    await stage.advance(0.1 + 2 * stage.slack)
    equal((await stage.broker.send_to_queue(queue, 2, dedup_key="k")).duplicate, False)
    equal((await stage.broker.send_to_queue(queue, 2, message_id="claim-7")).duplicate, True)  # it was its name


@needs(Feature.DEDUPLICATION, Feature.DEAD_LETTERS)
async def check_the_key_of_a_redriven_message_is_remembered_while_that_is_pending(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=5)
    (first,) = await stage.send(queue, 1, dedup_key="k")
    await (await stage.next(queue)).reject("no such policy")
    await stage.broker.redrive(queue)
    await stage.advance(6)
    again = await stage.broker.send_to_queue(queue, 2, dedup_key="k")
    equal((again.id, again.duplicate), (first, True))


@needs(Feature.DEDUPLICATION, Feature.DEAD_LETTERS)
async def check_a_redriven_message_leaves_its_key_to_the_one_that_has_taken_it(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=5)
    await stage.send(queue, 1, dedup_key="k")
    await (await stage.next(queue)).reject()
    await stage.advance(6)
    await stage.send(queue, 2, dedup_key="k")
    await stage.broker.redrive(queue)
    redriven = await stage.next(queue)
    equal(redriven.body, 1)
    await redriven.ack()
    await stage.advance(6)
    receipt = await stage.broker.send_to_queue(queue, 3, dedup_key="k")
    equal(receipt.duplicate, True)


@needs(Feature.DEDUPLICATION)
async def check_a_send_repeated_with_its_message_id_is_stored_once(stage: Stage) -> None:
    queue = await stage.queue(dedup_window=5)
    first = await stage.broker.send_to_queue(queue, 1, message_id="claim-7")
    again = await stage.broker.send_to_queue(queue, 1, message_id="claim-7")
    equal((first.id, again.id, again.duplicate), ("claim-7", "claim-7", True))
    message = await stage.next(queue)
    equal(message.id, "claim-7")
    await message.ack()
    equal((await stage.broker.send_to_queue(queue, 1, message_id="claim-7")).duplicate, True)
    await stage.advance(6)
    equal((await stage.broker.send_to_queue(queue, 1, message_id="claim-7")).duplicate, False)


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


def _named(*keys: tuple[str | None, str | None]) -> list[Outgoing[int]]:
    """Return a message for each dedup_key and message_id."""
    return [Outgoing(1, dedup_key=dedup_key, message_id=message_id) for dedup_key, message_id in keys]


def _new(receipts: list[Receipt]) -> list[bool]:
    return [not receipt.duplicate for receipt in receipts]


@needs()
async def check_messages_of_one_send_have_terms_of_their_own(stage: Stage) -> None:
    queue = await stage.queue()
    own = [Outgoing(1, headers={"by": "itself"}), 2, Outgoing(3, message_id="three")]
    receipts = await stage.broker.send_many(queue, own, headers={"by": "the call"})
    equal(receipts[2].id, "three")
    messages = await stage.broker.receive_many(queue, 9, wait=0)
    while len(messages) < len(own):
        messages.append(await stage.back(queue))
    by = {message.body: message.headers for message in messages}
    equal(by, {1: {"by": "itself"}, 2: {"by": "the call"}, 3: {}})
    for message in messages:
        await message.ack()


@needs(Feature.DEDUPLICATION, Feature.ATOMIC)
async def check_only_what_is_new_claims_its_keys_for_those_behind_it_in_one_send(stage: Stage) -> None:
    queue = await stage.queue()
    receipts = await stage.broker.send_many(queue.name, _named(("a", "1"), ("a", "2"), ("b", "2")))
    equal((_new(receipts), [receipt.id for receipt in receipts]), ([True, False, True], ["1", "1", "2"]))
    receipts = await stage.broker.send_many(queue.name, _named((None, "3"), ("c", "3"), ("c", None)))
    equal((_new(receipts), receipts[1].id), ([True, False, True], "3"))
    receipts = await stage.broker.send_many(queue.name, _named(("d", None), (None, "4"), ("d", "4"), ("a", "4")))
    equal((_new(receipts), receipts[2].id, receipts[3].id), ([True, True, False, False], receipts[0].id, "1"))
    equal((await stage.broker.stats(queue)).ready, 6)


@needs(Feature.DEDUPLICATION, Feature.ATOMIC, Feature.MAX_LENGTH)
async def check_a_full_queue_counts_of_a_send_what_would_be_stored(stage: Stage) -> None:
    for named in (
        _named(("a", "1"), ("a", "2"), ("b", "2")),
        _named((None, "1"), ("c", "1"), ("c", None)),
        _named(("a", None), (None, "1"), ("a", "1")),
    ):
        queue = await stage.queue(max_length=1)
        await raises(QueueFull, stage.broker.send_many(queue.name, named), queue.name, "2")
        equal((await stage.broker.stats(queue)).ready, 0)
        queue = await stage.queue(max_length=2)
        equal(sum(_new(await stage.broker.send_many(queue.name, named))), 2)
        equal((await stage.broker.stats(queue)).ready, 2)
        equal(_new(await stage.broker.send_many(queue.name, named[:2])).count(True), 0)


@needs(Feature.DEDUPLICATION, Feature.ATOMIC, Feature.MAX_LENGTH, Feature.DEAD_LETTERS)
async def check_what_is_dropped_to_make_room_frees_no_key_for_that_send(stage: Stage) -> None:
    queue = await stage.queue(max_length=1, overflow="drop_oldest", dedup_window=0)
    (first,) = await stage.broker.send_many(queue.name, _named(("a", None)))
    receipts = await stage.broker.send_many(queue.name, _named((None, None), ("a", None)))
    equal((_new(receipts), receipts[1].id), ([True, False], first.id))
    stats = await stage.broker.stats(queue)
    equal((stats.ready, stats.dead), (1, 1))


@needs(Feature.ATOMIC)
async def check_ids_can_neither_be_guessed_nor_claimed(stage: Stage) -> None:
    queue = await stage.queue()
    first, second = await stage.send(queue, 1, 2)
    equal(first.rpartition("-")[0] == second.rpartition("-")[0], False)
    for ours in (first, f"{first.rpartition('-')[0]}-999999", "0123456789abcdef-1"):
        await raises(MessageError, stage.broker.send_to_queue(queue, 3, message_id=ours), queue.name, ours, "before it")
    await stage.send(queue, 3, message_id=f"claim-{first}")
    equal([message.id for message in await stage.broker.receive_many(queue, 9, wait=0)][:2], [first, second])


@needs(Feature.DEDUPLICATION, Feature.TTL)
async def check_the_key_of_what_expired_is_free_at_once(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, "old", dedup_key="k", ttl=5)
    await stage.advance(6)
    equal((await stage.broker.send_to_queue(queue, "new", dedup_key="k")).duplicate, False)
    equal((await stage.broker.send_to_queue(queue, "newer", dedup_key="k")).duplicate, True)
    equal(await stage.drain(queue), ["new"])
    equal([letter.body for letter in await stage.broker.dead_letters(queue)], ["old"])


@needs(Feature.DEDUPLICATION, Feature.TTL)
async def check_an_expired_message_keeps_its_own_id_only_while_it_lies_there(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, "old", message_id="claim-7", ttl=5)
    await stage.advance(6)
    equal((await stage.broker.send_to_queue(queue, "new", message_id="claim-7")).duplicate, True)
    equal([letter.id for letter in await stage.broker.dead_letters(queue)], ["claim-7"])


@needs(Feature.DEDUPLICATION, Feature.TTL, Feature.DROP)
async def check_what_was_dropped_frees_its_id(stage: Stage) -> None:
    queue = await stage.queue(on_expiry="drop")
    await stage.send(queue, "old", message_id="claim-7", ttl=5)
    await stage.advance(6)
    equal((await stage.broker.send_to_queue(queue, "new", message_id="claim-7")).duplicate, False)
    equal(await stage.drain(queue), ["new"])


@needs(Feature.MAX_LENGTH, Feature.TTL, Feature.COUNTERS)
async def check_what_expired_makes_room(stage: Stage) -> None:
    queue = await stage.queue(max_length=2)
    await stage.send(queue, 1, 2, ttl=5)
    await raises(QueueFull, stage.broker.send_to_queue(queue, 3), queue.name)
    await stage.advance(6)
    await stage.send(queue, 3, 4)
    await raises(QueueFull, stage.broker.send_to_queue(queue, 5), queue.name)
    equal(await stage.drain(queue), [3, 4])


@needs(Feature.TTL, Feature.COUNTERS, Feature.PEEK)
async def check_what_expired_is_seen_among_the_dead_though_nobody_receives(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, 1, ttl=5)
    await stage.send(queue, 2)
    await stage.advance(6)
    stats = await stage.broker.stats(queue)
    equal((stats.ready, stats.dead, stats.died), (1, 1, 1))
    equal([message.body for message in await stage.broker.peek(queue)], [2])
    equal([(letter.body, letter.reason) for letter in await stage.broker.dead_letters(queue)], [(1, "expired")])


@needs(Feature.DEDUPLICATION)
async def check_concurrent_sends_of_one_message_id_are_stored_once(stage: Stage) -> None:
    queue = await stage.queue()
    async with stage.connect() as other:
        for number in range(10):
            sends = [broker.send_to_queue(queue.name, 1, message_id=f"m{number}") for broker in (stage.broker, other)]
            receipts = await asyncio.gather(*sends)
            equal(sorted(receipt.duplicate for receipt in receipts), [False, True])
            equal({receipt.id for receipt in receipts}, {f"m{number}"})
    await stage.counted(queue, ready=10, sent=10, duplicates=10)


@needs(Feature.DEDUPLICATION, Feature.TRANSACTIONS)
async def check_a_send_waits_for_the_transaction_that_has_sent_the_same(stage: Stage) -> None:
    for commits in (True, False):
        for names in (["message_id"], ["dedup_key"], ["message_id", "dedup_key"]):
            terms: dict[str, Any] = dict.fromkeys(names, "k")
            await _send_beside_a_transaction(stage, terms, commits=commits)


async def _send_beside_a_transaction(stage: Stage, terms: dict[str, Any], *, commits: bool) -> None:
    queue = await stage.queue()
    async with stage.connect() as other, AsyncExitStack() as stack:
        tx = await stack.enter_async_context(stage.broker.transaction())
        first = await tx.send_to_queue(queue.name, 1, **terms)
        waiting = asyncio.ensure_future(other.send_to_queue(queue.name, 2, **terms))
        await asyncio.wait([waiting], timeout=0.1)  # time enough to get to where it has to wait
        equal(waiting.done(), False)
        if commits:
            await stack.aclose()
        else:
            with suppress(ZeroDivisionError):
                await stack.__aexit__(ZeroDivisionError, ZeroDivisionError(), None)
        second = await waiting
    equal(second.duplicate, commits)
    if commits:
        equal(second.id, first.id)
    equal(await stage.drain(queue), [1] if commits else [2])


@needs()
async def check_a_body_at_its_limit_passes_and_one_above_does_not(stage: Stage) -> None:
    queue = await stage.queue(body_max=1000)
    await stage.send(queue, b"x" * 1000, "x" * 998)
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, b"x" * 1001), queue.name, "1,001", "1,000")
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue.name, "x" * 999), queue.name)
    await raises(MessageTooLarge, stage.broker.send_many(queue, [1, "x" * 999]))
    await stage.counted(queue, ready=2, sent=2)


@needs()
async def check_rules_that_are_declared_anew_reach_who_is_sending(stage: Stage) -> None:
    queue = await stage.queue(body_max=1000)
    async with stage.connect() as other:
        await other.send_to_queue(queue.name, 1)
        await stage.broker.declare(dataclasses.replace(queue, body_max=3000))
        for known in (queue.name, queue):
            await other.send_to_queue(known, "x" * 2000)
            await other.send_many(known, ["x" * 2000])
            await raises(MessageTooLarge, other.send_to_queue(known, "x" * 3000), queue.name, "3,000")
    await stage.counted(queue, ready=5, sent=5)


@needs()
async def check_headers_have_limits(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.broker.send_to_queue(queue, 1, headers={f"h{number}": "" for number in range(64)})
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, 1, headers={str(n): "" for n in range(65)}), "64")
    await stage.broker.send_to_queue(queue, 1, headers={"h": "x" * 8184})  # 8,192 bytes, with what JSON adds
    await raises(MessageTooLarge, stage.broker.send_to_queue(queue, 1, headers={"h": "x" * 8185}), "8,192")
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


@needs(Feature.MAX_LENGTH, Feature.DEDUPLICATION, Feature.ATOMIC)
async def check_a_send_that_is_refused_is_counted_with_all_its_messages(stage: Stage) -> None:
    queue = await stage.queue(max_length=2)
    await stage.send(queue, 1, dedup_key="known")
    many = [Outgoing(1, dedup_key="known"), Outgoing(2), Outgoing(3)]
    await raises(QueueFull, stage.broker.send_many(queue, many))
    await stage.counted(queue, ready=1, sent=1, refused=3, duplicates=0)


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
    equal(stored, 25)
    await stage.counted(queue, ready=25, refused=35)


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS)
async def check_a_full_queue_may_drop_the_oldest_to_the_dead_letters(stage: Stage) -> None:
    queue = await stage.queue(max_length=2, overflow="drop_oldest")
    await stage.send(queue, 1, 2, 3)
    dead = await stage.broker.dead_letters(queue)
    equal([(letter.body, letter.reason) for letter in dead], [(1, "overflow")])
    equal(await stage.drain(queue), [2, 3])


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS, Feature.ATOMIC, Feature.GROUPS)
async def check_a_full_queue_drops_the_oldest_of_a_group_one_after_the_other(stage: Stage) -> None:
    queue = await stage.queue(max_length=3, overflow="drop_oldest")
    await stage.broker.send_many(queue, [1, 2, 3], group="a")
    await stage.broker.send_many(queue, [4, 5])
    equal([letter.body for letter in await stage.broker.dead_letters(queue)], [1, 2])
    equal(await stage.drain(queue), [3, 4, 5])


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS, Feature.ATOMIC, Feature.GROUPS)
async def check_a_full_queue_does_not_drop_what_is_blocked_behind_a_lease(stage: Stage) -> None:
    queue = await stage.queue(max_length=3, overflow="drop_oldest")
    await stage.broker.send_many(queue, [1, 2, 3], group="a")
    held = await stage.next(queue)
    await raises(QueueFull, stage.broker.send_to_queue(queue, 4), queue.name, "send later")
    await raises(QueueFull, stage.broker.send_many(queue, [4, 5, 6, 7]), queue.name, "at most 3 at once")
    await held.ack()
    await stage.counted(queue, ready=1, blocked=1, dead=0, died=0)
    equal(await stage.drain(queue), [2, 3])


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS, Feature.GROUPS, Feature.TRANSACTIONS)
async def check_a_full_queue_drops_what_a_transaction_has_let_through(stage: Stage) -> None:
    queue = await stage.queue(max_length=2, overflow="drop_oldest")
    await stage.broker.send_many(queue, [1, 2], group="a")
    (first,) = await stage.broker.receive_many(queue, 1, wait=0)
    async with first.transaction() as transaction:
        await transaction.send_to_queue(queue, 3, group="a")
    await stage.send(queue, 4)
    equal([letter.body for letter in await stage.broker.dead_letters(queue)], [2])


@needs(Feature.MAX_LENGTH, Feature.DEAD_LETTERS, Feature.ATOMIC)
async def check_a_send_that_is_refused_drops_nothing(stage: Stage) -> None:
    queue = await stage.queue(max_length=3, overflow="drop_oldest")
    await stage.send(queue, 1, 2, 3)
    held = await stage.broker.receive_many(queue, 2, wait=0)
    await raises(QueueFull, stage.broker.send_many(queue, [4, 5]), queue.name, "Nothing was stored")
    await stage.counted(queue, ready=1, leased=len(held), dead=0, died=0)
    equal(await stage.drain(queue), [3])


@dataclasses.dataclass(frozen=True)
class Claim:
    """A body type for the checks."""

    claim_id: int
    amount: float = 0.0


@dataclasses.dataclass(frozen=True)
class Larger(Claim):
    """A claim with more than the queue's type knows."""

    documents: int = 0


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
    for wrong in ({"claim_id": 7}, Larger(7), Claim(7, 2**53 + 1)):  # which would come back, but otherwise
        await raises(MessageNotEncodable, stage.broker.send_to_queue(typed, wrong), typed.name, "come back as")
        await raises(MessageNotEncodable, stage.broker.send_many(typed, [Claim(8), wrong]), typed.name, "come back as")
    equal(await stage.broker.receive_from_queue(typed, wait=0), None)


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


@dataclasses.dataclass(frozen=True)
class Touchy(Claim):
    """A claim whose own code raises what it should not, once the queue's type is this."""

    def __post_init__(self) -> None:
        """Refuse some claims, oddly."""
        if self.claim_id in _ODD:
            raise _ODD[self.claim_id]


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class _Stop(BaseException):
    """Ends what runs, as an interrupt does."""


_ODD: dict[int, BaseException] = {7: RuntimeError("boom\0\ud800"), 8: _Unprintable(), 9: _Stop()}


@needs(Feature.DEAD_LETTERS)
async def check_a_body_whose_type_raises_is_dead_as_malformed_and_the_others_come(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *({"claim_id": number} for number in (7, 1, 8, 2)))
    typed = Queue(queue.name, Touchy)
    messages = await stage.broker.receive_many(typed, 4, wait=0)
    equal([message.body.claim_id for message in messages], [1, 2])
    dead = await stage.broker.dead_letters(typed)
    equal([(letter.body, letter.reason) for letter in dead], [({"claim_id": n}, "malformed") for n in (7, 8)])
    equal(["RuntimeError: boom" in dead[0].error, "_Unprintable" in dead[1].error], [True, True])


@needs()
async def check_what_came_with_a_body_whose_type_ends_the_receive_is_given_back(stage: Stage) -> None:
    queue = await stage.queue()
    await stage.send(queue, *({"claim_id": number} for number in (1, 9)))
    try:
        await stage.broker.receive_many(Queue(queue.name, Touchy), 2, wait=0)
    except _Stop:
        back = [await stage.back(queue), await stage.back(queue)]
    else:
        raise AssertionError("what the type raised was swallowed")
    equal(sorted(message.body["claim_id"] for message in back), [1, 9])
    stage.unused(*back)
