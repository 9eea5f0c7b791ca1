"""Workers: their handlers write down what came and what they decide; what the worker makes of it they are not told.

So a decision is written as a call that began and has no end: it may have been done. A handler that extends its lease
itself knows until when it holds the message.
"""

import asyncio
import time
from typing import Any

import filao
import filao.sync
from tests.torture.consumers import attempt
from tests.torture.history import History, Verb
from tests.torture.scene import BILLS, CLAIMS, EFFECT, LETTERS, Pen, Scene, described, lease_of

CONCURRENCY = 4  # of each consumer
CONSUMERS = 3  # of each worker
HIDDEN_MAX = CONCURRENCY * CONSUMERS  # deliveries that a worker has received and no handler has seen
TIMEOUT = 1.5  # seconds: of handlers, some of which hang
GRACE = 1.0  # seconds


def play(scene: Scene) -> None:
    """Be a worker until killed or told to stop: the first handles claims exactly once, others at least once."""
    desk = Pen(scene, History(scene.histories / scene.name))
    desk.another().begin("receive", queue=CLAIMS.name, limit=HIDDEN_MAX)
    worker = filao.Worker(scene.db, grace=GRACE)

    if scene.name == "worker-1":

        @worker.consumer(CLAIMS, concurrency=CONCURRENCY, timeout=TIMEOUT, guarantee="exactly-once")
        async def pay(message: filao.Message, transaction: filao.Transaction) -> Any:
            pen = desk.another()
            arrived(pen, message)
            verdict = await worked(pen, message, extends=False)  # in its transaction it may not
            if verdict is None:
                pen.begin("commit", **lease_of(message))
                try:
                    await transaction.execute(EFFECT, (message.id,))
                except BaseException:  # its time is over, or the storage failed: failed or given back
                    ended_by_worker(pen, message)
                    raise
            return verdict

    else:

        @worker.consumer(CLAIMS, concurrency=CONCURRENCY, timeout=TIMEOUT)
        async def process(message: filao.Message) -> Any:
            pen = desk.another()
            arrived(pen, message)
            verdict = await worked(pen, message)
            if verdict is None:
                pen.begin("ack", **lease_of(message))
            return verdict

    @worker.consumer(LETTERS, concurrency=CONCURRENCY, timeout=TIMEOUT)
    def read(message: filao.sync.Message) -> None:
        pen = desk.another()
        arrived(pen, message)
        time.sleep(pen.chance.uniform(0, 0.01))
        pen.begin("ack", **lease_of(message))

    @worker.consumer(BILLS, concurrency=CONCURRENCY, guarantee="at-most-once")
    async def pay_once(message: filao.Message) -> None:
        arrived(desk.another(), message)

    asyncio.run(worker.run())


def arrived(pen: Pen, message: Any) -> None:
    """Write down a delivery; when its lease began is not known, so it proves nothing until the handler extends it."""
    began = pen.begin("receive", queue=message.queue, limit=1)
    pen.end(began, "done", described(message))


async def worked(pen: Pen, message: filao.Message[Any], *, extends: bool = True) -> Any:
    """Work as a handler does, and return what it returns."""
    how, decision = pen.chance.random(), pen.chance.random()
    try:
        if how < 0.1 and extends:
            await attempt(pen, "extend", message, message.extend(CLAIMS.lease), seconds=CLAIMS.lease)
            await asyncio.sleep(CLAIMS.lease * pen.chance.uniform(0, 0.5))
        elif how < 0.2:
            await asyncio.sleep(CLAIMS.lease * pen.chance.uniform(0, 0.5))
        elif how < 0.21:
            await asyncio.sleep(10 * TIMEOUT)
    except asyncio.CancelledError:  # its time is over, its lease is lost, or the worker leaves: failed or given back
        ended_by_worker(pen, message)
        raise
    if decision < 0.1:
        pen.begin("nack", **lease_of(message))
        raise filao.Retry("it did not work")
    if decision < 0.11:
        pen.begin("reject", **lease_of(message))
        return filao.Reject("it cannot work")
    if decision < 0.18:
        pen.begin("release", **lease_of(message))
        return filao.Release()
    return None


def ended_by_worker(pen: Pen, message: filao.Message[Any]) -> None:
    """Write down that the worker may do either."""
    calls: tuple[Verb, ...] = ("nack", "release")
    for call in calls:
        pen.another().begin(call, **lease_of(message))
