"""Group commit: concurrent calls become one batch, one transaction, one flush of the disk.

While a batch commits, new operations gather; the next batch takes them all. Nobody waits for company: a lone operation
leaves on the next turn of the event loop, together with whatever others joined it during this one. But an engine that
must wait for its own turn takes, when it comes, whatever has gathered by then: the longer the wait, the larger the
batch.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

from msgspec.structs import replace

from filao.engine import Abandoned, Batch, Engine, Operation, Receive, Received, Result
from filao.errors import EngineUnavailable, FilaoError
from filao.guarded import failure_of
from filao.observing import Observers, Results

BATCH_MAX = 1_000  # operations in one transaction: some 20 ms of the write lock, and a bound on what a failure repeats

Execute = Callable[[Batch], Awaitable[Sequence["Result | asyncio.Future[Result]"]]]
R = TypeVar("R")
_Entry = tuple[Operation, "asyncio.Future[Result]"]


class Batcher:
    """Gathers operations and hands them to an engine's `execute`, to as many batches at once as that does.

    It is written with callbacks: a task of its own would cost a lone operation two more turns of the loop.
    """

    def __init__(
        self, execute: Execute, abandoned: Abandoned, concurrent_batches: int = 1, observers: Observers | None = None
    ) -> None:
        self._execute = execute
        self._observers = Observers() if observers is None else observers
        self._abandoned = abandoned
        self._concurrent_batches = concurrent_batches
        self._loop: asyncio.AbstractEventLoop | None = None
        """The loop of the first operation, and so of all. It is kept because `get_running_loop` costs a system call
        before Python 3.12.
        """
        self._gathered: deque[_Entry] = deque()
        self._suspects: deque[_Entry] = deque()
        """Operations of a batch that failed and was undone: each is done again alone, so that it fails alone."""
        self._gathered_since = 0.0
        """When the first of those that gather came to an empty line, by the loop's clock."""
        self._asked_since = math.inf
        """The earliest `since` of those that gather: some have waited elsewhere before."""
        self.had_company: bool = False
        """Whether the last batch had more than one operation. Read by any thread."""
        self._is_called = False
        """Whether the loop will begin a batch on its next turn."""
        self._doing: set[asyncio.Future[Sequence[Result | asyncio.Future[Result]]]] = set()
        self._late: set[asyncio.Future[Result]] = set()
        """Results that come after those of their batch."""
        self._idle: list[asyncio.Future[None]] = []

    def submit(self, operation: Operation, since: float | None = None) -> "asyncio.Future[Result]":
        """Return the future result; when the operation results in a `FilaoError`, the future raises it.

        The batch's time counts from when its caller asked: now, or at `since` by the loop's clock.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if not self._gathered:
            self._gathered_since = loop.time()
        if since is not None and since < self._asked_since:
            self._asked_since = since
        if not self._is_called and len(self._doing) < self._concurrent_batches:
            loop.call_soon(self._begin)  # on the next turn, with whatever else is submitted during this one
            self._is_called = True  # last: the stack may end in `call_soon`, and then nothing was called or gathered
        self._gathered.append((operation, future))
        return future

    def is_idle(self) -> bool:
        """Return whether nothing waits for a batch. For any thread."""
        return not self._gathered and not self._suspects

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        if self._is_called or self._doing or self._late:
            done = asyncio.get_running_loop().create_future()
            self._idle.append(done)
            await done

    def _begin(self, behind: float | None = None) -> None:
        """Let the engine do what has gathered, or rest; `behind`: when the batch began that has just ended.

        Operations that gathered during a batch have waited since it began, and the engine counts that time. Those that
        a full batch left in line wait longer, but only the time since the last batch began counts.
        """
        self._is_called = False
        waiting = self._suspects or self._gathered
        if len(self._doing) >= self._concurrent_batches:
            return  # a batch that is under way begins the next when it ends
        if waiting:
            receives = sum(isinstance(operation, Receive) for operation, _ in waiting)
            taken: list[_Entry] = []
            loop = self._loop or asyncio.get_running_loop()
            take = partial(self._take, loop, taken)
            began, now = time.perf_counter(), loop.time()
            since = now if behind is None or self._suspects else max(behind, self._gathered_since)
            since, self._asked_since = min(since, self._asked_since), math.inf
            doing = asyncio.ensure_future(self._execute(Batch(receives > 0, receives < len(waiting), take, since)))
            self._doing.add(doing)
            doing.add_done_callback(partial(self._finish, taken, began, now))
        elif not self._doing and not self._late:
            for idle in self._idle:
                if not idle.done():
                    idle.set_result(None)
            self._idle.clear()

    def _take(
        self, loop: asyncio.AbstractEventLoop, taken: list[_Entry], accept: Callable[[Operation], bool]
    ) -> list[Operation]:
        """Take the next batch, in order, up to the first operation that is not accepted; leave out cancelled ones.

        The engine calls it in any thread once it can begin, so that what came while it waited comes along. Nothing but
        the two queues is touched here, because the loop goes on meanwhile.
        """
        waiting = self._suspects or self._gathered
        size = 1 if self._suspects else BATCH_MAX
        while waiting and len(taken) < size and accept(waiting[0][0]):
            entry = waiting.popleft()
            if not entry[1].cancelled():
                taken.append(entry)
        if waiting and self._concurrent_batches > 1:  # the rest need not wait for this batch
            loop.call_soon_threadsafe(self._begin)
        return [operation for operation, _ in taken]

    def _finish(
        self,
        entries: list[_Entry],
        began: float,
        at: float,
        done: "asyncio.Future[Sequence[Result | asyncio.Future[Result]]]",
    ) -> None:
        """Give each caller its result, and begin the next batch."""
        self._doing.discard(done)
        self.had_company = len(entries) > 1
        error = failure_of(done)
        if error is None:
            self._hand_out(entries, done.result(), began)
        elif len(entries) > 1 and not isinstance(error, EngineUnavailable):
            self._suspects.extend(entries)
        else:
            # Without the storage all fail alike, and nothing is done twice, because some of it may have been stored.
            self._fail(entries or self._never_begun(), error, began)
        self._begin(at)

    def _hand_out(
        self, entries: list[_Entry], results: "Sequence[Result | asyncio.Future[Result]]", began: float
    ) -> None:
        """Give each caller its result; one that comes later is given then."""
        if self._observers.tracers:
            results = self._timed(results, began)
        for entry, result in zip(entries, results, strict=True):
            future = entry[1]
            if isinstance(result, asyncio.Future):
                self._late.add(result)
                result.add_done_callback(partial(self._finish_late, entry, began))
            elif future.done() or isinstance(result, FilaoError):
                self._deliver(future, result)
            else:
                future.set_result(result)
        if self._observers.all:  # before the callers: a future calls them back on the loop's next turn
            self._tell(entries, results, began)

    def _fail(self, entries: list[_Entry], error: BaseException, began: float) -> None:
        """Give each caller the error with which its batch failed."""
        if self._observers.all:
            self._tell(entries, [error] * len(entries), began)
        for _, future in entries:
            if not future.done():
                future.set_exception(error)

    def _finish_late(self, entry: _Entry, began: float, late: "asyncio.Future[Result]") -> None:
        """Give a caller its result, which came after those of its batch."""
        self._late.discard(late)
        error = failure_of(late)
        if error is not None and not isinstance(error, FilaoError):  # an unforeseen one
            if not entry[1].done():
                entry[1].set_exception(error)
        else:
            results: Sequence[Result] = [late.result() if error is None else error]
            if self._observers.tracers:
                results = self._timed(results, began)
            if self._observers.all:
                self._tell([entry], results, began)
            self._deliver(entry[1], results[0])
        if not self._is_called and not self._doing:
            self._begin()

    def _timed(self, results: Sequence[R], began: float) -> list[R]:
        """Return the results; those that received something say how long the look for it took."""
        took = time.perf_counter() - began
        return [replace(one, took=took) if isinstance(one, Received) and one.deliveries else one for one in results]

    def _tell(self, entries: Sequence[_Entry], results: Results, began: float) -> None:
        self._observers.operated([operation for operation, _ in entries], results, time.perf_counter() - began)

    def _deliver(self, future: "asyncio.Future[Result]", result: Result) -> None:
        if future.done():
            self._abandoned(result)
        elif isinstance(result, FilaoError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _never_begun(self) -> list[_Entry]:
        """Take all operations for which the engine could not even begin, so that nobody waits for a second try."""
        waiting = self._suspects or self._gathered
        return [waiting.popleft() for _ in range(len(waiting))]


@runtime_checkable
class Confirming(Protocol):
    """An engine some of whose operations take long and must not delay the others: each kind has its own batches."""

    def needs_confirm(self, operation: Operation) -> bool:
        """Return whether an operation waits for a confirm of the storage; the others are done at once, in order."""
        ...

    def execute_confirmed(self, batch: Batch) -> Awaitable[Sequence["Result | asyncio.Future[Result]"]]:
        """Do the operations that need a confirm, as `Engine.execute` does the others."""
        ...


class TwoLines:
    """Two batchers, so that nothing else waits behind operations that must be confirmed."""

    def __init__(self, needs_confirm: Callable[[Operation], bool], confirmed: Batcher, rest: Batcher) -> None:
        self._needs_confirm = needs_confirm
        self._confirmed = confirmed
        self._rest = rest

    def submit(self, operation: Operation, since: float | None = None) -> "asyncio.Future[Result]":
        """Return the future result, as `Batcher.submit`."""
        return (self._confirmed if self._needs_confirm(operation) else self._rest).submit(operation, since)

    def is_idle(self) -> bool:
        """Return whether both batchers are idle."""
        return self._confirmed.is_idle() and self._rest.is_idle()

    @property
    def had_company(self) -> bool:
        """Whether a last batch had more than one operation."""
        return self._confirmed.had_company or self._rest.had_company

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        await self._confirmed.drain()
        await self._rest.drain()  # last, because messages that nobody waits for any more are given back in it


def batcher_of(engine: Engine, abandoned: Abandoned, observers: Observers) -> Batcher | TwoLines:
    """Return the batcher of an engine, or its two."""
    most = engine.concurrent_batches
    batcher = Batcher(engine.execute, abandoned, most, observers)
    if not isinstance(engine, Confirming):
        return batcher
    return TwoLines(engine.needs_confirm, Batcher(engine.execute_confirmed, abandoned, most, observers), batcher)
