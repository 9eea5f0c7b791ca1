"""Dramatiq on RabbitMQ, with publisher confirms; two worker processes of eight threads, its default."""

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from bench.jobs import tally

COMMAND = ["dramatiq", "bench.jobs.dramatiq_app", "--processes", "2"]

dramatiq.set_broker(
    RabbitmqBroker(
        url=f"amqp://guest:guest@127.0.0.1:{os.environ.get('BENCH_RABBITMQ', '5672')}", confirm_delivery=True
    )
)


@dramatiq.actor  # type: ignore[untyped-decorator]  # see pyproject.toml
def noop(number: int) -> None:
    tally.count()


async def enqueue(count: int) -> None:
    for number in range(count):
        noop.send(number)
