"""Learners who do only what the page says, one after the other: `python -m tests.support.laps COUNT SPEED LANGUAGE`.

It prints how long each step took, how many of them completed all eleven, and what was left of processes and files.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from playwright.async_api import Browser

from filao.sandbox.steps import STEPS
from tests.support.learner import Sandbox, browser, learning, sandbox
from tests.support.path import PATH

LAP_MAX = 300.0  # seconds


async def lap(opened: Browser, served: Sandbox, language: str) -> list[float]:
    """Complete the lesson, and return the seconds of each step."""
    async with learning(opened, served, language) as learner:
        times: list[float] = []
        for number, do in enumerate(PATH, 1):
            began = time.monotonic()
            await do(learner)
            await learner.has_done()
            times.append(time.monotonic() - began)
            if number < len(PATH):
                await learner.press(".next.strong")
        await learner.page.wait_for_selector(".numbers .done >> nth=10")
        if learner.complaints:
            raise AssertionError(learner.complaints)
    return times


async def main(count: int, speed: str, language: str) -> None:
    """Let learners take the lesson, and print what came of it."""
    completed = 0
    with tempfile.TemporaryDirectory() as folder:
        with sandbox(Path(folder) / "files", "--speed", speed) as served:
            async with browser() as opened:
                for number in range(1, count + 1):
                    try:
                        async with asyncio.timeout(LAP_MAX):
                            times = await lap(opened, served, language)
                    except Exception as error:
                        print(f"{language} {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    else:
                        completed += 1
                        told = ", ".join(f"{step.key} {one:.1f}" for step, one in zip(STEPS, times, strict=True))
                        print(f"{language} {number}: {sum(times):.0f} s: {told}", flush=True)
            said = served.said()
        left = (len(served.processes()), len(list(served.folder.iterdir())))
    print(f"{language}: {completed} of {count}; left: {left[0]} processes, {left[1]} files")
    print("\n".join(line for line in said.splitlines() if "the sandbox is open" not in line))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
