"""What the page, the terminal and the lesson say, in each language, read from the `.toml` files beside this one."""

import re
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from filao.sandbox.steps import STEPS

Language = Literal["en", "fr"]
LANGUAGES: tuple[Language, ...] = ("en", "fr")

FOLDER = Path(__file__).parent
PROGRAMS = FOLDER / "programs"
SOURCES = FOLDER.parents[2]
NO_BREAK, NARROW = "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}"
PLACE = re.compile(r"{([\w-]+)(?:\|([^|}]*)\|([^}]*))?}")


@cache
def words(language: Language) -> Mapping[str, Any]:
    """Return what the page says, by key; under `glossary` a list of words and their meanings."""
    return _read("words", language)


@cache
def lesson(language: Language) -> Mapping[str, Mapping[str, Any]]:
    """Return what the lesson says, by step."""
    return _read("lesson", language)


@cache
def program(name: str, language: Language = "en") -> str:
    """Return a program that can be run as it stands, with its comments and what it prints in a language."""
    text = (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
    if language != "en":
        told = tomllib.loads((FOLDER / f"programs.{language}.toml").read_text(encoding="utf-8"))
        for english, translated in told.items():
            text = text.replace(english, translated)
    return text


@cache
def python_errors(language: Language) -> Mapping[str, str]:
    """Return what errors of Python mean, by a regular expression that they match; nothing in English."""
    return {} if language == "en" else _read("errors", language)


def translated(language: Language, error: str) -> str:
    """Return an error of Python in a language; empty where its meaning is not known."""
    for says, means in python_errors(language).items():
        found = re.fullmatch(says, error, re.DOTALL)
        if found is not None:
            return fill(language, means, {str(place): text for place, text in enumerate(found.groups(), 1)})
    return ""


def further(language: Language) -> list[tuple[str, str]]:
    """Return where to read on, as it stands: commands, and files of this machine; each with the key of its text."""
    files = {
        "further_readme": "README.md",
        "further_recipes": f"docs/{language}/how-to/join-a-transaction.md",
        "further_engines": f"docs/{language}/reference/engines.md",
        "further_insurer": "examples/insurance",
    }  # which lie beside the sources, and not where only the package is installed
    here = [(str(SOURCES / path), key) for key, path in files.items() if (SOURCES / path).exists()]
    commands = [
        (f"{sys.executable} -m pydoc filao", "further_api"),
        (f"{sys.executable} -m filao --help", "further_commands"),
        (f"{sys.executable} -m filao sandbox --terminal --language {language}", "further_terminal"),
    ]
    return [*commands, *here, (str(PROGRAMS), "further_programs")]


def wanted(accepted: str) -> Language:
    """Return the language that a browser asks for by its `Accept-Language`: the first of ours, or English."""
    for part in accepted.split(","):
        asked = part.split(";")[0].strip().lower().partition("-")[0]
        for language in LANGUAGES:
            if asked == language:
                return language
    return "en"


def fill(language: Language, text: str, values: Mapping[str, object]) -> str:
    """Fill a text: `{n}` is a value, written as the language does; `{n|one|many}` a word that agrees with it."""

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


def page_words(language: Language) -> dict[str, Any]:
    """Return all that a page needs to speak: texts, the steps' buttons and conditions, the programs."""
    found = dict(words(language))
    glossary = [[entry["word"], entry["meaning"]] for entry in found.pop("glossary")]
    steps = [
        {"key": step.key, "acts": list(step.acts), "conditions": list(step.conditions), "answer": step.answer}
        for step in STEPS
    ]
    programs = {path.stem: program(path.stem, language) for path in sorted(PROGRAMS.glob("*.py"))}
    told = {"language": language, "words": found, "lesson": lesson(language), "steps": steps, "programs": programs}
    return told | {"glossary": glossary, "python_errors": python_errors(language), "further": further(language)}


def _read(name: str, language: Language) -> dict[str, Any]:
    found = tomllib.loads((FOLDER / f"{name}.{language}.toml").read_text(encoding="utf-8"))
    return _typeset(found) if language == "fr" else found


def _typeset(value: Any) -> Any:
    """Give French its apostrophes, and the spaces at which no line may end; what stands between backticks is code."""
    match value:
        case dict():
            return {key: _typeset(inner) for key, inner in cast("dict[str, Any]", value).items()}
        case list():
            return [_typeset(inner) for inner in list[Any](value)]  # pyright: ignore[reportUnknownArgumentType]  # TOML
        case _:
            parts = str(value).split("`")
            return "`".join(part if place % 2 else french(part) for place, part in enumerate(parts))


def french(text: str) -> str:
    """Return a French text with typographic apostrophes and no-break spaces."""
    text = text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
    text = re.sub(r" (?=[:»])|(?<=«) ", NO_BREAK, text)
    text = re.sub(r" (?=[;!?])", NARROW, text)
    return re.sub(r"(?<=[\d}]) (?=(?:s|ms|€|%|ko)\b)", NO_BREAK, text)
