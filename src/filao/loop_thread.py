"""A thread with an event loop on which a broker is open, for the blocking twin; and how it ends with the interpreter.

It is a daemon: the interpreter would wait for any other thread before it calls `_close_all`.
"""

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
from contextlib import suppress

from filao.broker import Broker, session_of
from filao.calls import Caller, interpreter_ends, signals_left_to_others
from filao.errors import EngineUnavailable, FilaoError
from filao.guarded import Log
from filao.outside import outside
from filao.process import check_loops, start
from filao.session import CLOSES_WITHIN

log: Log = Log(logging.getLogger("filao"))

JOINED_WITHIN = CLOSES_WITHIN + 5.0  # seconds: closing has its own bound, and the loop then ends what is left at once
_threads: "set[LoopThread]" = set()
"""All that run, even those that close in the background."""


class LoopThread:
    """Opens a broker, and closes it when it is told to stop."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._thread = threading.Thread(target=self._run, name="filao", daemon=True)
        self._opened = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._is_stopping = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Open the broker in the thread, and wait until that is done."""
        _close_at_exit()
        with signals_left_to_others():
            start(self._thread)
        self._opened.wait()
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError) and self._stopping is None:  # the loop has not begun
                raise EngineUnavailable(
                    f"the broker cannot start its event loop ({error}): most likely this process has no file "
                    "descriptor left. Nothing was done; close what is not needed, or raise the limit (ulimit -n)"
                ) from error
            raise error

    def leave(self, thread: int | None) -> None:
        """Undo the transactions of a thread that closes the broker, or of all: they cannot end while it waits."""
        if self._stopping is None:  # the loop has not begun
            return
        with suppress(RuntimeError):  # the loop has ended
            self.caller.loop.call_soon_threadsafe(self.caller.leave, thread)

    def stop(self) -> None:
        """Begin to close the broker and to end the thread, in the background."""
        self._is_stopping = True
        stopping = self._stopping
        if stopping is not None:
            with suppress(RuntimeError):  # the loop has ended
                self.caller.loop.call_soon_threadsafe(stopping.set)

    def join(self, within: float | None = None) -> None:
        """Wait until the thread has ended, and raise what closing raised."""
        self._thread.join(JOINED_WITHIN if within is None else within)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        _threads.add(self)
        try:
            check_loops("use one blocking broker for all, or threads of the system")
            asyncio.run(self._live())
        except BaseException as error:
            self._error = error
        finally:
            self._opened.set()
            _threads.discard(self)

    async def _live(self) -> None:
        self.caller: Caller = Caller(asyncio.get_running_loop(), loop_thread=threading.get_ident())
        self._stopping = asyncio.Event()
        if self._is_stopping:
            self._stopping.set()
        try:
            async with self._broker:
                self.here: Broker = Broker(outside(session_of(self._broker), self.caller))
                """The same broker for other threads; its coroutines block, and never suspend."""
                self._opened.set()
                await self._stopping.wait()
        finally:
            self.caller.end()  # before the loop ends: a call that came after that would never be answered


def _close_all() -> None:
    """Close what is still open when the interpreter ends, all at once and within one bound."""
    interpreter_ends()
    until = time.monotonic() + JOINED_WITHIN
    threads = list(_threads)
    for thread in threads:
        thread.leave(None)
        thread.stop()
    for thread in threads:
        try:
            thread.join(max(0.0, until - time.monotonic()))
        except FilaoError as error:
            log.warning("closing a broker when the interpreter ended: %s", error)


def _close_at_exit() -> None:
    """Close all when this process ends; a child of `multiprocessing` ends in its own way."""
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    multiprocessing = sys.modules.get("multiprocessing.util")
    if multiprocessing is not None and sys.modules["multiprocessing.process"].parent_process() is not None:
        multiprocessing.Finalize(None, _close_all, exitpriority=0)  # such a child does not call what atexit holds


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)
