"""Whether the worker's event loop turns: watched from a thread, which goes on when a handler blocks the loop."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from contextlib import suppress

from filao.guarded import Log
from filao.process import start

log: Log = Log(logging.getLogger("filao.worker"))

TICK = 1.0  # seconds between two signs of life
BLOCKED_AFTER = 10.0  # seconds without one after which the loop counts as blocked, and its stack is logged


class Pulse:
    """Watches the loop that it is made on, until it is stopped. Raises `EngineUnavailable` without a thread for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched = threading.get_ident()
        self._turned_at = time.monotonic()
        self._was_blocked = False
        self._stopped = threading.Event()
        start(threading.Thread(target=self._watch, name="filao pulse", daemon=True))

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def blocked_for(self) -> float:
        """Return for how many seconds the loop has not turned; safe from any thread."""
        return max(0.0, time.monotonic() - self._turned_at - TICK)

    def _turn(self) -> None:
        self._turned_at = time.monotonic()

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the loop was closed
            while not self._stopped.wait(TICK):
                self._look()
                self._loop.call_soon_threadsafe(self._turn)

    def _look(self) -> None:
        blocked = self.blocked_for()
        if blocked < BLOCKED_AFTER:
            self._was_blocked = False
        elif not self._was_blocked:
            self._was_blocked = True
            frame = sys._current_frames().get(self._watched)  # noqa: SLF001  # the documented way to see a stack
            where = "".join(traceback.format_stack(frame)) if frame else ""
            log.error(
                "the worker's event loop has been blocked for %.0f s; it receives nothing, here:\n%s", blocked, where
            )
