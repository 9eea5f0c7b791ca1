"""PostgreSQL's clock: what a wall clock of the server that is set does to messages, and who notices."""

import asyncio
import logging
from collections.abc import Callable
from itertools import count

import psycopg
import pytest

import filao
from filao.engines.postgresql import clock, watch
from tests.support.servers import Postgres
from tests.test_postgresql_roles import as_role

pytestmark = pytest.mark.anyio

_names = count()
HOUR, YEAR = 3_600, 31_536_000
JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR, YEAR, -YEAR])
WITHIN = 20.0  # seconds: a bound on a hang


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.create(f"clock{next(_names)}")


def set_clock(url: str, ahead: int) -> None:
    """Set the wall clock that this database sees by so many seconds from the true one."""
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(
            "CREATE OR REPLACE FUNCTION filao.wall() RETURNS bigint LANGUAGE sql VOLATILE AS "
            f"$$ SELECT floor(extract(epoch FROM clock_timestamp()) * 1000::numeric)::bigint + {ahead * 1000} $$".encode()
        )


def value(url: str, sql: str) -> object:
    with psycopg.connect(url, autocommit=True) as operator:
        row = operator.execute(sql.encode()).fetchone()
    return row and row[0]


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(WITHIN):
        while not await asyncio.to_thread(is_so):
            await asyncio.sleep(0.01)


@JUMPS
async def test_a_jump_of_the_servers_clock_ends_no_lease_and_no_time_to_live(url, jump, caplog) -> None:
    async with filao.connect(url) as holder, filao.connect(url) as other:
        await holder.declare(filao.Queue("claims", lease=60))
        await holder.send_many("claims", ["held", "extended"])
        await holder.send_to_queue("claims", "short-lived", ttl=60)
        held, extended = await holder.receive_many("claims", 2)
        set_clock(url, jump)
        found = await other.receive_many("claims", 9, wait=0)
        assert [message.body for message in found] == ["short-lived"]
        await extended.extend(60)
        await held.ack()
        await extended.ack()
        assert (await other.stats("claims")).late == 0
    assert {record.levelno for record in caplog.records if "jumped by" in record.message} == {logging.WARNING}


@JUMPS
async def test_a_jump_of_the_servers_clock_prolongs_no_lease_and_no_delay(url, jump) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", lease=0.3))
        await broker.send_to_queue("claims", "forgotten")
        await broker.receive_from_queue("claims")
        await broker.send_to_queue("claims", "soon", delay=0.3)
        await broker.send_to_queue("claims", "later", delay=60)
        set_clock(url, jump)
        await broker.send_to_queue("claims", "sent after it", delay=0.3)
        bodies: set[object] = set()
        async with asyncio.timeout(WITHIN):
            while len(bodies) < 3:
                message = await broker.receive_from_queue("claims")
                bodies.add(message.body)
                await message.ack()
        assert bodies == {"forgotten", "soon", "sent after it"}


async def test_a_second_jump_right_after_the_first_is_noticed_too(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", lease=60))
        await broker.send_to_queue("claims", "held")
        held = await broker.receive_from_queue("claims")
        for jump in (HOUR, 0, -HOUR, YEAR, 0):
            set_clock(url, jump)
            assert await broker.receive_from_queue("claims", wait=0) is None
        await held.ack()
        assert (await broker.stats("claims")).late == 0


async def test_a_process_that_stood_still_while_it_compared_the_clocks_sees_no_jump(url, monkeypatch) -> None:
    true, looks = clock._now, count()

    def now() -> float:
        return true() + (0 if next(looks) == 0 else 3_000)  # from the first question to its answer it takes 3 s

    monkeypatch.setattr(clock, "_now", now)
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        assert await broker.receive_from_queue("claims", wait=0) is not None
    assert value(url, "SELECT value FROM filao.meta WHERE name = 'clock'") is None


async def test_who_only_waits_notices_a_jump_for_those_who_come_later(url, monkeypatch) -> None:
    monkeypatch.setattr(watch, "VACUUM_INTERVAL", 0.05)
    async with filao.connect(url) as sender:
        await sender.declare(filao.Queue("claims"))
        await sender.send_to_queue("claims", 1, ttl=60)
        set_clock(url, HOUR)
        await until(lambda: value(url, "SELECT value FROM filao.meta WHERE name = 'clock'"))
    async with filao.connect(url) as later:
        assert (await later.stats("claims")).ready == 1
        (finding,) = [finding for finding in await later.doctor() if finding.subject == "clock"]
        assert (finding.level, "+3,6" in finding.text or "+3,5" in finding.text) == ("note", True)


async def test_the_queues_time_follows_a_jump_by_a_twentieth(url) -> None:
    async with filao.connect(url):
        pass
    ahead = "SELECT filao.wall() - filao.clock()"
    value(url, "SELECT filao.note_jump(0, 3600000)")
    assert 3_590_000 < int(str(value(url, ahead))) <= 3_600_000
    set_clock(url, HOUR)  # an hour later
    assert 3_410_000 < int(str(value(url, ahead))) <= 3_420_000
    set_clock(url, 19 * HOUR)
    assert 0 < int(str(value(url, ahead))) <= 180_000
    set_clock(url, 21 * HOUR)
    assert abs(int(str(value(url, ahead)))) < 1_000  # between two looks


async def test_a_role_that_may_not_note_a_jump_works_on(url) -> None:
    async with filao.connect(url) as owner:
        await owner.declare(filao.Queue("claims"))
        async with filao.connect(as_role(url, "sender")) as sender:
            await sender.send_to_queue("claims", 1)
            set_clock(url, HOUR)
            await sender.send_to_queue("claims", 2)


async def test_a_receivers_role_notes_a_jump(url) -> None:
    async with filao.connect(url) as owner:
        await owner.declare(filao.Queue("claims"))
        await owner.send_to_queue("claims", 1, ttl=60)
    async with filao.connect(as_role(url, "receiver")) as receiver:
        set_clock(url, HOUR)
        message = await receiver.receive_from_queue("claims", wait=0)
        assert message is not None
        await message.ack()
