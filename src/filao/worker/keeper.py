"""The keeper: it extends the leases of a worker's messages from a thread, a loop and a connection of its own.

So neither a handler that blocks the event loop nor one that keeps the interpreter busy loses its lease. All that are
due are extended by one statement, when a third of their time has passed. The keeper also sees from outside whether the
worker's loop still turns, and reports to the doctor. On an engine in memory, of which there can be no second connection, it runs on that loop.
"""

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol

from filao.broker import Broker
from filao.engine import Delivery
from filao.errors import FilaoError, LeaseLost

log = logging.getLogger("filao.worker")

TICKS_PER_LEASE = 6  # looks while the shortest lease runs: the first extension has four thirds of a try to spare
TICK_MAX = 1.0  # seconds between looks, and between signs of life of the loop
REPORT_EVERY = 5.0  # seconds between reports for the doctor
BLOCKED_AFTER = 10.0  # seconds without a turn of the loop after which its stack is logged


class Kept(Protocol):
    """What the keeper knows of a message that is being worked on."""

    delivery: Delivery
    lease: float
    """Seconds that each extension gives it."""
    extended_at: float
    """Monotonic time of the receive or of the last extension."""
    keep_until: float | None
    """Monotonic time after which it must not be kept: its handler should have ended."""

    def lose(self) -> None:
        """Learn, on the worker's loop, that the lease is another's."""


class Keeper:
    """Keeps what it is given until it is let go."""

    def __init__(self, broker: Broker, lease_min: float, state: Callable[[], str]) -> None:
        self._state = state
        self._reported_at = 0.0
        self._tick = max(0.02, min(TICK_MAX, lease_min / TICKS_PER_LEASE))
        self._worker_loop = asyncio.get_running_loop()
        self._worker_thread = threading.get_ident()
        self._here = broker
        self._twin = broker.twin()
        self._kept: dict[int, Kept] = {}
        self._stopped = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._turned_at = time.monotonic()
        self._was_blocked = False

    # --- on the worker's loop ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the thread and connect it, now: while a handler keeps the interpreter busy, that would take too long."""
        if self._twin is None:
            self._task = asyncio.create_task(self._keep_all(self._here))
            return
        ready: Future[None] = Future()
        main = self._main(self._twin, ready)
        self._thread = threading.Thread(target=asyncio.run, args=(main,), name="filao keeper", daemon=True)
        self._thread.start()
        await asyncio.wrap_future(ready)

    async def stop(self) -> None:
        """End the thread; what it still keeps is no longer kept."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._thread is not None:
            self._own_loop.call_soon_threadsafe(self._stopped.set)
            await asyncio.to_thread(self._thread.join)

    def keep(self, kept: Kept) -> None:
        """Extend its lease from now on."""
        self._kept[id(kept)] = kept

    def let_go(self, kept: Kept) -> None:
        """Leave its lease alone from now on."""
        self._kept.pop(id(kept), None)

    def blocked_for(self) -> float:
        """Return for how many seconds the worker's loop has not turned."""
        return max(0.0, time.monotonic() - self._turned_at - self._tick)

    def _turn(self) -> None:
        self._turned_at = time.monotonic()

    # --- in the thread -----------------------------------------------------------------------------------------------

    async def _main(self, twin: Broker, ready: "Future[None]") -> None:
        self._own_loop = asyncio.get_running_loop()
        try:
            await twin.open()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        keeping = asyncio.create_task(self._keep_all(twin))
        await self._stopped.wait()
        keeping.cancel()
        await asyncio.wait([keeping])
        with suppress(FilaoError):
            await twin.close()

    async def _keep_all(self, broker: Broker) -> None:
        while True:
            await asyncio.sleep(self._tick)
            if self._thread is not None:
                self._watch_loop()
            due = self._due(time.monotonic())
            if due:
                try:
                    await self._extend(broker, due)
                except FilaoError as error:
                    log.warning("leases could not be extended; trying again: %s", error)
            if time.monotonic() - self._reported_at > REPORT_EVERY:
                self._reported_at = time.monotonic()
                with suppress(FilaoError):  # whoever works says so
                    await broker.report(self._state())

    def _due(self, now: float) -> list[Kept]:
        """Return those of whose lease a third has passed, and with them all that will be at the next look."""
        late = now + self._tick
        kept = [one for one in list(self._kept.values()) if one.keep_until is None or now < one.keep_until]
        return [one for one in kept if late - one.extended_at >= one.lease / 3]

    async def _extend(self, broker: Broker, due: Sequence[Kept]) -> None:
        now = time.monotonic()
        extensions = [broker.extend(one.delivery, one.lease) for one in due]
        for one, error in zip(due, await asyncio.gather(*extensions, return_exceptions=True), strict=True):
            if error is None:
                one.extended_at = now
            elif isinstance(error, LeaseLost):
                self._lose(one)
            elif isinstance(error, FilaoError):
                raise error

    def _lose(self, kept: Kept) -> None:
        if self._kept.pop(id(kept), None) is not None:  # else it was settled meanwhile
            self._tell_worker(kept.lose)

    def _watch_loop(self) -> None:
        blocked = self.blocked_for()
        if blocked < BLOCKED_AFTER:
            self._was_blocked = False
        elif not self._was_blocked:
            self._was_blocked = True
            frame = sys._current_frames().get(self._worker_thread)  # noqa: SLF001  # the documented way to see a stack
            where = "".join(traceback.format_stack(frame)) if frame else ""
            log.error(
                "the worker's event loop has been blocked for %.0f s; it receives nothing, here:\n%s", blocked, where
            )
        self._tell_worker(self._turn)

    def _tell_worker(self, callback: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # it was closed: nobody works there any more
            self._worker_loop.call_soon_threadsafe(callback)
