"""The schema: created or migrated by whichever process comes first, while the others wait."""

import secrets
from importlib import resources

from psycopg.errors import InvalidSchemaName, UndefinedTable

from filao.engines.postgresql.server import Connection, Server
from filao.errors import ConfigurationError

VERSION = 1
"""Of the tables and the functions. A change of either is a new version, with a step for what is stored."""
STEPS: dict[int, str] = {}
"""What brings the tables from version n - 1 to n; the functions are all replaced."""
_LOOK = """
    SELECT (SELECT value FROM filao.meta WHERE name = 'version'), (SELECT value FROM filao.meta WHERE name = 'database')
"""
FUNCTIONS = ("moves", "send", "receive", "settle", "operators", "processes")
"""The files of the functions, in the order in which they are made: one calls only what stands before it."""
LOCK = 0x46696C616F  # "Filao", as the key of an advisory lock


async def migrate(connection: Connection, server: Server) -> str:
    """Bring the schema to this version's shape, in one transaction, and return the name of the database in ids."""
    version, name = await _look(connection)
    if version < VERSION:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK,))
            version, name = await _look(connection)
            if version < VERSION:
                await _build(connection, version)
        version, name = await _look(connection)
    if version > VERSION:
        raise ConfigurationError(
            f"{server.name} was set up by a newer Filao (its schema has version {version}, this one knows up to "
            f"{VERSION}). Upgrade Filao here; nothing was touched."
        )
    return name


async def _look(connection: Connection) -> tuple[int, str]:
    try:
        async with connection.transaction():
            found = await connection.execute(_LOOK)
            row = await found.fetchone()
    except (InvalidSchemaName, UndefinedTable):
        return 0, ""
    assert row is not None
    return int(row[0] or 0), row[1] or ""


async def _build(connection: Connection, version: int) -> None:
    folder = resources.files("filao.engines.postgresql")
    if version == 0:
        found = await connection.execute("SELECT FROM pg_namespace WHERE nspname = 'filao'")
        if found.rowcount == 0:  # IF NOT EXISTS would ask for the right to create one though there is one
            await connection.execute("CREATE SCHEMA filao")
        await connection.execute(folder.joinpath("schema.sql").read_bytes())
        await connection.execute(
            "INSERT INTO filao.meta VALUES ('database', %s), ('version', %s)", (secrets.token_hex(8), str(VERSION))
        )
    for step in range(max(version, 1), VERSION):
        await connection.execute(STEPS[step + 1].encode())
    for name in FUNCTIONS:
        await connection.execute(folder.joinpath("functions", f"{name}.sql").read_bytes())
    await connection.execute("UPDATE filao.meta SET value = %s WHERE name = 'version'", (str(VERSION),))
