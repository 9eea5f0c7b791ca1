"""Who is told of SIGTERM and SIGINT: each worker that runs, and the handlers that were there before, which come back.

The handlers are Python's own (`signal.signal`), not the event loop's, of which there is one for each signal: a second
worker, or the application that a worker runs in, would take its place. A child that is forked meanwhile, as a handler's
`multiprocessing.Pool` does, starts with Python's default handling and without the descriptor that wakes the parent's
loop; both signals are held back while it is made, or one that comes too early would stop the parent.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT)
TERMINATED = 143  # what a shell reports of a process that SIGTERM ended


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End the program as an exception does, so that what is leased goes back with its attempt unused.

    It is a handler for programs of ours; a worker that runs in one stops instead.
    """
    raise SystemExit(TERMINATED)


class _Signals:
    """Tells all who listen. There is one of it, as there is one handler of each signal in a process."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], object]] = []
        self._before: dict[int, Any] = {}
        self._shifts = 0
        """How many workers run, whether or not they listen."""
        self._held_back = threading.local()
        """The signals that the forking thread had blocked before."""

    @contextmanager
    def telling(self, tell: Callable[[], object]) -> Generator[None]:
        """Tell of each signal; for the main thread, in which alone handlers can be set."""
        if not self._listeners:
            self._before = {number: signal.signal(number, self._hear) for number in NUMBERS}
        self._listeners.append(tell)
        try:
            yield
        finally:
            self._listeners.remove(tell)
            if not self._listeners:
                self._restore()

    @contextmanager
    def clean_forks(self) -> Generator[None]:
        """Let children that are forked in this block start with clean signals."""
        self._shifts += 1
        try:
            yield
        finally:
            self._shifts -= 1

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for tell in list(self._listeners):
            with suppress(RuntimeError):  # its loop was closed
                tell()
        before = self._before.get(number)
        if callable(before) and not _ends_the_program(before):
            before(number, frame)

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._hear:  # else somebody has set another meanwhile
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def before_fork(self) -> None:
        if self._shifts:
            self._held_back.mask = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)

    def after_fork(self) -> None:
        mask = self._held_back.__dict__.pop("mask", None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def in_child(self) -> None:
        if self._shifts:
            signal.set_wakeup_fd(-1)
            for number in NUMBERS:
                if signal.getsignal(number) == self._hear or _is_loops(signal.getsignal(number)):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            self._listeners, self._before, self._shifts = [], {}, 0
        self.after_fork()


def _ends_the_program(handler: Any) -> bool:
    """Return whether it is Python's own way to end a program, or ours, in place of which a worker stops."""
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return handler is signal.default_int_handler or handler is terminate or isinstance(owner, asyncio.Runner)


def _is_loops(handler: Any) -> bool:
    """Return whether it is asyncio's, which does nothing: the loop is woken by a descriptor."""
    return getattr(handler, "__module__", "") == "asyncio.unix_events"


_signals = _Signals()
clean_forks = _signals.clean_forks


@contextmanager
def told_by_signals(stop: Callable[[], None]) -> Generator[None]:
    """Call `stop` on the running loop at each SIGTERM and SIGINT, if this is the main thread, which alone is told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _signals.telling(partial(asyncio.get_running_loop().call_soon_threadsafe, stop)):
        yield


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_signals.before_fork, after_in_parent=_signals.after_fork, after_in_child=_signals.in_child
    )
