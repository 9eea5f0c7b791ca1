"""The power is cut while messages are sent, received and acked: what was confirmed survives, and what was acked is
gone.

The disk is an ext4 file system in a file that is shut down without flushing its log (`torture/disk.py`); the clerks
that work on it report through pipes, which the cut does not touch.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tests.torture import clerk, disk

ROOT = Path(__file__).parent.parent
CUTS = 10
PATIENCE = 60.0  # seconds after which a clerk that hangs is killed, and the test fails
RELAXED_CUTS_MAX = 10  # a cut at a lucky moment loses nothing even then; so many in a row do not happen

pytestmark = pytest.mark.root


@pytest.fixture
def fragile_disk(tmp_path: Path) -> Iterator[disk.Mounted]:
    reason = disk.hindrance("mkfs.ext4")
    if reason:
        pytest.skip(reason)
    try:
        with disk.fragile_disk(tmp_path / "disk") as mounted:
            yield mounted
    except disk.CannotMount as error:
        pytest.skip(str(error))


def work_until_the_power_is_cut(disk_: disk.Mounted, name: str, durability: str, confirmations: int) -> clerk.Said:
    """Let one process send with 64 tasks and another receive and ack with 16; cut after so many confirmed sends."""
    with ExitStack() as stack:
        sender = stack.enter_context(_clerk(disk_, name, durability, "--senders=64", "--ackers=0"))
        acker = stack.enter_context(_clerk(disk_, name, durability, "--senders=0", "--ackers=16"))
        for clerk_ in (sender, acker):
            watchdog = threading.Timer(PATIENCE, clerk_.kill)
            watchdog.start()
            stack.callback(watchdog.cancel)
            stack.callback(clerk_.kill)
        assert sender.stdout is not None
        assert acker.stdout is not None
        lines = [acker.stdout.readline()]  # so that both are at work
        lines += [sender.stdout.readline() for _ in range(confirmations)]
        at = time.monotonic()
        disk_.cut_power()
        sender.kill()
        acker.kill()
        lines += [*sender.stdout, *acker.stdout]
    disk_.restore_power()
    # A flush that runs while the file system is shut down may return as if it had been done; no power cut does that.
    return clerk.understood(lines, before=at)


def _clerk(disk_: disk.Mounted, name: str, durability: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.torture.clerk", str(disk_.folder / "claims.db")]
    more = [f"--name={name}", f"--durability={durability}", "--rounds=1000000", *options]
    return subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_power_cut_loses_nothing_that_was_confirmed_and_brings_back_nothing_that_was_acked(fragile_disk) -> None:
    db = fragile_disk.folder / "claims.db"
    chance = Random(7)
    said = clerk.Said()
    for cut in range(CUTS):
        said.update(work_until_the_power_is_cut(fragile_disk, f"{cut}-", "full", chance.randrange(50, 1_500)))
        assert len(said.sent) > cut
        assert clerk.contradictions(said, clerk.found(db)) == []


def test_the_same_cut_does_lose_what_was_sent_with_relaxed_durability(fragile_disk) -> None:
    db = fragile_disk.folder / "claims.db"
    chance = Random(7)
    for cut in range(RELAXED_CUTS_MAX):
        said = work_until_the_power_is_cut(fragile_disk, f"{cut}-", "relaxed", chance.randrange(50, 1_500))
        if any("is lost" in line for line in clerk.contradictions(said, clerk.found(db))):
            return
    pytest.fail("nothing was lost, so this rig proves nothing")
