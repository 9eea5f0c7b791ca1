"""How a body becomes bytes and comes back: JSON through msgspec, pydantic's own models, raw bytes untouched.

A body is never coerced. What would not come back as it was raises `MessageNotEncodable` when it is sent; what does not
decode to its queue's type raises `ValueError` here, and the broker makes it a dead letter. Pickle is never used: a
queue outlives the code that filled it, and reading a message must not run anything.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Protocol, cast

import msgspec

from filao.errors import ConfigurationError, EngineError, MessageNotEncodable, MessageTooLarge
from filao.urls import shown_url

JSON = 0
"""The content is a JSON text in UTF-8."""
BYTES = 1
"""The content is the caller's bytes, untouched."""

DEPTH_MAX = 200  # objects and arrays within each other: readers in other programs stop at 254, and Python soon after
HEADERS_MAX = 8 * 1024  # bytes, as JSON
HEADERS_COUNT_MAX = 64
SHOWN_MAX = 80  # characters of a wrong value that an error text repeats


_RAW = (bytes, bytearray, memoryview)  # once: a union in the call would be made anew for every body
_UNWRITABLE = (
    *(TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError),
    *(AttributeError, LookupError, ArithmeticError),  # of a model's own properties, too
)


class _PydanticModel(Protocol):
    def model_dump_json(self) -> str: ...


def _write_foreign(value: object) -> object:
    """Let pydantic write its own models wherever msgspec meets one."""
    if hasattr(value, "model_dump_json"):
        return msgspec.Raw(cast("_PydanticModel", value).model_dump_json().encode())
    raise TypeError(f"JSON cannot hold a {type(value).__qualname__}")


_encode_json = msgspec.json.Encoder(enc_hook=_write_foreign).encode


@dataclass(frozen=True, slots=True)
class Codec:
    """Reads and writes the bodies of one queue; `codec_for` makes it."""

    body: type[Any] | None
    read: Callable[[bytes], Any]
    is_open: bool = False
    """Whether the type says of some part that it may be anything: there what JSON makes of it is what comes back."""

    def encode(self, queue: str, body: object) -> tuple[int, bytes]:
        """Return what the content is (`JSON` or `BYTES`) and the content, or raise `MessageNotEncodable`.

        Whether it comes back as it was is seen by reading it, which is quicker than walking through the body in Python:
        that tells only what is wrong when something is.
        """
        try:
            if isinstance(body, _RAW):
                content = bytes(cast("bytes", body))
                if self.body not in (None, bytes):
                    raise _not_of_type(queue, self.body, content, "it is raw bytes")
                return BYTES, content
            content = _encode_json(body)
            if is_too_deep(content):
                raise _too_deep(queue, body)
            if self.body is not None:
                self._check_is_of_type(queue, body, content)
            elif msgspec.json.decode(content) != body:  # a NaN, which is written as null, is not equal to itself
                _check(body, "", typed=False)
        except _UNWRITABLE as error:  # no others: a signal's handler may raise its own here
            raise _not_written(queue, body, error) from error  # pyright: ignore[reportUnknownArgumentType]
        return JSON, content

    def _check_is_of_type(self, queue: str, body: object, content: bytes) -> None:
        """Raise unless who reads the content by the queue's type gets what was sent."""
        try:
            read = self.read(content)
        except ValueError as error:
            raise _not_of_type(queue, self.body, body, str(error)) from error
        if isinstance(read, dict | list | tuple | set | frozenset) and read != body:
            if msgspec.json.decode(content) != body:
                _check(body, "", typed=False)
            return
        if self.is_open and read != body:
            _check_open(body, read, "")
        if b"null" in content:
            _check(body, "", typed=True)

    def decode(self, kind: int, content: bytes) -> Any:
        """Return the body, or raise `ValueError` when the content is not of the queue's type."""
        if kind == JSON:
            try:
                return self.read(content)
            except RecursionError as error:
                raise ValueError("the body is nested too deeply") from error
        if self.body in (None, bytes):
            return content
        raise ValueError(f"Expected `{type_name(self.body)}`, got raw bytes")


def _codec(body: Any) -> Codec:
    if body is None:
        return Codec(body, msgspec.json.decode)
    if hasattr(body, "model_validate_json"):
        validate = cast("Callable[..., Any]", getattr(body, "model_validate_json"))  # noqa: B009
        return Codec(body, lambda content: validate(content, strict=True))
    try:
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(body, strict=True)
    except Exception as error:  # a name that is not defined, or whatever its annotations raise
        raise ConfigurationError(f"{shown(body)} cannot be the type of a queue's bodies: {error}") from error
    try:
        is_open = _is_open(msgspec.inspect.type_info(body), set())
    except (*_UNWRITABLE, NameError, NotImplementedError):  # it can be decoded, and not be described
        is_open = False
    return Codec(body, decoder.decode, is_open)


codec_for: Callable[[Any], Codec] = lru_cache(maxsize=256)(_codec)
"""Return the codec for a queue's declared body type; None stands for plain JSON or bytes."""


def encode_headers(queue: str, headers: Mapping[str, str]) -> str | None:
    """Return the headers as JSON, None when there are none, or raise the `MessageError` that says what is wrong."""
    if not isinstance(headers, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise MessageNotEncodable(f"queue {queue!r}: headers is {shown(headers)}; it must be a dict of strings")
    if len(headers) > HEADERS_COUNT_MAX:
        raise MessageTooLarge(f"queue {queue!r}: {len(headers)} headers; at most {HEADERS_COUNT_MAX} are carried")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MessageNotEncodable(
                f"queue {queue!r}: header {shown(name)} is {shown(value)}; names and values are strings"
            )
    if not headers:
        return None
    try:
        content = _encode_json(headers if type(headers) is dict else dict(headers))
    except UnicodeEncodeError as error:
        raise MessageNotEncodable(f"queue {queue!r}: a header is not valid Unicode: {error}") from error
    if len(content) > HEADERS_MAX:
        raise MessageTooLarge(f"queue {queue!r}: the headers take {len(content):,} bytes; at most {HEADERS_MAX:,} fit")
    return content.decode()


def decode_headers(headers: str | None) -> dict[str, str]:
    """Return the headers that `encode_headers` wrote."""
    try:
        return msgspec.json.decode(headers, type=dict[str, str]) if headers else {}
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"the headers of a stored message are unreadable, so another program wrote them: {error}"
        ) from error


def seen_body(kind: int, content: bytes) -> Any:
    """Return a stored body as operators see it: decoded, and its bytes where it cannot be, or was nested too deeply."""
    if kind != JSON or is_too_deep(content):
        return content
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return content


def seen_as(body: type[Any], seen: object) -> Any:
    """Return what operators see of a body as the type of its queue, and as they see it where it is not of that type."""
    if isinstance(seen, bytes):
        return seen
    try:
        return codec_for(body).read(_encode_json(seen))
    except (ValueError, RecursionError):
        return seen


def seen_headers(headers: str | None) -> dict[str, str]:
    """Return stored headers as operators see them: none where they are none."""
    try:
        return decode_headers(headers)
    except EngineError:
        return {}


def is_too_deep(content: bytes) -> bool:
    """Return whether a JSON text is nested deeper than `DEPTH_MAX`.

    What is too short for so many pairs of brackets costs nothing, and what holds few costs only their count.
    """
    if len(content) <= 2 * DEPTH_MAX or content.count(b"[") + content.count(b"{") <= DEPTH_MAX:
        return False
    if b"\\" in content:
        content = content.replace(rb"\\", b"").replace(rb"\"", b"")  # escapes are read from the left, as here
    outside = b"".join(content.split(b'"')[::2])  # of the texts
    brackets = outside.translate(_AS_SQUARE, delete=_NO_BRACKETS)
    for _ in range(DEPTH_MAX):  # each time, the innermost go
        left = brackets.replace(b"[]", b"")
        if len(left) == len(brackets):
            break
        brackets = left
    return bool(brackets)


_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def type_name(body: object) -> str:
    """Return a body type as its user wrote it."""
    return getattr(body, "__qualname__", None) or repr(body)


def shown(value: object) -> str:
    """Return a value as an error text repeats it: short, whatever it is."""
    try:
        text = repr(shown_url(value) if isinstance(value, str) and "://" in value else value)
    except Exception as error:
        text = f"<{type(value).__qualname__}, whose repr raised {type(error).__qualname__}>"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def _check(value: object, where: str, *, typed: bool) -> None:
    """Raise `ValueError` for what JSON has no form for; within what is `typed`, its type says what other forms mean."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"JSON has no {value!r}{_at(where)}")
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            if not typed and type(key) is not str:
                raise ValueError(f"the key {shown(key)}{_at(where)} would come back as a text, as all keys do in JSON")
            _check(item, f"{where}[{shown(key)}]", typed=typed)
    elif isinstance(value, list) or (typed and isinstance(value, tuple | set | frozenset)):
        for place, item in enumerate(cast("list[object]", value)):
            _check(item, f"{where}[{place}]", typed=typed)
    elif isinstance(value, Enum):
        if not typed and not isinstance(value, str | int):
            raise _other(value, where)
    elif value is None or isinstance(value, str | int | float | msgspec.Raw):
        return
    elif (fields := _fields(value)) is not None:
        if not typed:
            _check_instance(value, where)
        for name in fields:
            _check(getattr(value, name), f"{where}.{name}", typed=True)
    elif not typed:
        raise _other(value, where)


def _fields(value: object) -> Iterable[str] | None:
    """Return the names of the fields of a dataclass, an attrs class, a Struct or pydantic's model; None for what is
    none.
    """
    kind = type(value)
    for fields in ("__struct_fields__", "__dataclass_fields__", "__pydantic_fields__"):
        if hasattr(kind, fields):
            return cast("Iterable[str]", getattr(kind, fields))
    if hasattr(kind, "model_dump_json"):  # pydantic's before 2.10
        return cast("Iterable[str]", getattr(kind, "model_fields", ()))
    attributes = getattr(kind, "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


def _check_instance(value: object, where: str) -> None:
    """Raise `ValueError` when what is in its fields is not what its class says: its consumer could not read it."""
    try:
        read = codec_for(type(value)).read
    except ConfigurationError:
        return  # nobody can read it by this class, so nobody will
    try:
        came = read(_encode_json(value))
    except ValueError as error:
        raise ValueError(f"the {type(value).__qualname__}{_at(where)} is none: {error}") from error
    _check_open(value, came, where)


def _is_open(kind: object, seen: set[int]) -> bool:
    """Return whether a type, as msgspec describes it, holds `Any`."""
    if isinstance(kind, msgspec.inspect.AnyType):
        return True
    if isinstance(kind, tuple):
        return any(_is_open(part, seen) for part in cast("tuple[object, ...]", kind))
    if not isinstance(kind, msgspec.inspect.Type | msgspec.inspect.Field) or id(kind) in seen:
        return False
    seen.add(id(kind))
    return any(_is_open(getattr(kind, name), seen) for name in kind.__struct_fields__)


def _check_open(value: Any, read: Any, where: str) -> None:
    """Raise `ValueError` for a part that was read as something else, where the type left open what it is."""
    kind = type(value)  # pyright: ignore[reportUnknownVariableType]
    if kind is type(read) and (fields := _fields(value)) is not None:
        for name in fields:
            _check_open(getattr(value, name), getattr(read, name), f"{where}.{name}")
    elif kind is type(read) is dict and value.keys() == read.keys():
        for key, item in value.items():
            _check_open(item, read[key], f"{where}[{shown(key)}]")
    elif kind is type(read) is list and len(value) == len(read):
        for place, (item, came) in enumerate(zip(value, read, strict=True)):
            _check_open(item, came, f"{where}[{place}]")
    elif value != read:
        _check(value, where, typed=False)


def _other(value: object, where: str) -> ValueError:
    kind = type(value).__qualname__
    return ValueError(
        f"the {kind}{_at(where)} would come back as something else, as JSON has no {kind}. Convert it yourself, or say "
        f"{kind} in the queue's type, as in filao.Queue(…, body=…)"
    )


def _at(where: str) -> str:
    return f" at {where}" if where else ""


def _too_deep(queue: str, body: object) -> MessageNotEncodable:
    return MessageNotEncodable(
        f"queue {queue!r}: the body {shown(body)} is nested more than {DEPTH_MAX} deep, which not every reader "
        f"bears. Nothing was sent. Send it flatter, or as bytes."
    )


def _not_written(queue: str, body: object, error: Exception) -> MessageNotEncodable:
    return MessageNotEncodable(
        f"queue {queue!r}: the body {shown(body)} cannot be written as JSON: {error}. Nothing was sent."
    )


def _not_of_type(queue: str, body: object, value: object, why: str) -> MessageNotEncodable:
    return MessageNotEncodable(
        f"queue {queue!r}: the body {shown(value)} is not a {type_name(body)}: {why}. Nothing was sent."
    )
