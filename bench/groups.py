"""What very many groups cost on PostgreSQL: each thing that can be done to all of their messages, in messages a second.

`python -m bench.groups [--messages 100000] [--groups 10000]`: a server as it comes, with nothing tuned. Messages are
sent with a delay, become due, are rejected, sent back, given another rule, drained, sent again and purged.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.support.servers import postgres_server

import filao
from bench.idle import cpu

CONSUMERS = 16  # tasks of one process
LIMIT = 200  # messages that each receives at once
SLICE = 1_000  # messages in one send
HOUR = 3_600.0


class _Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


async def _send(broker: filao.Broker, messages: int, groups: int, delay: float) -> None:
    for first in range(0, messages, SLICE):
        async with asyncio.TaskGroup() as together:
            for number in range(first, min(first + SLICE, messages)):
                body = b"%d" % number
                together.create_task(
                    broker.send_to_queue("groups", body, group=f"group-{number % groups}", delay=delay)
                )


async def _handle(broker: filao.Broker, messages: int, settle: Callable[[filao.Message], Awaitable[None]]) -> None:
    left = messages

    async def consume() -> None:
        nonlocal left
        while left > 0:
            held = await broker.receive_many("groups", LIMIT, wait=1.0)
            left -= len(held)
            await asyncio.gather(*map(settle, held))

    await asyncio.gather(*(consume() for _ in range(CONSUMERS)))


async def _measure(url: str, postmaster: int, messages: int, groups: int) -> None:
    clock = _Clock()
    async with filao.connect(url, clock=clock) as broker:
        await broker.declare(filao.Queue("groups", lease=HOUR))

        async def measured(what: str, work: Awaitable[object]) -> None:
            began, used, ours = time.perf_counter(), cpu(postmaster), time.process_time()
            await work
            took, used, ours = time.perf_counter() - began, cpu(postmaster) - used, time.process_time() - ours
            each = 1e6 / messages
            print(f"{what:10} {messages / took:>8,.0f}/s {used * each:>8,.0f} us {ours * each:>8,.0f} us", flush=True)

        print("                       server's CPU, ours, each message")

        await measured("send later", _send(broker, messages, groups, HOUR))
        clock.ahead = 2 * HOUR
        await measured("due", _due(broker, messages))
        await measured("reject", _handle(broker, messages, lambda message: message.reject("a figure")))
        await measured("redrive", broker.redrive("groups"))
        await measured("declare", broker.declare(filao.Queue("groups", lease=HOUR, group_failure="skip")))
        await measured("drain", _handle(broker, messages, filao.Message.ack))
        await measured("send", _send(broker, messages, groups, 0.0))
        await measured("purge", broker.purge("groups"))


async def _due(broker: filao.Broker, messages: int) -> None:
    """Look until nothing is delayed any more; a look makes due what it finds."""
    while (await broker.stats("groups")).delayed:
        for message in await broker.receive_many("groups", 1, wait=0):
            await message.release()


def main() -> None:
    """Run it, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.groups", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=10_000)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    folder = Path("/tmp") / f"filao-bench-{os.getpid()}"
    try:
        with postgres_server(folder) as server:
            postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
            asyncio.run(_measure(server.create("groups"), postmaster, options.messages, options.groups))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
