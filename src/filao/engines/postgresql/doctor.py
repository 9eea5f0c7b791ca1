"""What an operator should know of the database: its version, its settings, who holds it up, and how large it is."""

from collections.abc import AsyncGenerator, Sequence

from filao.engine import Finding, QueueStats
from filao.engines.postgresql.clock import JUMP
from filao.engines.postgresql.server import Connection, Server
from filao.overview import DEED, deed_of, deeds_finding, miscounted, queue_finding
from filao.printable import some
from filao.process import process_finding

TRANSACTION_LONG = 10  # seconds; vacuum removes nothing that died after the oldest transaction began
STANDBY_LATE = 50_000  # transactions; a standby tells every ten seconds which rows it reads
HOLDERS_MAX = 5  # long transactions, and standbys, that are named
QUERY_MAX = 200  # characters of their last statements
TABLE_LARGE = 1024**3  # bytes
COUNTED_MAX = 1024**3  # bytes of the messages that are counted one by one: some seconds
HISTORY_TOLD = 1024**2  # bytes: even an empty table has some


async def examine(connection: Connection, server: Server, queues: Sequence[QueueStats]) -> list[Finding]:
    """Return all findings, good and bad."""
    parts = (
        _settings(connection, server),
        _load(connection),
        _messages(connection),
        _strange(connection),
        _queues(connection, queues),
    )
    return [finding for part in parts async for finding in part]


async def _settings(connection: Connection, server: Server) -> AsyncGenerator[Finding]:
    version = await _value(connection, "SHOW server_version")
    yield Finding("server", "ok", f"{server.name}, version {version}")
    if server.is_pooled:
        yield Finding(
            "pooler",
            "note",
            "a pooler gives each transaction another connection: waking is by polling, and the leases of a process "
            "that died run out instead of being taken over early",
        )
    for setting in ("fsync", "full_page_writes"):
        if await _value(connection, f"SHOW {setting}") != "on":
            yield Finding(
                setting, "error", f"{setting} is off: a crash of the machine can lose or damage what was confirmed"
            )
    if await _value(connection, "SHOW autovacuum") != "on":
        yield Finding("autovacuum", "error", "autovacuum is off: the message table grows without end. Turn it on.")


async def _load(connection: Connection) -> AsyncGenerator[Finding]:
    """Yield what others do to the server."""
    for holder, pid, age, query in await (
        await connection.execute(_HOLDERS, (TRANSACTION_LONG, HOLDERS_MAX))
    ).fetchall():
        end = f"End it, or SELECT pg_terminate_backend({pid})" if pid else "End it"
        yield Finding(
            "transactions",
            "warning",
            f"{holder} has been open for {age:,} s: until it ends, nothing that was acknowledged since can be removed, "
            f"and the table grows. {end}.{_last(query)}",
        )
    for holder, late, remedy in await (await connection.execute(_STANDBYS, (STANDBY_LATE, HOLDERS_MAX))).fetchall():
        yield Finding(
            "standbys",
            "warning",
            f"{holder} keeps what died in the last {late:,} transactions: nothing that was acknowledged since can be "
            f"removed, and the table grows. {remedy}.",
        )
    used, most = (
        int(await _value(connection, _USED)),
        int(await _value(connection, "SHOW max_connections")),
    )
    level = "warning" if used > 0.8 * most else "ok"
    yield Finding(
        "connections", level, f"{used} of {most} are in use; a worker process takes up to three, a sender one"
    )


async def _messages(connection: Connection) -> AsyncGenerator[Finding]:
    """Yield the state of the queues' tables, and who receives."""
    yield _clock(int(await _value(connection, _AHEAD)) / 1000)
    size = int(await _value(connection, "SELECT pg_total_relation_size('filao.message')"))
    level = "note" if size > TABLE_LARGE else "ok"
    yield Finding("size", level, f"the messages take {size / 1024**2:,.1f} MiB")
    history = int(await _value(connection, "SELECT pg_total_relation_size('filao.event')"))
    if history > HISTORY_TOLD:
        yield Finding("history", "ok", f"the history of messages takes {history / 1024**2:,.1f} MiB")
    deeds = int(await _value(connection, "SELECT count(*) FROM filao.audit"))
    unended = await connection.execute(
        f"SELECT {DEED} FROM filao.audit WHERE ended_at IS NULL ORDER BY id DESC".encode()
    )
    for finding in deeds_finding(deeds, [deed_of(row) for row in await unended.fetchall()]):
        yield finding


async def _queues(connection: Connection, queues: Sequence[QueueStats]) -> AsyncGenerator[Finding]:
    """Yield how each queue is, and each process that receives."""
    run_out = dict(await (await connection.execute(_RUN_OUT)).fetchall())
    for queue in queues:
        yield queue_finding(queue, run_out.get(queue.name, 0))
    for name, held, state, reported_ago in await (await connection.execute(_PROCESSES)).fetchall():
        yield process_finding(name, held, state, float(reported_ago))


async def _strange(connection: Connection) -> AsyncGenerator[Finding]:
    """Yield what no Filao did: tables that somebody emptied, filled or copied without what belongs to them."""
    for name, last, there in await (await connection.execute(_BEHIND.encode())).fetchall():
        yield Finding(
            "numbers",
            "error",
            f"the sequence {name} stands at {last:,}, and {there:,} is in use: a logical replica does not bring "
            f"sequences. Until it is right, calls fail and messages come out of order: "
            f"SELECT setval('{name}', {there});",
        )
    for table, what in await (await connection.execute(_ADDED)).fetchall():
        yield Finding(
            f"table filao.{table}",
            "warning",
            f"it has {what}, which is not Filao's: where that skips rows, calls fail; where it hides or changes them, "
            "messages do not come. Drop it, unless it does neither.",
        )
    if (open_to_all := int(await _value(connection, _OPEN_TO_ALL))) > 0:
        yield Finding(
            "rights",
            "warning",
            f"{some(open_to_all, 'function')} may be called by every role that may use the schema filao, as behind "
            "pg_restore --no-acl: who may send may then delete, too. Take that from them: REVOKE ALL ON ALL FUNCTIONS "
            "IN SCHEMA filao FROM PUBLIC",
        )
    if int(await _value(connection, "SELECT pg_relation_size('filao.message')")) > COUNTED_MAX:
        return
    for name, state, counted, there in await (await connection.execute(_MISCOUNTED)).fetchall():
        yield Finding(
            f"queue {name!r}",
            "error",
            f"{miscounted(counted, state, there)}: somebody has changed the tables by other means than Filao's. When "
            "the queue is empty, delete it and declare it anew.",
        )


def _clock(ahead: float) -> Finding:
    if abs(ahead) * 1000 <= JUMP:
        return Finding("clock", "ok", "the queues' time is the server's")
    text = (
        f"the server's wall clock is {ahead:+,.1f} s from the queues' time, which follows it by a twentieth of the "
        "time that passes"
    )
    return Finding("clock", "note", text)


_USED = """
    SELECT count(*) FROM pg_stat_activity
    WHERE usesysid IS NOT NULL AND datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
"""
"""The connections, without what the server runs for itself; a role without pg_read_all_stats sees no backend_type."""
_AHEAD = "SELECT even + jumped - filao.clock() FROM filao.even_clock()"
_HOLDERS = """
    SELECT holder, pid, age::bigint, query
    FROM (
      SELECT format('the transaction of %%s (process %%s, %%s)', usename, pid,
                    coalesce(nullif(application_name, ''), state)),
             pid, extract(epoch FROM clock_timestamp() - xact_start), query
      FROM pg_stat_activity
      WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
        AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
      UNION ALL
      SELECT format('the prepared transaction %%s of %%s', quote_literal(gid), owner), NULL,
             extract(epoch FROM clock_timestamp() - prepared), NULL
      FROM pg_prepared_xacts WHERE database = current_database()
    ) AS open (holder, pid, age, query)
    WHERE age >= %s ORDER BY age DESC LIMIT %s
"""
"""Transactions that keep dead rows. A role without pg_read_all_stats sees no age of other users' transactions."""

_STANDBYS = """
    SELECT holder, late, remedy
    FROM (
      SELECT format('the replication slot %%s', quote_literal(slot_name)), age(xmin),
             CASE WHEN active THEN 'End the long query on its standby'
                  ELSE format('Nobody uses it: let its standby come back, or SELECT pg_drop_replication_slot(%%L)',
                              slot_name) END
      FROM pg_replication_slots WHERE wal_status IS DISTINCT FROM 'lost'
      UNION ALL
      SELECT format('the standby %%s (process %%s)', quote_literal(application_name), pid), age(backend_xmin),
             'End the long query on it'
      FROM pg_stat_activity WHERE backend_type = 'walsender'
    ) AS standby (holder, late, remedy)
    WHERE late >= %s ORDER BY late DESC LIMIT %s
"""
"""Standbys that tell the server which rows they read (`hot_standby_feedback`), by a slot or without one; those without
are hidden from a role without pg_read_all_stats.
"""


def _last(query: str | None) -> str:
    """Return a sentence with another user's last statement, on one line, whatever is in it."""
    said = " ".join((query or "").split())
    said = "".join(character if character.isprintable() else "?" for character in said)
    return f" Its last statement: {said[:QUERY_MAX]}" if said else ""


_PROCESSES = """
    SELECT p.name, (SELECT count(*) FROM filao.message m WHERE m.state = 'leased' AND m.token >> 32 = p.id), p.state,
      (filao.clock() - p.reported_at) / 1000.0
    FROM filao.process p ORDER BY p.id
"""
_RUN_OUT = """
    SELECT q.name, count(*) FROM filao.message m JOIN filao.queue q ON q.id = m.queue
    WHERE m.state = 'leased' AND m.at < filao.clock() GROUP BY 1
"""
_SEQUENCES = {
    "filao.number": "filao.message",
    **{f"filao.{table}_id_seq": f"filao.{table}" for table in ("failure", "event", "audit")},
}
_BEHIND = " UNION ALL ".join(
    f"""
    SELECT name, last, there FROM (
      SELECT '{name}', CASE WHEN has_sequence_privilege('{name}', 'SELECT') THEN
               coalesce(pg_sequence_last_value('{name}'), 0) END, (SELECT max(id) FROM {table})
    ) AS s (name, last, there) WHERE there > last
    """
    for name, table in _SEQUENCES.items()
)
"""Which sequences will give numbers that are there."""
_ADDED = """
    SELECT c.relname::text, a.what
    FROM pg_class c
    CROSS JOIN LATERAL (
      SELECT 'the trigger ' || t.tgname FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal
      UNION ALL
      SELECT 'the rule ' || r.rulename FROM pg_rewrite r WHERE r.ev_class = c.oid
      UNION ALL
      SELECT 'row security' WHERE c.relrowsecurity
    ) AS a (what)
    WHERE c.relnamespace = 'filao'::regnamespace AND c.relkind = 'r' ORDER BY 1, 2
"""
"""What stands between Filao and its own rows."""
_OPEN_TO_ALL = """
    SELECT count(*) FROM pg_proc p
    WHERE p.pronamespace = 'filao'::regnamespace AND EXISTS (
      SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a WHERE a.grantee = 0
    )
"""
_MISCOUNTED = """
    SELECT q.name, s.name, coalesce(c.counted, 0), coalesce(m.there, 0)
    FROM filao.queue q
    CROSS JOIN (SELECT unnest(enum_range(NULL::filao.state))::text AS name) AS s
    LEFT JOIN (SELECT queue, name, sum(value)::bigint AS counted FROM filao.counter GROUP BY 1, 2) AS c
      ON c.queue = q.id AND c.name = s.name
    LEFT JOIN (SELECT queue, state::text AS name, count(*) AS there FROM filao.message GROUP BY 1, 2) AS m
      ON m.queue = q.id AND m.name = s.name
    WHERE coalesce(c.counted, 0) <> coalesce(m.there, 0)
    ORDER BY 1, 2
"""
"""The counters are written with what they count, so one snapshot shows both alike."""


async def _value(connection: Connection, sql: str) -> str:
    row = await (await connection.execute(sql.encode())).fetchone()
    return "" if row is None or row[0] is None else str(row[0])
