"""Moving a queue: its messages are read for another engine, or come from one and are stored."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from filao.engine import Draft
from filao.engines import rows as carried
from filao.engines.postgresql.control import HISTORY, PostgresqlOperators
from filao.engines.postgresql.main import Main
from filao.engines.postgresql.server import Connection
from filao.engines.postgresql.transactions import Apply, TransactionPool
from filao.moving import Key, Memory, Packing, Parcel
from filao.queue import Queue

_IDENTITY = """
    SELECT format('postgresql %s %s %s', m.value, d.oid, extract(epoch FROM pg_postmaster_start_time()))
    FROM filao.meta m, pg_database d WHERE m.name = 'database' AND d.datname = current_database()
"""
_NEXT = f"""
    SELECT coalesce(%s, filao.clock()), filao.name_of(m), {HISTORY}, id, state::text, {carried.COLUMNS}
    FROM filao.message m
    WHERE id > %s AND queue = %s AND state OPERATOR(pg_catalog.<>) 'leased' ORDER BY id LIMIT %s
"""
_NUMBERS = "SELECT message_id, id FROM filao.message WHERE queue = %s AND message_id = ANY(%s)"
_FAILURE = """
    INSERT INTO filao.failure (message, attempt, at, outcome, error, consumer) VALUES (%s, %s, %s, %s, %s, %s)
"""
_KEYS = """
    SELECT kind, key, message, until FROM filao.dedup
    WHERE queue = %s AND until > coalesce(%s, filao.clock()) ORDER BY key
"""
_REMEMBER = """
    INSERT INTO filao.dedup (queue, kind, key, message, until) VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING
"""
_REMOVE = """
    SELECT filao.remove(%s, %s, %s::text[]::filao.state[], false, ARRAY(
      SELECT filao.number_of(%s, name) FROM unnest(%s::text[]) AS name
    ))
"""
_IDS = """
    FROM filao.dedup d WHERE d.queue = %s AND d.kind = 'm' AND d.key = ANY (%s) AND d.message = d.key
    AND NOT EXISTS (SELECT FROM filao.message m WHERE m.queue = d.queue AND m.message_id = d.key)
"""
"""The ids of messages that are gone."""
_HAVE_COME = """
    SELECT given.name
    FROM (SELECT name, filao.number_of(%s, name) AS number FROM unnest(%s::text[]) AS name OFFSET 0) AS given
    WHERE EXISTS (SELECT FROM filao.message m WHERE m.id = given.number AND m.queue = %s)
       OR EXISTS (
         SELECT FROM filao.dedup d
         WHERE d.queue = %s AND d.kind = 'm' AND d.key = given.name
           AND coalesce(d.until > coalesce(%s, filao.clock()), true)
       )
"""
_KEYS_OF = """
    FROM filao.dedup d WHERE d.queue = %s AND d.kind = 'k' AND (d.message, d.key) IN (
      SELECT * FROM unnest(%s::text[], %s::text[])
    )
"""
"""The keys of these messages."""
_UNKNOWN = """
    FROM unnest(%s::"char"[], %s::text[]) AS given (kind, key)
    WHERE NOT EXISTS (SELECT FROM filao.dedup d WHERE d.queue = %s AND d.kind = given.kind AND d.key = given.key)
"""
"""Those of these keys that are not known."""


class PostgresqlMover:
    """See `filao.moving.Mover`."""

    def __init__(
        self,
        main: Main,
        transactions: TransactionPool,
        *,
        apply: Apply,
        operators: PostgresqlOperators,
    ) -> None:
        self._main = main
        self._server = main.server
        self._transactions = transactions
        self._apply = apply
        self._operators = operators

    async def identity(self) -> str:
        """Return the schema's random name, its database, and the server's start: a copy differs in one of them."""
        async with self._main.use() as connection:
            found = await (await connection.execute(_IDENTITY)).fetchone()
        assert found is not None
        return str(found[0])

    def check(self, queue: Queue, drafts: Sequence[Draft] = ()) -> None:
        """Refuse text that the database's encoding cannot hold; a body is stored as bytes."""
        for draft in drafts:
            self._server.charset.check(queue.name, draft)

    @asynccontextmanager
    async def packing(self, queue: str) -> AsyncGenerator[Packing]:
        """Begin to move a queue's messages away."""
        number = await self._operators.number(queue)

        async def read(after: int, limit: int) -> list[Parcel]:
            async with self._main.use() as connection:
                return await pack(connection, number, self._main.moment(), after, limit)

        async def remove_all(names: Sequence[str]) -> None:
            async with self._server.one_call(), self._transactions.begin() as connection:
                await remove(connection, number, self._main.moment(), names)

        yield carried.RowPacking(queue, read, remove_all, self._operators)

    def alone(self, queue: str) -> AbstractAsyncContextManager[None]:  # noqa: ARG002
        """Let others move to the queue as well: a message that two bring is known by its id."""
        return nullcontext()

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Store messages from another engine."""
        async with self._server.one_call():
            number = await self._operators.number(queue)
            async with self._transactions.begin() as connection:
                parcels = await coming(connection, number, self._main.moment(), parcels)
                await connection.execute("SET LOCAL filao.moves = 'yes'")  # see filao.send
                results = await self._apply(connection, carried.sends(queue, parcels))
                for place, parcel in enumerate(parcels):
                    if carried.has_rival(parcel, results[place]):
                        again = carried.sends(queue, [carried.without_key(parcel)])
                        (results[place],) = await self._apply(connection, again)
                new = [parcel for parcel, result in zip(parcels, results, strict=True) if carried.is_new(result)]
                await amend(connection, number, self._main.moment(), new)

    async def memory(self, queue: str) -> Memory:
        """Return the keys of messages that have ended, and the groups that are halted."""
        async with self._server.one_call():
            number = await self._operators.number(queue)
            async with self._main.use() as connection:
                return await memory(connection, number, self._main.moment())

    async def remember(self, queue: str, memory: Memory) -> None:
        """Remember what another engine remembered."""
        async with self._server.one_call():
            number = await self._operators.number(queue)
            async with self._transactions.begin() as connection:
                await remember(connection, number, self._main.moment(), memory)


async def pack(connection: Connection, queue: int, moment: int | None, after: int, limit: int) -> list[Parcel]:
    """Return the messages behind a place in the order of sending, except those that consumers hold."""
    await connection.execute("SELECT filao.make_all_due(%s, %s)", (queue, moment))
    rows = await (await connection.execute(_NEXT, (moment, after, queue, limit))).fetchall()
    return [carried.parcel(fields, name, carried.failures(failures), now) for now, name, failures, *fields in rows]


async def remove(connection: Connection, queue: int, moment: int | None, names: Sequence[str]) -> None:
    """Delete messages that are stored elsewhere, and forget their ids: those that come back are no duplicates."""
    await connection.execute(_REMOVE, (queue, moment, list(carried.LEAVING), queue, list(names)))
    await _forget(connection, _IDS, (queue, list(names)))


async def coming(connection: Connection, queue: int, moment: int | None, parcels: Sequence[Parcel]) -> list[Parcel]:
    """Return the messages that were not stored here before: they are not here, and did not end here.

    Of a message that was here and was moved away, the key is still known. It is forgotten.
    """
    names = [parcel.id for parcel in parcels]
    found = await connection.execute(_HAVE_COME, (queue, names, queue, queue, moment))
    have_come = {name for (name,) in await found.fetchall()}
    left = [parcel for parcel in parcels if parcel.id not in have_come]
    keys = [parcel.draft.dedup_key for parcel in left]
    await _forget(connection, _KEYS_OF, (queue, [parcel.id for parcel in left], keys))
    return left


async def amend(connection: Connection, queue: int, moment: int | None, parcels: Sequence[Parcel]) -> None:
    """Give messages that were just stored their history, their times and their state."""
    found = await connection.execute(_NUMBERS, (queue, [parcel.id for parcel in parcels]))
    numbers: dict[str, int] = dict(await found.fetchall())
    await connection.execute(
        "SELECT filao.amend(%s, %s, %s::bigint[], %s::integer[], %s::integer[], %s::bigint[], %s::bigint[], "
        "%s::text[], %s::bigint[], %s::text[])",
        (
            queue,
            moment,
            [numbers[parcel.id] for parcel in parcels],
            [parcel.attempts for parcel in parcels],
            [len(parcel.history) for parcel in parcels],
            [parcel.sent_at for parcel in parcels],
            [parcel.expires_at for parcel in parcels],
            [parcel.reason for parcel in parcels],
            [parcel.died_at for parcel in parcels],
            [parcel.draft.dedup_key for parcel in parcels],
        ),
    )
    await connection.execute("SELECT filao.arrange_noted(%s, coalesce(%s, filao.clock()))", (queue, moment))
    failures = [row for parcel in parcels for row in carried.failure_rows(numbers[parcel.id], parcel)]
    if failures:
        async with connection.cursor() as cursor:
            await cursor.executemany(_FAILURE, failures)
            if cursor.rowcount < len(failures):
                await connection.execute("SELECT filao.skipped('filao.failure')")


async def memory(connection: Connection, queue: int, moment: int | None) -> Memory:
    """Return the keys of messages that have ended, and the groups that are halted."""
    keys = await (await connection.execute(_KEYS, (queue, moment))).fetchall()
    halted = await (await connection.execute("SELECT grp FROM filao.halted WHERE queue = %s", (queue,))).fetchall()
    return Memory(
        tuple(Key(_letter(kind) == "m", key, message, until) for kind, key, message, until in keys),
        tuple(group for (group,) in halted),
    )


async def remember(connection: Connection, queue: int, moment: int | None, memory: Memory) -> None:
    """Remember what another engine remembered, except what is known here already."""
    if memory.keys:
        async with connection.cursor() as cursor:
            await cursor.executemany(
                _REMEMBER,
                [(queue, "m" if key.is_id else "k", key.key, key.message, key.until) for key in memory.keys],
            )
        kinds, keys = ["m" if key.is_id else "k" for key in memory.keys], [key.key for key in memory.keys]
        await _check_none(connection, _UNKNOWN, (kinds, keys, queue))
    for group in memory.halted:
        await connection.execute("SELECT filao.halt_group(%s, %s, %s)", (queue, moment, group))


async def _forget(connection: Connection, keys: str, given: Sequence[Any]) -> None:
    await connection.execute(f"DELETE {keys}".encode(), given)
    await _check_none(connection, keys, given)


async def _check_none(connection: Connection, keys: str, given: Sequence[Any]) -> None:
    """Fail if there are such keys: what is not Filao's has skipped them."""
    await connection.execute(f"SELECT filao.skipped('filao.dedup') {keys} LIMIT 1".encode(), given)


def _letter(kind: str | bytes) -> str:
    return kind.decode() if isinstance(kind, bytes) else kind
