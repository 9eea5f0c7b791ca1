"""Text from others does nothing on a terminal, whatever command shows it, and forges no line of a log."""

import sys
import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import filao
import filao.sync
from filao.printable import printable, printable_json
from tests.support.shell import run, sent_to_terminal

UNPRINTABLE = [
    character
    for character in map(chr, range(1, sys.maxunicode))
    if unicodedata.category(character) in {"Cc", "Cf", "Zl", "Zp"}
]
TEXTS = [f"<{character}>" for character in UNPRINTABLE if ord(character) < 0x3000 or character == "\ufeff"]
EVERYTHING = "".join(TEXTS)  # short enough for a key
ACTING = "\x1b[2J\x1b]0;forged\x07 [red]markup[/red] [/] \x9b31m \u202etxt\nfilao: forged"


def check(screen: str) -> None:
    """Find nothing of what was put in, but as its escape."""
    assert not [text for text in TEXTS if text in screen]
    for part in ("\x1b[2J", "\x1b]0;", "\x9b", "\u202e", "\nfilao: forged", "\x7f"):
        assert part not in screen


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a text that is taken for a path makes a file
    path = tmp_path / "claims.db"
    with filao.sync.connect(path) as broker:
        broker.declare(filao.Queue("claims", max_attempts=1), filao.Queue("letters", max_attempts=1))
        for text in (ACTING, *(EVERYTHING[start : start + 200] for start in range(0, len(EVERYTHING), 200))):
            for queue in ("claims", "letters"):
                name = f"{queue}{text}"
                broker.send_to_queue(queue, {text: text}, message_id=name, headers={text: text}, group=text)
                broker.send_to_queue(queue, text.encode(), headers={text: text}, group=text)
        for message in broker.receive_many("letters", 100):
            message.reject(ACTING + EVERYTHING)
        for message in broker.receive_many("letters", 100):  # those of the same group
            message.reject(ACTING)
    return path


def test_no_command_lets_a_stored_text_act(file, tmp_path) -> None:
    for command in (
        ("peek", file, "claims", "--limit", "100"),
        ("dead", file, "letters"),
        ("stats", file),
        ("stats", file, "claims"),
        ("doctor", file),
        ("redrive", file, "letters", "--limit", "1"),
        ("receive", file, "claims"),
        ("receive", file, "claims", "--all", "--raw"),
        ("move", file, tmp_path / "other.db"),
        ("purge", file, "claims", "--yes"),
    ):
        code, screen = sent_to_terminal(*command)
        assert code in (0, 1), screen
        check(screen)


@pytest.mark.parametrize("text", [ACTING, EVERYTHING[:100], EVERYTHING[100:]], ids=["acting", "first", "rest"])
def test_no_command_lets_an_argument_act(file, text, tmp_path) -> None:
    for command in (
        ("peek", file, text),
        ("peek", file, "claims", "--after", text),
        ("send", file, "claims", text),
        ("send", file, "claims", "--raw", text, "--message-id", text),
        ("send", file, "claims", "1", "--header", text),
        ("redrive", file, "letters", "--id", text),
        ("declare", file, text),
        ("declare", file, "claims", f"--{text}"),
        ("declare", file, "claims", "--ttl", text),
        ("stats", tmp_path / text.replace("/", "")),
        ("stats", f"{text}://"),
        ("move", file, f"x{text}://"),
        ("work", text),
        (text,),
    ):
        _, screen = sent_to_terminal(*command)
        check(screen)


def test_json_means_the_same_in_a_pipe(file) -> None:
    lines = run("peek", file, "claims", "--limit", "100").lines
    assert lines[0]["body"] == {ACTING: ACTING}
    assert lines[0]["headers"] == {ACTING: ACTING}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_printable_text_prints(text) -> None:
    shown = printable(text)
    assert all(
        unicodedata.category(character)[0] not in "CZ" or character == " " or character in text for character in shown
    )
    assert not [character for character in shown if unicodedata.category(character) in {"Cc", "Cf", "Zl", "Zp"}]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_printable_json_means_the_same(text) -> None:
    content = printable_json(msgspec.json.encode([text]))
    assert msgspec.json.decode(content) == [text]
    assert not [
        character for character in content.decode() if unicodedata.category(character) in {"Cc", "Cf", "Zl", "Zp"}
    ]
