"""The file: who may read it, where it may lie, how it is created, migrated, kept small, and what is refused."""

import asyncio
import os
import socket
import sqlite3
import stat
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.engines.sqlite import files
from filao.engines.sqlite.backup import back_up
from filao.engines.sqlite.mounts import file_system
from tests.conftest import engine_of, let_pass

pytestmark = pytest.mark.anyio


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_only_its_owner_may_read_a_new_file(tmp_path) -> None:
    before = os.umask(0)
    try:
        async with filao.connect(tmp_path / "claims.db") as broker:
            await broker.declare(filao.Queue("claims"))
            await broker.send_to_queue("claims", 1)
            assert await broker.receive_from_queue("claims") is not None  # hangs the bell
            for name in ("claims.db", "claims.db-wal", "claims.db-shm"):
                assert mode(tmp_path / name) == 0o600
            assert mode(tmp_path / "claims.db-filao") == 0o700
            assert {mode(path) for path in (tmp_path / "claims.db-filao").iterdir()} == {0o600}
    finally:
        os.umask(before)


async def test_a_url_and_a_path_name_the_same_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
    for url in ("sqlite:///claims.db", f"sqlite:///{tmp_path}/claims.db", tmp_path / "claims.db", "./claims.db"):
        async with filao.connect(url) as broker:
            assert (await broker.stats("claims")).sent == 1


async def test_each_url_names_a_file_of_its_own(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("sqlite:///claims#1.db", "sqlite:///claims#2.db", "sqlite:///claims%23.db", "sqlite:///claims%3F.db"):
        async with filao.connect(url) as broker:
            assert await broker.queues() == []
            await broker.declare(filao.Queue("claims"))
    assert {path.name for path in tmp_path.glob("*.db")} == {"claims#1.db", "claims#2.db", "claims#.db", "claims?.db"}


@pytest.mark.parametrize("url", ["sqlite:claims.db", "sqlite::memory:", "SQLite:claims.db", "file:claims.db"])
def test_a_url_without_its_slashes_makes_no_file_of_that_name(tmp_path, monkeypatch, url) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(filao.ConfigurationError, match=r"without the // .*\./ before a path, sqlite:///relative\.db"):
        filao.connect(url)
    assert list(tmp_path.iterdir()) == []
    with filao.sync.connect(f"./{url}") as broker:
        assert broker.queues() == []


@pytest.mark.parametrize("name", ["sqlite:///a%00b", Path("a\0b")])
async def test_a_path_with_a_nul_character_leads_nowhere(name) -> None:
    with pytest.raises(filao.ConfigurationError, match="null"):
        await filao.connect(name).open()


def test_a_path_in_a_working_folder_that_is_gone_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for connect in (filao.connect, filao.sync.connect):
        with pytest.raises(filao.ConfigurationError, match=r"^claims\.db leads nowhere: the folder .* is gone"):
            connect("claims.db")


async def test_memory_needs_no_file_and_is_private(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with filao.connect("sqlite://:memory:") as one, filao.connect("sqlite://:memory:") as other:
        await one.declare(filao.Queue("claims"))
        await one.send_to_queue("claims", 1)
        assert (await one.receive_from_queue("claims")).body == 1
        assert await other.queues() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "http://claims", "sqlite://host/claims.db", "sqlite:///", "a\0b", "oracle://x"])
async def test_a_url_that_cannot_be_right_is_refused(url) -> None:
    with pytest.raises(filao.ConfigurationError):
        filao.connect(url)


async def test_a_folder_is_no_database(tmp_path) -> None:
    with pytest.raises(filao.ConfigurationError, match="is a folder"):
        await filao.connect(tmp_path).open()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
async def test_what_is_no_file_is_refused_at_once(tmp_path, kind) -> None:
    path = tmp_path / "claims.db"
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(str(path))
        else:
            path = Path(os.devnull)
        with pytest.raises(filao.ConfigurationError, match="is no file"):
            await filao.connect(path).open()
        with pytest.raises(filao.ConfigurationError, match="is no file"):
            back_up(path, tmp_path / "copy.db")


async def test_a_missing_folder_is_named(tmp_path) -> None:
    with pytest.raises(filao.ConfigurationError, match="does not exist"):
        await filao.connect(tmp_path / "no" / "claims.db").open()


async def test_a_file_of_another_kind_is_left_alone(tmp_path) -> None:
    path = tmp_path / "claims.db"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(filao.EngineError, match="not a SQLite database"):
        await filao.connect(path).open()
    assert path.read_bytes() == b"not a database " * 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
async def test_a_file_that_this_user_may_not_write_is_refused(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path):
        pass
    path.chmod(0o444)
    let_pass(tmp_path)
    try:
        os.seteuid(65534)
        with pytest.raises(filao.ConfigurationError, match="read-only"):
            await filao.connect(path).open()
        with pytest.raises(filao.ConfigurationError, match="may not write in"):
            await filao.connect(tmp_path / "new.db").open()
    finally:
        os.seteuid(0)


def test_a_file_that_cannot_be_read_is_not_said_to_be_unwritable(tmp_path) -> None:
    missing = tmp_path / "claims.backup"
    with pytest.raises(filao.EngineError, match=r"claims\.backup cannot be opened"), files.mapped(missing):
        sqlite3.connect(f"{missing.as_uri()}?mode=ro", uri=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become nobody")
async def test_a_path_through_a_folder_that_this_user_may_not_enter_is_refused(tmp_path) -> None:
    (tmp_path / "private" / "deeper").mkdir(parents=True)
    (tmp_path / "private").chmod(0o700)
    let_pass(tmp_path)
    try:
        os.seteuid(65534)
        for path in (tmp_path / "private" / "claims.db", tmp_path / "private" / "deeper" / "claims.db"):
            with pytest.raises(filao.ConfigurationError, match="may not enter a folder on the way"):
                await filao.connect(path).open()
            with pytest.raises(filao.ConfigurationError, match="may not enter a folder on the way"):
                filao.sync.connect(path).open()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["n" * 300, "n" * 255, "n" * 250, "n" * 300 + "/claims.db"])
async def test_a_name_that_is_too_long_is_refused_before_anything_is_made(tmp_path, name) -> None:
    for connect in (filao.connect, filao.sync.connect):
        with pytest.raises(filao.ConfigurationError, match="File name too long"):
            await (connect(tmp_path / name).open() or asyncio.sleep(0))
    assert list(tmp_path.iterdir()) == []


async def test_the_longest_path_that_sqlite_opens_works_and_a_longer_one_is_refused(tmp_path) -> None:
    folder = tmp_path / ("d" * 200) / ("d" * (200 - len(os.fsencode(tmp_path)) % 100))
    folder.mkdir(parents=True)
    rest = files.PATH_MAX - len(os.fsencode(folder)) - 1
    async with filao.connect(folder / ("n" * rest)) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        assert await broker.receive_from_queue("claims") is not None
    before = set(folder.iterdir())
    with pytest.raises(filao.ConfigurationError, match=f"SQLite opens paths of at most {files.PATH_MAX}"):
        await filao.connect(folder / ("n" * (rest + 1))).open()
    assert set(folder.iterdir()) == before


async def test_a_file_of_a_newer_version_is_not_touched(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path):
        pass
    db = sqlite3.connect(path)
    db.execute("UPDATE filao_meta SET value = 99 WHERE name = 'version'")
    db.commit()
    db.close()
    with pytest.raises(filao.ConfigurationError, match=r"newer Filao.*version 99"):
        await filao.connect(path).open()


async def test_an_older_file_is_migrated_and_keeps_its_messages(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "kept")
    db = sqlite3.connect(path, isolation_level=None)
    steps = (*files.MIGRATIONS, lambda db: db.execute("ALTER TABLE filao_message ADD COLUMN note TEXT"))
    files.migrate(db, path, steps)
    files.migrate(db, path, steps)  # the second one finds it done
    assert files.schema_version(db) == len(steps)
    assert db.execute("SELECT content, note FROM filao_message").fetchall() == [(b'"kept"', None)]
    db.close()


async def test_a_migration_that_fails_changes_nothing(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path):
        pass

    def fail(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE filao_dedup")
        raise ZeroDivisionError

    db = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(ZeroDivisionError):
        files.migrate(db, path, (*files.MIGRATIONS, fail))
    assert files.schema_version(db) == len(files.MIGRATIONS)
    assert db.execute("SELECT count(*) FROM filao_dedup").fetchone() == (0,)
    db.close()


async def test_the_users_own_tables_share_the_file(tmp_path) -> None:
    path = tmp_path / "claims.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.execute("CREATE TABLE message (id INTEGER)")
    db.execute("INSERT INTO message VALUES (1)")
    db.commit()
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
    assert db.execute("SELECT id FROM message").fetchall() == [(1,)]
    assert db.execute("PRAGMA user_version").fetchone() == (7,)
    db.close()


@pytest.mark.parametrize(("mount", "kind"), [("/data", "nfs4"), ("/data/claims", "fuse.sshfs"), ("/", "cifs")])
def test_a_network_file_system_is_recognised(tmp_path, mount, kind) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 8:1 / / rw - ext4 /dev/sda rw\n36 22 0:32 / {mount} rw shared:1 - {kind} server:/x rw\n")
    assert file_system(Path("/data/claims/claims.db"), mounts) == kind
    assert kind in files.NETWORK_FILE_SYSTEMS


async def test_a_network_file_system_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "file_system", lambda _: "nfs4")
    with pytest.raises(filao.ConfigurationError, match=r"nfs4.*postgresql://"):
        await filao.connect(tmp_path / "claims.db").open()
    assert list(tmp_path.iterdir()) == []


async def test_a_lease_on_a_large_message_does_not_write_its_body(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", b"x" * 200_000)
        before = (tmp_path / "claims.db-wal").stat().st_size
        message = await broker.receive_from_queue("claims")
        await message.extend(60)
        await message.release()
        after = (tmp_path / "claims.db-wal").stat().st_size
        assert after - before < 120_000  # three transactions of a few pages each; the body alone would be 50 pages


async def test_a_drained_backlog_leaves_the_disk(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        for _ in range(5):
            await broker.send_many("claims", ["x" * 2000] * 1000)
        while messages := await broker.receive_many("claims", 1000, wait=0):
            async with broker.transaction() as transaction:
                for message in messages:
                    await transaction.ack(message)
        full = path.stat().st_size + (tmp_path / "claims.db-wal").stat().st_size
        engine = engine_of(broker)
        thread, hold = engine._jobs.thread, engine._hold
        while await thread.submit(partial(engine._housekeeper.tidy_some, idle=True)):
            pass
        with closing(sqlite3.connect(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM filao_queue").fetchall()
            await broker.send_to_queue("claims", "behind the reader")
            assert not await thread.submit(hold.write_back)  # at once: others would wait for us
        assert await thread.submit(hold.write_back)
        assert full > 10_000_000
        assert path.stat().st_size + (tmp_path / "claims.db-wal").stat().st_size < 2_000_000


async def test_relaxed_durability_is_a_choice_that_is_checked(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db", durability="relaxed") as broker:
        await broker.declare(filao.Queue("claims"))
        assert engine_of(broker)._database.hold.db.execute("PRAGMA synchronous").fetchone() == (1,)
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.send_to_queue("claims", 1)
        assert engine_of(broker)._database.hold.db.execute("PRAGMA synchronous").fetchone() == (2,)
    with pytest.raises(filao.ConfigurationError, match="durability"):
        filao.connect(tmp_path / "claims.db", durability="maybe")  # type: ignore[arg-type]


async def test_closing_takes_the_bell_down_and_the_process_off_the_list(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.receive_from_queue("claims", wait=0)
        assert len(list((tmp_path / "claims.db-filao").iterdir())) == 2
    assert [path.name for path in (tmp_path / "claims.db-filao").iterdir()] == ["turnstile"]
    db = sqlite3.connect(tmp_path / "claims.db")
    assert db.execute("SELECT count(*) FROM filao_process").fetchone() == (0,)
    db.close()
