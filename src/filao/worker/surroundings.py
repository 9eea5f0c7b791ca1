"""What surrounds handlers: lifespans, which open what a process needs once, and middleware, which wraps each message.

Both are generator functions that yield once, as for `contextlib`. A handler that asks for the type of a lifespan's
value gets that value. Asynchronous middleware runs on the event loop; plain middleware runs where the handler does,
which for a plain handler is its thread.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from filao.codec import shown
from filao.errors import ConfigurationError
from filao.guarded import Log
from filao.worker.handlers import Handler

log: Log = Log(logging.getLogger("filao.worker"))

ENDS_WITHIN = 30.0  # seconds for all that lifespans do when the worker has stopped
GIVEN_UP_AFTER = 1.0  # seconds after their cancellation in which they may still end
_NOTHING = object()
SUPPRESSED = object()
"""In place of a handler's result: middleware has suppressed what it raised."""

_Entered = AbstractAsyncContextManager[Any] | AbstractContextManager[Any]  # made by `contextlib` of such a function
Lifespan = Callable[[], AsyncIterator[Any] | Iterator[Any] | _Entered]  # generators, as `contextlib` annotates them
Middleware = Callable[[Any], AsyncIterator[None] | Iterator[None] | _Entered]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The middleware of a worker: of each kind the first is outermost, and the asynchronous wrap the plain ones."""

    on_loop: list[Callable[[Any], Any]] = field(default_factory=list[Callable[[Any], Any]])
    in_place: list[Callable[[Any], Any]] = field(default_factory=list[Callable[[Any], Any]])

    def __bool__(self) -> bool:
        return bool(self.on_loop or self.in_place)

    def add(self, middleware: Middleware) -> None:
        """Add a middleware. Raises `ConfigurationError` if it is not a generator function."""
        is_async, enter = _entered(middleware, "middleware", "message")
        (self.on_loop if is_async else self.in_place).append(enter)

    @asynccontextmanager
    async def around(self, message: Any) -> AsyncGenerator[None]:
        """Wrap one message in the asynchronous middleware."""
        async with AsyncExitStack() as stack:
            for enter in self.on_loop:
                await stack.enter_async_context(enter(message))
            yield

    async def call(self, function: Callable[..., Any], message: Any, *more: Any) -> Any:
        """Call a coroutine function, wrapped in the plain middleware; return `SUPPRESSED` if that hides its error."""
        with self._in_place(message):
            return await function(message, *more)
        return SUPPRESSED  # type: ignore[unreachable]

    def call_plain(self, function: Callable[..., Any], message: Any, *more: Any) -> Any:
        """Call a plain function in its thread as `call` does a coroutine function."""
        with self._in_place(message):
            return function(message, *more)
        return SUPPRESSED  # type: ignore[unreachable]

    @contextmanager
    def _in_place(self, message: Any) -> Generator[None]:
        with ExitStack() as stack:
            for enter in self.in_place:
                stack.enter_context(enter(message))
            yield


@asynccontextmanager
async def lived(
    lifespans: Sequence[Lifespan], told: asyncio.Event, hangs: Callable[[], object]
) -> AsyncGenerator[list[Any] | None]:
    """Enter the lifespans in order, and yield their values; None if the worker is `told` to stop meanwhile.

    They end in reverse order. All that is theirs happens in one task, because task groups want that, and in a task of
    their own, so that none that swallows its cancellation holds the worker up: it is left behind, and `hangs` called.
    If that task ends by itself, as by an error in a task group, the worker is told to stop.
    """
    if not lifespans:
        yield []
        return
    entered: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    leave, context = asyncio.Event(), copy_context()
    living = asyncio.get_running_loop().create_task(_live(lifespans, entered, leave), context=context)
    living.add_done_callback(lambda _: told.set())
    telling = asyncio.create_task(told.wait())
    try:
        first: list[asyncio.Future[Any]] = [entered, telling]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not living.done():  # otherwise `_end` raises why
            with _adopted(context):
                yield entered.result() if entered.done() else None
    finally:
        telling.cancel()
        leave.set()
        await _end(living, hangs, was_cancelled=not entered.done() and living.cancel())  # only while it opens


async def _live(
    lifespans: Sequence[Lifespan], entered: "asyncio.Future[list[Any]]", leave: asyncio.Event
) -> BaseException | None:
    """Enter the lifespans, leave them when told to, and return what error ended them; raised, it might end the loop."""
    stack = AsyncExitStack()
    values: list[Any] = []
    try:
        try:
            for lifespan in lifespans:
                is_async, enter = _entered(lifespan, "lifespan", "")
                values.append(await stack.enter_async_context(enter()) if is_async else stack.enter_context(enter()))
            entered.set_result(values)
            await leave.wait()
        finally:
            await stack.aclose()
    except BaseException as error:
        return error
    return None


async def _end(
    living: "asyncio.Task[BaseException | None]", hangs: Callable[[], object], *, was_cancelled: bool
) -> None:
    """Wait until the lifespans have ended, cancel them when the time is up, and raise what else has ended them."""
    for limit in (ENDS_WITHIN, GIVEN_UP_AFTER):
        try:
            await asyncio.wait([living], timeout=limit)
        finally:
            was_cancelled = living.cancel() or was_cancelled  # no effect once it has ended
    if not living.done():
        log.warning("a lifespan has not ended within %g s; the worker ends without it", ENDS_WITHIN)
        hangs()
    elif (error := living.result()) is not None and not (was_cancelled and isinstance(error, asyncio.CancelledError)):
        raise error


@contextmanager
def _adopted(context: Context) -> Generator[None]:
    """Let the context variables that lifespans have set be seen in the block, as if they had been set here."""
    tokens = [(variable, variable.set(value)) for variable, value in context.items() if _differs(variable, value)]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def _differs(variable: "ContextVar[Any]", value: object) -> bool:
    return variable.get(_NOTHING) is not value


def check_lifespan(lifespan: Lifespan) -> None:
    """Raise `ConfigurationError` unless a lifespan is a generator function."""
    _entered(lifespan, "lifespan", "")


def supplied(handler: Handler, values: Sequence[Any]) -> Handler:
    """Return a handler whose further parameters are bound to the lifespans' values, by their types."""
    if not handler.wants:
        return handler
    given = dict(_chosen(handler, values))
    return replace(handler, function=partial(handler.function, **given))


def _chosen(handler: Handler, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    wants: Mapping[str, Any] = handler.wants
    for name, wanted in wants.items():
        fitting = [value for value in values if isinstance(value, wanted)]
        if len(fitting) != 1:
            given = ", ".join(type(value).__qualname__ for value in values if value is not None) or "nothing"
            raise ConfigurationError(
                f"the handler {handler.name} asks for {name}: {wanted.__qualname__}, and the lifespans of its worker "
                f"give {given}: let exactly one @worker.lifespan yield a {wanted.__qualname__}"
            )
        yield name, fitting[0]


def _entered(function: Any, what: str, parameter: str) -> tuple[bool, Callable[..., Any]]:
    """Return whether a generator function is asynchronous, and a function that makes its context manager."""
    inner = inspect.unwrap(function) if callable(function) else function
    is_async = inspect.isasyncgenfunction(inner)
    if not is_async and not inspect.isgeneratorfunction(inner):
        raise ConfigurationError(
            f"{what} must be a generator function that yields once, as `async def {what}({parameter}): … yield …`, "
            f"not {shown(function)}"
        )
    given = cast("Callable[..., Any]", function)
    if inner is not function:  # a context manager already
        return is_async, given
    name = getattr(function, "__qualname__", None) or shown(function)

    def once(*about: Any) -> Any:
        return _Once(given(*about), f"the {what} {name}", _INSTEAD[what])

    return is_async, asynccontextmanager(once) if is_async else contextmanager(once)


_INSTEAD = {
    "lifespan": "it must yield exactly once: what it has opened, or nothing",
    "middleware": "it must yield exactly once, where the handler runs; to pass over the handler, raise filao.Reject, "
    "filao.Retry or filao.Release",
}


class _Once:
    """The generator of a lifespan or of middleware, which says what to do if it yields never, or twice."""

    def __init__(self, generator: Any, who: str, instead: str) -> None:
        self._generator = generator
        self._who = who
        self._instead = instead
        self._has_yielded = False

    def __next__(self) -> Any:
        try:
            value = next(self._generator)
        except StopIteration:
            self._has_ended()
            raise
        return self._first(value)

    def throw(self, *error: Any) -> Any:
        return self._first(self._generator.throw(*error))

    def close(self) -> None:
        self._generator.close()

    async def __anext__(self) -> Any:
        try:
            value = await anext(self._generator)
        except StopAsyncIteration:
            self._has_ended()
            raise
        return self._first(value)

    async def athrow(self, *error: Any) -> Any:
        return self._first(await self._generator.athrow(*error))

    async def aclose(self) -> None:
        await self._generator.aclose()

    def _has_ended(self) -> None:
        if not self._has_yielded:
            raise ConfigurationError(f"{self._who} has ended without a yield; {self._instead}") from None

    def _first(self, value: Any) -> Any:
        if self._has_yielded:
            raise ConfigurationError(f"{self._who} has yielded a second time; {self._instead}")
        self._has_yielded = True
        return value
