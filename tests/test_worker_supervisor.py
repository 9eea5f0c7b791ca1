"""What the supervisor makes of what its processes tell it, or do not."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from filao.worker import supervisor as supervisor_module
from filao.worker.supervisor import Supervisor
from tests.support.working import PATIENCE, until

pytestmark = pytest.mark.anyio

PROCESS = """
import msgspec, os, signal, sys
from pathlib import Path
from filao.worker.shift import Status
from filao.worker.supervisor import Report

slot, pipe = sys.argv[sys.argv.index("--slot") + 1], int(sys.argv[sys.argv.index("--report-to") + 1])

def tell(ready, refused=False):
    status = Status(ready=ready, healthy=True, running={}, handled=0, problems=[])
    os.write(pipe, b"what a handler wrote there\\n")
    os.write(pipe, msgspec.json.encode(Report(status, grace=0.0, refused=refused)) + b"\\n")

"""


@asynccontextmanager
async def supervising(tmp_path: Path, program: str, count: int) -> AsyncGenerator[tuple[Supervisor, asyncio.Task[int]]]:
    """Run a program in so many processes, and end them at last."""
    (tmp_path / "process.py").write_text(PROCESS + program)
    supervisor = Supervisor([sys.executable, str(tmp_path / "process.py"), str(tmp_path)], count)
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running
    finally:
        for _ in range(3):
            supervisor._stop()
        await asyncio.wait([running], timeout=PATIENCE)


def processes(supervisor: Supervisor) -> list[dict[str, object]]:
    state = supervisor.state()["processes"]
    assert isinstance(state, list)
    return state


async def test_a_process_that_can_never_start_stops_none_of_those_that_may(tmp_path) -> None:
    program = """
seen = Path(sys.argv[1], "seen")
if slot == "1":
    if seen.exists():
        Path(sys.argv[1], "again").touch()
    seen.touch()
    tell(ready=False, refused=True)
    sys.exit(3)
while not Path(sys.argv[1], "again").exists():
    signal.sigtimedwait([], 0.01)
tell(ready=True)
signal.pause()
"""
    async with supervising(tmp_path, program, 2) as (supervisor, running):
        await until(lambda: running.done() or processes(supervisor)[1]["ready"])
        assert not running.done()
        supervisor._stop()
        await asyncio.wait_for(running, PATIENCE)


async def test_a_process_that_does_not_stop_within_its_grace_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "KILLED_AFTER", 0.1)
    program = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(ready=True)
while True:
    signal.pause()
"""
    async with supervising(tmp_path, program, 1) as (supervisor, running):
        await until(lambda: supervisor.state()["ready"])
        supervisor._stop()
        assert await asyncio.wait_for(running, PATIENCE) == 0


async def test_a_process_that_reports_no_more_is_not_healthy(tmp_path, monkeypatch) -> None:
    async with supervising(tmp_path, "tell(ready=True); signal.pause()", 1) as (supervisor, _):
        await until(lambda: supervisor.state()["healthy"])
        monkeypatch.setattr(supervisor_module, "SILENT_AFTER", 0.0)
        (state,) = processes(supervisor)
        assert (state["healthy"], state["problems"]) == (False, ["it does not report"])


async def test_a_process_that_ends_too_soon_is_started_again_after_a_pause_even_if_it_ended_well(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(supervisor_module, "SHORT", 3600.0)
    async with supervising(tmp_path, "", 1) as (supervisor, _):
        await until(lambda: processes(supervisor)[0]["restarts"])


async def test_a_process_that_is_renewed_is_replaced_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(supervisor_module, "SHORT", 3600.0)
    program = """
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
tell(ready=True)
while True:
    signal.pause()
"""
    async with supervising(tmp_path, program, 1) as (supervisor, _):
        await until(lambda: supervisor.state()["ready"])
        first = processes(supervisor)[0]["pid"]
        supervisor.renew()
        await until(lambda: supervisor.state()["ready"] and processes(supervisor)[0]["pid"] != first)
        assert processes(supervisor)[0]["restarts"] == 0


@pytest.mark.parametrize("by", ["being renewed", "being stopped"])
async def test_the_pause_before_a_start_is_ended_by(tmp_path, monkeypatch, by) -> None:
    monkeypatch.setattr(supervisor_module, "PAUSE_FIRST", 3600.0)
    program = """
seen = Path(sys.argv[1], "seen")
if not seen.exists():
    seen.touch()
    sys.exit(1)
tell(ready=True)
signal.pause()
"""
    async with supervising(tmp_path, program, 1) as (supervisor, running):
        await until(lambda: processes(supervisor)[0]["restarts"])
        if by == "being renewed":
            supervisor.renew()
            await until(lambda: supervisor.state()["ready"])
        else:
            supervisor._stop()
            await asyncio.wait_for(running, PATIENCE)
