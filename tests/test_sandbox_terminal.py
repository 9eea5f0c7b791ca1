"""The lesson's other face: all steps in a terminal, from a pipe and by keys, in both languages; nothing is left at
the end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from filao.languages import Language
from filao.sandbox.room import Room
from filao.sandbox.steps import STEPS
from filao.sandbox.terminal import Face
from filao.sandbox.visits import Visit
from filao.sandbox.words import lesson, program, words
from tests.support.terminal import on_a_terminal, seen_on
from tests.test_sandbox_exercise import TRANSACTION, code

PATIENCE = 120.0
SANDBOX = [sys.executable, "-m", "filao", "sandbox", "--terminal"]
SPEED = "5"  # as in a browser
WISHES = [  # what the page of each step says, and then the next one
    *("1", "w", "n", "1", "w", "n", "1", "w", "n", "1", "w", "n", "1", "w", "2", "w", "n", "1", "w", "2", "w", "n"),
    *("1", "w1", "2", "w1", "3", "w", "n", "1", "w", "2", "w", "3", "w", "n", "1", "w", "n", "1", "w", "n", "c", "w"),
]


class Pipe:
    """`filao sandbox --terminal` at the end of two pipes."""

    def __init__(self, folder: Path, language: Language) -> None:
        self.folder = folder
        self._log = folder / "out.txt"
        (folder / "files").mkdir(parents=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "filao", "sandbox", "--terminal", "--language", language, "--speed", SPEED],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env=os.environ | {"TMPDIR": str(folder / "files"), "PYTHONIOENCODING": "utf-8"},
            )

    def ask(self, wish: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(wish.encode() + b"\n")
        self.process.stdin.flush()

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def left(self) -> list[str]:
        return [str(path) for path in (self.folder / "files").iterdir()]


@contextmanager
def piped(folder: Path, language: Language) -> Iterator[Pipe]:
    running = Pipe(folder, language)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        if running.process.stdin is not None:
            running.process.stdin.close()


@pytest.fixture
def pipe(tmp_path) -> Iterator[Pipe]:
    with piped(tmp_path, "en") as running:
        yield running


def test_all_eleven_steps_are_done_from_a_pipe_in_both_languages(tmp_path) -> None:
    with piped(tmp_path / "en", "en") as english, piped(tmp_path / "fr", "fr") as french:  # mostly they wait
        for pipe in (english, french):
            (pipe.folder / "my_consumer.py").write_text(code(TRANSACTION))
            for wish in [*(wish[:1] for wish in WISHES), "q"]:
                pipe.ask(wish)
        has_done_all(english, "en")
        has_done_all(french, "fr")


def has_done_all(pipe: Pipe, language: Language) -> None:
    assert pipe.process.wait(3 * PATIENCE) == 0
    said = pipe.said()
    assert lesson(language)["create"]["acts"]["create"] in said
    titles = re.findall(r"(\d+)/11 · [^·]+ · (\d+) ✓", said)
    assert titles[-1] == (str(len(STEPS)), str(len(STEPS)))
    assert words(language)["terminal_ended"] in said
    assert pipe.left() == []


def test_a_wish_that_makes_no_sense_is_told_and_what_cannot_be_done_says_why(pipe) -> None:
    for wish in ("k9", "s", "9", "??", "p", "q"):
        pipe.ask(wish)
    assert pipe.process.wait(PATIENCE) == 0
    assert "Consumer 9 is not there any more" in pipe.said()
    assert "create claims.processing first" in pipe.said()


def test_where_there_is_no_code_yet_the_skeleton_is_put_there(pipe, tmp_path) -> None:
    for wish in (*("n" * 10), "c"):
        pipe.ask(wish)

    def is_told() -> bool:
        pipe.ask("?")  # anything: it is answered by what then stands
        return "Acknowledged before it was paid" in re.sub(r"\s+", " ", pipe.said())

    until(is_told)
    pipe.ask("q")
    assert pipe.process.wait(PATIENCE) == 0
    assert (tmp_path / "my_consumer.py").read_text() == program("my_consumer")


def test_what_cannot_be_read_or_counted_is_told_and_ends_nothing(pipe, tmp_path) -> None:
    (tmp_path / "my_consumer.py").mkdir()
    for wish in ("k" + "9" * 5_000, *("n" * 10), "c", "q"):
        pipe.ask(wish)
    assert pipe.process.wait(PATIENCE) == 0
    assert "Consumer 999999999 is not there any more" in pipe.said()
    assert "Is a directory" in pipe.said()


@pytest.mark.anyio
async def test_a_key_is_waited_for_while_the_number_of_a_consumer_may_go_on(tmp_path) -> None:
    (tmp_path / "room").mkdir()
    visit = Visit(await Room(tmp_path / "room").__aenter__())
    lanes = visit.room.lanes
    lanes.expect(1, 0)
    lanes.expect(12, 0)
    face = Face(visit, "en")
    wishes = [wish for wish in ("k", "k1", "k12", "k1\n", "k3", "+", "\n") if face.is_whole(wish)]
    lanes.by_number.clear()
    await visit.close()
    assert wishes == ["k12", "k1\n", "k3", "+", "\n"]


@pytest.mark.anyio
async def test_no_line_begins_with_a_sign_that_belongs_to_the_word_before(tmp_path) -> None:
    (tmp_path / "room").mkdir()
    visit = Visit(await Room(tmp_path / "room").__aenter__())
    face, lines = Face(visit, "fr"), []
    for step in range(len(STEPS)):
        visit.go(step)
        for width in range(60, 90, 7):
            drawn = Console(width=width).render_lines(face.drawn(), pad=False)
            lines += ["".join(segment.text for segment in line).strip("│ \u00a0\u202f") for line in drawn]
    await visit.close()
    assert [line for line in lines if line[:1] in {":", ";", "?", "!", "»"}] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_leaves_nothing(pipe, number) -> None:
    for wish in ("1", "w", "n", "n", "n", "1"):
        pipe.ask(wish)
    until(lambda: "[3]" in pipe.said() or "4/11" in pipe.said())
    pipe.process.send_signal(number)
    assert pipe.process.wait(PATIENCE) == 128 + number
    assert pipe.left() == []


def test_keys_are_enough_on_a_terminal(tmp_path) -> None:
    with on_a_terminal(SANDBOX, TMPDIR=str(tmp_path), COLUMNS="110", LINES="60") as terminal:
        seen_on(terminal, "Create the queue")
        os.write(terminal, b"\n")  # the first action that can be done
        seen_on(terminal, "1 ✓")
        os.write(terminal, b"nk1")  # nobody is there to be killed
        seen_on(terminal, "Consumer 1 is not there")
        os.write(terminal, b"q")
    assert list(tmp_path.iterdir()) == []


def test_on_a_low_terminal_consumers_why_and_keys_are_in_sight_together(tmp_path) -> None:
    with on_a_terminal([*SANDBOX, "--speed", "10"], TMPDIR=str(tmp_path), COLUMNS="80", LINES="24") as terminal:
        seen_on(terminal, "Create the queue")
        os.write(terminal, b"nnn1")
        seen_on(terminal, "Each claim went")
        seen_on(terminal, "q: leave", "Each claim went", "Consumer 3")
        os.write(terminal, b"q")


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
