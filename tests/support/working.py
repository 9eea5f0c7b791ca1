"""What tests of workers share: a queue, a broker beside the worker, and how they wait for what it does."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import filao
from filao.worker.shift import Shift
from filao.worker.worker import Worker

PATIENCE = 30.0
CLAIMS = filao.Queue("claims", max_attempts=3, backoff=filao.Backoff(first=60, jitter=0))
AGAIN = dataclasses.replace(CLAIMS, backoff=filao.Backoff(first=0.01, jitter=0))


@dataclasses.dataclass
class Claim:
    number: int
    amount: float = 0.0


@pytest.fixture
async def broker(url) -> AsyncGenerator[filao.Broker]:
    async with filao.connect(url) as broker:
        await broker.declare(CLAIMS)
        yield broker


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # what happens in other threads sets no events
            await asyncio.sleep(0.005)


async def until_stats(broker: filao.Broker, queue: str = "claims", **wanted: int) -> filao.QueueStats:
    async with asyncio.timeout(PATIENCE):
        while True:
            stats = await broker.stats(queue)
            if all(getattr(stats, name) == count for name, count in wanted.items()):
                return stats
            await asyncio.sleep(0.005)


def shift_of(worker: Worker) -> Shift:
    """Look inside: return what a worker is doing."""
    shift = getattr(worker._status, "__self__", None)
    assert isinstance(shift, Shift)
    return shift


@asynccontextmanager
async def running(worker: Worker) -> AsyncGenerator["asyncio.Task[bool]"]:
    ready = asyncio.Event()
    task = asyncio.create_task(worker.run(ready=ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        yield task
    finally:
        worker.stop()
        async with asyncio.timeout(PATIENCE):
            await task


SHORT = dataclasses.replace(CLAIMS, lease=0.3)


def refused(register: Callable[[Worker], Any]) -> str:
    with pytest.raises(filao.ConfigurationError) as refusal:
        register(filao.Worker("claims.db"))
    return str(refusal.value)


async def plain(message: filao.Message) -> None: ...
