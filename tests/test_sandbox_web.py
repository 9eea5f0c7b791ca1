"""The sandbox as learners use it: in a real browser, through all ten steps, in both languages, and with bad input."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from tests.conftest import missing
from tests.learner import Learner, Sandbox, browser, chromium, learning, sandbox

pytestmark = pytest.mark.anyio

SHOTS = Path(__file__).parents[1] / "build" / "sandbox"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Run a sandbox for all tests that do not end it."""
    if chromium() is None:
        missing("Chromium")
    with sandbox(tmp_path_factory.mktemp("sandbox") / "files") as running:
        yield running


@pytest.fixture
async def chrome() -> AsyncGenerator[Browser]:
    async with browser() as opened:
        yield opened


@pytest.fixture
async def learner(chrome: Browser, served: Sandbox) -> AsyncGenerator[Learner]:
    async with learning(chrome, served) as somebody:
        yield somebody
        assert somebody.complaints == []


# --- the lesson ------------------------------------------------------------------------------------------------------


async def test_learners_of_both_languages_go_through_all_ten_steps_each_in_a_room_of_their_own(chrome, served) -> None:
    async with learning(chrome, served, "en") as english, learning(chrome, served, "fr") as french:
        assert english.room != french.room
        async with asyncio.TaskGroup() as learners:
            learners.create_task(go_through(english))
            learners.create_task(go_through(french))
        assert english.complaints + french.complaints == []


async def go_through(learner: Learner) -> None:
    """Do all ten steps as a learner would, and see after each what the page and the broker say."""
    await learner.press("header select")
    await learner.page.select_option("header select", "4")
    for number, step in enumerate((create, send, one, three, kill, poison, guarantees, zombie, groups, documents), 1):
        await learner.go(number)
        await learner.predict(1 + number % 3)
        await step(learner)
        why = await learner.has_done()
        assert len(why) > 80
        await learner.shoot(SHOTS, f"step-{number:02}")
    done = await learner.page.eval_on_selector_all(".numbers button.done", "buttons => buttons.length")
    assert done == 10
    await sums_hold(learner)


async def sums_hold(learner: Learner) -> None:
    """Find the invariants on the page, and the same in the broker."""
    await learner.until("document.querySelector('.sums .sum .verdict').textContent === '✓'")
    stats = learner.stats()
    gone = stats.acked + stats.purged + stats.cancelled
    assert stats.sent == stats.ready + stats.delayed + stats.blocked + stats.leased + stats.dead + gone


async def create(learner: Learner) -> None:
    await learner.act()
    await learner.sees("created")
    with learner.broker() as broker:
        assert [queue.name for queue in broker.queues()] == ["claims.processing"]


async def send(learner: Learner) -> None:
    await learner.act()
    await learner.sees("nobody", "sent", "answered", "waiting")
    assert learner.stats().ready == 5
    assert await learner.page.locator(".queue .slots li .chip").count() == 5
    assert "ms" in await learner.page.inner_text(".portal")


async def one(learner: Learner) -> None:
    await learner.act()
    await learner.sees("one_worker", "paid", "in_order")
    assert learner.stats().acked >= 5


async def three(learner: Learner) -> None:
    await learner.act()
    await learner.sees("three_workers", "paid", "shared", "disorder")
    assert await learner.page.locator(".card[data-worker]").count() == 3


async def kill(learner: Learner) -> None:
    await learner.act()
    await learner.page.wait_for_selector(".card.working .hold .chip")
    await learner.press(".card.working .danger >> nth=0")
    await learner.sees("killed", "taken_over", "finished")
    assert learner.stats().lost >= 1


async def poison(learner: Learner) -> None:
    await learner.act()
    await learner.sees("retried", "dead")
    with learner.broker() as broker:
        (letter,) = broker.dead_letters("claims.processing")
    assert (letter.reason, letter.attempts) == ("max_attempts", 3)
    assert "policy 0 is not in the register" in letter.error
    await learner.tab("dead_letters")
    mended = str(letter.body).replace("'policy': 0", "'policy': 12").replace("'", '"')
    await learner.page.fill(".letters textarea", mended)
    await learner.page.press(".letters textarea", "Tab")
    await learner.press(".letters li button:nth-child(2)")
    await learner.sees("redriven", "mended")
    with learner.broker() as broker:
        assert broker.dead_letters("claims.processing") == []
    await learner.tab("ledger")


async def guarantees(learner: Learner) -> None:
    for place, condition in enumerate(("lost", "doubled", "exact"), 1):
        await learner.act(place)
        await learner.sees(condition)
    table = await learner.page.inner_text(".lesson table")
    wanted = ("lost", "twice", "once") if learner.language == "en" else ("perdu", "deux fois", "une fois")
    assert all(word in table for word in wanted)
    ledger = await learner.page.inner_text(".ledger")
    assert ("paid twice" if learner.language == "en" else "payés deux fois") in ledger
    await learner.press(".ledger .cause >> nth=0")  # the timeline shows what explains it
    await learner.page.wait_for_selector(".timeline .focus")
    await learner.press(".timeline .legend button")
    await learner.until("!document.querySelector('.timeline .focus')")


async def zombie(learner: Learner) -> None:
    await learner.act()
    card = learner.page.locator(".card.working").first
    await card.locator(".hold .chip").wait_for()
    worker = await card.get_attribute("data-worker")
    await learner.press(f"[data-worker='{worker}'] .acts button:nth-child(2)")
    await learner.sees("taken_over")
    await learner.press(f"[data-worker='{worker}'] .acts button:nth-child(2)")
    await learner.sees("refused", "safe")


async def groups(learner: Learner) -> None:
    await learner.act()
    await learner.sees("grouped", "competing", "ordered")


async def documents(learner: Learner) -> None:
    await learner.act()
    await learner.sees("documents", "paid", "letters")
    with learner.broker() as broker:
        assert broker.stats("documents").acked >= 5
    letters = list(learner.room.parent.glob("letter-*.txt"))
    assert len(letters) >= 5
    assert "euros are on their way" in letters[0].read_text()
