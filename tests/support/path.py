"""What a new learner does, following only the page: one function for each step."""

from collections.abc import Awaitable, Callable

from filao.sandbox.exercise import CHECKS
from filao.sandbox.words import program
from tests.support.learner import Learner

QUEUE = "claims.processing"
SOLUTION = """\
        try:
            await evaluate_claim(message)
            async with message.transaction() as tx:
                await pay(tx, message)
        except Exception as error:
            await message.nack(reason=error)
"""


def with_body(body: str) -> str:
    """Return the skeleton with another body of its loop."""
    head, _, rest = program("my_consumer").partition("        # 1.")
    return head + body + "\n\n# What follows" + rest.partition("# What follows")[2]


async def create(learner: Learner) -> None:
    await learner.act("create")
    await learner.sees("created")
    with learner.broker() as broker:
        assert [queue.name for queue in broker.queues()] == [QUEUE]


async def send(learner: Learner) -> None:
    await learner.act("send_few")
    await learner.sees("nobody", "sent", "answered", "waiting")
    assert learner.stats().ready == 5
    claims = await learner.page.eval_on_selector_all(".chip", "all => all.map(one => one.dataset.claim).sort()")
    assert claims == ["1", "2", "3", "4", "5"]
    with learner.broker() as broker:
        assert [message.body["claim_id"] for message in broker.peek(QUEUE)] == [1, 2, 3, 4, 5]


async def one(learner: Learner) -> None:
    await learner.act("one_consumer")
    await learner.sees("one_consumer", "paid", "in_order")


async def three(learner: Learner) -> None:
    await learner.act("three_consumers")
    await learner.sees("three_consumers", "overtaken", "paid", "shared")


async def kill(learner: Learner) -> None:
    await learner.act("long_claims")
    await learner.page.wait_for_selector(".hint.kill")
    await learner.above_the_fold()
    await learner.act("kill")
    await learner.sees("killed", "taken_over", "finished")
    assert learner.stats().lost >= 1


async def poison(learner: Learner) -> None:
    await learner.act("poison")
    await learner.sees("retried", "dead")
    with learner.broker() as broker:
        (letter,) = broker.dead_letters(QUEUE)
    assert (letter.reason, letter.attempts) == ("max_attempts", 3)
    await learner.page.wait_for_selector(".hint.mend")
    await learner.above_the_fold()
    await learner.act("mend")
    await learner.sees("redriven", "mended")


async def guarantees(learner: Learner) -> None:
    for guarantee, condition in (("at-most-once", "lost"), ("at-least-once", "doubled"), ("exactly-once", "exact")):
        await learner.act(f"try_{guarantee}")
        await learner.sees(condition)
        if condition == "lost":  # acknowledged before the work, it is gone, and the stages say so
            await learner.page.wait_for_selector(".stages li:nth-child(6).now")
    assert "✖" in await learner.page.inner_text(".verdict")


async def zombie(learner: Learner) -> None:
    await learner.act("short_lease")
    await learner.page.wait_for_selector(".hint.pause")
    await learner.above_the_fold()
    await learner.act("pause")
    await learner.page.wait_for_selector(".hint.wake")
    await learner.above_the_fold()
    await learner.page.wait_for_selector(".timeline .lease-end")
    await learner.act("wake")
    await learner.sees("taken_over", "refused", "safe")


async def groups(learner: Learner) -> None:
    await learner.act("groups")
    await learner.page.wait_for_selector(".chip.locked")
    await learner.sees("grouped", "competing", "ordered")


async def documents(learner: Learner) -> None:
    await learner.act("documents")
    await learner.page.wait_for_selector(".chip.note")
    await learner.sees("documents", "paid", "letters")
    assert len(list(learner.room.parent.glob("letter-*.txt"))) == 5


async def implement(learner: Learner) -> None:
    await learner.write(with_body(SOLUTION))
    assert await learner.checks() == dict.fromkeys(CHECKS, "green")


PATH: tuple[Callable[[Learner], Awaitable[None]], ...] = (
    *(create, send, one, three, kill, poison, guarantees, zombie, groups, documents, implement),
)
