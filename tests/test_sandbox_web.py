"""The sandbox as learners use it: in a real browser, through all ten steps, in both languages, and with bad input."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser

from filao.sandbox.web.lesson import STEPS
from filao.sandbox.web.words import lesson, program, wanted, words
from tests.conftest import missing
from tests.learner import TABS, Learner, Sandbox, browser, chromium, learning, sandbox, until_soon

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "build" / "sandbox"
AXE = ROOT / ".venv" / "npm" / "node_modules" / "axe-core" / "axe.min.js"


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
    await learner.until("document.querySelector('.sums .sum .verdict')?.textContent === '✓'")
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
    assert ("paid twice" if learner.language == "en" else "payé deux fois") in ledger
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
    await learner.until(f"document.querySelector(\"[data-worker='{worker}'] .state b.bad\")")
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


async def test_progress_is_kept_when_the_page_is_opened_anew(learner) -> None:
    await learner.act()
    await learner.sees("created")
    await learner.predict(2)
    await learner.go(2)
    await learner.page.wait_for_function("(localStorage.getItem('filao-lesson') || '').includes('\"current\": 1')")
    await learner.page.reload()
    await learner.page.wait_for_selector(".numbers button:nth-child(2)[aria-current=step]")
    await learner.page.wait_for_selector(".numbers button:nth-child(1).done")
    await learner.press("header a")  # the other language, the same room
    await learner.until("document.documentElement.lang === 'fr'")
    await learner.page.wait_for_selector(".numbers button:nth-child(1).done")
    assert learner.stats().sent == 0


async def test_a_step_shows_the_python_that_does_it(learner) -> None:
    await learner.press(".lesson summary")
    shown = await learner.page.inner_text(".lesson pre")
    assert 'filao.Queue("claims.processing"' in shown
    assert shown.strip() == program("create").strip()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.key)
def test_what_a_step_shows_runs_as_it_stands_in_a_file(tmp_path, step) -> None:
    (tmp_path / "step.py").write_text(program(step.key))
    ran = subprocess.run(
        [sys.executable, "step.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "claims.db").exists()


# --- what the learner does -------------------------------------------------------------------------------------------


async def test_the_learner_submits_one_by_one_in_bursts_and_from_a_file(learner, tmp_path) -> None:
    await learner.press(".main form button:nth-of-type(2)")
    await learner.page.wait_for_selector(".q-notification")  # there is no queue yet
    assert "create claims.processing first" in await learner.page.inner_text(".q-notification")
    await learner.act()
    await learner.sees("created")
    await learner.page.select_option(".main form select >> nth=0", "27")
    await learner.page.fill(".main form input[type=number]", "123.45")
    await learner.press(".main form button:nth-of-type(1)")
    await until_soon(lambda: learner.stats().sent == 1)
    with learner.broker() as broker:
        (claim,) = broker.peek("claims.processing")
    assert (claim.body["policy"], claim.body["amount"], claim.body["kind"]) == (27, 12_345, "collision")
    await learner.press(".main form button:nth-of-type(2)")
    await until_soon(lambda: learner.stats().sent == 101)
    await learner.until("document.querySelector('.queue .more')?.textContent.includes('65')")
    path = tmp_path / "claims.csv"
    path.write_text("IDpol,ClaimAmount\n33,100.5\n48,7\n")
    await learner.page.set_input_files("input[type=file]", path)
    await until_soon(lambda: learner.stats().sent == 103)
    await sums_hold(learner)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n", "has no column IDpol and no ClaimAmount"),
        (b"IDpol,ClaimAmount\n1,much\n", "line 2: ClaimAmount is 'much'"),
        ("IDpol,ClaimAmount\n1,é\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
        (b"IDpol,ClaimAmount\n" + b"1,2\n" * 5_001, "5001 claims are too many: 5000 at a time"),
        (b"IDpol,ClaimAmount\n" + b"1,2\n" * 200_000, "The file has 800 kB; 500 kB are the most"),
    ],
    ids=["empty", "columns", "number", "encoding", "too many", "too large"],
)
async def test_a_file_that_cannot_be_used_is_refused_with_its_reason(learner, tmp_path, content, text) -> None:
    await learner.act()
    await learner.sees("created")
    path = tmp_path / "claims.csv"
    path.write_bytes(content)
    await learner.page.set_input_files("input[type=file]", path)
    await learner.page.wait_for_selector(".q-notification")
    assert text in await learner.page.inner_text(".q-notification")
    assert learner.stats().sent == 0


async def test_a_wrong_rule_or_body_is_refused_and_changes_nothing(learner) -> None:
    await learner.act()
    await learner.sees("created")
    lease = "section[aria-label=Rules] input >> nth=0"
    await learner.page.fill(lease, "0")
    await learner.page.press(lease, "Tab")
    await learner.page.wait_for_selector(".q-notification")
    assert "Lease, seconds: 0 is not a number from 1 to 60" in await learner.page.inner_text(".q-notification")
    await learner.until("document.querySelector('section[aria-label=Rules] input').value === '6'")
    with learner.broker() as broker:
        broker.send_to_queue("claims.processing", {"claim_id": 1, "policy": 0})
        broker.receive_from_queue("claims.processing").reject("no such policy")
        await learner.tab("dead_letters")
        await learner.page.fill(".letters textarea", "{not json")
        await learner.page.press(".letters textarea", "Tab")
        await learner.press(".letters li button:nth-child(2)")
        await learner.page.wait_for_selector(".q-notification >> text=not valid JSON")
        assert broker.stats("claims.processing").dead == 1
        await learner.press("section[aria-label='Dead letters'] button >> nth=0")
        await until_soon(lambda: broker.stats("claims.processing").redriven == 1)
        await learner.tab("rules")
        await learner.press("section[aria-label=Rules] button")
        await until_soon(lambda: broker.stats("claims.processing").purged == 1)


async def test_rules_that_are_set_are_the_queues(learner) -> None:
    await learner.act()
    await learner.sees("created")
    for place, value in enumerate(("9", "4", "2.5")):
        field = f"section[aria-label=Rules] input >> nth={place}"
        await learner.page.fill(field, value)
        await learner.page.press(field, "Tab")

    def rules() -> tuple[float, int, float]:
        with learner.broker() as broker:
            (queue,) = broker.queues()
            return queue.lease, queue.max_attempts, queue.backoff.first

    await until_soon(lambda: rules() == (9, 4, 2.5))


async def test_workers_are_slowed_made_to_fail_frozen_and_sent_home(learner) -> None:
    await learner.go(4)
    await learner.act()
    await learner.page.wait_for_selector(".card.working[data-worker='1']")
    await learner.press("[data-worker='1'] .acts button:nth-child(4)")  # fail
    await until_soon(lambda: learner.stats().nacked >= 1)
    await learner.press("[data-worker='1'] .acts button:nth-child(4)")
    await learner.press("[data-worker='2'] .acts button:nth-child(3)")  # slow
    await learner.page.wait_for_selector("[data-worker='2'] .acts button.on[aria-pressed=true]")
    await learner.press("header button >> nth=0")  # freeze
    await learner.page.wait_for_selector(".stage.frozen")
    before = learner.stats()
    assert before.paused
    states = await learner.page.eval_on_selector_all(".card[data-worker]", "cards => cards.map(card => card.className)")
    assert all("paused" in state for state in states)
    await asyncio.sleep(7)  # longer than a lease: nobody loses one
    assert learner.stats().acked == before.acked
    await learner.press("header button >> nth=0")
    await until_soon(lambda: learner.stats().acked == 24)
    assert learner.stats().lost == 0
    await learner.press(".workers .steps button >> nth=0")
    await learner.until("document.querySelectorAll('.card[data-worker]').length === 2")


async def test_a_worker_of_the_learners_own_joins_and_is_seen(learner, tmp_path) -> None:
    await learner.act()
    await learner.sees("created")
    await learner.tab("own_worker")
    code = await learner.page.inner_text("section[aria-label='Your own worker'] pre >> nth=1")
    assert str(learner.room) in code
    (tmp_path / "my_worker.py").write_text(code.replace("asyncio.sleep(2)", "asyncio.sleep(0.5)"))
    command = [sys.executable, "-m", "filao", "work", "my_worker:worker"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as own:
        try:
            await learner.press(".main form button:nth-of-type(1)")
            await learner.press(".main form button:nth-of-type(1)")
            await learner.page.wait_for_selector(".card:has-text('Your worker')", timeout=40_000)
            await until_soon(lambda: learner.stats().acked == 2)
            await learner.until("document.querySelector('.cards').textContent.includes('2 paid')")
        finally:
            own.terminate()
    await learner.until("!document.querySelector('.cards')?.textContent.includes('Your worker')")
    await learner.tab("ledger")
    await learner.until("document.querySelectorAll('.ledger tbody tr').length === 2")
    assert "Your worker" in await learner.page.inner_text(".ledger")
    await sums_hold(learner)


async def test_strange_bodies_that_are_redriven_harm_no_page(learner) -> None:
    await learner.act()
    await learner.sees("created")
    with learner.broker() as broker:
        for body in ([1], "text", {"claim_id": 10**30, "policy": 2**60, "amount": True}, None):
            broker.send_to_queue("claims.processing", body)
        await learner.press(".workers .steps button >> nth=1")
        await until_soon(lambda: broker.stats("claims.processing").dead == 4)
        await learner.until("document.querySelectorAll('.queue .aside .chip').length === 4")
        await learner.tab("dead_letters")
        await learner.press("section[aria-label='Dead letters'] button >> nth=1")
        await until_soon(lambda: broker.stats("claims.processing").dead == 0)
    await sums_hold(learner)


async def test_what_is_submitted_to_a_portal_that_died_is_refused_in_words(learner) -> None:
    await learner.act()
    await learner.sees("created")
    pid = int((await learner.page.inner_text(".portal .quiet")).split()[1])
    os.kill(pid, signal.SIGKILL)
    await learner.press(".main form button:nth-of-type(2)")
    await learner.until(
        "document.querySelector('.q-notification')?.textContent.includes('100 claims did not reach it')"
        " || document.querySelector('.queue .more')"
    )
    await learner.until(f"!document.querySelector('.portal').textContent.includes('pid {pid}')")
    before = learner.stats().sent
    await learner.press(".main form button:nth-of-type(2)")
    await until_soon(lambda: learner.stats().sent == before + 100)


async def test_while_all_is_frozen_nothing_is_started(learner) -> None:
    await learner.go(4)
    await learner.act()
    await learner.page.wait_for_selector(".card.working")
    await learner.press("header button >> nth=0")
    await learner.page.wait_for_selector(".stage.frozen")
    await learner.act()
    await learner.page.wait_for_selector(".q-notification >> text=Everything is frozen")
    await learner.press("header button >> nth=0")
    await learner.until("!document.querySelector('.stage.frozen')")


# --- everybody -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("light", {}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}),
    ],
)
async def test_the_page_has_no_barriers(chrome, served, name, context) -> None:
    if not AXE.exists():
        missing("axe-core")
    async with learning(chrome, served, "fr", reduced_motion="reduce", **context) as learner:
        await learner.go(6)
        await learner.act()
        await learner.sees("dead")
        for tab in TABS:
            await learner.tab(tab)
            await learner.page.wait_for_selector(
                f".tab-list button:nth-child({TABS.index(tab) + 1})[aria-pressed=true]"
            )
            assert await violations(learner) == []
        assert await learner.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await learner.shoot(SHOTS, name)
        assert learner.complaints == []


async def violations(learner: Learner) -> list[str]:
    await learner.page.evaluate(AXE.read_text())
    found = await learner.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found["violations"]]


async def test_it_can_be_used_by_keyboard_alone(learner) -> None:
    await learner.page.keyboard.press("Tab")
    assert await learner.page.evaluate("document.activeElement.className") == "skip"
    for _ in range(60):
        await learner.page.keyboard.press("Tab")
        if await learner.page.evaluate("document.activeElement.matches('.lesson button.strong')"):
            break
    await learner.page.keyboard.press("Enter")
    await learner.sees("created")


# --- the house -------------------------------------------------------------------------------------------------------


async def test_two_browsers_have_two_queues(chrome, served) -> None:
    async with learning(chrome, served) as first, learning(chrome, served) as second:
        await first.act()
        await first.sees("created")
        await first.press(".main form button:nth-of-type(2)")
        await until_soon(lambda: first.stats().sent == 100)
        with second.broker() as broker:
            assert broker.queues() == []
        assert await second.page.locator(".chip").count() == 0


async def test_a_room_ends_when_its_page_is_closed(chrome, served) -> None:
    async with learning(chrome, served) as learner:
        await learner.go(4)
        await learner.act()
        await learner.page.wait_for_selector(".card.working")
        room = learner.room.parent
        mine = [pid for pid in served.processes() if str(room) in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(mine) == 4
    await until_soon(lambda: not room.exists())
    assert not served.processes() & set(mine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_sandbox_that_is_told_to_end_leaves_nothing(chrome, tmp_path, number) -> None:
    with sandbox(tmp_path / "files") as running:
        async with learning(chrome, running) as learner:
            await learner.go(5)
            await learner.act()
            await learner.page.wait_for_selector(".card.working")
            assert running.processes()
            assert await asyncio.to_thread(running.end, number) == 128 + number
            await learner.page.wait_for_selector("#popup[aria-hidden=false]")
            assert "Start it again with: filao sandbox" in await learner.page.inner_text("#popup")
        assert running.processes() == set()
        assert list(running.folder.iterdir()) == []


async def test_what_a_killed_sandbox_leaves_ends_and_is_removed_by_the_next(chrome, tmp_path) -> None:
    with sandbox(tmp_path / "files") as running:
        async with learning(chrome, running) as learner:
            await learner.go(4)
            await learner.act()
            await learner.page.wait_for_selector(".card.working")
            running.end(signal.SIGKILL)
        await until_soon(lambda: not running.processes())
        assert list(running.folder.glob("filao-sandbox-*"))
    with sandbox(tmp_path / "files") as another:
        assert len(list(another.folder.glob("filao-sandbox-*"))) == 1


def test_a_port_that_is_in_use_is_told(served) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    ran = filao_sandbox("--port", port)
    assert ran.returncode == 4
    assert f"port {port} of 127.0.0.1: cannot listen" in ran.stderr
    assert "--port 0 finds a free one" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("--host", "0.0.0.0"), "add --token"), (("--token", "short"), "soon guessed"), (("--port", "70000"), "65535")],
)
def test_wrong_usage_is_told(arguments, text) -> None:
    ran = filao_sandbox(*arguments)
    assert ran.returncode == 2
    assert text in ran.stderr


def filao_sandbox(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "filao", "sandbox", "--no-browser", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}], ids=["rebinding", "other site"]
)
def test_pages_of_other_sites_are_not_answered(served, headers) -> None:
    assert httpx.get(f"{served.url}en").status_code == 200
    refused = httpx.get(f"{served.url}en", headers=headers)
    assert refused.status_code == 403
    assert "This sandbox" in refused.text
    assert httpx.get(f"{served.url}_nicegui_ws/socket.io/?EIO=4&transport=polling", headers=headers).status_code == 403


def test_who_does_not_know_the_token_is_not_let_in(tmp_path) -> None:
    with sandbox(tmp_path / "files", "--token", "correct-horse") as running:
        address = running.url.partition("?")[0]
        assert running.url.endswith("?token=correct-horse")
        assert httpx.get(f"{address}en").status_code == 403
        assert httpx.get(f"{address}en?token=wrong-horse").status_code == 403
        with httpx.Client(follow_redirects=True) as client:
            assert client.get(running.url).status_code == 200
            assert client.get(f"{address}fr").status_code == 200


def test_the_terminal_version_is_kept() -> None:
    ran = filao_sandbox("--terminal", "--help")
    assert "--terminal" in ran.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.root
async def test_a_full_disk_is_told_and_loses_nothing(chrome, tmp_path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    await asyncio.to_thread(
        subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], check=True
    )
    try:
        with sandbox(folder) as running:
            async with learning(chrome, running) as learner:
                await learner.go(3)
                await learner.act()
                await learner.sees("paid")
                confirmed = learner.stats().sent
                filler = folder / "filler"
                with filler.open("wb") as file, suppress(OSError):
                    while True:
                        file.write(bytes(65_536))
                        file.flush()
                await learner.page.wait_for_selector(".banner:visible")
                assert "The disk that holds the queue is full" in await learner.page.inner_text(".banner")
                filler.unlink()
                await learner.until("!document.querySelector('.banner').checkVisibility()")
                await learner.press(".main form button:nth-of-type(1)")
                await until_soon(lambda: learner.stats().sent > confirmed)
                await sums_hold(learner)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(folder)], check=True)


# --- words -----------------------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """Return what must be the same in both languages: the keys, the places for values, the number of options."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return len(value)
    return sorted(re.findall(r"{(\w+)}", value)), value.count("`")


@pytest.mark.parametrize("read", [words, lesson], ids=["words", "lesson"])
def test_both_languages_say_the_same(read) -> None:
    assert shape(read("en")) == shape(read("fr"))


def test_every_step_is_told_and_has_a_right_answer() -> None:
    told = lesson("en")
    assert list(told) == [step.key for step in STEPS]
    for step in STEPS:
        assert set(told[step.key]["actions"]) == set(step.actions)
        assert set(told[step.key]["conditions"]) == set(step.conditions)
        assert 0 <= step.answer < len(told[step.key]["options"])


@pytest.mark.parametrize(
    ("accepted", "language"), [("fr-CA,fr;q=0.9,en;q=0.8", "fr"), ("de,en;q=0.5", "en"), ("", "en"), ("*", "en")]
)
def test_a_browser_is_answered_in_a_language_that_it_asks_for(accepted, language) -> None:
    assert wanted(accepted) == language
