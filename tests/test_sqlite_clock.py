"""The file's clock: what a wall clock that is set, a machine that slept and one that was started anew do to
messages.
"""

import asyncio
import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

import filao
from filao.engine import Receive
from filao.engines.sqlite import verbs
from filao.engines.sqlite.clock import BOOT_ID
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.engine import SqliteEngine
from filao.engines.sqlite.presence import Presence
from tests.conftest import engine_of
from tests.support.namespaces import apart

pytestmark = pytest.mark.anyio


class Machine:
    """A machine whose two clocks are moved by themselves."""

    def __init__(self) -> None:
        self.wall = 1_700_000_000.0
        self.up = 100.0
        self.boot = "first"

    def __call__(self) -> float:
        return self.wall

    def steady(self) -> float:
        return self.up

    def let_pass(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds

    def start_anew(self, wall: float) -> None:
        self.wall, self.up, self.boot = wall, 5.0, self.boot + "'"


@pytest.fixture
def machine() -> Machine:
    return Machine()


async def next_body(broker: filao.Broker) -> object:
    (message,) = await broker.receive_many("claims", 9, wait=0)
    return message.body


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_jump_of_the_wall_clock_changes_no_lease_delay_or_time_to_live(tmp_path, machine, jump, caplog) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=machine) as broker:
        await broker.declare(filao.Queue("claims", lease=30))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")
        await broker.send_to_queue("claims", "short-lived", ttl=60)
        await broker.send_to_queue("claims", "later", delay=10)
        machine.wall += jump
        with caplog.at_level(logging.WARNING, "filao.sqlite"):
            assert [one.body for one in await broker.receive_many("claims", 9, wait=0, lease=1)] == ["short-lived"]
            machine.let_pass(9)
            assert [one.body for one in await broker.receive_many("claims", 9, wait=0, lease=60)] == ["short-lived"]
        assert len([record for record in caplog.records if "jumped" in record.message]) == 1
        machine.let_pass(1.6)
        assert [one.body for one in await broker.receive_many("claims", 9, wait=0, lease=60)] == ["later"]
        machine.let_pass(17)
        assert await broker.receive_from_queue("claims", wait=0) is None
        machine.let_pass(4)
        assert await next_body(broker) == "held"
        with pytest.raises(filao.LeaseLost):
            await held.ack()


async def test_a_jump_that_a_filter_of_the_log_cannot_bear_stops_no_send(tmp_path, machine) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("the filter fails")

    logging.getLogger("filao.sqlite").addFilter(fail)
    try:
        async with filao.connect(tmp_path / "claims.db", clock=machine) as broker:
            await broker.declare(filao.Queue("claims"))
            machine.wall += 3600
            await broker.send_to_queue("claims", 1)
            assert await next_body(broker) == 1
    finally:
        logging.getLogger("filao.sqlite").removeFilter(fail)


async def test_no_jump_is_followed_for_the_time_before_it_was_seen(tmp_path, machine) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        for _ in range(2):  # once it has been caught up with, there is another one
            machine.let_pass(100)
            await broker.send_to_queue("claims", "held")
            held = await broker.receive_from_queue("claims", lease=1)
            await broker.send_to_queue("claims", "short-lived", ttl=1)
            machine.wall += 4
            assert await next_body(broker) == "short-lived"
            await held.ack()
            await broker.purge("claims", state="leased")
            for _ in range(3):  # by three seconds a minute
                machine.let_pass(60)
                await broker.send_to_queue("claims", "later", ttl=1)
                (message,) = await broker.receive_many("claims", 9, wait=0)
                await message.ack()


async def test_the_file_follows_the_wall_clock_slowly_and_the_doctor_tells(tmp_path, machine) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        machine.wall += 10

        async def ahead() -> float:
            await broker.send_to_queue("claims", 1)
            message = (await broker.receive_many("claims", 1))[0]
            await message.ack()
            return float(machine.wall - message.sent_at.timestamp())

        (finding,) = [one for one in await broker.doctor() if one.subject == "clock"]
        assert (finding.level, "+" in finding.text) == ("note", True)
        found = []
        for _ in range(5):
            machine.let_pass(60)
            found.append(round(await ahead()))
        assert found == [7, 4, 1, 1, 1]
        (finding,) = [one for one in await broker.doctor() if one.subject == "clock"]
        assert finding.level == "ok"


async def test_processes_agree_on_the_time(tmp_path, machine) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path, clock=machine) as one:
        await one.declare(filao.Queue("claims"))
        await one.send_to_queue("claims", "later", delay=100)
        machine.wall += 3600
        async with filao.connect(path, clock=machine) as other:
            assert await other.receive_from_queue("claims", wait=0) is None
            machine.let_pass(101)
            assert await next_body(other) == "later"


def hold_leases(path, machine: Machine) -> Callable[[], None]:
    """Return what ends a process that holds leases, as a power cut would: nothing is given back."""
    database = Database(path, durable=False, clock=machine, wake=lambda _: None)
    database.open()
    lessee = Presence(database).enter("a machine")
    with database.write(durable=False) as books:
        verbs.apply(books, [Receive("claims", 1, lease=3600.0)], lessee)

    def end() -> None:
        belfry = database.hold.belfry
        assert belfry.own is not None
        belfry.own.let_go()
        belfry.own = None
        database.close()

    return end


@pytest.mark.parametrize("jump", [60.0, -86_400.0 * 365])
async def test_a_start_of_the_machine_voids_leases_and_the_file_goes_on_from_what_it_has_seen(
    tmp_path, machine, jump
) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path, clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "held")
        await broker.send_to_queue("claims", "later", delay=100)
        end = hold_leases(path, machine)
    end()
    machine.start_anew(machine.wall + jump)
    async with filao.connect(path, clock=machine) as broker:
        (message,) = await broker.receive_many("claims", 9, wait=0, lease=3600)
        assert (message.body, message.attempt) == ("held", 2)
        machine.let_pass(106)
        assert await next_body(broker) == "later"


async def test_who_lives_keeps_its_leases_whatever_another_takes_for_a_start(tmp_path, machine) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path, clock=machine) as broker:
        await broker.declare(filao.Queue("claims", lease=3600))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")
        elsewhere = Machine()
        elsewhere.start_anew(machine.wall)
        async with filao.connect(path, clock=elsewhere) as other:
            assert await other.receive_from_queue("claims", wait=0) is None
        await held.ack()


@pytest.fixture
def elsewhere(machine) -> Machine:
    """Return the same machine as a container sees it that has a boot id of its own."""
    seen = Machine()
    seen.boot = "elsewhere"
    return seen


@asynccontextmanager
async def with_one_sent(path: Path, machine: Machine) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(path, clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "held")
        yield broker


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_who_calls_the_start_of_the_machine_otherwise_goes_by_the_clock_of_those_that_receive(
    tmp_path, machine, elsewhere, jump
) -> None:
    path = tmp_path / "claims.db"
    async with with_one_sent(path, machine) as broker:
        held = await broker.receive_from_queue("claims")
        machine.wall = elsewhere.wall = machine.wall + jump
        async with filao.connect(path, clock=elsewhere) as other:
            assert await other.receive_from_queue("claims", wait=0) is None
            await held.extend(30)
            assert await other.receive_from_queue("claims", wait=0) is None
        await held.ack()


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_who_opened_a_file_before_another_set_its_clock_goes_by_that_as_well(
    tmp_path, machine, elsewhere, jump
) -> None:
    path = tmp_path / "claims.db"
    async with with_one_sent(path, machine) as broker, filao.connect(path, clock=elsewhere) as other:
        held = await other.receive_from_queue("claims")
        machine.wall = elsewhere.wall = machine.wall + jump
        assert await broker.receive_from_queue("claims", wait=0) is None
        await held.extend(30)
        assert await broker.receive_from_queue("claims", wait=0) is None
        await held.ack()


async def test_where_nobody_can_have_a_bell_another_boot_ends_no_lease(
    tmp_path, machine, elsewhere, monkeypatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "this file system has no FIFOs")

    monkeypatch.setattr(os, "mkfifo", refuse)
    path = tmp_path / "claims.db"
    async with filao.connect(path, clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")
        async with filao.connect(path, clock=elsewhere) as other:
            assert await other.receive_from_queue("claims", wait=0) is None
        await held.ack()


RECEIVES = """
import sys
import filao.sync
with filao.sync.connect(sys.argv[1]) as broker:
    print(broker.receive_from_queue("claims", wait=0) is not None)
"""


def receives(path, *how: str) -> bool:
    """Return whether a process gets a message that has namespaces of its own."""
    program = [*apart(*how), sys.executable, "-c", RECEIVES, str(path)]
    said = subprocess.run(program, check=False, capture_output=True, text=True)
    assert said.stdout in ("True\n", "False\n"), said.stderr
    return said.stdout == "True\n"


@pytest.mark.parametrize("ahead", ["100000", "-50"])
async def test_a_time_namespace_ends_no_lease(tmp_path, ahead) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")
        assert not await asyncio.to_thread(receives, path, "--time", "--fork", "--boottime", ahead)
        await held.ack()
        await broker.send_to_queue("claims", "ready")
        assert await asyncio.to_thread(receives, path, "--time", "--fork", "--boottime", ahead)


WITHOUT_BOOT_ID = ("--mount", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$@"', "sh")


async def test_who_may_not_see_the_boot_id_leaves_the_file_s_clock_as_it_is(tmp_path) -> None:
    path = tmp_path / "claims.db"
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")

        async def clock() -> tuple[str, ...]:
            async with broker.transaction() as tx:
                ((found,),) = await tx.execute("SELECT value FROM filao_meta WHERE name = 'clock'")
            boot, offset, _ = found.split()
            return boot, offset

        before = await clock()
        assert not await asyncio.to_thread(receives, path, *WITHOUT_BOOT_ID)
        assert await clock() == before
        await held.ack()


async def test_who_waits_notices_that_the_machine_slept(tmp_path, machine) -> None:
    async with filao.connect(tmp_path / "claims.db", clock=machine) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", "later", delay=3600)
        waiting = asyncio.ensure_future(broker.receive_from_queue("claims"))
        async with asyncio.timeout(30):
            while not engine_of(broker)._lines or not engine_of(broker)._lines["claims"].is_quiet():
                await asyncio.sleep(0)
            machine.let_pass(3600)
            assert (await waiting).body == "later"


async def test_the_machine_s_own_clock_is_the_one_that_counts_from_its_start(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker, broker.transaction() as tx:
        ((clock,),) = await tx.execute("SELECT value FROM filao_meta WHERE name = 'clock'")
        assert clock.split()[0] == BOOT_ID.read_text(encoding="ascii").strip()


async def test_what_stands_in_for_time_time_is_no_start_of_the_machine(tmp_path, monkeypatch) -> None:
    async def boot(broker: filao.Broker) -> str:
        async with broker.transaction() as tx:
            ((clock,),) = await tx.execute("SELECT value FROM filao_meta WHERE name = 'clock'")
        return str(clock).split()[0]

    async with filao.connect(tmp_path / "claims.db") as broker:
        before = await boot(broker)
    with monkeypatch.context() as frozen:
        frozen.setattr(time, "time", lambda: 1_700_000_000.0)
        async with filao.connect(tmp_path / "claims.db") as broker:
            assert await boot(broker) == before
        filao.connect("amqp://127.0.0.1/")  # where a test's clock is refused, as it is for an engine of one's own
        filao.connect(partial(SqliteEngine, tmp_path / "claims.db"))
