"""The sandbox under a burst of 2,000 claims: how fast its server answers, and how long its page stands still, in a real
browser.
"""

import asyncio
import json
import statistics
import time
from typing import Any

import httpx
from tests.support.learner import TOKEN, browser, learning
from tests.support.learner import sandbox as running

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
    for (const tab of ["load", "books", "slow", "timeline"]) {
      const button = document.getElementById(`tab-${tab}`);
      const began = performance.now();
      button.click();
      while (button.getAttribute("aria-selected") !== "true") await new Promise((go) => setTimeout(go, 2));
      times.push(performance.now() - began);
    }
    return times;
  }
"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def sandbox(ground: Ground) -> dict[str, Any]:
    """Measure in milliseconds: the first paint, the median of the answers, and the longest time without a frame."""
    with running(ground.folder / "sandbox") as served:
        return asyncio.run(_burst(served))


async def _burst(served: Any) -> dict[str, Any]:
    async with browser() as opened, learning(opened, served) as learner, httpx.AsyncClient() as client:
        painted: float = await learner.page.evaluate(PAINTED)
        await client.get(served.url, params={"token": TOKEN})
        await learner.act("create")
        await learner.sees("created")
        csv = served.folder / "burst.csv"
        csv.write_text("IDpol,ClaimAmount\n" + "".join(f"{number % 40},{number}\n" for number in range(1, CLAIMS + 1)))
        await learner.tab("load")
        for place, value in ((2, "0.1"), (3, "3")):
            await learner.page.fill(f".slider:nth-of-type({place}) input", value)
        await learner.page.wait_for_selector("[data-consumer='3'][data-state=waiting]")
        await opened.start_tracing(page=learner.page, categories=["toplevel"])
        await learner.page.evaluate(FRAMES)
        await learner.page.set_input_files("input[type=file]", csv)
        answers: list[float] = []
        presses: list[float] = []
        until = time.monotonic() + WATCHED
        while time.monotonic() < until:
            began = time.perf_counter()
            await client.get(f"{served.url}en")
            answers.append((time.perf_counter() - began) * 1000)
            presses += await learner.page.evaluate(PRESS)
            await asyncio.sleep(ASKED_EVERY)
        frames: list[float] = await learner.page.evaluate("window.frames_seen")
        task = _longest_task(await opened.stop_tracing())
        sent = learner.stats().sent
    return {
        "claims": sent,
        "painted": painted,
        "http": statistics.median(answers),
        "page": statistics.median(presses),
        "gap": max(frames),
        "task": task,
        "frames": len(frames) / WATCHED,
        "slow": sum(gap > 50 for gap in frames),
    }


def _longest_task(trace: bytes) -> float:
    """Return the longest task of the page's main thread in milliseconds of its own CPU: others' load does not count."""
    events = json.loads(trace)["traceEvents"]
    threads = {one["tid"] for one in events if one.get("args", {}).get("name") == "CrRendererMain"}
    tasks = (
        float(one["tdur"]) for one in events if one.get("tid") in threads and "RunTask" in one["name"] and "tdur" in one
    )
    return max(tasks) / 1000
