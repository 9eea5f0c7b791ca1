"""Moving a queue: its messages are read for another engine, or come from one and are stored."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from filao.engine import Draft
from filao.engines import rows as carried
from filao.engines.sqlite import moves, operators
from filao.engines.sqlite.books import DEAD, DEDUP_KEY, MESSAGE_ID, STATES, Books, QueueRow
from filao.engines.sqlite.control import SqliteOperators
from filao.engines.sqlite.files import MEMORY
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.receive import make_due
from filao.engines.sqlite.send import send
from filao.moving import Key, Memory, Packing, Parcel
from filao.queue import BODY_MAX_EVER, Queue

_NEXT = f"""
    SELECT message_id, salt, id, state, {carried.COLUMNS} FROM filao_message
    WHERE id > ? AND queue = ? AND state <> 4 ORDER BY id LIMIT ?
"""


class SqliteMover:
    """See `filao.moving.Mover`."""

    def __init__(self, path: Path, operators: SqliteOperators, jobs: Jobs) -> None:
        self._path = path
        self._operators = operators
        self._jobs = jobs

    async def identity(self) -> str:
        """Return the identity of the file, whatever path it was opened by."""
        if self._path == MEMORY:
            return f"memory {id(self)}"
        about = self._path.stat()
        return f"sqlite {about.st_dev}:{about.st_ino}"

    def check(self, queue: Queue, drafts: Sequence[Draft] = ()) -> None:
        """Accept everything: a file can keep it all."""

    @asynccontextmanager
    async def packing(self, queue: str) -> AsyncGenerator[Packing]:
        """Begin to move a queue's messages away."""

        async def read(after: int, limit: int) -> list[Parcel]:
            return await self._jobs.change(lambda books: pack(books, books.row(queue), after, limit))

        async def remove_all(names: Sequence[str]) -> None:
            await self._jobs.change(lambda books: remove(books, books.row(queue), names))

        yield carried.RowPacking(queue, read, remove_all, self._operators)

    def alone(self, queue: str) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        """Let others move to the queue as well: a message that two bring is known by its id."""
        return nullcontext()

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Store messages from another engine."""
        await self._jobs.change(lambda books: unpack(books, books.row(queue), parcels))

    async def memory(self, queue: str) -> Memory:
        """Return the keys of messages that have ended, and the groups that are halted."""
        return await self._jobs.look_up(lambda books: memory(books, books.row(queue)))

    async def remember(self, queue: str, memory: Memory) -> None:
        """Remember what another engine remembered."""
        await self._jobs.change(lambda books: remember(books, books.row(queue), memory))


def pack(books: Books, row: QueueRow, after: int, limit: int) -> list[Parcel]:
    """Return the messages behind a place in the order of sending, except those that consumers hold."""
    make_due(books, row)  # so that messages whose lease has run out are moved too
    books.flush()
    packed: list[Parcel] = []
    for message_id, salt, number, state, *fields in books.db.execute(_NEXT, (after, row.id, limit)).fetchall():
        name = books.name_of(number, message_id, salt)
        failed = operators.history(books.db, number)
        packed.append(carried.parcel((number, STATES[state], *fields), name, failed, books.now))
    return packed


def remove(books: Books, row: QueueRow, names: Sequence[str]) -> None:
    """Delete messages that are stored elsewhere, and forget their ids: those that come back are no duplicates."""
    numbers = operators.chosen(books, row, carried.LEAVING, names, len(names))
    operators.remove(books, row, numbers, carried.LEAVING, purges=False)
    for name in names:
        if not _is_here(books, row, name):  # otherwise its consumer has extended its lease meanwhile
            moves.unlearn(books, row, moves.keys(None, name), name)


def _is_here(books: Books, row: QueueRow, name: str) -> bool:
    number = books.number_of(row, name)
    found = books.db.execute("SELECT 1 FROM filao_message WHERE id = ? AND queue = ?", (number, row.id)).fetchone()
    return found is not None


def _has_come(books: Books, row: QueueRow, name: str) -> bool:
    """Return whether a message was stored here before: it is here, or ended here."""
    return _is_here(books, row, name) or moves.remembered(books, row, MESSAGE_ID, name) is not None


def unpack(books: Books, row: QueueRow, parcels: Sequence[Parcel]) -> None:
    """Store messages in this order, except those that were stored before."""
    queue = row.rules.name
    parcels = [parcel for parcel in parcels if not _has_come(books, row, parcel.id)]
    for parcel in parcels:  # of a message that was here and was moved away, the key is still known
        moves.unlearn(books, row, moves.keys(parcel.draft.dedup_key, None), parcel.id)
    rules = row.rules
    row.rules = replace(rules, max_length=None, body_max=BODY_MAX_EVER)  # what was confirmed to its sender is kept
    results = [send(books, one) for one in carried.sends(queue, parcels)]
    for place, parcel in enumerate(parcels):
        if carried.has_rival(parcel, results[place]):
            results[place] = send(books, *carried.sends(queue, [carried.without_key(parcel)]))
        if carried.is_new(results[place]):
            _amend(books, row, parcel)
    row.rules = rules


def _amend(books: Books, row: QueueRow, parcel: Parcel) -> None:
    """Give a message that was just stored its history, its times and its state."""
    books.flush()
    number = books.number_of(row, parcel.id)
    assert number is not None
    books.db.execute(
        "UPDATE filao_message SET attempts = ?, failures = ?, sent_at = ?, expires_at = ? WHERE id = ?",
        (parcel.attempts, len(parcel.history), parcel.sent_at, parcel.expires_at, number),
    )
    books.db.executemany(
        "INSERT INTO filao_failure (message, attempt, at, outcome, error, consumer) VALUES (?, ?, ?, ?, ?, ?)",
        carried.failure_rows(number, parcel),
    )
    if parcel.reason is not None:
        (entry,) = books.entries("WHERE id = ?", (number,))
        books.db.execute(
            "UPDATE filao_message SET state = 6, at = ?, reason = ?, dedup_key = ? WHERE id = ?",
            (parcel.died_at, parcel.reason, parcel.draft.dedup_key, number),
        )
        books.count_move(row, entry.state, DEAD)
        row.reasons.append((parcel.reason, 1, 0))
        if entry.group is not None:
            moves.arrange(books, row, entry.group)


def memory(books: Books, row: QueueRow) -> Memory:
    """Return the keys of messages that have ended, and the groups that are halted."""
    keys = books.db.execute(
        "SELECT kind, key, message, until FROM filao_dedup WHERE queue = ? AND until > ?", (row.id, books.now)
    )
    halted = books.db.execute("SELECT grp FROM filao_halted WHERE queue = ?", (row.id,))
    return Memory(
        tuple(Key(kind == MESSAGE_ID, key, message, until) for kind, key, message, until in keys.fetchall()),
        tuple(group for (group,) in halted.fetchall()),
    )


def remember(books: Books, row: QueueRow, memory: Memory) -> None:
    """Remember what another engine remembered, except what is known here already."""
    books.db.executemany(
        "INSERT OR IGNORE INTO filao_dedup (queue, kind, key, message, until) VALUES (?, ?, ?, ?, ?)",
        [(row.id, MESSAGE_ID if key.is_id else DEDUP_KEY, key.key, key.message, key.until) for key in memory.keys],
    )
    for group in memory.halted:
        books.db.execute("INSERT OR IGNORE INTO filao_halted (queue, grp) VALUES (?, ?)", (row.id, group))
        moves.arrange(books, row, group)
