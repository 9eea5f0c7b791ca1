"""What surrounds handlers: lifespans, which open what a process needs once, and middleware, which wraps each message.

Both are generator functions that yield once, as for `contextlib`. A handler that asks for the type of a lifespan's
value gets that value. Asynchronous middleware runs on the event loop; plain middleware runs where the handler does,
which for a plain handler is its thread.
"""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

from filao.codec import shown
from filao.errors import ConfigurationError
from filao.worker.handlers import Handler

log: logging.Logger = logging.getLogger("filao.worker")

ENDS_WITHIN = 30.0  # seconds for all that lifespans do when the worker has stopped

_Entered = AbstractAsyncContextManager[Any] | AbstractContextManager[Any]  # made by `contextlib` of such a function
Lifespan = Callable[[], AsyncGenerator[Any] | Generator[Any] | _Entered]
Middleware = Callable[[Any], AsyncGenerator[None] | Generator[None] | _Entered]


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
        """Call a coroutine function, wrapped in the plain middleware."""
        with self._in_place(message):
            return await function(message, *more)

    def call_plain(self, function: Callable[..., Any], message: Any, *more: Any) -> Any:
        """Call a plain function in its thread, wrapped in the plain middleware."""
        with self._in_place(message):
            return function(message, *more)

    @contextmanager
    def _in_place(self, message: Any) -> Generator[None]:
        with ExitStack() as stack:
            for enter in self.in_place:
                stack.enter_context(enter(message))
            yield


@asynccontextmanager
async def lived(lifespans: Sequence[Lifespan], told: asyncio.Event) -> AsyncGenerator[list[Any] | None]:
    """Enter the lifespans in order, and yield their values; None if the worker is `told` to stop meanwhile.

    They end in reverse order, each in the task in which it began, because task groups want that.
    """
    stack = AsyncExitStack()
    values: list[Any] = []
    try:
        try:
            async with _until(told):
                for lifespan in lifespans:
                    is_async, enter = _entered(lifespan, "lifespan", "")
                    values.append(
                        await stack.enter_async_context(enter()) if is_async else stack.enter_context(enter())
                    )
        except TimeoutError:
            if not told.is_set():
                raise
        yield values if len(values) == len(lifespans) else None
    finally:
        await _close(stack)


async def _close(stack: AsyncExitStack) -> None:
    limit = asyncio.timeout(ENDS_WITHIN)
    try:
        async with limit:
            await stack.aclose()
    except TimeoutError:
        if not limit.expired():
            raise
        log.warning("a lifespan has not ended within %g s; the worker ends without it", ENDS_WITHIN)


@asynccontextmanager
async def _until(told: asyncio.Event) -> AsyncGenerator[None]:
    """Raise `TimeoutError` in the block as soon as the event is set."""
    async with asyncio.timeout(None) as limit:

        def end(told: asyncio.Task[bool]) -> None:
            if not told.cancelled():
                with suppress(RuntimeError):  # the block was left in the same moment
                    limit.reschedule(0.0)

        telling = asyncio.ensure_future(told.wait())
        telling.add_done_callback(end)
        try:
            yield
        finally:
            telling.cancel()


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
    return is_async, asynccontextmanager(given) if is_async else contextmanager(given)
