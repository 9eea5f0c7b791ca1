"""A process that sends, receives and holds messages, as operators see it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import pairwise
from typing import cast

from filao.engine import Finding
from filao.errors import ConfigurationError, EngineUnavailable
from filao.printable import some

REPORT_STALE = 20.0  # seconds after which a worker's report is no longer believed
HEALTHY = "ready and healthy"  # how the report of a healthy worker begins


def process_name() -> str:
    """Return this host and process, as operators see those that send, receive and hold messages."""
    return f"{socket.gethostname()}:{os.getpid()}"


def flush_output() -> None:
    """Write out what was printed, before a process ends at once; where that can be written no more, it is lost."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # Python has no stream where the shell closed it
            with suppress(OSError, ValueError):
                stream.flush()


def this_python(*, told_where: bool = False) -> list[str]:
    """Return the command that starts this Python with the options that this one was started with.

    Where PYTHONPATH tells it where its modules are (`told_where`), those are left out by which it would not read that:
    `-I` is `-E`, `-s` and `-P`.
    """
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001  # no public one
    options = cast("list[str]", flags)
    given = {after.partition("=")[0] for option, after in pairwise(options) if option == "-X"}
    for name, value in sys._xoptions.items():  # noqa: SLF001  # documented so
        if name not in given:  # as it gives only some
            options += ["-X", name if value is True else f"{name}={value}"]
    if told_where:
        options = [option for option in options if option not in ("-I", "-E")] + ["-s", "-P"] * ("-I" in options)
    is_unbuffered = bool(getattr(sys.__stdout__, "write_through", False))  # no flag tells of -u
    return [sys.executable, *options] + ["-u"] * is_unbuffered


def process_finding(name: str, held: int, state: str, reported_ago: float) -> Finding:
    """Return what the doctor says of a process that receives; `state` is its worker's report, empty without one."""
    holds = f"{name} receives here, and holds {some(held, 'message')}"
    if not state:
        return Finding("processes", "ok", holds)
    if reported_ago > REPORT_STALE:
        return Finding("processes", "warning", f"{holds}; its worker has not reported for {reported_ago:.0f} s")
    level = "ok" if state.startswith(HEALTHY) else "warning"
    return Finding("processes", level, f"{holds}; its worker is {state}")


_handler_of: Callable[[int], object] = import_module("_signal").getsignal  # what `signal` wraps, at 30 times its cost
_SIGNALS = tuple(map(int, signal.valid_signals()))
_ONLY_RAISE = frozenset((None, int(signal.SIG_DFL), int(signal.SIG_IGN), signal.default_int_handler))
"""What is no handler of the program's. Of these only the last runs Python, and all it does is to raise."""

_GET_IDENT = threading.get_ident
"""Which thread calls; gevent and eventlet put another function in its place, as in all of `threading`."""


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises `EngineUnavailable` when this process can have no more; Python does not say why.

    Raises `ConfigurationError` as `check_threads` does.
    """
    check_threads()
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(error) from error


def check_threads() -> None:
    """Raise `ConfigurationError` when threads became greenlets after Filao was imported.

    With locks of both kinds, one that waits would hold up the whole process, for ever.
    """
    if threading.get_ident is not _GET_IDENT:
        raise ConfigurationError(
            "the threads of this process were replaced, as gevent's monkey.patch_all() does, after filao was imported, "
            "which would wait for ever. Nothing was done; patch first and import filao then. gunicorn's gevent workers "
            "do so without --preload; gthread workers need no patch"
        )


def check_loops(instead: str) -> None:
    """Raise `ConfigurationError` if this new thread has an event loop already, because threads are greenlets here."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigurationError(
            f"this process has an event loop already, and its threads are greenlets, as gevent makes them, only one of "
            f"which can have a loop. Nothing was done; {instead}"
        )


def may_be_handled() -> bool:
    """Return whether a signal handler of the program's may run in this thread between any two instructions."""
    if threading.get_ident() != threading.main_thread().ident:
        return False
    try:
        return not _ONLY_RAISE.issuperset(map(_handler_of, _SIGNALS))
    except TypeError:  # one that cannot be hashed
        return True


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop. Raises `ConfigurationError` where none runs, as under trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "no event loop of asyncio runs here; trio has another, also as the backend of anyio. Nothing was done; use "
            "asyncio.run(…), or anyio's backend asyncio, or filao.sync in a thread, as by trio.to_thread.run_sync(…)"
        ) from None


def no_thread(error: RuntimeError) -> EngineUnavailable:
    """Return the error for a thread that cannot be started."""
    return EngineUnavailable(
        f"this process cannot start a thread ({error}): most likely it may have no more of them, or no more "
        f"memory. Nothing was done; end some, or raise the limit (ulimit -u, or the container's pids)"
    )
