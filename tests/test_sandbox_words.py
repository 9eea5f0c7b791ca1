"""What the sandbox says: the same in both languages, in the chapter's words, and typeset as each language is."""

import io
import re
import shlex
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import filao.sandbox.web.server
from filao.languages import LANGUAGES, fill, french, wanted
from filao.sandbox.claims import TEXTS
from filao.sandbox.exercise import CHECKS
from filao.sandbox.steps import STEPS
from filao.sandbox.words import FOLDER, PROGRAMS, further, lesson, page_words, program, translated, words

ROOT = Path(__file__).parents[1]
STATIC = Path(filao.sandbox.web.server.__file__).parent / "static"
EDITOR = 60  # characters of a line of the editor on 1280 pixels


def shape(value: Any) -> Any:
    """Return what must be the same in both languages: the keys, the places for values, the number of options."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return len(value)
    return sorted(set(re.findall(r"{([\w-]+)", value)) - {"n", "lost", "paid", "count", "attempt", "attempts"})


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    else:
        yield value


@pytest.mark.parametrize("read", [words, lesson], ids=["words", "lesson"])
def test_both_languages_say_the_same(read) -> None:
    assert shape(read("en")) == shape(read("fr"))


def test_every_step_is_told_and_has_a_right_answer() -> None:
    told = lesson("en")
    assert list(told) == [step.key for step in STEPS]
    for step in STEPS:
        assert set(told[step.key]["acts"]) == set(step.acts)
        assert set(told[step.key]["conditions"]) == set(step.conditions)
        assert 0 <= step.answer < len(told[step.key]["options"])
        assert told[step.key]["missed"]
    source = (STATIC.parents[1] / "steps.py").read_text()
    for key in {key for text in told.values() for key in text.get("hints", {})}:
        assert f'"{key}"' in source
    assert list(told["implement"]["conditions"]) == list(CHECKS)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*.py")))
def test_a_french_program_is_the_same_program_with_french_comments(name) -> None:
    english, found = program(name), program(name, "fr")
    comments = {one.string for one in tokens(english) if one.type == tokenize.COMMENT}
    assert comments.isdisjoint(one.string for one in tokens(found) if one.type == tokenize.COMMENT)
    assert [one.string for one in tokens(english) if one.type in (tokenize.NAME, tokenize.OP)] == [
        one.string for one in tokens(found) if one.type in (tokenize.NAME, tokenize.OP)
    ]
    assert max(map(len, found.splitlines())) <= 120


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_line_of_the_skeleton_is_wider_than_its_editor_on_a_laptop(language) -> None:
    assert [line for line in program("my_consumer", language).splitlines() if len(line) > EDITOR] == []


def tokens(code: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(code).readline))


def test_no_translation_of_the_programs_is_left_over() -> None:
    source = "".join(path.read_text() for path in PROGRAMS.glob("*.py"))
    told = tomllib.loads((FOLDER / "programs.fr.toml").read_text())
    assert [english for english in told if english not in source] == []


def test_whatever_can_go_wrong_has_words() -> None:
    source = "".join(path.read_text() for path in (STATIC.parents[1]).rglob("*.py"))
    said = words("en")
    for key in re.findall(r'RoomError\("(\w+)"', source):
        assert f"error_{key}" in said
    for key in TEXTS:
        assert f"error_csv_{key}" in said
    for key in re.findall(r'RedError\("(\w+)"|Result\("\w+", "(\w+)"', source):
        assert f"told_{''.join(key)}" in said
    for key in re.findall(r'RegisterError\("(\w+)"', source):
        assert f"fault_{key}" in said


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_the_sheet_names_to_read_on_works_as_it_stands(language) -> None:
    named = [where for where, _ in further(language)]
    files = [where for where in named if where.startswith(str(ROOT)) and not where.startswith(sys.executable)]
    assert len(files) == 5
    assert all(Path(where).exists() for where in files)
    commands = [shlex.split(where) for where in named if where not in files]
    for command in commands:
        shown = command if command[-1] == "filao" else [*command[:4], "--help"]
        assert works(*shown)
    assert {key for _, key in further(language)} <= set(words(language))


@cache
def works(*command: str) -> bool:
    """Return whether a command runs, which both languages name."""
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("code", "means"),
    [
        ("while True\n    pass", "il manque « : »"),
        ("def f():\nreturn 1", "il manque un bloc en retrait sous la ligne 1"),
        ("x = (1", "« ( » n'est jamais refermé"),
        ("x = 1)", "« ) » ne referme rien"),
        ("x = 'a", "il manque le guillemet qui termine un texte"),
        ("  x = 1", "retrait inattendu"),
        ("if 1:\n    x = 1\n  y = 2", "ce retrait ne correspond à aucun autre"),
        ("await x()", "« await » hors d'une fonction async"),
        ("def f():\n    await x()", "« await » hors d'une fonction async"),
        ("return 1", "« return » hors d'une fonction"),
        ("try:\n    x = 1\ny = 2", "un « try » sans « except » ni « finally »"),
        ("x = [1 2]", "syntaxe incorrecte : manque-t-il une virgule ?"),
        ("x y", "syntaxe incorrecte"),
    ],
)
def test_what_python_says_of_wrong_code_is_told_in_french(code, means) -> None:
    with pytest.raises(SyntaxError) as caught:
        compile(code, "my_consumer.py", "exec")
    assert translated("fr", caught.value.msg) == french(means)
    assert translated("en", caught.value.msg) == ""


@pytest.mark.parametrize(
    ("code", "means"),
    [
        ("claim", "NameError : le nom « claim » n'est pas défini"),
        ("{}['policy']", "KeyError : il n'y a pas de clé « policy »"),
        ("''.ack()", "AttributeError : un objet str n'a pas d'attribut « ack »"),
        ("(lambda: 0)(reason=1)", "TypeError : <lambda>() ne connaît pas l'argument « reason »"),
        ("(lambda a: a)()", "TypeError : il manque à <lambda>() l'argument 'a'"),
        ("(lambda a: a)(1, 2)", "TypeError : <lambda>() reçoit 2 arguments au lieu de 1"),
        ("1 / 0", "ZeroDivisionError : division par zéro"),
        ("__import__('nowhere')", "ModuleNotFoundError : il n'y a pas de module « nowhere »"),
        ("[][0]", "IndexError : il n'y a pas tant d'éléments"),
    ],
)
def test_the_usual_errors_of_running_code_are_told_in_french(code, means) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever it is
        eval(code)
    said = f"{type(caught.value).__name__}: {caught.value}"
    assert translated("fr", said).replace("'", "\N{RIGHT SINGLE QUOTATION MARK}") == french(means)


def test_all_that_the_page_asks_for_has_words_and_no_word_is_left_over() -> None:
    source = "".join(path.read_text() for path in STATIC.glob("*.js"))
    source += "".join(path.read_text() for path in STATIC.parents[1].glob("*.py"))
    asked = set(re.findall(r'say\(\s*"([\w-]+)"', source)) - {"own"}
    said = set(words("en"))
    assert asked <= said
    kinds: tuple[str, ...] = (
        "error",
        "event",
        "fault",
        "how",
        "reason",
        "rule",
        "slide",
        "load",
        "stage",
        "state",
        "tab",
        "told",
    )
    kinds += ("trial", "why", "check", "slow", "further")
    begun = (*(f"{kind}_" for kind in kinds), "at-", "exactly-", "glossary")
    by_name = set(re.findall(r'["\']([\w-]+)["\']|words\.(\w+)', source))
    named = {name for pair in by_name for name in pair}
    left = {key for key in said - asked - named if not key.startswith(begun) and not key.endswith("_n")}
    assert left == set()


def test_french_is_typeset() -> None:
    for text in [*texts(dict(words("fr"))), *texts(dict(lesson("fr")))]:
        plain = re.sub(r"`[^`]*`", "", text)
        assert "'" not in plain, text
        assert not re.search(r" [:;!?»]|« ", plain), text
        assert not re.search(r"\d (s|ms|ko|%)\b", plain), text
    assert french("traite-t-on le tout ? remettez-la") == "traite\u2011t\u2011on le tout\u202f? remettez\u2011la"
    assert french("tué, la {claim} en main") == "tué, la\u00a0{claim} en main"
    assert french("l'agent : « oui » !") == "l\u2019agent\u00a0: «\u00a0oui\u00a0»\u202f!"


def test_the_chapters_words_are_used() -> None:
    told = " ".join([*texts(dict(words("fr"))), *texts(dict(lesson("fr")))]).lower()
    glossary = " ".join(entry["meaning"].lower() for entry in words("fr")["glossary"])
    for unwanted in ("sinistre", "agent", "rentré", "éditeur de lettres"):
        assert len(re.findall(rf"\b{unwanted}s?\b", told)) == len(re.findall(rf"\b{unwanted}s?\b", glossary)), unwanted
    for wanted_word in ("réclamation", "consommateur", "producteur", "queue", "acquitte"):
        assert wanted_word in told


@pytest.mark.parametrize(
    ("language", "value", "text"),
    [
        ("fr", 0, "0 envoyée"),
        ("fr", 1, "1 envoyée"),
        ("fr", 2, "2 envoyées"),
        ("en", 1, "1 letter"),
        ("en", 0, "0 letters"),
    ],
)
def test_words_agree_with_their_number(language, value, text) -> None:
    template = "{n} {n|envoyée|envoyées}" if language == "fr" else "{n} {n|letter|letters}"
    assert fill(language, template, {"n": value}) == text


def test_numbers_are_written_as_their_language_does() -> None:
    assert fill("fr", "{s}", {"s": "0.5"}) == "0,5"
    assert fill("en", "{s} {unknown}", {"s": "0.5"}) == "0.5 …"


@pytest.mark.parametrize(
    ("accepted", "language"), [("fr-CA,fr;q=0.9,en;q=0.8", "fr"), ("de,en;q=0.5", "en"), ("", "en"), ("*", "en")]
)
def test_a_browser_is_answered_in_a_language_that_it_asks_for(accepted, language) -> None:
    assert wanted(accepted) == language


def test_a_page_is_told_all_that_it_needs() -> None:
    told = page_words("fr")
    assert [step["key"] for step in told["steps"]] == [step.key for step in STEPS]
    assert "my_consumer" in told["programs"]
    assert all(len(entry) == 2 for entry in told["glossary"])
