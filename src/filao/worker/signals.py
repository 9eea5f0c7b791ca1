"""SIGTERM and SIGINT: each running worker hears them, and so do the handlers that were there before, which come back.

SIGHUP is heard where it would end the program, as when its terminal is closed: not under `nohup`, and not where a
server reads its configuration again. The program ends by it all the same, once its last worker has given all back.

The handlers are Python's (`signal.signal`), not the event loop's: of those there is one for each signal, which a second
worker, or the application around the worker, would replace. A child that is forked meanwhile, as by a message handler's
`multiprocessing.Pool`, starts with Python's default handlers and without the descriptor that wakes the parent's loop.
All these signals are blocked during the fork, because one that came too early would stop the parent.
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

from filao.process import flush_output

HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
NUMBERS = (signal.SIGTERM, signal.SIGINT) if HANGUP is None else (signal.SIGTERM, signal.SIGINT, HANGUP)


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End the program by an exception, so that what is leased goes back with its attempt unused.

    It is the handler of our own programs; a worker that runs in one stops instead.
    """
    if number == HANGUP:
        signal.signal(number, signal.SIG_IGN)  # a shell that ends sends it twice
    raise SystemExit(128 + number)  # what a shell reports for a process that the signal ended


def end_by_exception() -> None:
    """Let `terminate` end this program at SIGTERM, and at SIGHUP, unless that is ignored, as under `nohup`."""
    signal.signal(signal.SIGTERM, terminate)
    if HANGUP is not None and signal.getsignal(HANGUP) == signal.SIG_DFL:
        signal.signal(HANGUP, terminate)


class _Signals:
    """Tells all listeners of a signal. There is a single instance, as a process has a single handler of each signal."""

    def __init__(self) -> None:
        self._listeners: dict[Callable[[], object], set[int]] = {}
        """What each calls, with the signals that it was told."""
        self._hung_up = False
        """Whether the program is to end by SIGHUP once nobody listens any more."""
        self._before: dict[int, Any] = {}
        self._shifts: set[object] = set()
        """The workers that run, whether or not they listen: not counted, as several threads would count at once."""
        self._held_back = threading.local()
        """The signals that the forking thread had blocked before, while it forks."""

    @contextmanager
    def telling(self, tell: Callable[[], object]) -> Generator[None]:
        """Call `tell` at each signal; only in the main thread, because handlers can be set only there."""
        if not self._listeners:
            heard = [number for number in NUMBERS if number != HANGUP or _would_end(signal.getsignal(number))]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        self._listeners[tell] = set()
        try:
            yield
        finally:
            del self._listeners[tell]
            if not self._listeners:
                self._restore()

    @contextmanager
    def clean_forks(self) -> Generator[None]:
        """Let children that are forked in this block start with clean signals."""
        shift = object()
        self._shifts.add(shift)
        try:
            yield
        finally:
            self._shifts.discard(shift)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        for tell, told in list(self._listeners.items()):
            # A shell that ends sends SIGHUP twice, and systemd may send it with SIGTERM: together they are one.
            if (not told) if number == HANGUP else told != {HANGUP}:
                with suppress(RuntimeError):  # its loop was closed
                    tell()
            told.add(number)
        before = self._before.get(number)
        self._hung_up |= number == HANGUP and before == signal.SIG_DFL
        if callable(before) and not _ends_the_program(before):
            before(number, frame)

    def _restore(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._hear:  # otherwise the program has set another one meanwhile
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}
        if self._hung_up and HANGUP is not None and signal.getsignal(HANGUP) == signal.SIG_DFL:
            flush_output()
            signal.raise_signal(HANGUP)

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
            self._listeners, self._before, self._shifts, self._hung_up = {}, {}, set(), False
        self.after_fork()


def _ends_the_program(handler: Any) -> bool:
    """Return whether a handler is Python's or our own way to end a program; a worker stops instead."""
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return handler is signal.default_int_handler or handler is terminate or isinstance(owner, asyncio.Runner)


def _would_end(handler: Any) -> bool:
    """Return whether a handler of SIGHUP ends the program."""
    return handler == signal.SIG_DFL or _ends_the_program(handler)


def _is_loops(handler: Any) -> bool:
    """Return whether a handler is asyncio's, which does nothing: a descriptor wakes the loop."""
    return getattr(handler, "__module__", "") == "asyncio.unix_events"


_signals = _Signals()
clean_forks = _signals.clean_forks


@contextmanager
def told_by_signals(stop: Callable[[], None]) -> Generator[None]:
    """Call `stop` on the running loop at each SIGTERM and SIGINT, and at a SIGHUP that is the first of them.

    In threads other than the main one, do nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _signals.telling(partial(asyncio.get_running_loop().call_soon_threadsafe, stop)):
        yield


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_signals.before_fork, after_in_parent=_signals.after_fork, after_in_child=_signals.in_child
    )
