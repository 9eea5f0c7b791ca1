"""Very many groups on PostgreSQL: what is done to many messages is done to all of them at once."""

import asyncio

import psycopg
import pytest

import filao
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio

MESSAGES, GROUPS = 400, 100


async def test_what_becomes_of_many_messages_is_counted_and_arranged_once(postgres: Postgres) -> None:
    url = postgres.create("groups")
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute("ALTER DATABASE groups SET track_functions = 'all'")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        for group in range(GROUPS):
            await broker.send_many("claims", range(MESSAGES // GROUPS), group=str(group))
        held = await broker.receive_many("claims", MESSAGES)
        await asyncio.gather(*(message.reject("no") for message in held))
        held = await broker.receive_many("claims", MESSAGES)
        await asyncio.gather(*(message.nack() for message in held))
        assert await broker.redrive("claims") == 2 * GROUPS
        held = await broker.receive_many("claims", MESSAGES)
        assert len(held) == GROUPS
        await asyncio.gather(*(message.ack() for message in held))
        assert await broker.purge("claims") == MESSAGES - GROUPS
    calls = "SELECT funcname, calls FROM pg_stat_user_functions WHERE funcname IN ('count', 'arrange_all')"
    with psycopg.connect(url, autocommit=True) as operator:
        counted: dict[str, int] = dict(operator.execute(calls.encode()).fetchall())
    assert counted["arrange_all"] < 2 * GROUPS + 50  # of which sending takes GROUPS
    assert counted["count"] < 4 * GROUPS + 100
