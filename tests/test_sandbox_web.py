"""The sandbox as learners use it: in a real browser, through all eleven steps, in both languages, and with bad
input.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.async_api import Browser

import filao
from filao.sandbox.steps import STEPS
from filao.sandbox.web.server import _Server
from filao.sandbox.words import lesson, program
from tests.conftest import missing
from tests.support.learner import AXE, TABS, TOKEN, Learner, Sandbox, browser, chromium, learning, sandbox, until_soon
from tests.support.path import PATH, QUEUE, SOLUTION, kill, with_body

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "build" / "sandbox"
SOCKETS = """
    window.sockets = [];
    window.WebSocket = class extends WebSocket { constructor(...all) { super(...all); sockets.push(this); } };
"""
ROOMS = 12  # more than linger from one test to the next, so that none waits for the rooms of those before
SPEED = "5"  # times as fast as for people: what is seen in each step is the same, by construction


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Run a sandbox for all tests that do not end it."""
    if chromium() is None:
        missing("Chromium")
    with sandbox(tmp_path_factory.mktemp("sandbox") / "files", "--speed", SPEED, rooms=ROOMS) as running:
        yield running


@pytest.fixture(scope="module")
async def chrome() -> AsyncGenerator[Browser]:
    """Run one browser for all tests; each opens its page in a context of its own."""
    async with browser() as opened:
        yield opened


@pytest.fixture
async def learner(chrome: Browser, served: Sandbox) -> AsyncGenerator[Learner]:
    async with learning(chrome, served) as somebody:
        yield somebody
        assert somebody.complaints == []


# --- the lesson ------------------------------------------------------------------------------------------------------


async def test_a_learner_who_does_only_what_the_page_says_completes_all_eleven_steps(chrome, served) -> None:
    async with (
        learning(chrome, served, "en", bypass_csp=False) as english,
        learning(chrome, served, "fr", bypass_csp=False) as french,
        asyncio.TaskGroup() as learners,  # mostly they wait
    ):
        learners.create_task(completes(english))
        learners.create_task(completes(french))


async def completes(learner: Learner) -> None:
    await learner.predict(1)
    for number, step in enumerate(PATH, 1):
        await step(learner)
        assert len(await learner.has_done()) > 80
        await learner.above_the_fold()
        await learner.shoot(SHOTS, f"step-{number:02}")
        await learner.presents()
        if number < len(PATH):
            await learner.press(".next.strong")
    await learner.page.wait_for_selector(".numbers .done >> nth=10")
    await learner.press(".next.strong")
    await learner.page.wait_for_selector(".proved .done >> nth=10")
    assert "…" not in await learner.page.inner_text(".proved")
    assert learner.complaints == []
    sums_hold(learner)


def sums_hold(learner: Learner) -> None:
    stats = learner.stats()
    gone = stats.acked + stats.purged + stats.cancelled
    assert stats.sent == stats.ready + stats.delayed + stats.blocked + stats.leased + stats.dead + gone


async def test_a_step_can_be_repeated_and_is_judged_anew(learner) -> None:
    await learner.go(4)
    for _ in range(2):
        await learner.act("three_consumers")
        await learner.page.wait_for_selector("[data-condition=paid]:not(.met)")
        told = await learner.has_done()
    await learner.press("[data-do=one]")
    await learner.page.wait_for_selector(".sums >> text=25 acknowledged")
    assert await learner.has_done() == told  # what was explained stays as it was


async def test_a_step_that_did_not_happen_says_what_to_do(learner) -> None:
    await learner.go(5)
    await learner.act("long_claims")
    await learner.page.wait_for_selector(".hint.kill")
    await learner.page.wait_for_selector(".stage [data-act=kill] >> nth=2")
    await learner.press(".controls .group:nth-child(2) button >> nth=0")  # what waits is purged, and then nobody works
    for _ in range(3):
        await learner.press("[data-do=remove]")
    await learner.page.wait_for_selector(".stage >> text=No consumer.")
    await learner.press(".controls .group:nth-child(2) button >> nth=0")
    await learner.page.wait_for_selector(".hint.missed")
    assert "Prepare the scene again" in await learner.page.inner_text(".hint")
    await kill(learner)
    await learner.has_done()


async def test_a_prediction_is_acknowledged_when_it_is_made(learner) -> None:
    assert await learner.page.locator(".option.on").count() == 0
    await learner.predict(2)
    await learner.page.wait_for_selector(".noted >> text=Noted")
    await learner.act()
    await learner.page.wait_for_selector(".noted >> text=Your prediction was right")


async def test_progress_is_kept_when_the_page_is_opened_anew(learner) -> None:
    await learner.predict(2)  # before: of a step that is done the other answers are gone
    await learner.act("create")
    await learner.has_done()
    await learner.go(2)
    await learner.until("(localStorage.getItem('filao-lesson') || '').includes('\"current\":1')")
    await learner.page.reload()
    await learner.page.wait_for_selector(".lesson[data-step=send]")
    await learner.page.wait_for_selector(".numbers li:nth-child(1) .done")
    await learner.press("header a")  # the other language, the same room
    await learner.until("document.documentElement.lang === 'fr'")
    await learner.page.wait_for_selector(".numbers li:nth-child(1) .done")
    assert learner.stats().sent == 0


async def test_another_room_prints_what_was_proved_in_the_one_before(learner, served) -> None:
    await learner.go(2)
    await learner.act("send_few")
    await learner.has_done()
    await learner.until("(localStorage.getItem('filao-lesson') || '').includes('answer_ms')")
    await learner.page.context.clear_cookies()
    await learner.page.goto(f"{served.url}en?token={TOKEN}")
    await learner.go(11)
    await learner.press(".next")
    assert re.search(r"took [\d.]+\sms", await learner.page.inner_text(".proved .done"))


async def test_the_sheet_is_printed_dark_on_light_whatever_the_theme(learner) -> None:
    await learner.press(".theme")
    await learner.page.wait_for_selector("html[data-theme=dark]")
    await learner.go(11)
    await learner.press(".next")
    await learner.page.wait_for_selector(".paper")
    await learner.page.emulate_media(media="print", color_scheme="dark")
    ink, ground = await learner.page.evaluate(
        "(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert (ink, ground) == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")


async def test_a_page_that_lost_its_connection_shows_each_event_once(learner) -> None:
    await learner.page.add_init_script(SOCKETS)
    await learner.page.reload()
    await learner.press(".start")
    await learner.go(2)
    await learner.act("send_few")
    await learner.has_done()
    await learner.tab("slow")
    await learner.page.wait_for_selector(".count >> text=/ 10")
    await learner.page.evaluate("sockets.at(-1).close()")
    await learner.page.wait_for_selector(".notice.lost")
    await learner.page.wait_for_selector(".notice.lost", state="detached")
    await learner.tab("timeline")
    await learner.press("[data-do=one]:enabled")
    await learner.tab("slow")
    await learner.page.wait_for_selector(".count >> text=/ 12")


async def test_a_teacher_presents_with_the_arrow_keys(learner) -> None:
    await learner.press(".present")
    await learner.page.wait_for_selector(".strip[data-step=create]")
    assert await learner.page.locator(".lesson").count() == 0
    for beat in ("Predict", "Do", "See", "Why"):
        await learner.page.keyboard.press("ArrowRight")
        await learner.page.wait_for_selector(f".beats .on >> text={beat}")
    await learner.page.keyboard.press("ArrowRight")
    await learner.page.wait_for_selector(".strip[data-step=send]")
    await learner.page.keyboard.press("ArrowLeft")
    await learner.page.wait_for_selector(".strip[data-step=create]")
    await learner.page.keyboard.press("Escape")
    await learner.page.wait_for_selector(".lesson")


# --- what is under the stage -----------------------------------------------------------------------------------------


async def test_slow_motion_steps_through_what_happened_with_the_row_before_and_after(learner) -> None:
    await learner.go(3)
    await learner.act("one_consumer")
    await learner.has_done()
    await learner.tab("slow")
    await learner.page.wait_for_selector(".stages .now >> text=Send")
    assert "no row" in await learner.page.inner_text(".row tbody tr >> nth=1")
    await learner.press(".slow-bar button >> nth=3")
    await learner.page.wait_for_selector(".stages .now >> text=Store")
    assert "ready" in await learner.page.inner_text(".row tbody tr >> nth=1")
    await learner.press(".slow-bar button >> nth=4")  # to the end
    await learner.page.wait_for_selector(".stages .now >> text=Delete")
    assert "no row" in await learner.page.inner_text(".row tbody tr >> nth=1")
    await learner.press(".slow-bar button >> nth=1")
    await learner.page.wait_for_selector(".stages .now >> text=Acknowledge")
    assert "leased" in await learner.page.inner_text(".row tbody tr >> nth=0")


async def test_in_slow_motion_a_send_comes_before_the_delivery_that_was_written_down_first(learner) -> None:
    told = await learner.page.evaluate("""async () => {
      const { frames } = await import("/static/slow.js");
      const move = (what, id, at) => ({ what, id, at, claim: 1, lane: 1, attempt: 1, row: "{}" });
      return frames([move("received", "a", 1), move("sent", "b", 2), move("sent", "a", 3), move("acked", "a", 4)])
        .map((frame) => [frame.what, frame.id, frame.stage, frame.at]);
    }""")
    assert told == [
        *(["sent", "a", 0, 1], ["sent", "a", 1, 1], ["received", "a", 2, 1], ["received", "a", 3, 1]),
        *(["sent", "b", 0, 2], ["sent", "b", 1, 2], ["acked", "a", 4, 4], ["acked", "a", 5, 4]),
    ]


async def test_in_slow_motion_a_claim_received_at_most_once_is_not_on_the_disk_when_its_consumer_is_killed(
    learner,
) -> None:
    told = await learner.page.evaluate("""async () => {
      const { frames, replayed } = await import("/static/slow.js");
      const move = (what, id, row) => ({ what, id, at: 1, claim: 1, lane: 1, attempt: 1, row });
      const all = frames([move("sent", "a", "{}"), move("received", "a", ""), move("killed", "a", ""),
        move("sent", "b", "{}"), move("received", "b", "{}"), move("killed", "b", "{}")]);
      const killed = all.filter((frame) => frame.what === "killed");
      return [killed.map((frame) => [frame.id, frame.stage, frame.once]),
        replayed({ queue: {} }, all).queue.waiting.map((chip) => chip.id)];
    }""")
    assert told == [[["a", 5, True], ["b", 1, False]], ["b"]]


async def test_a_click_on_a_claim_tells_its_story(learner) -> None:
    await learner.go(5)
    await kill(learner)
    await learner.has_done()
    bar = learner.page.locator(".bar.killed").first
    claim = await bar.get_attribute("data-claim")
    await bar.click()
    await learner.page.wait_for_selector(f".story >> text=Claim {claim}")
    told = await learner.page.inner_text(".attempts")
    assert "Attempt 1" in told
    assert "consumer killed" in told
    assert "Attempt 2" in told
    await learner.press(".story .link")
    await learner.page.wait_for_selector(".timeline .bar.hero")
    await learner.page.wait_for_selector(".timeline .join")


async def test_a_claim_that_was_followed_is_let_go_when_another_step_begins(learner) -> None:
    await learner.go(2)
    await learner.act("send_few")
    await learner.sees("waiting")
    await learner.press(".chip[data-claim='3']")
    await learner.page.wait_for_selector(".disk >> text=Claim 3")
    await learner.go(3)
    await learner.act("one_consumer")
    await learner.has_done()
    await learner.page.wait_for_selector(".disk >> text=Claim 5")


async def test_sliders_react_and_theory_stands_beside_what_is_measured(learner) -> None:
    await learner.act("create")
    await learner.slide(arrivals="6", work="0.2", consumers="2")
    await learner.until("document.querySelector('.theory tbody tr:nth-child(2) td').textContent.startsWith('60')")
    await learner.until(
        "/\\d/.test(document.querySelector('.theory tbody tr:nth-child(4) td:nth-child(3)').textContent)"
    )
    await learner.slide(work="2")
    await learner.page.wait_for_selector(".theory.over")
    await until_soon(lambda: learner.stats().acked > 3)


async def test_the_comparison_says_that_it_is_simulated_and_is_whole_on_a_laptop(learner) -> None:
    await learner.tab("compare")
    assert "SIMULATED" in await learner.page.inner_text(".compare")
    await learner.press(".rules label:nth-of-type(2)")
    await learner.page.wait_for_selector(".compared >> text=NATS")
    assert await learner.page.eval_on_selector(".compared", "one => one.scrollWidth <= one.clientWidth")


async def test_in_the_timeline_every_bar_has_its_number_and_a_payment_stands_before_the_acknowledgement(
    learner,
) -> None:
    await learner.go(7)
    await learner.act("try_exactly-once")
    await learner.sees("exact")
    bars = await learner.page.eval_on_selector_all(
        ".timeline .bar",
        """all => all.map(bar => ({ claim: bar.dataset.claim, text: bar.querySelector("text").textContent,
            how: bar.dataset.how, right: bar.querySelector("rect").getBoundingClientRect().right,
            paid: bar.querySelector(".paid")?.getBoundingClientRect().right ?? 0 }))""",
    )
    assert bars
    assert all(bar["claim"] == bar["text"] for bar in bars)
    assert all(bar["paid"] <= bar["right"] for bar in bars)
    assert sum(bar["how"] == "killed" for bar in bars) == 2


async def test_short_bars_hold_their_numbers_and_overlap_nothing(learner) -> None:
    """A number ran under the next bar or out of its own, and the mark of a death stood behind the takeover."""
    drawn = await learner.page.evaluate(
        """async () => {
            const [{ timeline }, { draw }] = [await import("/static/timeline.js"), await import("/static/dom.js")];
            const bar = (claim, from, to, how, attempt = 1) => (
                { claim, id: `m-${claim}`, attempt, from, to, how, paid: null, lease_end: null, extended: [] }
            );
            const few = [
                [bar(20, 0.3, 0.35, "nacked"), bar(23, 0.36, 0.5, "acked"), bar(1024, 0.5, 1.2, "acked")],
                [bar(29, 1, 1.05, "killed")], [bar(29, 1.06, 1.2, "acked", 2)], [bar(30, 1.2, 1.9, "acked")],
            ];
            const burst = [31, 32, 33, 34].map((claim, at) => bar(claim, 1.3 + at / 10, 1.4 + at / 10, "acked"));
            return [few, [...few, burst]].map((lanes) => {
                const place = document.body.appendChild(document.createElement("div"));
                const told = { now: 2, lanes: lanes.map((bars, at) => ({ number: at + 1, state: "waiting", bars })) };
                draw(place, timeline(told, 900, 170, { scale: 1, claim: 0, bars: 9, follow: () => {} }));
                return [...place.querySelectorAll(".bar")].map((one) => {
                    const [bar, ...inside] = ["rect", "text", ".glyph"].map((kind) => one.querySelector(kind))
                        .filter(Boolean).map((part) => part.getBoundingClientRect());
                    return { left: bar.left, right: bar.right, inside: inside.map(({ left, right }) => [left, right]) };
                });
            });
        }"""
    )
    few, crowded = drawn
    assert [len(bar["inside"]) for bar in few] == [2, 2, 2, 2, 2, 2]
    assert [len(bar["inside"]) for bar in crowded] == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]  # no tick, or one in each
    for bar in [*few, *crowded]:
        assert all(bar["left"] < left and right < bar["right"] for left, right in bar["inside"])
    first, second, third, killed, taken_over, _ = few
    assert first["right"] <= second["left"] < second["right"] <= third["left"]
    assert killed["right"] <= taken_over["left"]


async def test_a_lane_in_which_something_happened_is_not_left_out_for_an_idle_one(learner) -> None:
    shown = await learner.page.evaluate(
        """async () => {
            const [{ timeline }, { draw }] = [await import("/static/timeline.js"), await import("/static/dom.js")];
            const bar = (claim) => ({
                claim, id: `m-${claim}`, attempt: 1, from: claim, to: claim + 0.9, how: "killed", paid: null,
                lease_end: null, extended: [],
            });
            const lanes = [1, 2, 3, 4, 5, 6, 7, 8, 9].map((number) => (
                { number, state: number < 6 ? "killed" : "waiting", bars: number < 8 ? [bar(number)] : [] }
            ));
            const place = document.createElement("div");
            draw(place, timeline({ now: 20, lanes }, 900, 170, { scale: 1, claim: 0, follow: () => {} }));
            return [...place.querySelectorAll(".bar")].map((one) => Number(one.dataset.claim));
        }"""
    )
    assert shown == [1, 2, 3, 4, 5, 6, 7]


async def test_the_timeline_keeps_its_drawing_while_time_goes_on_and_begins_at_the_oldest_bar_that_it_knows(
    learner,
) -> None:
    told = await learner.page.evaluate(
        """async () => {
            const [{ timeline }, { draw }] = [await import("/static/timeline.js"), await import("/static/dom.js")];
            const bar = (claim) => ({
                claim, id: `m-${claim}`, attempt: 1, from: claim, to: claim + 0.9, how: "acked", paid: null,
                lease_end: null, extended: [],
            });
            const place = document.createElement("div");
            const shown = (now, claims, bars) => {
                const lanes = [{ number: 1, state: "waiting", bars: claims.map(bar) }];
                draw(place, timeline({ now, lanes }, 900, 170, { scale: 1, claim: 0, bars, follow: () => {} }));
                return {
                    size: place.querySelector("svg").getAttribute("viewBox"),
                    first: place.querySelector(".tick").textContent,
                    extent: parseFloat(place.querySelector(".extent").style.width),
                    bars: [...place.querySelectorAll(".bar")].map((one) => Number(one.dataset.claim)),
                };
            };
            return [shown(60, [8, 59]), shown(90, [8, 59, 89]), shown(90, [58, 59, 89]), shown(90, [58, 59, 89], 2)];
        }"""
    )
    early, late, cut, few = told
    assert early["size"] == late["size"] == cut["size"]
    assert early["extent"] < late["extent"]
    assert (late["first"], cut["first"]) == ("0\u00a0s", "50\u00a0s")
    assert cut["extent"] < late["extent"]
    assert (cut["bars"], few["bars"]) == ([58, 59, 89], [59, 89])


async def test_the_link_of_a_claim_into_the_timeline_brings_its_bar_into_sight(chrome, served) -> None:
    async with learning(chrome, served, viewport={"width": 390, "height": 844}) as learner:
        await learner.act("create")
        await learner.slide(work="0.1", consumers="1")
        await learner.press(".controls button:enabled >> nth=1")
        await until_soon(lambda: learner.stats().acked == 20)
        await learner.tab("timeline")
        await learner.page.wait_for_selector(".bar[data-claim='20'][data-how=acked]")
        await learner.page.eval_on_selector(".timeline", "view => { view.scrollLeft = 0; }")
        await learner.page.wait_for_selector(".timeline-box:not(.more)", state="attached")
        assert not await in_sight(learner, 20)
        await learner.press(".chip.done[data-claim='20']")
        await learner.press(".story .link")
        await learner.page.wait_for_selector(".bar.hero[data-claim='20']")
        await learner.until(f"({IN_SIGHT})(20)")


IN_SIGHT = """claim => {
    const right = (one) => document.querySelector(one).getBoundingClientRect().right;
    return right(`.bar[data-claim='${claim}'] rect`) <= right(".timeline");
}"""


async def in_sight(learner, claim: int) -> bool:
    return bool(await learner.page.evaluate(IN_SIGHT, claim))


# --- what the learner does -------------------------------------------------------------------------------------------


async def test_nothing_that_must_fail_is_enabled_before_there_is_a_queue(learner) -> None:
    enabled = await learner.page.eval_on_selector_all(".controls button:enabled", "all => all.length")
    assert enabled == 0
    await learner.act("create")
    await learner.page.wait_for_selector(".controls button:enabled")


async def test_the_learner_sends_one_by_one_in_bursts_and_from_a_file(learner, tmp_path) -> None:
    await learner.act("create")
    await learner.press("[data-do=one]:enabled")
    await until_soon(lambda: learner.stats().sent == 1)
    await learner.press(".controls button >> nth=1")
    await until_soon(lambda: learner.stats().sent == 21)
    path = tmp_path / "claims.csv"
    path.write_text("IDpol,ClaimAmount\n33,100.5\n48,7\n")
    await learner.page.set_input_files("input[type=file]", path)
    await until_soon(lambda: learner.stats().sent == 23)
    with learner.broker() as broker:
        claims = [message.body["claim_id"] for message in broker.peek(QUEUE, limit=100)]
        assert claims == list(range(1, 24))
        assert broker.peek(QUEUE, limit=100)[-1].body["amount"] == 700
    sums_hold(learner)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n", "has no column IDpol, ClaimAmount"),
        (b"IDpol,ClaimAmount\n1,much\n", "ligne 2"),
        ("IDpol,ClaimAmount\n1,é\n".encode("latin-1"), "UTF-8"),
        (b"IDpol,ClaimAmount\n" + b"1,2\n" * 5_001, "5000"),
        (b"IDpol,ClaimAmount\n" + b"1,2\n" * 200_000, "800"),
    ],
    ids=["empty", "columns", "number", "encoding", "too many", "too large"],
)
async def test_a_file_that_cannot_be_used_is_refused_in_the_language_of_the_page(
    chrome, served, tmp_path, content, text
) -> None:
    language = "fr" if "ligne" in text else "en"
    async with learning(chrome, served, language) as learner:
        await learner.act("create")
        await learner.page.wait_for_selector("[data-do=one]:enabled")
        path = tmp_path / "claims.csv"
        path.write_bytes(content)
        await learner.page.set_input_files("input[type=file]", path)
        await learner.page.wait_for_selector(".notice.on")
        assert text in (await learner.page.inner_text(".notice.on")).replace(",", "" if "5000" in text else ",")
        assert learner.stats().sent == 0


async def test_the_controls_sit_on_the_consumer_and_a_double_click_kills_only_one(learner) -> None:
    await learner.act("create")
    await learner.slide(work="4", consumers="3")
    await learner.press(".controls button:enabled >> nth=1")
    await learner.page.wait_for_selector("[data-state=working] >> nth=2")
    await learner.page.dblclick("[data-consumer='1'] [data-act=kill]")
    await learner.page.wait_for_selector("[data-consumer='1'][data-state=killed]")
    await learner.press("[data-consumer='2'] [data-act=fail]")
    await learner.slide(work="0.1")
    await until_soon(lambda: learner.stats().nacked >= 1)
    await learner.press("[data-consumer='2'] [data-act=fail]")
    await learner.press("[data-consumer='3'] [data-act=pause]")
    await learner.page.wait_for_selector("[data-consumer='3'][data-state=paused]")
    await learner.press("[data-consumer='3'] [data-act=resume]")
    assert await learner.page.locator("[data-state=killed]").count() == 1
    await until_soon(lambda: learner.stats().acked >= 11)


async def test_a_control_stays_the_same_when_what_stands_before_it_goes(learner) -> None:
    await learner.act("create")
    await learner.slide(work="1", consumers="1")
    await learner.press(".controls button:enabled >> nth=0")
    await learner.page.locator("[data-consumer='1']:has(.lease) [data-act=pause]").focus()
    await learner.page.wait_for_selector("[data-consumer='1']:not(:has(.lease))")
    await learner.page.keyboard.press("Enter")
    await learner.page.wait_for_selector("[data-consumer='1'][data-state=paused]")


async def test_while_all_is_frozen_nobody_loses_a_lease(learner) -> None:
    await learner.go(8)
    await learner.act("short_lease")
    await learner.page.wait_for_selector("[data-state=working]")
    await learner.press(".controls button:has-text('Freeze')")
    await learner.page.wait_for_selector(".stage.frozen")
    await learner.act("short_lease")
    await learner.page.wait_for_selector(".notice >> text=Everything is frozen")
    with learner.broker() as broker:
        (held,) = broker.peek(QUEUE, state=filao.State.LEASED)
        await until_soon(lambda: held.at.timestamp() < time.time())  # so long the world stands still
    await learner.press(".controls button:has-text('Go on')")
    await learner.page.wait_for_selector(".stage:not(.frozen)")
    await learner.slide(work="0.1")
    await until_soon(lambda: learner.stats().acked == 1)
    assert (learner.stats().lost, learner.stats().received) == (0, 1)


async def test_a_dead_letter_is_corrected_in_the_ledger(learner) -> None:
    await learner.go(6)
    await learner.act("poison")
    await learner.sees("dead")
    await learner.tab("books")
    assert "the policy is not in the register" in await learner.page.inner_text(".books")
    await learner.page.fill(".mend input", "27")
    await learner.press(".mend .strong")
    await learner.has_done()


async def test_strange_bodies_harm_no_page(learner) -> None:
    await learner.act("create")
    await learner.slide(work="0.1")
    deep: Any = 1
    for _ in range(50):
        deep = [deep]
    with learner.broker() as broker:
        for body in ([1], "text", {"claim_id": 10**15, "policy": 2**60, "amount": True}, None, deep):
            broker.send_to_queue(QUEUE, body)
        await learner.press(".controls button:has-text('+')")
        await until_soon(lambda: broker.stats(QUEUE).dead == 5)
        await learner.tab("books")
        await learner.page.wait_for_selector(".mend >> nth=4")
        broker.redrive(QUEUE)
    await learner.press(".controls .group:nth-child(2) button >> nth=0")
    sums_hold(learner)


async def test_a_worker_of_the_learners_own_joins_and_is_seen(learner, tmp_path) -> None:
    await learner.act("create")
    await learner.tab("python")
    command = await learner.page.inner_text(".own .command")
    code = program("my_worker").replace("{file}", str(learner.room)).replace("asyncio.sleep(2)", "asyncio.sleep(0.5)")
    (tmp_path / "my_worker.py").write_text(code)
    assert command.endswith("filao work my_worker:worker")
    assert Path(command.split()[0]).is_absolute()
    with subprocess.Popen(
        [sys.executable, "-m", "filao", "work", "my_worker:worker"], cwd=tmp_path, stdout=-3, stderr=-3
    ) as own:
        try:
            await learner.press("[data-do=one]:enabled")
            await learner.press("[data-do=one]:enabled")
            await learner.page.wait_for_selector(".consumer >> text=Yours")
            await until_soon(lambda: learner.stats().acked == 2)
        finally:
            own.terminate()
    await learner.page.wait_for_selector(".consumer >> text=Yours", state="detached")


async def test_what_is_sent_to_a_portal_that_died_burns_no_number(learner) -> None:
    await learner.act("create")
    await learner.page.wait_for_selector("[data-do=one]:enabled")
    (portal,) = [pid for pid in served_processes(learner) if "sandbox.portal" in cmdline(pid)]
    os.kill(portal, signal.SIGKILL)
    await until_soon(lambda: any("portal" in cmdline(pid) for pid in served_processes(learner) if pid != portal))
    await learner.press("[data-do=one]:enabled")
    await until_soon(lambda: learner.stats().sent >= 1)
    with learner.broker() as broker:
        assert broker.peek(QUEUE)[0].body["claim_id"] == 1


def served_processes(learner: Learner) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if str(learner.room.parent) in cmdline(pid)]


def cmdline(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


# --- step 11 ---------------------------------------------------------------------------------------------------------


async def test_the_editor_keeps_its_code_and_tells_a_syntax_error_by_its_line(learner) -> None:
    await learner.go(11)
    await learner.write("while True\n    pass\n")
    found = await learner.checks()
    assert set(found.values()) == {"red"}
    assert "Line 1" in await learner.page.inner_text("[data-check=after_work]")
    await learner.page.wait_for_selector(".mirror .bad[data-line='1']")
    await learner.page.reload()
    await learner.page.wait_for_selector("textarea.code")
    assert (await learner.page.input_value("textarea.code")).startswith("while True\n")
    await learner.press(".swap >> text=Skeleton")
    assert "process_claims" in await learner.page.input_value("textarea.code")
    await learner.page.reload()
    await learner.press(".swap >> text=My code")
    assert (await learner.page.input_value("textarea.code")).startswith("while True\n")


async def test_the_downloaded_code_runs_outside_as_it_stands(learner, tmp_path) -> None:
    await learner.go(11)
    await learner.write(with_body(SOLUTION))
    async with learner.page.expect_download() as download:
        await learner.press(".outside button >> nth=0")
    await (await download.value).save_as(tmp_path / "my_consumer.py")
    command = await learner.page.inner_text(".outside .command")
    assert command == f"{sys.executable} my_consumer.py"
    with subprocess.Popen(command.split(), cwd=tmp_path) as own:
        try:
            import filao.sync

            await until_soon((tmp_path / "claims.db").exists)
            with filao.sync.connect(tmp_path / "claims.db") as broker:
                await until_soon(lambda: bool(broker.queues()))
                broker.send_to_queue(QUEUE, {"claim_id": 1, "policy": 12, "amount": 5, "effort": 0.01})
                await until_soon(lambda: broker.stats(QUEUE).acked == 1)
        finally:
            own.terminate()


# --- everybody -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rules", "context"),
    [
        ("light", (), {}),
        ("dark", ("color-contrast",), {"color_scheme": "dark"}),  # the same elements
        ("projector", ("target-size",), {"viewport": {"width": 1920, "height": 1080}}),
        ("phone", ("target-size",), {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}),
    ],
    ids=["light", "dark", "projector", "phone"],
)
async def test_the_page_has_no_barriers(chrome, served, name, rules, context) -> None:
    if not AXE.exists():
        missing("axe-core")
    async with learning(chrome, served, "fr", reduced_motion="reduce", **context) as learner:
        await learner.go(6)
        await learner.predict(1)
        await learner.act("poison")
        await learner.sees("dead")
        for tab in TABS:
            await learner.tab(tab)
            assert await learner.violations(*rules) == []
            assert await learner.texts_too_small() == []
            await learner.shoot(SHOTS, f"tab-{tab}-{name}")
        assert await learner.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await learner.go(11)
        await learner.page.wait_for_selector("textarea.code")
        assert await learner.violations(*rules) == []
        assert await learner.texts_too_small() == []
        await learner.press(".present")
        await learner.page.wait_for_selector(".strip")
        assert await learner.violations(*rules) == []
        await learner.press(".present")
        await learner.press(".next")
        await learner.page.wait_for_selector(".paper")
        assert await learner.violations() == []


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1920, 1080)])
async def test_all_that_matters_is_above_the_fold(chrome, served, width, height) -> None:
    async with learning(chrome, served, "fr", viewport={"width": width, "height": height}) as learner:
        for step in range(1, len(STEPS) + 1):
            await learner.go(step)
            for selector in (
                ".next",
                ".previous",
                ".lesson h2",
                ".numbers",
                ".main > :last-child",
                ".stages, .sheet-of",
            ):
                box = await learner.page.locator(selector).first.bounding_box()
                assert box is not None, selector
                assert box["y"] + box["height"] <= height, (step, selector)
                assert box["x"] + box["width"] <= width, (step, selector)
        assert await learner.page.evaluate("document.documentElement.scrollHeight <= innerHeight")


async def test_in_the_opening_the_first_claim_is_the_farthest_on_its_way(chrome, served) -> None:
    async with learning(chrome, served, reduced_motion="reduce") as learner:
        places = await learner.page.evaluate(
            """async () => {
                const [{ opening }, { draw }] = [await import("/static/opening.js"), await import("/static/dom.js")];
                const place = document.body.appendChild(document.createElement("div"));
                draw(place, opening(() => {}));
                const found = [...place.querySelectorAll(".travels")].map(
                    (one) => [-Math.round(one.getBoundingClientRect().x), Number(one.textContent)]);
                place.remove();
                return found;
            }"""
        )
        assert [claim for _, claim in sorted(places)] == list(range(1, 9))


@pytest.mark.parametrize("language", ["en", "fr"])
async def test_nothing_on_the_stage_covers_anything_else(chrome, served, language) -> None:
    async with learning(chrome, served, language) as learner:
        assert await learner.overlaps() == []


async def test_nothing_lies_beside_the_page_when_it_is_enlarged_four_times(chrome, served) -> None:
    async with learning(chrome, served, "fr", viewport={"width": 320, "height": 256}) as learner:
        for pressed in (".numbers li:nth-child(4) button", ".present"):
            await learner.press(pressed)
            await learner.page.wait_for_selector("[data-step=three]")
            await learner.page.wait_for_selector(".stage")
            assert await learner.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_the_lesson_can_be_done_with_the_keyboard_alone(learner) -> None:
    await learner.page.keyboard.press("Tab")
    for _ in range(60):
        await learner.page.keyboard.press("Tab")
        if await learner.page.evaluate("document.activeElement.matches('.lesson .act')"):
            break
    await learner.page.keyboard.press("Enter")
    await learner.sees("created")


# --- the house -------------------------------------------------------------------------------------------------------


async def test_two_browsers_have_two_queues(chrome, served) -> None:
    async with learning(chrome, served) as first, learning(chrome, served) as second:
        await first.act("create")
        await first.press(".controls button:enabled >> nth=1")
        await until_soon(lambda: first.stats().sent == 20)
        with second.broker() as broker:
            assert broker.queues() == []


async def test_a_room_begins_with_a_socket_and_ends_when_its_page_is_closed(chrome, tmp_path) -> None:
    with sandbox(tmp_path / "files", linger=0.5) as running:
        async with httpx.AsyncClient(follow_redirects=True) as client:
            assert (await client.get(f"{running.url}en?token={TOKEN}")).status_code == 200
            assert running.rooms() == []
        async with learning(chrome, running) as learner:
            await learner.go(5)
            await learner.act("long_claims")
            await learner.page.wait_for_selector("[data-state=working]")
            assert len(running.processes()) == 4
        await until_soon(lambda: not learner.room.parent.exists())
        assert running.processes() == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_sandbox_that_is_told_to_end_leaves_nothing(chrome, tmp_path, number) -> None:
    with sandbox(tmp_path / "files") as running:
        async with learning(chrome, running) as learner:
            await learner.go(5)
            await learner.act("long_claims")
            await learner.page.wait_for_selector("[data-state=working]")
            assert running.processes()
            assert await asyncio.to_thread(running.end, number) == 128 + number
            await learner.page.wait_for_selector(".notice.lost")
            assert "Start it again with: filao sandbox" in await learner.page.inner_text(".notice.lost")
        assert "Traceback" not in running.said()
        assert running.processes() == set()
        assert list(running.folder.iterdir()) == []


def test_an_impatient_ctrl_c_changes_nothing_of_how_the_sandbox_ends() -> None:
    server = _Server(uvicorn.Config("no:app"))
    for _ in range(2):
        server.handle_exit(signal.SIGINT, None)
    assert server.should_exit
    assert not server.force_exit  # which would leave the rooms to an event loop that ends


async def test_what_a_killed_sandbox_leaves_ends_and_is_removed_by_the_next(chrome, tmp_path) -> None:
    with sandbox(tmp_path / "files") as running:
        async with learning(chrome, running) as learner:
            await learner.go(4)
            await learner.act("three_consumers")
            await learner.page.wait_for_selector("[data-state=working]")
            running.end(signal.SIGKILL)
        await until_soon(lambda: not running.processes())
        assert list(running.folder.glob("filao-sandbox-*"))
    with sandbox(tmp_path / "files") as another:
        assert len(list(another.folder.glob("filao-sandbox-*"))) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.root
async def test_a_full_disk_is_told_and_loses_nothing(chrome, tmp_path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    await asyncio.to_thread(
        subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], check=True
    )
    try:
        with sandbox(folder, "--speed", SPEED) as running:
            async with learning(chrome, running) as learner:
                await learner.go(3)
                await learner.act("one_consumer")
                await learner.sees("paid")
                confirmed = learner.stats().sent
                filler = folder / "filler"
                with filler.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(65_536))
                await learner.page.wait_for_selector(".banner")
                assert "The disk that holds the queue is full" in await learner.page.inner_text(".banner")
                filler.unlink()
                await learner.page.wait_for_selector(".banner", state="detached")
                await learner.press("[data-do=one]")
                await until_soon(lambda: learner.stats().sent > confirmed)
                sums_hold(learner)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("step", STEPS[:-1], ids=lambda step: step.key)
def test_what_a_step_shows_runs_as_it_stands_in_a_file(tmp_path, step) -> None:
    (tmp_path / "step.py").write_text(program(step.key))
    ran = subprocess.run(
        [sys.executable, "step.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "claims.db").exists()


def test_every_step_has_a_program_that_the_page_shows() -> None:
    assert re.search(r"Queue\(", program("create"))
    assert all(program(step.key if step.key != "implement" else "my_consumer") for step in STEPS)
    assert set(lesson("en")) == {step.key for step in STEPS}
