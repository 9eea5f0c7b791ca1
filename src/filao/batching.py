"""Group commit: concurrent calls become one batch, one transaction, one flush of the disk.

While a batch commits, new operations gather; the next batch takes them all. Nobody waits for company: a lone operation
leaves on the next turn of the event loop, together with whatever others joined it during this one.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from filao.engine import Abandoned, Operation, Result
from filao.errors import EngineUnavailable, FilaoError

BATCH_MAX = 1_000  # operations in one transaction: some 20 ms of the write lock, and a bound on what a failure repeats

Execute = Callable[[Sequence[Operation]], Awaitable[list[Result]]]
_Entry = tuple[Operation, "asyncio.Future[Result]"]


class Batcher:
    """Gathers operations and hands them to an engine's `execute`.

    It is written with callbacks: a task of its own would cost a lone operation two more turns of the loop.
    """

    def __init__(self, execute: Execute, abandoned: Abandoned) -> None:
        self._execute = execute
        self._abandoned = abandoned
        self._gathered: deque[_Entry] = deque()
        self._suspects: deque[_Entry] = deque()
        """Operations of a batch that failed and was undone: each is done again alone, so that it fails alone."""
        self._doing: asyncio.Future[list[Result]] | None = None
        self._busy = False
        self._idle: list[asyncio.Future[None]] = []

    def submit(self, operation: Operation) -> "asyncio.Future[Result]":
        """Return the future result; a `FilaoError` that is the operation's result is raised by it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._gathered.append((operation, future))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._begin)  # on the next turn, with whatever else is submitted during this one
        return future

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        if self._busy:
            done = asyncio.get_running_loop().create_future()
            self._idle.append(done)
            await done

    def _begin(self) -> None:
        """Begin the next batch, or rest."""
        while self._suspects or self._gathered:
            entries = self._take()
            if entries:
                self._do(entries)
                return
        self._busy = False
        for waiting in self._idle:
            if not waiting.done():
                waiting.set_result(None)
        self._idle.clear()

    def _take(self) -> list[_Entry]:
        """Take the next batch; operations whose callers went away before it began are left out."""
        waiting = self._suspects or self._gathered
        size = 1 if self._suspects else min(BATCH_MAX, len(waiting))
        taken = (waiting.popleft() for _ in range(size))
        return [entry for entry in taken if not entry[1].cancelled()]

    def _do(self, entries: list[_Entry]) -> None:
        self._doing = asyncio.ensure_future(  # noqa: RUF006 - it is stored, and there is one at a time
            self._execute([operation for operation, _ in entries])
        )
        self._doing.add_done_callback(partial(self._finish, entries))

    def _finish(self, entries: list[_Entry], done: "asyncio.Future[list[Result]]") -> None:
        """Give each caller its result, and begin the next batch."""
        error = EngineUnavailable("the broker was closed meanwhile") if done.cancelled() else done.exception()
        if error is None:
            for (_, future), result in zip(entries, done.result(), strict=True):
                if future.done():
                    self._abandoned(result)
                elif isinstance(result, FilaoError):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        elif len(entries) == 1 or isinstance(error, EngineUnavailable):
            # With the storage away all fail alike, and as it is in doubt what was stored, nothing is done twice.
            for _, future in entries:
                if not future.done():
                    future.set_exception(error)
        else:
            self._suspects.extend(entries)
        self._begin()
