"""Text from others, made safe for a terminal and a log: it can neither control them nor pass for another line.

An id, a header, an error or a file's name may hold escape sequences, line ends, or marks that reverse the direction of
reading. A character that does not print is written as its escape; all others are left as they are.
"""

import re
import unicodedata

_ASCII_ONLY = re.compile(r"[\x20-\x7e]*\Z")


def printable(text: str) -> str:
    r"""Return a text on one line, with `\x1b`, `\n` or `\u202e` in place of what does not print."""
    if _ASCII_ONLY.match(text):
        return text
    return "".join(map(_shown, text))


def some(number: int, noun: str, verbs: tuple[str, str] | None = None) -> str:
    """Return `1 message`, or `2,000 messages`; with `("is", "are")` also the verb that agrees with it."""
    are = "" if verbs is None else f" {verbs[number != 1]}"
    return f"{number:,} {noun}{'' if number == 1 else 's'}{are}"


def printable_json(content: bytes) -> bytes:
    r"""Return a JSON text that means the same, with `\u009b` in place of what does not print."""
    if content.isascii() and b"\x7f" not in content:
        return content  # JSON has escaped the rest
    return "".join(map(_escaped, content.decode())).encode()


def _prints(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _shown(character: str) -> str:
    return character if _prints(character) else character.encode("unicode_escape").decode()


def _escaped(character: str) -> str:
    if _prints(character) or character == "\n":
        return character
    return "".join(f"\\u{unit:04x}" for unit in memoryview(character.encode("utf-16-le")).cast("H"))
