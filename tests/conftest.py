"""What tests share: a clock that they move, and the event loop they run on."""

from typing import Any

import pytest


class Clock:
    """Tells the seconds since 1970, and stands still until it is moved."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def engine_of(broker: Any) -> Any:
    """Look inside: return a broker's engine."""
    return broker._engine
