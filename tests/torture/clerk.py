"""The program that faults hit: it sends, receives and acks, and says on its standard output what was confirmed.

    python -m tests.torture.clerk claims.db --senders 3 --ackers 1 --rounds 100

A line is a time of CLOCK_MONOTONIC and `sent KEY`, `acking KEY`, `acked KEY` or `error TYPE TEXT`. It is written with
one `os.write` before the next call is made, so what it says happened, whatever happens to the clerk. After an error the
clerk tries the same again, as the documentation says it may. What it said is compared with what is found in the file by
`contradictions`.
"""

import argparse
import asyncio
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import filao

QUEUE: filao.Queue = filao.Queue("claims.processing", lease=60.0, max_attempts=1_000)
TRIES_MAX = 50  # of one call, before the clerk gives up


def say(*words: str) -> None:
    os.write(1, (" ".join([f"{time.monotonic():.6f}", *words]).replace("\n", " ") + "\n").encode())


async def until_it_works(call: Callable[[], Awaitable[object]]) -> object:
    """Make a call again and again, saying each error."""
    for _ in range(TRIES_MAX):
        try:
            return await call()
        except filao.EngineError as error:
            say("error", type(error).__name__, str(error))
    sys.exit(f"the clerk gave up after {TRIES_MAX} errors")


async def send(broker: filao.Broker, sender: str, rounds: int) -> None:
    for number in range(rounds):
        key = f"{sender}.{number}"
        await until_it_works(lambda key=key: broker.send_to_queue(QUEUE, key, message_id=key))  # type: ignore[misc]
        say("sent", key)


async def ack(broker: filao.Broker, rounds: int) -> None:
    for _ in range(rounds):
        message = await until_it_works(lambda: broker.receive_from_queue(QUEUE, wait=0.05))
        if isinstance(message, filao.Message):
            say("acking", message.body)
            try:
                await until_it_works(message.ack)
            except filao.LeaseLost:
                continue  # an ack whose outcome was unknown had been done
            say("acked", message.body)


async def work(options: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        broker = filao.connect(options.db, durability=options.durability)
        await until_it_works(broker.open)
        stack.push_async_callback(broker.close)
        await until_it_works(lambda: broker.declare(QUEUE))
        async with asyncio.TaskGroup() as tasks:
            for sender in range(options.senders):
                tasks.create_task(send(broker, f"{options.name}{sender}", options.rounds))
            for _ in range(options.ackers):
                tasks.create_task(ack(broker, options.rounds))


# --- what it said, and what is there ---------------------------------------------------------------------------------


@dataclass
class Said:
    """What clerks said."""

    sent: set[str] = field(default_factory=set)
    acking: set[str] = field(default_factory=set)
    acked: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def update(self, more: "Said") -> None:
        """Remember what was said in another run on the same file."""
        self.sent |= more.sent
        self.acking |= more.acking
        self.acked |= more.acked
        self.errors += more.errors


def understood(lines: Iterable[str], before: float = math.inf) -> Said:
    """Sort the lines of clerks; a last one that was cut off is passed over, and so are confirmations from
    `before` on.
    """
    said = Said()
    for line in lines:
        if not line.endswith("\n"):
            continue
        at, word, about = line.rstrip("\n").split(" ", 2)
        confirmed = float(at) < before
        match word:
            case "sent" if confirmed:
                said.sent.add(about)
            case "acking":
                said.acking.add(about)
            case "acked" if confirmed:
                said.acked.add(about)
            case "error":
                said.errors.append(about)
    return said


def found(db: Path) -> Counter[str]:
    """Return how often each key is stored, in whatever state."""

    async def look() -> Counter[str]:
        async with filao.connect(db) as broker:
            if QUEUE.name not in {queue.name for queue in await broker.queues()}:
                return Counter()
            integrity = [finding.text for finding in await broker.doctor() if finding.subject == "integrity"]
            assert integrity == ["ok"]
            return Counter([message.body for state in filao.State for message in await _all(broker, state)])

    return asyncio.run(look())


async def _all(broker: filao.Broker, state: filao.State) -> list[filao.StoredMessage]:
    """Return all messages of a state, page by page."""
    seen: list[filao.StoredMessage] = []
    while page := await broker.peek(QUEUE, state=state, limit=10_000, after=seen[-1].id if seen else None):
        seen += page
    return seen


def contradictions(said: Said, stored: Counter[str]) -> list[str]:
    """Return what was confirmed and is not so."""
    return [
        *(
            f"the send of {key} was confirmed, and it is lost"
            for key in sorted(said.sent - said.acking - stored.keys())
        ),
        *(f"the ack of {key} was confirmed, and it is back" for key in sorted(said.acked & stored.keys())),
        *(f"{key} is stored {count} times" for key, count in sorted(stored.items()) if count > 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("db", type=Path)
    parser.add_argument("--name", default="")
    parser.add_argument("--senders", type=int, default=3)
    parser.add_argument("--ackers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--durability", default="full")
    asyncio.run(work(parser.parse_args()))


if __name__ == "__main__":
    main()
