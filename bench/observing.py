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

SENDERS, EACH, ROUNDS = 64, 30, 150
"""Tasks at once, messages of each in one round, and rounds of either kind: some 40 ms each, so that both kinds meet the
same load of others."""


async def _round(broker: filao.Broker) -> tuple[float, float]:
    """Return the processor's microseconds for each message sent, and each received and acked, by many tasks at once."""

    async def send() -> None:
        for number in range(EACH):
            await broker.send_to_queue("claims", {"claim_id": number})

    async def drain() -> None:
        while (message := await broker.receive_from_queue("claims", wait=0)) is not None:
            await message.ack()

    spent: list[float] = []
    for work in (send, drain):
        began = time.process_time()
        await asyncio.gather(*(work() for _ in range(SENDERS)))
        spent.append(1e6 * (time.process_time() - began) / (SENDERS * EACH))
    return spent[0], spent[1]


async def _alternate(path: Path) -> dict[bool, list[tuple[float, float]]]:
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    measures = WorkerMetrics()
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        for number in range(2 * ROUNDS):
            observed = bool(number % 2)
            if observed:
                broker.observers.add(measures)
            found[observed].append(await _round(broker))
            broker.observers.remove(measures)
    return found


def main() -> None:
    """Alternate, so that a machine that slows down slows both."""
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(_alternate(Path(folder) / "claims.db"))
    for place, name in enumerate(("send-one", "drain")):
        off, on = (median(rates[place] for rates in found[observed]) for observed in (False, True))
        print(f"{name:<9} {off:6.1f} us without, {on:6.1f} us with: {100 * (on / off - 1):+.1f} % (median of {ROUNDS})")


if __name__ == "__main__":
    main()
