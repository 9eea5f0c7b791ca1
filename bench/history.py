"""What the history of messages costs: the processor's time and the file's bytes, with the rule and without. Run:
python -m bench.history
"""

import asyncio
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path

import filao

MESSAGES, SENDERS, ROUNDS = 10_000, 64, 3


async def _spent(path: Path, *, history: bool) -> float:
    """Return the processor's microseconds for a message that is sent, received and acked, by many tasks at once."""
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims", history=history))

        async def work() -> None:
            for number in range(MESSAGES // SENDERS):
                await broker.send_to_queue("claims", {"claim_id": number})
                await (await broker.receive_from_queue("claims")).ack()

        began = time.process_time()
        await asyncio.gather(*(work() for _ in range(SENDERS)))
        return 1e6 * (time.process_time() - began) / MESSAGES


def _bytes_of_an_event(path: Path) -> float:
    with closing(sqlite3.connect(path)) as db:
        sizes = "SELECT sum(pgsize) FROM dbstat WHERE name LIKE 'filao_event%'"
        taken: int = db.execute(sizes).fetchone()[0]
        events: int = db.execute("SELECT count(*) FROM filao_event").fetchone()[0]
    return taken / events


def main() -> None:
    spent: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2 * ROUNDS):
            history = bool(number % 2)
            spent[history].append(asyncio.run(_spent(Path(folder) / f"{number}.db", history=history)))
        size = _bytes_of_an_event(Path(folder) / "1.db")
    off, on = (min(spent[history]) for history in (False, True))
    print(f"without {off:.1f} us for each message, with {on:.1f} us (the least of {ROUNDS}); {size:.0f} bytes an event")


if __name__ == "__main__":
    main()
