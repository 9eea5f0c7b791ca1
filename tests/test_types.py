"""What type checkers say of programs that use Filao: mypy and pyright, as a user runs them."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import filao

PRELUDE = """
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import assert_type
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

perhaps: filao.Queue[Claim | None] = filao.Queue("perhaps", Claim | None)

@worker.consumer(perhaps)
async def of_a_union(message: filao.Message[Claim | None]) -> None:
    assert_type(message.body, Claim | None)

class Bank: ...

@worker.lifespan
async def bank() -> AsyncIterator[Bank]:
    yield Bank()

@worker.lifespan
def number() -> Iterator[int]:
    yield 7

@worker.lifespan
async def text() -> AsyncGenerator[str]:
    yield ""

@worker.middleware
async def around(message: filao.Message) -> AsyncIterator[None]:
    yield

@worker.middleware
def in_place(message: filao.sync.Message) -> Iterator[None]:
    yield

def in_a_script(broker: filao.sync.Broker) -> None:
    broker.send_to_queue(claims, Claim(1), delay=2.5, group="a")
    broker.send_many(queue=claims, bodies=[Claim(1)], priority=1)
    assert_type(broker.stats("claims"), filao.QueueStats)
    assert_type(broker.stats(), list[filao.QueueStats])
    assert_type(broker.redrive(claims, ids=["1-1"], body=Claim(3)), int)
    assert_type(broker.dead_letters(claims), list[filao.StoredMessage[Claim]])
    assert_type(broker.receive_from_queue(claims), filao.sync.Message[Claim])
    assert_type(broker.receive_from_queue(claims, wait=1), filao.sync.Message[Claim] | None)
    for message in broker.consume(claims):
        with message.transaction() as transaction:
            assert_type(transaction.send_to_queue(claims, message.body), filao.Receipt)
        message.nack(delay=1.0, reason=OSError())
"""
WRONG = [
    "@worker.consumer(claims)\nasync def on_loop(message: filao.Message[int]) -> None: ...",
    "@worker.consumer(claims)\ndef in_thread(message: filao.sync.Message[int]) -> None: ...",
    "async def send(broker: filao.Broker) -> None:\n    await broker.send_to_queue(claims, 7)",
    "def send_blocking(broker: filao.sync.Broker) -> None:\n    broker.send_to_queue(claims, 7)",
    "def send_many(broker: filao.sync.Broker) -> None:\n    broker.send_many(claims, [7])",
    "def misspelled(broker: filao.sync.Broker) -> None:\n    broker.send_to_queue(claims, Claim(1), delai=7)",
    "def too_many(message: filao.sync.Message[Claim]) -> None:\n    message.ack(7)",
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
