"""The sandbox under a burst of 2,000 claims: how fast its server answers, and how long its page stands still, in a real browser."""

import asyncio
import statistics
import time
from typing import Any

import httpx
from tests.learner import browser, learning
from tests.learner import sandbox as running

from bench.measures import Ground

CLAIMS = 2_000
WATCHED = 12.0  # seconds
ASKED_EVERY = 0.1  # seconds

FRAMES = """
  () => {
    window.frames_seen = [];
    let last = performance.now();
    const watch = (now) => { window.frames_seen.push(now - last); last = now; requestAnimationFrame(watch); };
    requestAnimationFrame(watch);
  }
"""
PRESS = """
  async () => {
    const times = [];
    for (const place of [2, 3, 1]) {
      const button = document.querySelector(`.tab-list button:nth-child(${place})`);
      const began = performance.now();
      button.click();
      while (button.getAttribute("aria-pressed") !== "true") await new Promise((go) => setTimeout(go, 2));
      times.push(performance.now() - began);
    }
    return times;
  }
"""


def sandbox(ground: Ground) -> dict[str, Any]:
    """Measure in milliseconds: the median of the answers, by HTTP and on the page, and the longest time without a frame."""
    with running(ground.folder / "sandbox") as served:
        return asyncio.run(_burst(served))


async def _burst(served: Any) -> dict[str, Any]:
    async with browser() as opened, learning(opened, served) as learner, httpx.AsyncClient() as client:
        await learner.act()
        await learner.sees("created")
        csv = served.folder / "burst.csv"
        csv.write_text("IDpol,ClaimAmount\n" + "".join(f"{number % 40},{number}\n" for number in range(1, CLAIMS + 1)))
        await learner.go(4)
        for _ in range(3):
            await learner.press(".workers .steps button >> nth=1")
        await learner.page.fill("section[aria-label=Rules] input >> nth=3", "0.05")
        await learner.page.press("section[aria-label=Rules] input >> nth=3", "Tab")
        await learner.page.wait_for_selector(".card.waiting[data-worker='3']")
        await learner.page.evaluate(FRAMES)
        await learner.page.set_input_files("input[type=file]", csv)
        answers: list[float] = []
        presses: list[float] = []
        until = time.monotonic() + WATCHED
        while time.monotonic() < until:
            began = time.perf_counter()
            await client.get(served.url)
            answers.append((time.perf_counter() - began) * 1000)
            presses += await learner.page.evaluate(PRESS)
            await asyncio.sleep(ASKED_EVERY)
        frames: list[float] = await learner.page.evaluate("window.frames_seen")
        sent = learner.stats().sent
    return {
        "claims": sent,
        "http": statistics.median(answers),
        "page": statistics.median(presses),
        "gap": max(frames),
        "frames": len(frames) / WATCHED,
        "slow": sum(gap > 100 for gap in frames),
    }
