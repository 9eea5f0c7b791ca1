"""PostgreSQL: text in databases that cannot hold all of it, and what is said of errors: nothing but what is true."""

from itertools import count

import psycopg
import pytest
from psycopg import errors

import filao
from filao.engines.postgresql.charset import Charset
from filao.engines.postgresql.server import VERSION_TIMED, Server
from filao.engines.postgresql.watch import VACUUM_WITHIN
from tests.conftest import engine_of, let_pass, missing
from tests.support.servers import Postgres, has_pgbouncer, pgbouncer

pytestmark = pytest.mark.anyio

_names = count()


def create(postgres: Postgres, encoding: str, settings: str = "") -> str:
    """Create a database with an encoding, and return its URL."""
    name = f"text{next(_names)}"
    with psycopg.connect(postgres.url(), autocommit=True) as operator:
        operator.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'".encode()
        )
        if settings:
            operator.execute(f"ALTER DATABASE {name} SET {settings}".encode())
    return postgres.url(name)


@pytest.mark.parametrize(
    ("encoding", "settings"),
    [("LATIN1", ""), ("UTF8", "client_encoding = 'latin1'"), ("SQL_ASCII", ""), ("WIN1252", ""), ("EUC_JP", "")],
)
async def test_an_error_with_any_text_is_recorded_in_a_database_of_any_encoding(postgres, encoding, settings) -> None:
    async with filao.connect(create(postgres, encoding, settings)) as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1))
        await broker.send_to_queue("claims", {"text": "5 € \u4fdd\u967a \U0001f98a"}, headers={"plain": "text"})
        message = await broker.receive_from_queue("claims")
        assert message.body == {"text": "5 € \u4fdd\u967a \U0001f98a"}
        await message.nack(reason="5 € \u4fdd\u967a \U0001f98a \0 \ud800")
        (dead,) = await broker.dead_letters("claims")
        assert dead.history[-1].error.startswith("5 ")


@pytest.mark.parametrize(
    "terms", [{"group": "5 €"}, {"dedup_key": "5 €"}, {"message_id": "5 €"}, {"headers": {"a": "5 €"}}]
)
async def test_what_a_database_cannot_hold_is_refused_by_name(postgres, terms) -> None:
    async with filao.connect(create(postgres, "LATIN1")) as broker:
        await broker.declare(filao.Queue("claims"))
        (name,) = terms
        with pytest.raises(filao.MessageNotEncodable, match=rf"'claims': {name} is .*LATIN1"):
            await broker.send_to_queue("claims", 1, **terms)
        await broker.send_to_queue("claims", 1, group="d\u00e9gat", dedup_key="\u00e9", headers={"a": "\u00e9"})
        message = await broker.receive_from_queue("claims")
        assert (message.group, message.headers) == ("d\u00e9gat", {"a": "\u00e9"})


def test_a_charset_that_python_does_not_know_holds_ascii() -> None:
    charset = Charset("MULE_INTERNAL")
    assert charset.fits("claims")
    assert not charset.fits("\u00e9")
    assert charset.fitted("5 \u20ac") == "5 \\u20ac"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (errors.SerializationFailure("could not serialize"), filao.EngineError, "other transactions came first"),
        (errors.DeadlockDetected("deadlock detected"), filao.EngineError, "other transactions came first"),
        (errors.OutOfMemory("out of shared memory"), filao.EngineError, "no memory left"),
        (errors.QueryCanceled("canceling statement"), filao.EngineError, "took too long"),
        (errors.DiskFull("could not extend file"), filao.EngineError, "disk is full"),
        (errors.UndefinedFunction("function filao.send(...) does not exist"), filao.EngineError, "another version"),
    ],
)
def test_what_the_server_undid_is_not_called_open(error, kind, text) -> None:
    said = Server("postgresql://localhost/x", durable=True).engine_error(error)
    assert type(said) is kind
    assert text in str(said)
    assert "Nothing was done" in str(said)
    assert "open whether" not in str(said)


async def test_a_statement_that_the_server_refuses_is_not_called_an_outage(postgres) -> None:
    """The driver calls it operational, as it calls a connection that was lost."""
    url = create(postgres, "UTF8")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute(
                "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE 'not now' USING ERRCODE = 'object_not_in_prerequisite_state'; END $$"
            )
            operator.execute(
                "CREATE TRIGGER refuses BEFORE INSERT ON filao.message FOR EACH ROW EXECUTE FUNCTION public.refuse()"
            )
        with pytest.raises(filao.EngineError, match=r": not now\. Nothing was done\.$") as raised:
            await broker.send_to_queue("claims", 1)
        assert not isinstance(raised.value, filao.EngineUnavailable)


async def test_what_ends_a_transaction_before_its_commit_has_done_nothing(postgres) -> None:
    async with filao.connect(create(postgres, "UTF8")) as broker:
        await broker.declare(filao.Queue("claims"))
        with pytest.raises(filao.EngineUnavailable, match=r"Nothing was done\.$"):  # noqa: PT012 - all of it
            async with broker.transaction() as tx:
                await tx.send_to_queue("claims", 1)
                await tx.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def test_a_server_that_answers_in_another_language_is_not_said_to_be_away() -> None:
    refused = psycopg.OperationalError(
        'connection failed: connection to server at "h", port 5 failed: FATAL:  le r\u00f4le \u00ab x \u00bb n\'existe pas'
    )
    said = Server("postgresql://localhost/x", durable=True).engine_error(refused, begun=False)
    assert "refused us" in str(said)
    assert "away" not in str(said)
    assert "Nothing was done" in str(said)


@pytest.mark.parametrize(
    "words",
    [
        "SSL error: certificate verify failed",
        "SSL error: tlsv13 alert certificate required",
        'server certificate for "other" does not match host name "h"',
        'root certificate file "/root.crt" does not exist',
        'could not load private key file "/c.key": key values mismatch',
        "server does not support SSL, but SSL was required",
        "FATAL:  connection requires a valid client certificate",
    ],
)
def test_a_certificate_that_is_wrong_is_told_of_as_such_and_may_be_mended(words) -> None:
    """A worker that has run waits for that, while a file is renewed."""
    error = psycopg.OperationalError(f'connection failed: connection to server at "h", port 5 failed: {words}')
    said = Server("postgresql://localhost/x", durable=True).engine_error(error, begun=False)
    assert isinstance(said, filao.EngineUnavailable)
    assert (
        f'no TLS connection could be made: connection failed: connection to server at "h", port 5 failed: {words}'
        in str(said)
    )
    assert "Nothing was done. The server's certificate must" in str(said)


async def test_a_server_that_was_never_reached_has_done_nothing() -> None:
    with pytest.raises(filao.EngineUnavailable, match="Nothing was done") as raised:
        await filao.connect("postgresql://u@127.0.0.1:1/x").open()
    assert "open whether" not in str(raised.value)


async def test_a_pooler_of_statements_is_refused_in_words(postgres, tmp_path_factory) -> None:
    if not has_pgbouncer():
        missing("PgBouncer")
    folder = tmp_path_factory.mktemp("pgbouncer")
    let_pass(folder)
    with (
        pgbouncer(folder / "pooler", postgres.port, pool_mode="statement") as port,
        pytest.raises(filao.ConfigurationError, match="pool_mode to transaction or session"),
    ):
        await filao.connect(postgres.url("filao", port)).open()


async def test_extra_errors_of_plpgsql_prevent_no_first_opening(postgres) -> None:
    url = create(postgres, "UTF8", "plpgsql.extra_errors = 'all'")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_to_queue("claims", 1, dedup_key="k", group="g")
        await (await broker.receive_from_queue("claims")).ack()


async def test_what_one_message_lacks_beside_others_is_not_taken_for_the_text_null(postgres) -> None:
    """A setting from before PostgreSQL 8.2, by which an array holds no NULL."""
    async with filao.connect(create(postgres, "UTF8", "array_nulls = off")) as broker:
        await broker.declare(filao.Queue("claims"))
        sent = [filao.Outgoing(1, dedup_key="k", group="g", delay=0), 2, filao.Outgoing(3, message_id="m"), 4]
        assert not any(receipt.duplicate for receipt in await broker.send_many("claims", sent))
        received = await broker.receive_many("claims", 4)
        assert [(message.body, message.group) for message in received] == [(1, "g"), (2, None), (3, None), (4, None)]


async def test_sessions_of_ours_are_not_ended_whatever_the_database_says(postgres) -> None:
    limits = [
        "idle_session_timeout",
        "idle_in_transaction_session_timeout",
        "transaction_timeout",
    ]  # the last: from 17 on
    url = create(postgres, "UTF8")
    with psycopg.connect(url, autocommit=True) as operator:
        known = operator.execute("SELECT name FROM pg_settings WHERE name = ANY (%s)", (limits,)).fetchall()
        for (name,) in known:
            operator.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET {name} = '10min'".encode())
    async with filao.connect(url) as broker, engine_of(broker)._main.use() as connection:
        found = await connection.execute("SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", (limits,))
        assert dict(await found.fetchall()) == {name: "0" for (name,) in known}


async def test_a_time_limit_for_transactions_ends_no_vacuum(postgres) -> None:
    url = create(postgres, "UTF8")
    with psycopg.connect(url, autocommit=True) as operator:
        if operator.info.server_version < VERSION_TIMED:
            pytest.skip("before PostgreSQL 17 whole transactions have no limit")
        operator.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET transaction_timeout = '1min'".encode())
    async with filao.connect(url) as broker:
        async with engine_of(broker)._transactions.connection(VACUUM_WITHIN) as connection:
            found = await connection.execute("SHOW transaction_timeout")
            assert await found.fetchall() == [("0",)]
        async with broker.transaction() as tx:  # the user's own
            assert await tx.execute("SHOW transaction_timeout", ()) == [("1min",)]


async def test_a_database_that_is_read_only_by_default_is_not_taken_for_a_standby(postgres) -> None:
    url = create(postgres, "UTF8")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
    empty = create(postgres, "UTF8", "default_transaction_read_only = on")
    with psycopg.connect(postgres.url(), autocommit=True) as operator:
        operator.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on".encode())
    with pytest.raises(filao.ConfigurationError, match=r"read-only.*default_transaction_read_only"):
        await filao.connect(empty).open()
    async with filao.connect(url) as broker:
        with pytest.raises(
            filao.EngineUnavailable, match=r"read-only.*Nothing was done.*default_transaction_read_only"
        ):
            await broker.send_to_queue("claims", 1)


async def test_a_process_that_cannot_open_its_session_leaves_no_row_behind(postgres) -> None:
    url = create(postgres, "UTF8")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        with psycopg.connect(url, autocommit=True) as operator:
            operator.execute("DROP ROLE IF EXISTS visitor")
            operator.execute("CREATE ROLE visitor LOGIN")
            operator.execute("GRANT ALL ON SCHEMA filao TO visitor")
            operator.execute("GRANT ALL ON ALL TABLES IN SCHEMA filao TO visitor")
            operator.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA filao TO visitor")
            operator.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA filao TO visitor")
            operator.execute("ALTER ROLE visitor CONNECTION LIMIT 1")
            async with filao.connect(url.replace("filao@", "visitor@")) as visitor:
                for _ in range(3):
                    with pytest.raises(filao.EngineError, match=r"too many connections.*Nothing was done"):
                        await visitor.receive_from_queue("claims", wait=0)
            assert operator.execute("SELECT count(*) FROM filao.process").fetchone() == (0,)
