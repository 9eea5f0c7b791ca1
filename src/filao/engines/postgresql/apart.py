"""Operations that wait for a lock that another transaction holds, apart from the batches, which go on meanwhile.

A batch waits for a lock only briefly. If it cannot have it, nothing of the batch is done, and those of its operations
that may need a lock come here. On a connection of their own they are tried again, together and by halves, until the
lock is free or their time is over. So a key, a group or a full queue that a transaction holds stops only what needs it.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from psycopg.errors import LockNotAvailable

from filao.engine import Operation, Result
from filao.engines.postgresql.links import Link
from filao.engines.postgresql.server import LOCKED_FOR, Connection, Server, end_of_call
from filao.errors import EngineUnavailable

LOCKED_APART = 0.05  # seconds that a try waits for a lock
TRIES_MAX = 32  # in one round, which so takes 1.6 s at most; what came meanwhile has its turn in the next
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
    """The waiting operations of one process, in the order in which they came."""

    def __init__(self, server: Server, do: Do) -> None:
        self._server = server
        self._link = Link(server, LOCKED_APART)
        self._do = do
        self._waiting: deque[_Waiting] = deque()
        self._queues: Counter[str] = Counter()
        self._running: asyncio.Task[None] | None = None
        self._is_answered = True
        """Whether the server answered the last try: if so, what is not done yet lacks a lock."""

    def has(self, queue: str) -> bool:
        """Return whether an operation on a queue waits here, so that others that may need its lock follow it."""
        return self._queues[queue] > 0

    def add(self, operation: Operation, since: float) -> "asyncio.Future[Result]":
        """Do an operation as soon as its locks are free; it fails when they are not free in time.

        It has waited with its batch since `since`, which counts: it has what is left of its time.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        until = min(loop.time() + LOCKED_FOR, end_of_call(since) - LAST_TRY)
        self._waiting.append(_Waiting(operation, result, since, until))
        self._queues[operation.queue] += 1
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        return result

    async def close(self) -> None:
        """Let all operations that wait here fail."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        for waiting in self._waiting:
            self._settle(waiting, EngineUnavailable("the broker was closed meanwhile"))
        self._waiting.clear()
        await self._link.close()

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(TOGETHER_MAX, len(self._waiting)))]
            try:
                await self._round(taken)
            finally:  # when cancelled, `close` lets those without a result fail
                self._waiting.extend(waiting for waiting in taken if not waiting.result.done())

    async def _round(self, taken: list[_Waiting]) -> None:
        """Try these operations together and, if not all can be done, each half, as far as a round goes."""
        parts = [taken]
        for _ in range(TRIES_MAX):
            if not parts:
                return
            part = [waiting for waiting in parts.pop() if not self._is_over(waiting)]
            if part and not await self._try(part) and len(part) > 1:
                half = len(part) // 2
                parts += [part[half:], part[:half]]

    def _is_over(self, waiting: _Waiting) -> bool:
        if not waiting.result.cancelled() and asyncio.get_running_loop().time() < waiting.until:
            return False
        if self._is_answered:
            self._settle(waiting, self._server.engine_error(LockNotAvailable("a lock was not free in time")))
        else:
            self._settle(waiting, self._server.unanswered(begun=False))
        return True

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
            if len(part) > 1 and not isinstance(error, EngineUnavailable):
                return False  # one of them is at fault, and must fail alone
            results = [error] * len(part)
        for waiting, result in zip(part, results, strict=True):
            self._settle(waiting, result)
        return True

    def _settle(self, waiting: _Waiting, result: Result | Exception) -> None:
        self._queues[waiting.operation.queue] -= 1
        if waiting.result.done():
            return
        if isinstance(result, Exception):
            waiting.result.set_exception(result)
        else:
            waiting.result.set_result(result)
