"""Whom PostgreSQL trusts: roles with the grants that SECURITY.md lists, and roles that lay operators in the way."""

import re
from itertools import count
from pathlib import Path

import psycopg
import pytest

import filao
from filao.engines.postgresql import engine, schema
from filao.overview import Deed
from tests.conftest import engine_of
from tests.support.servers import Postgres
from tests.support.visitor import visiting

pytestmark = pytest.mark.anyio

_names = count()
SOURCE = Path(engine.__file__).parent
SECURITY = Path(__file__).parents[1] / "SECURITY.md"


@pytest.fixture
async def url(postgres: Postgres) -> str:
    """Return the URL of a database with one queue, `claims`, that holds one message."""
    url = postgres.create(f"roles{next(_names)}")
    async with filao.connect(url) as owner:
        await owner.declare(filao.Queue("claims", max_attempts=1))
        await owner.send_to_queue("claims", 0)
    return url


def grants(role: str) -> str:
    """Return the statements that SECURITY.md lists for a role."""
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", SECURITY.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"CREATE ROLE {role} " in block]
    return found


def as_role(url: str, role: str) -> str:
    """Make a role with its grants in this database, and return its URL."""
    name = f"{role}_{url.rpartition('/')[2]}"
    with psycopg.connect(url, autocommit=True) as operator:
        operator.execute(re.sub(rf"\b{role}\b", name, grants(role)).encode())
    return url.replace("filao@", f"{name}@")


async def test_a_sender_may_send_and_nothing_else(url) -> None:
    async with filao.connect(as_role(url, "sender")) as sender:
        await sender.send_to_queue("claims", 1, group="g", dedup_key="k", message_id="m")
        with psycopg.connect(as_url(url, "sender")) as connection:
            await sender.send_to_queue("claims", 2, within=connection)
        with pytest.raises(filao.ConfigurationError, match="permission denied"):
            await sender.receive_from_queue("claims", wait=0)
        for call in (sender.purge("claims"), sender.declare(filao.Queue("claims", lease=7)), sender.pause("claims")):
            with pytest.raises(filao.ConfigurationError, match="permission denied"):
                await call
    with psycopg.connect(as_url(url, "sender"), autocommit=True) as connection:
        for sql in (
            "SELECT content FROM filao.message",
            "DELETE FROM filao.message",
            "UPDATE filao.queue SET paused = true",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.encode())


def as_url(url: str, role: str) -> str:
    """Return the URL of a role that was made."""
    return url.replace("filao@", f"{role}_{url.rpartition('/')[2]}@")


async def test_a_receiver_may_receive_and_settle_and_nothing_else(url) -> None:
    async with filao.connect(as_role(url, "receiver")) as receiver:
        message = await receiver.receive_from_queue("claims", wait=0)
        assert message is not None
        await message.extend(60)
        await message.release()
        again = await receiver.receive_from_queue("claims")
        with pytest.raises(filao.LeaseLost):
            await message.ack()
        await again.ack()
        assert await receiver.receive_from_queue("claims", wait=0.1) is None
        with pytest.raises(filao.ConfigurationError, match="permission denied"):
            await receiver.send_to_queue("claims", 1)
        with pytest.raises(filao.ConfigurationError, match="permission denied"):
            await receiver.purge("claims")
    with psycopg.connect(as_url(url, "receiver"), autocommit=True) as connection:
        for sql in ("SELECT content FROM filao.message", "DELETE FROM filao.message"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.encode())


async def test_a_viewer_may_see_everything_and_do_nothing(url) -> None:
    async with filao.connect(url) as owner:
        await owner.declare(filao.Queue("letters", history=True, group_dead="halt"))
        receipt = await owner.send_to_queue("letters", 1, group="g", ttl=3_600)
        await owner.send_to_queue("letters", 2, group="g")
        await (await owner.receive_from_queue("claims")).reject("no")
        async with filao.connect(as_role(url, "viewer")) as viewer, visiting(viewer) as somebody:
            assert [one.dead for one in await viewer.stats()] == [1, 0]
            assert len(await viewer.dead_letters("claims")) == 1
            assert [event.what for event in await viewer.trace(receipt.id)] == ["sent"]
            assert not [finding for finding in await viewer.doctor() if finding.level == "error"]
            for path in ("queues", "dead", "processes", "log", f"message?queue=letters&id={receipt.id}"):
                await somebody.sees(f"/en/{path}")
            for state in filao.State:
                await somebody.sees(f"/en/queue?name=letters&state={state}")
                await somebody.sees(f"/en/queue?name=letters&state={state}&group=g")
            log = engine_of(viewer).overview.log
            for call in (
                viewer.send_to_queue("claims", 1),
                viewer.receive_from_queue("claims", wait=0),
                viewer.redrive("claims"),
                viewer.purge("claims", state="dead"),
                viewer.pause("claims"),
                viewer.declare(filao.Queue("claims", lease=7)),
                log.begin(Deed("ada", "purge", "claims")),
            ):
                with pytest.raises(filao.ConfigurationError, match="permission denied"):
                    await call


async def test_an_operator_may_see_and_move_everything(url) -> None:
    async with filao.connect(url) as owner:
        await (await owner.receive_from_queue("claims")).reject("no")
        async with filao.connect(as_role(url, "operator")) as operator:
            assert (await operator.stats("claims")).dead == 1
            (letter,) = await operator.dead_letters("claims")
            assert await operator.redrive("claims", ids=[letter.id]) == 1
            assert [message.id for message in await operator.peek("claims")] == [letter.id]
            await operator.pause("claims")
            await operator.resume("claims")
            await operator.cancel("claims", letter.id)
            assert await operator.purge("claims") == 0
            await operator.declare(filao.Queue("letters"))
            await operator.delete_queue("letters")
            assert not [finding for finding in await operator.doctor() if finding.level == "error"]
            kept = engine_of(operator).overview.log
            await kept.record(await kept.begin(Deed("ada", "purge", "claims")), 0, "done")
            assert [deed.outcome for deed in await kept.deeds(10)] == ["done"]


async def test_a_sender_can_neither_move_the_clock_nor_take_an_id_of_ours(url) -> None:
    as_role(url, "sender")
    send = """
        SELECT * FROM filao.send((SELECT id FROM filao.queue), %s, false, 1, ARRAY[0], ARRAY[0::smallint], ARRAY[''::bytea],
                                 NULL, NULL, NULL, NULL, NULL, NULL, ARRAY[%s])
    """
    never = 9_000_000_000_000
    with psycopg.connect(as_url(url, "sender"), autocommit=True) as connection:
        for sql, parameters in (
            (send, (never, "m")),
            (send, (None, "0123456789abcdef-1")),
            ("SELECT filao.tidy(%s, %s)", (never, 0)),
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(sql.encode(), parameters)
        connection.execute(send.encode(), (None, "m"))


@pytest.mark.parametrize(
    ("terms", "is_trusted"),
    [
        ("", True),
        ("WITH INHERIT TRUE, SET FALSE", True),
        ("WITH INHERIT FALSE, SET TRUE", True),
        ("WITH INHERIT FALSE, SET FALSE", False),
    ],
)
async def test_a_member_of_the_owner_is_trusted_as_it_is_only_where_it_has_rights_of_its(
    url, terms, is_trusted
) -> None:
    with psycopg.connect(url, autocommit=True) as superuser:
        if terms and superuser.info.server_version < 160_000:
            pytest.skip("before PostgreSQL 16 a member has all rights of the role")
        owner, member = f"owner{next(_names)}", f"member{next(_names)}"
        superuser.execute(f"CREATE ROLE {owner}; CREATE ROLE {member} LOGIN".encode())
        superuser.execute(f"GRANT {owner} TO {member} {terms}".encode())
        superuser.execute(f"ALTER TABLE filao.message OWNER TO {owner}".encode())
        superuser.execute(f"GRANT USAGE ON SCHEMA filao TO {member}; GRANT SELECT ON filao.meta TO {member}".encode())
        superuser.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA filao TO {member}".encode())
    with psycopg.connect(url.replace("filao@", f"{member}@"), autocommit=True) as connection:
        assert connection.execute("SELECT filao.is_owner()").fetchone() == (is_trusted,)


async def test_the_doctor_tells_that_everybody_may_call_the_functions(url) -> None:
    """As behind `pg_restore --no-acl`: what is restored without rights has those that PostgreSQL gives to all."""
    with psycopg.connect(url, autocommit=True) as superuser:
        superuser.execute("SET allow_system_table_mods = on")
        superuser.execute("UPDATE pg_proc SET proacl = NULL WHERE pronamespace = 'filao'::regnamespace")
        async with filao.connect(as_role(url, "viewer")) as viewer:
            (told,) = [finding for finding in await viewer.doctor() if finding.subject == "rights"]
            assert told.level == "warning"
            superuser.execute(told.text.rpartition(": ")[2].encode())
            with pytest.raises(filao.ConfigurationError, match="permission denied"):
                await viewer.purge("claims")
            assert "rights" not in [finding.subject for finding in await viewer.doctor()]


async def test_after_an_upgrade_roles_may_call_what_they_could_call_before_and_no_more(url, monkeypatch) -> None:
    sender = as_role(url, "sender")
    newer = schema.VERSION + 1
    monkeypatch.setattr(schema, "VERSION", newer)
    monkeypatch.setitem(schema.STEPS, newer, "SELECT")
    async with filao.connect(url):
        pass
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT value FROM filao.meta WHERE name = 'version'").fetchone() == (str(newer),)
    async with filao.connect(sender) as broker:
        await broker.send_to_queue("claims", 1)
        with pytest.raises(filao.ConfigurationError, match="permission denied"):
            await broker.receive_from_queue("claims", wait=0)


async def test_every_function_that_is_called_from_outside_has_a_search_path_of_its_own(url) -> None:
    python = "".join(path.read_text(encoding="utf-8") for path in SOURCE.glob("*.py"))
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT proname, proconfig, prosecdef, has_function_privilege('public', oid, 'EXECUTE') "
            "FROM pg_proc WHERE pronamespace = 'filao'::regnamespace"
        ).fetchall()
    called = set(re.findall(r"\bfilao\.([a-z_]+)\(", python)) & {name for name, *_ in found}
    assert {"send", "receive", "settle", "extend", "name_of", "clock"} <= called
    for name, settings, is_definer, is_public in found:
        assert not is_public, name
        if name in called:
            assert "search_path=pg_catalog, pg_temp" in (settings or []), f"{name}: give it a place in doors.sql"
            assert is_definer, name


ATTACK = """
    CREATE FUNCTION public.attacked() RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
      RAISE EXCEPTION 'attacked';
    END
    $$;
    DO $$
    DECLARE
      types text[] := '{smallint, integer, bigint, numeric, real, double precision, text, boolean, bytea, jsonb, regclass,
                        oid, name, timestamptz, interval, filao.state, varchar}';
      returned text;
      l text; r text; o text; n integer := 0;
    BEGIN
      FOREACH l IN ARRAY types LOOP
        FOREACH r IN ARRAY types LOOP
          FOREACH o IN ARRAY '{*, +, -, /, ||, =, <>, <, >, <=, >=, <<, >>, ->, ->>}'::text[] LOOP
            CONTINUE WHEN EXISTS (SELECT FROM pg_operator WHERE oprname = o AND oprleft = l::regtype AND oprright = r::regtype
                                    AND oprnamespace = 'pg_catalog'::regnamespace);
            n := n + 1;
            returned := CASE WHEN o IN ('=', '<>', '<', '>', '<=', '>=') THEN 'boolean' WHEN o = '||' THEN 'text' ELSE l END;
            EXECUTE format(
              'CREATE FUNCTION public.f%s(%s, %s) RETURNS %s LANGUAGE sql AS $f$ SELECT public.attacked(); SELECT NULL::%s $f$',
              n, l, r, returned, returned);
            EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.f%s, LEFTARG = %s, RIGHTARG = %s)', o, n, l, r);
          END LOOP;
        END LOOP;
      END LOOP;
    END
    $$;
"""


async def test_operators_that_somebody_else_made_are_never_used(url, postgres) -> None:
    """A role that may create in `public` could run what it likes with the rights of a superuser's next send."""
    with psycopg.connect(url, autocommit=True) as stranger:
        stranger.execute(ATTACK)
        with pytest.raises(psycopg.errors.RaiseException, match="attacked"):
            stranger.execute("SELECT extract(epoch FROM now()) * 1000")
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("more", max_length=2, overflow="drop_oldest", ttl=60, max_attempts=2))
        for number in range(3):
            await broker.send_to_queue("more", number, group="g", dedup_key=f"k{number}", delay=0.0)
        with psycopg.connect(url) as connection:
            await broker.send_to_queue("claims", 2, within=connection, message_id="m")
        message = await broker.receive_from_queue("more")
        await message.extend(60)
        await message.nack(delay=0.001, reason="no")
        await (await broker.receive_from_queue("more")).reject("no")
        async with (await broker.receive_from_queue("claims")).transaction() as tx:
            await tx.send_to_queue("claims", 3, group="h")
        assert (await broker.stats("more")).dead == 2
        for state in ("ready", "delayed", "leased", "blocked", "dead"):
            found = await broker.peek("more", state=state)
            if found:
                await broker.peek("more", state=state, after=found[0].id)
        await broker.redrive("more")
        await broker.doctor()
        await engine_of(broker)._watch._look_after_all()
        await engine_of(broker)._main.row("SELECT filao.tidy(NULL)")
        await engine_of(broker)._watch.vacuum()
        await broker.pause("more")
        await broker.resume("more")
        await broker.purge("more")
        await broker.delete_queue("more", messages=True)
