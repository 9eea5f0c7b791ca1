"""PostgreSQL: what one transaction holds stops nobody but those who need it; and who waits, waits for a bounded
time.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from itertools import count

import psycopg
import pytest

import filao
from filao.engine import Result
from filao.engines.postgresql import apart, control, main, server
from tests.conftest import engine_of
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio

_names = count()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"locks{next(_names)}")


@pytest.fixture
async def broker(url) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"), filao.Queue("letters"), filao.Queue("few", max_length=5))
        yield broker


async def go_on(broker: filao.Broker) -> None:
    """Find that work on another queue goes on."""
    async with asyncio.timeout(30):
        for number in range(5):
            await broker.send_to_queue("letters", number)
            await (await broker.receive_from_queue("letters")).ack()


@pytest.mark.parametrize("terms", [{"dedup_key": "k"}, {"message_id": "m"}])
@pytest.mark.parametrize("commits", [True, False])
async def test_a_key_that_a_transaction_holds_stops_only_those_who_send_it(url, broker, terms, commits) -> None:
    with psycopg.connect(url) as holder:
        first = await broker.send_to_queue("claims", 1, within=holder, **terms)
        sends = [asyncio.create_task(broker.send_to_queue("claims", 2, **terms)) for _ in range(30)]
        await go_on(broker)
        await asyncio.wait_for(broker.send_to_queue("claims", 3, dedup_key="another"), 30)
        assert not any(send.done() for send in sends)
        if commits:
            holder.commit()
        else:
            holder.rollback()
        async with asyncio.timeout(30):
            receipts = await asyncio.gather(*sends)
    assert len({receipt.id for receipt in receipts}) == 1
    assert [receipt.duplicate for receipt in receipts].count(False) == (0 if commits else 1)
    assert (receipts[0].id == first.id) is (commits or "message_id" in terms)


async def test_a_full_queue_that_a_transaction_sends_to_stops_only_those_who_send_there(url, broker) -> None:
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("few", 0, within=holder)
        sends = [asyncio.create_task(broker.send_to_queue("few", number)) for number in range(1, 8)]
        await go_on(broker)
        assert not any(send.done() for send in sends)
        holder.commit()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*sends, return_exceptions=True)
    assert [isinstance(result, filao.QueueFull) for result in results].count(True) == 3
    assert (await broker.stats("few")).ready == 5


async def test_a_group_that_somebody_holds_keeps_no_message_of_another_group(url, broker) -> None:
    for group in range(10):  # of which two may share a lock
        await broker.send_to_queue("claims", group, group=str(group))
    with psycopg.connect(url) as holder:
        holder.execute("SELECT filao.lock_groups(ARRAY[id], ARRAY['0']) FROM filao.queue WHERE name = 'claims'")
        message = await broker.receive_from_queue("claims", wait=0)
        assert message is not None
        assert message.body in (1, 2, 3)
        await message.ack()
    assert (await broker.receive_from_queue("claims")).body == 0


STORE = """
    INSERT INTO filao.message (id, queue, state, kind, priority, attempts, at, sent_at, expires_at, grp, content)
    SELECT nextval('filao.number'), q.id, %(state)s::filao.state, 0, 0, 1, 1, 1, %(expires_at)s::bigint, coalesce(%(group)s::text, n::text),
           convert_to(to_json(%(state)s::filao.state)::text, 'UTF8')
    FROM filao.queue q, generate_series(1, %(rows)s) AS n WHERE q.name = 'claims'
"""
NOTE = """
    INSERT INTO filao.unarranged (queue, grp)
    SELECT q.id, coalesce(%(group)s::text, n::text)
    FROM filao.queue q, generate_series(1, %(rows)s) AS n WHERE q.name = 'claims'
"""


async def test_what_is_due_in_a_group_that_somebody_holds_takes_no_place_of_what_is_due_elsewhere(url, broker) -> None:
    others = """
        SELECT n::text FROM filao.queue q, generate_series(1, 10) AS n
        WHERE q.name = 'claims' AND filao.group_key(q.id, n::text) <> filao.group_key(q.id, 'held') LIMIT 4
    """
    kinds = [("delayed", None, 5_000), ("leased", None, 1_000), ("blocked", 1, 1_000)]
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as restored:
        holder.execute("SELECT filao.lock_groups(ARRAY[id], ARRAY['held']) FROM filao.queue WHERE name = 'claims'")
        *free, arranged = [group for (group,) in restored.execute(others).fetchall()]
        for (state, expires_at, rows), group in zip(kinds, free, strict=True):
            about = {"state": state, "expires_at": expires_at}
            restored.execute(STORE, {**about, "group": "held", "rows": rows})
            restored.execute(STORE, {**about, "group": group, "rows": 1})
        restored.execute(NOTE, {"group": "held", "rows": 500})
        restored.execute(NOTE, {"group": arranged, "rows": 1})
        messages = await broker.receive_many("claims", 10, wait=0)
        noted = restored.execute("SELECT FROM filao.unarranged WHERE grp = %s", (arranged,)).fetchall()
        dead = restored.execute("SELECT reason FROM filao.message WHERE state = 'dead'").fetchall()
    assert sorted(message.body for message in messages) == ["delayed", "leased"]
    assert dead == [("expired",)]
    assert noted == []


@pytest.mark.parametrize("planned_for", [0, 3_000])
async def test_a_look_locks_the_groups_of_what_it_picks_alone(url, broker, planned_for) -> None:
    """A plan that sorts would lock the groups of all that there is."""
    looks = ("ready(q.id, 0, 0, 2, 1)", "due(q.id, 0, 2, 1)", "lapsed(q.id, 0, 2, 1)", "expired(q.id, 0, 2, 1, false)")
    calls = [f"SELECT filao.pick_{look} FROM filao.queue q" for look in (*looks, "noted(q.id, '0', 1)")]
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("DELETE FROM filao.queue WHERE name <> 'claims'")
        session.execute("SET enable_seqscan = off")  # as those who look do
        session.execute("SET plan_cache_mode = force_generic_plan")
        if planned_for == 0:
            for call in calls:
                session.execute(call.encode())
        for state, expires_at in (("ready", None), ("delayed", None), ("leased", None), ("blocked", 1)):
            session.execute(STORE, {"state": state, "expires_at": expires_at, "group": None, "rows": 3_000})
        session.execute(NOTE, {"group": None, "rows": 3_000})
        if planned_for:
            session.execute("ANALYZE filao.message, filao.unarranged")
        locked = []
        for call in calls:
            with session.transaction():
                session.execute(call.encode())
                mine = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
                locked.append(session.execute(mine).rowcount)
    assert locked == [1] * len(calls)


async def test_an_operator_need_not_wait_for_a_transaction_that_has_sent_to_a_queue_with_a_limit(url, broker) -> None:
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("few", 0, within=holder)
        await broker.pause("few")
        await broker.declare(filao.Queue("few", max_length=6))
        await broker.resume("few")
        holder.commit()
    assert await broker.send_many("few", range(5))
    with pytest.raises(filao.QueueFull, match="its max_length is 6"):
        await broker.send_to_queue("few", 6)


async def test_what_is_free_is_done_though_very_many_wait_for_what_is_held(url, broker, monkeypatch) -> None:
    """They come in one batch, of which nothing is done at first."""
    monkeypatch.setattr(apart, "LOCKED_FOR", 3600.0)
    await broker.send_many("letters", range(200))
    letters = await broker.receive_many("letters", 200)
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("few", 0, within=holder)
        await broker.send_to_queue("claims", 0, within=holder, dedup_key="k")
        sends = [asyncio.create_task(broker.send_to_queue("few", number)) for number in range(200)]
        sends += [asyncio.create_task(broker.send_to_queue("claims", 1, dedup_key="k")) for _ in range(200)]
        async with asyncio.timeout(30):
            await asyncio.gather(*(letter.ack() for letter in letters))
            await asyncio.gather(*(broker.send_to_queue("claims", 2, dedup_key=f"{n}") for n in range(100)))
        assert not any(send.done() for send in sends)
        holder.commit()
        async with asyncio.timeout(30):
            results = await asyncio.gather(*sends, return_exceptions=True)
    assert [isinstance(result, filao.QueueFull) for result in results].count(True) == 196
    assert [isinstance(result, filao.Receipt) and result.duplicate for result in results].count(True) == 200


async def test_a_lock_that_is_never_free_is_given_up_in_words(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(apart, "LOCKED_FOR", 0.5)
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("claims", 1, within=holder, dedup_key="k")
        with pytest.raises(filao.EngineError, match=r"another transaction has held a message, key.*Nothing was done"):
            await broker.send_to_queue("claims", 2, dedup_key="k")
    assert (await broker.stats("claims")).sent == 1


async def test_a_wait_for_a_lock_ends_with_the_time_of_its_call(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(apart, "LOCKED_FOR", 3600.0)
    monkeypatch.setattr(server, "ANSWERS_WITHIN", 1.5)
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("claims", 1, within=holder, dedup_key="k")
        async with asyncio.timeout(20):
            with pytest.raises(filao.EngineError):
                await broker.send_to_queue("claims", 2, dedup_key="k")


async def test_a_broker_that_is_closed_leaves_nobody_waiting_for_a_lock(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(apart, "LOCKED_FOR", 2.0)  # for which a closing broker waits
    with psycopg.connect(url) as holder:
        async with filao.connect(url) as other:
            await broker.send_to_queue("claims", 1, within=holder, dedup_key="k")
            waiting = asyncio.create_task(other.send_to_queue("claims", 2, dedup_key="k"))
            await asyncio.wait([waiting], timeout=0.5)
            assert not waiting.done()
        with pytest.raises(filao.EngineError):
            await waiting


async def test_an_unforeseen_error_reaches_who_waits_for_a_lock(url, broker, monkeypatch) -> None:
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("claims", 1, within=holder, dedup_key="k")
        waits_apart, goes_on = asyncio.Event(), asyncio.Event()

        async def unforeseen(*_: object) -> list[Result]:
            waits_apart.set()
            await goes_on.wait()
            raise MemoryError

        monkeypatch.setattr(engine_of(broker)._apart, "_do", unforeseen)
        sends = [asyncio.create_task(broker.send_to_queue("claims", number, dedup_key="k")) for number in range(2)]
        async with asyncio.timeout(30):
            await waits_apart.wait()
            goes_on.set()
            assert [type(error) for error in await asyncio.gather(*sends, return_exceptions=True)] == [MemoryError] * 2


async def test_deleting_a_queue_stops_no_other_while_a_transaction_is_open(url, broker) -> None:
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("claims", 1, within=holder)
        deleting = asyncio.create_task(broker.delete_queue("letters"))
        async with asyncio.timeout(30):
            await deleting
            await broker.declare(filao.Queue("letters"))
        deleting = asyncio.create_task(broker.delete_queue("claims"))
        await go_on(broker)
        assert not deleting.done()
        holder.rollback()
        async with asyncio.timeout(30):
            await deleting
    with pytest.raises(filao.QueueNotFound):
        await broker.send_to_queue("claims", 1)


async def test_a_late_extend_waits_for_who_may_be_taking_the_message(url, broker) -> None:
    await broker.send_to_queue("claims", 1)
    message = await broker.receive_from_queue("claims", lease=0.001)
    with psycopg.connect(url) as other:
        other.execute("SELECT FROM filao.message FOR UPDATE")  # as a receive does that finds a lease which ran out
        extending = asyncio.create_task(message.extend(60))
        await asyncio.wait([extending], timeout=0.5)
        other.execute("UPDATE filao.message SET token = 7, attempts = 2, at = at + 60000")
        other.commit()
        with pytest.raises(filao.LeaseLost):
            await extending


async def test_an_operator_who_meets_a_held_message_waits_no_longer_than_others_do(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(main, "LOCKED_FOR", 2.0)
    await broker.send_to_queue("claims", 1)
    with psycopg.connect(url) as holder:
        holder.execute("SELECT FROM filao.message FOR UPDATE")
        async with asyncio.timeout(25):  # it tries for 2 s, of which each try takes a little
            with pytest.raises(filao.EngineError, match="another transaction has held"):
                await broker.purge("claims")
    assert await broker.purge("claims") == 1


async def test_a_queue_whose_senders_never_end_is_not_deleted(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(control, "LOCKED_FOR", 0.3)
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("claims", 1, within=holder)
        with pytest.raises(filao.EngineError, match="'claims' was not deleted"):
            await broker.delete_queue("claims")
        holder.commit()
    assert (await broker.stats("claims")).ready == 1


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_limit_is_not_promised_to_a_transaction_that_cannot_see_what_others_send(
    url, broker, isolation
) -> None:
    with psycopg.connect(url) as old:
        old.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
        old.execute("SELECT count(*) FROM filao.queue")
        with pytest.raises(filao.ConfigurationError, match=r"'few' has a max_length.*READ COMMITTED"):
            await broker.send_to_queue("few", 1, within=old)
        await broker.send_to_queue("claims", 1, within=old)
        old.commit()
    assert ((await broker.stats("few")).ready, (await broker.stats("claims")).ready) == (0, 1)


async def test_a_send_of_an_older_snapshot_does_not_reach_a_queue_that_was_deleted(url, broker) -> None:
    with psycopg.connect(url) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM filao.queue")
        await broker.delete_queue("claims")
        with pytest.raises(filao.EngineError, match="Nothing was done; in a transaction of your own, roll it back"):
            await broker.send_to_queue("claims", 1, within=old)


RECEIVE = "SELECT r.id, r.due_in FROM filao.queue q, filao.receive(q.id, %s, 1, NULL, (1::bigint << 32) + 1, %s, %s) r"


async def test_a_send_that_drops_the_oldest_drops_the_next_when_a_consumer_claims_it(url, broker) -> None:
    await broker.declare(filao.Queue("news", max_length=2, overflow="drop_oldest"))
    await broker.send_many("news", [1, 2])
    with psycopg.connect(url) as consumer:
        consumer.execute(RECEIVE + " WHERE q.name = 'news'", (None, 1, 0))
        send = asyncio.create_task(broker.send_to_queue("news", 3))
        await go_on(broker)
        assert not send.done()
        consumer.commit()
        await asyncio.wait_for(send, 10)
    stats = await broker.stats("news")
    assert (stats.ready, stats.leased, stats.dead) == (1, 1, 1)
    assert [letter.body for letter in await broker.dead_letters("news")] == [2]


async def test_a_send_is_refused_whole_when_consumers_claim_what_it_would_drop(url, broker) -> None:
    await broker.declare(filao.Queue("news", max_length=2, overflow="drop_oldest"))
    await broker.send_to_queue("news", 1)
    await broker.send_to_queue("news", 2, priority=1)
    with psycopg.connect(url) as consumer:
        consumer.execute(RECEIVE + " WHERE q.name = 'news'", (None, 1, 0))  # the second, which comes first
        send = asyncio.create_task(broker.send_many("news", [3, 4]))
        await go_on(broker)
        assert not send.done()
        consumer.commit()
        with pytest.raises(filao.QueueFull, match="Nothing was stored"):
            await asyncio.wait_for(send, 10)
    stats = await broker.stats("news")
    assert (stats.ready, stats.leased, stats.dead, stats.died) == (1, 1, 0, 0)


async def test_a_transaction_that_drops_the_oldest_locks_no_group(url, broker) -> None:
    await broker.declare(filao.Queue("news", max_length=1, overflow="drop_oldest"))
    await broker.send_to_queue("news", 1, group="g")
    with psycopg.connect(url) as holder:
        await broker.send_to_queue("news", 2, within=holder)
        groups = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 AND pid = pg_backend_pid()"
        assert holder.execute(groups).fetchone() == (0,)


async def test_what_a_transaction_has_locked_lets_those_who_wait_rest(url, broker) -> None:
    await broker.declare(filao.Queue("slow", lease=0.01))
    await broker.send_to_queue("slow", 1)
    message = await broker.receive_from_queue("slow")
    look = """
        SELECT r.due_in > 0 FROM filao.queue q, filao.receive(q.id, filao.clock() + 1000, 1, NULL, 1, 1, 1) r
        WHERE q.name = 'slow'
    """
    async with message.transaction() as tx:
        await tx.execute("SELECT 1")
        with psycopg.connect(url, autocommit=True) as other:
            assert other.execute(look).fetchall() == [
                (False,)
            ]  # it has just gone on the waiting list, and looks once more
            assert other.execute(look).fetchall() == [(True,)]


async def test_a_key_whose_message_another_session_is_just_letting_expire_is_free(url, broker) -> None:
    await broker.send_to_queue("claims", "old", dedup_key="k", ttl=0.001)
    with psycopg.connect(url) as other, psycopg.connect(url, autocommit=True) as operator, psycopg.connect(url) as user:
        expired = "SELECT count(*) FROM filao.message WHERE expires_at < filao.clock()"
        async with asyncio.timeout(30):
            while operator.execute(expired).fetchone() != (1,):
                await asyncio.sleep(0.001)
        other.execute("SELECT filao.expire_all(NULL)")

        def commit() -> None:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                if operator.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (0,):
                    break
            other.commit()

        committing = asyncio.get_running_loop().run_in_executor(None, commit)
        assert not (await broker.send_to_queue("claims", "new", dedup_key="k", within=user)).duplicate
        await committing
