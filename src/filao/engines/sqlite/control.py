"""What operators see and do, from the event loop.

Each call is work for the database's thread, in transactions of a bounded size, between which others have their turns.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from filao.engine import Draft, Event, Finding, QueueStats, State, StoredMessage
from filao.engines.sqlite import files, moves, operators, processes
from filao.engines.sqlite.books import Books, QueueRow
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.doctor import examine
from filao.engines.sqlite.hold import Hold
from filao.engines.sqlite.jobs import Jobs
from filao.engines.sqlite.receive import NOBODY
from filao.engines.sqlite.stats import stats
from filao.errors import EngineUnavailable
from filao.queue import Queue
from filao.slices import Tally

SLICE = 2_000  # messages that operators change in one transaction: some 20 ms of the write lock
EXPIRED_SLICES_MAX = 20  # of 5,000 expired messages each, that a look ends first, in a second; the rest end later
EXPIRED_WITHIN = 5.0  # seconds that a look waits for that, if a transaction keeps the file locked
ALL = 2**62


class SqliteOperators:
    """See `filao.engine.Operators`; it is also their `Pausing` and `Tracing`."""

    def __init__(self, hold: Hold, beside: Database, jobs: Jobs) -> None:
        self._hold = hold
        self._beside = beside
        self._jobs = jobs

    @property
    def pausing(self) -> Self:
        """Return itself."""
        return self

    @property
    def tracing(self) -> Self:
        """Return itself."""
        return self

    async def trace(self, message_id: str) -> list[Event]:
        """Return what happened to the messages with this id."""
        return await self._jobs.look_up(lambda books: operators.trace(books, message_id))

    async def queues(self) -> list[Queue]:
        """Return every declared queue with its rules, by name."""
        return await self._jobs.look_up(lambda books: operators.queues(books.db))

    async def delete(self, queue: str) -> int:
        """Delete a queue that holds no message."""
        return await self._jobs.change(lambda books: operators.delete(books, books.row(queue)))

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Read the counters of every queue, or of one."""
        until = await self._let_expire()
        return await self._jobs.look_up(lambda books: stats(books, queue), until)

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages of one state in its order."""
        until = await self._let_expire()
        return await self._jobs.look_up(
            lambda books: operators.peek(books, books.row(queue), state, limit, after), until
        )

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
        await self._jobs.change(lambda books: operators.pause(books, books.row(queue), paused=paused))

    async def pause_group(self, queue: str, group: str, *, paused: bool) -> None:
        """Halt a group, or let it go on."""
        work = operators.halt_group if paused else operators.resume_group
        await self._jobs.change(lambda books: work(books, books.row(queue), group))

    async def report(self, state: str) -> None:
        """Record how this process is doing, once it receives."""
        lessee = self._beside.lessee
        if lessee is not NOBODY:
            await self._jobs.change(lambda books: processes.report(books, lessee.process, state))

    async def doctor(self) -> list[Finding]:
        """Examine the file and say what an operator should know."""
        return await self._jobs.look_up(lambda books: examine(books, self._hold))

    async def _chosen(
        self, queue: str, states: Sequence[State], ids: Sequence[str] | None, limit: int | None
    ) -> Sequence[int]:
        """Return the numbers of the messages that a command will touch, fixed now so that the command ends."""
        until = await self._let_expire()
        most = ALL if limit is None else limit
        return await self._jobs.look_up(
            lambda books: operators.chosen(books, books.row(queue), states, ids, most), until
        )

    async def _in_slices(
        self, queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int]
    ) -> int:
        """Change many messages in transactions of a bounded size, so that others get their turns in between."""
        with Tally() as tally:
            for first in range(0, len(numbers), SLICE):
                tally.done += await self._jobs.change(partial(_slice, queue, numbers[first : first + SLICE], work))
        return tally.done

    async def _let_expire(self) -> float:
        """End what has expired, where no receive has done so; if the file is locked, it is still shown.

        Return by when (monotonic) the operator's look must begin: both together have the time limit of one call.
        """
        now = time.monotonic()
        until, slices = now + files.BUSY_TIMEOUT, EXPIRED_SLICES_MAX
        soon = min(until, now + EXPIRED_WITHIN)
        with suppress(EngineUnavailable):
            for queue in await self._jobs.look_up(operators.outlived, soon):
                while slices and await self._jobs.change(partial(_expired, queue), soon):
                    slices -= 1
        return until


def _slice(
    queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int], books: Books
) -> int:
    return work(books, books.row(queue), numbers)


def _expired(queue: str, books: Books) -> int:
    row = books.legible(queue)
    return 0 if row is None else moves.let_expire(books, row)
