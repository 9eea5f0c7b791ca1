"""What the page and the lesson say, in each language, read from the `.toml` files beside this one; and how a page asks for it."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filao.sandbox.texts import LANGUAGES, Language

FOLDER = Path(__file__).parent
NO_BREAK = "\N{NO-BREAK SPACE}"
FRENCH_SPACE = re.compile(r"(?<=«) | (?=[?!:;»])")  # where French has a space at which no line may end
PROGRAMS = FOLDER / "programs"


@cache
def words(language: Language) -> Mapping[str, str]:
    """Return what the page says, by key."""
    return _read("words", language)


@cache
def lesson(language: Language) -> Mapping[str, Mapping[str, Any]]:
    """Return what the lesson says, by step."""
    return _read("lesson", language)


@cache
def program(name: str) -> str:
    """Return a program that can be run as it stands."""
    return (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")


def wanted(accepted: str) -> Language:
    """Return the language that a browser asks for by its `Accept-Language`: the first of ours, or English."""
    for part in accepted.split(","):
        asked = part.split(";")[0].strip().lower().partition("-")[0]
        for language in LANGUAGES:
            if asked == language:
                return language
    return "en"


def _read(name: str, language: Language) -> dict[str, Any]:
    text = (FOLDER / f"{name}.{language}.toml").read_text(encoding="utf-8")
    return tomllib.loads(FRENCH_SPACE.sub(NO_BREAK, text) if language == "fr" else text)
