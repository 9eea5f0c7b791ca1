"""Celery on RabbitMQ, with publisher confirms; two worker processes, acknowledging when the work is done."""

import os

import celery

from bench.jobs import tally

COMMAND = ["celery", "-A", "bench.jobs.celery_app", "worker", "-P", "prefork", "-c", "2", "-l", "error"]

app = celery.Celery("bench", broker=f"pyamqp://guest:guest@127.0.0.1:{os.environ.get('BENCH_RABBITMQ', '5672')}//")
app.conf.update(task_ignore_result=True, task_acks_late=True, broker_transport_options={"confirm_publish": True})


@app.task  # type: ignore[untyped-decorator]  # it has no types
def noop(number: int) -> None:
    tally.count()


async def enqueue(count: int) -> None:
    for number in range(count):
        noop.delay(number)
