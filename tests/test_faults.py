"""Disks that fail and processes that die in the middle of a write, by `strace`'s fault injection; and disks that are
full.

After each fault the promises are the same: what was confirmed is there, what was acked is not, and the file is whole.
"""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest

import filao
from filao.engines.sqlite import backup
from tests.conftest import engine_of
from tests.torture import clerk, disk

ROOT = Path(__file__).parent.parent
WRITE, FLUSH = "pwrite64", "fsync,fdatasync"
SIGKILL = -9

needs_strace = pytest.mark.usefixtures("strace")


@pytest.fixture(scope="module")
def strace() -> None:
    """Look whether faults can be injected here: on a laptop that is no must, in CI it is."""
    probe = ["strace", "-f", "-o", os.devnull, "-e", "inject=fsync:error=EIO:when=9", "true"]
    works = shutil.which("strace") and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    if not works:
        reason = "strace is missing, or may not trace here"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def with_fault(fault: str, command: Sequence[str], *, only: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program whose system calls, or those on one file `only`, meet a fault; an empty one is none."""
    calls, _, _ = fault.partition(":")
    where = [] if only is None else ["-P", str(only)]
    tracer = ["strace", "-f", "--quiet=all", "-o", os.devnull, *where, "-e", f"trace={calls}", "-e", f"inject={fault}"]
    whole = [*tracer, *command] if fault else list(command)
    return subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def clerk_with(fault: str, db: Path, *, only: Path | None = None, rounds: int) -> subprocess.CompletedProcess[str]:
    """Run a clerk whose system calls meet a fault."""
    command = [sys.executable, "-B", "-m", "tests.torture.clerk", str(db), "--rounds", str(rounds)]
    return with_fault(fault, command, only=only)


def check_what_is_left(lines: Sequence[str], db: Path) -> None:
    assert clerk.contradictions(clerk.understood(lines), clerk.found(db)) == []


# --- killed in the middle --------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 4, 7, 13, 30, 60, 111, 222, 333, 555])
def test_nothing_confirmed_is_lost_when_killed_at_the_nth_write(tmp_path, nth) -> None:
    db = tmp_path / "claims.db"
    run = clerk_with(f"{WRITE}:signal=KILL:when={nth}", db, rounds=1_000)
    assert run.returncode == SIGKILL, run.stderr
    check_what_is_left(run.stdout.splitlines(keepends=True), db)


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6, 8, 13, 30])
def test_nothing_confirmed_is_lost_when_killed_at_the_nth_flush(tmp_path, nth) -> None:
    db = tmp_path / "claims.db"
    run = clerk_with(f"{FLUSH}:signal=KILL:when={nth}", db, rounds=1_000)
    assert run.returncode == SIGKILL, run.stderr
    check_what_is_left(run.stdout.splitlines(keepends=True), db)


@needs_strace
@pytest.mark.parametrize("nth", [3, 5, 20])
def test_nothing_confirmed_is_lost_when_killed_while_the_wal_is_written_back(tmp_path, nth) -> None:
    db = tmp_path / "claims.db"
    run = clerk_with(f"{WRITE}:signal=KILL:when={nth}", db, only=db, rounds=1_000)
    assert run.returncode == SIGKILL, run.stderr
    check_what_is_left(run.stdout.splitlines(keepends=True), db)


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_restore_that_is_killed_at_its_nth_step_can_be_made_again_and_loses_nothing(tmp_path, nth) -> None:
    db, copy = tmp_path / "claims.db", tmp_path / "claims.backup"
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_to_queue("claims", "kept")
        backup.back_up(db, copy)
        broker.send_to_queue("claims", "later")
        command = [sys.executable, "-B", "-m", "filao", "restore", str(db), str(copy), "--replace"]
        killed = with_fault(f"link,linkat,rename,unlink:signal=KILL:when={nth}", command)
        assert killed.returncode == SIGKILL
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    with filao.sync.connect(db) as broker:
        assert [message.body for message in broker.peek("claims")] == ["kept"]
    bodies = set()
    for kept in tmp_path.glob("claims.db.replaced-[0-9]"):
        with filao.sync.connect(kept) as broker:
            bodies |= {message.body for message in broker.peek("claims")}
    assert "later" in bodies


BACK_UP = [sys.executable, "-B", "-m", "filao", "backup"]


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 4, 6, 8])
def test_a_backup_that_is_killed_leaves_the_queue_as_it_is_and_no_half_copy(tmp_path, nth) -> None:
    db, copy = tmp_path / "claims.db", tmp_path / "claims.backup"
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_to_queue("claims", "kept")
        killed = with_fault(f"{WRITE},{FLUSH},rename:signal=KILL:when={nth}", [*BACK_UP, str(db), str(copy)])
        assert killed.returncode == SIGKILL, killed.stderr
        assert not copy.exists()
        again = with_fault("", [*BACK_UP, str(db), str(copy)])
        assert again.returncode == 0, again.stderr
        assert [message.body for message in broker.peek("claims")] == ["kept"]
    with filao.sync.connect(copy) as broker:
        assert [message.body for message in broker.peek("claims")] == ["kept"]


@needs_strace
@pytest.mark.parametrize("fault", [f"{WRITE}:error=ENOSPC", f"{WRITE}:error=EIO:when=3+", f"{FLUSH}:error=EIO"])
@pytest.mark.parametrize("command", ["backup", "restore"])
def test_a_disk_that_fails_under_a_copy_leaves_the_queue_as_it_is_and_nothing_beside_it(
    tmp_path, command, fault
) -> None:
    db, copy = tmp_path / "claims.db", tmp_path / "claims.backup"
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_to_queue("claims", "kept")
        if command == "restore":
            backup.back_up(db, copy)
        partial = tmp_path / (f"{copy.name}{backup.PARTIAL}" if command == "backup" else f"{db.name}{backup.RESTORING}")
        options = [] if command == "backup" else ["--replace"]
        failed = with_fault(fault, [*BACK_UP[:-1], command, str(db), str(copy), *options], only=partial)
        assert failed.returncode == 4, failed.stdout + failed.stderr
        assert str(tmp_path) in failed.stderr
        assert "Traceback" not in failed.stderr
        assert copy.exists() == (command == "restore")
        assert not list(tmp_path.glob(f"{partial.name}*"))
        broker.send_to_queue("claims", "after")
        assert [message.body for message in broker.peek("claims")] == ["kept", "after"]


# --- beside the file, and its clock ----------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("fault", [*(f"mkdir,bind,flock:signal=KILL:when={nth}" for nth in (1, 2, 3, 5, 8))])
def test_who_is_killed_while_making_what_lies_beside_the_file_is_in_nobodys_way(tmp_path, fault) -> None:
    db = tmp_path / "claims.db"
    killed = clerk_with(fault, db, rounds=1_000)
    assert killed.returncode == SIGKILL, killed.stderr
    later = clerk_with("", db, rounds=1)
    assert later.returncode == 0, later.stderr
    check_what_is_left([*killed.stdout.splitlines(keepends=True), *later.stdout.splitlines(keepends=True)], db)


@needs_strace
@pytest.mark.parametrize("fault", ["mkdir:error=ENOSPC", "flock:error=ENOLCK"])
def test_what_cannot_be_made_beside_the_file_is_an_error_that_names_it_and_harms_nothing(tmp_path, fault) -> None:
    db = tmp_path / "claims.db"
    refused = clerk_with(fault, db, rounds=1)
    assert "Traceback" not in refused.stderr
    said = clerk.understood(refused.stdout.splitlines(keepends=True))
    assert said.errors, "the fault was not met"
    for error in said.errors:
        assert error.startswith("Engine")
        assert str(db) in error
    later = clerk_with("", db, rounds=1)
    assert later.returncode == 0, later.stderr
    check_what_is_left([*refused.stdout.splitlines(keepends=True), *later.stdout.splitlines(keepends=True)], db)


@needs_strace
@pytest.mark.parametrize("nth", [1, 2, 3, 5])
def test_who_is_killed_while_setting_the_clock_after_a_start_of_the_machine_loses_nothing(tmp_path, nth) -> None:
    db = tmp_path / "claims.db"
    before = clerk_with("", db, rounds=10)
    with closing(sqlite3.connect(db)) as file, file:
        file.execute(
            "UPDATE filao_meta SET value = 'another-boot' || substr(value, instr(value, ' ')) WHERE name = 'clock'"
        )
    killed = clerk_with(f"{WRITE}:signal=KILL:when={nth}", db, rounds=1_000)
    assert killed.returncode == SIGKILL, killed.stderr
    check_what_is_left([*before.stdout.splitlines(keepends=True), *killed.stdout.splitlines(keepends=True)], db)
    with closing(sqlite3.connect(db)) as file:
        (clock,) = file.execute("SELECT value FROM filao_meta WHERE name = 'clock'").fetchone()
    assert not clock.startswith("another-boot")


# --- a disk that fails for a while -----------------------------------------------------------------------------------

FULL = ("is full", "free space and try again")
FAILED = ("failed", "filao doctor")


def check_errors(said: clerk.Said, db: Path, text: Sequence[str]) -> None:
    assert said.errors, "the fault was not met"
    for error in said.errors:
        assert error.startswith("Engine")
        assert str(db) in error
        assert all(part in error for part in text)


@needs_strace
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (f"{WRITE}:error=ENOSPC:when=120..130", FULL),
        (f"{WRITE}:error=EIO:when=120..130", FAILED),
        (f"{WRITE}:error=EDQUOT:when=120..130", (*FAILED, "a quota")),
        (f"{FLUSH}:error=EIO:when=12", FAILED),
        (f"{FLUSH}:error=EIO:when=12..16", FAILED),
        (f"{FLUSH}:error=ENOSPC:when=12..14", FAILED),
    ],
)
def test_a_disk_that_fails_is_reported_and_service_resumes_when_it_works_again(tmp_path, fault, text) -> None:
    db = tmp_path / "claims.db"
    run = clerk_with(fault, db, rounds=60)
    assert run.returncode == 0, run.stderr
    said = clerk.understood(run.stdout.splitlines(keepends=True))
    check_errors(said, db, text)
    assert len(said.sent) == 3 * 60, "not every send succeeded in the end"
    check_what_is_left(run.stdout.splitlines(keepends=True), db)


SENDING_THREADS = """
import sys, threading
import filao, filao.sync

def send(name):
    for number in range(60):
        body = f"{name}.{number}"
        try:
            broker.send_to_queue("claims", body)
        except filao.FilaoError:
            sys.stdout.write(f"failed {body}\\n")
        else:
            sys.stdout.write(f"sent {body}\\n")

with filao.sync.connect(sys.argv[1]) as broker:
    threads = [threading.Thread(target=send, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@needs_strace
@pytest.mark.parametrize("fault", [f"{FLUSH}:error=EIO:when=3..4", f"{WRITE}:error=ENOSPC:when=20..24"])  # of a thread
def test_threads_that_share_commits_on_a_disk_that_fails_lose_nothing_and_send_nothing_twice(tmp_path, fault) -> None:
    db = tmp_path / "claims.db"
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue("claims"))
    run = with_fault(fault, [sys.executable, "-c", SENDING_THREADS, str(db)])
    assert run.returncode == 0, run.stderr
    said = [line.split() for line in run.stdout.splitlines()]
    assert len(said) == 8 * 60
    sent = {body for word, body in said if word == "sent"}
    assert len(sent) < len(said), "the fault met nothing"
    with filao.sync.connect(db) as broker:
        stored = [message.body for message in broker.receive_many("claims", 1_000)]
    assert len(set(stored)) == len(stored)
    assert sent <= set(stored)


@needs_strace
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (f"{WRITE}:error=ENOSPC", FULL),
        (f"{WRITE}:error=EIO", FAILED),
        (f"{FLUSH}:error=EIO", FAILED),
        (f"{WRITE}:error=ENOSPC:when=30+", FULL),
        (f"{FLUSH}:error=EIO:when=4+", FAILED),
    ],
)
def test_a_disk_that_fails_when_the_file_is_created_leaves_nothing_in_the_way(tmp_path, fault, text) -> None:
    db = tmp_path / "claims.db"
    refused = clerk_with(fault, db, rounds=1)
    assert "the clerk gave up" in refused.stderr
    check_errors(clerk.understood(refused.stdout.splitlines(keepends=True)), db, text)
    later = clerk_with("", db, rounds=1)
    assert later.returncode == 0, later.stderr
    check_what_is_left(later.stdout.splitlines(keepends=True), db)


# --- a disk that is full ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    reason = disk.hindrance()
    if reason:
        pytest.skip(reason)
    try:
        with disk.small_disk(tmp_path / "disk", 4 * 1024 * 1024) as mounted:
            yield mounted.folder
    except disk.CannotMount as error:
        pytest.skip(str(error))


def fill(ballast: Path) -> None:
    """Write until there is no space left."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    assert shutil.disk_usage(ballast).free == 0


def open_files() -> int:
    """Return how many files this process holds open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


IS_FULL = r"claims\.db is full .* free space and try again"


@pytest.mark.root
def test_a_full_disk_is_a_clear_error_and_when_there_is_space_the_same_broker_goes_on(small_disk) -> None:
    async def main() -> None:
        async with filao.connect(small_disk / "claims.db") as broker:
            await broker.declare(filao.Queue("claims"))
            for body in ("held", "waiting"):
                await broker.send_to_queue("claims", body)
            held = await broker.receive_from_queue("claims", wait=0)
            assert held is not None
            fill(small_disk / "ballast")
            with pytest.raises(filao.EngineError, match=IS_FULL):
                await broker.send_to_queue("claims", "refused" * 10_000)
            together = (broker.send_to_queue("claims", "refused" * 10_000) for _ in range(5))
            for refusal in await asyncio.gather(*together, return_exceptions=True):
                assert isinstance(refusal, filao.EngineError)
            (small_disk / "ballast").unlink()
            await broker.send_to_queue("claims", "after")
            await held.ack()
            bodies = [message.body for message in await broker.receive_many("claims", 1_000, wait=0)]
            assert bodies == ["waiting", "after"]

    asyncio.run(main())


@pytest.mark.root
def test_a_receive_that_a_full_disk_refuses_leaves_nothing_open_behind(small_disk) -> None:
    db = small_disk / "claims.db"

    async def main() -> None:
        async with filao.connect(db) as broker:
            await broker.declare(filao.Queue("claims"))
            await broker.send_to_queue("claims", "waiting")
            await engine_of(broker)._jobs.alone(engine_of(broker)._database.write_back)  # a WAL without room of its own
            fill(small_disk / "ballast")
            before = open_files()
            for _ in range(20):
                with pytest.raises(filao.EngineError, match=IS_FULL):
                    await broker.receive_from_queue("claims", wait=0)
            assert open_files() <= before + 2, "each receive left a bell behind"
            (small_disk / "ballast").unlink()
            message = await broker.receive_from_queue("claims", wait=0)
            assert message is not None
            await message.ack()

    asyncio.run(main())
