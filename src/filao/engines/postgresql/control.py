"""What operators see of a PostgreSQL database: queries that change nothing."""

from collections.abc import Sequence
from typing import Any

from filao.codec import seen_body, seen_headers
from filao.engine import Failure, QueueStats, State, StoredMessage, instant
from filao.engines.postgresql.server import Connection
from filao.errors import ConfigurationError
from filao.queue import Queue, not_found, rules_from_json

_STATS = """
    SELECT q.name, q.paused,
           (SELECT coalesce(jsonb_object_agg(c.name, c.value), '{}')
            FROM (SELECT name, sum(value)::bigint AS value FROM filao.counter WHERE queue = q.id GROUP BY name) AS c),
           coalesce(%s, filao.clock()) - (
             WITH RECURSIVE heads AS (  -- the first of each priority: one look-up for each that is in use
               (SELECT id, priority FROM filao.message
                WHERE queue = q.id AND state OPERATOR(pg_catalog.=) 'ready' ORDER BY -priority, id LIMIT 1)
               UNION ALL
               SELECT below.* FROM heads, LATERAL (
                 SELECT id, priority FROM filao.message
                 WHERE queue = q.id AND state OPERATOR(pg_catalog.=) 'ready' AND -priority > -heads.priority
                 ORDER BY -priority, id LIMIT 1
               ) AS below
             )
             SELECT sent_at FROM filao.message WHERE id = (SELECT min(id) FROM heads)
           )
    FROM filao.queue q
    ORDER BY q.name COLLATE "C"
"""
_ORDER = {"ready": "-priority, id", "delayed": "at, id", "leased": "at, id", "blocked": "grp, id", "dead": "id"}
HISTORY = """
    (SELECT coalesce(json_agg(json_build_array(f.attempt, f.at, f.outcome, f.error, f.consumer) ORDER BY f.id), '[]')
     FROM filao.failure f WHERE f.message = m.id)
"""
"""The failed attempts of message `m`, the oldest first, as `history` reads them."""
_SEEN = f"""
    filao.name_of(m), m.kind, m.content, m.headers, m.attempts, m.priority, m.grp, m.dedup_key, m.sent_at, m.at,
    m.expires_at, m.reason, coalesce((SELECT name FROM filao.process WHERE id = m.token >> 32), ''), {HISTORY}
"""


async def queues(connection: Connection) -> dict[str, tuple[int, Queue]]:
    """Return every declared queue, by name, with its number and its rules."""
    found = await connection.execute('SELECT id, name, rules::text FROM filao.queue ORDER BY name COLLATE "C"')
    return {name: (number, rules_from_json(name, rules)) for number, name, rules in await found.fetchall()}


async def find(connection: Connection, name: str) -> Queue:
    """Return a queue with its rules. Raises `QueueNotFound`."""
    found = await connection.execute("SELECT rules::text FROM filao.queue WHERE name = %s", (name,))
    row = await found.fetchone()
    if row is None:
        raise not_found(name, await queues(connection))
    return rules_from_json(name, row[0])


async def stats(connection: Connection, moment: int | None) -> list[QueueStats]:
    """Add up the counters of every queue."""
    found = await connection.execute(_STATS, (moment,))
    zero = {"ready": 0, "delayed": 0, "blocked": 0, "leased": 0, "dead": 0}
    return [
        QueueStats(
            name=name, paused=paused, oldest_ready_age=None if age is None else max(0.0, age / 1000), **(zero | counted)
        )
        for name, paused, counted, age in await found.fetchall()
    ]


async def peek(
    connection: Connection, queue: tuple[int, str], state: State, *, limit: int, after: str | None
) -> list[StoredMessage]:
    """Return messages of one state in its order; `after` is the id of the last one seen; a queue is a number and a name."""
    number, name = queue
    behind, last = ("", ()) if after is None else await _behind(connection, number, name, state, after)
    grouped = "AND grp IS NOT NULL" if state == State.BLOCKED else ""
    found = await connection.execute(
        f"""
        SELECT {_SEEN} FROM filao.message m
        WHERE queue = %s AND state OPERATOR(pg_catalog.=) '{State(state)}' {grouped} {behind}
        ORDER BY {_ORDER[state]} LIMIT %s
        """.encode(),
        (number, *last, limit),
    )
    return [_stored(name, state, fields) for fields in await found.fetchall()]


async def _behind(
    connection: Connection, number: int, queue: str, state: State, after: str
) -> tuple[str, tuple[Any, ...]]:
    found = await connection.execute(
        f"""
        SELECT named.id, {_ORDER[state] if state != State.DEAD else "named.id"}
        FROM (SELECT filao.number_of(%s, %s) AS id) AS named LEFT JOIN filao.message USING (id)
        """.encode(),
        (number, after),
    )
    row = await found.fetchone()
    # A dead letter's order needs no more than its id, so one that was redriven meanwhile still serves.
    if row is None or row[0] is None or (state != State.DEAD and row[1] is None):
        raise ConfigurationError(
            f"queue {queue!r}: there is no message {after!r} to go on behind; it may be gone by now. Start again "
            f"without after="
        )
    marks = ", ".join(["%s"] * len(row[1:]))
    return f"AND ({_ORDER[state]}) > ({marks})", row[1:]


def _stored(queue: str, state: State, fields: Sequence[Any]) -> StoredMessage:
    name, kind, content, headers, attempts, priority, group, dedup_key, sent_at, at, *rest = fields
    expires_at, reason, consumer, failures = rest
    return StoredMessage(
        id=name,
        queue=queue,
        state=state,
        body=seen_body(kind, content),
        headers=seen_headers(headers),
        attempts=attempts,
        priority=priority,
        group=group,
        dedup_key=dedup_key,
        sent_at=instant(sent_at),
        at=instant(at),
        expires_at=None if expires_at is None else instant(expires_at),
        reason=reason,
        history=history(failures),
        consumer=consumer if state == State.LEASED else "",
    )


def history(failures: Sequence[Sequence[Any]]) -> tuple[Failure, ...]:
    """Return the failed attempts of a message from what `HISTORY` found."""
    return tuple(
        Failure(attempt, instant(at), outcome, error, consumer) for attempt, at, outcome, error, consumer in failures
    )
