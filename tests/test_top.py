"""`filao top`: what is drawn is a pure function; and a terminal that is given back."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

import filao
import filao.sync
from filao.cli.top import Reading, View, _in_lines, heading, keys_of, line, moved, read_again, screen
from filao.errors import EngineUnavailable
from tests.support.terminal import on_a_terminal, seen_on

PATIENCE = 60.0  # seconds after which a program that hangs is given up
FILAO = [sys.executable, "-m", "filao"]


def stats(
    name: str, *, ready: int = 0, age: float | None = None, sent: int = 0, paused: bool = False, dead: int = 0
) -> filao.QueueStats:
    return filao.QueueStats(name, paused, ready, 0, 0, 0, dead, age, sent=sent)


QUEUES = (stats("a", ready=9), stats("b", ready=1, age=90.0), stats("c", ready=2, age=5.0))
READING = Reading(0.0, QUEUES)


def test_the_queue_whose_message_waits_longest_stands_first() -> None:
    shown = screen(READING, View(), "claims.db", columns=80, rows=24)
    assert [text.lstrip("\x1b[7m")[0] for text in shown[4:7]] == ["b", "c", "a"]


def test_a_line_takes_eighty_columns_whatever_stands_in_it() -> None:
    wide = stats("q" * 128, ready=123_456_789_012, age=9e7, paused=True)
    assert len(line(wide, Reading(0.0, rates={wide.name: (1e9, 0.1)}))) <= 80
    assert len(heading()) == 80
    assert "\x1b" not in line(stats("a\x1b[2J"), READING)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (40, 6), (20, 3)])
def test_it_never_takes_more_than_the_terminal_has(columns, rows) -> None:
    many = Reading(0.0, [stats(f"queue-{number}", ready=number) for number in range(1_000)])
    for view in (View(), View(chosen="queue-777"), View(chosen="queue-777", is_inside=True)):
        shown = screen(many, view, "x" * 200, columns=columns, rows=rows)
        assert len(shown) <= max(rows, 3)
        assert max(len(re.sub(r"\x1b\[\d+m", "", text)) for text in shown) <= columns
    assert any("queue-777" in text for text in screen(many, View(chosen="queue-777"), "", columns=80, rows=24))


def test_names_that_begin_alike_are_told_apart_inside_and_on_a_wide_terminal() -> None:
    names = [f"insurer.claims.processing.{kind}" for kind in ("motor", "home")]
    alike = Reading(0.0, [stats(name, ready=1) for name in names])
    for name in names:
        assert any(name in text for text in screen(alike, View(), "", columns=120, rows=24))
        assert name in screen(alike, View(chosen=name, is_inside=True), "", columns=80, rows=24)


def test_a_narrow_terminal_shows_fewer_figures_but_each_whole() -> None:
    wide = stats("q" * 128, ready=12_345, dead=77_777, age=90.0)
    assert heading(40).split() == ["queue", "ready", "dead", "oldest"]
    assert line(wide, READING, 40).split() == ["q" * 15 + "…", "12345", "77777", "2", "min"]
    for columns in range(16, 100):
        keys = screen(READING, View(), "", columns=columns, rows=24)[-1]
        assert set(heading(columns).split()[1:]) <= set(heading().split())
        assert set(keys.split("  ")) <= {"q quit", "s sort", "Enter look into", "up/down choose"}


def test_a_low_terminal_shows_queues_rather_than_what_stands_around_them() -> None:
    (head, *lines) = screen(READING, View(chosen="c"), "claims.db", columns=20, rows=3)
    assert head.split() == ["queue", "ready"]
    assert [re.sub(r"\x1b\[\d+m", "", text).split()[0] for text in lines] == ["b", "c"]
    away = Reading(0.0, QUEUES, trouble="the server is away")
    assert screen(away, View(), "claims.db", columns=40, rows=5)[0] == "the server is away"


def test_keys_that_come_at_once_all_count() -> None:
    assert keys_of(b"jj\x1b[B\x1bOAs\r\x1b") == ["down", "down", "down", "up", "sort", "in", "out"]
    assert keys_of(b"\x1b[5~\x1b[1;2Ax\xff") == ["other"] * 4


def test_into_a_pipe_nothing_is_printed_as_seen_that_was_not(capfd) -> None:
    def fail() -> list[filao.QueueStats]:
        raise EngineUnavailable("the server is away")

    looks = iter([fail, fail, lambda: QUEUES])

    def look() -> Sequence[filao.QueueStats]:
        return next(looks)()

    _in_lines(look, READING, 0.0, 4)
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 1 + 2 * len(QUEUES)
    assert said.err.splitlines() == ["filao: the server is away", "filao: the store can be read again"]


def test_a_terminal_that_is_closed_ends_it_as_the_signal_does(tmp_path) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [*FILAO, "top", str(tmp_path / "claims.db")])
    seen_on(terminal, "claims")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129


def test_keys_choose_sort_and_look_into_a_queue() -> None:
    view = moved(View(), "down", READING)
    assert view.chosen == "c"
    view = moved(view, "in", READING)
    assert view.is_inside
    assert "nobody receives" in screen(READING, view, "", columns=80, rows=24)
    view = moved(moved(view, "out", READING), "sort", READING)
    assert (view.is_inside, view.sort) == (False, "ready")
    assert moved(View(), "down", Reading(0.0)) == View()


def test_a_store_that_is_away_is_told_and_what_was_seen_stays() -> None:
    def fail() -> list[filao.QueueStats]:
        raise EngineUnavailable("the server is away")

    again = read_again(fail, READING)
    assert again.queues == QUEUES
    assert "the server is away" in screen(again, View(), "", columns=80, rows=24)


def test_rates_are_what_was_sent_since_the_last_look() -> None:
    was = Reading(time.monotonic() - 10.0, [stats("a", sent=100)])
    rate, _ = read_again(lambda: [stats("a", sent=200), stats("new", sent=5)], was).rates["a"]
    assert 5 < rate <= 10


def test_a_queue_that_was_declared_anew_has_no_rate_below_nought() -> None:
    was = Reading(time.monotonic() - 1.0, [stats("a", sent=2_000_000)])
    again = read_again(lambda: [stats("a", sent=1)], was)
    assert again.rates == {"a": (0.0, 0.0)}


def test_what_an_engine_does_not_tell_is_no_nought_and_is_named() -> None:
    reading = Reading(0.0, [stats("a", ready=9)], {"a": (0.0, 0.0)}, untold="RabbitMQ does not tell what is leased")
    assert line(reading.queues[0], reading).split() == ["a", "9", "-", "-", "0", "-", "-", "-"]
    for view in (View(), View(chosen="a", is_inside=True)):
        shown = screen(reading, view, "", columns=80, rows=24)
        assert "RabbitMQ does not tell what is leased" in shown
        assert "nobody receives" not in shown


@pytest.fixture
def db(tmp_path: Path) -> Path:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.send_many("claims", range(3))
    return tmp_path / "claims.db"


def test_into_a_pipe_it_prints_plain_lines(db) -> None:
    done = subprocess.run(
        [*FILAO, "top", db, "--times", "2", "--every", "0.1"], capture_output=True, timeout=PATIENCE, check=True
    )
    head, *lines = done.stdout.decode().splitlines()
    assert head.split()[:2] == ["queue", "ready"]
    assert [text.split()[:2] for text in lines] == [["claims", "3"]] * 2
    assert b"\x1b" not in done.stdout


def test_on_a_terminal_keys_work_and_it_is_given_back(db) -> None:
    with on_a_terminal([*FILAO, "stats", "--watch", str(db)], COLUMNS="80", LINES="24") as terminal:
        seen = seen_on(terminal, "q quit")
        assert "claims" in seen
        os.write(terminal, b"\r")
        seen_on(terminal, "nobody receives")
        os.write(terminal, b"q")
        seen_on(terminal, "\x1b[?1049l")


def test_a_terminal_that_cannot_be_drawn_on_gets_plain_lines(db) -> None:
    with on_a_terminal([*FILAO, "top", str(db), "--times", "2", "--every", "0.1"], TERM="dumb") as terminal:
        seen = seen_on(terminal, "claims")
        with suppress(OSError):  # it has ended
            while read := os.read(terminal, 65_536):
                seen += read.decode()
    assert "\x1b" not in seen
    assert seen.count("claims") == 2


def test_while_it_is_stopped_the_terminal_is_given_back_and_a_new_size_is_drawn_in_at_once(db) -> None:
    """It looks once an hour, so what is drawn anew is not a look that was due."""
    with on_a_terminal([*FILAO, "top", str(db), "--every", "3600"], COLUMNS="", LINES="") as terminal:
        seen_on(terminal, "q quit")
        as_it_draws = termios.tcgetattr(terminal)[3]
        process = os.tcgetpgrp(terminal)
        os.write(terminal, b"\x1a")
        seen_on(terminal, "\x1b[?1049l")
        deadline = time.monotonic() + PATIENCE
        while os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOHANG) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert termios.tcgetattr(terminal)[3] & ~as_it_draws & termios.ECHO
        os.kill(process, signal.SIGCONT)
        seen_on(terminal, "\x1b[?1049h", "claims", "q quit")
        assert termios.tcgetattr(terminal)[3] == as_it_draws
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 30, 0, 0))
        seen_on(terminal, f"{heading(30)}\x1b[K")
        os.write(terminal, b"q")
        seen_on(terminal, "\x1b[?1049l")
