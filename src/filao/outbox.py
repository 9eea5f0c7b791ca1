"""Exactly-once effects across two databases: an outbox and an inbox, each a table in the user's own database.

The outbox records a send in the user's transaction; once that has committed, the relay (`relay.py`) sends it. The inbox
records the id of a message in the transaction that does its work, so that a second run changes nothing. (The patterns
"transactional outbox" and "idempotent receiver": Hohpe and Woolf, Enterprise Integration Patterns, 2003; Richardson,
Microservices Patterns, 2018.)

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
from typing import Annotated, Any, Literal, Protocol

import msgspec

from filao.checks import DURATION_MAX, PRIORITY_MAX, check_key, check_name, check_own_id
from filao.codec import BYTES, decode_headers
from filao.connections import connection_of
from filao.draft import Outgoing, draft
from filao.engine import Draft
from filao.errors import ConfigurationError, FilaoError
from filao.queue import Queue, T
from filao.tables import COLUMNS, create_inbox, create_outbox, update_outbox

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class Identified(Protocol):
    """A message, async or blocking."""

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


@dataclass(frozen=True, slots=True)
class Failed:
    """A send that a relay has set aside."""

    number: int
    id: str
    queue: str
    reason: str
    """Why it can never be sent as it is."""


class Outbox:
    """A table of sends in the user's database."""

    def __init__(self, table: str = "filao_outbox") -> None:
        self.table: str = _checked(table)
        """The name of the table."""

    def create(self, connection: Any) -> None:
        """Create the table if there is none, on SQLite, PostgreSQL or MySQL, or bring an older one up to date.

        A migration of your own may do the same.
        """
        create_outbox(connection_of(connection, needs_transaction=False), self.table)

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

        The message is sent once that transaction has committed, and never if it rolls back. The arguments are those of
        `Broker.send_to_queue` and are checked here, but only the relay finds out whether the queue exists. Raises
        `MessageError`, and `ConfigurationError` for a connection without a transaction.
        """
        known: Queue[Any] = queue if isinstance(queue, Queue) else Queue(queue)
        outgoing = Outgoing(
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=uuid.uuid4().hex if message_id is None else message_id,
        )
        sent = draft(known, outgoing)
        on = connection_of(connection, needs_transaction=True)
        try:
            on.execute(
                f"INSERT INTO {self.table} ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (sent.message_id, known.name, *_written(sent), time.time()),
            )
        except Exception as error:
            _note(error, f"filao.Outbox({self.table!r})")
            raise
        assert sent.message_id is not None
        return sent.message_id

    def recorded(self, connection: Any, limit: int, *, without: Iterable[str] = ()) -> list[Recorded | Failed]:
        """Return the oldest committed sends, except those to the queues in `without`; for relays.

        A row that is no send, because another program wrote it, is returned as one that failed.
        """
        on = connection_of(connection, needs_transaction=False)
        left_out = list(without)
        where = f"AND queue NOT IN ({', '.join('?' * len(left_out))})" if left_out else ""
        rows = on.execute(
            f"SELECT number, {COLUMNS} FROM {self.table} WHERE failed IS NULL {where} ORDER BY number LIMIT {limit:d}",
            left_out,
        )
        return [_read(row) for row in rows.fetchall()]

    def set_aside(self, connection: Any, failed: Failed) -> None:
        """Keep a send that can never be sent, with the reason, so that those behind it go on; for relays."""
        on = connection_of(connection, needs_transaction=False)
        on.execute(f"UPDATE {self.table} SET failed = ? WHERE number = ?", (failed.reason, failed.number))

    def failed(self, connection: Any, limit: int = 100) -> list[Failed]:
        """Return the oldest sends that a relay has set aside because they can never be sent, with the reason."""
        on = connection_of(connection, needs_transaction=False)
        as_stored = "CAST({} AS BLOB)" if on.dialect == "sqlite" else "{}"  # SQLite's texts need not be UTF-8
        columns = ", ".join(map(as_stored.format, ("id", "queue")))
        rows = on.execute(
            f"SELECT number, {columns}, failed FROM {self.table} WHERE failed IS NOT NULL "
            f"ORDER BY number LIMIT {limit:d}"
        )
        return [Failed(number, _legible(name), _legible(queue), why) for number, name, queue, why in rows.fetchall()]

    def retry(self, connection: Any, numbers: Iterable[int] | None = None) -> int:
        """Let relays try again what they set aside: all, or those with these numbers. Return how many those are.

        Remove the cause first, such as the queue's `body_max`. They go behind what was sent meanwhile.
        """
        on = connection_of(connection, needs_transaction=False)
        if numbers is None:
            return int(on.execute(f"UPDATE {self.table} SET failed = NULL WHERE failed IS NOT NULL").rowcount)
        return sum(
            int(
                on.execute(
                    f"UPDATE {self.table} SET failed = NULL WHERE number = ? AND failed IS NOT NULL", (n,)
                ).rowcount
            )
            for n in numbers
        )

    def update(self, connection: Any) -> None:
        """Bring an older table up to date; for relays."""
        update_outbox(connection_of(connection, needs_transaction=False), self.table)

    def forget(self, connection: Any, numbers: Sequence[int]) -> None:
        """Delete what was sent; for relays."""
        on = connection_of(connection, needs_transaction=False)
        for first in range(0, len(numbers), 500):
            some = numbers[first : first + 500]
            on.execute(f"DELETE FROM {self.table} WHERE number IN ({', '.join('?' * len(some))})", some)


class Inbox:
    """A table in the user's database of the messages whose work is done."""

    def __init__(self, table: str = "filao_inbox") -> None:
        self.table: str = _checked(table)
        """The name of the table."""

    def create(self, connection: Any) -> None:
        """Create the table if there is none, or bring an older one up to date, whose key was the id alone.

        Call it once after each installation of a newer Filao.
        """
        create_inbox(connection_of(connection, needs_transaction=False), self.table)

    def is_new(self, connection: Any, message: Identified) -> bool:
        """Record a message in the transaction that `connection` holds; False when its work was done before.

        Do the work in the same transaction, and acknowledge once it has committed. A second run that comes while the
        first is under way waits for it, or fails on the table's primary key; that depends on the database.
        """
        on = connection_of(connection, needs_transaction=True)
        row = (message.queue, message.id, time.time())
        insert = f"INSERT INTO {self.table} (queue, id, done_at) VALUES (?, ?, ?)"
        if on.dialect in ("sqlite", "postgresql"):
            try:
                return bool(on.execute(f"{insert} ON CONFLICT (queue, id) DO NOTHING", row).rowcount)
            except Exception as error:
                if "ON CONFLICT" not in str(error):
                    _note(error, f"filao.Inbox({self.table!r})")
                    raise
                raise ConfigurationError(_OLD_INBOX.format(table=self.table)) from error
        if on.execute(f"SELECT id FROM {self.table} WHERE queue = ? AND id = ?", row[:2]).fetchall():
            return False
        on.execute(insert, row)
        return True

    def forget(self, connection: Any, *, older_than: float) -> int:
        """Delete the records of work done more than `older_than` seconds ago, and return how many those are.

        A message that came again after that would be new.
        """
        on = connection_of(connection, needs_transaction=False)
        deleted = on.execute(f"DELETE FROM {self.table} WHERE done_at < ?", (time.time() - older_than,))
        return int(deleted.rowcount)


def _note(error: Exception, box: str) -> None:
    """Say beside an error of the user's own database, which stays what it is, what a missing table lacks."""
    error.add_note(f"If its table is not there: {box}.create(connection) makes it.")


def _checked(table: str) -> str:
    if not NAME.fullmatch(table):
        raise ConfigurationError(f"table {table!r}: a name is up to 63 letters, digits and _, and begins with no digit")
    return table


def _written(sent: Draft) -> tuple[object, ...]:
    """Return the columns from kind to ttl; the content is text, which every database stores in the same way."""
    content = b64encode(sent.content).decode() if sent.kind == BYTES else sent.content.decode()
    return (sent.kind, content, sent.headers, sent.delay, sent.priority, sent.group, sent.dedup_key, sent.ttl)


class _Row(msgspec.Struct):
    """What a row of the outbox must be."""

    number: int
    id: str
    queue: str
    kind: Literal[0, 1]
    content: str
    headers: str | None
    delay: Annotated[float, msgspec.Meta(ge=0, le=DURATION_MAX)]
    priority: Annotated[int, msgspec.Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
    group: str | None
    dedup_key: str | None
    ttl: Annotated[float, msgspec.Meta(gt=0, le=DURATION_MAX)] | None
    recorded_at: float


def _read(row: Sequence[Any]) -> Recorded | Failed:
    """Return the send in a row, which another program may have written."""
    try:
        read = msgspec.convert(dict(zip(_Row.__struct_fields__, row, strict=True)), _Row)
        check_name(read.queue)
        for what, key in (("message_id", read.id), ("group", read.group), ("dedup_key", read.dedup_key)):
            if key is not None:
                check_key(read.queue, what, key)
        check_own_id(read.queue, read.id)
        decode_headers(read.headers)
        content = b64decode(read.content, validate=True) if read.kind == BYTES else read.content.encode()
    except (ValueError, FilaoError) as error:
        return Failed(int(row[0]), _legible(row[1]), _legible(row[2]), _legible(f"the row is no send: {error}"))
    delay = max(0.0, read.delay - max(0.0, time.time() - read.recorded_at))
    terms = (read.priority, read.group, read.dedup_key, read.ttl, read.id)
    return Recorded(read.number, read.queue, Draft(read.kind, content, read.headers, delay, *terms))


def _legible(value: object) -> str:
    """Return what is in a row as text; what is no UTF-8 in it becomes an escape."""
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    return text.encode(errors="backslashreplace").decode()


_OLD_INBOX = (
    "the table {table!r} is of an earlier version, whose key was the id alone, so that one id in two queues was one "
    "message: call Inbox({table!r}).create(connection) once, which changes the key to (queue, id)"
)
