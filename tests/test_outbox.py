"""Outbox, inbox and relay: what committed is sent, once and in order; what rolled back never appears."""

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm

import filao
from filao.broker import session_of
from filao.connections import Connection, connection_of
from filao.engine import OpenAgain
from filao.outbox import Failed, Inbox, Outbox, Recorded
from filao.relay import Relay
from tests.conftest import engine_of

pytestmark = pytest.mark.anyio

PATIENCE = 30.0


@pytest.fixture
def business(tmp_path: Path) -> Path:
    """Return a database of the user's own, apart from the queue's."""
    path = tmp_path / "business.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE claim (id INTEGER PRIMARY KEY)")
        Outbox().create(connection)
        Inbox().create(connection)
    return path


@pytest.fixture
def connection(business) -> Generator[sqlite3.Connection]:
    with closing(sqlite3.connect(business)) as connection:
        yield connection


@pytest.fixture
async def broker(tmp_path) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"), filao.Queue("letters"))
        yield broker


@asynccontextmanager
async def relaying(business: Path, broker: filao.Broker) -> AsyncGenerator[Relay]:
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), broker, poll=0.01)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.wait([task])


async def received(broker: filao.Broker, count: int, queue: str = "claims") -> list[filao.Message]:
    messages: list[filao.Message] = []
    async with asyncio.timeout(PATIENCE):
        while len(messages) < count:
            messages += await broker.receive_many(queue, count - len(messages))
    return messages


async def until_empty(connection: sqlite3.Connection) -> None:
    async with asyncio.timeout(PATIENCE):
        while connection.execute("SELECT count(*) FROM filao_outbox").fetchone()[0]:  # a file sets no events
            await asyncio.sleep(0.01)


# --- the outbox ------------------------------------------------------------------------------------------------------


async def test_a_recorded_send_arrives_with_all_that_was_said_about_it(business, connection, broker) -> None:
    outbox = Outbox()
    with connection:
        name = outbox.send_to_queue(
            connection,
            "claims",
            {"id": 7},
            headers={"trace": "1"},
            priority=3,
            group="policy-12",
            dedup_key="seven",
            ttl=60,
        )
        outbox.send_to_queue(connection, "claims", b"\x00\xff")
    async with relaying(business, broker):
        first, second = await received(broker, 2)
        await until_empty(connection)
    assert (first.id, first.body, first.headers, first.priority, first.group) == (
        *(name, {"id": 7}, {"trace": "1"}, 3, "policy-12"),
    )
    assert second.body == b"\x00\xff"


async def test_what_rolls_back_is_never_sent(business, connection, broker) -> None:
    outbox = Outbox()
    connection.execute("INSERT INTO claim VALUES (1)")
    outbox.send_to_queue(connection, "claims", 1)
    connection.rollback()
    with connection:
        connection.execute("INSERT INTO claim VALUES (2)")
        outbox.send_to_queue(connection, "claims", 2)
    async with relaying(business, broker):
        (message,) = await received(broker, 1)
    assert message.body == 2
    assert (await broker.stats("claims")).sent == 1


async def test_many_are_relayed_in_the_order_in_which_they_were_recorded(business, connection, broker) -> None:
    outbox = Outbox()
    with connection:
        for number in range(1200):
            outbox.send_to_queue(connection, "claims" if number % 2 else "letters", number)
    async with relaying(business, broker):
        odd, even = await received(broker, 600), await received(broker, 600, "letters")
    assert [message.body for message in odd] == list(range(1, 1200, 2))
    assert [message.body for message in even] == list(range(0, 1200, 2))


async def test_a_relay_that_died_after_sending_sends_nothing_twice(business, connection, broker, monkeypatch) -> None:
    outbox = Outbox()
    with connection:
        outbox.send_to_queue(connection, "claims", 1)
    relay = Relay(outbox, lambda: sqlite3.connect(business), broker)
    monkeypatch.setattr(outbox, "forget", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        await relay.step()
    await relay.close()
    monkeypatch.undo()
    async with relaying(business, broker):
        await until_empty(connection)
    stats = await broker.stats("claims")
    assert (stats.sent, stats.duplicates) == (1, 1)


def test_a_table_that_is_not_there_is_told_with_what_makes_it() -> None:
    message = SimpleNamespace(queue="claims", id="7")
    acts = [
        (lambda on: filao.Outbox().send_to_queue(on, "claims", 7), "filao.Outbox('filao_outbox').create(connection)"),
        (lambda on: filao.Inbox().is_new(on, message), "filao.Inbox('filao_inbox').create(connection)"),
    ]
    for act, told in acts:
        with closing(sqlite3.connect(":memory:")) as on, pytest.raises(sqlite3.OperationalError) as raised:
            act(on)
        assert told in "".join(raised.value.__notes__)


async def test_a_relay_is_told_how_to_connect_by_a_function(broker) -> None:
    with pytest.raises(filao.ConfigurationError, match=r"connect is 'portal\.db'; give a function"):
        filao.Relay(filao.Outbox(), "portal.db", broker)  # type: ignore[arg-type]


async def test_a_queue_that_refuses_keeps_its_messages_and_the_others_go_on(business, connection, broker) -> None:
    outbox = Outbox()
    with connection:
        for number in range(600):  # more than one look takes
            outbox.send_to_queue(connection, "unknown", number)
        outbox.send_to_queue(connection, "claims", 3)
    async with relaying(business, broker):
        await received(broker, 1)
        kept = connection.execute("SELECT count(*) FROM filao_outbox WHERE queue = 'unknown'").fetchone()
        assert kept == (600,)
        await broker.declare(filao.Queue("unknown"))
        assert [message.body for message in await received(broker, 600, "unknown")] == list(range(600))


async def test_a_delay_runs_from_when_it_was_recorded(business, connection, broker) -> None:
    outbox = Outbox()
    with connection:
        outbox.send_to_queue(connection, "claims", 1, delay=100)
        connection.execute("UPDATE filao_outbox SET recorded_at = recorded_at - 60")
    (recorded,) = outbox.recorded(connection, 10)
    assert isinstance(recorded, Recorded)
    assert recorded.draft.delay == pytest.approx(40, abs=5)


async def test_a_relay_goes_on_when_its_databases_are_back(business, connection, broker, monkeypatch) -> None:
    monkeypatch.setattr("filao.relay.PAUSE_FIRST", 0.01)
    outbox, away = Outbox(), [2]

    def connect() -> sqlite3.Connection:
        if away[0]:
            away[0] -= 1
            raise sqlite3.OperationalError("the database is away")
        return sqlite3.connect(business)

    begin, fails = engine_of(broker)._database.begin, [2]

    def failing(*, durable: bool, **rest: bool) -> object:
        if fails[0] and durable:
            fails[0] -= 1
            raise filao.EngineUnavailable("the disk is away")
        return begin(durable=durable, **rest)

    with connection:
        outbox.send_to_queue(connection, "claims", 1)
    monkeypatch.setattr(engine_of(broker)._database, "begin", failing)
    task = asyncio.create_task(Relay(outbox, connect, broker).run())
    assert [message.body for message in await received(broker, 1)] == [1]
    task.cancel()
    assert (away, fails) == ([0], [0])


@pytest.mark.parametrize("at", ["connect", "commit"])
async def test_a_relay_whose_database_hangs_ends_and_leaves_no_connection_open(
    business, broker, monkeypatch, caplog, at
) -> None:
    monkeypatch.setattr("filao.relay.CLOSES_WITHIN", 0.01)
    hangs, goes_on, closed = threading.Event(), threading.Event(), threading.Event()

    def hang(where: str) -> None:
        if where == at:
            hangs.set()
            assert goes_on.wait(PATIENCE)

    class Hanging(sqlite3.Connection):
        def commit(self) -> None:
            hang("commit")
            super().commit()

        def close(self) -> None:
            super().close()
            closed.set()

    def connect() -> sqlite3.Connection:
        hang("connect")
        return sqlite3.connect(business, factory=Hanging)

    task = asyncio.create_task(Relay(Outbox(), connect, broker).run())
    assert await asyncio.to_thread(hangs.wait, PATIENCE)
    task.cancel()
    try:
        ended, _ = await asyncio.wait([task], timeout=PATIENCE)
        assert ended
    finally:
        goes_on.set()
    assert await asyncio.to_thread(closed.wait, PATIENCE)
    assert "its database has not answered for 0.01 s" in caplog.text


async def test_a_relay_goes_on_when_it_gets_a_thread_at_last(business, connection, broker, caplog) -> None:
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    before = threading.stack_size(2**62)  # more than there is
    try:
        async with relaying(business, broker):
            async with asyncio.timeout(PATIENCE):
                while caplog.text.count("cannot start a thread") < 2:
                    await asyncio.sleep(0.01)
            threading.stack_size(before)
            assert [message.body for message in await received(broker, 1)] == [1]
    finally:
        threading.stack_size(before)


async def test_a_relay_without_a_thread_can_be_stopped(business, broker, caplog) -> None:
    before = threading.stack_size(2**62)
    try:
        relay = asyncio.create_task(Relay(Outbox(), lambda: sqlite3.connect(business), broker).run())
        async with asyncio.timeout(PATIENCE):
            while "cannot start a thread" not in caplog.text:
                await asyncio.sleep(0.01)
            relay.cancel()
            with pytest.raises(asyncio.CancelledError):
                await relay
    finally:
        threading.stack_size(before)


async def test_waking_a_relay_makes_it_look_at_once(business, connection, broker) -> None:
    outbox = Outbox()
    relay = Relay(outbox, lambda: sqlite3.connect(business), broker, poll=3600)
    task = asyncio.create_task(relay.run())
    while relay._connection is None:  # it has begun to look, or will before it waits
        await asyncio.sleep(0.001)
    with connection:
        outbox.send_to_queue(connection, "claims", 1)
    async with asyncio.timeout(PATIENCE):
        while not (await broker.stats("claims")).sent:
            relay.wake()
            await asyncio.sleep(0.01)
    task.cancel()


async def test_a_queue_that_has_room_for_some_gets_them_in_order(connection, business, broker) -> None:
    await broker.declare(filao.Queue("small", max_length=10))
    outbox = Outbox()
    relay = Relay(outbox, lambda: sqlite3.connect(business), broker)
    with connection:
        for number in range(35):
            outbox.send_to_queue(connection, "small", number)
    seen: list[int] = []
    while len(seen) < 35:
        relay._refused.clear()
        assert await relay.step()
        async for message in broker.consume("small"):
            seen.append(message.body)
            await message.ack()
            if not (await broker.stats("small")).ready:
                break
    await relay.close()
    assert seen == list(range(35))


async def test_a_send_that_can_never_be_sent_is_set_aside_and_those_behind_it_go_on(
    business, connection, broker, caplog
) -> None:
    outbox = Outbox()
    with connection:
        outbox.send_to_queue(connection, "claims", "first")
        outbox.send_to_queue(connection, filao.Queue("claims", body_max=10**6), "x" * 300_000)
        for number in range(600):
            outbox.send_to_queue(connection, "claims", number)
    async with relaying(business, broker):
        bodies = [message.body for message in await received(broker, 601)]
    assert bodies == ["first", *range(600)]
    (failed,) = outbox.failed(connection)
    assert failed.queue == "claims"
    assert "300,002 bytes" in failed.reason
    assert "set aside" in caplog.text
    await broker.declare(filao.Queue("claims", body_max=10**6))
    with connection:
        assert outbox.retry(connection, [failed.number, 10**9]) == 1
    async with relaying(business, broker):
        (message,) = await received(broker, 1)
    assert (message.id, len(message.body)) == (failed.id, 300_000)
    assert not outbox.failed(connection)


@pytest.mark.parametrize(
    "change",
    [
        "headers = 'not json'",
        "headers = '[1]'",
        "kind = 7",
        "kind = 1, content = '!'",
        "content = x'ff'",
        "content = CAST(x'ff' AS TEXT)",
        "delay = 'soon'",
        "delay = -1",
        "ttl = 0",
        "priority = 1e300",
        "priority = 'high'",
        "grp = ''",
        "grp = 'a' || char(0)",
        "queue = 'no queue!'",
        "id = ''",
        "id = '0123456789abcdef-1'",
        "id = CAST(x'6fff' AS TEXT)",
        "queue = CAST(x'ff' AS TEXT)",
        "recorded_at = 'today'",
    ],
)
async def test_no_row_ends_a_relay(business, connection, broker, change) -> None:
    outbox = Outbox()
    with connection:
        outbox.send_to_queue(connection, "claims", 1)
        connection.execute(f"UPDATE filao_outbox SET {change}")
        outbox.send_to_queue(connection, "claims", 2)
    async with relaying(business, broker):
        (message,) = await received(broker, 1)
        assert message.body == 2
        async with asyncio.timeout(PATIENCE):
            while not outbox.failed(connection):
                await asyncio.sleep(0.01)
    (failed,) = outbox.failed(connection)
    assert str(failed).isprintable()
    with connection:
        assert outbox.retry(connection) == 1


async def test_what_a_relay_logs_of_a_message_carries_its_queue_id_and_attempt(
    business, connection, broker, caplog
) -> None:
    outbox = Outbox()
    await broker.declare(filao.Queue("small", max_length=1))
    await broker.send_to_queue("small", "there")
    with connection:
        outbox.send_to_queue(connection, "small", "waits", message_id="claim-1")
        outbox.send_to_queue(connection, filao.Queue("claims", body_max=10**6), "x" * 300_000, message_id="claim-2")
    relay = Relay(outbox, lambda: sqlite3.connect(business), broker)
    await relay.step()
    await relay.close()
    carried = {(record.queue, record.message_id, record.attempt) for record in caplog.records}
    assert carried == {("small", "claim-1", 0), ("claims", "claim-2", 0)}


async def test_a_broker_that_is_closed_sets_nothing_aside(business, connection, broker) -> None:
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), broker)
    await broker.close()
    with pytest.raises(filao.FilaoError):
        await relay.step()
    await relay.close()
    assert not Outbox().failed(connection)


@pytest.mark.parametrize("rows", [0, 1])
async def test_a_relay_whose_broker_was_closed_ends_with_that_error(business, connection, broker, caplog, rows) -> None:
    with connection:
        for number in range(rows):
            Outbox().send_to_queue(connection, "letters", number)
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), broker, poll=0.01)
    task = asyncio.create_task(relay.run())
    await until_empty(connection)
    await broker.close()
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    with pytest.raises(filao.ConfigurationError, match="is closed"):
        async with asyncio.timeout(PATIENCE):
            await task
    assert "trying again" not in caplog.text
    assert len(Outbox().recorded(connection, 10)) == 1


async def test_a_relay_whose_broker_is_open_on_another_event_loop_ends_with_that_error(
    business, connection, broker, caplog
) -> None:
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), broker, poll=0.01)
    with pytest.raises(filao.ConfigurationError, match="open on another event loop"):
        await asyncio.to_thread(asyncio.run, asyncio.wait_for(relay.run(), PATIENCE))
    assert "trying again" not in caplog.text
    assert len(Outbox().recorded(connection, 10)) == 1


async def test_a_relay_waits_for_a_broker_that_is_not_open_yet(tmp_path, business, connection, broker) -> None:
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    late = filao.connect(tmp_path / "claims.db")
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), late, poll=0.01)
    task = asyncio.create_task(relay.run())
    await asyncio.sleep(0)
    async with late:
        assert [message.body for message in await received(broker, 1)] == [1]
        task.cancel()
        await asyncio.wait([task])


async def test_a_relay_whose_queue_was_restored_ends_with_that_error(business, connection, broker, monkeypatch) -> None:
    """It tried for ever, where only opening anew helps."""

    async def replaced(*_: object) -> None:
        raise OpenAgain("another file")

    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
    monkeypatch.setattr(session_of(broker), "learned", replaced)
    with pytest.raises(OpenAgain):
        async with asyncio.timeout(PATIENCE):
            await Relay(Outbox(), lambda: sqlite3.connect(business), broker).run()


async def test_an_outbox_of_an_earlier_version_is_relayed(tmp_path, broker) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as old, old:
        Outbox().create(old)
        old.execute("ALTER TABLE filao_outbox DROP COLUMN failed")
        Outbox().send_to_queue(old, "claims", 1)
    async with relaying(path, broker):
        (message,) = await received(broker, 1)
    assert message.body == 1
    with closing(sqlite3.connect(path)) as old:
        assert Outbox().failed(old) == []


async def test_two_relays_of_one_outbox_send_nothing_twice_and_in_order(business, connection, broker) -> None:
    with connection:
        for number in range(2_000):
            Outbox().send_to_queue(connection, "claims", number)
    async with relaying(business, broker), relaying(business, broker):
        await until_empty(connection)
    assert [message.body for message in await received(broker, 2_000)] == list(range(2_000))
    assert await broker.receive_from_queue("claims", wait=0) is None


async def test_what_one_queue_has_sent_is_forgotten_when_another_fails(
    business, connection, broker, monkeypatch
) -> None:
    with connection:
        Outbox().send_to_queue(connection, "claims", 1)
        Outbox().send_to_queue(connection, "letters", 2)
    send = session_of(broker).send

    async def failing(queue: str, drafts: Any) -> Any:
        if queue == "letters":
            raise filao.EngineUnavailable("away")
        return await send(queue, drafts)

    monkeypatch.setattr(session_of(broker), "send", failing)
    relay = Relay(Outbox(), lambda: sqlite3.connect(business), broker)
    with pytest.raises(filao.EngineUnavailable):
        await relay.step()
    await relay.close()
    assert connection.execute("SELECT queue FROM filao_outbox").fetchall() == [("letters",)]


# --- the inbox -------------------------------------------------------------------------------------------------------


async def test_the_second_run_of_a_message_changes_nothing(connection, broker) -> None:
    inbox = Inbox()
    await broker.send_to_queue("claims", 7)
    for _ in range(2):
        message = await broker.receive_from_queue("claims")
        with connection:
            if inbox.is_new(connection, message):
                connection.execute("INSERT INTO claim VALUES (?)", (message.body,))
        await message.release()  # as if it had died before its ack
    assert connection.execute("SELECT count(*) FROM claim").fetchone() == (1,)


async def test_work_that_rolled_back_is_new_again(connection, broker) -> None:
    inbox = Inbox()
    await broker.send_to_queue("claims", 7)
    message = await broker.receive_from_queue("claims")
    assert inbox.is_new(connection, message)
    connection.rollback()
    assert inbox.is_new(connection, message)
    assert not inbox.is_new(connection, message)


async def test_what_was_done_long_ago_can_be_forgotten(connection, broker) -> None:
    inbox = Inbox()
    for number in range(3):
        await broker.send_to_queue("claims", number)
        with connection:
            inbox.is_new(connection, await broker.receive_from_queue("claims"))
    with connection:
        connection.execute("UPDATE filao_inbox SET done_at = done_at - 1000 WHERE rowid < 3")
        assert inbox.forget(connection, older_than=500) == 2


@dataclass
class Came:
    """A message as an inbox sees it."""

    queue: str
    id: str


def test_one_id_in_two_queues_is_two_messages(connection) -> None:
    inbox = Inbox()
    assert inbox.is_new(connection, Came("claims", "claim-9"))
    assert inbox.is_new(connection, Came("letters", "claim-9"))
    assert not inbox.is_new(connection, Came("claims", "claim-9"))
    assert not inbox.is_new(connection, Came("letters", "claim-9"))


OLD_INBOX = """
    CREATE TABLE filao_inbox (
        id VARCHAR(256) NOT NULL PRIMARY KEY, queue VARCHAR(128) NOT NULL, done_at DOUBLE PRECISION NOT NULL
    )
"""


@contextmanager
def on_sqlite3(path: Path, postgres: str) -> Iterator[Any]:
    with closing(sqlite3.connect(path)) as connection:
        yield connection


@contextmanager
def on_sqlite3_in_autocommit(path: Path, postgres: str) -> Iterator[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        yield connection


@contextmanager
def on_psycopg(path: Path, postgres: str) -> Iterator[Any]:
    with psycopg.connect(postgres) as connection:
        yield connection


@contextmanager
def on_psycopg_in_autocommit(path: Path, postgres: str) -> Iterator[Any]:
    with psycopg.connect(postgres, autocommit=True) as connection, connection.transaction():
        yield connection


@contextmanager
def on_sqlalchemy(path: Path, postgres: str) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@contextmanager
def on_sqlalchemy_and_postgresql(path: Path, postgres: str) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(postgres.replace("postgresql://", "postgresql+psycopg://"))
    with sqlalchemy.orm.Session(engine) as session:
        yield session
    engine.dispose()


def run(connection: Any, sql: str) -> Any:
    """Run a statement on a connection of any kind."""
    return connection_of(connection, needs_transaction=False).execute(sql)


KINDS = [
    *(on_sqlite3, on_sqlite3_in_autocommit, on_psycopg, on_psycopg_in_autocommit),
    *(on_sqlalchemy, on_sqlalchemy_and_postgresql),
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_of_an_earlier_version_gets_its_new_key_on_every_kind_of_connection(kind, tmp_path, postgres) -> None:
    with kind(tmp_path / "old.db", postgres.create(f"inbox_{kind.__name__}")) as connection:
        run(connection, OLD_INBOX)
        run(connection, "INSERT INTO filao_inbox VALUES ('claim-9', 'claims', 1)")
        Inbox().create(connection)
        Inbox().create(connection)
        assert not Inbox().is_new(connection, Came("claims", "claim-9"))
        assert Inbox().is_new(connection, Came("letters", "claim-9"))
        assert not Inbox().is_new(connection, Came("letters", "claim-9"))
        assert run(connection, "SELECT count(*) FROM filao_inbox").fetchall()[0][0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_with_the_old_key_is_refused_in_words(kind, tmp_path, postgres) -> None:
    with kind(tmp_path / "old.db", postgres.create(f"refused_{kind.__name__}")) as connection:
        run(connection, OLD_INBOX)
        with pytest.raises(filao.ConfigurationError, match=r"earlier version.*create\(connection\)"):
            Inbox().is_new(connection, Came("claims", "claim-9"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_outbox_keeps_what_failed_on_every_kind_of_connection(kind, tmp_path, postgres) -> None:
    with kind(tmp_path / "new.db", postgres.create(f"outbox_{kind.__name__}")) as connection:
        outbox = Outbox()
        outbox.create(connection)
        run(connection, "ALTER TABLE filao_outbox DROP COLUMN failed")
        outbox.update(connection)
        outbox.send_to_queue(connection, "claims", {"claim": 7}, headers={"a": "%s ? :x"})
        (recorded,) = outbox.recorded(connection, 10, without=["letters"])
        outbox.set_aside(connection, Failed(recorded.number, "", "claims", "100 % wrong?"))
        assert not outbox.recorded(connection, 10)
        assert outbox.failed(connection)[0].reason == "100 % wrong?"
        assert outbox.retry(connection) == 1
        outbox.forget(connection, [recorded.number])
        assert not outbox.recorded(connection, 10)


DJANGO = """
import sys
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}})
from django.db import connection, transaction
from filao import Inbox
from tests.test_outbox import OLD_INBOX, Came
with transaction.atomic():
    with connection.cursor() as cursor:
        cursor.execute(OLD_INBOX)
        cursor.execute("INSERT INTO filao_inbox VALUES ('claim-9', 'claims', 1)")
    Inbox().create(connection)
    print([Inbox().is_new(connection, Came(queue, "claim-9")) for queue in ("claims", "letters", "letters")])
"""


def test_an_inbox_of_an_earlier_version_gets_its_new_key_through_django(tmp_path) -> None:
    """In a process of its own: Django is configured once."""
    command = [sys.executable, "-c", DJANGO, str(tmp_path / "old.db")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.split("\n")[0] == "[False, True, False]", done.stderr


# --- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paramstyle", "sql", "parameters"),
    [
        ("qmark", "a = ? AND b = ?", (1, 2)),
        ("format", "a = %s AND b = %s", (1, 2)),
        ("pyformat", "a = %s AND b = %s", (1, 2)),
        ("numeric", "a = :1 AND b = :2", (1, 2)),
        ("numeric_dollar", "a = $1 AND b = $2", (1, 2)),
        ("named", "a = :p1 AND b = :p2", {"p1": 1, "p2": 2}),
    ],
)
def test_statements_are_written_as_each_library_wants_them(paramstyle, sql, parameters) -> None:
    ran: list[Any] = []
    Connection("any", paramstyle, lambda *call: ran.append(call)).execute("a = ? AND b = ?", (1, 2))
    assert ran == [(sql, parameters)]


class Asynchronous:
    def run_sync(self, function: Callable[..., Any]) -> None: ...


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (7, "a builtins.int is no connection that Filao knows"),
        (None, "a builtins.NoneType is no connection that Filao knows"),
        (Asynchronous(), "is asynchronous: pass the method to it"),
    ],
)
def test_what_is_no_connection_is_refused(given, text) -> None:
    with pytest.raises(filao.ConfigurationError, match=text):
        Outbox().send_to_queue(given, "claims", 1)


def test_a_connection_that_holds_no_transaction_is_refused(business) -> None:
    with closing(sqlite3.connect(business, isolation_level=None)) as connection:
        with pytest.raises(filao.ConfigurationError, match="holds no transaction, so there is nothing to join"):
            Outbox().send_to_queue(connection, "claims", 1)
        with pytest.raises(filao.ConfigurationError, match="holds no transaction"):
            Inbox().is_new(connection, None)  # type: ignore[arg-type]
        connection.execute("BEGIN")
        assert Outbox().send_to_queue(connection, "claims", 1)


@pytest.mark.parametrize("of_the_session", [False, True])
@pytest.mark.parametrize("on", ["sqlite", "postgresql"])
def test_sqlalchemys_autocommit_is_refused(on, of_the_session, business, postgres) -> None:
    url = f"sqlite:///{business}"
    if on == "postgresql":
        server: str = postgres.create(f"autocommit_{of_the_session}")
        url = server.replace("postgresql://", "postgresql+psycopg://")
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        Outbox().create(connection)
    engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with sqlalchemy.orm.Session(engine) if of_the_session else engine.connect() as connection:
        with pytest.raises(filao.ConfigurationError, match=r'holds no transaction.* "AUTOCOMMIT"'):
            Outbox().send_to_queue(connection, "claims", 1)
        with pytest.raises(filao.ConfigurationError, match=r'holds no transaction.* "AUTOCOMMIT"'):
            Inbox().is_new(connection, None)  # type: ignore[arg-type]
        assert Outbox().recorded(connection, 9) == []
    engine.dispose()


def test_sqlalchemy_begins_for_a_driver_that_does_not(business) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{business}")
    listens = sqlalchemy.event.listens_for

    @listens(engine, "connect")
    def leave_it_to_us(driver: sqlite3.Connection, _: object) -> None:
        driver.isolation_level = None

    @listens(engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.connect() as connection:
        Outbox().create(connection)
        connection.commit()
        Outbox().send_to_queue(connection, "claims", 1)
        connection.rollback()
        assert Outbox().recorded(connection, 9) == []
    engine.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has this since Python 3.12")
def test_the_autocommit_of_sqlite3_is_refused(business) -> None:
    autocommit: Any = {"autocommit": True}
    with closing(sqlite3.connect(business, **autocommit)) as connection:
        refused = pytest.raises(filao.ConfigurationError, match="holds no transaction")
        with refused:
            Outbox().send_to_queue(connection, "claims", 1)


def test_a_psycopg_connection_is_known_by_its_module() -> None:
    psycopg = pytest.importorskip("psycopg")
    given = psycopg.Connection.__new__(psycopg.Connection)
    found = connection_of(given, needs_transaction=False)
    assert (found.dialect, found.paramstyle) == ("postgresql", "pyformat")


@pytest.mark.parametrize("table", ["", "a b", "drop;", "1st", "a" * 64])
def test_a_table_that_is_no_name_is_refused(table) -> None:
    for kind in (Outbox, Inbox):
        with pytest.raises(filao.ConfigurationError, match="a name is up to 63 letters"):
            kind(table)


@pytest.mark.parametrize(
    ("body", "options", "text"),
    [
        (object(), {}, "cannot be written as JSON"),
        (b"x" * 300_000, {}, "300,000"),
        (1, {"delay": -1}, "delay is -1"),
        (1, {"message_id": ""}, "message_id is ''"),
    ],
)
def test_what_could_not_be_sent_is_refused_when_it_is_recorded(connection, body, options, text) -> None:
    with pytest.raises(filao.FilaoError, match=text):
        Outbox().send_to_queue(connection, "claims", body, **options)
    assert connection.execute("SELECT count(*) FROM filao_outbox").fetchone() == (0,)


async def test_a_relay_that_would_never_look_is_refused(broker) -> None:
    with pytest.raises(filao.ConfigurationError, match="poll is 0"):
        Relay(Outbox(), lambda: None, broker, poll=0)
