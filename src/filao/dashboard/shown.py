"""How things are shown on a page: bodies, ages, numbers and instants.

Jinja escapes all of it; here, what does not print is written as its escape, so that no mark turns the direction of
reading round, and what is long is cut.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from filao.languages import NARROW, NO_BREAK, Language
from filao.printable import printable

BODY_SHOWN_MAX = 64 * 1024  # characters of a body that a page shows before it is asked for all
NOTHING = "\N{EN DASH}"
HEX_ROW = 16  # bytes of one row


@dataclass(frozen=True, slots=True)
class Body:
    """A body as text."""

    text: str
    is_hex: bool
    """Its bytes, in rows."""
    size: int
    """Bytes, or characters of the JSON text."""
    cut: int
    """How many characters of the text are not shown."""


def body_of(body: Any, *, whole: bool = False) -> Body:
    """Return a body for a page: JSON with its lines indented, or bytes in hexadecimal."""
    if isinstance(body, bytes | bytearray):
        content = bytes(body)
        some = content if whole else content[: BODY_SHOWN_MAX // 4]  # a byte takes some four characters
        return Body(hexadecimal(some), is_hex=True, size=len(content), cut=len(content) - len(some))
    text = json_text(body)
    seen = text if whole else text[:BODY_SHOWN_MAX]
    return Body(lines(seen), is_hex=False, size=len(text), cut=len(text) - len(seen))


def json_text(body: Any) -> str:
    """Return a body as JSON that a person may edit."""
    try:
        return json.dumps(body, indent=2, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # what a user's redaction returned, say
        return json.dumps(msgspec.to_builtins(body, enc_hook=repr), indent=2, ensure_ascii=False)


def hexadecimal(content: bytes) -> str:
    """Return bytes in rows: the offset, the bytes in hexadecimal, and those that are characters."""
    rows: list[str] = []
    for first in range(0, len(content), HEX_ROW):
        row = content[first : first + HEX_ROW]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        rows.append(f"{first:08x}  {row.hex(' '):<{3 * HEX_ROW - 1}}  {letters}")
    return "\n".join(rows)


def lines(text: str) -> str:
    """Return a text of several lines, each made safe to show."""
    return "\n".join(printable(line) for line in text.replace("\r\n", "\n").split("\n"))


def number(language: Language, value: float) -> str:
    """Return a whole number as the language groups its digits, or one with a digit behind the point below 10."""
    text = f"{value:,.1f}" if isinstance(value, float) and 0 < value < 10 else f"{value:,.0f}"
    return text.replace(",", NARROW).replace(".", ",") if language == "fr" else text


def age(language: Language, seconds: float | None) -> str:
    """Return an age in the largest unit it fills."""
    if seconds is None:
        return NOTHING
    for unit, size in (("j" if language == "fr" else "d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{NO_BREAK}{unit}"
    return f"{max(seconds, 0.0):.0f}{NO_BREAK}s"


def since(language: Language, now: datetime, moment: datetime | None) -> str:
    """Return how long ago a moment was."""
    return NOTHING if moment is None else age(language, (now - moment).total_seconds())


def instant(moment: datetime | None) -> str:
    """Return a moment in UTC, to the second."""
    return NOTHING if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"
