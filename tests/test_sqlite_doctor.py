"""What the doctor finds."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

import filao
from filao import forks
from filao.engines.sqlite import housekeeping, own
from filao.engines.sqlite.doctor import wal_reset_fixed
from filao.overview import Deed
from tests.conftest import engine_of

pytestmark = pytest.mark.anyio

PATIENCE = 60.0  # seconds after which a test that hangs fails


async def found(broker: filao.Broker) -> dict[str, tuple[str, str]]:
    return {finding.subject: (finding.level, finding.text) for finding in await broker.doctor()}


async def test_a_healthy_file_has_no_warning(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        findings = await found(broker)
    assert {level for level, _ in findings.values()} <= {"ok", "note"}
    assert findings["journal mode"] == ("ok", "wal")
    assert findings["permissions"] == ("ok", "0600")
    assert findings["integrity"] == ("ok", "ok")
    assert findings["queue claims"] == ("ok", "1 ready, 0 leased, 0 delayed")
    assert {"SQLite", "file system", "WAL", "free pages"} <= set(findings)


@pytest.mark.parametrize(
    ("free", "level", "text"),
    [
        (65 * 1024**2, "ok", "65 MiB are free"),
        (63 * 1024**2, "warning", "only 63.0 MiB are free: make room before it is full"),
        (1, "error", "it is full: 1 byte is free. Until there is room, sends and settles fail"),
    ],
)
async def test_a_disk_that_is_nearly_full_is_told(tmp_path, monkeypatch, free, level, text) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        assert (await found(broker))["disk"] == (level, text)


async def test_stuck_leases_and_dead_letters_are_told(tmp_path, clock) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("stuck", lease=5), filao.Queue("sad"))
        await broker.send_to_queue("stuck", 1)
        await broker.send_to_queue("sad", 1)
        await broker.receive_from_queue("stuck")
        await (await broker.receive_from_queue("sad")).reject("no")
        clock.advance(6)
        findings = await found(broker)
    assert findings["queue stuck"][0] == "warning"
    assert "1 lease that ran out: " in findings["queue stuck"][1]
    assert findings["queue sad"] == ("note", "1 dead letter")


async def test_a_deed_without_an_end_and_what_is_remembered_are_told(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims", history=True))
        assert not {"history", "dashboard's log"} & set(await found(broker))
        await broker.send_to_queue("claims", 1)
        log = engine_of(broker).overview.log
        number = await log.begin(Deed("ada", "redrive", "claims", wanted=7))
        await log.record(number, 3)
        findings = await found(broker)
        assert findings["history"][0] == "ok"
        assert findings["dashboard's log"][0] == "note"
        assert "redrive of queue 'claims' by ada, 3 of 7 messages" in findings["dashboard's log"][1]
        await log.record(number, 7, "done")
        assert (await found(broker))["dashboard's log"] == ("ok", "1 entry, each with its end")


async def test_a_file_that_others_may_read_is_told(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        (tmp_path / "claims.db").chmod(0o644)
        level, text = (await found(broker))["permissions"]
    assert (level, text.startswith("0644")) == ("warning", True)


async def test_a_wal_that_a_long_read_keeps_is_told_with_its_reader(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(own, "WAL_NOTABLE", 1_000_000)
    monkeypatch.setattr(housekeeping, "TIDY_EVERY", 0.02)
    program = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN'); "
    program += "db.execute('SELECT * FROM filao_meta').fetchone(); print(flush=True); input()"
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        command = [sys.executable, "-c", program, str(tmp_path / "claims.db")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
            assert reader.stdout is not None
            reader.stdout.readline()
            await broker.send_many("claims", ["x" * 100_000] * 20)
            async with asyncio.timeout(PATIENCE):
                while not any("and it grows" in record.message for record in caplog.records):
                    await asyncio.sleep(0.01)
            level, told = (await found(broker))["WAL"]
            reader.communicate(b"\n", PATIENCE)
    assert level == "warning"
    assert f"process {reader.pid} (" in told


async def test_a_damaged_file_is_told(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", ["x" * 1000] * 100)
    db = sqlite3.connect(path)
    ((root,),) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'filao_ready'")
    db.close()
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096 + 2000)
        file.write(b"\xff" * 1500)
    async with filao.connect(path) as broker:
        try:
            level, text = (await found(broker))["integrity"]
        except filao.EngineError as error:
            level, text = "error", str(error)
    assert level == "error"
    assert text != "ok"


async def test_a_file_made_without_room_to_shrink_is_told(tmp_path) -> None:
    db = sqlite3.connect(tmp_path / "claims.db")
    db.execute("CREATE TABLE mine (id INTEGER)")
    db.close()
    async with filao.connect(tmp_path / "claims.db") as broker:
        level, text = (await found(broker))["free pages"]
    assert (level, "VACUUM" in text) == ("note", True)


@pytest.mark.parametrize(
    ("version", "fixed"),
    [
        *(((3, 40, 1), False), ((3, 44, 6), True), ((3, 49, 9), False), ((3, 50, 6), False)),
        *(((3, 50, 7), True), ((3, 51, 2), False), ((3, 51, 3), True), ((3, 53, 0), True)),
    ],
)
def test_the_versions_with_the_wal_reset_bug_are_known(version, fixed) -> None:
    assert wal_reset_fixed(version) is fixed


async def test_a_process_whose_sign_of_life_is_gone_is_not_told_as_one_that_receives(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.receive_from_queue("claims", wait=0)
        with closing(sqlite3.connect(path)) as db, db:  # as after the folder was lost
            db.execute("UPDATE filao_process SET bell = 'fedcba9876543210', id = 99")
        async with filao.connect(path) as other:
            level, text = (await found(other))["processes"]
    assert level == "warning"
    assert "shows no sign of life" in text
    assert "receives" not in text


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def looking(broker: filao.Broker) -> "asyncio.Task[object]":
    """Begin a look that never ends."""
    jobs = engine_of(broker)._jobs
    look = asyncio.create_task(jobs.look_up(lambda books: books.db.execute(ENDLESS).fetchone()))
    while not jobs.is_looking:  # nothing tells
        await asyncio.sleep(0.01)
    return look


async def test_a_long_look_ends_when_its_broker_is_closed(tmp_path) -> None:
    async with asyncio.timeout(20), filao.connect(tmp_path / "claims.db") as broker:
        look = await looking(broker)
    with pytest.raises(filao.EngineUnavailable, match="its broker was closed meanwhile"):
        await look


async def test_a_long_look_ends_when_its_process_forks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(forks, "WITHIN", 0.1)
    async with asyncio.timeout(20), filao.connect(tmp_path / "claims.db") as broker:
        look = await looking(broker)
        await asyncio.to_thread(forks.gate.shut, in_transaction=False)  # as `os.fork` does
        forks.gate.open()
        with pytest.raises(filao.EngineUnavailable, match="this process forked"):
            await look
