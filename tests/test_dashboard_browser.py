"""The dashboard as operators use it: in a real browser, by keyboard alone, on a queue under load."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, BrowserContext, Page

import filao
from tests.conftest import missing
from tests.support.learner import PATIENCE, browser, chromium, until

pytestmark = pytest.mark.anyio

SHOTS = Path(__file__).parents[1] / "build" / "dashboard"
AXE = Path(sys.prefix) / "npm" / "node_modules" / "axe-core" / "axe.min.js"
TOKEN = "correct-horse-battery"
KINDS = (ValueError("bad amount"), KeyError("policy"), RuntimeError("no answer"), "duplicate")
LETTERS = 3_000
ENDED = 130  # by Ctrl-C


class Dashboard:
    """A running `filao dashboard`, on a file of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.file = folder / "claims.db"
        self.log = folder / "log"
        asyncio.run(_fill(self.file))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "filao", "dashboard", str(self.file), "--listen", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"FILAO_TOKEN": TOKEN},
                start_new_session=True,
            )
        until(lambda: "Ctrl-C ends it" in self.log.read_text() or self.process.poll() is not None)
        found = re.search(r"http://\S+", self.log.read_text())
        assert found, self.log.read_text()
        self.url = found[0]


async def _fill(file: Path) -> None:
    """Let messages die of four kinds of error; the body of one holds a script, and that of another is large."""
    bodies: list[Any] = [{"claim_id": number} for number in range(LETTERS - 2)]
    bodies += [{"note": "<script>document.title = 'broken into'</script>"}, "x" * 256_000]
    async with filao.connect(file) as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_many("claims.processing", bodies)
        for first in range(0, LETTERS, 1_000):
            messages = await broker.receive_many("claims.processing", 1_000)
            await asyncio.gather(
                *(message.reject(KINDS[(first + place) % 4]) for place, message in enumerate(messages))
            )


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    if chromium() is None:
        missing("Chromium")
    running = Dashboard(tmp_path_factory.mktemp("dashboard"), "--allow-actions", "--token")
    try:
        yield running
        with httpx.Client(base_url=running.url, timeout=PATIENCE) as tab:
            tab.post("enter", data={"token": TOKEN})
            with tab.stream("GET", "en/queues?live=stream") as live:  # a tab that is open neither holds it up ...
                assert next(live.iter_lines())
                running.process.send_signal(signal.SIGINT)
                assert running.process.wait(PATIENCE) in (0, ENDED)
        assert "Traceback" not in running.log.read_text()  # ... nor is its end told as a fault
    finally:
        running.process.kill()


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """As everywhere; one event loop for all tests of this file, so that they share a browser."""
    return "asyncio"


@pytest.fixture(scope="module")
async def chrome(anyio_backend: str) -> AsyncGenerator[Browser]:
    async with browser() as opened:
        yield opened


@pytest.fixture
async def context(chrome: Browser) -> AsyncGenerator[BrowserContext]:
    """Return a browser's cookies and tabs, of this test alone."""
    async with await chrome.new_context() as opened:
        yield opened


class Operator:
    """Somebody with a keyboard and no mouse."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        """What the browser's console had to say: of what broke a policy, among others."""
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(PATIENCE * 1000)

    async def arrive(self, url: str) -> None:
        """Come in by the token, which the page asks for in its first field."""
        await self.page.goto(url)
        self.complaints.clear()  # a browser calls the answer 401 an error
        await self.page.wait_for_selector("[name=token]:focus")  # a page gives it when it is first drawn
        await self.page.keyboard.type(TOKEN)
        await self.page.keyboard.press("Enter")
        await self.page.wait_for_selector("nav")

    async def reach(self, selector: str) -> None:
        """Press Tab until something has the focus."""
        for _ in range(60):
            if await self.page.evaluate(f"document.activeElement?.matches({selector!r}) ?? false"):
                return
            await self.page.keyboard.press("Tab")
        raise AssertionError(f"the keyboard does not reach {selector}")

    async def press(self, selector: str, then: str) -> None:
        """Press Enter on something, and wait for what comes."""
        await self.reach(selector)
        await self.page.keyboard.press("Enter")
        await self.page.wait_for_selector(then)

    async def violations(self, *rules: str) -> list[str]:
        """Return what axe-core complains about, by all of its rules or by these."""
        if not AXE.exists():
            missing("axe-core")
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE.read_text())
        found = await self.page.evaluate(
            "only => axe.run({resultTypes: ['violations'], ...(only.length ? {runOnly: only} : {})})", rules
        )
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found["violations"]]

    async def shoot(self, path: str) -> None:
        """Keep what the screen shows, where somebody asked for it."""
        if os.environ.get("FILAO_SHOTS"):
            await self.page.screenshot(path=path)


async def test_three_thousand_dead_letters_are_triaged_by_keyboard_alone(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    await operator.arrive(dashboard.url)
    await operator.press("nav a[href$=dead]", ".cards tbody tr:nth-child(4)")
    async with filao.connect(dashboard.file) as broker:
        for act, kind, rate in (
            ("kr", "ValueError", ""),
            ("kd", "KeyError", ""),
            ("kr", "RuntimeError", "5000"),
        ):
            await operator.press(f"[id^={act}-][id$={kind}]", ".question")
            if rate:
                await operator.reach("[name=rate]")
                await operator.page.keyboard.type(rate)
                await operator.page.keyboard.press("Enter")
            else:
                await operator.press("button.strong", ".job")
            await operator.page.wait_for_selector(".job strong:text-is('done')")
            await operator.page.wait_for_selector(f"[id^=kr-][id$={kind}]", state="detached")
        stats = await broker.stats("claims.processing")
        assert (stats.ready, stats.dead, stats.cancelled) == (1_500, 750, 750)
        await broker.send_to_queue("claims.processing", 1)
        await operator.press("nav a[href$=queues]", "text=1,501")  # it lives: nobody reloads
        await broker.send_to_queue("claims.processing", 1)
        await operator.page.wait_for_selector("text=1,502")
    assert operator.complaints == []


async def test_nothing_bars_the_way_nor_breaks_the_policy_in_light_in_dark_and_on_a_phone(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    await operator.arrive(dashboard.url)
    async with filao.connect(dashboard.file) as broker:
        found = [
            one
            for state in ("ready", "dead")
            for one in await broker.peek("claims.processing", state=state, limit=LETTERS)
        ]
    script = next(one for one in found if isinstance(one.body, dict) and "note" in one.body)
    large = next(one for one in found if isinstance(one.body, str))
    pages = ["queues", "dead", "processes", "log", "queue?name=claims.processing&state=dead"]
    pages += [f"message?queue=claims.processing&id={one.id}" for one in (large, script)]
    with_colours = {"queues", "dead", "queue", "message"}
    SHOTS.mkdir(parents=True, exist_ok=True)
    for path in pages:
        await operator.page.goto(f"{dashboard.url}fr/{path}")
        page = path.partition("?")[0]
        is_large = large.id in path
        assert is_large or await operator.violations() == [], path
        await operator.shoot(f"{SHOTS / page}-light.png")
        await operator.page.emulate_media(color_scheme="dark")
        assert is_large or page not in with_colours or await operator.violations("color-contrast") == [], path
        await operator.shoot(f"{SHOTS / page}-dark.png")
        await operator.page.emulate_media(color_scheme="light")
        await operator.page.set_viewport_size({"width": 390, "height": 800})
        assert await operator.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        await operator.shoot(f"{SHOTS / page}-phone.png")
        await operator.page.set_viewport_size({"width": 1280, "height": 800})
        if path.startswith("message"):
            assert len(await operator.page.inner_text("pre.body")) <= 64 * 1024
    assert "<script>" in await operator.page.inner_text("pre.body")
    assert "broken" not in await operator.page.title()
    assert operator.complaints == []


async def test_more_tabs_than_a_browser_has_connections_all_live(context, dashboard) -> None:
    """It has six to one server: were each tab to keep one, the seventh would never load."""
    first = Operator(await context.new_page())
    await first.arrive(dashboard.url)
    pages = [first.page, *[await context.new_page() for _ in range(6)]]
    await asyncio.gather(*(page.goto(f"{dashboard.url}en/queues", timeout=PATIENCE * 1000) for page in pages[1:]))
    async with filao.connect(dashboard.file) as broker:
        await broker.declare(filao.Queue("just.declared"))
    for page in pages:
        await page.wait_for_selector("text=just.declared", timeout=PATIENCE * 1000)


async def test_a_browser_goes_back_to_what_was_to_be_confirmed_and_loads_it_anew(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    page, confirm = operator.page, ".question"
    await operator.arrive(dashboard.url)
    async with filao.connect(dashboard.file) as broker:
        await broker.declare(filao.Queue("paused.here"))
        await page.goto(f"{dashboard.url}en/queue?name=paused.here")
        await operator.press("button[name=do][value*=pause]", confirm)
        await page.reload()
        await operator.press("a[hreflang=fr]", f"html[lang=fr] {confirm}")
        await operator.press("button.strong", ".job strong")
        assert (await broker.stats("paused.here")).paused
        await page.go_back()
        await page.wait_for_selector(f"html[lang=fr] {confirm}")
        await broker.delete_queue("paused.here")
    assert operator.complaints == []


async def test_a_page_that_gets_no_stream_lives_all_the_same(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    await operator.arrive(dashboard.url)
    await operator.page.route("**live=stream", lambda route: route.fulfill(status=503))
    await operator.page.goto(f"{dashboard.url}en/queues")
    async with filao.connect(dashboard.file) as broker:
        await broker.declare(filao.Queue("declared.meanwhile"))
    await operator.page.wait_for_selector("text=declared.meanwhile")


async def test_what_is_pressed_while_the_page_is_drawn_anew_does_its_work(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    page = operator.page
    await operator.arrive(dashboard.url)
    await page.route("**live=*", lambda route: route.abort())  # nothing comes but what is drawn here
    await page.goto(f"{dashboard.url}en/queues")
    for pressed, then in (("td.num", "#new"), ("a[id='q-claims.processing']", "h1:text-is('claims.processing')")):
        await page.hover(pressed)
        await page.mouse.down()
        await page.evaluate("draw(part.innerHTML + '<p id=new>new</p>')")
        assert await page.query_selector("#new") is None or pressed != "td.num"
        await page.mouse.up()
        await page.wait_for_selector(then)


async def test_a_page_that_nobody_answers_any_more_says_so_until_somebody_does(context, dashboard) -> None:
    operator = Operator(await context.new_page())
    page = operator.page
    await operator.arrive(dashboard.url)
    await page.clock.install()
    await page.route("**live=*", lambda route: route.abort())
    await page.goto(f"{dashboard.url}en/queues")
    assert await page.is_hidden("#silent")
    await page.wait_for_event("requestfailed", lambda request: "live=" in request.url)
    await page.clock.fast_forward(15_000)
    await page.wait_for_selector("#silent time:text-matches('[0-9]')")
    await page.unroute("**live=*")
    await page.clock.fast_forward(5_000)
    await page.wait_for_selector("#silent", state="hidden")


async def test_what_has_long_names_or_reads_from_the_right_keeps_to_its_place(context, dashboard) -> None:
    operator, name, header = Operator(await context.new_page()), "a" * 128, "h" * 200
    page = operator.page
    await operator.arrive(dashboard.url)
    async with filao.connect(dashboard.file) as broker:
        await broker.declare(filao.Queue(name, max_attempts=1))
        receipt = await broker.send_to_queue(name, 1, headers={header: "v"})
        await (await broker.receive_from_queue(name)).reject("\u05e9\u05dc\u05d5\u05dd " + "e" * 300)
        shown = (
            f"queue?name={name}&state=dead",
            f"message?queue={name}&id={receipt.id}",
            f"dead?queue={name}",
            "queues",
        )
        for width, path in product((1280, 390), shown):
            await page.set_viewport_size({"width": width, "height": 800})
            await page.goto(f"{dashboard.url}en/{path}")
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, path)
            tables = await page.query_selector_all(".scroll") if path[:6] != "queue?" else []  # wide by its instants
            for table in tables:
                assert await table.evaluate("one => one.scrollWidth <= one.clientWidth"), (width, path)
            assert await page.evaluate("getComputedStyle(document.querySelector('main a')).unicodeBidi") == "isolate"
        await broker.delete_queue(name, messages=True)


def test_a_wrong_token_and_a_taken_port_are_refused(dashboard, tmp_path) -> None:
    wrong = httpx.post(f"{dashboard.url}enter", data={"token": "wrong-horse-battery"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    port = dashboard.url.rstrip("/").rpartition(":")[2]
    ran = subprocess.run(
        [sys.executable, "-m", "filao", "dashboard", str(dashboard.file), "--listen", port],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert ran.returncode == 2
    assert "cannot be listened on" in ran.stderr
