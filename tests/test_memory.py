"""The seam is one: a toy engine in memory keeps the contract of the features that it claims."""

from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

import filao
from filao.conformance import Check, Stage, checks
from tests.support import memory
from tests.support.memory import MemoryEngine, Store

pytestmark = pytest.mark.anyio
LINES_MAX = 200  # that say something
_stages = count()


@pytest.fixture
async def stage(clock):
    store = Store(clock)

    @asynccontextmanager
    async def connect():
        async with filao.connect(lambda: MemoryEngine(store)) as broker:
            yield broker

    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    async with connect() as broker:
        yield Stage(broker, advance, connect, prefix=f"q{next(_stages)}")


CHECKS = checks(MemoryEngine.features)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_the_toy_engine_keeps_the_contract_of_what_it_claims(check: Check, stage: Stage) -> None:
    await check(stage)


def test_the_toy_engine_is_small() -> None:
    lines = Path(memory.__file__).read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < LINES_MAX


def test_an_engine_of_your_own_is_given_its_clock_by_what_makes_it(clock) -> None:
    with pytest.raises(filao.ConfigurationError, match="clock= are for URLs"):
        filao.connect(lambda: MemoryEngine(Store()), clock=clock)
