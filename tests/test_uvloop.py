"""The contract under uvloop, which uvicorn takes where it is installed: its handles and sockets are other objects."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

import filao
from filao.conformance import Check, Stage, checks
from filao.testing import Clock
from tests.conftest import UVLOOP

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return UVLOOP


@pytest.fixture
async def stage(tmp_path: Path, clock: Clock) -> AsyncGenerator[Stage]:
    def connect() -> AbstractAsyncContextManager[filao.Broker]:
        return filao.connect(tmp_path / "claims.db", clock=clock)

    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    async with connect() as broker:
        yield Stage(broker, advance, connect, prefix="q")


@pytest.mark.parametrize("check", checks(filao.Feature), ids=lambda check: check.__name__.removeprefix("check_"))
async def test_the_contract(check: Check, stage: Stage) -> None:
    async with asyncio.timeout(60):
        await check(stage)
