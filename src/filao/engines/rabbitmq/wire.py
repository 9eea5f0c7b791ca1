"""Reading what other programs wrote, so that it cannot end our connection, and writing it so that AMQP can carry it.

The client library decodes each frame in the task that reads the connection. An error there ends the connection, the
message goes back to the head of its queue, and ends the next connection, too. So the decoders that raise are replaced
by ones that read what they can and mark it as `Mended` text or a `MendedTable`; the message is then `malformed`. What
the library can decode is decoded as before.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast

import pamqp.decode
import pamqp.encode
from pamqp.commands import Basic

DEPTH_MAX = 32  # tables within tables that we read and write again: a record of deaths has 3
HEADERS_MAX = 64 * 1024  # bytes of headers that we write again: a frame holds 128 KiB, a dead letter's error takes 8
SHORT_MAX = 255  # bytes of AMQP's short strings, which its ids are
NAME_MAX = 128  # bytes of a header's name; the client library cuts off the rest
TEXT_MAX = 1_000  # characters that stand for a value that cannot be written again
NO_DATE = datetime(1970, 1, 1, tzinfo=UTC)
_TOO_DEEP = "(nested too deeply)"
_UNREADABLE = "(unreadable)"
_TEXTS = (
    *("content_type", "content_encoding", "correlation_id", "reply_to", "expiration"),
    *("message_id", "message_type", "user_id", "app_id", "cluster_id"),
)


class Mended(str):
    """Text that was not UTF-8: an escape stands for each wrong byte."""

    __slots__ = ()


class MendedTable(dict[str, Any]):
    """A table as far as it could be read."""


def trouble(properties: Basic.Properties) -> str:
    """Return which of a message's properties could not be read, and why; empty when all could."""
    if isinstance(properties.headers, MendedTable):
        return "its headers are no table that AMQP knows, or hold a name that is not UTF-8, or are nested too deeply"
    for name in _TEXTS:
        if type(getattr(properties, name)) is Mended:
            return f"its {name} is not UTF-8: {getattr(properties, name)}"
    return ""


def text(value: object) -> str:
    """Return any header's value as a string, which is what Filao's headers are."""
    if isinstance(value, bytes | bytearray):
        return value.decode(errors="replace")
    try:
        return str(value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits
        return _TOO_DEEP


def carried(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers that AMQP can carry again: other values become text, and if it is too much, the largest are left
    out.
    """
    kept: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for name, value in headers.items():
        kept[name] = _carried(value)
        sizes[name] = len(name) + len(pamqp.encode.encode_table_value(kept[name]))
    while sum(sizes.values()) > HEADERS_MAX:
        largest = max(sizes, key=lambda name: sizes[name])
        del sizes[largest], kept[largest]
    return kept


def _carried(value: object) -> Any:
    if isinstance(value, bytes):
        value = bytearray(value)
    try:
        if _depth(value) <= DEPTH_MAX:
            pamqp.encode.encode_table_value(value)  # type: ignore[arg-type]  # raises for what it does not know
            return value
    except Exception:  # noqa: S110  # whatever was raised, AMQP cannot carry the value as it stands
        pass
    return text(value)[:TEXT_MAX]


def _depth(value: object) -> int:
    """Return how deep a value is nested; one more than `DEPTH_MAX` if it is deeper than that."""
    depth, level = 0, [value]
    while level and depth <= DEPTH_MAX:
        depth += 1
        level = [inner for outer in level for inner in _inside(outer)]
    return depth


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else ()


# --- the decoders that replace the library's -------------------------------------------------------------------------

_Decoder = Callable[[bytes], tuple[int, Any]]

_timestamp: _Decoder = pamqp.decode.timestamp
_short_str: _Decoder = pamqp.decode.short_str
_field_table: _Decoder = pamqp.decode.field_table


def read_timestamp(value: bytes) -> tuple[int, datetime]:
    """Read a timestamp; one that is no date, perhaps because its sender counts milliseconds, becomes `NO_DATE`."""
    try:
        return _timestamp(value)
    except (ValueError, OverflowError, OSError):
        return 8, NO_DATE


def read_short_text(value: bytes) -> tuple[int, str]:
    """Read a short string."""
    try:
        return _short_str(value)
    except UnicodeDecodeError:
        end = 1 + value[0]
        return end, Mended(_mended(value[1:end]))


def _mended(content: bytes) -> str:
    """Return text with an escape for each wrong byte, cut to what a short string can hold."""
    return content.decode(errors="backslashreplace").encode()[:SHORT_MAX].decode(errors="ignore")


def read_table(value: bytes) -> tuple[int, dict[str, Any]]:
    """Read a table: as the library does, and where it raises, as far as possible."""
    try:
        return _field_table(value)
    except (ValueError, ArithmeticError, RecursionError, LookupError):
        end = min(4 + int.from_bytes(value[:4]), len(value))
        return end, MendedTable(_entries(value[4:end], 1))


def _entries(content: bytes, depth: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    at = 0
    while at < len(content):
        start, at = at + 1, at + 1 + content[at]
        name = _mended(content[start:at])
        size, entries[name] = _value(content[at:], depth)
        at += size
    return entries


def _items(content: bytes, depth: int) -> list[Any]:
    items: list[Any] = []
    at = 0
    while at < len(content):
        size, item = _value(content[at:], depth)
        items.append(item)
        at += size
    return items


def _value(content: bytes, depth: int) -> tuple[int, Any]:
    """Return how many bytes a value takes, and the value; one of an unknown type takes all that is left."""
    kind, rest = content[:1], content[1:]
    if kind in (b"F", b"A"):
        end = min(4 + int.from_bytes(rest[:4]), len(rest))
        read: Callable[[bytes, int], Any] = _entries if kind == b"F" else _items
        return 1 + end, read(rest[4:end], depth + 1) if depth < DEPTH_MAX else _TOO_DEEP
    try:
        size, value = pamqp.decode.TABLE_MAPPING[kind](rest)
    except (ValueError, ArithmeticError, LookupError):
        return len(content), _UNREADABLE
    if isinstance(value, Decimal) and not value.is_finite():
        value = _UNREADABLE
    return 1 + size, value


def install() -> None:
    """Replace the library's decoders, which it looks up in these two tables."""
    pamqp.decode.METHODS |= {"timestamp": read_timestamp, "shortstr": read_short_text, "table": read_table}
    pamqp.decode.TABLE_MAPPING[b"T"] = read_timestamp
