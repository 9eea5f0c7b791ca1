"""How many messages may start: of consumers that share a worker's capacity, or of one that has its own.

Stride scheduling (Waldspurger and Weihl, 1995) decides whose turn it is among those that share, so that in the long run
each gets the share of its weight: each has a pass, which grows by what it took divided by its weight, and the lowest
goes first. A queue that was empty does not save up turns.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping

from filao.worker.handlers import Consumer


class Pool:
    """Counts what runs, and wakes those that wait for room when a message ends."""

    def __init__(self, consumers: Iterable[Consumer], limit: int) -> None:
        self.consumers: dict[str, Consumer] = {consumer.queue.name: consumer for consumer in consumers}
        self.turns: Turns = Turns({name: consumer.weight for name, consumer in self.consumers.items()})
        self.polled_at: float = time.monotonic()
        """Monotonic time of the last successful look at the queues, or since when a look is possible again."""
        self._limit = limit
        self._running = dict.fromkeys(self.consumers, 0)
        self._freed = asyncio.Event()

    def room(self, name: str | None = None) -> int:
        """Return how many messages, of a queue or of all, could start now."""
        room = self._limit - sum(self._running.values())
        return room if name is None else min(room, self.consumers[name].concurrency - self._running[name])

    def is_full(self) -> bool:
        """Return whether nothing could start now."""
        return all(self.room(name) <= 0 for name in self.consumers)

    async def has_room(self) -> None:
        """Wait until something could start."""
        while self.is_full():
            self._freed.clear()
            await self._freed.wait()

    def began(self, name: str) -> None:
        """Count a message that starts."""
        self._running[name] += 1

    def ended(self, name: str) -> None:
        """Count a message that no longer runs."""
        if self.is_full():
            self.polled_at = time.monotonic()  # until now it could not look
        self._running[name] -= 1
        self._freed.set()

    def running(self) -> dict[str, int]:
        """Return how many messages of each queue are being worked on."""
        return dict(self._running)


class Turns:
    """Orders names by their turn."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._passes = dict.fromkeys(weights, 0.0)

    def order(self) -> list[str]:
        """Return the names, the one whose turn it is first."""
        return sorted(self._passes, key=self._passes.__getitem__)

    def share(self, name: str, room: int) -> int:
        """Return how much of the room a name should ask for at its turn: the part of its weight, at least one."""
        return max(1, int(room * self._weights[name] / sum(self._weights.values())))

    def took(self, name: str, count: int) -> None:
        """Count what a name took at its turn."""
        self._passes[name] += count / self._weights[name]

    def had_nothing(self, name: str) -> None:
        """Let a name whose queue was empty catch up with the others, so that it saves up no turns."""
        others = (passed for other, passed in self._passes.items() if other != name)
        self._passes[name] = max(self._passes[name], min(others, default=0.0))
