"""The schema: created or migrated by the first process that needs it, while the others wait."""

import secrets
from collections.abc import Sequence
from importlib import resources

from psycopg.errors import InvalidSchemaName, UndefinedTable

from filao.engines.postgresql.server import ANSWERS_WITHIN, Connection, Server
from filao.errors import ConfigurationError

VERSION = 11
"""The version of the tables and the functions. A change of either is a new version, with a step for the tables."""
STEPS: dict[int, str] = {
    2: """
        ALTER TABLE filao.message ADD COLUMN salt bigint;
        ALTER TABLE filao.queue ALTER id DROP IDENTITY,
          ALTER id SET DEFAULT floor(random() * 2147483646.0::float8)::integer + 1;
        ALTER TABLE filao.process ALTER id DROP IDENTITY,
          ALTER id SET DEFAULT floor(random() * 2147483646.0::float8)::integer + 1;
        TRUNCATE filao.waiting;
        ALTER TABLE filao.waiting ALTER since DROP IDENTITY;
        ALTER TABLE filao.waiting ALTER since TYPE timestamptz USING clock_timestamp(),
          ALTER since SET DEFAULT clock_timestamp();
    """,
    3: """
        CREATE TYPE filao.seen AS (
          snapshot pg_snapshot, own xid8, priorities integer[], floors bigint[], below integer, delayed bigint,
          leased bigint, expiring bigint, looked_at bigint
        );
        ALTER TABLE filao.message ADD COLUMN moved_in xid8 DEFAULT pg_current_xact_id();
        DROP INDEX filao.message_ready;
        CREATE INDEX message_ready ON filao.message (queue, (-priority), id) WHERE state = 'ready';
        CREATE INDEX message_moved ON filao.message (queue, moved_in) WHERE moved_in IS NOT NULL;
        ALTER TABLE filao.counter ADD COLUMN slot bigint NOT NULL DEFAULT 0, DROP CONSTRAINT counter_pkey;
        ALTER TABLE filao.counter ADD PRIMARY KEY (queue, backend, slot, name), ALTER COLUMN slot DROP DEFAULT;
        DROP TABLE filao.waiting;
        CREATE UNLOGGED TABLE filao.waiting (
          queue integer NOT NULL, since bigint NOT NULL, process integer NOT NULL, wants integer NOT NULL
        );
        CREATE INDEX waiting_since ON filao.waiting (queue, since);
        CREATE SEQUENCE filao.place CACHE 1;
    """,
    4: "SELECT",  # only the functions changed
    5: "SELECT",  # only the functions changed
    6: """
        ALTER TYPE filao.seen ADD ATTRIBUTE blocked bigint;
        CREATE INDEX message_blocked ON filao.message (queue, id) WHERE state = 'blocked';
        INSERT INTO filao.counter (queue, backend, slot, name, value)
        SELECT m.queue, 0, 0, counter.name || ':' || coalesce(m.reason, ''), count(*)
        FROM filao.message m, unnest(ARRAY['dead', 'died']) AS counter (name)
        WHERE m.state = 'dead' GROUP BY 1, 4;
    """,
    7: "SELECT",  # only the functions changed
    8: "SELECT",  # only the functions changed
    9: "SELECT",  # only the functions changed
    10: """
        CREATE TABLE filao.audit (
          id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
          at       bigint NOT NULL,
          who      text   NOT NULL,
          what     text   NOT NULL,
          queue    text   NOT NULL,
          about    text   NOT NULL,
          wanted   bigint NOT NULL,
          done     bigint NOT NULL DEFAULT 0,
          ended_at bigint,
          outcome  text   NOT NULL DEFAULT ''
        );
        ALTER TABLE filao.queue ADD COLUMN kept_for bigint GENERATED ALWAYS AS (
          CASE WHEN (rules ->> 'history')::boolean THEN ((rules ->> 'history_window')::float8 * 1000)::bigint END
        ) STORED;
        CREATE TABLE filao.event (
          id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
          queue   text    NOT NULL,
          message text    NOT NULL,
          at      bigint  NOT NULL,
          until   bigint  NOT NULL,
          what    text    NOT NULL,
          attempt integer NOT NULL,
          who     text    NOT NULL,
          detail  text    NOT NULL
        );
        CREATE INDEX event_message ON filao.event (message, id);
        CREATE INDEX event_until   ON filao.event (until);
        ALTER TABLE filao.unarranged REPLICA IDENTITY FULL,
          ADD COLUMN noted_in xid8 NOT NULL DEFAULT pg_current_xact_id(), ADD COLUMN lowest bigint;
        DROP INDEX filao.unarranged_queue;
        CREATE INDEX unarranged_noted ON filao.unarranged (queue, noted_in);
        ALTER TYPE filao.seen ADD ATTRIBUTE noted xid8;
        CREATE TABLE filao.floor (
          queue  integer NOT NULL,
          grp    text    NOT NULL,
          lowest bigint  NOT NULL,
          file   oid     NOT NULL,
          at     bigint  NOT NULL,
          PRIMARY KEY (queue, grp, lowest)
        );
        DO $$
        DECLARE
          role regrole;
        BEGIN
          FOR role IN  -- a role that may read failures may read events and the log
            SELECT DISTINCT a.grantee FROM pg_class c, aclexplode(c.relacl) AS a
            WHERE c.oid = 'filao.failure'::regclass AND a.privilege_type = 'SELECT' AND a.grantee NOT IN (0, c.relowner)
          LOOP
            EXECUTE format('GRANT SELECT ON filao.audit, filao.event TO %s', role);
          END LOOP;
        END
        $$;
    """,
    11: "SELECT",  # only the functions changed
}
"""Step n brings the tables from version n - 1 to n; all functions are then created anew."""
_LOOK = """
    SELECT (SELECT value FROM filao.meta WHERE name = 'version'), (SELECT value FROM filao.meta WHERE name = 'database')
"""
FUNCTIONS = ("seen", "pick", "moves", "send", "receive", "settle", "operators", "processes", "stats", "doors")
"""The files of the functions, in the order in which they are run; the last grants the right to call them."""
LOCK = 0x46696C616F  # "Filao", as the key of an advisory lock
_NEW_FOR_OPERATORS = ("begin_deed", "halt_group", "record_deed", "of_group", "why_held")
"""Functions that came later, for those that may delete messages."""


async def migrate(connection: Connection, server: Server) -> str:
    """Bring the schema up to this version, in one transaction, and return the random name of the database."""
    version, name = await _look(connection, server)
    if version < VERSION:
        async with connection.transaction():
            await connection.execute(
                "SELECT pg_catalog.set_config('lock_timeout', %s, true)", (f"{ANSWERS_WITHIN:g}s",)
            )
            await connection.execute("SELECT pg_catalog.pg_advisory_xact_lock(%s)", (LOCK,))
            version, name = await _look(connection, server)
            if version < VERSION:
                await _build(connection, version)
        version, name = await _look(connection, server)
    if version > VERSION:
        raise ConfigurationError(
            f"{server.name} was set up by a newer Filao (its schema has version {version}, this one knows up to "
            f"{VERSION}). Upgrade Filao here; nothing was touched."
        )
    return name


async def _look(connection: Connection, server: Server) -> tuple[int, str]:
    try:
        async with connection.transaction():
            found = await connection.execute(_LOOK)
            row = await found.fetchone()
    except (InvalidSchemaName, UndefinedTable):
        return 0, ""
    assert row is not None
    if row[0] is None:
        raise ConfigurationError(
            f"{server.name} has Filao's tables without what is in them, as behind pg_dump --schema-only. Nothing was "
            "touched. Restore the data too; or DROP SCHEMA filao CASCADE, and the next process makes it anew, empty."
        )
    return int(row[0]), row[1] or ""


async def _build(connection: Connection, version: int) -> None:
    folder = resources.files("filao.engines.postgresql")
    await connection.execute(_AS_WRITTEN)
    if version == 0:
        found = await connection.execute("SELECT FROM pg_namespace WHERE nspname = 'filao'")
        if found.rowcount == 0:  # IF NOT EXISTS would demand the right to create one even if there is one
            await connection.execute("CREATE SCHEMA filao")
        await connection.execute(folder.joinpath("schema.sql").read_bytes())
        await connection.execute(
            "INSERT INTO filao.meta VALUES ('database', %s), ('version', %s)", (secrets.token_hex(8), str(VERSION))
        )
    for step in range(version or VERSION, VERSION):
        await connection.execute(STEPS[step + 1].encode())
    granted = await (await connection.execute(_GRANTED)).fetchall()
    await connection.execute(_DROP)
    for name in FUNCTIONS:
        await connection.execute(folder.joinpath("functions", f"{name}.sql").read_bytes())
    await _grant_again(connection, granted)
    await connection.execute("UPDATE filao.meta SET value = %s WHERE name = 'version'", (str(VERSION),))


async def _grant_again(connection: Connection, granted: Sequence[tuple[str, str]]) -> None:
    """Let roles call what they could call before, as far as it is still there, and operators what came later."""
    found = await connection.execute("SELECT proname FROM pg_proc WHERE pronamespace = 'filao'::regnamespace")
    names = {name for (name,) in await found.fetchall()}
    operators = {role for name, role in granted if name == "remove"}
    for name, role in [*granted, *((name, role) for role in operators for name in _NEW_FOR_OPERATORS)]:
        if name in names:
            await connection.execute(f"GRANT EXECUTE ON FUNCTION filao.{name} TO {role}".encode())


_AS_WRITTEN = """
    SELECT set_config('search_path', 'pg_catalog, pg_temp', true), set_config('plpgsql.extra_errors', 'none', true),
           set_config('plpgsql.extra_warnings', 'none', true), set_config('check_function_bodies', 'on', true)
"""
"""Lets the functions mean what they say, and no warning of style be an error, whatever the database's settings."""
_GRANTED = """
    SELECT p.proname::text, a.grantee::regrole::text
    FROM pg_proc p, aclexplode(p.proacl) AS a
    WHERE p.pronamespace = 'filao'::regnamespace AND a.grantee <> p.proowner AND a.grantee <> 0
"""
_DROP = """
    DO $$
    DECLARE
      f regprocedure;
    BEGIN
      FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'filao'::regnamespace LOOP
        EXECUTE format('DROP FUNCTION %s', f);
      END LOOP;
    END
    $$
"""
