"""Exactly-once effects across two databases: an outbox and an inbox, each a table in the user's own.

The outbox records a send in the transaction of the user's that it belongs to; the relay (`relay.py`) sends what was
committed. The inbox records the id of a message in the transaction that does its work, so that a second run changes
nothing. (The patterns "transactional outbox" and "idempotent receiver": Hohpe and Woolf, Enterprise Integration
Patterns, 2003; Richardson, Microservices Patterns, 2018.)

    outbox, inbox = filao.Outbox(), filao.Inbox()

    with connection:  # the sender's: both or neither
        connection.execute("INSERT INTO claim …")
        outbox.send_to_queue(connection, "claims.processing", {"claim_id": 7})

    with connection:  # the receiver's: once, however often the message comes
        if inbox.is_new(connection, message):
            connection.execute("INSERT INTO payment …")
    await message.ack()
"""

import re
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from filao.codec import BYTES
from filao.connections import connection_of
from filao.draft import draft
from filao.engine import Draft
from filao.errors import ConfigurationError
from filao.queue import Queue, T

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
NUMBERS = {  # the growing number of a row, in each dialect
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "mysql": "BIGINT AUTO_INCREMENT PRIMARY KEY",
}
_COLUMNS = "id, queue, kind, content, headers, delay, priority, grp, dedup_key, ttl, recorded_at"


class Identified(Protocol):
    """A message, of either face."""

    @property
    def id(self) -> str: ...
    @property
    def queue(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Recorded:
    """A send as the outbox holds it."""

    number: int
    queue: str
    draft: Draft


class Outbox:
    """A table of sends, in the user's database."""

    def __init__(self, table: str = "filao_outbox") -> None:
        self.table = _checked(table)
        """The name of the table."""

    def create(self, connection: Any) -> None:
        """Create the table where there is none, on SQLite, PostgreSQL or MySQL; a migration of yours may do it as well."""
        on = connection_of(connection, needs_transaction=False)
        if on.dialect not in NUMBERS:
            raise ConfigurationError(
                f"the tables of an outbox are known for {', '.join(NUMBERS)}, not for {on.dialect}: create it yourself, with "
                f"the columns number (growing), {_COLUMNS}"
            )
        on.execute(
            f"""
            CREATE TABLE IF NOT EXISTS {self.table} (
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
                recorded_at DOUBLE PRECISION NOT NULL
            )
            """
        )

    def send_to_queue(
        self,
        connection: Any,
        queue: str | Queue[T],
        body: T,
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        dedup_key: str | None = None,
        ttl: float | None = None,
        message_id: str | None = None,
    ) -> str:
        """Record a send in the transaction that `connection` holds, and return the id that the message will have.

        The message is sent once that transaction has committed, and never if it rolls back. Arguments are those of
        `Broker.send_to_queue`, and are checked here; whether the queue exists is found by the relay. Raises
        `MessageError`, and `ConfigurationError` for a connection without a transaction.
        """
        known: Queue[Any] = queue if isinstance(queue, Queue) else Queue(queue)
        options = {"headers": headers, "delay": delay, "priority": priority, "group": group, "dedup_key": dedup_key}
        sent = draft(known, body, ttl=ttl, message_id=message_id or uuid.uuid4().hex, **options)  # type: ignore[arg-type]
        on = connection_of(connection, needs_transaction=True)
        on.execute(
            f"INSERT INTO {self.table} ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (sent.message_id, known.name, *_written(sent), time.time()),
        )
        assert sent.message_id is not None
        return sent.message_id

    def recorded(self, connection: Any, limit: int, *, without: Iterable[str] = ()) -> list[Recorded]:
        """Return the oldest sends that were committed, without those to some queues; for relays."""
        on = connection_of(connection, needs_transaction=False)
        left_out = list(without)
        where = f"WHERE queue NOT IN ({', '.join('?' * len(left_out))})" if left_out else ""
        rows = on.execute(
            f"SELECT number, {_COLUMNS} FROM {self.table} {where} ORDER BY number LIMIT {limit:d}", left_out
        )
        return [_read(row) for row in rows.fetchall()]

    def forget(self, connection: Any, numbers: Sequence[int]) -> None:
        """Delete what was sent; for relays."""
        on = connection_of(connection, needs_transaction=False)
        for first in range(0, len(numbers), 500):
            some = numbers[first : first + 500]
            on.execute(f"DELETE FROM {self.table} WHERE number IN ({', '.join('?' * len(some))})", some)


class Inbox:
    """A table of the messages whose work is done, in the user's database."""

    def __init__(self, table: str = "filao_inbox") -> None:
        self.table = _checked(table)
        """The name of the table."""

    def create(self, connection: Any) -> None:
        """Create the table where there is none."""
        on = connection_of(connection, needs_transaction=False)
        on.execute(
            f"""
            CREATE TABLE IF NOT EXISTS {self.table} (
                id      VARCHAR(256) NOT NULL PRIMARY KEY,
                queue   VARCHAR(128) NOT NULL,
                done_at DOUBLE PRECISION NOT NULL
            )
            """
        )

    def is_new(self, connection: Any, message: Identified) -> bool:
        """Record a message in the transaction that `connection` holds; False when its work was done before.

        Do the work in the same transaction, and acknowledge when it has committed. A second run that comes while the
        first is under way waits for it, or fails on the table's primary key, as the database has it.
        """
        on = connection_of(connection, needs_transaction=True)
        row = (message.id, message.queue, time.time())
        if on.dialect in ("sqlite", "postgresql"):
            insert = f"INSERT INTO {self.table} (id, queue, done_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            return bool(on.execute(insert, row).rowcount)
        if on.execute(f"SELECT id FROM {self.table} WHERE id = ?", row[:1]).fetchall():
            return False
        on.execute(f"INSERT INTO {self.table} (id, queue, done_at) VALUES (?, ?, ?)", row)
        return True

    def forget(self, connection: Any, *, older_than: float) -> int:
        """Delete what was done more than so many seconds ago, and return how many; none of them may come again."""
        on = connection_of(connection, needs_transaction=False)
        deleted = on.execute(f"DELETE FROM {self.table} WHERE done_at < ?", (time.time() - older_than,))
        return int(deleted.rowcount)


def _checked(table: str) -> str:
    if not NAME.fullmatch(table):
        raise ConfigurationError(f"table {table!r}: a name is up to 63 letters, digits and _, and begins with no digit")
    return table


def _written(sent: Draft) -> tuple[object, ...]:
    """Return the columns from kind to ttl; content is text, which every database holds alike."""
    content = b64encode(sent.content).decode() if sent.kind == BYTES else sent.content.decode()
    return (sent.kind, content, sent.headers, sent.delay, sent.priority, sent.group, sent.dedup_key, sent.ttl)


def _read(row: Sequence[Any]) -> Recorded:
    number, name, queue, kind, content, headers, delay, priority, group, dedup_key, ttl, recorded_at = row
    passed = max(0.0, time.time() - recorded_at)
    return Recorded(
        number,
        queue,
        Draft(
            kind,
            b64decode(content) if kind == BYTES else content.encode(),
            headers,
            max(0.0, delay - passed) if delay else 0.0,
            priority,
            group,
            dedup_key,
            ttl,
            name,
        ),
    )
