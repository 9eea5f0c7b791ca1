"""Backups of a queue that is used meanwhile, and putting them back."""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import filao
from filao.engines.sqlite import backup, files
from tests.conftest import let_pass

pytestmark = pytest.mark.anyio

CLAIMS: filao.Queue = filao.Queue("claims")
PATIENCE = 60.0  # seconds after which a command that hangs is killed


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "claims.db"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "claims.backup"


def command(*arguments: str | Path, url: Path | str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FILAO_URL": str(url)}
    return subprocess.run(
        [sys.executable, "-m", "filao", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
        check=False,
    )


async def filled(db: Path, *bodies: str) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, bodies)


async def waiting(db: Path) -> list[object]:
    async with filao.connect(db) as broker:
        return [message.body for message in await broker.peek(CLAIMS, limit=1000)]


@pytest.mark.parametrize("left", ["a copy", ""])
async def test_what_a_killed_backup_left_is_in_nobodys_way(db, copy, left) -> None:
    await filled(db, "a")
    copy.with_name(f"{copy.name}{backup.PARTIAL}").write_bytes(db.read_bytes() if left else b"")
    backup.back_up(db, copy)
    assert not list(db.parent.glob("*partial*"))
    assert await waiting(copy) == ["a"]


KILLED_IN_ITS_MIDST = """
import os, signal, sys
from pathlib import Path
from filao.engines.sqlite import backup

backup._AT_ONCE = 10
backup._pass = lambda _, remaining, total: remaining < total / 2 and os.kill(os.getpid(), signal.SIGKILL)
getattr(backup, sys.argv[1])(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def killed(verb: str, given: Path, made: Path) -> list[Path]:
    """Run a backup or a restore that is killed half-way, and return what it has left."""
    ran = subprocess.run([sys.executable, "-c", KILLED_IN_ITS_MIDST, verb, given, made], timeout=PATIENCE, check=False)
    assert ran.returncode == -signal.SIGKILL
    left = [*made.parent.glob("*partial"), *made.parent.glob("*restoring")]
    assert left[0].stat().st_size > 0
    return left


async def test_what_was_killed_in_its_midst_is_in_nobodys_way(db, copy) -> None:
    await filled(db, *("x" * 200_000 for _ in range(30)))  # more than SQLite caches: it has written, but no header yet
    killed("back_up", db, copy)
    backup.back_up(db, copy)
    killed("restore", copy, db)
    backup.restore(copy, db)
    assert len(await waiting(db)) == 30
    assert not [path for path in db.parent.iterdir() if "partial" in path.name or "restoring" in path.name]


async def test_what_a_killed_copy_has_left_can_be_neither_backed_up_nor_restored_under_its_name(db, copy) -> None:
    await filled(db, "a")
    partial = copy.with_name(f"{copy.name}{backup.PARTIAL}")
    shutil.copyfile(db, partial)
    with pytest.raises(filao.ConfigurationError, match="would be removed: give it another name"):
        backup.back_up(partial, copy)
    restoring = db.with_name(f"{db.name}{backup.RESTORING}")
    shutil.copyfile(db, restoring)
    with pytest.raises(filao.ConfigurationError, match="would be removed: give it another name"):
        backup.restore(restoring, db)
    assert await waiting(partial) == await waiting(restoring) == await waiting(db) == ["a"]


async def test_what_others_have_made_meanwhile_is_not_overwritten_by_a_backup(db, copy, monkeypatch) -> None:
    await filled(db, "a")
    monkeypatch.setattr(backup, "_pass", lambda *_: copy.write_text("precious"))
    with pytest.raises(filao.ConfigurationError, match="overwrites nothing"):
        backup.back_up(db, copy)
    assert copy.read_text() == "precious"


@pytest.mark.parametrize("verb", ["back_up", "restore"])
async def test_what_the_next_one_has_begun_is_not_removed_by_one_that_ends(db, copy, monkeypatch, verb) -> None:
    await filled(db, "a")
    flush, begun = backup._flush, db.with_name(f"{db.name}{backup.RESTORING}")
    if verb == "restore":
        backup.back_up(db, copy)
    else:
        begun = copy.with_name(f"{copy.name}{backup.PARTIAL}")

    def meanwhile(folder: Path) -> None:
        flush(folder)
        begun.write_text("of the next one")

    monkeypatch.setattr(backup, "_flush", meanwhile)
    if verb == "restore":
        backup.restore(copy, db)
    else:
        backup.back_up(db, copy)
    assert begun.read_text() == "of the next one"


async def test_another_programs_database_that_ends_in_partial_is_no_leftover(db, copy) -> None:
    await filled(db, "a")
    names = [copy.with_name(f"{copy.name}.partial"), db.with_name(f"{db.name}.restoring")]
    for name in names:
        with closing(sqlite3.connect(name)) as other:
            other.executescript("CREATE TABLE theirs (value); INSERT INTO theirs VALUES (1)")
    backup.back_up(db, copy)
    backup.restore(copy, db)
    for name in names:
        with closing(sqlite3.connect(name)) as other:
            assert other.execute("SELECT * FROM theirs").fetchall() == [(1,)]


async def test_a_link_is_no_leftover(db, copy, tmp_path) -> None:
    await filled(db, "a")
    partial = copy.with_name(f"{copy.name}{backup.PARTIAL}")
    partial.symlink_to(shutil.copyfile(db, tmp_path / "theirs"))
    with pytest.raises(filao.ConfigurationError, match="is there already"):
        backup.back_up(db, copy)
    assert partial.is_symlink()


async def test_what_no_backup_left_is_not_removed(db, copy) -> None:
    await filled(db, "a")
    partial = copy.with_name(f"{copy.name}{backup.PARTIAL}")
    partial.write_text("letters")
    with pytest.raises(filao.ConfigurationError, match=r"partial is there already: .* another name"):
        backup.back_up(db, copy)
    assert partial.read_text() == "letters"
    assert not copy.exists()


async def test_a_backup_that_is_being_made_is_in_the_way_however_long_it_takes(db, copy, monkeypatch) -> None:
    await filled(db, "a")
    tried: list[str] = []

    def meanwhile(*_: object) -> None:
        if not tried:
            tried.append(command("backup", db, copy).stderr)

    monkeypatch.setattr(backup, "_AT_ONCE", 1)
    monkeypatch.setattr(backup, "_pass", meanwhile)
    backup.back_up(db, copy)
    assert "another process is at it" in tried[0]
    assert await waiting(copy) == ["a"]


async def test_what_is_restored_over_the_file_of_another_user_is_ours_where_it_cannot_be_theirs(
    db, copy, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    await filled(db, "a")
    backup.back_up(db, copy)
    db.chmod(0o640)
    monkeypatch.setattr(os, "fchown", refuse)
    backup.restore(copy, db)
    assert stat.S_IMODE(db.stat().st_mode) == 0o600
    assert await waiting(db) == ["a"]


async def test_a_signal_ends_a_backup_in_its_midst_and_leaves_nothing(db, copy, monkeypatch) -> None:
    await filled(db, *("x" * 200_000 for _ in range(100)))
    monkeypatch.setattr(backup, "_AT_ONCE", 10)
    copied: list[int] = []

    def told(*_: object) -> None:
        copied.append(copy.with_name(f"{copy.name}{backup.PARTIAL}").stat().st_size)
        raise KeyboardInterrupt

    before, begun = signal.signal(signal.SIGALRM, told), backup._copy

    def begin(*arguments: Any, **keywords: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        begun(*arguments, **keywords)

    monkeypatch.setattr(backup, "_copy", begin)
    try:
        with pytest.raises(KeyboardInterrupt):
            backup.back_up(db, copy)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert copied[0] < db.stat().st_size
    assert [path for path in db.parent.iterdir() if path.name.startswith(copy.name)] == []


async def test_a_backup_does_not_begin_again_whenever_somebody_writes(db, copy, monkeypatch) -> None:
    await filled(db, *("x" * 2_000 for _ in range(50)))
    monkeypatch.setattr(backup, "_AT_ONCE", 1)
    steps = 0

    class Source(sqlite3.Connection):
        """Lets somebody else write between any two steps."""

        def backup(self, target: sqlite3.Connection, **keywords: Any) -> None:
            with closing(sqlite3.connect(db, isolation_level=None)) as other:

                def write(*_: object) -> None:
                    nonlocal steps
                    steps += 1
                    assert steps < 1_000
                    other.execute("UPDATE filao_queue SET rules = rules || ' '")

                super().backup(target, **keywords | {"progress": write})

    with closing(sqlite3.connect(db, factory=Source)) as source:
        backup._copy(source, copy)
    assert steps > 20


async def test_a_backup_is_made_while_the_queue_is_used_and_is_of_one_moment(db, copy) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        stop = asyncio.Event()

        async def use() -> None:
            while not stop.is_set():
                await broker.send_many(CLAIMS, [0, 1, 2])
                messages = await broker.receive_many(CLAIMS, 2, wait=0)
                async with broker.transaction() as transaction:
                    for message in messages:
                        await transaction.ack(message)

        using = asyncio.create_task(use())
        sizes = [await asyncio.to_thread(backup.back_up, db, copy.with_name(f"copy{n}")) for n in range(5)]
        stop.set()
        await using
    for number, size in enumerate(sizes):
        with closing(sqlite3.connect(copy.with_name(f"copy{number}"))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            (counted,) = connection.execute("SELECT ready + leased FROM filao_queue").fetchone()
            (there,) = connection.execute("SELECT count(*) FROM filao_message").fetchone()
            assert counted == there
        assert copy.with_name(f"copy{number}").stat().st_size == size
    assert not list(db.parent.glob("*partial*"))


async def test_a_backup_is_one_file_for_its_owner_alone(db, copy) -> None:
    await filled(db, "kept")
    backup.back_up(db, copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert {path.name for path in db.parent.iterdir()} == {"claims.db", "claims.db-filao", "claims.backup"}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system has no such names")
async def test_a_backup_may_have_a_name_that_is_no_text(db, tmp_path) -> None:
    await filled(db, "kept")
    copy = tmp_path / os.fsdecode(b"copy-\xff.db")
    made = command("backup", db, copy)
    assert (made.returncode, json.loads(made.stdout)["backup"]) == (0, str(copy))
    assert command("restore", copy, db, "--replace").returncode == 0
    assert command("doctor", copy).returncode == 0
    restored = command("restore", db, copy, "--replace")
    assert (restored.returncode, json.loads(restored.stdout)["restored"]) == (0, str(db))
    assert await waiting(db) == ["kept"]


async def test_a_backup_goes_through_no_pipe(db, tmp_path) -> None:
    for given in ("backup", "restore"):
        refused = command(given, db, "-")
        assert (refused.returncode, "goes through no pipe" in refused.stderr) == (2, True)
    assert not (tmp_path / "-").exists()


async def test_a_backup_overwrites_nothing(db, copy) -> None:
    await filled(db, "kept")
    copy.write_text("precious")
    ran = command("backup", db, copy)
    assert (ran.returncode, copy.read_text()) == (3, "precious")
    assert "overwrites nothing" in ran.stderr
    copy.unlink()
    copy.symlink_to("a disk that is not mounted")
    ran = command("backup", db, copy)
    assert (ran.returncode, copy.is_symlink()) == (3, True)


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
async def test_a_backup_has_no_name_that_sqlite_takes_for_a_part_of_another_file(db, end) -> None:
    await filled(db, "kept")
    copy = db.with_name(db.name + end)
    refused = command("backup", db, copy)
    assert (refused.returncode, copy.exists()) == (3, False)
    assert f"a part of {db}: give another name" in refused.stderr


async def test_a_backup_brings_back_leases_and_dead_letters(db, copy) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, ["dead", "leased", "ready"])
        dead, leased = await broker.receive_many(CLAIMS, 2, lease=3600)
        await dead.reject("no")
        assert json.loads(command("backup", db, copy).stdout)["backup"] == str(copy)
        await leased.ack()
        await broker.purge(CLAIMS)
    ran = command("restore", db, copy, "--replace")
    assert ran.returncode == 0, ran.stderr
    async with filao.connect(db) as broker:
        stats = await broker.stats(CLAIMS)
        assert (stats.dead, stats.leased, stats.ready) == (1, 1, 1)
        # Its holder is gone, so that nobody waits an hour for the end of its lease.
        bodies = {(await broker.receive_from_queue(CLAIMS, wait=20)).body for _ in range(2)}  # type: ignore[union-attr]
    assert bodies == {"leased", "ready"}


async def test_running_processes_notice_that_a_backup_was_put_back(db, copy) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "kept")
        await asyncio.to_thread(backup.back_up, db, copy)
        await broker.send_to_queue(CLAIMS, "sent later")
        kept = await asyncio.to_thread(backup.restore, copy, db)
        with pytest.raises(filao.EngineError, match="was replaced by another file"):
            await broker.send_to_queue(CLAIMS, "lost")
    assert await waiting(db) == ["kept"]
    assert kept is not None
    assert (await waiting(kept))[:2] == ["kept", "sent later"]  # and perhaps what was not confirmed


async def test_a_backup_is_put_back_after_the_file_was_lost_and_its_wal_left(db, copy) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "kept")
        await asyncio.to_thread(backup.back_up, db, copy)
        db.unlink()
    assert db.with_name("claims.db-wal").exists()
    with pytest.raises(filao.EngineError, match=r"is empty, while .*-wal is not"):
        await filao.connect(db).open()
    db.unlink()
    assert command("restore", copy, url=db).returncode == 0
    assert await waiting(db) == ["kept"]


async def test_a_backup_is_put_back_after_the_file_was_overwritten(db, copy) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "kept")
        await asyncio.to_thread(backup.back_up, db, copy)
        shutil.copyfile(copy, db)
        with pytest.raises(filao.EngineError, match="filao restore"):
            await broker.send_to_queue(CLAIMS, "lost")
        await asyncio.to_thread(backup.restore, copy, db)
    assert await waiting(db) == ["kept"]
    shutil.copyfile(copy, db)  # a file that was restored is told from its backup, too
    async with filao.connect(db) as broker:
        await broker.send_to_queue(CLAIMS, "new")
        shutil.copyfile(copy, db)
        with pytest.raises(filao.EngineError, match="was overwritten"):
            await broker.send_to_queue(CLAIMS, "lost")


async def test_a_file_that_is_there_is_replaced_only_when_that_is_said(db, copy) -> None:
    await filled(db, "kept")
    backup.back_up(db, copy)
    ran = command("restore", db, copy)
    assert ran.returncode == 3
    assert "--replace" in ran.stderr


FOREIGN = "CREATE TABLE filao_meta (name, value)"
PRETENDING = f"{FOREIGN}; INSERT INTO filao_meta VALUES ('version', 6)"


@pytest.mark.parametrize("content", [b"", b"no database" * 100, FOREIGN, PRETENDING])
async def test_what_is_no_backup_is_not_put_in_place(db, copy, content) -> None:
    await filled(db, "kept")
    if isinstance(content, bytes):
        copy.write_bytes(content)
    else:
        with closing(sqlite3.connect(copy)) as foreign:
            foreign.executescript(content)
    ran = command("restore", db, copy, "--replace")
    assert ran.returncode in (3, 4)
    assert str(copy) in ran.stderr
    assert await waiting(db) == ["kept"]
    assert not list(db.parent.glob("*restoring*"))


async def test_a_queue_is_not_restored_from_its_own_file(db) -> None:
    await filled(db, "kept")
    assert "own file" in command("restore", db, db, "--replace").stderr
    assert await waiting(db) == ["kept"]


@pytest.mark.parametrize("url", ["postgresql://localhost/claims", "amqp://localhost/"])
def test_servers_have_their_own_ways(url, copy) -> None:
    for verb in ("backup", "restore"):
        ran = command(verb, url, copy)
        assert ran.returncode == 3
        assert "pg_dump" in ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
async def test_root_restores_for_the_service(db, copy) -> None:
    await filled(db, "kept")
    let_pass(db.parent)
    for path in [db.parent, db, files.sidecar(db), *files.sidecar(db).iterdir()]:
        os.chown(path, 65534, 65534)
    backup.back_up(db, copy)
    backup.restore(copy, db)
    assert {path.stat().st_uid for path in db.parent.rglob("claims.db*")} == {65534}
