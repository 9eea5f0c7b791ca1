"""How a body becomes bytes and comes back: JSON through msgspec, pydantic's models through pydantic, bytes untouched.

A body is never coerced. One that would not come back as it was raises `MessageNotEncodable` when it is sent; one that
does not decode to its queue's type raises `ValueError` here, and the broker makes it a dead letter. Pickle is never
used: a queue outlives the code that filled it, and reading a message must not run anything.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from operator import attrgetter
from types import UnionType
from typing import Any, NamedTuple, cast, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec

from filao.errors import ConfigurationError, EngineError, MessageNotEncodable, MessageTooLarge
from filao.urls import shown_url

JSON = 0
"""The content is a JSON text in UTF-8."""
BYTES = 1
"""The content is the caller's bytes, untouched."""

DEPTH_MAX = 200  # nested objects and arrays: readers in other programs stop at 254, and Python soon after
SHALLOW_MAX = 2 * DEPTH_MAX  # bytes: a text no longer than this has no room for deeper nesting
HEADERS_MAX = 8 * 1024  # bytes, as JSON
HEADERS_COUNT_MAX = 64
SHOWN_MAX = 80  # characters of a wrong value that an error text repeats


_RAW: tuple[Any, ...] = (bytes, bytearray, memoryview)  # a tuple: a union would be built anew for every body
_UNWRITABLE = (
    *(TypeError, ValueError, RecursionError, OverflowError, msgspec.MsgspecError),
    *(AttributeError, LookupError, ArithmeticError),  # of a model's own properties, too
)


def _write_foreign(value: object) -> object:
    """Let pydantic write its own models wherever msgspec meets one."""
    if _is_pydantics(type(value)):
        return msgspec.Raw(codec_for(type(value)).write(value))
    kind = _a(type(value).__qualname__)
    try:
        msgspec.json.encode(value)
    except _UNWRITABLE:
        raise TypeError(f"JSON cannot hold {kind}; send a text, a number or a dict in its place") from None
    raise TypeError(f"no key in JSON can be {kind}; send a text in its place")  # as a value it could be written


_encode_json = msgspec.json.Encoder(enc_hook=_write_foreign).encode


@dataclass(frozen=True, slots=True)
class Codec:
    """Reads and writes the bodies of one queue; `codec_for` makes it."""

    body: type[Any] | None
    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes] = _encode_json

    def encode(self, queue: str, body: object) -> tuple[int, bytes]:
        """Return the kind of the content (`JSON` or `BYTES`) and the content, or raise `MessageNotEncodable`.

        The content is read back to see whether the body would arrive as it was. Without a type, the two are first
        compared in C; if they differ there, or the queue has a type, they are compared part by part.
        """
        try:
            if body.__class__ is not dict and isinstance(body, _RAW) and self.body in (None, bytes):
                return BYTES, bytes(cast("bytes", body))
            content = self.write(body)
            if len(content) > SHALLOW_MAX and is_too_deep(content):
                raise _too_deep(queue, body)
            if self.body is not None:
                unlike = _unlike(body, self._came(queue, body, content))
            elif (came := self.read(content)) == body:
                return JSON, content
            else:
                unlike = _unlike(body, came, again=_read_by_its_class)
        except _UNWRITABLE as error:  # no others: the handler of a signal may raise its own here
            raise _not_written(queue, body, error) from error  # pyright: ignore[reportUnknownArgumentType]
        if unlike is not None:
            raise _not_as_it_was(queue, body, *unlike)
        return JSON, content

    def _came(self, queue: str, body: object, content: bytes) -> Any:
        """Return what the consumer would get, or raise the error that says why it would get nothing."""
        try:
            return self.read(content)
        except _UNWRITABLE as error:
            why = str(error) if isinstance(error, ValueError) else f"reading it raised {error!r}"
            raise _not_of_type(queue, self.body, body, "it is raw bytes" if isinstance(body, _RAW) else why) from error

    def decode(self, kind: int, content: bytes) -> Any:
        """Return the body, or raise `ValueError` when the content is not of the queue's type.

        Whatever the type's own code raises becomes a `ValueError` too, except `MemoryError`: the body is not to blame.
        """
        if kind == JSON:
            try:
                return self.read(content)
            except (ValueError, MemoryError):
                raise
            except RecursionError as error:
                raise ValueError("the body is nested too deeply") from error
            except Exception as error:
                raise ValueError(f"reading it raised {type(error).__qualname__}: {said(error)}") from error
        if self.body in (None, bytes):
            return content
        raise ValueError(f"Expected `{type_name(self.body)}`, got raw bytes")


def _codec(body: Any) -> Codec:
    if body is None:
        return Codec(body, msgspec.json.decode)
    if body is bytes:
        return Codec(body, _no_bytes)
    try:
        if "pydantic" in sys.modules and (models := list(_pydantics(body, {}))):
            return _by_pydantic(body, models)
        decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(body, strict=True)
    except Exception as error:  # a name that is not defined, or whatever its annotations raise
        raise ConfigurationError(f"{shown(body)} cannot be the type of a queue's bodies: {error}") from error
    try:
        unreadable = _unreadable(msgspec.inspect.type_info(body), set())
    except (*_UNWRITABLE, NameError, NotImplementedError):  # it can be read, but not described
        unreadable = None
    if unreadable is not None:
        raise ConfigurationError(
            f"{shown(body)} cannot be the type of a queue's bodies: {shown(unreadable)} has no form in JSON. "
            f"Put a type in its place that has one, such as str or a dataclass"
        )
    return Codec(body, decoder.decode)


codec_for: Callable[[Any], Codec] = lru_cache(maxsize=256)(_codec)
"""Return the codec for a queue's declared body type; None stands for plain JSON or bytes."""


def _no_bytes(content: bytes) -> Any:
    """Raise `ValueError`: msgspec would take a text for base64, and bytes are never sent as JSON."""
    raise ValueError("Expected raw `bytes`, got JSON")


def _unreadable(kind: object, seen: set[int]) -> object:
    """Return a class that msgspec cannot read and that every body of a type would hold; None when there is none."""
    if isinstance(kind, msgspec.inspect.CustomType):
        return kind.cls
    if isinstance(kind, tuple):
        return next(filter(None, (_unreadable(part, seen) for part in cast("tuple[object, ...]", kind))), None)
    is_spared = isinstance(kind, msgspec.inspect.UnionType) or not getattr(kind, "required", True)
    if is_spared or not isinstance(kind, msgspec.inspect.Type | msgspec.inspect.Field) or id(kind) in seen:
        return None
    seen.add(id(kind))
    return _unreadable(tuple(getattr(kind, name) for name in kind.__struct_fields__), seen)


def _is_pydantics(kind: object) -> bool:
    return isinstance(kind, type) and hasattr(kind, "__pydantic_validator__")


def _pydantics(kind: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yield pydantic's models and dataclasses that a type is made of, at any depth.

    What was seen is kept alive: evaluated annotations are new objects, and could be given the id of a collected one.
    """
    if id(kind) in seen:
        return
    seen[id(kind)] = kind
    if _is_pydantics(kind):
        yield kind
    parts = [*get_args(kind), *(getattr(kind, name, None) for name in ("__supertype__", "__value__", "__bound__"))]
    origin = get_origin(kind) or kind
    if isinstance(origin, type):
        try:
            parts += get_type_hints(origin, include_extras=True).values()
        except Exception:  # a name that is not defined, or whatever else annotations raise
            parts += []
    for part in parts:
        yield from _pydantics(part, seen)


def _by_pydantic(body: Any, models: Iterable[Any]) -> Codec:
    """Return the codec of a type that msgspec alone cannot read.

    Aliases are written if every model reads the ones that it writes; otherwise the fields' names are.
    """
    from pydantic import TypeAdapter  # an extra

    adapter = TypeAdapter[Any](body)
    by_alias = all(
        (field.validation_alias or name) == (field.serialization_alias or name)
        for model in models
        for name, field in _pydantic_fields(model).items()
    )
    read = partial(adapter.validate_json, strict=True)
    dump = partial(adapter.dump_json, by_alias=by_alias, round_trip=True, warnings=False)
    with suppress(ValueError):
        read(b"null")  # a type that names an undefined class raises here, not at the first send

    def write(value: object) -> bytes:
        content = dump(value)
        if b"Infinity" in content:  # a model can be told to write it, though JSON has no such number
            msgspec.json.decode(content)
        return content

    return Codec(body, read, write)


def _pydantic_fields(model: Any) -> dict[str, Any]:
    """Return the fields of a model or dataclass of pydantic's; before 2.10 a model had another name for them."""
    return cast("dict[str, Any]", getattr(model, "__pydantic_fields__", None) or getattr(model, "model_fields", {}))


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
    """Return a stored body as operators see it: decoded, or as bytes where it is no JSON or is nested too deeply."""
    if kind != JSON or is_too_deep(content):
        return content
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError):
        return content


def seen_as(body: type[Any] | UnionType, seen: object) -> Any:
    """Return a body that operators see as its queue's type, or unchanged where it is not of that type."""
    if isinstance(seen, bytes):
        return seen
    try:
        return codec_for(body).decode(JSON, _encode_json(seen))
    except ValueError:
        return seen


def seen_headers(headers: str | None) -> dict[str, str]:
    """Return stored headers as operators see them: unreadable ones as none."""
    try:
        return decode_headers(headers)
    except EngineError:
        return {}


def is_too_deep(content: bytes) -> bool:
    """Return whether a JSON text is nested deeper than `DEPTH_MAX`.

    A text too short for so many pairs of brackets costs nothing, and one that holds few costs only their count.
    """
    if len(content) <= SHALLOW_MAX or content.count(b"[") + content.count(b"{") <= DEPTH_MAX:
        return False
    if b"\\" in content:
        content = content.replace(rb"\\", b"").replace(rb"\"", b"")  # in this order: escapes are read from the left
    outside_strings = b"".join(content.split(b'"')[::2])
    brackets = outside_strings.translate(_AS_SQUARE, delete=_NO_BRACKETS)
    for _ in range(DEPTH_MAX):  # each round removes the innermost pairs
        left = brackets.replace(b"[]", b"")
        if len(left) == len(brackets):
            break
        brackets = left
    return bool(brackets)


_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def type_name(body: object) -> str:
    """Return a body type as its user wrote it."""
    return body.__qualname__ if isinstance(body, type) else repr(body)


def shown(value: object) -> str:
    """Return a value as an error text repeats it: short, and without the password of a URL."""
    try:
        text = repr(shown_url(value) if isinstance(value, str) and "://" in value else value)
    except Exception as error:
        text = f"<{type(value).__qualname__}, whose repr raised {type(error).__qualname__}>"
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


def said(error: Exception) -> str:
    """Return an exception's text, even if its own `__str__` fails."""
    try:
        return str(error)
    except Exception:
        return f"a {type(error).__qualname__} that cannot be printed"


_PLAIN = frozenset({str, int, float, bool, type(None), bytes, Decimal, datetime, date, timedelta, UUID})

_Unlike = tuple[str, str, str]
"""Where in a body a difference is, what differs, and what would become of it."""
_Again = Callable[[Any], Any]
_Parts = Iterable[tuple[Any, Any, Any]]
_LISTS: tuple[Any, ...] = (list, tuple)  # typed as Any: pyright would call their parts Unknown
_DICTS: tuple[Any, ...] = (dict,)
_SETS: tuple[Any, ...] = (set, frozenset)


class _Record(NamedTuple):
    """A class whose instances are written by their fields."""

    names: tuple[str, ...]
    of: Callable[[Any], tuple[Any, ...]]
    """Returns an instance's fields, in the order of their names."""


def _unlike(sent: Any, came: Any, again: _Again | None = None) -> _Unlike | None:
    """Return the first difference between a body and what it comes back as; None when there is none.

    Equality alone does not tell: 1.5 equals a `Decimal`, and a record's own `__eq__` may leave fields out. A value may
    come back as an equal one of a base class, as a member of a `str` Enum does where the type says `str`; but not a
    record, which would lose fields. An int may come back as the same float.

    Where no type says what a record comes back as, `again` reads it as a consumer would that names its class.
    """
    kind = type(sent)  # pyright: ignore[reportUnknownVariableType]
    record = _record(kind)
    if again is not None and (record is not None or kind is msgspec.Raw):
        try:
            came, again = (again(sent) if record else sent), None
        except ValueError as error:
            return "", f"the {kind.__qualname__}", f"does not fit its own class: {error}"
        except ConfigurationError:
            return None  # no consumer can name this class
    if kind is not type(came) and (record is not None or not _is_derived(sent, came)):
        return _of_another_type(sent, came)
    if isinstance(sent, _DICTS) and (other := _other_keys(sent, came)) is not None:
        return other
    parts = _parts(sent, came, record)
    if parts is None:
        return None if _is_equal(sent, came) else _of_another_value(sent, came)
    for name, part, its in parts:
        if type(part) is type(its) and type(part) in _PLAIN and part == its:
            continue
        if (found := _unlike(part, its, again)) is not None:
            place = f"[{shown(name)}]" if record is None else f".{name}"
            return place + found[0], *found[1:]
    return None


def _parts(sent: Any, came: Any, record: _Record | None) -> _Parts | None:
    """Return the name of each part of a value, with the part and what it comes back as; None when it has no parts."""
    if record is not None:
        return zip(record.names, record.of(sent), record.of(came))  # noqa: B905  # quicker; their lengths are equal
    if isinstance(sent, _LISTS) and len(sent) == len(came):
        return zip(range(len(sent)), sent, came)  # noqa: B905
    if isinstance(sent, _DICTS):
        item_of: Callable[[Any], Any] = came.__getitem__
        return zip(sent, sent.values(), map(item_of, sent))  # noqa: B905
    if isinstance(sent, _SETS) and sent == came:
        known = {item: item for item in came}
        return zip(sent, sent, map(known.__getitem__, sent))  # noqa: B905
    return None


def _find_record(kind: Any) -> _Record | None:
    if hasattr(kind, "__struct_fields__"):
        names = tuple(kind.__struct_fields__)
    elif dataclasses.is_dataclass(kind):
        names = tuple(field.name for field in dataclasses.fields(kind))
    elif _is_pydantics(kind):
        names = (*_pydantic_fields(kind), "model_extra")
    elif hasattr(kind, "__attrs_attrs__"):
        names = tuple(attribute.name for attribute in kind.__attrs_attrs__)
    else:
        return None

    def one_by_one(value: Any) -> tuple[Any, ...]:
        return tuple(getattr(value, name) for name in names)

    return _Record(names, attrgetter(*names) if len(names) > 1 else one_by_one)


_record: Callable[[Any], _Record | None] = lru_cache(maxsize=1024)(_find_record)
"""Return what a dataclass, an attrs class, a Struct or a pydantic model consists of; None for any other class."""


def _read_by_its_class(value: Any) -> Any:
    codec = codec_for(type(value))
    return codec.read(codec.write(value))


def _is_derived(sent: Any, came: Any) -> bool:
    """Return whether a value may come back as one of another class, if they are equal."""
    if type(sent) is int and type(came) is float:
        return True
    return isinstance(sent, type(came)) and not isinstance(sent, (bool, tuple))


def _other_keys(sent: Mapping[Any, Any], came: Mapping[Any, Any]) -> _Unlike | None:
    if [*map(type, sent)] == [*map(type, came)] and sent.keys() == came.keys():
        return None
    known = {key: key for key in came}
    for key in sent:
        if key not in known:
            is_text = isinstance(key, str)
            fate = "be lost" if is_text else "come back as a text, as all keys do in JSON"
            return "", f"the key {shown(key)}", f"would {fate}"
        if (found := _unlike(key, known[key])) is not None:
            return found
    added = [key for key in known if key not in sent]
    return ("", f"the key {shown(added[0])}", "would be added") if added else None


def _is_equal(sent: Any, came: Any) -> bool:
    if isinstance(sent, time):  # one whose zone depends on the date equals one without a zone
        return sent == came and (sent.tzinfo is None) is (came.tzinfo is None)
    if sent == came:
        return True
    return isinstance(sent, (datetime, Decimal)) and str(sent) == str(came)  # an hour repeated in autumn; NaN


def _of_another_type(sent: Any, came: Any) -> _Unlike:
    if isinstance(sent, float) and not math.isfinite(sent):
        return _of_another_value(sent, came)
    kind, other = type(sent).__qualname__, type(came).__qualname__
    if kind == other:  # as in a module that was loaded twice
        return "", f"the {kind}", "would come back as another class of that name. Send what the queue's type names"
    remedy = f"Send {_a(other)}, or say {kind} in the queue's type, as in filao.Queue(…, body=…)"
    return "", f"the {kind}", f"would come back as {_a(other)}. {remedy}"


def _of_another_value(sent: Any, came: Any) -> _Unlike:
    if isinstance(sent, float) and not math.isfinite(sent):
        return "", shown(sent), "is no number that JSON has"
    return "", shown(sent), f"would come back as {shown(came)}, as its type has it. Change the value or the type"


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


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


def _not_as_it_was(queue: str, body: object, where: str, what: str, fate: str) -> MessageNotEncodable:
    return MessageNotEncodable(
        f"queue {queue!r}: the body {shown(body)} would not be received as it is: {what}{_at(where)} {fate}. "
        f"Nothing was sent."
    )


def _not_of_type(queue: str, body: object, value: object, why: str) -> MessageNotEncodable:
    return MessageNotEncodable(
        f"queue {queue!r}: the body {shown(value)} is not {_a(type_name(body))}: {why}. Nothing was sent."
    )
