"""PostgreSQL: what is done to Filao's tables, and beside them, by those whose database it is."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.orm import Session

import filao
from filao import overview
from tests.conftest import engine_of
from tests.support.servers import Postgres

pytestmark = pytest.mark.anyio

_names = count()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"operators{next(_names)}")


async def test_a_publication_of_all_tables_stops_nobody(url) -> None:
    """A logical replica, or a stream of changes, needs one; tables without an identity then refuse deletes."""
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url) as user:
            await broker.send_to_queue("claims", 1, within=user, group="policy-12", dedup_key="k")
        message = await broker.receive_from_queue("claims", wait=10)
        assert message is not None
        await message.ack()
        await broker.delete_queue("claims")


async def test_messages_of_a_cluster_that_was_busier_are_read_once(url) -> None:
    """A dump is restored with the numbers of the transactions in which its messages came to wait."""
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(3_000))
        with psycopg.connect(url) as operator:
            operator.execute("UPDATE filao.message SET moved_in = '9000000000'")
        async with engine_of(broker)._main.use() as connection:
            receive = "SELECT count(*) FROM filao.queue q, filao.receive(q.id, NULL, 0, 60000, %s, 1, 0)"
            read = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid = 'filao.message'::regclass"
            async with connection.transaction():
                for token in range(8):  # some plans are made after five calls
                    before = await value(connection, read)
                    assert await value(connection, receive, token + 1) == 1
                    rows = await value(connection, read) - before
        assert rows < 100
        assert [message.body for message in await broker.receive_many("claims", 2)] == [8, 9]


async def value(connection: Any, sql: str, *parameters: Any) -> Any:
    row = await (await connection.execute(sql, parameters)).fetchone()
    assert row is not None
    return row[0]


@contextmanager
def alchemy(url: str, *, kind: type) -> Iterator[Any]:
    """Give a connection or a session of SQLAlchemy's that commits each statement."""
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() if kind is sqlalchemy.Connection else Session(engine) as held:
            yield held
    finally:
        engine.dispose()


@pytest.mark.parametrize("kind", [sqlalchemy.Connection, Session])
async def test_a_sqlalchemy_connection_that_commits_each_statement_is_not_joined(url, kind) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with alchemy(url, kind=kind) as held:
            with pytest.raises(filao.ConfigurationError, match=r"holds no transaction.*AUTOCOMMIT"):
                await broker.send_to_queue("claims", 1, within=held)
            held.rollback()
        assert (await broker.stats("claims")).sent == 0


async def doctors_errors(broker: filao.Broker) -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in await broker.doctor() if finding.level == "error"]


async def test_the_doctor_tells_when_a_table_was_emptied_by_other_means(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", max_length=2))
        await broker.send_many("claims", [1, 2])
        assert await doctors_errors(broker) == []
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("TRUNCATE filao.message")
        (told,) = await doctors_errors(broker)
        assert "queue 'claims': 2 messages are counted as ready, and 0 are there" in told
        await broker.delete_queue("claims")
        await broker.declare(filao.Queue("claims", max_length=2))
        await broker.send_many("claims", [3, 4])
        assert await doctors_errors(broker) == []


async def test_the_doctor_tells_what_others_have_put_before_the_rows(url) -> None:
    put = [
        "CREATE TRIGGER skip BEFORE INSERT ON filao.message EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE RULE keep AS ON DELETE TO filao.failure DO INSTEAD NOTHING",
        "ALTER TABLE filao.queue ENABLE ROW LEVEL SECURITY",
    ]
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            for statement in put:
                operator.execute(statement.encode())
        told = [(finding.subject, finding.text) for finding in await broker.doctor() if "filao." in finding.subject]
    assert [(subject, text.partition(",")[0]) for subject, text in told] == [
        ("table filao.failure", "it has the rule keep"),
        ("table filao.message", "it has the trigger skip"),
        ("table filao.queue", "it has row security"),
    ]


async def test_what_a_trigger_skips_is_not_confirmed(url) -> None:
    """Whatever is done, nothing of it is: then it is done again, without the trigger."""
    claims, halting = filao.Queue("claims", max_attempts=1), filao.Queue("halting", history=True, max_attempts=1)
    async with filao.connect(url) as broker:
        await broker.declare(claims, halting)
        for queue in (claims, halting):
            await broker.send_many(queue, [1, 2, 3, 4, 5, 6, 7, 8], group=None if queue is claims else "policy-12")
        acked, nacked, rejected, released, extended = await broker.receive_many(claims, 5)
        grouped = await broker.receive_from_queue(halting)
        await broker.send_to_queue(claims, 9)
        last = (await broker.receive_many(claims, 9, lease=60))[-1]
        await last.reject("unreadable")
        deeds: dict[str, list[Any]] = {
            "INSERT": [
                lambda: broker.send_to_queue(claims, 10),
                lambda: broker.send_to_queue(halting, 10, group="policy-13"),
                lambda: sent_within(broker, url),
            ],
            "UPDATE": [
                *(nacked.nack, lambda: rejected.reject("no"), released.release, lambda: extended.extend(60)),
                lambda: broker.redrive(claims),
            ],
            "DELETE": [acked.ack, grouped.ack, lambda: broker.purge(halting)],
        }
        for verb, some in deeds.items():
            for deed in some:
                with skipping(url, verb), pytest.raises(filao.EngineError, match=r"skips rows .* `filao doctor` names"):
                    await deed()
                assert await doctors_errors(broker) == []
                await deed()
                assert await doctors_errors(broker) == []
        await extended.ack()


async def held(broker: filao.Broker, queue: filao.Queue, **terms: Any) -> filao.Message:
    """Return a message of two that are sent with these terms; the second has no keys."""
    await broker.send_to_queue(queue, 1, **terms)
    await broker.send_to_queue(queue, 2, group=terms.get("group"))
    message = await broker.receive_from_queue(queue)
    assert message is not None
    return message


async def one_that_failed(broker: filao.Broker, queue: filao.Queue) -> filao.Message:
    await (await held(broker, queue)).nack(reason="no")
    message = await broker.receive_from_queue(queue)
    assert message is not None
    return message


async def one_that_died(broker: filao.Broker, queue: filao.Queue) -> filao.Message:
    message = await held(broker, queue, dedup_key="policy-12")
    await message.reject("no")
    return message


class Rows:
    """What an operator sees of Filao's tables, but for numbers, times and names that differ each time."""

    seen = (
        "SELECT state::text, grp, attempts, failures, content FROM filao.message",
        "SELECT outcome, error FROM filao.failure",
        "SELECT what, detail FROM filao.event",
        "SELECT kind, key, until IS NULL FROM filao.dedup",
        "SELECT grp FROM filao.halted",
        "SELECT grp FROM filao.unarranged",
        "SELECT name, sum(value)::bigint FROM filao.counter GROUP BY queue, name HAVING sum(value) <> 0",
        "SELECT name, paused, rules FROM filao.queue",
        "SELECT what, done FROM filao.audit",
    )

    def __init__(self, url: str) -> None:
        with psycopg.connect(url) as operator:
            self.there = [sorted(map(repr, operator.execute(sql.encode()).fetchall())) for sql in self.seen]


PLAIN = filao.Queue("plain", max_attempts=2, backoff=filao.Backoff(first=0))
TRACED = filao.Queue("traced", max_attempts=1, history=True)
HALTING = filao.Queue("halting", max_attempts=1, group_dead="halt")
NO_MORE = filao.Queue("halting", max_attempts=1)
Given = Callable[[filao.Broker], Awaitable[Any]]
Deed = Callable[[filao.Broker, Any], Awaitable[object]]


async def nothing(_broker: filao.Broker) -> None:
    pass


SKIPPED: dict[str, tuple[str, str, Given, Deed]] = {
    "a send's counters": ("INSERT", "counter", nothing, lambda broker, _: broker.send_to_queue(PLAIN, 1)),
    "a send's event": ("INSERT", "event", nothing, lambda broker, _: broker.send_to_queue(TRACED, 1)),
    "who is let through": ("UPDATE", "message", nothing, lambda broker, _: broker.send_to_queue(PLAIN, 1, group="g")),
    "who comes next": ("UPDATE", "message", lambda broker: held(broker, PLAIN, group="g"), lambda _, it: it.ack()),
    "an ack's counters": ("INSERT", "counter", lambda broker: held(broker, PLAIN), lambda _, it: it.ack()),
    "an ack's event": ("INSERT", "event", lambda broker: held(broker, TRACED), lambda _, it: it.ack()),
    "an ack's failures": ("DELETE", "failure", lambda broker: one_that_failed(broker, PLAIN), lambda _, it: it.ack()),
    "a window": ("UPDATE", "dedup", lambda broker: held(broker, PLAIN, message_id="m"), lambda _, it: it.ack()),
    "a failure": ("INSERT", "failure", lambda broker: held(broker, PLAIN), lambda _, it: it.nack(reason="no")),
    "a halt": ("INSERT", "halted", lambda broker: held(broker, HALTING, group="g"), lambda _, it: it.reject("no")),
    "a key that comes back": (
        *("INSERT", "dedup", lambda broker: one_that_died(broker, PLAIN)),
        lambda broker, _: broker.redrive(PLAIN),
    ),
    "a key that is forgotten": (
        *("DELETE", "dedup", lambda broker: broker.send_to_queue(PLAIN, 1, dedup_key="policy-12")),
        lambda broker, _: broker.purge(PLAIN),
    ),
    "a pause": ("UPDATE", "queue", nothing, lambda broker, _: broker.pause(PLAIN)),
    "a resumption": ("UPDATE", "queue", lambda broker: broker.pause(PLAIN), lambda broker, _: broker.resume(PLAIN)),
    "a group's pause": ("INSERT", "halted", nothing, lambda broker, _: broker.pause(HALTING, group="g")),
    "a group's resumption": (
        *("DELETE", "halted", lambda broker: broker.pause(HALTING, group="g")),
        lambda broker, _: broker.resume(HALTING, group="g"),
    ),
    "groups that other rules let go on": (
        *("DELETE", "halted", lambda broker: broker.pause(HALTING, group="g")),
        lambda broker, _: broker.declare(NO_MORE),
    ),
    "groups to be arranged": (
        *("INSERT", "unarranged", lambda broker: held(broker, HALTING, group="g")),
        lambda broker, _: broker.declare(NO_MORE),
    ),
    "a queue's deletion": ("DELETE", "queue", nothing, lambda broker, _: broker.delete_queue(PLAIN)),
    "an entry of the log": (
        *("INSERT", "audit", nothing),
        lambda broker, _: engine_of(broker).overview.log.begin(overview.Deed("ana", "purge", "plain")),
    ),
}


@pytest.mark.parametrize("what", SKIPPED)
async def test_what_a_trigger_skips_in_any_table_is_not_confirmed(url, what) -> None:
    verb, table, given, deed = SKIPPED[what]
    async with filao.connect(url) as broker:
        await broker.declare(PLAIN, TRACED, HALTING)
        held = await given(broker)
        before = Rows(url).there
        with skipping(url, verb, table=table), pytest.raises(filao.EngineError, match=r"skips rows .* `filao doctor`"):
            await deed(broker, held)
        assert Rows(url).there == before
        await deed(broker, held)
        assert Rows(url).there != before
        assert await doctors_errors(broker) == []


@pytest.mark.parametrize("table", ["process", "waiting"])
async def test_who_cannot_be_entered_among_those_that_receive_is_told(url, table) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with skipping(url, "INSERT", table=table), pytest.raises(filao.EngineError, match=rf"skips rows .*{table}"):
            await broker.receive_from_queue("claims", wait=10)
        await broker.send_to_queue("claims", 1)
        assert await broker.receive_from_queue("claims", wait=10) is not None


async def test_one_message_that_a_trigger_skips_takes_no_other_call_along(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with skipping(url, "INSERT", "NEW.content = '2'"):
            sent = await asyncio.gather(
                broker.send_many("claims", [1, 2]), broker.send_to_queue("claims", 3), return_exceptions=True
            )
        assert [type(one) for one in sent] == [filao.EngineError, filao.Receipt]
        assert [message.body for message in await broker.peek("claims")] == [3]


async def test_a_key_that_a_trigger_skips_is_told_at_once(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with skipping(url, "INSERT", table="dedup"), pytest.raises(filao.EngineError, match=r"filao\.dedup"):
            await broker.send_to_queue("claims", 1, dedup_key="policy-12")
        assert not (await broker.send_to_queue("claims", 1, dedup_key="policy-12")).duplicate


@pytest.mark.parametrize(
    "put",
    [
        "CREATE RULE keep AS ON INSERT TO filao.message DO INSTEAD NOTHING",
        "ALTER TABLE filao.message ENABLE ROW LEVEL SECURITY; ALTER TABLE filao.message FORCE ROW LEVEL SECURITY",
    ],
    ids=["rule", "row security"],
)
async def test_what_a_rule_or_row_security_refuses_is_told_as_that(url, put) -> None:
    owner = f"owner{next(_names)}"
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(f"CREATE ROLE {owner} LOGIN; GRANT CREATE ON DATABASE {url.rpartition('/')[2]} TO {owner}")
    async with filao.connect(url.replace("filao@", f"{owner}@")) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute(put.encode())
        with pytest.raises(filao.EngineError, match=r"skips rows .* `filao doctor` names"):
            await broker.send_to_queue("claims", 1)


@contextmanager
def skipping(url: str, verb: str, when: str = "true", table: str = "message") -> Iterator[None]:
    """Let a trigger skip what is done to rows meanwhile."""
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(
            f"""
            CREATE OR REPLACE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
            CREATE TRIGGER skip BEFORE {verb} ON filao.{table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION skip();
            """.encode()
        )
        yield
        operator.execute(f"DROP TRIGGER skip ON filao.{table}".encode())


async def sent_within(broker: filao.Broker, url: str) -> None:
    with psycopg.connect(url) as user:
        await broker.send_to_queue("claims", 11, within=user)


async def test_tables_that_came_without_what_is_in_them_are_told_as_such(url) -> None:
    """As a dump of the schema alone brings them, for a logical replica say."""
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute("TRUNCATE filao.meta, filao.queue")
        with pytest.raises(filao.ConfigurationError, match=r"pg_dump --schema-only.* DROP SCHEMA filao CASCADE"):
            await filao.connect(url).open()
        operator.execute("DROP SCHEMA filao CASCADE")
    async with filao.connect(url) as broker:
        assert await broker.queues() == []


async def test_a_running_process_is_told_that_its_schema_is_gone(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("DROP SCHEMA filao CASCADE")
        for call in (lambda: broker.send_to_queue("claims", 1), lambda: broker.stats("claims"), broker.queues):
            with pytest.raises(filao.EngineError, match="schema filao is not there: was the database dropped"):
                await call()
        with pytest.raises(filao.EngineError, match=r'"filao_outbox" does not exist\. Nothing was done'):
            async with broker.transaction() as tx:
                await tx.execute("SELECT FROM filao_outbox")


async def test_operators_calls_go_on_in_a_schema_that_was_made_anew(url) -> None:
    """They are prepared by then, and what they are prepared for must not be a type that went with the schema."""
    async with filao.connect(url) as broker:

        async def bury_and_work() -> None:
            await broker.declare(filao.Queue("claims"))
            await broker.send_many("claims", range(4))
            for message in await broker.receive_many("claims", 3):
                await message.reject("no")
            ids = [letter.id for letter in await broker.dead_letters("claims")]
            assert await broker.redrive("claims", ids=ids[:1]) == 1
            assert await broker.discard("claims", ids=ids[1:2]) == 1
            assert await broker.purge("claims", state="dead") == 1
            assert await broker.purge("claims") == 2

        for _ in range(6):  # the driver prepares what it runs for the sixth time
            await bury_and_work()
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("DROP SCHEMA filao CASCADE")
        async with filao.connect(url):
            pass
        await bury_and_work()


async def test_the_doctor_tells_which_sequences_a_logical_replica_lacks(url) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        await broker.send_many("claims", range(9))
        for message in await broker.receive_many("claims", 9):
            await message.reject("no")
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute(
                "SELECT setval(name, 1) FROM unnest('{filao.number,filao.failure_id_seq}'::text[]) AS name"
            )
            with pytest.raises(filao.EngineError, match="is in use, as in a logical replica"):  # after five tries
                await broker.send_to_queue("claims", 9)
            told = await doctors_errors(broker)
            assert [text.partition(",")[0] for text in told] == [
                "numbers: the sequence filao.number stands at 6",
                "numbers: the sequence filao.failure_id_seq stands at 1",
            ]
            for text in told:
                operator.execute(text[text.index("SELECT") :].encode())
        assert await doctors_errors(broker) == []
        await broker.send_to_queue("claims", 3)
