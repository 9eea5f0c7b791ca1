"""PostgreSQL: transactions of the user's, what it says of wrong use, and what it survives."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import filao
from filao.broker import session_of
from filao.engine import Batch, Draft, Operation, Send
from filao.engines.postgresql import control, doctor, main, schema, server, transactions, watch
from filao.engines.postgresql import engine as engine_module
from filao.message import delivery_of
from filao.outbox import Recorded
from filao.overview import Deed
from filao.queue import rules_from_json
from filao.session import Session as FilaoSession
from tests.conftest import engine_of, let_pass
from tests.support.load import QUEUE, loaded
from tests.support.proxy import Proxy
from tests.support.servers import Postgres, postgres_server
from tests.support.shell import started

pytestmark = pytest.mark.anyio

_names = count()


@pytest.fixture
def url(postgres: Postgres) -> str:
    """Return the URL of an empty database."""
    return postgres.create(f"pg{next(_names)}")


@pytest.fixture
async def broker(url) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"), QUEUE)
        yield broker


async def until_found(broker: filao.Broker, queue: str = "claims") -> Any:
    async with asyncio.timeout(10):
        message = await broker.receive_from_queue(queue)
    await message.ack()
    return message.body


# --- the user's transactions -----------------------------------------------------------------------------------------


async def test_who_settles_a_message_whose_queue_was_deleted_is_told_so(broker) -> None:
    await broker.declare(filao.Queue("gone"))
    await broker.send_to_queue("gone", 1)
    message = await broker.receive_from_queue("gone")
    await broker.delete_queue("gone", messages=True)
    for settle in (message.ack(), message.nack(), message.extend(5)):
        with pytest.raises(filao.LeaseLost, match="its queue was deleted, and the message with it"):
            await settle


async def test_a_send_appears_with_the_commit_of_a_psycopg_connection(url, broker) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE claim (id INTEGER)")
        receipt = await broker.send_to_queue("claims", 7, within=connection, headers={"a": "b"})
        assert (await broker.stats("claims")).ready == 0
        connection.commit()
        message = await broker.receive_from_queue("claims")
        assert (message.id, message.body, message.headers) == (receipt.id, 7, {"a": "b"})
        await broker.send_to_queue("claims", 8, within=connection, dedup_key="k")
        connection.rollback()
    assert not (await broker.send_to_queue("claims", 9, dedup_key="k")).duplicate


async def test_a_connection_with_rows_of_another_kind_is_joined(url, broker) -> None:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        await broker.send_to_queue("claims", 7, within=connection)
    assert await until_found(broker) == 7


@pytest.mark.parametrize("kind", [psycopg.ClientCursor, psycopg.RawCursor])
async def test_a_connection_with_cursors_of_another_kind_is_joined(url, broker, kind) -> None:
    with psycopg.connect(url, cursor_factory=kind) as connection:
        await broker.send_to_queue("claims", 7, within=connection, dedup_key="k")
    assert await until_found(broker) == 7


@pytest.mark.parametrize("encoding", ["LATIN1", "EUC_JP", "SQL_ASCII"])
async def test_a_connection_with_another_client_encoding_is_joined(url, broker, encoding) -> None:
    with psycopg.connect(url, client_encoding=encoding) as connection:
        first = await broker.send_to_queue("claims", "日本€", within=connection, message_id="m")
        assert (await broker.send_to_queue("claims", 7, within=connection, message_id="m")).id == first.id
    assert await until_found(broker) == "日本€"


async def test_text_that_the_users_connection_cannot_carry_is_refused_in_words(url, broker) -> None:
    with psycopg.connect(url, client_encoding="LATIN1") as connection:
        with pytest.raises(filao.MessageNotEncodable, match=r"'€'. Nothing was sent; set its client_encoding to UTF8"):
            await broker.send_to_queue("claims", 7, within=connection, group="€")
        await broker.send_to_queue("claims", 8, within=connection)
    assert await until_found(broker) == 8


async def test_a_read_only_transaction_of_the_users_is_refused_in_words(url, broker) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("SET TRANSACTION READ ONLY")
        with pytest.raises(filao.ConfigurationError, match=r"transaction of the within= connection is read-only"):
            await broker.send_to_queue("claims", 7, within=connection)
    assert not engine_of(broker)._server.is_distrusted(engine_of(broker)._main.link._connection)


@pytest.mark.parametrize("then", ["send", "write"])
async def test_a_transaction_of_ours_that_a_statement_made_read_only_is_blamed_and_not_the_server(url, then) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))

        async def work() -> None:
            async with broker.transaction() as tx:
                await tx.execute("SET TRANSACTION READ ONLY")
                await (tx.send_to_queue("claims", 7) if then == "send" else tx.execute("CREATE TABLE claim ()"))

        with pytest.raises(filao.ConfigurationError, match=r"this transaction is read-only by its own settings"):
            await work()
        assert not engine_of(broker)._server._distrusted


@pytest.mark.parametrize("how", ["read_only", "session", "sqlalchemy"])
async def test_a_connection_whose_transactions_are_read_only_costs_the_broker_none_of_its_own(url, broker, how) -> None:
    with ExitStack() as stack:
        if how == "sqlalchemy":
            address = url.replace("postgresql:", "postgresql+psycopg:")
            library = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
            held: Any = stack.enter_context(library.connect()).execution_options(postgresql_readonly=True)
        else:
            held = stack.enter_context(psycopg.connect(url))
            held.read_only = how == "read_only" or None
            if how == "session":
                held.execute("SET default_transaction_read_only = on")
                held.commit()
        with pytest.raises(filao.ConfigurationError, match=r"within= connection is read-only by its own settings"):
            await broker.send_to_queue("claims", 7, within=held)
    assert not engine_of(broker)._server._distrusted


async def test_a_connection_whose_prepared_statements_are_gone_behind_its_driver_is_told_what_to_do(
    url, broker
) -> None:
    with psycopg.connect(url, prepare_threshold=0, autocommit=True) as connection:
        with connection.transaction():
            await broker.send_to_queue("claims", 7, within=connection)
        connection.pgconn.exec_(b"DEALLOCATE ALL")  # as a pooler that gives each transaction another session does
        with (
            connection.transaction(),
            pytest.raises(filao.EngineError, match=r"Nothing was done.*prepare_threshold=None"),
        ):
            await broker.send_to_queue("claims", 8, within=connection)
    assert await until_found(broker) == 7


async def test_of_a_send_whose_connection_was_closed_meanwhile_nothing_was_done_and_the_error_says_so(
    url, broker
) -> None:
    with psycopg.connect(url) as connection, psycopg.connect(url, autocommit=True) as operator:
        connection.execute("SELECT 1")
        operator.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        for said in ("terminating connection", "the connection is lost"):
            with pytest.raises(filao.EngineUnavailable, match=rf"within= connection .*{said}.*Nothing was done\.$"):
                await broker.send_to_queue("claims", 7, within=connection)
    assert (await broker.stats("claims")).sent == 0


async def test_what_sqlalchemy_raises_within_a_transaction_ends_in_our_errors(url, broker) -> None:
    library = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with library.connect() as failed, suppress(sqlalchemy.exc.DBAPIError):
        failed.execute(sqlalchemy.text("SELECT nonsense"))
    with library.connect() as failed:
        with suppress(sqlalchemy.exc.DBAPIError):
            failed.execute(sqlalchemy.text("SELECT nonsense"))
        with pytest.raises(filao.EngineError, match="current transaction is aborted"):
            await broker.send_to_queue("claims", 1, within=failed)
    with pytest.raises(filao.EngineError, match=r"within=.*ResourceClosedError.*Nothing was sent"):
        await broker.send_to_queue("claims", 1, within=failed)
    with library.connect() as reader:
        reader.execute(sqlalchemy.text("SET TRANSACTION READ ONLY"))
        with pytest.raises(filao.ConfigurationError, match=r"transaction of the within= connection is read-only"):
            await broker.send_to_queue("claims", 1, within=reader)
    library.dispose()


async def test_headers_that_another_program_forged_make_a_message_malformed(url, broker) -> None:
    with psycopg.connect(url) as connection:
        for headers in ("nonsense", "[1]", '{"a": 1}', "[" * 100_000):
            await broker.send_to_queue("claims", 7, within=connection, headers={"a": "b"})
            connection.execute('UPDATE filao.message SET headers = %s WHERE headers = \'{"a":"b"}\'', (headers,))
    await broker.send_to_queue("claims", 8)
    assert (await broker.receive_from_queue("claims")).body == 8
    letters = await broker.dead_letters("claims")
    assert [letter.reason for letter in letters] == ["malformed"] * 4
    assert all("headers of a stored message are unreadable" in letter.error for letter in letters)


async def test_a_connection_that_commits_each_statement_is_joined_in_its_transaction_only(url, broker) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        with pytest.raises(filao.ConfigurationError, match=r"connection\.transaction"):
            await broker.send_to_queue("claims", 7, within=connection)
        with connection.transaction():
            await broker.send_to_queue("claims", 8, within=connection)
            assert (await broker.stats("claims")).sent == 0
    assert await until_found(broker) == 8


async def test_a_transaction_whose_error_was_swallowed_says_that_it_was_rolled_back(broker) -> None:
    async def swallow() -> None:
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 7)
            with suppress(psycopg.Error):
                await tx.execute("SELECT nonsense")

    with pytest.raises(filao.EngineError, match="rolled all of it back"):
        await swallow()
    assert (await broker.stats("claims")).sent == 0


async def test_whatever_the_database_isolates_by_default_filao_reads_what_is_committed(url) -> None:
    with psycopg.connect(url, autocommit=True) as operator:
        name = url.rpartition("/")[2]
        operator.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'".encode())
    async with filao.connect(url) as broker, broker.transaction() as tx:
        assert await tx.execute("SELECT current_setting('transaction_isolation')") == [("read committed",)]


async def test_a_waiting_consumer_finds_what_such_a_commit_brought(url, broker) -> None:
    receiving = asyncio.ensure_future(until_found(broker))
    with psycopg.connect(url) as connection:
        await broker.send_to_queue("claims", 7, within=connection)
    assert await receiving == 7


async def test_groups_keep_their_order_through_a_users_transaction(url, broker) -> None:
    with psycopg.connect(url) as connection:
        for body in (1, 2, 3):
            await broker.send_to_queue("claims", body, within=connection, group="policy-12")
        connection.commit()
    for body in (1, 2, 3):
        (message,) = await broker.receive_many("claims", 5, wait=5)
        assert message.body == body
        await message.ack()


async def test_over_asyncpg_an_outbox_holds_a_send_and_within_is_refused_with_that(url, broker) -> None:
    pytest.importorskip("asyncpg")
    outbox, engine = filao.Outbox(), create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
    async with engine.begin() as connection:
        await connection.run_sync(outbox.create)
        await connection.run_sync(outbox.send_to_queue, "claims", {"claim_id": 7}, delay=0.5, headers={"a": "b"})
        (recorded,) = await connection.run_sync(outbox.recorded, 9)
        assert isinstance(recorded, Recorded)
        assert recorded.draft.content == b'{"claim_id":7}'
        joined = partial(session_of(broker).transactions("").send_within, operation=Send("claims", ()))
        with pytest.raises(filao.ConfigurationError, match=r"asyncpg.*Nothing was sent; use a filao\.Outbox"):
            await connection.run_sync(joined)
    await engine.dispose()


@pytest.mark.parametrize("kind", ["connection", "session"])
async def test_sqlalchemy_holds_the_transaction(url, broker, kind) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    held = engine.connect() if kind == "connection" else Session(engine)
    with held:
        held.execute(sqlalchemy.text("CREATE TABLE claim (id INTEGER)"))
        await broker.send_to_queue("claims", 1, within=held)
        held.rollback()
        await broker.send_to_queue("claims", 2, within=held)
        held.commit()
    engine.dispose()
    assert await until_found(broker) == 2
    assert (await broker.stats("claims")).sent == 1


async def test_django_holds_the_transaction(url, broker) -> None:
    script = """
        import sys
        from urllib.parse import urlsplit
        import django
        from django.conf import settings
        parts = urlsplit(sys.argv[1])
        settings.configure(DATABASES={"default": {
            "ENGINE": "django.db.backends.postgresql", "NAME": parts.path[1:], "USER": parts.username,
            "HOST": parts.hostname, "PORT": parts.port}})
        django.setup()
        from django.db import connection, transaction
        import filao.sync
        with filao.sync.connect(sys.argv[1]) as broker:
            with transaction.atomic():
                broker.send_to_queue("claims", 1, within=connection)
            try:
                with transaction.atomic():
                    broker.send_to_queue("claims", 2, within=connection)
                    raise ValueError
            except ValueError:
                pass
        connection.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), url]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert await until_found(broker) == 1
    assert (await broker.stats("claims")).sent == 1


async def test_an_outbox_in_another_postgresql_database_is_relayed(postgres, broker) -> None:
    elsewhere, outbox = postgres.create(f"pg{next(_names)}"), filao.Outbox()
    with psycopg.connect(elsewhere) as connection:
        outbox.create(connection)
        outbox.send_to_queue(connection, "claims", 7)
        connection.commit()
        outbox.send_to_queue(connection, "claims", 8)
        connection.rollback()
    relay = filao.Relay(outbox, lambda: psycopg.connect(elsewhere), broker)
    running = asyncio.create_task(relay.run())
    assert await until_found(broker) == 7
    running.cancel()
    assert (await broker.stats("claims")).sent == 1


async def test_the_rules_hold_within_a_transaction_too(url, postgres, broker) -> None:
    await broker.declare(filao.Queue("small", max_length=1, body_max=10))
    with psycopg.connect(url) as connection:
        with pytest.raises(filao.QueueNotFound, match="claims"):
            await broker.send_to_queue("claim", 1, within=connection)
        await broker.send_to_queue("small", 1, within=connection)
        with pytest.raises(filao.QueueFull, match="small"):
            await broker.send_to_queue("small", 2, within=connection)
        async with filao.connect(url) as other:
            with pytest.raises(filao.MessageTooLarge, match="small"):
                await other.send_to_queue("small", "x" * 20, within=connection)
    with (
        psycopg.connect(postgres.create(f"pg{next(_names)}")) as stranger,
        pytest.raises(filao.ConfigurationError, match="another database"),
    ):
        await broker.send_to_queue("claims", 1, within=stranger)
    with (
        psycopg.connect(url, autocommit=True) as idle,
        pytest.raises(filao.ConfigurationError, match="holds no transaction"),
    ):
        await broker.send_to_queue("claims", 1, within=idle)


async def test_a_transaction_that_lasts_holds_nobody_up(broker) -> None:
    """Not those who send to the same queue or group, and not the extension of its own message's lease."""
    await broker.send_to_queue("claims", 1, group="g")
    message = await broker.receive_from_queue("claims")
    async with message.transaction() as tx, asyncio.timeout(5):
        await tx.send_to_queue("claims", 2, group="g")
        other = engine_of(broker).sibling()
        async with filao.Broker(FilaoSession(lambda: other)) as twin:
            await session_of(twin).extend(delivery_of(message), 60)
            await twin.send_to_queue("claims", 3, group="g")
            await twin.send_to_queue("claims", 4)
            assert (await twin.receive_from_queue("claims")).body == 4
    assert [await until_found(broker), await until_found(broker)] == [2, 3]


async def test_a_transaction_commits_in_peace_while_a_queue_is_deleted(broker) -> None:
    await broker.declare(filao.Queue("claims"), filao.Queue("letters"))
    may_delete = asyncio.Event()

    async def delete() -> None:
        await may_delete.wait()
        await broker.delete_queue("letters")

    deleting = asyncio.create_task(delete())
    async with broker.transaction() as tx:
        await tx.send_to_queue("claims", 7)
        may_delete.set()
        await deleting
    assert (await broker.receive_from_queue("claims")).body == 7


async def test_what_a_statement_sets_ends_with_its_transaction(broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("/* faster */ SET synchronous_commit = off")
        assert await tx.execute("SHOW synchronous_commit") == [("off",)]
    async with broker.transaction() as tx:
        assert await tx.execute("SHOW synchronous_commit") == [("on",)]
        await tx.execute("SET LOCAL synchronous_commit = off")
        backend = await tx.execute("SELECT pg_backend_pid()")
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT pg_backend_pid()") == backend


LEFT = {
    "a setting": ("SELECT set_config('lock_timeout', '1ms', false)", "SELECT current_setting('lock_timeout') <> '10s'"),
    "a role": ("SELECT set_config('role', 'pg_monitor', false)", "SELECT current_user = 'pg_monitor'"),
    "a search path": (
        "SELECT set_config('search_path', 'pg_temp', false)",
        "SELECT 'pg_temp' = ANY (current_schemas(true))",
    ),
    "a lock": (
        "SELECT pg_advisory_lock(7)",
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 7)",
    ),
    "a table": ("CREATE TEMP TABLE claim (id integer)", "SELECT to_regclass('pg_temp.claim') IS NOT NULL"),
    "a cursor": ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "SELECT EXISTS (SELECT FROM pg_cursors WHERE name = 'c')"),
    "an ear": ("LISTEN claims", "SELECT EXISTS (SELECT FROM pg_listening_channels())"),
}


@pytest.mark.parametrize("ends", ["commits", "fails"])
async def test_what_statements_leave_behind_is_cleared_away(broker, ends) -> None:
    for what, (leave, is_left) in LEFT.items():
        with suppress(ZeroDivisionError):
            async with broker.transaction() as tx:
                backend = await tx.execute("SELECT pg_backend_pid()")
                await tx.execute(leave)
                if ends == "fails":
                    raise ZeroDivisionError
        async with broker.transaction() as tx:
            assert await tx.execute(is_left) == [(False,)], what
            assert await tx.execute("SELECT pg_backend_pid()") == backend


async def test_a_connection_on_which_a_statement_was_prepared_serves_nobody_else(broker) -> None:
    async with broker.transaction() as tx:
        backend = await tx.execute("SELECT pg_backend_pid()")
        await tx.execute("PREPARE look AS SELECT 1")
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT pg_backend_pid()") != backend


async def test_what_follows_a_statement_that_ended_the_transaction_by_failing_is_refused(broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE kept (n integer)")
    with pytest.raises(filao.EngineError, match="ended the transaction"):  # noqa: PT012 - all of it
        async with broker.transaction() as tx:
            await tx.execute("INSERT INTO kept VALUES (1)")
            with pytest.raises(psycopg.Error):
                await tx.execute("PREPARE /* /* */ */ TRANSACTION 'one'")
            with pytest.raises(filao.EngineError, match="ended the transaction"):
                await tx.execute("INSERT INTO kept VALUES (2)")
    async with broker.transaction() as tx:
        assert await tx.execute("SELECT n FROM kept") == []


async def test_a_send_in_a_transaction_meets_a_queue_that_was_deleted_and_declared_anew(url, broker) -> None:
    async with filao.connect(url) as other:
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 2)
        await other.delete_queue("claims", messages=True)
        await other.declare(filao.Queue("claims"))
        with pytest.raises(filao.EngineUnavailable, match="was deleted, and may have been declared anew"):
            async with broker.transaction() as tx:
                await tx.send_to_queue("claims", 3)
        async with broker.transaction() as tx:
            await tx.send_to_queue("claims", 4)
        assert await until_found(other) == 4


async def test_the_first_use_of_a_queue_reads_the_rules_of_no_other(url, broker, monkeypatch) -> None:
    """There may be thousands; of a queue that is none, all are named that its caller may have meant."""
    await broker.declare(*(filao.Queue(f"other.{number}") for number in range(5)), filao.Queue("claims"))
    read: list[str] = []

    def reading(name: str, rules: str) -> filao.Queue:
        read.append(name)
        return rules_from_json(name, rules)

    monkeypatch.setattr(control, "rules_from_json", reading)
    async with filao.connect(url) as fresh:
        await fresh.send_to_queue("claims", 1)
        await (await fresh.receive_from_queue("claims")).ack()
        with pytest.raises(filao.QueueNotFound, match=r"'other\.9' is not declared. Did you mean 'other\.\d'"):
            await fresh.send_to_queue(filao.Queue("other.9"), 1)
    assert set(read) == {"claims"}


async def test_statements_are_written_as_on_sqlite_or_as_psycopg_wants(broker) -> None:
    async with broker.transaction() as tx:
        await tx.execute("CREATE TABLE t (a text, b integer)")
        await tx.execute("INSERT INTO t VALUES (?, ?)", ("what? 100 %", 1))
        await tx.execute("INSERT INTO t VALUES ('why?', ?) -- is it?", (2,))
        await tx.execute("INSERT INTO t VALUES (:a, :b::integer)", {"a": "c", "b": "3"})
        await tx.execute("INSERT INTO t VALUES (%s, %s)", ("d", 4))
        found = await tx.execute("SELECT a FROM t WHERE a LIKE '%' AND b > ? ORDER BY b", (0,))
        with pytest.raises(filao.ConfigurationError, match="COMMIT inside a transaction"):
            await tx.execute("COMMIT")
    assert [row[0] for row in found] == ["what? 100 %", "why?", "c", "d"]


# --- opening ---------------------------------------------------------------------------------------------------------


async def test_processes_that_start_together_build_one_schema(url) -> None:
    script = """
        import sys, filao.sync
        sys.stdin.readline()
        with filao.sync.connect(sys.argv[1]) as broker:
            broker.declare(filao.Queue("claims"))
            broker.send_to_queue("claims", 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), url]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(8)]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    said = [await asyncio.to_thread(process.communicate, timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 8, said
    async with filao.connect(url) as broker:
        assert (await broker.stats("claims")).ready == 8


async def test_a_newer_schema_is_not_touched(url, broker) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE filao.meta SET value = '99' WHERE name = 'version'")
    with pytest.raises(filao.ConfigurationError, match=r"newer Filao \(its schema has version 99"):
        await filao.connect(url).open()


async def test_a_schema_of_an_earlier_version_is_brought_up(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    monkeypatch.setitem(schema.STEPS, schema.VERSION, "ALTER TABLE filao.meta ADD COLUMN more text")
    await broker.send_to_queue("claims", 1)
    async with filao.connect(url) as newer:
        assert (await newer.receive_from_queue("claims")).body == 1
    with psycopg.connect(url) as connection:
        connection.execute("SELECT more FROM filao.meta")


@pytest.mark.parametrize(
    ("change", "error", "texts"),
    [
        (lambda url: url.replace("filao@", "nobody@"), filao.ConfigurationError, ["refused us", "nobody"]),
        (lambda url: url + "x", filao.ConfigurationError, ["does not exist", "pg"]),
        (
            lambda url: url.replace("@127.0.0.1:", "@127.0.0.1:1"),
            filao.ConfigurationError,
            ["a port that is no number up to 65535"],
        ),
        (lambda url: url + "?=", filao.ConfigurationError, ["cannot be read"]),
        (lambda _: "postgresql://u:geheim@127.0.0.1:1/x", filao.EngineUnavailable, ["127.0.0.1:1", "away"]),
        (lambda url: url + "?no_such=1", filao.ConfigurationError, ["no_such"]),
    ],
)
async def test_a_url_that_leads_nowhere_says_so_and_keeps_the_password_to_itself(url, change, error, texts) -> None:
    with pytest.raises(error) as raised:
        await filao.connect(change(url)).open()
    for text in texts:
        assert text in str(raised.value)
    assert "geheim" not in str(raised.value)


async def test_a_user_who_may_not_create_the_schema_is_told_what_to_grant(url) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS clerk")
        connection.execute("CREATE ROLE clerk LOGIN")
    with pytest.raises(filao.ConfigurationError, match=r"permission denied for database.*GRANT CREATE"):
        await filao.connect(url.replace("filao@", "clerk@")).open()


async def test_a_server_that_is_too_old_is_refused(url, monkeypatch) -> None:
    monkeypatch.setattr(server, "VERSION_MIN", 990_000)
    with pytest.raises(filao.ConfigurationError, match="Filao needs 99 or newer"):
        await filao.connect(url).open()


async def test_a_standby_is_refused_in_words(url) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        name = url.rpartition("/")[2]
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
    with pytest.raises(filao.ConfigurationError, match="read-only: connect to the primary"):
        await filao.connect(url).open()


async def test_the_doctor_says_what_is_wrong(url, broker) -> None:
    found = {finding.subject: finding for finding in await broker.doctor()}
    assert found["connections"].level == "ok"
    assert "version" in found["server"].text
    assert not [finding for finding in found.values() if finding.level == "error"]
    assert "dashboard's log" not in found
    await engine_of(broker).overview.log.begin(Deed("ada", "redrive", "claims", wanted=7))
    (told,) = [finding for finding in await broker.doctor() if finding.subject == "dashboard's log"]
    assert (told.level, "redrive of queue 'claims' by ada, 0 of 7 messages" in told.text) == ("note", True)


async def test_the_doctor_counts_no_process_of_the_servers_own_among_the_connections(url, broker) -> None:
    await broker.doctor()
    with psycopg.connect(url) as operator:
        (clients,) = operator.execute(_CLIENTS).fetchone() or (0,)
        (found,) = [finding for finding in await broker.doctor() if finding.subject == "connections"]
        assert 2 <= int(found.text.split()[0]) <= clients


_CLIENTS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"


async def test_a_redrive_that_fails_half_way_tells_what_is_done_and_calls_for_it(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(watch, "POLL_INTERVAL", 600.0)
    monkeypatch.setattr(control, "SLICE", 1)
    await broker.send_many("claims", [1, 2])
    for _ in range(2):
        await (await broker.receive_from_queue("claims")).reject("wrong")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION public.stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'it stays'; END $$"
        )
        connection.execute(
            "CREATE TRIGGER stays BEFORE UPDATE ON filao.message FOR EACH ROW "
            "WHEN (OLD.content = '2' AND OLD.state = 'dead') EXECUTE FUNCTION public.stay()"
        )
        waiting = asyncio.create_task(until_found(broker))
        async with asyncio.timeout(10):
            while connection.execute("SELECT count(*) FROM filao.waiting").fetchone() != (1,):
                await asyncio.sleep(0.01)
    with pytest.raises(filao.EngineError, match=r"^1 message is done, and will stay so.*it stays"):
        await broker.redrive("claims")
    assert await waiting == 1


async def test_when_all_connections_are_in_transactions_the_next_is_told(broker, monkeypatch) -> None:
    monkeypatch.setattr(transactions, "POOL_WAIT", 0.3)
    async with filao.connect(engine_of(broker)._server.url) as small, asyncio.timeout(30):
        async with asyncio.TaskGroup() as tasks:
            held, leave = asyncio.Semaphore(0), asyncio.Event()

            async def hold() -> None:
                async with small.transaction() as tx:
                    await tx.execute("SELECT 1")
                    held.release()
                    await leave.wait()

            for _ in range(transactions.CONNECTIONS_MAX):
                tasks.create_task(hold())
            for _ in range(transactions.CONNECTIONS_MAX):
                await held.acquire()
            with pytest.raises(filao.EngineUnavailable, match="10 transactions of this process are open"):
                async with small.transaction():
                    pass
            await small.send_to_queue("claims", 1)  # which needs none of them
            leave.set()
        async with small.transaction() as tx:
            await tx.execute("SELECT 1")


async def test_more_connections_than_select_can_watch_are_no_matter(url) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        async with filao.connect(url) as broker:
            await broker.declare(filao.Queue("claims"))
            connection = engine_of(broker)._main.link._connection
            assert connection.fileno() > 1024
            await broker.send_to_queue("claims", 1)
            assert engine_of(broker)._main.link._connection is connection


async def test_a_user_who_owns_the_schema_needs_no_right_to_create_one(url) -> None:
    name = f"owner_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'".encode())
        operator.execute(f"CREATE SCHEMA filao AUTHORIZATION {name}".encode())
    async with filao.connect(url.replace("postgres@", f"{name}:secret@")) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1)
        assert await until_found(broker) == 1


async def test_the_room_of_what_is_gone_is_given_back_when_the_queue_rests(url, monkeypatch) -> None:
    monkeypatch.setattr(watch, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(watch, "VACUUM_INTERVAL", 0.3)
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", [b"x" * 200] * 4_000)
        for _ in range(4):
            messages = await broker.receive_many("claims", 1_000)
            await asyncio.gather(*(message.ack() for message in messages))
        with psycopg.connect(url, autocommit=True) as operator:
            async with asyncio.timeout(30):
                while operator.execute("SELECT pg_relation_size('filao.message')").fetchone() != (0,):
                    await asyncio.sleep(0.05)


# --- old transactions ------------------------------------------------------------------------------------------------


@contextmanager
def old_transaction(url: str) -> Iterator[int]:
    """Hold what a dump or an analyst holds, and yield its process: nothing that dies meanwhile can be removed."""
    with psycopg.connect(url) as analyst:
        analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        analyst.execute("SELECT FROM pg_class LIMIT 1")
        yield analyst.info.backend_pid


@pytest.mark.parametrize(
    "how",
    [{}, {"delay": 0.001}, {"priority": 1}, {"ttl": 0.5}],
    ids=["plain", "delayed", "with priorities", "with a time to live"],
)
async def test_under_an_old_transaction_a_claim_does_not_walk_over_what_was_handled(url, broker, how) -> None:
    claim = """
        EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
        SELECT r.* FROM filao.queue q, filao.receive(q.id, NULL, 0, 60000, %s, 1, 0) r WHERE q.name = 'claims'
    """
    with old_transaction(url), psycopg.connect(url, autocommit=True) as session:
        for number in range(8):
            options = how if number % 2 else {}
            await asyncio.gather(*(broker.send_to_queue("claims", b"x" * 500, **options) for _ in range(500)))
            while messages := await broker.receive_many("claims", 100, wait=0.1):
                await asyncio.gather(*(message.ack() for message in messages))
        for token in range(8):  # some plans are made after five calls
            await broker.send_to_queue("claims", 7)
            ((about,),) = session.execute(claim, (token,)).fetchone() or ()
            cost = about["Plan"]["Shared Hit Blocks"] + about["Plan"]["Shared Read Blocks"]
    assert cost < 100  # pages; of the first claim of a session, which begins at the bottom, some thousands


async def test_under_an_old_transaction_leases_that_ended_are_not_walked_over_one_after_the_other(url, broker) -> None:
    receive = "SELECT r.id FROM filao.queue q, filao.receive(q.id, %s, 0, 60000, %s, %s, 0) r WHERE q.name = 'claims'"
    settle = """
        SELECT filao.settle(id, %s, false, '', %s::bigint[], array_fill(%s::bigint, ARRAY[100]),
                            array_fill('ack'::text, ARRAY[100]), NULL, NULL)
        FROM filao.queue WHERE name = 'claims'
    """
    with old_transaction(url), psycopg.connect(url, autocommit=True) as session:
        await broker.send_many("claims", [b"x" * 500] * 2_000)
        ((now,),) = session.execute("SELECT filao.clock()").fetchall()
        for second in range(20):  # a consumer that is never idle
            moment = now + 1_000 * second
            ids = [number for (number,) in session.execute(receive, (moment, second + 1, 100)).fetchall()]
            session.execute(settle, (moment, ids, second + 1))
        await broker.send_to_queue("claims", 7)
        moment = now + 60_500  # when the first of those leases would have ended, and the others not yet
        ((about,),) = session.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {receive}", (moment, 99, 1)).fetchall()
    assert about[0]["Plan"]["Shared Hit Blocks"] + about[0]["Plan"]["Shared Read Blocks"] < 100  # pages


async def test_a_message_is_looked_up_once_to_be_claimed_and_once_to_be_acked(url, broker) -> None:
    receive = "SELECT r.id FROM filao.queue q, filao.receive(q.id, NULL, 0, 60000, 1, %s, 0) r WHERE q.name = 'claims'"
    settle = """
        SELECT filao.settle(id, NULL, false, '', %s::bigint[], array_fill(1::bigint, ARRAY[50]),
                            array_fill('ack'::text, ARRAY[50]), NULL, NULL)
        FROM filao.queue WHERE name = 'claims'
    """
    await broker.send_many("claims", range(51))
    with psycopg.connect(url) as session:

        def looked_up() -> int:
            read = "SELECT idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relid = 'filao.message'::regclass"
            ((rows,),) = session.execute(read).fetchall()
            return int(rows)

        session.execute(receive, (1,))  # sees what is new
        before = looked_up()
        ids = [number for (number,) in session.execute(receive, (50,)).fetchall()]
        claimed = looked_up()
        session.execute(settle, (ids,))
        acked = looked_up()
        session.rollback()
    assert claimed - before <= len(ids) + 1  # the first of them also to see where to begin
    assert len(ids) <= acked - claimed <= len(ids) + 1  # PostgreSQL 19 looks once more for a batch


async def test_under_an_old_transaction_the_watch_does_not_walk_over_those_who_were_called(url, broker) -> None:
    watch = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT filao.watch(0, NULL, 0)"
    wait = """
        INSERT INTO filao.waiting (queue, since, process, wants)
        SELECT id, nextval('filao.place'), 1, 1 FROM filao.queue, generate_series(1, %s) WHERE name = 'claims'
    """
    with old_transaction(url), psycopg.connect(url, autocommit=True) as session:
        for _ in range(3):
            session.execute(wait, (10_000,))
            session.execute("DELETE FROM filao.waiting")  # as who calls them does, in other sessions
            session.execute(wait, (1,))
            session.execute(watch)
            session.execute("DELETE FROM filao.waiting")
            session.execute(watch)  # when nobody waits
        ((about,),) = session.execute(watch).fetchall()
    assert about[0]["Plan"]["Shared Hit Blocks"] + about[0]["Plan"]["Shared Read Blocks"] < 100  # pages


async def test_a_key_that_is_known_is_looked_up_without_a_walk_over_what_expired(url, broker) -> None:
    send = """
        EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)
        SELECT filao.send(id, filao.clock() + 3600000, false, 1, '{0}', '{0}', '{7}', NULL, NULL, NULL, NULL, '{k}', NULL,
                          NULL)
        FROM filao.queue WHERE name = 'claims'
    """
    await broker.send_to_queue("claims", 7, dedup_key="k")
    await broker.send_many("claims", range(3_000), ttl=60)
    with psycopg.connect(url, autocommit=True) as session:
        for _ in range(8):  # some plans are made after five calls
            ((about,),) = session.execute(send).fetchall()
    assert about[0]["Plan"]["Shared Hit Blocks"] + about[0]["Plan"]["Shared Read Blocks"] < 500  # pages
    assert (await broker.stats("claims")).duplicates == 8


async def test_an_ack_with_the_token_of_an_earlier_lease_is_lost_beside_one_of_the_lease_that_followed(
    url, broker
) -> None:
    receive = "SELECT r.id FROM filao.queue q, filao.receive(q.id, NULL, 0, 60000, %s, %s, 0) r WHERE q.name = 'claims'"
    settle = """
        SELECT filao.settle(id, NULL, false, '', %s::bigint[], %s::bigint[], %s::text[], NULL, NULL)
        FROM filao.queue WHERE name = 'claims'
    """
    await broker.send_many("claims", [1, 2])
    with psycopg.connect(url, autocommit=True) as session:
        ((first,),) = session.execute(receive, (101, 1)).fetchall()
        session.execute(settle, ([first], [101], ["release"]))
        assert session.execute(receive, (102, 2)).fetchall() == [(first,), (first + 1,)]
        asked = ([first + 1, first, first], [102, 101, 102], ["ack"] * 3)
        assert session.execute(settle, ([first + 1, first], [102, 101], ["ack", "ack"])).fetchall() == [(2,)]
        assert session.execute(settle, asked).fetchall() == [(1,), (2,)]
    assert (await broker.stats("claims")).acked == 2


async def test_the_doctor_names_who_holds_an_old_transaction(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "TRANSACTION_LONG", 0)
    with old_transaction(url) as pid:
        said = [finding.text for finding in await broker.doctor() if finding.subject == "transactions"]
    assert len(said) == 1
    for part in (
        f"process {pid}",
        "transaction of filao",
        "SELECT FROM pg_class LIMIT 1",
        f"pg_terminate_backend({pid})",
    ):
        assert part in said[0]
    assert "transactions" not in [finding.subject for finding in await broker.doctor()]


async def test_nothing_is_vacuumed_in_vain_while_an_old_transaction_is_open(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(watch, "VACUUM_AFTER", -1)
    with psycopg.connect(url, autocommit=True) as operator:

        async def vacuumed() -> int:
            await engine_of(broker)._watch.vacuum()
            row = operator.execute("SELECT pg_stat_get_vacuum_count('filao.message'::regclass)").fetchone()
            return row[0] if row else 0

        with old_transaction(url):
            first = await vacuumed()
            await broker.send_to_queue("claims", 7)
            assert [await vacuumed(), await vacuumed()] == [first, first]
        assert await vacuumed() == first + 1


async def test_a_vacuum_may_take_longer_than_a_call(broker) -> None:
    """One that is ended after 30 s has done nothing for the indexes, and the next begins anew."""
    pool = engine_of(broker)._transactions

    async def longest(within: float) -> str:
        async with pool.connection(within) as connection:
            ((found,),) = await (await connection.execute("SHOW statement_timeout")).fetchall()
            return str(found)

    assert await longest(watch.VACUUM_WITHIN) == "10min"
    async with broker.transaction() as tx:
        assert await tx.execute("SHOW statement_timeout", ()) == [("30s",)]


# --- waking ----------------------------------------------------------------------------------------------------------


async def test_a_consumer_that_waits_is_called_and_need_not_poll(url, monkeypatch) -> None:
    monkeypatch.setattr(watch, "POLL_INTERVAL", 600.0)
    async with filao.connect(url) as sender, filao.connect(url) as consumer:
        await sender.declare(filao.Queue("claims"))
        waiting = asyncio.create_task(consumer.receive_from_queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            async with asyncio.timeout(10):
                while operator.execute("SELECT count(*) FROM filao.waiting").fetchone() != (1,):
                    await asyncio.sleep(0.01)
                await sender.send_to_queue("claims", 7)
                assert (await waiting).body == 7


async def test_a_process_that_was_called_and_stands_still_keeps_no_message_from_the_others(url, broker) -> None:
    with psycopg.connect(url, autocommit=True) as operator:
        standing = "INSERT INTO filao.waiting (queue, since, process, wants) SELECT id, 0, 1, 1 FROM filao.queue"
        operator.execute(standing)
        waiting = asyncio.create_task(broker.receive_from_queue("claims"))
        async with asyncio.timeout(10):
            while operator.execute("SELECT count(*) FROM filao.waiting WHERE since > 0").fetchone() != (1,):
                await asyncio.sleep(0.01)
            async with filao.connect(url) as sender:
                await sender.send_to_queue("claims", 7)
                assert (await waiting).body == 7


async def test_a_paused_queue_in_which_something_is_due_lets_those_who_wait_rest(url, broker) -> None:
    await broker.send_to_queue("claims", 7, delay=0.001)
    await broker.pause("claims")
    look = """
        SELECT r.due_in FROM filao.queue q, filao.receive(q.id, filao.clock() + 1000, 1, NULL, 1, 1, 1) r
        WHERE q.name = 'claims'
    """
    with psycopg.connect(url, autocommit=True) as session:
        assert session.execute(look).fetchall() == [(0,)]  # it has just gone on the waiting list, and looks once more
        assert session.execute(look).fetchall() == [(None,)]


async def test_housekeeping_lets_others_through(url, broker, monkeypatch) -> None:
    old = "INSERT INTO filao.dedup SELECT 0, 'k', n::text, '', n FROM generate_series(1, 300000) AS n"
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(old)
        monkeypatch.setattr(watch, "TIDY_INTERVAL", 0.0)
        async with filao.connect(url) as consumer:
            async with asyncio.timeout(30):
                while operator.execute("SELECT count(*) < 300000 FROM filao.dedup").fetchone() == (False,):
                    await asyncio.sleep(0.01)
                waiting = asyncio.create_task(consumer.receive_from_queue("claims"))
                with psycopg.connect(url) as connection:
                    await broker.send_to_queue("claims", 7, within=connection)
                await waiting
            assert operator.execute("SELECT count(*) > 0 FROM filao.dedup WHERE queue = 0").fetchone() == (True,)


async def test_a_queue_in_which_nothing_is_due_says_so(url, broker) -> None:
    await broker.send_to_queue("claims", 7)
    with psycopg.connect(url) as operator:
        seen = "filao.look_at_times(id, filao.nothing_seen(), filao.clock(), true)"
        due = f"SELECT filao.due_in({seen}, filao.clock()) FROM filao.queue WHERE name = 'claims'"
        assert operator.execute(due.encode()).fetchone() == (
            None,
        )  # 0 would make those who wait look again at once, for ever
    await broker.receive_from_queue("claims", lease=30)
    with psycopg.connect(url) as operator:
        (left,) = operator.execute(due.encode()).fetchone() or (None,)
        assert 0 < left <= 30_000


async def test_a_call_that_fails_after_the_commit_repeats_nothing(url, broker) -> None:
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(_NO_CALL)
    sends = [broker.send_to_queue("claims", number) for number in range(5)]
    receipts = await asyncio.gather(*sends)
    async with broker.transaction() as tx:
        await tx.send_to_queue("claims", 5)
    assert len({receipt.id for receipt in receipts}) == 5
    assert (await broker.stats("claims")).sent == 6


_NO_CALL = """
    CREATE OR REPLACE FUNCTION filao.call(queues integer[], amounts integer[]) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
      RAISE deadlock_detected;
    END
    $$
"""


async def test_whatever_anybody_notifies_the_listener_goes_on(url, monkeypatch) -> None:
    monkeypatch.setattr(watch, "POLL_INTERVAL", 600.0)
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        assert await broker.receive_from_queue("claims", wait=0) is None
        with psycopg.connect(url, autocommit=True) as stranger:
            for payload in ("garbage", "", "-1", "9" * 4000, "٣", "1e3", "0x1"):
                stranger.execute("SELECT pg_notify('filao_' || id, %s) FROM filao.process", (payload,))
        waiting = asyncio.create_task(broker.receive_from_queue("claims"))
        async with asyncio.timeout(20), filao.connect(url) as sender:
            with psycopg.connect(url, autocommit=True) as operator:
                while operator.execute("SELECT count(*) FROM filao.waiting").fetchone() != (1,):
                    await asyncio.sleep(0.01)
            await sender.send_to_queue("claims", 7)
            assert (await waiting).body == 7


async def test_a_process_that_was_struck_off_though_it_lives_registers_anew_and_listens_once(url, broker) -> None:
    await broker.send_to_queue("claims", 1)
    await (await broker.receive_from_queue("claims")).ack()
    engine = engine_of(broker)
    for number in range(3):
        before = engine._listener.process
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("SELECT filao.strike_off(%s, NULL, true)", (before,))
            operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "WHERE locktype = 'advisory' AND objid = %s AND pid <> %s",
                (before, engine._main.link._connection.info.backend_pid),
            )
        await broker.send_to_queue("claims", number)
        async with asyncio.timeout(20):
            while engine._listener.process == before:
                message = await broker.receive_from_queue("claims", wait=0.1)
                if message is not None:
                    with suppress(filao.LeaseLost):
                        await message.ack()
    listening = [task for task in engine._tasks if "Listener.run" in repr(task)]
    assert len(listening) == 1


# --- one consumer at a time ------------------------------------------------------------------------------------------

HOLDER = """
    import asyncio, sys, filao

    async def main():
        async with filao.connect(sys.argv[1]) as broker:
            message = await broker.receive_from_queue("claims", lease=float(sys.argv[2]))
            print("held", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            try:
                await message.ack()
            except filao.LeaseLost as error:
                print("lost", error, flush=True)

    asyncio.run(main())
"""


@asynccontextmanager
async def holder(url: str, lease: float) -> AsyncGenerator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), url, str(lease)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_a_consumer_that_was_paused_past_its_lease_changes_nothing(url, broker) -> None:
    await broker.send_to_queue("claims", 7)
    async with holder(url, lease=0.5) as zombie:
        os.kill(zombie.pid, signal.SIGSTOP)
        message = await broker.receive_from_queue("claims")
        assert message.attempt == 2
        os.kill(zombie.pid, signal.SIGCONT)
        said, _ = await asyncio.to_thread(zombie.communicate, "ack\n")
        assert "another consumer holds it, as attempt 2" in said
        await message.ack()
    assert (await broker.stats("claims")).acked == 1


async def test_a_lease_that_ended_before_its_claim_was_committed_is_found_by_who_looked_meanwhile(url, broker) -> None:
    await broker.send_to_queue("claims", 7)
    look = "SELECT r.id FROM filao.queue q, filao.receive(q.id, %s, %s, 1000, %s, 1, 0) r WHERE q.name = 'claims'"
    now = 1_900_000_000_000
    with psycopg.connect(url) as slow, psycopg.connect(url, autocommit=True) as other:
        claimed = slow.execute(look, (now, 1, 1)).fetchone()
        assert other.execute(look, (now + 2_000, 2, 2)).fetchone() == (None,)
        slow.commit()
        assert other.execute(look, (now + 3_000, 2, 3)).fetchone() == claimed != (None,)


async def test_a_lease_that_ran_out_after_the_clock_was_set_back_is_found_by_who_looked_before(url, broker) -> None:
    await broker.send_to_queue("claims", 7)
    look = "SELECT r.id FROM filao.queue q, filao.receive(q.id, %s, %s, 1000, %s, 1, 0) r WHERE q.name = 'claims'"
    now = 1_900_000_000_000
    with psycopg.connect(url, autocommit=True) as early, psycopg.connect(url, autocommit=True) as late:
        early.execute("UPDATE filao.queue SET paused = true")
        early.execute(look, (now + 3_600_000, 1, 1))
        early.execute("UPDATE filao.queue SET paused = false")
        claimed = late.execute(look, (now, 2, 2)).fetchone()
        assert early.execute(look, (now + 5_000, 1, 3)).fetchone() == claimed != (None,)


async def test_the_leases_of_a_process_that_died_are_taken_over_long_before_they_end(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(watch, "COME_BACK_WITHIN", 0.0)  # as if others had been here for a while
    await broker.send_to_queue("claims", 7)
    async with holder(url, lease=600) as dying:
        receiving = asyncio.ensure_future(broker.receive_from_queue("claims", wait=60))
        dying.kill()
        message = await receiving
    assert delivery_of(message).crashed
    await message.reject()
    (dead,) = await broker.dead_letters("claims")
    assert [failure.outcome for failure in dead.history] == ["crashed", "rejected"]


async def test_a_process_that_lost_one_session_and_gets_no_other_keeps_its_leases(url, broker, monkeypatch) -> None:
    monkeypatch.setattr(watch, "COME_BACK_WITHIN", 0.0)
    monkeypatch.setattr(watch, "DEAD_AFTER", 0.1)
    role = f"tenant_{url.rpartition('/')[2]}"
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 2".encode())
        operator.execute(f"GRANT filao TO {role}".encode())
        async with filao.connect(url.replace("filao@", f"{role}@")) as tenant, asyncio.timeout(30):
            await broker.send_to_queue("claims", 1)
            held = await tenant.receive_from_queue("claims")
            operator.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1".encode())
            async with holder_of_another(url, broker) as dying:
                operator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND query LIKE 'LISTEN%%'",
                    (role,),
                )
                receiving = asyncio.ensure_future(broker.receive_from_queue("claims"))
                dying.kill()
                await (await receiving).ack()  # so others had the time to take over what the dead left
            await held.ack()


async def test_a_process_whose_main_connection_is_lost_while_it_is_entered_is_called_from_then_on(url, broker) -> None:
    engine = engine_of(broker)
    async with engine._main.use() as main:
        lost = main.info.backend_pid
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(
            f"""
            CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
              PERFORM pg_terminate_backend({lost}, 10000);
              RETURN NULL;
            END $$;
            CREATE TRIGGER losing AFTER INSERT ON filao.process FOR EACH ROW EXECUTE FUNCTION lose();
            """.encode()
        )
        with pytest.raises(filao.EngineUnavailable):
            await broker.receive_from_queue("claims", wait=0)
        operator.execute("DROP TRIGGER losing ON filao.process")
    assert await broker.receive_from_queue("claims", wait=0) is None
    assert engine._is_listening
    await broker.send_to_queue("claims", 1)
    assert await until_found(broker) == 1


@asynccontextmanager
async def holder_of_another(url: str, broker: filao.Broker) -> AsyncGenerator["subprocess.Popen[str]"]:
    """Run a process that holds a message which is sent now."""
    await broker.send_to_queue("claims", 2)
    async with holder(url, lease=600) as process:
        yield process


@pytest.mark.parametrize("died", [True, False])
async def test_however_many_leases_a_process_leaves_all_come_back(url, broker, monkeypatch, died) -> None:
    monkeypatch.setattr(engine_module, "SLICE", 7)
    await broker.send_many("claims", range(25))
    async with filao.connect(url) as leaving:
        assert len(await leaving.receive_many("claims", 25, lease=600)) == 25
        if died:
            await engine_of(broker)._strike_off(engine_of(leaving)._listener.process, died=True)
    stats = await broker.stats("claims")
    assert (stats.ready, stats.leased, stats.lost, stats.released) == (25, 0, *((25, 0) if died else (0, 25)))


async def test_an_ack_with_the_token_of_a_lease_before_is_refused(broker) -> None:
    await broker.send_to_queue("claims", 7)
    first = await broker.receive_from_queue("claims")
    again = filao.Message(session_of(broker), delivery_of(first), first.body)
    await first.release()
    second = await broker.receive_from_queue("claims")
    with pytest.raises(filao.LeaseLost, match="another consumer holds it, as attempt 1"):
        await again.ack()
    await second.ack()


async def test_the_limit_of_a_queue_is_exact_among_processes(url, broker) -> None:
    async with AsyncExitStack() as stack:
        senders = [await stack.enter_async_context(filao.connect(url)) for _ in range(6)]
        for length in range(5, 25):
            queue: filao.Queue = filao.Queue(f"small-{length}", max_length=length)
            await broker.declare(queue)
            sends = [sender.send_to_queue(queue, number) for number in range(6) for sender in senders]
            results = await asyncio.gather(*sends, return_exceptions=True)
            refused = [result for result in results if isinstance(result, filao.QueueFull)]
            assert (len(results) - len(refused), (await broker.stats(queue)).ready) == (length, length)


async def test_a_group_whose_message_is_being_claimed_lets_no_other_through(url, broker) -> None:
    """Message 1 becomes due while 2, which had overtaken it, is claimed by a transaction that has not committed yet."""
    await broker.declare(filao.Queue("claims", group_failure="skip"))
    for body in (1, 2):
        await broker.send_to_queue("claims", body, group="g")
    await (await broker.receive_from_queue("claims")).nack(delay=5)
    claim = """
        SELECT r.content FROM filao.queue q, filao.receive(q.id, filao.clock() + %s, 0, 60000, %s, 1, 0) r
        WHERE q.name = 'claims' AND r.id IS NOT NULL
    """
    with psycopg.connect(url) as first, psycopg.connect(url, autocommit=True) as second:
        assert first.execute(claim, (0, 1)).fetchall() == [(b"2",)]
        other = asyncio.create_task(asyncio.to_thread(lambda: second.execute(claim, (6_000, 2)).fetchall()))
        await asyncio.wait([other], timeout=0.3)  # it need not wait, but if it does, let it
        first.commit()
        assert await other == []


async def test_many_groups_fit_into_the_locks_of_a_server(url, broker) -> None:
    """A default server has room for some 6,400 locks, for all its databases; this one has 200 connections, so for twice
    as many, and more where memory is left.
    """
    groups = 60_000
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(
            """
            INSERT INTO filao.message (id, queue, state, kind, priority, at, sent_at, grp, content)
            SELECT nextval('filao.number'), q.id, 'ready', 0, 0, 0, 0, 'g' || n, '7' FROM filao.queue q, generate_series(1, %s) n
            WHERE q.name = 'claims'
            """,
            (groups,),
        )
        operator.execute(
            "INSERT INTO filao.counter SELECT id, 0, 0, n.name, %s FROM filao.queue, "
            "unnest(ARRAY['ready', 'sent']) AS n (name) "
            "WHERE filao.queue.name = 'claims'",
            (groups,),
        )
    await broker.declare(filao.Queue("claims", group_failure="skip"))
    assert (await broker.stats("claims")).ready == groups


async def test_a_changed_rule_applies_to_every_group_when_it_has_been_declared(url, broker) -> None:
    for number in range(1_200):  # more than fit into one slice
        await broker.send_to_queue("claims", number, group=f"g{number % 600}", delay=600 * (number < 600))
    assert (await broker.stats("claims")).ready == 0
    await broker.declare(filao.Queue("claims", group_failure="skip"))
    assert (await broker.stats("claims")).ready == 600


async def test_what_backends_counted_that_are_gone_still_counts(url, broker) -> None:
    async with filao.connect(url) as other:
        await other.send_many("claims", range(3))
    before = await broker.stats("claims")
    with psycopg.connect(url, autocommit=True) as connection:
        async with asyncio.timeout(10):
            while connection.execute(_OTHER_BACKENDS).fetchone() != (0,):
                connection.execute("SELECT filao.tidy(NULL)")
                await asyncio.sleep(0.01)
    after = await broker.stats("claims")
    assert (after.sent, after.ready) == (before.sent, before.ready) == (3, 3)


_OTHER_BACKENDS = """
    SELECT count(*) FROM filao.counter
    WHERE backend <> 0 AND backend NOT IN (SELECT pid FROM pg_stat_activity)
"""


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frail(tmp_path_factory, postgres) -> Iterator[Postgres]:
    """Return a server that tests may crash; `postgres` skips it where none is installed."""
    folder = tmp_path_factory.mktemp("frail")
    let_pass(folder)
    with postgres_server(folder / "server") as server:
        yield server


@pytest.fixture
def frail_url(frail: Postgres) -> str:
    return frail.create(f"pg{next(_names)}")


async def test_a_crash_of_the_server_loses_and_doubles_nothing(frail, frail_url) -> None:
    async with filao.connect(frail_url) as senders, filao.connect(frail_url) as consumers:
        await senders.declare(QUEUE)
        async with loaded(senders, consumers, transacts=True) as load:
            await load.resumes()
            for _ in range(3):
                await asyncio.to_thread(frail.stop, "immediate")
                await asyncio.to_thread(frail.start)
                await load.resumes()
        await load.finish(senders)
        stats = await senders.stats(QUEUE)
    assert load.errors["EngineUnavailable"]
    assert load.lost == set()
    assert not [key for key, times in load.acked.items() if times > 1]
    assert 0 <= stats.sent - len(load.confirmed) <= 9  # of each sender the last may not have been confirmed


async def test_sessions_that_are_terminated_again_and_again_lose_and_double_nothing(frail, frail_url) -> None:
    async with filao.connect(frail_url) as senders, filao.connect(frail_url) as consumers:
        await senders.declare(QUEUE)
        async with loaded(senders, consumers, transacts=True) as load:
            with psycopg.connect(frail.url(), autocommit=True) as operator:
                for _ in range(10):
                    await load.resumes()
                    operator.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                        (frail_url.rpartition("/")[2],),
                    )
            await load.resumes()
        await load.finish(senders)
        stats = await senders.stats(QUEUE)
    assert load.lost == set()
    assert not [key for key, times in load.acked.items() if times > 1]
    assert 0 <= stats.sent - len(load.confirmed) <= 9


@pytest.fixture
def proxy(frail) -> Iterator[Proxy]:
    with closing(Proxy(frail.port)) as proxy:
        yield proxy


@asynccontextmanager
async def through(proxy: Proxy, frail: Postgres, url: str) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(frail.url(url.rpartition("/")[2], proxy.port)) as broker:
        yield broker


async def test_connections_that_are_reset_lose_and_double_nothing(frail, frail_url, proxy) -> None:
    async with through(proxy, frail, frail_url) as far, filao.connect(frail_url) as near:
        await near.declare(QUEUE)
        async with loaded(far, far, transacts=True) as load:
            for _ in range(10):
                await load.resumes()
                proxy.reset()
            await load.resumes()
        await load.finish(near)
        stats = await near.stats(QUEUE)
    assert load.lost == set()
    assert not [key for key, times in load.acked.items() if times > 1]
    assert 0 <= stats.sent - len(load.confirmed) <= 9


async def test_a_network_that_stalls_is_given_up_and_found_again(frail, frail_url, proxy, monkeypatch) -> None:
    monkeypatch.setattr(server, "ANSWERS_WITHIN", 1.0)
    async with through(proxy, frail, frail_url) as far, filao.connect(frail_url) as near:
        await near.declare(QUEUE)
        async with loaded(far, far, transacts=True) as load:
            await load.resumes()
            proxy.stall()
            async with asyncio.timeout(30):
                while not load.errors["EngineUnavailable"]:
                    await asyncio.sleep(0.01)
            proxy.go_on()
            await load.resumes()
        await load.finish(near)
    assert load.lost == set()


async def test_with_a_libpq_before_17_a_call_that_is_given_up_closes_its_connection(url, broker, monkeypatch) -> None:
    """To ask for its end could hold up the whole process, with psycopg's lowest version where a network stalls."""

    def is_not_there(*, check: bool = False) -> bool:
        if check:
            raise psycopg.NotSupportedError
        return False

    monkeypatch.setattr(psycopg.capabilities, "has_cancel_safe", is_not_there)
    async with engine_of(broker)._transactions.connection(10) as connection:
        call = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
        async with asyncio.timeout(20):
            while connection.pgconn.transaction_status != psycopg.pq.TransactionStatus.ACTIVE:
                await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()  # the lowest psycopg raised that the connection is closed
        assert connection.closed


async def test_what_a_call_has_waited_counts_when_the_server_does_not_answer(frail, frail_url, proxy) -> None:
    async with through(proxy, frail, frail_url) as far:
        await far.declare(filao.Queue("claims"))
        proxy.stall()
        since = asyncio.get_running_loop().time() - server.ANSWERS_WITHIN + 0.2
        sends: list[Operation] = [Send("claims", [Draft(0, b"1", None)])]
        asked = Batch(receives=False, writes=True, take=lambda _: sends, since=since)
        async with asyncio.timeout(10):  # far less than its time from now on, and than the driver's farewell, 10 s more
            with pytest.raises(filao.EngineUnavailable, match="has not answered"):
                await engine_of(far).execute(asked)
        proxy.go_on()


SAYS_WHAT_FAILED = """
import asyncio, sys, filao
from filao.engines.postgresql import server

async def main():
    async with filao.connect(sys.argv[1]) as broker:
        await broker.send_to_queue("claims", 1)
        server.ANSWERS_WITHIN = 0.3
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            await broker.send_to_queue("claims", 2)
        except filao.EngineUnavailable:
            print("told", flush=True)
        sys.stdin.readline()

asyncio.run(main())
"""


def test_what_the_driver_says_is_not_said_beside_our_errors(frail, frail_url, proxy) -> None:
    with filao.sync.connect(frail_url) as broker:
        broker.declare(filao.Queue("claims"))
    url = frail.url(frail_url.rpartition("/")[2], proxy.port)
    with started(url, program=[sys.executable, "-c", SAYS_WHAT_FAILED], stdin=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == b"ready\n"
        proxy.stall()
        program.stdin.write(b"\n")
        program.stdin.flush()
        assert program.stdout.readline() == b"told\n"
        proxy.go_on()
        _, said = program.communicate(b"\n", timeout=30)
    assert b"cancellation" not in said


@pytest.mark.parametrize("call", ["stats", "peek", "pause", "delete_queue"])
async def test_the_parts_of_an_operators_call_share_its_time(frail, frail_url, proxy, monkeypatch, call) -> None:
    async with through(proxy, frail, frail_url) as far:
        await far.declare(filao.Queue("claims"))
        monkeypatch.setattr(server, "ANSWERS_WITHIN", 0.5)
        proxy.delay = 0.3  # each part is in time, two are not
        with pytest.raises(filao.EngineUnavailable, match="has not answered"):
            await getattr(far, call)("claims")
        proxy.delay = 0.0


async def test_a_commit_whose_answer_is_lost_is_repeated_and_stored_once(frail, frail_url, proxy) -> None:
    async with through(proxy, frail, frail_url) as far, filao.connect(frail_url) as near:
        await near.declare(filao.Queue("claims"))
        await far.send_to_queue("claims", 0)
        proxy.swallow(b"COMMIT", b"COMMIT\0")
        with pytest.raises(filao.EngineUnavailable, match="send it again with the same message_id"):
            await far.send_to_queue("claims", 1, message_id="claim-1")
        assert proxy.swallowed.is_set()
        assert (await near.stats("claims")).sent == 2  # it was stored
        assert (await far.send_to_queue("claims", 1, message_id="claim-1")).duplicate
        message = await near.receive_from_queue("claims")
        await message.ack()
        proxy.swallow(b"COMMIT", b"COMMIT\0")
        message = await near.receive_from_queue("claims")
        again = filao.Message(session_of(far), delivery_of(message), message.body)
        with pytest.raises(filao.EngineUnavailable):
            await again.ack()
        with pytest.raises(filao.LeaseLost, match="it is gone"):  # so the first was done
            await again.ack()
        stats = await near.stats("claims")
        assert (stats.sent, stats.acked, stats.ready, stats.leased) == (2, 2, 0, 0)


async def test_a_worker_goes_on_after_a_crash_of_the_server(frail, frail_url) -> None:
    worker = filao.Worker(frail_url)
    handled: list[int] = []

    @worker.consumer(filao.Queue("claims"), concurrency=4)
    async def handle(message: filao.Message) -> None:
        handled.append(message.body)

    ready = asyncio.Event()
    running = asyncio.create_task(worker.run(ready=ready.set))
    async with asyncio.timeout(60):
        await ready.wait()
        await asyncio.to_thread(frail.stop, "immediate")
        await asyncio.to_thread(frail.start)
        async with filao.connect(frail_url) as broker:
            await broker.send_to_queue("claims", 7)
        while not handled:
            await asyncio.sleep(0.01)
        worker.stop()
        await running
    assert handled == [7]


# --- behind a pooler -------------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(postgres, url, tmp_path) -> Iterator[str]:
    """Return the URL of the same database through PgBouncer, which gives each transaction any connection."""
    from tests.support.servers import has_pgbouncer, pgbouncer

    if not has_pgbouncer():
        from tests.conftest import missing

        missing("PgBouncer")
    let_pass(tmp_path)
    with ExitStack() as stack:
        port = stack.enter_context(pgbouncer(tmp_path / "pgbouncer", postgres.port))
        yield postgres.url(url.rpartition("/")[2], port)


async def test_through_a_pooler_it_polls(pooled, url) -> None:
    async with filao.connect(pooled) as broker, filao.connect(url) as direct:
        await broker.declare(filao.Queue("claims", lease=1.0), filao.Queue("letters"))
        receiving = asyncio.ensure_future(until_found(broker))
        await direct.send_to_queue("claims", 7)
        assert await receiving == 7
        for body in range(20):
            await broker.send_to_queue("claims", body, group=str(body % 3))
        assert sorted([await until_found(broker) for _ in range(20)]) == list(range(20))
        async with broker.transaction() as tx:
            await tx.send_to_queue("letters", 1)
        assert await until_found(broker, "letters") == 1
        assert "polling" in next(finding.text for finding in await broker.doctor() if finding.subject == "pooler")


async def test_through_a_pooler_an_operator_who_meets_a_lock_stops_no_other(pooled, url, monkeypatch) -> None:
    monkeypatch.setattr(main, "LOCKED_FOR", 3600.0)  # so that the time of the call ends it
    async with filao.connect(pooled) as broker:
        await broker.declare(filao.Queue("claims"), filao.Queue("letters"))
        with psycopg.connect(url) as holder:
            holder.execute("SELECT FROM filao.queue WHERE name = 'claims' FOR UPDATE")
            pausing = asyncio.create_task(broker.pause("claims"))
            for number in range(5):
                await broker.send_to_queue("letters", number)
                assert await until_found(broker, "letters") == number
            assert not pausing.done()
            holder.rollback()
            await pausing
        assert (await broker.stats("claims")).paused
