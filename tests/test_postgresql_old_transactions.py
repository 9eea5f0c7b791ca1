"""PostgreSQL under somebody's old transaction: nothing that a queue does walks over what was handled since."""

from collections.abc import AsyncGenerator, Iterator
from itertools import count
from typing import Any

import psycopg
import pytest

import filao
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio

_names = count()
FEW = 300  # entries of indexes; a walk over what was handled here takes thousands


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"old{next(_names)}")


@pytest.fixture
async def broker(url) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        yield broker


class Consumer:
    """A session that does what a process does, and tells what it costs the server."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        self._session = session
        ((self.queue,),) = session.execute("SELECT id FROM filao.queue WHERE name = 'claims'").fetchall()
        self._token = 0

    def run(self, sql: str, *parameters: Any) -> list[Any]:
        """Run a statement and return its rows, if it has any."""
        cursor = self._session.execute(sql.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def entries(self, sql: str, *parameters: Any) -> int:
        """Run a statement and return how many entries of indexes it read."""
        read = """
            SELECT sum(pg_stat_get_xact_tuples_returned(i.indexrelid))
            FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace = 'filao'::regnamespace
        """
        with self._session.transaction():
            ((before,),) = self.run(read)
            self.run(sql, *parameters)
            ((after,),) = self.run(read)
        return int(after - before)

    def send(self, how_many: int, *, group: str | None = None, ttl: int | None = None) -> int:
        """Send messages, and return how many entries that took."""
        sql = """
            SELECT filao.send(%s, NULL, false, 1, %s::integer[], %s::smallint[], %s::bytea[], NULL, NULL, NULL,
                              %s::text[], NULL, %s::bigint[], NULL)
        """
        each = [range(how_many), [0] * how_many, [b"x" * 200] * how_many, [group] * how_many, [ttl] * how_many]
        return self.entries(sql, self.queue, *map(list, each))

    def handle(self, most: int) -> int:
        """Receive and acknowledge messages, and return how many entries that took."""
        self._token += 1
        receive = "SELECT id FROM filao.receive(%s, NULL, 0, 60000, %s, %s, 0)"
        settle = "SELECT filao.settle(%s, NULL, false, '', %s::bigint[], %s::bigint[], %s::text[], NULL, NULL)"
        took = self.entries(receive, self.queue, self._token, most)
        held = "SELECT id FROM filao.message WHERE state = 'leased' AND token = %s"
        ids = [number for (number,) in self.run(held, self._token)]
        return took + self.entries(settle, self.queue, ids, [self._token] * len(ids), ["ack"] * len(ids))


@pytest.fixture
def consumer(url, broker) -> Iterator[Consumer]:
    with psycopg.connect(url) as old, psycopg.connect(url, autocommit=True) as session:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT FROM pg_class LIMIT 1")
        yield Consumer(session)


async def test_a_group_is_looked_at_from_where_it_begins(broker, consumer) -> None:
    consumer.send(3_000, group="policy-12")
    for state in ("ready", "leased"):
        consumer.run("UPDATE filao.message SET state = %s", state)
    consumer.run("DELETE FROM filao.message")
    consumer.send(3, group="policy-12")  # finds where the group begins
    consumer.handle(1)
    assert consumer.send(1, group="policy-12") < FEW
    assert consumer.handle(1) < FEW


async def test_what_a_group_gets_below_where_it_begins_is_let_through(url, broker, consumer) -> None:
    """A transaction may have drawn a message's number long before its commit, and a redrive brings back old ones."""
    begins = "SELECT filao.raise_floors(%s, '{policy-12}', pg_relation_filenode('filao.message'), 0)"
    await broker.send_to_queue("claims", 1, group="policy-12")
    await (await broker.receive_from_queue("claims")).reject("no")
    with psycopg.connect(url) as user:
        await broker.send_to_queue("claims", 2, group="policy-12", within=user)
        for body in (3, 4):
            await broker.send_to_queue("claims", body, group="policy-12")
        consumer.run(begins, consumer.queue)
    assert await broker.redrive("claims") == 1
    consumer.run(begins, consumer.queue)
    for body in (1, 2, 3, 4):
        message = await broker.receive_from_queue("claims", wait=10)
        assert message is not None
        assert message.body == body
        await message.ack()


async def test_where_a_group_begins_is_forgotten_with_its_table(broker, consumer) -> None:
    for body in (1, 2):
        await broker.send_to_queue("claims", body, group="policy-12")
    consumer.run("CREATE TABLE kept AS SELECT * FROM filao.message")
    for _ in range(2):
        await (await broker.receive_from_queue("claims")).ack()
    consumer.run(
        "SELECT filao.raise_floors(%s, '{policy-12}', pg_relation_filenode('filao.message'), 0)", consumer.queue
    )
    consumer.run("TRUNCATE filao.message")
    consumer.run("INSERT INTO filao.message SELECT * FROM kept")
    await broker.send_to_queue("claims", 3, group="policy-12")
    for body in (1, 2, 3):
        message = await broker.receive_from_queue("claims", wait=10)
        assert message is not None
        assert message.body == body
        await message.ack()


async def test_groups_that_were_noted_and_arranged_are_not_walked_over(broker, consumer) -> None:
    note = "INSERT INTO filao.unarranged (queue, grp) SELECT %s, n::text FROM generate_series(1, 5000) AS n"
    for _ in range(2):
        consumer.run(note, consumer.queue)
        consumer.run("DELETE FROM filao.unarranged")
        consumer.handle(1)
    assert consumer.handle(1) < FEW
    assert consumer.entries("SELECT filao.watch(0, NULL, 0)") < FEW


@pytest.mark.parametrize("overflow", ["drop_oldest", "refuse"])
async def test_a_full_queue_makes_room_without_a_walk_over_what_is_gone(broker, consumer, overflow) -> None:
    for _ in range(4):
        consumer.send(1_000, ttl=1)
        consumer.handle(1_000)
    await broker.declare(filao.Queue("claims", max_length=2, overflow=overflow))
    for _ in range(4):
        consumer.send(1, ttl=3_600_000)
    assert consumer.send(1) < FEW
    assert (await broker.stats("claims")).ready == 2


async def test_stats_do_not_walk_over_what_would_have_expired(broker, consumer) -> None:
    ages = "SELECT filao.ages(%s, NULL, '{}')"
    for _ in range(4):
        consumer.send(1_000, ttl=1)
        consumer.handle(1_000)
    consumer.run(ages, consumer.queue)
    assert consumer.entries("SELECT filao.expire_all(NULL)") + consumer.entries(ages, consumer.queue) < FEW


@pytest.mark.parametrize(
    "old",
    [
        "event OVERRIDING SYSTEM VALUE SELECT n, 'claims', n::text, n, n, 'sent', 0, '', ''",
        "dedup SELECT 0, 'k', n::text, '', n",
    ],
    ids=["events", "keys"],
)
async def test_housekeeping_forgets_in_slices_that_cost_the_same(broker, consumer, old) -> None:
    consumer.run(f"INSERT INTO filao.{old} FROM generate_series(1, 5000) AS n")
    tidy = "SELECT filao.tidy(NULL, %s)"
    took = [consumer.entries(tidy, since) for since in range(0, 6_000, 1_000)]
    assert consumer.run("SELECT 1 FROM filao.event UNION ALL SELECT 1 FROM filao.dedup") == []
    assert max(took) < 2_500  # in each slice 1,000 rows, by their time and not once more


async def test_counters_of_sessions_that_are_gone_are_folded_in_slices(broker, consumer) -> None:
    await broker.send_many("claims", range(10))
    consumer.run("UPDATE filao.counter SET slot = 0")
    consumer.run(
        """
        INSERT INTO filao.counter (queue, backend, slot, name, value)
        SELECT %s, -1, n, 'sent', 1 FROM generate_series(1, 2500) AS n
    """,
        consumer.queue,
    )
    rows = "SELECT count(*) FROM filao.counter WHERE backend <> 0"
    ((before,),) = consumer.run(rows)
    upto: int | None = 0
    while upto is not None:
        ((upto,),) = consumer.run("SELECT filao.tidy(NULL, %s)", upto)
        ((after,),) = consumer.run(rows)
        assert before - after <= 1_000
        before = after
    assert after == 0
    assert (await broker.stats("claims")).sent == 2_510
