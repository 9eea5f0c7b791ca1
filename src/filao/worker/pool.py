"""Who may start how many: consumers that share a worker's capacity, or one that has its own."""

import asyncio
import time
from collections.abc import Iterable

from filao.worker.run import Consumer
from filao.worker.turns import Turns


class Pool:
    """Counts what runs. All who wait for room are woken when some comes free."""

    def __init__(self, consumers: Iterable[Consumer], limit: int) -> None:
        self.consumers = {consumer.queue.name: consumer for consumer in consumers}
        self.turns = Turns({name: consumer.weight for name, consumer in self.consumers.items()})
        self.polled_at = time.monotonic()
        """Monotonic time of the last look at the queues that succeeded, or from which on one can."""
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
        """Count one that starts."""
        self._running[name] += 1

    def ended(self, name: str) -> None:
        """Count one that does not run any more."""
        if self.is_full():
            self.polled_at = time.monotonic()  # it could not look
        self._running[name] -= 1
        self._freed.set()

    def running(self) -> dict[str, int]:
        """Return how many messages of each queue are being worked on."""
        return dict(self._running)
