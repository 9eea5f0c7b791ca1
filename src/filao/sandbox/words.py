"""What the page, the terminal and the lesson say, in each language, read from the `.toml` files beside this one."""

import re
import shlex
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filao.languages import Language, fill, read_texts
from filao.sandbox.steps import STEPS

FOLDER = Path(__file__).parent
PROGRAMS = FOLDER / "programs"
SOURCES = FOLDER.parents[2]


@cache
def words(language: Language) -> Mapping[str, Any]:
    """Return the texts of the page, by key; under `glossary`, a list of words and their meanings."""
    return _read("words", language)


@cache
def lesson(language: Language) -> Mapping[str, Mapping[str, Any]]:
    """Return the texts of the lesson, by step."""
    return _read("lesson", language)


@cache
def program(name: str, language: Language = "en") -> str:
    """Return a program that can be run as it is, with its comments and its output in a language."""
    text = (PROGRAMS / f"{name}.py").read_text(encoding="utf-8")
    if language != "en":
        told = tomllib.loads((FOLDER / f"programs.{language}.toml").read_text(encoding="utf-8"))
        for english, translated in told.items():
            text = text.replace(english, translated)
    return text


@cache
def python_errors(language: Language) -> Mapping[str, str]:
    """Return translations of Python's errors, by a regular expression that they match; none for English."""
    return {} if language == "en" else _read("errors", language)


def translated(language: Language, error: str) -> str:
    """Return an error of Python in a language; empty if there is no translation."""
    for says, means in python_errors(language).items():
        found = re.fullmatch(says, error, re.DOTALL)
        if found is not None:
            return fill(language, means, {str(place): text for place, text in enumerate(found.groups(), 1)})
    return ""


def further(language: Language) -> list[tuple[str, str]]:
    """Return where to read on: commands, and files of this machine, each with the key of its text."""
    files = {
        "further_readme": "README.md",
        "further_recipes": f"docs/{language}/how-to/join-a-transaction.md",
        "further_engines": f"docs/{language}/reference/engines.md",
        "further_insurer": "examples/insurance",
    }  # they are beside the sources, and not where only the package is installed
    here = [(str(SOURCES / path), key) for key, path in files.items() if (SOURCES / path).exists()]
    python = shlex.quote(sys.executable)
    commands = [
        (f"{python} -m pydoc filao", "further_api"),
        (f"{python} -m filao --help", "further_commands"),
        (f"{python} -m filao sandbox --terminal --language {language}", "further_terminal"),
    ]
    return [*commands, *here, (str(PROGRAMS), "further_programs")]


def page_words(language: Language) -> dict[str, Any]:
    """Return all texts of a page, the steps' buttons and conditions, and the programs."""
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
    return read_texts(FOLDER / f"{name}.{language}.toml", language)
