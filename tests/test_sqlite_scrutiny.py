"""Files that somebody else made, or that are damaged: an error says what is wrong, within seconds, and the
doctor does.
"""

import asyncio
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

import filao
from filao.engines.sqlite import files
from tests.conftest import engine_of, on_connection

pytestmark = pytest.mark.anyio

CLAIMS: filao.Queue = filao.Queue("claims", max_attempts=2)
PATIENCE = 20.0  # seconds that a file may keep somebody who opens it; far more than the bound


@pytest.fixture
def db(tmp_path: Path) -> Path:
    path = tmp_path / "claims.db"

    async def main() -> None:
        async with filao.connect(path) as broker:
            await broker.declare(CLAIMS)
            await broker.send_to_queue(CLAIMS, "ready", headers={"a": "b"}, message_id="mine")
            await broker.send_to_queue(CLAIMS, "delayed", delay=60, group="g", dedup_key="k", ttl=600)
            await broker.send_to_queue(CLAIMS, "dead", priority=5)
            message = await broker.receive_from_queue(CLAIMS)
            assert message is not None
            await message.nack(reason="again")
            message = await broker.receive_from_queue(CLAIMS)
            assert message is not None
            await message.reject("no")
            await broker.send_to_queue(CLAIMS, "ready too")

    asyncio.run(main())
    return path


def change(db: Path, *script: str) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        for statement in script:
            connection.execute(statement)


def doctor(db: Path) -> tuple[int, str]:
    ran = subprocess.run(
        [sys.executable, "-m", "filao", "doctor", str(db), "--json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    errors = [json.loads(line) for line in ran.stdout.splitlines()]
    return ran.returncode, "; ".join(finding["text"] for finding in errors if finding["level"] == "error") + ran.stderr


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS name, i AS id FROM n"
SCRIPTS = {
    "filao_queue is a view, not a table": ["DROP TABLE filao_queue", f"CREATE VIEW filao_queue AS {ENDLESS}"],
    "filao_meta is a view, not a table": ["DROP TABLE filao_meta", f"CREATE VIEW filao_meta AS {ENDLESS}"],
    "the table filao_dedup is missing": ["DROP TABLE filao_dedup"],
    "the index filao_ready is missing": ["DROP INDEX filao_ready"],
    "the table filao_halted is made otherwise": ["ALTER TABLE filao_halted ADD COLUMN more TEXT"],
    "the trigger 'takes' hangs on filao_message": [
        "CREATE TRIGGER takes AFTER INSERT ON filao_message BEGIN DELETE FROM filao_message; END"
    ],
    "filao_queue is there, and filao_meta is not": ["DROP TABLE filao_meta"],
    "its version is 'x'": ["UPDATE filao_meta SET value = 'x' WHERE name = 'version'"],
    "its version is None": ["DELETE FROM filao_meta WHERE name = 'version'"],
    "the last number is -1": ["UPDATE filao_meta SET value = -1 WHERE name = 'last'"],
    "the last number is 'x'": ["UPDATE filao_meta SET value = 'x' WHERE name = 'last'"],
    "the file's name is '../x'": ["UPDATE filao_meta SET value = '../x' WHERE name = 'file'"],
    "the file's name is None": ["DELETE FROM filao_meta WHERE name = 'file'"],
}


@pytest.mark.parametrize(("wrong", "script"), SCRIPTS.items(), ids=range(len(SCRIPTS)))
async def test_tables_that_are_not_ours_are_refused_and_told_by_the_doctor(db, wrong, script) -> None:
    await asyncio.to_thread(change, db, *script)
    with pytest.raises(filao.EngineError) as caught:
        await asyncio.wait_for(filao.connect(db).open(), PATIENCE)
    assert wrong in str(caught.value)
    assert str(db) in str(caught.value)
    code, said = await asyncio.to_thread(doctor, db)
    assert code == 1
    assert wrong in said


async def test_an_index_on_a_function_of_somebody_else_is_refused(db) -> None:
    change(db, "DROP INDEX filao_dead", "CREATE INDEX filao_dead ON filao_message (queue, abs(id)) WHERE state = 6")
    with pytest.raises(filao.EngineError, match="filao_dead is made otherwise"):
        await filao.connect(db).open()


async def test_tables_and_triggers_of_the_users_own_are_no_matter(db) -> None:
    change(
        db,
        "CREATE TABLE mine (id INTEGER)",
        "CREATE VIEW filao_claims AS SELECT id FROM mine",
        "CREATE TRIGGER filao_mine AFTER INSERT ON mine BEGIN DELETE FROM mine; END",
        "ANALYZE",
        "VACUUM",
    )
    async with filao.connect(db) as broker:
        await broker.send_to_queue(CLAIMS, 1)
        assert {finding.level for finding in await broker.doctor()} <= {"ok", "note"}


@pytest.mark.parametrize("rules", ["", "no json", "[]", '{"lease": "x"}', '{"backoff": 7}', "[" * 100_000])
async def test_unreadable_rules_are_told_and_can_be_declared_again(db, rules) -> None:
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("UPDATE filao_queue SET rules = ?", (rules,))
    async with filao.connect(db) as broker:
        with pytest.raises(filao.EngineError, match="rules of queue 'claims' are unreadable"):
            await broker.send_to_queue("claims", 1)
        with pytest.raises(filao.EngineError, match="unreadable"):
            await broker.queues()
        findings = await broker.doctor()
        assert any(finding.level == "error" and "unreadable" in finding.text for finding in findings)
        await broker.declare(CLAIMS)
        await broker.send_to_queue("claims", 1)


async def test_a_message_with_unreadable_headers_is_malformed_and_told(db) -> None:
    change(db, "UPDATE filao_message SET headers = 'no json' WHERE state = 2")
    async with filao.connect(db) as broker:
        assert [message.headers for message in await broker.peek(CLAIMS)] == [{}]
        await broker.receive_many(CLAIMS, 9, wait=0)
        (letter,) = [letter for letter in await broker.dead_letters(CLAIMS) if letter.reason == "malformed"]
        assert "headers of a stored message are unreadable" in letter.error
        assert ("headers", "error") in [(finding.subject, finding.level) for finding in await broker.doctor()]


async def test_counters_that_do_not_count_are_told(db) -> None:
    change(db, "UPDATE filao_queue SET ready = 7")
    async with filao.connect(db) as broker:
        texts = [finding.text for finding in await broker.doctor() if finding.level == "error"]
    assert texts == ["7 messages are counted as ready, and 1 is there"]


async def every_call(db: Path) -> None:
    """Make every call that reads; what is wrong with the file is an error of ours, or no matter."""
    async with filao.connect(db) as broker:
        calls: list[Callable[[], Awaitable[object]]] = [
            *(broker.stats, broker.queues, broker.doctor),
            *(
                lambda state=state: broker.peek("claims", state=state)
                for state in ("ready", "delayed", "leased", "dead")
            ),
            lambda: broker.dead_letters("claims"),
            lambda: broker.send_to_queue("claims", "new", dedup_key="k"),
            lambda: broker.receive_many("claims", 10, wait=0),
            lambda: broker.redrive("claims"),
            lambda: broker.receive_many("claims", 10, wait=0),
            lambda: broker.purge("claims"),
        ]
        for call in calls:
            with suppress(filao.FilaoError):
                found = await asyncio.wait_for(call(), PATIENCE)
                for message in found if isinstance(found, list) else ():
                    if isinstance(message, filao.Message):
                        with suppress(filao.FilaoError):
                            await message.nack(reason="again")


def columns() -> Iterator[tuple[str, str, str]]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for step in files.MIGRATIONS:
            step(connection)
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'filao%'")
        for (table,) in tables.fetchall():
            for _, name, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                yield table, name, kind


VALUES = {
    "INTEGER": ["-9223372036854775808", "-1", "9223372036854775807"],
    "TEXT": ["CAST(x'ff00' AS TEXT)", "''", "char(0, 27, 8238)"],
    "BLOB": ["x''", "zeroblob(300000)"],
    "ANY": ["x''", "-1", "9e99", "'x'"],
}


@pytest.mark.parametrize(("table", "column", "kind"), list(columns()))
async def test_no_value_in_the_file_ends_in_anything_but_an_error_of_ours(db, tmp_path, table, column, kind) -> None:
    for number, value in enumerate(VALUES[kind]):
        copy = tmp_path / f"copy{number}.db"
        with closing(sqlite3.connect(db)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        with suppress(sqlite3.IntegrityError):  # the columns that must differ
            change(copy, f"UPDATE {table} SET {column} = {value}")
        with suppress(filao.FilaoError):
            await every_call(copy)


@pytest.mark.parametrize("seed", range(12))
async def test_no_damage_ends_in_anything_but_an_error_of_ours(db, seed) -> None:
    from random import Random

    chance = Random(seed)
    content = bytearray(db.read_bytes())
    for _ in range(40):
        content[chance.randrange(100, len(content))] = chance.randrange(256)
    db.write_bytes(content)
    with suppress(filao.FilaoError):
        await every_call(db)


# --- what takes long, and what there is too little of ----------------------------------------------------------------


async def test_the_doctor_may_take_longer_than_a_turn_may_be_waited_for(db, monkeypatch) -> None:
    slept: list[float] = []

    def sleep_once_it_looks() -> None:
        if engine_of(broker)._jobs.is_looking and not slept:
            slept.append(1.2)
            time.sleep(slept[0])

    async with filao.connect(db) as broker:
        with monkeypatch.context() as patch:
            patch.setattr(files, "BUSY_TIMEOUT", 1.0)
            await on_connection(broker, "set_progress_handler", sleep_once_it_looks, 1)
            assert "integrity" in {finding.subject for finding in await broker.doctor()}
    assert slept


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_a_descriptor_an_error_says_so(db) -> None:
    broker = filao.connect(db)
    with no_descriptor_left(), pytest.raises(filao.EngineUnavailable, match="no file descriptor left"):
        await broker.open()
    async with filao.connect(db) as broker:
        with no_descriptor_left():
            await broker.send_to_queue(CLAIMS, "what is open goes on")
        assert engine_of(broker)._database.hold.belfry.own is None


async def test_a_receive_without_a_descriptor_says_so_and_the_next_one_has_a_bell(db) -> None:
    async with filao.connect(db) as broker:
        await broker.send_to_queue(CLAIMS, 1)
        with no_descriptor_left(), pytest.raises(filao.EngineUnavailable, match="no file descriptor left"):
            await broker.receive_from_queue(CLAIMS, wait=0)
        assert await broker.receive_from_queue(CLAIMS, wait=0) is not None
        assert engine_of(broker)._database.hold.belfry.own is not None


WITHOUT = """
import os, sys, filao.sync
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    filao.sync.connect(sys.argv[1]).open()
except filao.EngineUnavailable as error:
    os.write(1, str(error).encode())
"""


def test_without_a_descriptor_the_blocking_twin_says_so_too(db) -> None:
    limited = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", sys.executable, "-c", WITHOUT, str(db)]
    ran = subprocess.run(limited, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "no file descriptor left" in ran.stdout
