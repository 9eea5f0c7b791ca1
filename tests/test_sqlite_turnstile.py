"""Nobody waits inside the turnstile for a lock that another program has on the file."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import filao
from filao.engines.sqlite import files
from tests.conftest import engine_of
from tests.support.programs import CLAIMS, db

__all__ = ["db"]


@contextmanager
def foreign_writer(db: Path) -> Iterator[None]:
    """Hold SQLite's write lock in another program."""
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); db.execute('BEGIN IMMEDIATE'); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(db)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as foreign:
        assert foreign.stdout is not None
        assert foreign.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            foreign.communicate()


@pytest.mark.anyio
async def test_nobody_waits_inside_the_turnstile_for_a_foreign_transaction(db, monkeypatch) -> None:
    async with filao.connect(db) as first:
        with foreign_writer(db):
            sending = asyncio.create_task(first.send_to_queue(CLAIMS, 1))
            passed = 0
            for _ in range(500):
                await asyncio.sleep(0.001)
                passed += _is_free(db)
            assert passed > 100
            assert not sending.done()
        await sending


def _is_free(db: Path) -> bool:
    import fcntl

    with files.sidecar(db).joinpath("turnstile").open() as turnstile:
        try:
            fcntl.flock(turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.anyio
async def test_a_foreign_transaction_is_waited_for_no_longer_than_the_bound(db, monkeypatch) -> None:
    broker = filao.connect(db)
    await broker.open()
    held = await broker.receive_from_queue(CLAIMS)
    with foreign_writer(db):
        monkeypatch.setattr(files, "BUSY_TIMEOUT", 0.3)
        async with asyncio.timeout(20):
            for call in (broker.send_to_queue(CLAIMS, 1), held.ack(), broker.transaction().__aenter__()):
                with pytest.raises(filao.EngineUnavailable, match="locked"):
                    await call
            await broker.close()
    assert engine_of(broker)._database.hold.db is None
