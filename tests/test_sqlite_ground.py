"""The file goes away under a broker, or has a second name: nothing is confirmed after that, and the error says why."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from types import FrameType
from typing import Any

import pytest

import filao
from filao.engine import OpenAgain
from filao.engines.sqlite import files, ground, hold, housekeeping
from filao.engines.sqlite.mounts import file_system
from tests.conftest import engine_of
from tests.torture import disk

pytestmark = pytest.mark.anyio

CLAIMS: filao.Queue = filao.Queue("claims")
PATIENCE = 20.0  # seconds after which a test that hangs fails


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "claims.db"


def beside(db: Path, end: str) -> Path:
    return db.with_name(db.name + end)


def bodies(db: Path) -> list[bytes]:
    """Return what is stored, as another program sees it."""
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return [content for (content,) in connection.execute("SELECT content FROM filao_message ORDER BY id")]


def run(*command: str | Path, check: bool = True) -> int:
    return subprocess.run(command, check=check, timeout=PATIENCE).returncode


def sqlite_backup(db: Path, copy: Path) -> None:
    with closing(sqlite3.connect(db)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def delete(db: Path) -> None:
    db.unlink()


def move(db: Path) -> None:
    db.rename(db.parent / "moved.db")


def move_all(db: Path) -> None:
    (db.parent / "elsewhere").mkdir()
    for path in [*db.parent.glob("claims.db*")]:
        path.rename(db.parent / "elsewhere" / path.name)


def replace(db: Path) -> None:
    sqlite_backup(db, db.parent / "backup.db")
    (db.parent / "backup.db").replace(db)


def overwrite_with_a_backup(db: Path) -> None:
    sqlite_backup(db, db.parent / "backup.db")
    shutil.copyfile(db.parent / "backup.db", db)


def overwrite_with_another_file(db: Path) -> None:
    with closing(sqlite3.connect(db.parent / "other.db")) as other:
        other.execute("CREATE TABLE other (id INTEGER)")
    shutil.copyfile(db.parent / "other.db", db)


def overwrite_with_a_copy_of_its_own(db: Path) -> None:
    shutil.copyfile(db.parent / "early.db", db)


def overwrite_with_nothing(db: Path) -> None:
    db.open("wb").close()


def cut_off_the_wal(db: Path) -> None:
    os.truncate(beside(db, "-wal"), 0)


def cut_the_wal_in_two(db: Path) -> None:
    os.truncate(beside(db, "-wal"), beside(db, "-wal").stat().st_size // 2)


def overwrite_the_wal(db: Path) -> None:
    shutil.copyfile(db.parent / "early.db-wal", beside(db, "-wal"))


def overwrite_the_index(db: Path) -> None:
    with beside(db, "-shm").open("r+b") as index:  # not cut off meanwhile: SQLite has it mapped
        index.write((db.parent / "early.db-shm").read_bytes())


def overwrite_wal_and_index(db: Path) -> None:
    overwrite_the_wal(db)
    overwrite_the_index(db)


def delete_the_wal(db: Path) -> None:
    beside(db, "-wal").unlink()


def delete_the_index(db: Path) -> None:
    beside(db, "-shm").unlink()


def link(db: Path) -> None:
    (db.parent / "second.db").hardlink_to(db)


AT_ONCE = {
    delete: "was deleted or moved while it was open",
    move: "was moved to .*moved.db while it was open",
    move_all: "was moved to .*elsewhere.claims.db while it was open",
    replace: "was replaced by another file",
    overwrite_with_a_backup: "was overwritten in place",
    overwrite_with_another_file: "was overwritten in place",
    overwrite_with_a_copy_of_its_own: "was overwritten in place",
    overwrite_with_nothing: "was overwritten in place",
    cut_off_the_wal: "had its WAL overwritten or cut off",
    cut_the_wal_in_two: "had its WAL overwritten or cut off",
    overwrite_the_wal: "had its WAL overwritten or cut off",
    overwrite_the_index: "had its WAL overwritten or cut off",
    overwrite_wal_and_index: "had its WAL overwritten or cut off",
    delete_the_wal: "lost .*claims.db-wal, which was deleted or replaced",
    delete_the_index: "lost .*claims.db-shm, which was deleted or replaced",
    link: "was given a second name",
}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
async def test_a_folder_that_this_user_may_no_longer_enter_is_not_taken_for_a_file_that_moved(tmp_path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    broker = filao.connect(tmp_path / "private" / "claims.db")
    async with broker:
        await broker.declare(CLAIMS)
        try:
            os.seteuid(65534)
            for call in (lambda: broker.send_to_queue(CLAIMS, 1), broker.stats):
                with pytest.raises(
                    filao.EngineError, match=r"claims\.db cannot be looked at any more: this user may not"
                ):
                    await call()
        finally:
            os.seteuid(0)
        with pytest.raises(OpenAgain):
            await broker.stats()
    async with broker:
        await broker.send_to_queue(CLAIMS, 2)
    assert bodies(tmp_path / "private" / "claims.db")[-1] == b"2"


@pytest.mark.parametrize(("happens", "said"), AT_ONCE.items(), ids=lambda value: getattr(value, "__name__", ""))
async def test_nothing_is_confirmed_once_the_file_is_not_what_was_opened(db, happens, said, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # or there may be nothing in the WAL that can be lost
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_many(CLAIMS, ["before"] * 300)
        await engine_of(broker)._jobs.alone(engine_of(broker)._database.write_back)
        shutil.copyfile(db, db.parent / "early.db")
        await broker.send_to_queue(CLAIMS, "early")
        for end in ("-wal", "-shm"):
            shutil.copyfile(beside(db, end), beside(db.parent / "early.db", end))
        await broker.send_many(CLAIMS, ["before too"] * 300)
        await asyncio.to_thread(happens, db)
        for _ in range(3):
            with pytest.raises(filao.EngineError, match=said) as caught:
                await broker.send_to_queue(CLAIMS, "after")
            assert str(db) in str(caught.value)
            assert "What to do: " in str(caught.value)
        with pytest.raises(filao.EngineError, match=said):
            await broker.stats()
        with pytest.raises(filao.EngineError, match=said):
            await broker.receive_from_queue(CLAIMS, wait=0)


async def test_a_file_that_is_overwritten_after_a_checkpoint_is_noticed_though_it_looks_the_same(db) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "first")
        engine = engine_of(broker)
        await engine._jobs.alone(engine._database.write_back)
        shutil.copyfile(db, db.parent / "early.db")
        message = await broker.receive_from_queue(CLAIMS)
        assert message is not None
        await message.ack()
        await engine._jobs.alone(engine._database.write_back)
        shutil.copyfile(db.parent / "early.db", db)
        with pytest.raises(filao.EngineError, match="was overwritten in place"):
            await broker.send_to_queue(CLAIMS, "after")


async def test_nothing_is_written_behind_what_others_have_lost(db, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)
    monkeypatch.setattr(hold, "LOOKED_WITHIN", 600.0)  # however soon it comes after the last look
    async with filao.connect(db) as one, filao.connect(db) as other:
        await one.declare(CLAIMS)
        await one.send_to_queue(CLAIMS, "before")
        size = beside(db, "-wal").stat().st_size
        await other.send_many(CLAIMS, ["before too" * 100] * 300)
        os.truncate(beside(db, "-wal"), size)
        with pytest.raises(filao.EngineError, match="had its WAL overwritten or cut off"):
            await one.send_to_queue(CLAIMS, "after")


async def test_a_look_makes_five_system_calls(db, monkeypatch) -> None:
    """It is made for each commit."""
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # or it may write the file, which is looked at then
    made: list[str] = []

    def note(_: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__module__ == os.name:
            made.append(function.__name__)

    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "something to look at")
        look = engine_of(broker)._database.hold._ground.look
        assert look() is None
        sys.setprofile(note)
        try:
            assert look() is None
        finally:
            sys.setprofile(None)
    assert sorted(made) == ["pread", "pread", "stat", "stat", "stat"]


@pytest.mark.parametrize("what", ["_index", "_wal_identity"])
async def test_a_look_is_not_misled_by_a_descriptor_that_leads_elsewhere_by_now(db, what, monkeypatch) -> None:
    """A connection of the program's own had the file open by it, was closed, and another file got its number."""
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # or there may be nothing in the WAL that can be lost
    async with filao.connect(db) as broker, filao.connect(db.parent / "other.db") as other:
        grounds = []
        for one in (broker, other):
            await one.declare(CLAIMS)
            await one.send_to_queue(CLAIMS, "before")
            grounds.append(engine_of(one)._database.hold._ground)
        ours, theirs = grounds
        ours._fds[getattr(ours, what)] = theirs._fds[getattr(theirs, what)]
        await broker.send_to_queue(CLAIMS, "after")
        os.truncate(beside(db, "-wal"), 0)
        ours._fds[getattr(ours, what)] = theirs._fds[getattr(theirs, what)]
        with pytest.raises(filao.EngineError, match="had its WAL overwritten or cut off"):
            await broker.send_to_queue(CLAIMS, "too late")


@pytest.mark.parametrize("happens", [overwrite_with_a_backup, overwrite_with_another_file])
async def test_what_was_copied_over_the_file_is_not_written_to(db, happens) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "before")
        happens(db)
        there = db.read_bytes()
        with pytest.raises(filao.EngineError):
            await broker.send_to_queue(CLAIMS, "after" * 1000)
    assert db.read_bytes() == there


def killed_amid_its_work(db: Path) -> None:
    """Leave a WAL that holds a send, as a crash does."""
    program = f"""
        import asyncio, os, filao
        async def work():
            async with filao.connect({str(db)!r}) as broker:
                await broker.declare(filao.Queue("claims"))
                await broker.send_to_queue("claims", "in the WAL")
                os._exit(0)
        asyncio.run(work())
    """
    subprocess.run([sys.executable, "-c", dedent(program)], check=True)
    assert beside(db, "-wal").stat().st_size


async def test_a_wal_that_a_crash_left_is_not_taken_for_that_of_a_file_that_was_moved_there_since(db) -> None:
    """The schemas of both count alike: each was made by Filao, and nothing else tells one from the other."""
    async with filao.connect(db.parent / "other.db") as other:
        await other.declare(CLAIMS, filao.Queue("documents"))
    there = (db.parent / "other.db").read_bytes()
    killed_amid_its_work(db)
    (db.parent / "other.db").replace(db)
    with pytest.raises(filao.EngineError, match=r"is not the file that was here before, to which .*-wal may belong"):
        await filao.connect(db).open()
    assert db.read_bytes() == there
    for part in ("-wal", "-shm"):
        beside(db, part).unlink()
    async with filao.connect(db) as broker:
        assert [queue.name for queue in await broker.queues()] == ["claims", "documents"]


@pytest.mark.parametrize("carry", [shutil.copytree, Path.rename], ids=["copied", "moved"])
async def test_a_file_that_is_carried_elsewhere_with_all_that_lies_beside_it_is_opened(tmp_path, carry) -> None:
    (tmp_path / "here").mkdir()
    killed_amid_its_work(tmp_path / "here" / "claims.db")
    for bell in files.sidecar(tmp_path / "here" / "claims.db").iterdir():
        if bell.is_fifo():
            bell.unlink()  # which cannot be copied
    carry(tmp_path / "here", tmp_path / "there")
    async with filao.connect(tmp_path / "there" / "claims.db") as broker:
        message = await broker.receive_from_queue(CLAIMS)
        assert message is not None
        assert message.body == "in the WAL"


async def test_a_file_that_was_moved_away_and_back_can_be_opened_again_by_the_same_process(db) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "before")
        db.rename(db.parent / "aside")
        with pytest.raises(filao.EngineError, match="was moved to"):
            await broker.send_to_queue(CLAIMS, "after")
        (db.parent / "aside").rename(db)
    async with filao.connect(db) as broker:
        message = await broker.receive_from_queue(CLAIMS, wait=0)
        assert message is not None
        assert message.body == "before"


async def test_a_broker_that_closes_writes_back_a_wal_whose_name_was_deleted(db) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "before")
        delete_the_wal(db)
        with pytest.raises(filao.EngineError):
            await broker.send_to_queue(CLAIMS, "after")
    assert bodies(db)[0] == b'"before"'


def lose_the_folder(db: Path) -> None:
    shutil.rmtree(files.sidecar(db))


def lose_the_turnstile(db: Path) -> None:
    (files.sidecar(db) / "turnstile").unlink()


def lose_the_bell(db: Path) -> None:
    for bell in files.sidecar(db).iterdir():
        if bell.is_fifo():
            bell.unlink()


@pytest.mark.parametrize(
    "happens",
    [
        *(delete, move, replace, overwrite_with_another_file, delete_the_wal, link),
        *(lose_the_folder, lose_the_turnstile, lose_the_bell),
    ],
)
async def test_a_receive_that_waits_hears_of_it(db, happens: Callable[[Path], None]) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        waits = asyncio.create_task(broker.receive_from_queue(CLAIMS))
        while not await broker_waits(db):
            await asyncio.sleep(0.01)
        happens(db)
        with pytest.raises(filao.EngineError, match="while "):
            await asyncio.wait_for(waits, PATIENCE)
        with pytest.raises(filao.EngineError):
            await broker.send_to_queue(CLAIMS, "after")


async def test_a_process_that_a_backup_restored_through_sqlite_does_not_know_stops(db) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        sqlite_backup(db, db.parent / "early.db")
        waits = asyncio.create_task(broker.receive_from_queue(CLAIMS))
        while not await broker_waits(db):
            await asyncio.sleep(0.01)
        sqlite_backup(db.parent / "early.db", db)  # as .restore of SQLite's shell does
        with pytest.raises(OpenAgain, match=r"restored from a backup through SQLite"):
            await asyncio.wait_for(waits, PATIENCE)
        with pytest.raises(filao.EngineError, match=r"restored.*start them again"):
            await broker.send_to_queue(CLAIMS, "after")
    async with filao.connect(db) as broker:
        await broker.send_to_queue(CLAIMS, "anew")
        assert (await broker.receive_from_queue(CLAIMS)).body == "anew"


async def broker_waits(db: Path) -> bool:
    with closing(sqlite3.connect(db)) as connection:
        return bool(connection.execute("SELECT count(*) FROM filao_waiting").fetchone()[0])


async def test_nobody_counts_as_dead_because_the_folder_is_gone(db) -> None:
    async with filao.connect(db) as holder, filao.connect(db) as other:
        await holder.declare(CLAIMS)
        await holder.send_to_queue(CLAIMS, "held")
        assert await holder.receive_from_queue(CLAIMS, lease=3600) is not None
        waits = asyncio.create_task(other.receive_from_queue(CLAIMS))
        while not await broker_waits(db):
            await asyncio.sleep(0.01)
        lose_the_folder(db)
        with pytest.raises(filao.EngineError):
            await asyncio.wait_for(waits, PATIENCE)
    with closing(sqlite3.connect(db)) as connection:
        assert connection.execute("SELECT lost FROM filao_queue").fetchall() == [(0,)]


async def test_checkpoints_of_other_programs_are_no_loss(db) -> None:
    """A foreign writer whose every commit writes the WAL back, while we commit."""
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        program = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
db.execute("PRAGMA wal_autocheckpoint = 1")
db.execute("CREATE TABLE mine (content BLOB)")
for n in range(200):
    db.execute("INSERT INTO mine VALUES (randomblob(20000))")
    if n % 20 == 0: db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
"""
        foreign = await asyncio.create_subprocess_exec(sys.executable, "-c", program, db)
        sent = 0
        while foreign.returncode is None:
            await broker.send_to_queue(CLAIMS, "x" * 1000)
            sent += 1
        assert foreign.returncode == 0
        await broker.send_to_queue(CLAIMS, "last")
    assert len(bodies(db)) == sent + 1


async def test_a_checkpoint_is_no_loss_though_two_threads_look_at_once(db, monkeypatch) -> None:
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 600.0)  # or it may be a third
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "x" * 100_000)
        with closing(sqlite3.connect(db)) as connection:
            connection.execute("PRAGMA wal_checkpoint").fetchall()
        found = engine_of(broker)._database.hold._ground
        read = found._read
        looked: list[int] = []

        def read_while_another_looks(file, size, at=0):
            content = read(file, size, at)
            if size == ground.HEADER and not looked:
                looked.append(size)
                assert found.look() is None
            return content

        monkeypatch.setattr(found, "_read", read_while_another_looks)
        assert found.look() is None
        assert looked


async def test_a_vacuum_by_another_program_is_no_loss(db) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, "before")
        with closing(sqlite3.connect(db, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        await broker.send_to_queue(CLAIMS, "after")


# --- a WAL that was left behind --------------------------------------------------------------------------------------

CRASHES = """
import asyncio, os, sys, filao
async def main():
    broker = filao.connect(sys.argv[1])
    await broker.open()
    await broker.declare(filao.Queue("claims"))
    await broker.send_to_queue("claims", "before")
    os._exit(0)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [shutil.copyfile, os.replace])
@pytest.mark.parametrize("what", ["backup", "other"])
async def test_a_wal_that_was_left_by_a_crash_is_not_replayed_onto_another_file(db, how, what) -> None:
    run(sys.executable, "-c", CRASHES, db)
    source = db.parent / "source.db"
    if what == "backup":
        shutil.copytree(db.parent, db.parent / "copy", ignore=lambda *_: ["claims.db-filao"])
        sqlite_backup(db.parent / "copy" / "claims.db", source)
    else:
        with closing(sqlite3.connect(source)) as other:
            other.execute("CREATE TABLE other (id INTEGER)")
    how(source, db)
    there = db.read_bytes()
    with pytest.raises(filao.EngineError, match=r"is not the file to which .*-wal belongs"):
        await filao.connect(db).open()
    assert db.read_bytes() == there


async def test_a_wal_that_was_left_by_a_crash_is_replayed(db) -> None:
    run(sys.executable, "-c", CRASHES, db)
    assert beside(db, "-wal").stat().st_size > 0
    async with filao.connect(db) as broker:
        assert (await broker.stats("claims")).ready == 1


# --- two names -------------------------------------------------------------------------------------------------------


async def test_a_hard_link_is_refused(db) -> None:
    async with filao.connect(db):
        pass
    link(db)
    for name in (db, db.parent / "second.db"):
        with pytest.raises(filao.ConfigurationError, match=r"2 names.*find .* -samefile"):
            await filao.connect(name).open()


@pytest.mark.root
async def test_a_file_that_is_mounted_by_itself_is_refused(db) -> None:
    if disk.hindrance():
        pytest.skip(disk.hindrance())
    async with filao.connect(db):
        pass
    second = db.parent / "app é" / "claims.db"
    second.parent.mkdir()
    second.touch()
    if run("mount", "--bind", db, second, check=False):
        pytest.skip("may not mount here")
    try:
        with pytest.raises(filao.ConfigurationError, match=r"is mounted by itself.*Mount the folder"):
            await filao.connect(second).open()
        async with filao.connect(db) as broker:
            await broker.declare(CLAIMS)
    finally:
        run("umount", second)


async def test_a_link_that_leads_elsewhere_by_now_is_noticed(db) -> None:
    for name in ("one", "two"):
        (db.parent / name).mkdir()
    (db.parent / "current").symlink_to("one")
    async with filao.connect(db.parent / "current" / "claims.db") as broker:
        await broker.declare(CLAIMS)
        (db.parent / "current").unlink()
        (db.parent / "current").symlink_to("two")
        assert engine_of(broker)._hold.may_be_lost()
        with pytest.raises(filao.EngineError, match=r"current/claims\.db, which was deleted or replaced"):
            await broker.send_to_queue(CLAIMS, "after")


async def test_links_in_a_circle_lead_nowhere(db) -> None:
    db.symlink_to(db)
    for path in (db, db / "claims.db"):
        with pytest.raises(filao.ConfigurationError, match="leads nowhere"):
            await filao.connect(path).open()


@pytest.mark.parametrize("escaped", ["/mnt/données", r"/mnt/a\040b", r"/mnt/a\134b", "/mnt/\\303\\251"])
def test_a_network_file_system_is_recognised_by_whatever_name(tmp_path, escaped) -> None:
    mounts = tmp_path / "mountinfo"
    line = f"36 22 0:32 / {escaped} rw shared:1 - nfs4 server:/x rw\n"
    mounts.write_bytes(b"22 1 8:1 / / rw - ext4 /dev/sda rw\n" + line.encode())
    point = {r"/mnt/a\040b": "/mnt/a b", r"/mnt/a\134b": r"/mnt/a\b", "/mnt/\\303\\251": "/mnt/é"}.get(escaped, escaped)
    assert file_system(Path(point) / "claims.db", mounts) == "nfs4"


def test_the_device_tells_the_file_system_where_mounts_hide_each_other(tmp_path) -> None:
    about = tmp_path.stat()
    here = f"{os.major(about.st_dev)}:{os.minor(about.st_dev)}"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 {here} / / rw - cifs x rw\n23 22 0:99 / {tmp_path} rw - ext4 y rw\n")
    assert file_system(tmp_path / "claims.db", mounts) == "cifs"
