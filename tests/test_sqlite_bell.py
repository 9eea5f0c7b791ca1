"""The bell wakes its owner, and a dead owner's bell cannot be rung."""

import asyncio
import errno
import os
import select
import threading
import time
from pathlib import Path

import pytest

import filao
from filao.engines.sqlite import files
from filao.engines.sqlite.bell import MISSED_FOR, Belfry, Bell
from filao.engines.sqlite.folder import Folder
from tests.conftest import engine_of

PATIENCE = 30.0


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path, tmp_path.stat())
    yield folder
    folder.close()


@pytest.fixture
def bell(folder):
    bell = Bell(folder)
    yield bell
    bell.close()


@pytest.fixture
def belfry(folder):
    belfry = Belfry(folder)
    yield belfry
    belfry.close()


def test_a_ring_wakes_the_owner_and_names_the_queue(bell, belfry) -> None:
    assert bell.heard() == set()
    for queue in (7, 8, 7):
        belfry.ring(bell.name, queue)
    assert select.select([bell.reader], [], [], 10)[0] == [bell.reader]
    assert bell.heard() == {7, 8}
    assert bell.heard() == set()


def descriptors() -> list[str]:
    return sorted(fd.name for fd in Path("/dev/fd").iterdir())


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "refused")


def test_a_bell_that_cannot_be_given_to_the_files_owner_leaves_nothing_behind(folder, monkeypatch) -> None:
    before = descriptors()
    monkeypatch.setattr(folder, "_entrust", refuse)
    with pytest.raises(PermissionError):
        Bell(folder)
    assert descriptors() == before
    assert not list(folder.bells())


@pytest.mark.anyio
async def test_a_process_that_cannot_watch_its_bell_leaves_none_behind(tmp_path, monkeypatch) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 7)
        hold = engine_of(broker)._database.hold
        with monkeypatch.context() as patch:
            patch.setattr(hold, "watch_bell", refuse)
            for _ in range(2):
                with pytest.raises(filao.EngineError, match="refused"):
                    await broker.receive_from_queue("claims", wait=0)
        assert not list(hold.belfry._folder.bells())
        assert len(await broker.receive_many("claims", 1, wait=0)) == 1
        assert len(list(hold.belfry._folder.bells())) == 1


def test_what_somebody_else_has_written_to_it_is_no_ring_and_no_error(bell, belfry) -> None:
    belfry.ring(bell.name, 7)
    os.write(bell._writer, b"hello")
    assert bell.heard() == {7}
    belfry.ring(bell.name, 8)
    assert bell.heard() == {8}


def test_more_rings_than_fit_are_rings_enough(bell, belfry) -> None:
    for _ in range(20_000):
        belfry.ring(bell.name, 7)
    while bell.heard():
        pass
    belfry.ring(bell.name, 8)
    assert bell.heard() == {8}


def test_an_owner_that_died_is_found_dead(bell, belfry) -> None:
    assert belfry.is_alive(bell.name)
    os.close(bell.reader)  # as the kernel does when a process ends, however it ends
    os.close(bell._writer)
    bell.reader = bell._writer = -1
    assert not belfry.is_alive(bell.name)
    belfry.ring(bell.name, 7)  # for nobody, and no error


def test_a_bell_that_is_gone_for_a_while_belongs_to_the_dead(folder, belfry, monkeypatch) -> None:
    bell = Bell(folder)
    bell.close()
    belfry.ring(bell.name, 7)
    assert belfry.is_alive(bell.name)  # its owner may be closing, or about to notice
    monkeypatch.setattr("filao.engines.sqlite.bell.time.monotonic", lambda: time.monotonic_ns() / 1e9 + MISSED_FOR)
    assert not belfry.is_alive(bell.name)


class SlowClock:
    """A clock that can make a transaction last: it is read when one begins."""

    steady = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.goes = threading.Event()
        self.goes.set()

    def __call__(self) -> float:
        self.goes.wait(PATIENCE)
        return time.time()


@pytest.mark.anyio
async def test_a_process_that_was_entered_too_late_for_its_call_hears_its_bell(tmp_path, monkeypatch) -> None:
    clock = SlowClock()
    async with filao.connect(tmp_path / "claims.db", clock=clock) as broker:
        await broker.declare(filao.Queue("claims"))
        with monkeypatch.context() as patch:
            patch.setattr(files, "BUSY_TIMEOUT", 0.1)
            clock.goes.clear()
            receiving = asyncio.create_task(broker.receive_from_queue("claims", wait=0))
            async with asyncio.timeout(PATIENCE):
                while not any(ticket.is_over for ticket in engine_of(broker)._jobs.tickets._held.values()):
                    await asyncio.sleep(0.01)
            clock.goes.set()
            with pytest.raises(filao.EngineUnavailable):
                await receiving
        assert await broker.receive_from_queue("claims", wait=0) is None
        bell = engine_of(broker)._hold.belfry.own
        assert asyncio.get_running_loop().remove_reader(bell.reader)
