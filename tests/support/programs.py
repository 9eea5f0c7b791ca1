"""What tests share that run a program in its own process."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import filao
import filao.sync

PATIENCE = 60.0  # seconds after which a program that hangs is killed, and its test fails
CLAIMS: filao.Queue = filao.Queue("claims", lease=3600)
PREAMBLE = """
import asyncio, gc, multiprocessing, os, random, signal, sys, threading, time
import filao, filao.sync
url = sys.argv[1]
claims = filao.Queue("claims", lease=3600)
def say(*words): print(*words, flush=True)
"""


def run(url: str | Path, program: str, code: int = 0) -> list[str]:
    """Run a program, which must end in time, and return its lines."""
    text = PREAMBLE + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", text, str(url)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Exception in thread" not in done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def db(tmp_path: Path) -> Path:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(CLAIMS)
        broker.send_many(CLAIMS, range(3))
    return tmp_path / "claims.db"


def attempts(db: Path) -> list[int]:
    """Receive what is ready, and return how often each was delivered: leases that were given back have used none."""
    with filao.sync.connect(db) as broker:
        return [message.attempt for message in broker.receive_many(CLAIMS, 9, wait=0)]
