"""For tests of programs that use Filao: a queue in memory, a clock that they move, and a worker's handlers without a
worker.

The fixtures are pytest's: `pytest_plugins = ["filao.testing"]` in a `conftest.py`. All of it works in plain tests; an
asynchronous one opens its own broker, `async with filao.connect("sqlite://:memory:", clock=filao_clock) as broker`, and
awaits `worker.drain(broker)`.
"""

import asyncio
from collections.abc import Generator

import pytest

from filao import sync
from filao.worker.run import Handled
from filao.worker.worker import DRAINED_MAX, Worker

__all__ = ["Clock", "drain", "filao_broker", "filao_clock"]


class Clock:
    """Tells the seconds since 1970, and stands still until it is moved; for `filao.connect(…, clock=clock)`.

    Who waits already is not woken by it: move it, then receive with `wait=0`, or `drain`.
    """

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now: float = now
        """Seconds since 1970."""

    def __call__(self) -> float:
        """Tell the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move it forward: delays and backoffs of so many seconds are over, and leases and times to live."""
        self.now += seconds


@pytest.fixture
def filao_clock() -> Clock:
    """Return a clock that stands still until the test moves it."""
    return Clock()


@pytest.fixture
def filao_broker(filao_clock: Clock) -> Generator[sync.Broker]:
    """Yield an open, blocking broker on a queue in memory, whose time is `filao_clock`'s."""
    with sync.connect("sqlite://:memory:", clock=filao_clock) as broker:
        yield broker


def drain(worker: Worker, broker: sync.Broker | None = None, *, limit: int = DRAINED_MAX) -> list[Handled]:
    """Handle everything that is ready, and what becomes ready meanwhile, and return what happened: `Worker.drain`,
    blocking.

    `broker` is an open one, such as `filao_broker`, in place of the worker's own. Coroutine functions run in its
    thread.
    """
    if broker is None:
        return asyncio.run(worker.drain(limit=limit))
    inner = sync.door_of(broker)
    return sync.call_on(broker, lambda: worker.drain(inner, limit=limit))
