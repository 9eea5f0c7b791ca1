"""Calls from threads into an event loop, which can be taken back at any moment.

Invariant: whatever exception interrupts the calling thread (Ctrl-C, or another that the handler of a signal raises,
between any two instructions), the call is either answered or taken back. So a call exists before anything begins, it
begins inside the `try` that takes it back, and taking it back is harmless once it has ended, except that its result,
which nobody gets, goes to `abandoned`. Python runs the handlers of signals only in the main thread, where they can
interrupt a wait for a lock. So our threads are started with signals blocked, and a thread that waits here waits for a
lock.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from filao.errors import ConfigurationError
from filao.forks import Living, gate

H = TypeVar("H")
R = TypeVar("R")

LOOKED_AFTER = 1.0  # seconds that a thread waits until it looks for signals that came before it began to
_FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"}  # meant for the thread at fault
_IN_THE_MIDST = (
    "this call comes in the midst of another one of a broker, from an observer say, a __del__ or a handler of logs, so "
    "that the two would wait for each other. Nothing was done: hand it to a thread of the program's own, by a "
    "queue.SimpleQueue"
)
_GIVEN_UP = "its worker gave up the handler that holds this, and undid it; nothing of it was done"
ENDED = "this broker was closed meanwhile, so this call was not answered; open it again, or another"


class Caller:
    """Makes calls on one event loop, from any number of other threads, until it is ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, loop_thread: int = 0) -> None:
        self.loop = loop
        self._loop_thread = loop_thread
        """The thread that runs the loop: a call that waited there would wait for itself."""
        self._calls: set[Call[Any]] = set()
        """The calls that have not ended."""
        self._refusal = ""
        _callers.add(self)

    def call(self, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
        """Run a coroutine function on the loop, in the caller's context, and return its result."""
        return self.take(function, None, *arguments)

    def take(
        self,
        function: Callable[..., Coroutine[Any, Any, R]],
        abandoned: Callable[[R], None] | None,
        *arguments: Any,
    ) -> R:
        """Run a coroutine function whose result must not get lost: `abandoned` gets it if the caller is interrupted."""
        call: Call[R] = Call(self.loop, function, arguments, abandoned, self.forget_call)
        try:
            self.begin(call)
            return call.result()
        except BaseException:
            call.take_back()
            raise

    def check(self) -> None:
        """Raise `ConfigurationError` when no more calls can be made."""
        if self._refusal:
            stay_if_it_ends()
            raise ConfigurationError(self._refusal)

    def check_thread(self) -> None:
        """Raise `ConfigurationError` in a thread that is in the middle of something for which the call would wait.

        Observers run in such threads, and so may a `__del__`, which runs wherever the collector does.
        """
        here = threading.get_ident()
        is_on_loop = here == self._loop_thread and not self._refusal  # once ended, its identity may be another thread's
        if is_on_loop or gate.is_inside(here):
            raise ConfigurationError(_IN_THE_MIDST)

    def begin(self, call: "Call[Any]") -> None:
        """Begin a call. Raises `ConfigurationError` when the loop has ended."""
        self.check_thread()
        self._calls.add(call)  # first: so either `end` sees this call, or this call sees that it came too late
        try:
            self.check()
            call.begin()
        except ConfigurationError:
            self._calls.discard(call)
            raise

    def held(
        self,
        opening: Callable[[], AbstractAsyncContextManager[H]],
        entered: Callable[[H], R],
        left: Callable[[], object],
    ) -> "Held[H, R]":
        """Return an async context manager as a blocking one; `entered` and `left` are called in the caller's thread."""
        return Held(self, opening, entered, left)

    def held_by(self, thread: int | None) -> "list[Call[Any]]":
        """Return the contexts that a thread holds, or all threads (None). May be called from any thread."""
        return [call for call in list(self._calls) if call.holder is not None and thread in (None, call.holder)]

    def leave(self, thread: int | None) -> None:
        """Leave the contexts of a thread, or of all (None), as an error in the block would. Called on the loop."""
        for call in self.held_by(thread):
            call.cancel()

    def end(self, refusal: str = ENDED) -> None:
        """Refuse all calls from now on, and cancel those that have not ended. Called on the loop, or after its end."""
        self._refusal = refusal
        for call in list(self._calls):
            call.cancel()

    def forget_call(self, call: "Call[Any]") -> None:
        """Learn that a call has ended."""
        self._calls.discard(call)

    def inherit(self) -> None:
        """In a child: refuse all calls, because the loop is the parent's."""
        self._refusal = (
            f"this was begun by the process that has forked this one (pid {os.getpid()}), and can be used only there"
        )
        self._calls = set()


_ends = threading.Event()


def interpreter_ends() -> None:
    """Learn that the interpreter ends, and that all threads but daemons have ended."""
    _ends.set()


def stay_if_it_ends() -> None:
    """Stop a daemon thread whose call has failed while the interpreter ends, like any that waits for something then.

    Otherwise it would print its error while the streams are torn down, which can end the process with a fatal error.
    """
    if _ends.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


_callers: Living[Caller] = Living()


def undo_held(thread: int) -> None:
    """Undo what a thread holds of any broker, because it may never leave it. May be called from any thread."""
    for caller in _callers:
        for call in caller.held_by(thread):
            with suppress(RuntimeError):  # its loop has ended
                caller.loop.call_soon_threadsafe(call.cancel, _GIVEN_UP)


def _after_fork() -> None:
    for caller in _callers:
        caller.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Call(Generic[R]):
    """One call: begun by its caller, run on the loop, and over once `result` has something to return or raise."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        function: Callable[..., Coroutine[Any, Any, R]],
        arguments: tuple[Any, ...] = (),
        abandoned: Callable[[R], None] | None = None,
        ended: Callable[["Call[R]"], None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self._function = function
        self._arguments = arguments
        self._abandoned = abandoned
        self._ended = ended
        self.holder: int | None = None
        """The thread that holds the context which the call has opened; None for other calls."""
        self._task: asyncio.Task[None] | None = None
        self._result: R | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._is_taken_back = False
        self._refusal = ENDED
        """The text of its error when it is cancelled."""
        self._over = threading.Lock()
        self._over.acquire()

    def begin(self) -> None:
        """Let the loop begin it. Raises `ConfigurationError` when the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._start)  # in the caller's context
        except RuntimeError as error:
            raise ConfigurationError(ENDED) from error

    def result(self) -> R:
        """Wait until it is over, and return or raise what came of it."""
        if not self._is_over:
            _take(self._over)
        if self._error is not None:
            stay_if_it_ends()
            raise self._error
        return cast("R", self._result)

    def take_back(self) -> None:
        """Cancel it, or abandon its result, because nobody waits for it. Called in the caller's thread."""
        self._is_taken_back = True
        with suppress(RuntimeError):  # the loop has ended, and the call with it
            self._loop.call_soon_threadsafe(self._undo)

    def cancel(self, refusal: str = ENDED) -> None:
        """Cancel it. Called on the loop, or after its end."""
        self._refusal = refusal
        if self._task is None or self._loop.is_closed():
            self._end(ConfigurationError(refusal))
        else:
            self._task.cancel()

    @property
    def is_over(self) -> bool:
        """Whether there is a result to return or an error to raise."""
        return self._is_over

    def _start(self) -> None:
        if self._is_taken_back or self._is_over:
            self._end(ConfigurationError(ENDED))
            return
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(lambda _: self._end(ConfigurationError(ENDED)))  # unless it is over

    async def _run(self) -> None:
        try:
            self._result = await self._function(*self._arguments)
        except asyncio.CancelledError:
            self._end(ConfigurationError(self._refusal))
        except BaseException as error:
            self._end(error)
        else:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._is_over:
            return
        self._error, self._is_over = error, True
        self._ended(self)
        self._over.release()

    def _undo(self) -> None:
        if self._task is not None and not self._is_over:
            self._task.cancel()
        elif self._is_over and self._error is None and self._abandoned is not None:
            self._abandoned(cast("R", self._result))
            self._abandoned = None


class Held(Generic[H, R]):
    """An async context manager that a thread enters and leaves. Whatever happens to the thread, it is left.

    If an exception interrupts the thread in the very instruction that begins to leave, the context is left when this
    object is collected, or when the broker is closed.
    """

    def __init__(
        self,
        caller: Caller,
        opening: Callable[[], AbstractAsyncContextManager[H]],
        entered: Callable[[H], R],
        left: Callable[[], object],
    ) -> None:
        self._caller = caller
        self._holding = _Holding(caller.loop, opening)
        self._call: Call[None] = Call(
            caller.loop, self._holding.hold, (), None, partial(_ended, caller.forget_call, self._holding)
        )
        self._call.holder = threading.get_ident()
        self._entered = entered
        self._left = left

    def __enter__(self) -> R:
        try:
            self._caller.begin(self._call)
            _take(self._holding.entered)
            if self._call.is_over:
                self._call.result()
            return self._entered(cast("H", self._holding.held))
        except BaseException:
            self._call.take_back()
            self._left()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._holding.leave_soon(is_well=kind is None)
            self._call.result()
        except _UndoneError:
            pass  # the error that leaves the block goes on
        except BaseException:
            self._holding.leave_soon(is_well=False)  # no effect if it is already leaving
            raise
        finally:
            self._left()

    def __del__(self) -> None:
        with suppress(AttributeError):  # an exception interrupted `__init__`, and there is nothing to leave
            self._holding.leave_soon(is_well=False)


class _UndoneError(Exception):
    """Leaves an async context manager whose block was left by an error."""


class _Holding(Generic[H]):
    """The side of a `Held` on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, opening: Callable[[], AbstractAsyncContextManager[H]]) -> None:
        self._loop = loop
        self._opening = opening
        self._leave: asyncio.Future[bool] | None = None
        self._is_told = False
        self.held: H | None = None
        self.entered = threading.Lock()
        """Released once the context is entered, or never will be."""
        self.entered.acquire()

    async def hold(self) -> None:
        """Enter the context, let the thread know, and leave when the thread says so."""
        self._leave = self._loop.create_future()
        async with self._opening() as self.held:
            self.entered.release()
            if not await self._leave:
                raise _UndoneError

    def leave_soon(self, *, is_well: bool) -> None:
        """Leave the context, normally or as by an error; only the first call counts. May be called from any thread."""
        if self._is_told:
            return
        with suppress(RuntimeError):  # the loop has ended, and the context with it
            self._loop.call_soon_threadsafe(self._leave_now, is_well)
        self._is_told = True

    def _leave_now(self, is_well: bool) -> None:  # noqa: FBT001 - a callback
        if self._leave is not None and not self._leave.done():
            self._leave.set_result(is_well)


def _ended(forget: Callable[[Call[None]], None], holding: _Holding[Any], call: Call[None]) -> None:
    forget(call)
    if holding.entered.locked():
        holding.entered.release()


def _take(lock: threading.Lock) -> None:
    """Wait until a lock is free, and keep it: a signal between an acquire and its release would keep it, too.

    A signal that comes in the instant before a wait begins does not end it: Python looks for it when the wait is over.
    """
    while not lock.acquire(timeout=LOOKED_AFTER):
        pass


@contextmanager
def signals_left_to_others() -> Generator[None]:
    """Start threads in this block that signals never interrupt, and neither the threads that those start."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    ours = {number for number in signal.valid_signals() if getattr(number, "name", "") not in _FAULTS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
