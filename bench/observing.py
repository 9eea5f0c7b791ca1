"""What observers cost the processor: send-one and drain on a file, without any and with a worker's measures. Run:
python -m bench.observing
"""

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

import filao
from filao.prometheus.worker import WorkerMetrics

MESSAGES, SENDERS, ROUNDS = 10_000, 64, 5


async def _rates(path: Path, *, observed: bool) -> tuple[float, float]:
    """Return the processor's microseconds for each message sent, and each received and acked, by many tasks at once."""
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        if observed:
            broker.observers.add(WorkerMetrics())

        async def send() -> None:
            for number in range(MESSAGES // SENDERS):
                await broker.send_to_queue("claims", {"claim_id": number})

        async def drain() -> None:
            while (message := await broker.receive_from_queue("claims", wait=0)) is not None:
                await message.ack()

        rates: list[float] = []
        for work in (send, drain):
            began = time.process_time()
            await asyncio.gather(*(work() for _ in range(SENDERS)))
            rates.append(1e6 * (time.process_time() - began) / MESSAGES)
    return rates[0], rates[1]


def main() -> None:
    """Alternate, so that a machine that slows down slows both."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2 * ROUNDS):
            observed = bool(number % 2)
            found[observed].append(asyncio.run(_rates(Path(folder) / f"{number}.db", observed=observed)))
    for place, name in enumerate(("send-one", "drain")):
        off, on = (median(rates[place] for rates in found[observed]) for observed in (False, True))
        print(f"{name:<9} {off:6.1f} us without, {on:6.1f} us with: {100 * (on / off - 1):+.1f} % (median of {ROUNDS})")


if __name__ == "__main__":
    main()
