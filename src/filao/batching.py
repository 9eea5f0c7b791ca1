"""Group commit: concurrent calls become one batch, one transaction, one flush of the disk.

While a batch commits, new operations gather; the next batch takes them all. Nobody waits for company: a lone operation
leaves on the next turn of the event loop, together with whatever others joined it during this one.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from filao.engine import Operation, Result
from filao.errors import EngineUnavailable, FilaoError

BATCH_MAX = 1_000  # operations in one transaction: some 20 ms of the write lock, and a bound on what a failure repeats

Execute = Callable[[Sequence[Operation]], Awaitable[list[Result]]]
Abandoned = Callable[[Result], None]
_Entry = tuple[Operation, "asyncio.Future[Result]"]


class Batcher:
    """Gathers operations and hands them to an engine's `execute`."""

    def __init__(self, execute: Execute, abandoned: Abandoned) -> None:
        self._execute = execute
        self._abandoned = abandoned
        """Told the result of an operation whose caller was cancelled while it was being done."""
        self._gathered: deque[_Entry] = deque()
        self._runner: asyncio.Task[None] | None = None

    def submit(self, operation: Operation) -> "asyncio.Future[Result]":
        """Return the future result; a `FilaoError` that is the operation's result is raised by it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._gathered.append((operation, future))
        if self._runner is None:
            self._runner = loop.create_task(self._run())
        return future

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        while self._runner is not None:
            await asyncio.wait([self._runner])

    async def _run(self) -> None:
        try:
            while self._gathered:
                entries = self._take()
                if entries:
                    await self._do(entries)
        finally:
            self._runner = None

    def _take(self) -> list[_Entry]:
        """Take the next batch; operations whose callers went away before it began are left out."""
        size = min(BATCH_MAX, len(self._gathered))
        taken = (self._gathered.popleft() for _ in range(size))
        return [entry for entry in taken if not entry[1].cancelled()]

    async def _do(self, entries: list[_Entry]) -> None:
        try:
            results = await self._execute([operation for operation, _ in entries])
        except Exception as error:
            await self._recover(entries, error)
            return
        for (_, future), result in zip(entries, results, strict=True):
            if future.done():
                self._abandoned(result)
            elif isinstance(result, FilaoError):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def _recover(self, entries: list[_Entry], error: Exception) -> None:
        """After a batch failed and was undone, do its operations one by one, so that each failure finds its own caller.

        Not when the storage itself is away: then all fail alike, and whether they were stored may be in doubt.
        """
        if len(entries) > 1 and not isinstance(error, EngineUnavailable):
            for entry in entries:
                await self._do([entry])
            return
        for _, future in entries:
            if not future.done():
                future.set_exception(error)
