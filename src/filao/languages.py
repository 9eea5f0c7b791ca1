"""The languages of our pages: which one a browser asks for, and how texts are filled and typeset in each.

The texts are in `.toml` files, one for each language, with the same keys.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")

NO_BREAK, NARROW = "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}"
HYPHEN = "\N{NON-BREAKING HYPHEN}"
PRONOUN = re.compile(r"(?<=\w)-(?=(?:t-)?(?:il|elle|on|le|la|les|lui|leur|en|y|moi|toi|nous|vous|ils|elles)\b)")
PLACE = re.compile(r"{([\w-]+)(?:\|([^|}]*)\|([^}]*))?}")


def wanted(accepted: str) -> Language:
    """Return the first of our languages in a browser's `Accept-Language`, or English."""
    for part in accepted.split(","):
        asked = part.split(";")[0].strip().lower().partition("-")[0]
        for language in LANGUAGES:
            if asked == language:
                return language
    return "en"


def fill(language: Language, text: str, values: Mapping[str, object]) -> str:
    """Fill a text: `{n}` is a value, in the language's notation; `{n|one|many}` is a word that agrees with it."""

    def filled(found: re.Match[str]) -> str:
        name, one, many = found.groups()
        value = values.get(name, "…")
        if one is not None:
            return one if _is_one(language, value) else many
        shown = str(value)
        is_number = re.fullmatch(r"-?\d+\.\d+", shown) is not None
        return shown.replace(".", ",") if is_number and language == "fr" else shown

    return PLACE.sub(filled, text)


def _is_one(language: Language, value: object) -> bool:
    if not isinstance(value, int | float):
        return False
    return abs(value) < 2 if language == "fr" else value == 1


def read_texts(path: Path, language: Language) -> dict[str, Any]:
    """Return the texts in a file, typeset."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return _typeset(found) if language == "fr" else found


def _typeset(value: Any) -> Any:
    """Typeset French texts, at any depth; what is between backticks is code, and stays as it is."""
    match value:
        case dict():
            return {key: _typeset(inner) for key, inner in cast("dict[str, Any]", value).items()}
        case list():
            return [_typeset(inner) for inner in list[Any](value)]  # pyright: ignore[reportUnknownArgumentType]  # TOML
        case _:
            parts = str(value).split("`")
            return "`".join(part if place % 2 else french(part) for place, part in enumerate(parts))


def french(text: str) -> str:
    """Return a French text with typographic apostrophes and no-break spaces; a verb keeps its pronoun: « est-il »."""
    text = text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
    text = re.sub(r" (?=[:»])|(?<=«) ", NO_BREAK, text)
    text = re.sub(r" (?=[;!?])", NARROW, text)
    text = re.sub(r"(?<=\b[Ll][ae]) (?={)", NO_BREAK, text)
    text = PRONOUN.sub(HYPHEN, text)
    return re.sub(r"(?<=[\d}]) (?=(?:s|ms|€|%|ko)\b)", NO_BREAK, text)
