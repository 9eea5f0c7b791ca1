"""RabbitMQ, one server for both: Filao, and aio-pika doing the same confirmed work by hand."""

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from tests.support.servers import Rabbitmq, rabbitmq_server

import filao
from bench.measures import Ground

COUNT = 20_000
TASKS = 64
ROUNDS = 7
BODY = b"x" * 256


def rabbitmq(ground: Ground) -> dict[str, Any]:
    """Rates with 64 producers, each send confirmed, and with one consumer process that acknowledges each message."""
    with rabbitmq_server(Path(ground.folder) / "rabbitmq-own") as server:
        return asyncio.run(_measure(ground, server))


async def _measure(ground: Ground, server: Rabbitmq) -> dict[str, Any]:
    rates: dict[str, dict[str, list[float]]] = {"send": {}, "drain": {}}
    count = max(300, round(COUNT * ground.scale))
    for number in range(ROUNDS):
        for name, peer in PEERS.items():
            send, drain = await peer(server.url(), f"round{number}-{name.replace(' ', '')}", count)
            rates["send"].setdefault(name, []).append(send)
            rates["drain"].setdefault(name, []).append(drain)
    return {what: {name: statistics.median(of) for name, of in by_name.items()} for what, by_name in rates.items()}


async def _filao(url: str, name: str, count: int) -> tuple[float, float]:
    queue: filao.Queue = filao.Queue(name, backoff=filao.Backoff(first=0))
    numbers, left, done = iter(range(count)), count, asyncio.Event()

    async def produce() -> None:
        for _ in numbers:
            await broker.send_to_queue(queue, BODY)

    async def consume() -> None:
        nonlocal left
        while True:
            message = await broker.receive_from_queue(queue)
            assert message is not None
            await message.ack()
            left -= 1
            if not left:
                done.set()

    async with filao.connect(url) as broker:
        await broker.declare(queue)
        began = time.monotonic()
        await asyncio.gather(*(produce() for _ in range(TASKS)))
        sent = time.monotonic()
        consumers = [asyncio.create_task(consume()) for _ in range(TASKS)]
        await done.wait()
        drained = time.monotonic()
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        await broker.delete_queue(queue)
    return count / (sent - began), count / (drained - sent)


async def _by_hand(url: str, name: str, count: int) -> tuple[float, float]:
    import aio_pika

    numbers, left, done = iter(range(count)), count, asyncio.Event()
    connection = await aio_pika.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    queue = await channel.declare_queue(name, durable=True, arguments=arguments)
    await channel.set_qos(prefetch_count=TASKS)

    async def produce() -> None:
        for _ in numbers:
            message = aio_pika.Message(BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await channel.default_exchange.publish(message, routing_key=name, mandatory=True)

    async def consume(message: Any) -> None:
        nonlocal left
        await message.ack()
        left -= 1
        if not left:
            done.set()

    try:
        began = time.monotonic()
        await asyncio.gather(*(produce() for _ in range(TASKS)))
        sent = time.monotonic()
        tag = await queue.consume(consume)
        await done.wait()
        drained = time.monotonic()
        await queue.cancel(tag)
        await queue.delete(if_unused=False, if_empty=False)
    finally:
        await connection.close()
    return count / (sent - began), count / (drained - sent)


PEERS = {"Filao": _filao, "aio-pika": _by_hand}
