"""Calls from threads into an event loop, which can be taken back at any moment.

Invariant: whatever exception meets the calling thread (Ctrl-C, or any other that a signal's handler raises, between any
two of its instructions), the call is either answered or taken back. So a call exists before anything is begun, it is
begun inside the `try` that takes it back, and taking it back is harmless when it has ended; but what it brought for
nobody goes to `abandoned`. Python runs signal handlers in the main thread alone, where they interrupt only waits for a
lock; so our threads are started with signals blocked, and a thread that waits here waits for a lock.
"""

import asyncio
import os
import signal
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from filao.errors import ConfigurationError
from filao.forks import gate

H = TypeVar("H")
R = TypeVar("R")

_FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"}  # a thread gets its own, at once
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
        """The one that runs the loop: a call that waited there would wait for itself."""
        self._calls: set[Call[Any]] = set()
        """Those that have not ended."""
        self._refusal = ""
        _callers.add(self)

    def call(self, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
        """Run a coroutine function on the loop, in the caller's context, and return what it does."""
        return self.take(function, None, *arguments)

    def take(
        self,
        function: Callable[..., Coroutine[Any, Any, R]],
        abandoned: Callable[[R], None] | None,
        *arguments: Any,
    ) -> R:
        """Run a coroutine function whose result must not get lost: if the caller is interrupted, it is `abandoned`."""
        call: Call[R] = Call(self.loop, function, arguments, abandoned, self.forget_call)
        try:
            self.begin(call)
            return call.result()
        except BaseException:
            call.take_back()
            raise

    def check(self) -> None:
        """Raise `ConfigurationError` when no call can be made any more."""
        if self._refusal:
            stay_if_it_ends()
            raise ConfigurationError(self._refusal)

    def check_thread(self) -> None:
        """Raise `ConfigurationError` in a thread that is in the midst of what a call would wait for.

        An observer runs there; and so does a `__del__`, wherever the collector finds what it belongs to.
        """
        here = threading.get_ident()
        is_on_loop = here == self._loop_thread and not self._refusal  # its identity is given again once it has ended
        if is_on_loop or gate.is_inside(here):
            raise ConfigurationError(_IN_THE_MIDST)

    def begin(self, call: "Call[Any]") -> None:
        """Begin a call. Raises `ConfigurationError` when there is no loop any more."""
        self.check_thread()
        self._calls.add(call)  # first: then `end` sees this call, or this call sees that it came too late
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
        """Return what a thread holds, or all threads. From any thread."""
        return [call for call in list(self._calls) if call.holder is not None and thread in (None, call.holder)]

    def leave(self, thread: int | None) -> None:
        """Leave what a thread holds, or all threads, as if an error left its block; on the loop."""
        for call in self.held_by(thread):
            call.cancel()

    def end(self, refusal: str = ENDED) -> None:
        """Refuse all calls from now on and cancel those that have not ended; on the loop, or after it."""
        self._refusal = refusal
        for call in list(self._calls):
            call.cancel()

    def forget_call(self, call: "Call[Any]") -> None:
        """Learn that a call has ended."""
        self._calls.discard(call)

    def inherit(self) -> None:
        """Refuse all calls in a child, whose parent has the loop."""
        self._refusal = (
            f"this was begun by the process that has forked this one (pid {os.getpid()}), and can be used only there"
        )
        self._calls = set()


_ends = threading.Event()


def interpreter_ends() -> None:
    """Learn that the interpreter ends: all threads but daemons have ended."""
    _ends.set()


def stay_if_it_ends() -> None:
    """Keep a daemon thread whose call has failed because the interpreter ends, as one that waits for anything is kept.

    It would print what it raises while the streams are torn down, which may end the process with a fatal error.
    """
    if _ends.is_set() and threading.current_thread().daemon:
        threading.Event().wait()


_callers: "weakref.WeakSet[Caller]" = weakref.WeakSet()


def undo_held(thread: int) -> None:
    """Undo what a thread holds now of any broker, for it may never come to leave it by itself. From any thread."""
    for caller in list(_callers):
        for call in caller.held_by(thread):
            with suppress(RuntimeError):  # its loop has ended
                caller.loop.call_soon_threadsafe(call.cancel, _GIVEN_UP)


def _after_fork() -> None:
    for caller in list(_callers):
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
        """The thread that holds what it has opened."""
        self._task: asyncio.Task[None] | None = None
        self._result: R | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._is_taken_back = False
        self._refusal = ENDED
        """What to say when it is cancelled."""
        self._over = threading.Lock()
        self._over.acquire()

    def begin(self) -> None:
        """Let the loop begin it. Raises `ConfigurationError` when there is no loop any more."""
        try:
            self._loop.call_soon_threadsafe(self._start)  # which takes the caller's context along
        except RuntimeError as error:
            raise ConfigurationError(ENDED) from error

    def result(self) -> R:
        """Wait until it is over, and return or raise what came of it."""
        with self._over:
            if self._error is not None:
                stay_if_it_ends()
                raise self._error
            return cast("R", self._result)

    def take_back(self) -> None:
        """Cancel it, or abandon what it brought: nobody waits for it. From the caller's thread."""
        self._is_taken_back = True
        with suppress(RuntimeError):  # the loop has ended, and this with it
            self._loop.call_soon_threadsafe(self._undo)

    def cancel(self, refusal: str = ENDED) -> None:
        """Cancel it; on the loop, or after it."""
        self._refusal = refusal
        if self._task is None or self._loop.is_closed():
            self._end(ConfigurationError(refusal))
        else:
            self._task.cancel()

    @property
    def is_over(self) -> bool:
        """Whether there is something to return or to raise."""
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

    Should an exception meet the thread in the very instruction that begins to leave, nobody is told to. Then the end of
    this object tells it, or the broker when it is closed.
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
            self._holding.entered.acquire()
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
            pass  # as the error wants that leaves the block
        except BaseException:
            self._holding.leave_soon(is_well=False)  # unless it was told before: then that goes on without us
            raise
        finally:
            self._left()

    def __del__(self) -> None:
        with suppress(AttributeError):  # an exception met its making, and there is nothing to leave
            self._holding.leave_soon(is_well=False)


class _UndoneError(Exception):
    """Leaves an async context manager whose block was left by an error."""


class _Holding(Generic[H]):
    """The side of a `Held` that lives on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, opening: Callable[[], AbstractAsyncContextManager[H]]) -> None:
        self._loop = loop
        self._opening = opening
        self._leave: asyncio.Future[bool] | None = None
        self._is_told = False
        self.held: H | None = None
        self.entered = threading.Lock()
        """Free once it is entered, or never will be."""
        self.entered.acquire()

    async def hold(self) -> None:
        """Enter, let the thread know, and leave when it says so."""
        self._leave = self._loop.create_future()
        async with self._opening() as self.held:
            self.entered.release()
            if not await self._leave:
                raise _UndoneError

    def leave_soon(self, *, is_well: bool) -> None:
        """Let it leave, well or by an error; the first time counts. From any thread."""
        if self._is_told:
            return
        with suppress(RuntimeError):  # the loop has ended, and this with it
            self._loop.call_soon_threadsafe(self._leave_now, is_well)
        self._is_told = True

    def _leave_now(self, is_well: bool) -> None:  # noqa: FBT001 - a callback
        if self._leave is not None and not self._leave.done():
            self._leave.set_result(is_well)


def _ended(forget: Callable[[Call[None]], None], holding: _Holding[Any], call: Call[None]) -> None:
    forget(call)
    if holding.entered.locked():
        holding.entered.release()


@contextmanager
def signals_left_to_others() -> Generator[None]:
    """Let the threads that are started here, and those that they start, never be the one that a signal interrupts."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    ours = {number for number in signal.valid_signals() if getattr(number, "name", "") not in _FAULTS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
