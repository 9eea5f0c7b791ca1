"""What type checkers say of programs that use Filao: mypy and pyright, as a user runs them."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import filao

PRELUDE = """
from dataclasses import dataclass
import filao
import filao.sync

@dataclass
class Claim:
    number: int

claims = filao.Queue("claims", body=Claim)
worker = filao.Worker("claims.db")
"""
RIGHT = """
@worker.consumer(claims)
async def on_loop(message: filao.Message[Claim]) -> None:
    print(message.body.number + 1)

@worker.consumer(filao.Queue("others", body=Claim))
def in_thread(message: filao.sync.Message[Claim]) -> None: ...

@worker.consumer("by.name", guarantee="exactly-once")
async def by_name(message: filao.Message[Claim], transaction: filao.Transaction) -> None: ...

@worker.consumer(filao.Queue("untyped"))
async def untyped(message: filao.Message) -> None: ...
"""
WRONG = [
    "@worker.consumer(claims)\nasync def on_loop(message: filao.Message[int]) -> None: ...",
    "@worker.consumer(claims)\ndef in_thread(message: filao.sync.Message[int]) -> None: ...",
    "async def send(broker: filao.Broker) -> None:\n    await broker.send_to_queue(claims, 7)",
]
MYPY = ["-m", "mypy", "--strict", "--no-error-summary", "--cache-dir"]
PYRIGHT = ["-m", "pyright", "--pythonpath", sys.executable]


def _checked(checker: str, path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    options = [*MYPY, str(cache)] if checker == "mypy" else PYRIGHT
    command = [sys.executable, *options, str(path)]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_checkers_see_which_handlers_and_bodies_fit_a_queue(checker: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    right = tmp_path / "right.py"
    right.write_text(PRELUDE + RIGHT)
    told = _checked(checker, right, cache)
    assert told.returncode == 0, told.stdout + told.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(PRELUDE + "\n" + "\n".join(WRONG))
    told = _checked(checker, wrong, cache)
    assert len(set(re.findall(r"wrong\.py:(\d+).*error", told.stdout))) == len(WRONG), told.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert filao.__version__ == version("filao")
