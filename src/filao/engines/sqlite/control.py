"""What operators see and do, from the event loop: each call is work for the database's thread, in transactions of a
bounded size, between which others have their turns.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, Self, TypeVar

from filao.engine import Draft, Event, Finding, QueueStats, State, StoredMessage
from filao.engines.sqlite import files, moves, operators, processes
from filao.engines.sqlite.books import Books, QueueRow
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.doctor import examine
from filao.engines.sqlite.hold import Hold
from filao.engines.sqlite.receive import NOBODY
from filao.engines.sqlite.stats import stats
from filao.errors import EngineUnavailable
from filao.queue import Queue
from filao.slices import Tally

R = TypeVar("R")

SLICE = 2_000  # messages that operators change in one transaction: some 20 ms of the write lock
EXPIRED_SLICES_MAX = 20  # of 5,000 expired messages, that end before an operator's look: a second; the rest end later
EXPIRED_WITHIN = 5.0  # seconds that an operator's look waits for that, beside a transaction that keeps the file locked
ALL = 2**62


class Worked(Protocol):
    """Has work done on the file, in the database's thread."""

    async def __call__(self, work: Callable[[Books], R], until: float | None = None) -> R:
        """Return what it comes to; it must have begun by then (monotonic), or within 30 s."""
        ...


class SqliteOperators:
    """See `filao.engine.Operators`, and `Pausing` and `Tracing`, which it is as well."""

    def __init__(self, hold: Hold, beside: Database, change: Worked, look_up: Worked) -> None:
        self._hold = hold
        self._beside = beside
        self._change = change
        self._look_up = look_up

    @property
    def pausing(self) -> Self:
        """Itself: what looks after queues can stop them."""
        return self

    @property
    def tracing(self) -> Self:
        """Itself: it reads what was written down."""
        return self

    async def trace(self, message_id: str) -> list[Event]:
        """Return what happened to the messages with this id."""
        return await self._look_up(lambda books: operators.trace(books, message_id))

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        return await self._look_up(lambda books: operators.queues(books.db))

    async def delete(self, queue: str) -> int:
        """Delete a queue that holds no message."""
        return await self._change(lambda books: operators.delete(books, books.row(queue)))

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Read the counters of every queue, or of one."""
        until = await self._let_expire()
        return await self._look_up(lambda books: stats(books, queue), until)

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages of one state in its order."""
        until = await self._let_expire()
        return await self._look_up(lambda books: operators.peek(books, books.row(queue), state, limit, after), until)

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Give dead letters back, each to its old place."""
        numbers = await self._chosen(queue, (State.DEAD,), ids, limit)
        return await self._in_slices(
            queue, numbers, lambda books, row, some: operators.redrive(books, row, some, edited)
        )

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete messages in these states."""
        numbers = await self._chosen(queue, states, ids, None)
        purges = ids is None
        return await self._in_slices(
            queue, numbers, lambda books, row, some: operators.remove(books, row, some, states, purges=purges)
        )

    async def pause(self, queue: str, *, paused: bool) -> None:
        """Stop or resume deliveries."""
        await self._change(lambda books: operators.pause(books, books.row(queue), paused=paused))

    async def pause_group(self, queue: str, group: str, *, paused: bool) -> None:
        """Halt a group, or let it go on."""
        work = operators.halt_group if paused else operators.resume_group
        await self._change(lambda books: work(books, books.row(queue), group))

    async def report(self, state: str) -> None:
        """Write down how this process is doing, once it receives."""
        lessee = self._beside.lessee
        if lessee is not NOBODY:
            await self._change(lambda books: processes.report(books, lessee.process, state))

    async def doctor(self) -> list[Finding]:
        """Examine the file and say what an operator should know."""
        return await self._look_up(lambda books: examine(books, self._hold))

    async def _chosen(
        self, queue: str, states: Sequence[State], ids: Sequence[str] | None, limit: int | None
    ) -> Sequence[int]:
        """Return the numbers of the messages that a command is about: fixed when it begins, or it might never end."""
        until = await self._let_expire()
        most = ALL if limit is None else limit
        return await self._look_up(lambda books: operators.chosen(books, books.row(queue), states, ids, most), until)

    async def _in_slices(
        self, queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int]
    ) -> int:
        """Change many messages in transactions of a bounded size: others get their turns in between."""
        with Tally() as tally:
            for first in range(0, len(numbers), SLICE):
                tally.done += await self._change(partial(_slice, queue, numbers[first : first + SLICE], work))
        return tally.done

    async def _let_expire(self) -> float:
        """Let what is expired go where nobody received and saw to it; while the file is locked, it is still shown.

        Return by when (monotonic) the operator's look must have begun: both together have the limit of one call.
        """
        now = time.monotonic()
        until, slices = now + files.BUSY_TIMEOUT, EXPIRED_SLICES_MAX
        soon = min(until, now + EXPIRED_WITHIN)
        with suppress(EngineUnavailable):
            for queue in await self._look_up(operators.outlived, soon):
                while slices and await self._change(partial(_expired, queue), soon):
                    slices -= 1
        return until


def _slice(
    queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int], books: Books
) -> int:
    return work(books, books.row(queue), numbers)


def _expired(queue: str, books: Books) -> int:
    row = books.legible(queue)
    return 0 if row is None else moves.let_expire(books, row)
