"""Filao inside what others run: a web server that starts its process anew."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import httpx

import filao.sync
from tests.test_docs import ENGLISH, blocks_of

PATIENCE = 60.0  # seconds, for a loaded machine
PORTAL = next(block.code for block in blocks_of(ENGLISH / "how-to" / "frameworks.md") if block.title == "portal.py")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def submit(socket: Path, claim: int) -> int:
    """Hand in a claim, and return the status of the answer."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://portal") as customer:
        return customer.post("/claims", json={"claim_id": claim}, timeout=PATIENCE).status_code


def is_noticed(program: Path, changed_at: int, log: Path) -> bool:
    """Change a file's time, and return whether uvicorn has noticed a change: its first look may come after one."""
    os.utime(program, (changed_at, changed_at))
    return "detected changes" in log.read_text()


def test_the_portal_of_the_docs_is_started_anew_by_uvicorn_and_loses_nothing(tmp_path) -> None:
    portal, socket, log = tmp_path / "portal.py", tmp_path / "web.sock", tmp_path / "log"
    portal.write_text(PORTAL)
    command = [sys.executable, "-m", "uvicorn", "portal:app", "--uds", str(socket), "--reload"]
    with log.open("wb") as out:
        serving = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    try:
        until(lambda: "Application startup complete" in log.read_text())
        assert submit(socket, 1) == 202
        portal.write_text(PORTAL + "\n# changed\n")
        later = count(int(time.time()) + 60)
        until(lambda: is_noticed(portal, next(later), log))
        until(lambda: log.read_text().count("Application startup complete") > 1)
        assert submit(socket, 2) == 202
        os.killpg(serving.pid, signal.SIGINT)  # as Ctrl-C does
        serving.wait(PATIENCE)
    finally:
        if serving.poll() is None:
            os.killpg(serving.pid, signal.SIGKILL)
            serving.wait(PATIENCE)
    assert "Traceback" not in log.read_text()
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        stats = broker.stats("claims.processing")
    assert (stats.ready, stats.receivers) == (2, ())
