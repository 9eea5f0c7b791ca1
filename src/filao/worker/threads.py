"""Threads in which plain functions run: daemons, so that one that hangs does not keep the process, and interruptible.

CPython can raise an exception in a thread at its next bytecode: a call into C ends first, an endless loop ends at once.
(`PyThreadState_SetAsyncExc`, https://docs.python.org/3/c-api/threads.html) A thread that was interrupted is never used
again, so that a late exception cannot hit another function.
"""

import asyncio
import contextvars
import ctypes
import os
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, NoReturn

from filao.calls import undo_held
from filao.process import flush_output, start


class InterruptedHandlerError(BaseException):
    """Raised in a plain handler that must end: its time is up, its lease is lost, or its worker stops."""


class Call:
    """A function that runs in a thread; `future` has what it returned or raised."""

    def __init__(self, loop: asyncio.AbstractEventLoop, job: Callable[[], Any]) -> None:
        self.job = job
        self.future: asyncio.Future[Any] = loop.create_future()
        self._loop = loop
        self._lock = threading.Lock()
        self._thread = 0
        """The identity of its thread while it runs; otherwise 0."""
        self.was_interrupted: bool = False

    def run(self) -> None:
        """Run the function in the calling thread.

        Raises `InterruptedHandlerError` if it was interrupted before that, or just after it.
        """
        with self._lock:
            if self.was_interrupted:
                raise InterruptedHandlerError
            self._thread = threading.get_ident()
        try:
            with children_end():
                result, error = self.job(), None
        except BaseException as raised:
            result, error = None, raised
        self.end(result, error)

    def end(self, result: Any, error: BaseException | None) -> None:
        """Answer with what the function returned or raised; only the first answer counts."""
        with self._lock:
            self._thread = 0
        with suppress(RuntimeError):  # the loop was closed, and nobody waits for the result
            self._loop.call_soon_threadsafe(self._resolve, result, error)

    def interrupt(self) -> None:
        """Raise `InterruptedHandlerError` in it, if it runs."""
        with self._lock:
            self.was_interrupted = True
            if self._thread:
                kind = ctypes.py_object(InterruptedHandlerError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), kind)

    def give_up(self) -> None:
        """Undo the transactions that it holds, if it runs, because others wait for them."""
        with self._lock:  # so that the thread cannot go on to another call
            if self._thread:
                undo_held(self._thread)

    def _resolve(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if isinstance(error, StopIteration):  # no future can hold it
            error = RuntimeError(f"the handler raised {error!r}")
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Threads:
    """Starts a thread whenever none is idle, so that there are never more than calls at the same time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._idle: list[SimpleQueue[Call | None]] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Run a function in a thread, in a copy of the caller's context. Raises `EngineUnavailable` without one."""
        context = contextvars.copy_context()
        call = Call(asyncio.get_running_loop(), lambda: context.run(function, *arguments))
        calls: SimpleQueue[Call | None]
        if self._idle:
            calls = self._idle.pop()
        else:
            calls = SimpleQueue()
            start(threading.Thread(target=_work, args=(calls,), name=self._name, daemon=True))
        calls.put(call)
        call.future.add_done_callback(lambda _: self._reuse(calls, call))
        return call

    def close(self) -> None:
        """End the threads that are idle."""
        for calls in self._idle:
            calls.put(None)
        self._idle.clear()

    def _reuse(self, calls: "SimpleQueue[Call | None]", call: Call) -> None:
        if call.was_interrupted or call.future.cancelled():
            calls.put(None)
        else:
            self._idle.append(calls)


@contextmanager
def children_end() -> Generator[None]:
    """End a child process that was forked in this block when it leaves it: the code after it is the parent's."""
    here = os.getpid()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        if os.getpid() != here:
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    """End a child process as a program would that raised this error, or none."""
    code = 0
    try:
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            code = 1
            traceback.print_exception(error)
        flush_output()
    finally:
        os._exit(code)


def _work(calls: "SimpleQueue[Call | None]") -> None:
    while (call := calls.get()) is not None:
        try:
            call.run()
        except InterruptedHandlerError as late:
            call.end(None, late)
            break
        del call
