"""Filao: 64 messages at once in each process, each acknowledged for itself; sends by 64 tasks, each durable."""

import asyncio
import time

import filao
from bench.jobs import tally

LEASE = 1.0  # seconds, of the queue whose handler burns CPU for three of them
URL = tally.FOLDER / "filao.db"
COMMAND = ["filao", "work", "bench.jobs.filao_app:worker", "--processes", "2"]

jobs, burning = filao.Queue("jobs"), filao.Queue("burning", lease=LEASE)
worker = filao.Worker(URL)


@worker.consumer(jobs, concurrency=64)
async def noop(message: filao.Message[int]) -> None:
    tally.count()


@worker.consumer(burning, concurrency=2)
async def burn(message: filao.Message[int]) -> None:
    until = time.monotonic() + 3 * LEASE
    while time.monotonic() < until:
        pass


async def enqueue(count: int) -> None:
    numbers = iter(range(count))

    async def send(broker: filao.Broker) -> None:
        for number in numbers:
            await broker.send_to_queue("jobs", number)

    async with filao.connect(URL) as broker:
        await broker.declare(jobs)
        await asyncio.gather(*(send(broker) for _ in range(64)))
