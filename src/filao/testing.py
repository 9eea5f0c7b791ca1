"""For tests of programs that use Filao: a queue in memory, a clock that tests move, and handlers without a worker.

Put `pytest_plugins = ["filao.testing"]` into a `conftest.py` to have the fixtures. They are for plain tests. An
asynchronous test opens its own broker, `async with filao.connect("sqlite://:memory:", clock=filao_clock) as broker`,
and awaits `worker.drain(broker)`.
"""

import asyncio
from collections.abc import Generator
from contextlib import suppress

from filao import sync
from filao.codec import shown
from filao.errors import ConfigurationError
from filao.extras import Extra
from filao.worker.run import Handled
from filao.worker.worker import DRAINED_MAX, Worker

with Extra("pytest", of="filao.testing"):
    import pytest

__all__ = ["Clock", "drain", "filao_broker", "filao_clock"]

_ASYNCHRONOUS = "worker.drain(broker), with a filao.Broker"


class Clock:
    """Returns the seconds since 1970, and stands still until it is moved; for `filao.connect(…, clock=clock)`.

    Moving it wakes no caller that already waits: move it first, then receive with `wait=0`, or `drain`.
    """

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now: float = now
        """Seconds since 1970."""

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move it forward: delays, backoffs, leases and times to live of so many seconds are over."""
        self.now += seconds


@pytest.fixture
def filao_clock() -> Clock:
    """Return a clock that stands still until the test moves it."""
    return Clock()


@pytest.fixture
def filao_broker(filao_clock: Clock) -> Generator[sync.Broker]:
    """Yield an open blocking broker in memory, whose time is `filao_clock`'s."""
    with sync.connect("sqlite://:memory:", clock=filao_clock) as broker:
        yield broker


def drain(worker: Worker, broker: sync.Broker | None = None, *, limit: int = DRAINED_MAX) -> list[Handled]:
    """Handle everything that is ready, and what becomes ready meanwhile, and return what happened; see `Worker.drain`.

    `broker` is an open broker, such as `filao_broker`, to use in place of the worker's own. Coroutine functions run in
    the thread of its event loop.
    """
    if broker is None:
        _check_no_loop()
        return asyncio.run(worker.drain(limit=limit))
    if not isinstance(broker, sync.Broker):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise ConfigurationError(f"drain was given {shown(broker)}; give a filao.sync.Broker, or await {_ASYNCHRONOUS}")
    inner = sync.door_of(broker)
    return sync.call_on(broker, lambda: worker.drain(inner, limit=limit))


def _check_no_loop() -> None:
    """Raise `ConfigurationError` in a thread that runs an event loop, in which nothing may block."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigurationError(f"drain blocks, and this test runs on an event loop: await {_ASYNCHRONOUS}")
