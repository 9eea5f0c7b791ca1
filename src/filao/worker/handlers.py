"""What a handler is: a function of one message, or of a message and a transaction, whose signature is read once.

A coroutine function runs on the event loop and gets `filao.Message`; a plain one runs in a thread and gets the blocking
`filao.sync.Message`. If its annotation names a type of the body, the body is decoded to that. Its further parameters
get what the worker's lifespans yield, by their types.
"""

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from filao import sync
from filao.codec import shown
from filao.errors import ConfigurationError
from filao.message import Message, Transaction
from filao.queue import Queue
from filao.worker.outcomes import Outcomes

WorkerGuarantee = Literal["at-most-once", "at-least-once", "exactly-once"]
_UNREADABLE = (NameError, TypeError, AttributeError, SyntaxError)


@dataclass(frozen=True, slots=True)
class Handler:
    """A function and what its signature says."""

    function: Callable[..., Any]
    name: str
    is_async: bool
    body: Any
    """The type of the body that its annotation asks for; None when it names none."""
    wants: Mapping[str, type[Any]]
    """The types of its further parameters, by their names."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A queue, its handler, and how the two go together."""

    queue: Queue[Any]
    handler: Handler
    concurrency: int
    timeout: float | None
    guarantee: WorkerGuarantee
    weight: float
    outcomes: Outcomes


def handler_of(function: Callable[..., Any], *, with_transaction: bool) -> Handler:
    """Read a function's signature. Raises a `ConfigurationError` that says what it should be."""
    name = getattr(function, "__qualname__", None) or shown(function)
    if not callable(function):
        raise ConfigurationError(f"a handler must be a function, not {shown(function)}")
    call = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    if inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call):
        raise ConfigurationError(f"the handler {name} is a generator, which would do nothing; a handler returns")
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
    wanted = ("message", "transaction") if with_transaction else ("message",)
    wants = _wanted(function, wanted)
    first = _first_parameter(function, name, wanted, wants, is_async=is_async)
    return Handler(function, name, is_async, _body_of(function, first, name, is_async=is_async), wants)


def check_body(handler: Handler, rules: Queue[Any]) -> None:
    """Raise `ConfigurationError` when a handler asks for bodies of another type than its queue has."""
    try:
        body = _meant(rules.body)
    except _UNREADABLE as error:
        raise ConfigurationError(
            f"queue {rules.name!r} has a type of bodies that cannot be read, {rules.body!r}: {error}"
        ) from error
    if handler.body is not None and body not in (None, handler.body):
        raise ConfigurationError(
            f"the handler {handler.name} asks for bodies of {handler.body!r}; queue {rules.name!r} has {rules.body!r}"
        )


def _wanted(function: Callable[..., Any], known: tuple[str, ...]) -> dict[str, type[Any]]:
    """Return the parameters after those that every handler has, if their annotations are classes."""
    try:
        further = list(_signature(function).parameters.values())[len(known) :]
    except (TypeError, ValueError):
        return {}  # `_first_parameter` raises the error
    wants: dict[str, type[Any]] = {}
    for parameter in further:
        if parameter.default is not parameter.empty or parameter.annotation is parameter.empty:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        kind = _read(parameter, function)
        kind = kind if isinstance(kind, types.UnionType) else get_origin(kind) or kind  # a pool, of Pool[Connection]
        if isinstance(kind, type) and kind not in (Transaction, sync.Transaction):
            _check_can_tell(kind, parameter, function)
            wants[parameter.name] = kind
    return wants


def _check_can_tell(kind: type[Any], parameter: inspect.Parameter, function: Callable[..., Any]) -> None:
    """Raise `ConfigurationError` for a class whose instances cannot be told, such as a Protocol."""
    try:
        isinstance(None, kind)
    except TypeError as error:
        name = getattr(function, "__qualname__", None) or shown(function)
        raise ConfigurationError(
            f"the handler {name} asks for {parameter.name}: {kind.__qualname__}, and what a lifespan gives cannot be "
            f"told by it ({error}): name a class, or a Protocol with @typing.runtime_checkable"
        ) from error


def _first_parameter(
    function: Callable[..., Any],
    name: str,
    wanted: tuple[str, ...],
    wants: Mapping[str, type[Any]],
    *,
    is_async: bool,
) -> inspect.Parameter:
    try:
        signature = _signature(function)
        signature.bind(*wanted, **dict.fromkeys(wants))
    except (TypeError, ValueError) as error:
        form = f"{'async ' * is_async}def {name.rsplit('.', 1)[-1]}({', '.join(wanted)})"
        more = ' With guarantee="exactly-once" it takes the transaction too.' if len(wanted) > 1 else ""
        raise ConfigurationError(
            f"the handler {name} cannot be called as {form}: {error}.{more} What a lifespan gives is asked for by its "
            "type"
        ) from error
    return next(iter(signature.parameters.values()))


def _body_of(function: Callable[..., Any], first: inspect.Parameter, name: str, *, is_async: bool) -> Any:
    if first.annotation is inspect.Parameter.empty or first.kind is inspect.Parameter.VAR_POSITIONAL:
        return None
    annotation = _read(first, function)
    kind = get_origin(annotation) or annotation
    ours, theirs = (Message, sync.Message) if is_async else (sync.Message, Message)
    what, gets = ("coroutine function", "filao.Message") if is_async else ("plain function", "filao.sync.Message")
    if kind is theirs:
        raise ConfigurationError(f"the handler {name} is a {what}, which gets a {gets}: annotate it so")
    if kind is not ours and annotation is not Any:
        raise ConfigurationError(
            f"the handler {name} asks for {annotation!r}; it gets a message with a body: annotate it "
            f"{first.name}: {gets}[{getattr(annotation, '__name__', '…')}]"
        )
    arguments = get_args(annotation)
    return arguments[0] if arguments and not isinstance(arguments[0], typing.TypeVar) else None


def _annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that has the annotations of a `functools.partial` or a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if inspect.isroutine(function) else type(function).__call__


def _signature(function: Callable[..., Any], *, as_written: bool = False) -> inspect.Signature:
    """Return a function's signature without evaluating annotations that only a type checker can read."""
    if sys.version_info >= (3, 14):
        from annotationlib import Format  # older versions have none

        return inspect.signature(function, annotation_format=Format.STRING if as_written else Format.FORWARDREF)
    return inspect.signature(function)


def _read(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """Return the type that a parameter's annotation means, without evaluating any other annotation."""

    def only() -> None: ...

    bearer = _annotated(function)
    only.__annotations__ = {parameter.name: parameter.annotation}
    names = getattr(inspect.unwrap(bearer), "__globals__", {})
    of_its_own = {kind.__name__: kind for kind in getattr(bearer, "__type_params__", ())}
    try:
        kind = _meant(typing.get_type_hints(only, names, of_its_own)[parameter.name])
        is_of_messages = get_origin(kind) in (Message, sync.Message)
        return get_origin(kind)[_meant(*get_args(kind))] if is_of_messages else kind
    except _UNREADABLE as error:
        name = getattr(function, "__qualname__", None) or shown(function)
        written = _signature(function, as_written=True).parameters[parameter.name].annotation
        remedy = ". Import or define that name before, and not only under `if TYPE_CHECKING:`"
        raise ConfigurationError(
            f"the handler {name} has an annotation that cannot be read, {parameter.name}: {written}: "
            f"{error}{remedy if isinstance(error, NameError) else ''}"
        ) from error


def _meant(annotation: Any) -> Any:
    """Return the type that was given another name by a `type` statement."""
    while (value := getattr(named := get_origin(annotation) or annotation, "__value__", None)) is not None:
        given = dict(zip(named.__type_params__, get_args(annotation), strict=False))
        free = getattr(value, "__parameters__", ())
        if isinstance(value, typing.TypeVar):
            annotation = given.get(value, value)
        else:
            annotation = value[tuple(given.get(one, one) for one in free)] if given and free else value
    return annotation
