"""What one operation on a file costs in CPU: a send, and a receive with its ack, by 64 tasks. Run: python -m bench.cpu

It tells the least of many rounds, which a busy machine disturbs least. To compare two versions, run it with each `src`
in turn, several times: PYTHONPATH=src python -m bench.cpu --rounds 5
"""

import argparse
import asyncio
import gc
import tempfile
import time
from pathlib import Path

import filao

MESSAGES, TASKS = 6_400, 64
BODY = {"claim_id": 7, "note": "x" * 227}  # 256 bytes as JSON


async def _costs(path: Path) -> tuple[float, float]:
    """Return the seconds of CPU, of all threads, that one send took, and one receive with its ack."""
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))

        async def send() -> None:
            for _ in range(MESSAGES // TASKS):
                await broker.send_to_queue("claims", BODY)

        async def drain() -> None:
            while (message := await broker.receive_from_queue("claims", wait=0)) is not None:
                await message.ack()

        costs: list[float] = []
        for work in (send, drain):
            gc.collect()
            began = time.process_time()
            await asyncio.gather(*(work() for _ in range(TASKS)))
            costs.append((time.process_time() - began) / MESSAGES)
    return costs[0], costs[1]


def main() -> None:
    """Print the least of all rounds, in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        found = [asyncio.run(_costs(Path(folder) / f"{number}.db")) for number in range(rounds)]
    for place, name in enumerate(("send", "receive and ack")):
        print(f"{name:<16} {1e6 * min(costs[place] for costs in found):6.1f} µs of CPU (least of {rounds})")


if __name__ == "__main__":
    main()
