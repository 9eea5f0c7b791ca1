"""What checks are given, the words that they use, and how they are entered into the contract."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from filao.broker import Broker
from filao.engine import Feature, QueueStats
from filao.errors import FilaoError
from filao.message import Message
from filao.queue import EMULATED, Queue

SOON = 10.0  # seconds that a check waits for what should come at once


@dataclass(slots=True)
class Stage:
    """What a check is given: `broker` is open; `advance` lets so many seconds pass; `connect` opens another broker.

    `slack` is by how many seconds the engine's clock may be late: 0 if `advance` moves it.
    """

    broker: Broker
    advance: Callable[[float], Awaitable[None]]
    connect: Callable[[], AbstractAsyncContextManager[Broker]]
    prefix: str = "conformance"
    slack: float = 0.0
    declared: list[Queue[Any]] = field(default_factory=list[Queue[Any]])
    _numbers: "count[int]" = field(default_factory=count)

    async def queue(self, **rules: Any) -> Queue[Any]:
        """Declare a fresh queue."""
        queue: Queue[Any] = Queue(f"{self.prefix}.{next(self._numbers)}", emulate=EMULATED, **rules)
        self.declared.append(queue)
        await self.broker.declare(queue)
        return queue

    async def send(self, queue: Queue[Any], *bodies: Any, **terms: Any) -> list[str]:
        """Send bodies one after the other, and return their ids."""
        return [(await self.broker.send_to_queue(queue, body, **terms)).id for body in bodies]

    async def next(self, queue: Queue[Any], **terms: Any) -> Message[Any]:
        """Receive a message that must be there."""
        message = await self.broker.receive_from_queue(queue, wait=0, **terms)
        if message is None:
            raise AssertionError(f"nothing to receive from {queue.name}")
        return message

    async def back(self, queue: Queue[Any]) -> Message[Any]:
        """Receive a message that must come back, which may take a moment."""
        message = await self.broker.receive_from_queue(queue, wait=SOON)
        if message is None:
            raise AssertionError(f"nothing came back to {queue.name}")
        return message

    async def nothing(self, queue: Queue[Any]) -> None:
        """Check that nothing can be received."""
        equal(await self.broker.receive_from_queue(queue, wait=0), None)

    async def drain(self, queue: Queue[Any]) -> list[Any]:
        """Receive and acknowledge all that is there, and return the bodies."""
        bodies: list[Any] = []
        while (message := await self.broker.receive_from_queue(queue, wait=0)) is not None:
            bodies.append(message.body)
            await message.ack()
        return bodies

    async def drain_back(self, queue: Queue[Any]) -> list[Any]:
        """Wait for a message that must come back, and drain the queue."""
        first = await self.back(queue)
        await first.ack()
        return [first.body, *await self.drain(queue)]

    def unused(self, *messages: Message[Any]) -> None:
        """Check that messages came back without having used an attempt, if the engine promises that."""
        if Feature.RELEASE in self.broker.features:
            equal([message.attempt for message in messages], [1] * len(messages))

    async def counted(self, queue: Queue[Any], *, ready: int, **counters: int) -> None:
        """Check how many messages are ready and, if the engine has them, other counters."""
        wanted = {"ready": ready} | (
            {
                name: count
                for name, count in counters.items()
                if name == "dead" or Feature.COUNTERS in self.broker.features
            }
        )
        until = time.monotonic() + SOON  # a server may count a moment later
        while True:
            stats = await self.broker.stats(queue)
            found = {name: getattr(stats, name) for name in wanted}
            if found == wanted or time.monotonic() > until:
                equal(found, wanted)
                return
            await asyncio.sleep(0.01)


Check = Callable[[Stage], Awaitable[None]]
_checks: list[tuple[Check, frozenset[Feature]]] = []


def checks(features: Iterable[Feature]) -> list[Check]:
    """Return the checks that an engine with these features must pass."""
    return [check for check, needed in _checks if needed <= set(features)]


def needed_by(check: Check) -> frozenset[Feature]:
    """Return the features without which a check has no meaning."""
    return dict(_checks)[check]


def needs(*features: Feature) -> Callable[[Check], Check]:
    """Enter a check into the contract of the engines that have these features."""

    def enter(check: Check) -> Check:
        _checks.append((check, frozenset(features)))
        return check

    return enter


def equal(found: object, wanted: object) -> None:
    """Raise `AssertionError` unless both are equal, even under `python -O`, which skips `assert`."""
    if found != wanted:
        raise AssertionError(f"found {repr(found)[:500]}, wanted {repr(wanted)[:500]}")


async def raises(error: type[FilaoError], call: Awaitable[Any], *texts: str) -> None:
    """Await a call that must fail with exactly this error, whose text must hold all of `texts`."""
    try:
        result = await call
    except FilaoError as raised:
        equal(type(raised), error)
        for text in texts:
            if text not in str(raised):
                raise AssertionError(f"{text!r} is not said in: {raised}") from raised
    else:
        raise AssertionError(f"wanted {error.__name__}, got {result!r}")


def add_up(stats: QueueStats) -> None:
    """Raise `AssertionError` unless every message that was ever sent is somewhere."""
    here = stats.ready + stats.delayed + stats.blocked + stats.leased + stats.dead
    gone = stats.acked + stats.dropped + stats.purged + stats.cancelled
    equal(stats.sent, here + gone)
