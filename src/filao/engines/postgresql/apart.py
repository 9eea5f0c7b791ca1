"""Operations that wait for a lock that another transaction holds, apart from the batches, which go on meanwhile.

A batch waits for a lock only briefly. If it cannot have it, nothing of the batch is done, and those of its operations
that may need a lock come here. On a connection of their own they are tried again, together and by halves, until the
lock is free or their time is over. So a key, a group or a full queue that a transaction holds stops only what needs it.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from psycopg.errors import LockNotAvailable

from filao.engine import Operation, Result
from filao.engines.postgresql.links import Link
from filao.engines.postgresql.server import LOCKED_FOR, Connection, Server, end_of_call
from filao.engines.postgresql.verbs import Lock
from filao.errors import EngineUnavailable, FilaoError

LOCKED_APART = 0.05  # seconds that a try waits for a lock
TOGETHER_MAX = 1_000  # operations in one try
LAST_TRY = 0.5  # seconds kept for the last try of a call: one that is cut short would leave in doubt what was done

Do = Callable[[Connection, Sequence[Operation]], Awaitable[list[Result]]]


@dataclass(eq=False, slots=True)
class _Waiting:
    operation: Operation
    result: "asyncio.Future[Result]"
    since: float
    """When its batch began to wait."""
    until: float


class Apart:
    """The waiting operations of one process, by the locks that each may need, in the order in which they came.

    Those that may need the same are tried together, and are not parted. A try of several locks that fails is made again
    by halves, behind all that are to be tried: so what is free is soon done, however many wait for what is held.
    """

    def __init__(self, server: Server, do: Do) -> None:
        self._server = server
        self._link = Link(server, LOCKED_APART)
        self._do = do
        self._waiting: dict[Lock, list[_Waiting]] = {}
        self._new: list[Lock] = []
        """What came since the last try, and is tried next: most of it lacks nothing."""
        self._parts: deque[list[Lock]] = deque()
        """What is tried then; when there is no part left, all are tried together again."""
        self._queues: Counter[str] = Counter()
        self._running: asyncio.Task[None] | None = None
        self._is_answered = True
        """Whether the server answered the last try: if so, what is not done yet lacks a lock."""

    def has(self, queue: str) -> bool:
        """Return whether an operation on a queue waits here, so that others that may need its lock follow it."""
        return self._queues[queue] > 0

    def add(self, operation: Operation, lock: Lock, since: float) -> "asyncio.Future[Result]":
        """Do an operation as soon as what it may need is free; it fails when that is not free in time.

        It has waited with its batch since `since`, which counts: it has what is left of its time.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        until = min(loop.time() + LOCKED_FOR, end_of_call(since) - LAST_TRY)
        if lock not in self._waiting:
            self._waiting[lock] = []
            self._new.append(lock)
        self._waiting[lock].append(_Waiting(operation, result, since, until))
        self._queues[operation.queue] += 1
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        return result

    async def close(self) -> None:
        """Let all operations that wait here fail."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        for waiting in self._all(self._waiting):
            self._answer(waiting, EngineUnavailable("the broker was closed meanwhile"))
        self._sweep()
        await self._link.close()

    async def _run(self) -> None:
        while self._waiting:
            part = [lock for lock in self._next() if lock in self._waiting]
            if part and not await self._try(self._all(part)[:TOGETHER_MAX]) and len(part) > 1:
                half = len(part) // 2
                self._parts += [part[:half], part[half:]]
            self._sweep()

    def _next(self) -> list[Lock]:
        if self._new:
            new, self._new = self._new, []
            return new
        return self._parts.popleft() if self._parts else list(self._waiting)

    def _all(self, locks: Iterable[Lock]) -> list[_Waiting]:
        return [waiting for lock in locks for waiting in self._waiting[lock]]

    def _sweep(self) -> None:
        """Let those fail whose time is over, and forget those that are answered, or for which nobody waits any more."""
        now = asyncio.get_running_loop().time()
        for lock, there in list(self._waiting.items()):
            for waiting in there:
                if now >= waiting.until:
                    self._answer(waiting, self._too_late())
            left = [waiting for waiting in there if not waiting.result.done()]
            self._queues[lock[0]] -= len(there) - len(left)
            if left:
                self._waiting[lock] = left
            else:
                del self._waiting[lock]

    def _too_late(self) -> FilaoError:
        if self._is_answered:
            return self._server.engine_error(LockNotAvailable("a lock was not free in time"))
        return self._server.unanswered(begun=False)

    async def _try(self, part: Sequence[_Waiting]) -> bool:
        """Do operations in one transaction; return False when a lock is missing, and nothing was done."""
        operations = [waiting.operation for waiting in part]
        results: Sequence[Result | Exception]
        self._is_answered = True
        try:
            async with self._link.use(min(waiting.since for waiting in part)) as connection:
                try:
                    results = await self._do(connection, operations)
                except LockNotAvailable:
                    return False
        except Exception as error:  # also an unforeseen one: those who wait must learn of it
            self._is_answered = not isinstance(error, EngineUnavailable)
            if len(part) > 1 and self._is_answered:  # one of them is at fault, and must fail alone
                half = len(part) // 2
                return all([await self._try(part[:half]), await self._try(part[half:])])
            results = [error] * len(part)
        for waiting, result in zip(part, results, strict=True):
            self._answer(waiting, result)
        return True

    def _answer(self, waiting: _Waiting, result: Result | Exception) -> None:
        if waiting.result.done():
            return
        if isinstance(result, Exception):
            waiting.result.set_exception(result)
        else:
            waiting.result.set_result(result)
