"""The tables of an outbox and an inbox in the user's database: created, and brought up to date."""

from filao.connections import Connection
from filao.errors import ConfigurationError

NUMBERS = {  # the type of a row's number, which grows, in each dialect
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "mysql": "BIGINT AUTO_INCREMENT PRIMARY KEY",
}
COLUMNS = "id, queue, kind, content, headers, delay, priority, grp, dedup_key, ttl, recorded_at"
_INBOX = """(
    queue   VARCHAR(128) NOT NULL,
    id      VARCHAR(256) NOT NULL,
    done_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (queue, id)
)"""
_KEY = {  # the columns of a table's primary key
    "sqlite": "SELECT name FROM pragma_table_info(?) WHERE pk > 0",
    "postgresql": """
        SELECT attname
        FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
        WHERE indrelid = to_regclass(CAST(? AS text)) AND indisprimary
    """,
    "mysql": """
        SELECT column_name FROM information_schema.key_column_usage
        WHERE table_schema = DATABASE() AND table_name = ? AND constraint_name = 'PRIMARY'
    """,
}
_FAILED = {  # whether a table of sends has the column that came later
    "sqlite": "SELECT 1 FROM pragma_table_info(?) WHERE name = 'failed'",
    "postgresql": """
        SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass(CAST(? AS text)) AND attname = 'failed' AND attnum > 0
    """,
    "mysql": """
        SELECT 1 FROM information_schema.columns
        WHERE table_schema = DATABASE() AND table_name = ? AND column_name = 'failed'
    """,
}


def create_outbox(on: Connection, table: str) -> None:
    """Create the table of sends, or bring an older one up to date."""
    if on.dialect not in NUMBERS:
        raise ConfigurationError(
            f"the tables of an outbox are known for {', '.join(NUMBERS)}, not for {on.dialect}: create it yourself, "
            f"with the columns number (growing), {COLUMNS}, failed (a text, NULL as a rule)"
        )
    on.execute(
        f"""
        CREATE TABLE IF NOT EXISTS {table} (
            number      {NUMBERS[on.dialect]},
            id          VARCHAR(256) NOT NULL,
            queue       VARCHAR(128) NOT NULL,
            kind        INTEGER NOT NULL,
            content     TEXT NOT NULL,
            headers     TEXT,
            delay       DOUBLE PRECISION NOT NULL,
            priority    INTEGER NOT NULL,
            grp         VARCHAR(256),
            dedup_key   VARCHAR(256),
            ttl         DOUBLE PRECISION,
            recorded_at DOUBLE PRECISION NOT NULL,
            failed      TEXT
        )
        """
    )
    update_outbox(on, table)


def update_outbox(on: Connection, table: str) -> None:
    """Add the column `failed` to an older table; relays call this, because updating Filao does not call `create`."""
    if on.dialect in _FAILED and not on.execute(_FAILED[on.dialect], (table,)).fetchall():
        on.execute(f"ALTER TABLE {table} ADD COLUMN failed TEXT")


def create_inbox(on: Connection, table: str) -> None:
    """Create the table of messages that are done, or give an older one its key: (queue, id) instead of id alone."""
    on.execute(f"CREATE TABLE IF NOT EXISTS {table} {_INBOX}")
    if on.dialect not in _KEY or len(on.execute(_KEY[on.dialect], (table,)).fetchall()) == 2:
        return
    if on.dialect == "postgresql":
        (name,) = on.execute(
            "SELECT conname FROM pg_constraint WHERE conrelid = to_regclass(CAST(? AS text)) AND contype = 'p'",
            (table,),
        ).fetchall()[0]
        quoted = name.replace('"', '""')
        on.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{quoted}", ADD PRIMARY KEY (queue, id)')
    elif on.dialect == "mysql":
        on.execute(f"ALTER TABLE {table} DROP PRIMARY KEY, ADD PRIMARY KEY (queue, id)")
    else:
        _rebuild_inbox(on, table)


def _rebuild_inbox(on: Connection, table: str) -> None:
    """Copy the table, because SQLite cannot change a key. The savepoint makes it atomic, in a transaction or not."""
    on.execute("SAVEPOINT filao_inbox")
    try:
        on.execute(f"CREATE TABLE {table}_new {_INBOX}")
        on.execute(f"INSERT INTO {table}_new (queue, id, done_at) SELECT queue, id, done_at FROM {table}")
        on.execute(f"DROP TABLE {table}")
        on.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    except BaseException:
        on.execute("ROLLBACK TO filao_inbox")
        raise
    finally:
        on.execute("RELEASE filao_inbox")
