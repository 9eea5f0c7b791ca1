"""The folder beside the file, and who made what lies in it: an attacker, root, another of the group, or nobody any
more.
"""

import asyncio
import os
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import filao
from filao.engines.sqlite import files
from filao.engines.sqlite.bell import Belfry, Bell
from filao.engines.sqlite.folder import Folder
from tests.conftest import engine_of, let_pass

pytestmark = pytest.mark.anyio

CLAIMS: filao.Queue = filao.Queue("claims")
NOBODY, SOMEBODY, GROUP = 65534, 65533, 65532
PASSABLE = all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(filao.__file__).parents)
is_root = pytest.mark.skipif(
    os.geteuid() != 0 or not PASSABLE, reason="needs root, to become somebody else, and code that others can read"
)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "claims.db"


async def make(db: Path) -> None:
    async with filao.connect(db) as broker:
        await broker.declare(CLAIMS)


@contextmanager
def acting_as(user: int, group: int = NOBODY, *others: int) -> Iterator[None]:
    """Do something as another user, of a group and of others."""
    groups = os.getgroups()
    os.setgroups(others)
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


async def body_of_next(broker: filao.Broker) -> object:
    message = await broker.receive_from_queue(CLAIMS, wait=0)
    return message and message.body


def change(db: Path, sql: str, *parameters: object) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute(sql, parameters)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- a file that somebody else made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bell", ["{victim}", "../victim", "victim", "0123456789abcdef"])
async def test_a_bell_that_the_file_names_is_never_written_to_unless_it_is_a_bell(db, bell) -> None:
    await make(db)
    victim = db.parent / "victim"
    victim.write_bytes(b"profile")
    sidecar = files.sidecar(db)
    (sidecar / "victim").symlink_to(victim)
    (sidecar / "0123456789abcdef").hardlink_to(victim)
    change(db, "INSERT INTO filao_process (bell, name, started_at) VALUES (?, 'x', 0)", bell.format(victim=victim))
    change(db, "INSERT INTO filao_waiting SELECT 1, 1, id, 1, 0 FROM filao_process")
    async with filao.connect(db) as broker:
        await broker.send_to_queue(CLAIMS, 7)
        assert await body_of_next(broker) == 7
        engine = engine_of(broker)
        await engine._jobs.alone(engine._look)
    assert victim.read_bytes() == b"profile"


async def test_only_a_bell_is_taken_down(db) -> None:
    await make(db)
    lies = db.parent / "socket"
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(lies))
        change(db, "INSERT INTO filao_process (bell, name, started_at) VALUES (?, 'x', 0)", str(lies))
        async with filao.connect(db) as broker:
            await broker.receive_from_queue(CLAIMS, wait=0)
            engine = engine_of(broker)
            await engine._jobs.alone(engine._look)
            findings = await broker.doctor()
    assert lies.exists()
    assert [finding for finding in findings if finding.subject == "processes"]  # our own: the false one was struck off


# --- a folder that somebody else made --------------------------------------------------------------------------------


async def test_a_link_in_place_of_the_turnstile_creates_nothing(db) -> None:
    await make(db)
    turnstile = files.sidecar(db) / "turnstile"
    turnstile.unlink()
    turnstile.symlink_to(db.parent / "made")
    with pytest.raises(filao.EngineError, match="turnstile is no regular file"):
        await filao.connect(db).open()
    assert not (db.parent / "made").exists()


async def test_a_hard_link_in_place_of_the_turnstile_is_refused(db) -> None:
    await make(db)
    (files.sidecar(db) / "turnstile").unlink()
    (db.parent / "elsewhere").touch()
    (files.sidecar(db) / "turnstile").hardlink_to(db.parent / "elsewhere")
    with pytest.raises(filao.EngineError, match="2 names"):
        await filao.connect(db).open()


async def test_what_is_printed_where_standard_streams_are_closed_does_not_end_in_our_files(db) -> None:
    program = f"""
import asyncio, os
import filao

async def main():
    for stream in range(3):
        os.close(stream)
    async with filao.connect({str(db)!r}) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        for stream in range(3):
            try:
                os.write(stream, b"whatever is printed there")
            except OSError:
                pass
        os.kill(os.getpid(), 9)

asyncio.run(main())
"""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program], check=False, timeout=60)
    async with filao.connect(db) as broker:  # the turnstile notes whose WAL was left there
        assert await body_of_next(broker) == 1


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
async def test_what_is_no_folder_is_refused(db, kind) -> None:
    await make(db)
    sidecar = files.sidecar(db)
    sidecar.rename(db.parent / "aside")
    if kind == "link":
        sidecar.symlink_to(db.parent / "aside")
    elif kind == "file":
        sidecar.touch()
    else:
        os.mkfifo(sidecar)
    with pytest.raises(filao.ConfigurationError, match=r"claims\.db-filao is a link or no folder"):
        await filao.connect(db).open()


@pytest.mark.parametrize("others", [0o777, 0o770, 0o702])
async def test_a_folder_that_others_may_write_is_refused(db, others) -> None:
    await make(db)
    files.sidecar(db).chmod(others)
    with pytest.raises(filao.ConfigurationError, match=r"may be written by others.*chmod go-w"):
        await filao.connect(db).open()


@is_root
async def test_a_folder_of_a_third_user_is_refused(db) -> None:
    await make(db)
    os.chown(files.sidecar(db), SOMEBODY, SOMEBODY)
    with pytest.raises(filao.ConfigurationError, match="belongs to user 65533"):
        await filao.connect(db).open()


# --- several users of one file ---------------------------------------------------------------------------------------


def owned(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_uid) for path in [folder, *folder.rglob("*")]}


@is_root
async def test_a_look_by_root_leaves_the_file_to_its_service(db) -> None:
    let_pass(db.parent)
    os.chown(db.parent, NOBODY, NOBODY)
    with acting_as(NOBODY):
        await make(db)
    for path in [*files.sidecar(db).iterdir()]:
        path.unlink()
    files.sidecar(db).rmdir()
    async with filao.connect(db) as broker:
        await broker.stats()
        await broker.send_to_queue(CLAIMS, 7)
        await broker.receive_from_queue(CLAIMS, wait=0)
        assert {owner for _, owner in owned(db.parent)} == {NOBODY}
    with acting_as(NOBODY):
        async with filao.connect(db) as broker:
            assert await body_of_next(broker) == 7


@is_root
async def test_a_file_that_is_shared_with_a_group_has_bells_for_the_group(db) -> None:
    os.chown(db.parent, NOBODY, GROUP)
    let_pass(db.parent)
    db.parent.chmod(0o775)
    with acting_as(NOBODY, GROUP):
        await make(db)
        db.chmod(0o660)
        os.chown(db, -1, GROUP)
        await make(db)  # it sees that the file is shared by now
    sidecar = files.sidecar(db)
    assert (mode(sidecar), mode(sidecar / "turnstile")) == (0o770, 0o660)
    with acting_as(NOBODY, GROUP):
        one = Folder(sidecar, db.stat())
        bell = Bell(one)
    with acting_as(SOMEBODY, GROUP):
        other = Folder(sidecar, db.stat())
        belfry, answer = Belfry(other), Bell(other)
        belfry.ring(bell.name, 7)
        os.close(other.open_turnstile())
    with acting_as(NOBODY, GROUP):
        assert bell.heard() == {7}
        Belfry(one).ring(answer.name, 8)
    assert answer.heard() == {8}
    for closes in (bell, answer, belfry, one, other):
        closes.close()


@is_root
async def test_a_file_that_is_shared_with_a_group_has_a_wal_for_the_group(db) -> None:
    os.chown(db.parent, NOBODY, GROUP)
    let_pass(db.parent)
    db.parent.chmod(0o775)
    await make(db)
    os.chown(db, NOBODY, GROUP)
    db.chmod(0o660)
    await make(db)  # it sees whose the file is by now
    with acting_as(SOMEBODY, SOMEBODY, GROUP):
        async with filao.connect(db) as broker:
            await broker.send_to_queue(CLAIMS, 1)
            beside = [db.with_name(db.name + part).stat() for part in ("-wal", "-shm")]
    assert [(about.st_uid, about.st_gid) for about in beside] == [(SOMEBODY, GROUP)] * 2


@is_root
async def test_only_the_owner_makes_the_folder(db) -> None:
    os.chown(db.parent, NOBODY, GROUP)
    let_pass(db.parent)
    db.parent.chmod(0o775)
    with acting_as(NOBODY, GROUP):
        await make(db)
        db.chmod(0o660)
        os.chown(db, -1, GROUP)
        (files.sidecar(db) / "turnstile").unlink()
        files.sidecar(db).rmdir()
    with (
        acting_as(SOMEBODY, GROUP),
        pytest.raises(filao.ConfigurationError, match=r"only the file.s owner .user 65534. may make it"),
    ):
        await filao.connect(db).open()


# --- those who are gone ----------------------------------------------------------------------------------------------


async def test_a_process_whose_bell_is_gone_is_dead(db, clock) -> None:
    async with filao.connect(db, clock=clock) as broker:
        await broker.declare(CLAIMS)
        await broker.send_to_queue(CLAIMS, 7)
        await broker.receive_from_queue(CLAIMS, lease=3600)
        # As in a file that was restored alone, or after its folder was lost: the process is there, its bell is not.
        change(db, "UPDATE filao_process SET bell = 'fedcba9876543210', id = 99")
        change(db, "UPDATE filao_message SET token = ?", 2**62 + 99 * 2**32)
        async with filao.connect(db, clock=clock) as other:
            message = await other.receive_from_queue(CLAIMS, wait=10)
    assert message is not None
    assert (message.body, message.attempt) == (7, 2)


async def test_a_first_receive_stands_others_that_come_and_go(db, monkeypatch) -> None:
    await make(db)
    gone = "fedcba9876543210"
    os.mkfifo(files.sidecar(db) / gone)
    os.utime(files.sidecar(db) / gone, (0, 0))
    there = os.listdir

    def listed(folder: int) -> list[str]:
        names = there(folder)
        (files.sidecar(db) / gone).unlink(missing_ok=True)  # its owner closes just now
        return names

    monkeypatch.setattr("filao.engines.sqlite.folder.os.listdir", listed)
    async with filao.connect(db) as broker:
        assert await broker.receive_from_queue(CLAIMS, wait=0) is None
