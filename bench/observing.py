"""What observers cost the processor: how much of a process's time goes by in telling them of send-one and of drain,
on a file, with a worker's measures. Run: python -m bench.observing

Time in the telling is measured, not the difference between two runs: that is smaller than what others on the machine
make of it. So the clock's own calls are counted in.
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

import filao
from filao.batching import Batcher
from filao.prometheus.worker import WorkerMetrics

MESSAGES, SENDERS, ROUNDS = 10_000, 64, 5


class Telling:
    """The processor's seconds that went by in telling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._tell: Callable[..., None] = Batcher._tell  # noqa: SLF001
        Batcher._tell = self._timed  # type: ignore[method-assign]  # noqa: SLF001

    @property
    def _timed(self) -> Callable[..., None]:
        def timed(batcher: Batcher, *arguments: Any) -> None:
            began = time.thread_time()
            self._tell(batcher, *arguments)
            self.seconds += time.thread_time() - began

        return timed


async def _shares(path: Path, telling: Telling) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the microseconds for each message that is sent, and received and acked, by many tasks; and the share."""
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(WorkerMetrics())

        async def send() -> None:
            for number in range(MESSAGES // SENDERS):
                await broker.send_to_queue("claims", {"claim_id": number})

        async def drain() -> None:
            while (message := await broker.receive_from_queue("claims", wait=0)) is not None:
                await message.ack()

        async def share(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
            telling.seconds, began = 0.0, time.process_time()
            await asyncio.gather(*(work() for _ in range(SENDERS)))
            spent = time.process_time() - began
            return 1e6 * spent / MESSAGES, 100 * telling.seconds / spent

        return await share(send), await share(drain)


def main() -> None:
    telling = Telling()
    with tempfile.TemporaryDirectory() as folder:
        found = [asyncio.run(_shares(Path(folder) / f"{number}.db", telling)) for number in range(ROUNDS)]
    for place, name in enumerate(("send-one", "drain")):
        spent, share = (median(round_[place][what] for round_ in found) for what in (0, 1))
        print(f"{name:<9} {spent:6.1f} us for each message, {share:.1f} % of it in telling (median of {ROUNDS})")


if __name__ == "__main__":
    main()
