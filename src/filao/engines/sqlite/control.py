"""What operators see and do, from the event loop: each call is work for the database's thread, in transactions of a
bounded size, between which others have their turns.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, Self, TypeVar

from filao.engine import Draft, Event, Finding, QueueStats, State, StoredMessage
from filao.engines.sqlite import moves, operators, processes
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
ALL = 2**62


class Worked(Protocol):
    """Has work done on the file, in the database's thread."""

    async def __call__(self, work: Callable[[Books], R]) -> R:
        """Return what it comes to."""
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
        await self._let_expire()
        return await self._look_up(lambda books: stats(books, queue))

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages of one state in its order."""
        await self._let_expire()
        return await self._look_up(lambda books: operators.peek(books, books.row(queue), state, limit, after))

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
        await self._let_expire()
        most = ALL if limit is None else limit
        return await self._look_up(lambda books: operators.chosen(books, books.row(queue), states, ids, most))

    async def _in_slices(
        self, queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int]
    ) -> int:
        """Change many messages in transactions of a bounded size: others get their turns in between."""
        with Tally() as tally:
            for first in range(0, len(numbers), SLICE):
                tally.done += await self._change(partial(_slice, queue, numbers[first : first + SLICE], work))
        return tally.done

    async def _let_expire(self) -> None:
        """Let what is expired go where nobody received and saw to it; while the file is locked, it is still shown."""
        slices = EXPIRED_SLICES_MAX
        with suppress(EngineUnavailable):
            for queue in await self._look_up(operators.outlived):
                while await self._change(partial(_expired, queue)):
                    slices -= 1
                    if not slices:
                        return


def _slice(
    queue: str, numbers: Sequence[int], work: Callable[[Books, QueueRow, Sequence[int]], int], books: Books
) -> int:
    return work(books, books.row(queue), numbers)


def _expired(queue: str, books: Books) -> int:
    return moves.let_expire(books, books.row(queue))
