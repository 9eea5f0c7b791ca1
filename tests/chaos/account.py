"""What a scenario is, and the account of one: recovery, silence, lost, doubled."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filao
from filao.engine import Feature
from tests.support.load import QUEUE, Load, loaded

SAMPLED = 0.002  # seconds
RECOVERS_WITHIN = 60.0  # seconds: a bound on a hang; how long it took is in the account
DRAINERS = 16  # who handle what is left, together


@dataclass
class Chaos:
    """One scenario while it plays."""

    load: Load
    recoveries: list[float] = field(default_factory=list)
    silence: float = 0.0
    """The longest time in which nothing was confirmed, or nothing acknowledged, in seconds."""
    remarks: list[str] = field(default_factory=list)
    others: list["Chaos"] = field(default_factory=list)
    """Other loads of the same scenario, on other queues."""

    async def recovered(self) -> None:
        """Note the seconds from now, when the fault is over, to the first confirmed send and the first ack."""
        began = time.monotonic()
        sent, acked = len(self.load.confirmed), self.load.acked.total()
        async with asyncio.timeout(RECOVERS_WITHIN):
            while len(self.load.confirmed) == sent or self.load.acked.total() == acked:
                await asyncio.sleep(SAMPLED)
        self.recoveries.append(time.monotonic() - began)
        await self.load.resumes(RECOVERS_WITHIN)

    async def listen(self) -> None:
        """Measure the silence, for ever."""
        seen, since = (0, 0), [time.monotonic()] * 2
        while True:
            now = time.monotonic()
            heard = len(self.load.confirmed), self.load.acked.total()
            for side in range(2):
                if heard[side] != seen[side]:
                    self.silence = max(self.silence, now - since[side])
                    since[side] = now
            seen = heard
            await asyncio.sleep(SAMPLED)

    @property
    def loads(self) -> list[Load]:
        """All loads of the scenario."""
        return [self.load, *(other.load for other in self.others)]

    @property
    def acked(self) -> int:
        """How often an ack was confirmed."""
        return sum(load.acked.total() for load in self.loads)

    @property
    def confirmed(self) -> int:
        """How many sends were confirmed."""
        return sum(len(load.confirmed) for load in self.loads)

    @property
    def lost(self) -> int:
        """How many messages were confirmed and never delivered."""
        return sum(len(load.lost) for load in self.loads)

    @property
    def doubled(self) -> int:
        """How many messages were acknowledged twice, and both times that was confirmed."""
        return sum(times > 1 for load in self.loads for times in load.acked.values())

    @property
    def again(self) -> int:
        """How many were delivered more than once, which is allowed."""
        return sum(times > 1 for load in self.loads for times in load.handled.values())


Play = Callable[[Path], Coroutine[Any, Any, Chaos]]


@dataclass(frozen=True)
class Scenario:
    """What can happen to an engine."""

    name: str
    engine: str
    play: Play
    story: str


SCENARIOS: dict[str, Scenario] = {}


def scenario(engine: str) -> Callable[[Play], Play]:
    """Register a function as a scenario; its name is the function's."""

    def register(play: Play) -> Play:
        name = play.__name__.replace("_", "-")
        SCENARIOS[name] = Scenario(name, engine, play, (play.__doc__ or "").strip().splitlines()[0])
        return play

    return register


@asynccontextmanager
async def under_load(url: str, after: str = "", *, queue: filao.Queue = QUEUE) -> AsyncGenerator[Chaos]:
    """Send and consume through `url`, with two connected brokers; in the end handle what is left, through `after`."""
    async with filao.connect(url) as senders, filao.connect(url) as consumers:
        await senders.declare(queue)
        transacts = Feature.TRANSACTIONS in senders.features
        async with loaded(senders, consumers, transacts=transacts, queue=queue) as load:
            chaos = Chaos(load)
            await load.resumes(RECOVERS_WITHIN)
            listening = asyncio.create_task(chaos.listen())
            try:
                yield chaos
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    async with filao.connect(after or url) as last:
        await asyncio.gather(*(load.finish(last) for _ in range(DRAINERS)))
