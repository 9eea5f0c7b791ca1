"""A learner at the sandbox: a real browser on the page of a real server, and a broker on the file of the learner's
room.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

import filao
import filao.sync
from filao.sandbox.steps import STEPS
from filao.sandbox.visits import LINGER, ROOMS_MAX

CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
PATIENCE = 60.0
TOKEN = "correct-horse-battery"
AXE = Path(sys.prefix) / "npm" / "node_modules" / "axe-core" / "axe.min.js"
TOO_SMALL = Path(__file__).with_name("too_small.js").read_text(encoding="utf-8")
OVERLAPS = Path(__file__).with_name("overlaps.js").read_text(encoding="utf-8")
BELOW_THE_FOLD = (
    "(({ scrollHeight, clientHeight }) => scrollHeight - clientHeight)(document.querySelector('.lesson-body'))"
)
INTO_THE_TIMELINE = """
    (({ scrollHeight, clientHeight }) => scrollHeight - clientHeight)(document.querySelector(".theatre, .sheet-of"))
"""
BEATS = 5  # of a step: idea, predict, do, see, why
A_LINE = 22  # pixels: fonts differ
START = """
import runpy, sys
from filao.sandbox import visits
visits.LINGER, visits.ROOMS_MAX = float(sys.argv.pop(1)), int(sys.argv.pop(1))
runpy.run_module("filao", run_name="__main__", alter_sys=True)
"""
QUIET = (  # without them a browser looks for its maker, which a test machine cannot reach
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def chromium() -> str | None:
    """Return the path of an installed browser."""
    return next((path for path in CHROMIUM if Path(path).exists()), None)


class Sandbox:
    """A running `filao sandbox`; a test says how many rooms it has, and how long it keeps them."""

    def __init__(self, folder: Path, *arguments: str, linger: float = LINGER, rooms: int = ROOMS_MAX) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rooms_max = rooms
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", START, str(linger), str(rooms)),
                    *("sandbox", "--no-browser", "--port", "0", *arguments),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(folder), "FILAO_TOKEN": TOKEN},
                start_new_session=True,
            )
        until(lambda: "the sandbox is open" in self.said() or self.process.poll() is not None)
        found = re.search(r"http://\S+", self.said())
        assert found, self.said()
        self.address = found[0]
        """Its URL, with the token."""
        self.url = found[0].partition("?")[0]

    def said(self) -> str:
        return self.log.read_text()

    def rooms(self) -> list[Path]:
        return sorted(self.folder.glob("filao-sandbox-*/room-*/claims.db"), key=lambda path: path.stat().st_mtime)

    def processes(self) -> set[int]:
        """Return the processes of its rooms."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"filao.sandbox" in command and str(self.folder).encode() in command:
                    found.add(int(entry.name))
        return found

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@contextmanager
def sandbox(folder: Path, *arguments: str, linger: float = LINGER, rooms: int = ROOMS_MAX) -> Generator[Sandbox]:
    """Run a sandbox whose temporary files are in a folder, and end it."""
    running = Sandbox(folder, *arguments, linger=linger, rooms=rooms)
    try:
        yield running
    finally:
        try:
            running.end()
        finally:
            running.process.kill()


class Learner:
    """A learner in front of the page."""

    def __init__(self, page: Page, sandbox: Sandbox, language: str) -> None:
        self.page = page
        page.set_default_timeout(PATIENCE * 1000)
        self.language = language
        self._sandbox = sandbox
        self.complaints: list[str] = []
        """What the browser's console said."""
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def arrive(self) -> None:
        """Open the page, and press "start"."""
        await until_soon(
            lambda: len(self._sandbox.rooms()) < self._sandbox.rooms_max
        )  # those of learners who have left close soon
        before = set(self._sandbox.rooms())
        await self.page.goto(f"{self._sandbox.url}{self.language}?token={TOKEN}")
        await self.press(".start")
        await self.page.wait_for_selector(".lesson h2")
        self.room = (set(self._sandbox.rooms()) - before or set(self._sandbox.rooms())).pop()

    @contextmanager
    def broker(self) -> Generator[filao.sync.Broker]:
        """Open the room's queue directly."""
        with filao.sync.connect(self.room) as broker:
            yield broker

    def stats(self) -> filao.QueueStats:
        with self.broker() as broker:
            return broker.stats("claims.processing")

    async def press(self, selector: str) -> None:
        await self.page.click(selector)

    async def go(self, step: int) -> None:
        await self.press(f".numbers li:nth-child({step}) button")
        await self.page.wait_for_selector(f".lesson[data-step={STEPS[step - 1].key}]")

    async def act(self, key: str = "") -> None:
        """Press a button of the open step, as soon as it can be pressed; the first of them, if none is named."""
        await self.press(f".lesson .act[data-act={key}]:enabled" if key else ".lesson .act:enabled >> nth=0")

    async def predict(self, place: int) -> None:
        """Choose an answer, and wait until that is noted: what stands below it may move then."""
        await self.press(f".predict .option:nth-of-type({place}) input")
        await self.page.wait_for_selector(".predict .option.on")

    async def sees(self, *conditions: str) -> None:
        """Wait until conditions of the step are shown to hold."""
        for condition in conditions:
            await self.page.wait_for_selector(f"[data-condition={condition}].met")

    async def has_done(self) -> str:
        """Wait until the step is done, and return why."""
        await self.page.wait_for_selector(".lesson .why")
        return await self.page.inner_text(".lesson .why")

    async def write(self, code: str) -> None:
        """Put code into the editor of the last step."""
        await self.page.fill("textarea.code", code)

    async def above_the_fold(self) -> None:
        """Check that the whole step, as it is now, can be seen without scrolling."""
        assert await self.page.evaluate(BELOW_THE_FOLD) < A_LINE, await self.page.inner_text(".lesson-body")

    async def presents(self) -> None:
        """Go through the beats of the step as a teacher does, and check that the stage covers nothing below it."""
        await self.press(".present")
        for beat in range(1, BEATS + 1):
            await self.page.wait_for_selector(f".beats li:nth-child({beat}).on")
            async with asyncio.timeout(PATIENCE):
                while (
                    await self.page.evaluate(INTO_THE_TIMELINE) > 0
                ):  # the next scene is drawn as high as there is room
                    await asyncio.sleep(0.02)
            if beat < BEATS:
                await self.page.keyboard.press("ArrowRight")
        await self.press(".present")
        await self.page.wait_for_selector(".lesson")

    async def checks(self) -> dict[str, str]:
        """Have the code checked, and return how each check ended."""
        run = await self.page.get_attribute(".checks", "data-run")
        await self.press("[data-act=check]:enabled")
        await self.page.wait_for_selector(
            f".checks:not([data-run='{run}']):not([data-running])", timeout=PATIENCE * 3000
        )
        found = await self.page.eval_on_selector_all(
            "[data-check]", "all => all.map(one => [one.dataset.check, one.dataset.state])"
        )
        return dict(found)

    async def until(self, expression: str) -> None:
        await self.page.wait_for_function(expression)

    async def tab(self, name: str) -> None:
        await self.press(f"#tab-{name}")
        await self.page.wait_for_selector(f".lower[data-tab={name}]")

    async def slide(self, **wanted: str) -> None:
        """Move sliders of the load to values."""
        await self.tab("load")
        for slider, value in wanted.items():
            await self.page.fill(f".slider:nth-of-type({SLIDERS.index(slider) + 1}) input", value)

    async def violations(self, *rules: str) -> list[str]:
        """Return the barriers that axe-core finds, by all of its rules or by those that are named."""
        await self.page.add_script_tag(path=AXE)
        wanted = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
        found = await self.page.evaluate("(wanted) => axe.run(wanted)", wanted)
        return [
            f"{one['id']}: {[(node['html'][:160], node['failureSummary'][:200]) for node in one['nodes'][:4]]}"
            for one in found["violations"]
        ]

    async def texts_too_small(self) -> list[str]:
        """Return the texts of less than 14 pixels, and on the stage of less than 16, as they are on the screen."""
        found: list[str] = await self.page.evaluate(TOO_SMALL)
        return found

    async def overlaps(self) -> list[str]:
        """Return what covers what on the stage, in scenes that the lesson can show."""
        found: list[str] = await self.page.evaluate(OVERLAPS)
        return found

    async def shoot(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=folder / f"{name}-{self.language}.png")


SLIDERS = ("arrivals", "work", "consumers", "failing")
TABS = ("timeline", "slow", "story", "load", "books", "python", "compare", "glossary")


@asynccontextmanager
async def browser() -> AsyncGenerator[Browser]:
    """Run a headless Chromium."""
    async with async_playwright() as playwright:
        opened = await playwright.chromium.launch(executable_path=chromium(), args=list(QUIET))
        try:
            yield opened
        finally:
            await opened.close()


@asynccontextmanager
async def learning(browser: Browser, sandbox: Sandbox, language: str = "en", **context: Any) -> AsyncGenerator[Learner]:
    """Open the page in a browser of its own, which shares no cookie with another."""
    settings: dict[str, Any] = {
        "viewport": {"width": 1280, "height": 720},
        "bypass_csp": True,
    } | context  # to wait for expressions
    async with await browser.new_context(**settings) as own:
        learner = Learner(await own.new_page(), sandbox, language)
        await learner.arrive()
        yield learner


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


async def until_soon(condition: Callable[[], Any]) -> Any:
    """As `until`, for tests on an event loop."""
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):
            await asyncio.sleep(0.02)
    return found
