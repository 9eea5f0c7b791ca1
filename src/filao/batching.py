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
        """That of the first operation, and so of all: asking for the running one costs a system call before Python
        3.12.
        """
        self._gathered: deque[_Entry] = deque()
        self._suspects: deque[_Entry] = deque()
        """Operations of a batch that failed and was undone: each is done again alone, so that it fails alone."""
        self._gathered_since = 0.0
        """When the first came to an empty line, by the loop's clock."""
        self._asked_since = math.inf
        """When the first asked of those in line who have waited elsewhere before."""
        self._had_company = False
        self._is_called = False
        """The loop will begin a batch on its next turn."""
        self._doing: set[asyncio.Future[Sequence[Result | asyncio.Future[Result]]]] = set()
        self._late: set[asyncio.Future[Result]] = set()
        """Results that come after those of their batch."""
        self._idle: list[asyncio.Future[None]] = []

    def submit(self, operation: Operation, since: float | None = None) -> "asyncio.Future[Result]":
        """Return the future result; a `FilaoError` that is the operation's result is raised by it.

        The batch's time counts from when its caller asked, which is now or, by the loop's clock, `since` then.
        """
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        if not self._gathered:
            self._gathered_since = loop.time()
        if since is not None and since < self._asked_since:
            self._asked_since = since
        self._gathered.append((operation, future))
        if not self._is_called and len(self._doing) < self._concurrent_batches:
            self._is_called = True
            loop.call_soon(self._begin)  # on the next turn, with whatever else is submitted during this one
        return future

    def is_idle(self) -> bool:
        """Return whether nothing waits for its batch, and what came last came alone; from any thread.

        Those who shared a batch a moment ago will come together again: one that goes ahead alone keeps them waiting.
        """
        return not self._gathered and not self._suspects and not self._had_company

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        if self._is_called or self._doing or self._late:
            done = asyncio.get_running_loop().create_future()
            self._idle.append(done)
            await done

    def _begin(self, behind: float | None = None) -> None:
        """Let the engine do what has gathered, or rest; `behind`: when the batch began that has just ended.

        Who gathered during a batch has waited since then, and the engine counts that. What a full batch left in line
        waits on, for as long as batches are done: it counts from the beginning of the last.
        """
        self._is_called = False
        waiting = self._suspects or self._gathered
        if len(self._doing) >= self._concurrent_batches:
            return  # the batch that ends will begin the next: here, somebody was called back while it ended
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
        """Take the next batch, in order, up to what is not accepted; those that were cancelled before are left out.

        The engine calls it, in whatever thread, once it can begin: what came while it waited for that comes along.
        Nothing but the two queues is touched here, because the loop goes on meanwhile.
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
        self._had_company = len(entries) > 1
        error = EngineUnavailable("the broker was closed meanwhile") if done.cancelled() else done.exception()
        if error is None:
            results = self._timed(done.result(), began) if self._observers.tracers else done.result()
            for (operation, future), result in zip(entries, results, strict=True):
                if isinstance(result, asyncio.Future):
                    self._late.add(result)
                    result.add_done_callback(partial(self._finish_late, (operation, future), began))
                elif future.done() or isinstance(result, FilaoError):
                    self._deliver(future, result)
                else:
                    future.set_result(result)
            if self._observers.all:  # before anybody hears of it: a result is heard of on the next turn
                self._tell(entries, results, began)
        elif len(entries) > 1 and not isinstance(error, EngineUnavailable):
            self._suspects.extend(entries)
        else:
            # With the storage away all fail alike, and as it is in doubt what was stored, nothing is done twice.
            failed = entries or self._never_begun()
            if self._observers.all:
                self._tell(failed, [error] * len(failed), began)
            for _, future in failed:
                if not future.done():
                    future.set_exception(error)
        self._begin(at)

    def _finish_late(self, entry: _Entry, began: float, late: "asyncio.Future[Result]") -> None:
        """Give a caller its result, which came after those of its batch; late is whatever ended it."""
        self._late.discard(late)
        error = EngineUnavailable("the broker was closed meanwhile") if late.cancelled() else late.exception()
        if error is not None and not isinstance(error, FilaoError):  # which nobody foresaw
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
        """Let what was received say how long the look for it took."""
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
        """Take back all for whom the engine could not even begin: so nobody waits for longer than it tries once."""
        waiting = self._suspects or self._gathered
        return [waiting.popleft() for _ in range(len(waiting))]


@runtime_checkable
class Confirming(Protocol):
    """What an engine has that must keep some operations from waiting for others: two lines, each with its batches."""

    def needs_confirm(self, operation: Operation) -> bool:
        """Return whether an operation takes as long as the storage likes; the others are done at once, and in order."""
        ...

    def execute_confirmed(self, batch: Batch) -> Awaitable[Sequence["Result | asyncio.Future[Result]"]]:
        """Do what needs a confirm; else as `Engine.execute`, which does the rest."""
        ...


class TwoLines:
    """Two batchers: behind what must be confirmed nothing else waits."""

    def __init__(self, needs_confirm: Callable[[Operation], bool], confirmed: Batcher, rest: Batcher) -> None:
        self._needs_confirm = needs_confirm
        self._confirmed = confirmed
        self._rest = rest

    def submit(self, operation: Operation, since: float | None = None) -> "asyncio.Future[Result]":
        """Return the future result, as `Batcher.submit`."""
        return (self._confirmed if self._needs_confirm(operation) else self._rest).submit(operation, since)

    def is_idle(self) -> bool:
        """Return whether both are."""
        return self._confirmed.is_idle() and self._rest.is_idle()

    async def drain(self) -> None:
        """Wait until everything that was submitted has been done."""
        await self._confirmed.drain()
        await self._rest.drain()  # the last: what nobody waits for any more is given back in this one


def batcher_of(engine: Engine, abandoned: Abandoned, observers: Observers) -> Batcher | TwoLines:
    """Return what gathers operations for an engine."""
    most = engine.concurrent_batches
    batcher = Batcher(engine.execute, abandoned, most, observers)
    if not isinstance(engine, Confirming):
        return batcher
    return TwoLines(engine.needs_confirm, Batcher(engine.execute_confirmed, abandoned, most, observers), batcher)


def look_away(future: "asyncio.Future[Result]") -> None:
    """Take the error of an operation that nobody waits for."""
    if not future.cancelled():
        future.exception()
