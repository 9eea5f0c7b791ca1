"""What tests of the command line share: the real program, run to its end, beside the test or on a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import filao
import filao.sync

FILAO = [sys.executable, "-m", "filao"]
PATIENCE = 30.0  # seconds after which a program that hangs is killed, and its test fails
PIPE_FULL = 200_000  # bytes of a body that no pipe holds, so that writing it waits for a reader
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "FILAO_URL"}
ENVIRONMENT |= {"TERM": "xterm", "COLUMNS": "80"}
AS_SHELLS_DO = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
COLOURS_AND_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Ran:
    """The result of a program: its exit code and its output."""

    code: int
    out: bytes
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def run(*arguments: str | Path, given: bytes = b"", url: str = "", program: list[str] = FILAO, **more: Any) -> Ran:
    done = subprocess.run(
        [*program, *map(str, arguments)],
        input=given,
        stdout=more.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | ({"FILAO_URL": url} if url else {}),
        timeout=PATIENCE,
        check=False,
        **more,
    )
    return Ran(done.returncode, done.stdout or b"", done.stderr.decode())


@contextmanager
def started(*arguments: str | Path, program: list[str] = FILAO, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the test, and end it with the block."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    command = [*program, *map(str, arguments)]
    opened: subprocess.Popen[bytes]
    opened = subprocess.Popen(command, env=ENVIRONMENT, bufsize=0, **streams)  # type: ignore[assignment]
    with opened as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[bytes]") -> bytes:
    """Wait for its next line."""
    assert process.stdout is not None
    line = b""
    while b"\n" not in line:
        assert select.select([process.stdout], [], [], PATIENCE)[0], f"it hangs after {line[:100]!r}"
        came = os.read(process.stdout.fileno(), 65_536)
        assert came, f"it ended, after {line[:100]!r}"
        line += came
    return line.partition(b"\n")[0]


def on_terminal(*arguments: str | Path, types: bytes = b"", when: bytes = b"") -> tuple[int, str]:
    """Run it on a terminal of its own, type something `when` that is shown, and return its exit code and the screen."""
    code, screen = sent_to_terminal(*arguments, types=types, when=when)
    return code, COLOURS_AND_MOVES.sub("", screen)


def sent_to_terminal(*arguments: str | Path, types: bytes = b"", when: bytes = b"") -> tuple[int, str]:
    """Return all that is written to a terminal."""
    terminal, inside = pty.openpty()
    screen = b""
    program = [sys.executable, "-S", "-c", AS_SHELLS_DO, *FILAO]  # so that Ctrl-C reaches it
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    with started(*arguments, program=program, start_new_session=True, **streams) as process:
        os.close(inside)
        while select.select([terminal], [], [], PATIENCE)[0]:
            try:
                shown = os.read(terminal, 65_536)
            except OSError:  # Linux's way to say that nobody holds the other side any more
                break
            if not shown:
                break
            screen += shown
            if types and when in screen:
                os.write(terminal, types)
                types = b""
        code = process.wait(PATIENCE)
    os.close(terminal)
    return code, screen.decode()


def run_each(commands: Iterable[Sequence[str | Path]], **more: Any) -> list[Ran]:
    """Run commands at the same time, which saves some of it."""
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda command: run(*command, **more), commands))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the programs share what Python compiles, wherever this runs: each start takes a quarter less."""
    ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)
    ENVIRONMENT["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.getbasetemp() / "compiled")


@pytest.fixture
def db(tmp_path: Path) -> Path:
    path = tmp_path / "claims.db"
    declare(path)
    return path


def declare(db: Path, name: str = "claims", **rules: Any) -> None:
    with filao.sync.connect(db) as broker:
        broker.declare(filao.Queue(name, **rules))


def put(db: Path, *bodies: object) -> list[str]:
    """Send without starting the program, which takes longer."""
    with filao.sync.connect(db) as broker:
        return [receipt.id for receipt in broker.send_many("claims", bodies)]


def bury(db: Path, *bodies: object) -> list[str]:
    """Make dead letters of these bodies."""
    ids = put(db, *bodies)
    with filao.sync.connect(db) as broker:
        for message in broker.receive_many("claims", len(bodies), wait=0):
            message.reject("no such policy")
    return ids


def waiting(db: Path) -> list[Any]:
    with filao.sync.connect(db) as broker:
        return [message.body for message in broker.peek("claims", limit=10_000)]


def counted(db: Path, queue: str = "claims") -> filao.QueueStats:
    with filao.sync.connect(db) as broker:
        return broker.stats(queue)
