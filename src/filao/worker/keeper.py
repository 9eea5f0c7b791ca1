"""The keeper: it extends the leases of a worker's messages, from a thread, a loop and a connection of its own.

So neither a handler that blocks the event loop nor one that keeps the interpreter busy loses its lease. Invariant: it
extends what it was given and what was not let go, and nothing else; a run is let go when it ends, however that happens.
So no message is kept that nobody works on.

When a third of a lease has passed, it is extended, together with all others that are due. The keeper also reports to
the doctor, in a task of its own: if the storage makes one of the two wait, the other goes on. On an engine without a
second connection for the same leases, it runs on the worker's loop.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol

from filao.engine import Delivery
from filao.errors import ConfigurationError, FilaoError, LeaseLost
from filao.process import check_loops, start
from filao.session import Session
from filao.worker.outage import Outages, pauses

TICKS_PER_LEASE = 6  # looks during the shortest lease, which is extended when a third of it has passed
TICK_MAX = 1.0  # seconds between looks
REPORT_EVERY = 5.0  # seconds between reports for the doctor
OPENS_WITHIN = 5.0  # seconds that a starting worker waits for the keeper's connection, which may come later
STOPS_WITHIN = 5.0  # seconds for the thread to end; one that waits for the storage is left to itself


class Kept(Protocol):
    """What the keeper knows of a message that is being worked on."""

    delivery: Delivery
    lease: float
    """Seconds by which each extension extends it."""
    extended_at: float
    """Monotonic time of the receive or of the last extension."""
    keep_until: float
    """Monotonic time after which it must not be kept, because its handler should have ended; it may be infinite."""

    def lose(self) -> None:
        """Learn that the lease is lost. Called on the worker's loop."""


class _StoppedError(Exception):
    """Ends a thread that was told to stop before it had a loop."""


class Keeper:
    """Keeps the messages that it is given until they are let go."""

    def __init__(self, session: Session, lease_min: float, state: Callable[[], str]) -> None:
        self._state = state
        self._tick = max(0.02, min(TICK_MAX, lease_min / TICKS_PER_LEASE))
        self._worker_loop = asyncio.get_running_loop()
        self._session = session
        self._kept: dict[int, Kept] = {}
        self._outages = Outages()
        self._stopped = threading.Event()
        self._stop: Callable[[], object] = self._stopped.set
        self._ended: asyncio.Future[None] = self._worker_loop.create_future()

    # --- on the worker's loop ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the thread and connect it before any handler runs, which may keep the interpreter busy.

        Raises `EngineUnavailable` when no thread can be started, and `ConfigurationError` when it is a greenlet, which
        can have no loop of its own: no lease would be kept.
        """
        sibling = self._session.sibling()
        if sibling is None:
            keeping = asyncio.create_task(self._keep_and_report(self._session))
            keeping.add_done_callback(lambda _: self._end())
            self._stop = keeping.cancel
            return
        ready: Future[None] = Future()
        try:
            start(threading.Thread(target=self._run, args=(sibling, ready), name="filao keeper", daemon=True))
        except FilaoError:
            self._end()
            raise
        opened = asyncio.wrap_future(ready)
        await asyncio.wait([opened], timeout=OPENS_WITHIN)
        if opened.done():
            opened.result()

    async def stop(self) -> None:
        """Let everything go, and end the thread."""
        self._kept.clear()
        self._stopped.set()
        self._stop()
        await asyncio.wait([self._ended], timeout=STOPS_WITHIN)

    def keep(self, kept: Kept) -> None:
        """Extend a message's lease from now on."""
        self._kept[id(kept)] = kept

    def let_go(self, kept: Kept) -> None:
        """Extend a message's lease no longer."""
        self._kept.pop(id(kept), None)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self, sibling: Session, ready: "Future[None]") -> None:
        try:
            check_loops("run the worker in a process whose threads are the system's: one must keep its leases")
            with suppress(_StoppedError), asyncio.Runner(loop_factory=self._loop) as runner:
                runner.run(self._main(sibling, ready))
        except ConfigurationError as error:
            ready.set_exception(error)
        finally:
            _tell(self._worker_loop, self._end)

    def _loop(self) -> asyncio.AbstractEventLoop:
        """Return a loop, as soon as there are file descriptors for one."""
        for pause in pauses():
            try:
                return asyncio.new_event_loop()
            except OSError as error:
                self._outages.fails("starting to extend leases", error)
            if self._stopped.wait(pause):
                break
        raise _StoppedError

    async def _main(self, sibling: Session, ready: "Future[None]") -> None:
        work = asyncio.create_task(self._work(sibling, ready))
        loop = asyncio.get_running_loop()
        self._stop = lambda: _tell(loop, work.cancel)
        if self._stopped.is_set():
            work.cancel()
        await asyncio.wait([work])
        with suppress(FilaoError):
            await sibling.close()

    async def _work(self, sibling: Session, ready: "Future[None]") -> None:
        for pause in pauses():
            try:
                await sibling.open()
                break
            except Exception as error:
                self._outages.fails("connecting to extend leases", error)
            await asyncio.sleep(pause)
        self._outages.is_over("connecting to extend leases")
        ready.set_result(None)
        await self._keep_and_report(sibling)

    async def _keep_and_report(self, session: Session) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep(session))
            tasks.create_task(self._report(session))

    async def _keep(self, session: Session) -> None:
        while self._is_wanted():
            await asyncio.sleep(self._tick)
            due = self._due(time.monotonic())
            if not due:
                continue
            try:
                await self._extend(session, due)
            except Exception as error:
                self._outages.fails("extending leases", error)
            else:
                self._outages.is_over("extending leases")

    async def _report(self, session: Session) -> None:
        while self._is_wanted():
            with suppress(Exception):  # the worker's other calls log that the storage fails
                await session.report(self._state())
            await asyncio.sleep(REPORT_EVERY)

    def _is_wanted(self) -> bool:
        """Return whether the worker may still work: its loop runs, and the keeper was not stopped."""
        return not (self._stopped.is_set() or self._worker_loop.is_closed())

    def _due(self, now: float) -> list[Kept]:
        """Return the messages of whose leases a third will have passed by the next look."""
        late = now + self._tick
        kept = [one for one in list(self._kept.values()) if now < one.keep_until]
        return [one for one in kept if late - one.extended_at >= one.lease / 3]

    async def _extend(self, session: Session, due: Sequence[Kept]) -> None:
        now = time.monotonic()
        failed: BaseException | None = None
        extensions = [session.extend(one.delivery, one.lease) for one in due]
        for one, error in zip(due, await asyncio.gather(*extensions, return_exceptions=True), strict=True):
            if error is None:
                one.extended_at = now
            elif isinstance(error, LeaseLost):
                self._lose(one)
            else:
                failed = error
        if failed is not None:
            raise failed

    def _lose(self, kept: Kept) -> None:
        if self._kept.pop(id(kept), None) is not None:  # otherwise it was settled meanwhile
            _tell(self._worker_loop, kept.lose)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop was closed
        loop.call_soon_threadsafe(callback)
