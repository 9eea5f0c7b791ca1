"""Consumers, async and blocking: they receive, and settle in one of many ways, early, late or not at all."""

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import filao
import filao.sync
from tests.torture.checker import SETTLES
from tests.torture.history import History, Verb
from tests.torture.producers import Undo
from tests.torture.scene import (
    BILLS,
    CLAIMS,
    EFFECT,
    ELSEWHERE,
    LETTERS,
    TASKS,
    Pen,
    Scene,
    described,
    lease_of,
    until_told,
)

PACES = ("at once", "dawdle", "extend", "oversleep", "forget")
WAIT = 0.2  # seconds for a message
FOLLOW = "follow."  # begins the key of what is sent with the commit of another message


def play(scene: Scene) -> None:
    """Be an async consumer until killed or told to stop."""

    async def consume(broker: filao.Broker, pen: Pen) -> None:
        while True:
            queue = a_queue(pen.chance)
            for message in await receive(broker, pen, queue, pen.chance.choice((1, 1, 3))):
                if queue is not BILLS:
                    await handle(broker, pen, message)

    until_told(scene, consume)


def a_queue(chance: Random) -> filao.Queue:
    """Choose whose messages to receive."""
    return chance.choices((CLAIMS, LETTERS, BILLS), (70, 20, 10))[0]


def pace(chance: Random, attempt: int) -> str:
    """Choose how long to work on a message: quickly, slowly, too long, or for ever."""
    return chance.choices(PACES, (85, 5 * attempt, 6, 2, 0.5))[0]


def way(chance: Random) -> Verb:
    """Choose how to settle it."""
    return chance.choices(SETTLES, (62, 18, 12, 1, 7))[0]


async def receive(
    broker: filao.Broker, pen: Pen, queue: filao.Queue, limit: int, *, lease: float = CLAIMS.lease, wait: float = WAIT
) -> list[filao.Message[Any]]:
    """Receive up to `limit` messages, waiting a little."""
    began = pen.begin("receive", queue=queue.name, limit=limit, seconds=lease)
    try:
        messages = await broker.receive_many(
            queue, limit, wait=wait, lease=lease, guarantee="at-most-once" if queue is BILLS else "at-least-once"
        )
    except filao.QueueNotFound:
        pen.end(began, "nothing")
        await asyncio.sleep(ELSEWHERE)
        return []
    if messages:
        pen.end(began, "done", *(described(message) for message in messages))
    else:
        pen.end(began, "nothing")
    return messages


async def handle(broker: filao.Broker, pen: Pen, message: filao.Message[Any]) -> None:
    """Work on a message at some pace; then settle it in some way."""
    how = pace(pen.chance, message.attempt)
    if how == "forget":
        return
    if how == "dawdle":
        await asyncio.sleep(CLAIMS.lease * pen.chance.uniform(0, 0.3))
    elif how == "oversleep":
        await asyncio.sleep(CLAIMS.lease * 1.1)
    elif how == "extend":
        await attempt(pen, "extend", message, message.extend(2 * CLAIMS.lease), seconds=2 * CLAIMS.lease)
    settle = way(pen.chance)
    if settle == "commit":
        await commit(pen, message)
        return
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "ack": message.ack,
        "nack": lambda: message.nack(reason="it did not work"),
        "reject": lambda: message.reject("it cannot work"),
        "release": message.release,
    }
    await attempt(pen, settle, message, ways[settle]())


async def attempt(
    pen: Pen, call: Verb, message: filao.Message[Any], settling: Awaitable[None], *, seconds: float = 0.0
) -> None:
    """Settle or extend, and write down whether it was still ours to do."""
    began = pen.begin(call, **lease_of(message), seconds=seconds)
    try:
        await settling
    except filao.LeaseLost:
        pen.end(began, "lease_lost")
    else:
        pen.end(began, "done")


async def commit(pen: Pen, message: filao.Message[Any]) -> None:
    """Write an effect, send what follows and acknowledge in one transaction; sometimes undo it all at first."""
    if pen.chance.random() < 0.1:
        try:
            async with message.transaction() as transaction:
                await transaction.execute(EFFECT, (message.id,))
                raise Undo
        except (Undo, filao.LeaseLost):
            pass
    began = pen.begin("commit", **lease_of(message))
    key = f"{FOLLOW}{message.id}"
    within = pen.another()
    follows = not message.body["key"].startswith(FOLLOW) and pen.chance.random() < 0.3
    sent = within.begin("send", queue=CLAIMS.name, key=key) if follows else None
    try:
        async with message.transaction() as transaction:
            await transaction.execute(EFFECT, (message.id,))
            if sent is not None:
                body = {"key": key, "group": "", "place": [], "epoch": 0}
                receipt = await transaction.send_to_queue(CLAIMS, body)
    except filao.LeaseLost:
        pen.end(began, "lease_lost")
        if sent is not None:
            within.end(sent, "undone")
        return
    pen.end(began, "done")
    if sent is not None:
        within.end(sent, "done", {"id": receipt.id})


# --- blocking --------------------------------------------------------------------------------------------------------


def play_blocking(scene: Scene) -> None:
    """Be a blocking consumer with several threads until killed or told to stop."""
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    history = History(scene.histories / scene.name)
    with filao.sync.connect(scene.db) as broker:
        failures: list[BaseException] = []

        def consume(task: int) -> None:
            pen = Pen(scene, history, task)
            try:
                while not told.is_set():
                    queue = a_queue(pen.chance)
                    for message in _receive(broker, pen, queue, pen.chance.choice((1, 1, 3))):
                        if queue is not BILLS:
                            _handle(pen, message)
            except BaseException as error:
                failures.append(error)
                told.set()

        threads = [threading.Thread(target=consume, args=(task,)) for task in range(TASKS)]
        for thread in threads:
            thread.start()
        while not told.wait(0.1):  # bounded, so that the signal is seen to
            pass
        for thread in threads:
            thread.join()
        for failure in failures:
            raise failure


def _receive(broker: filao.sync.Broker, pen: Pen, queue: filao.Queue, limit: int) -> list[filao.sync.Message[Any]]:
    began = pen.begin("receive", queue=queue.name, limit=limit, seconds=CLAIMS.lease)
    guarantee: Any = "at-most-once" if queue is BILLS else "at-least-once"
    try:
        messages = broker.receive_many(queue, limit, wait=WAIT, lease=CLAIMS.lease, guarantee=guarantee)
    except filao.QueueNotFound:
        pen.end(began, "nothing")
        time.sleep(ELSEWHERE)
        return []
    if messages:
        pen.end(began, "done", *(described(message) for message in messages))
    else:
        pen.end(began, "nothing")
    return messages


def _handle(pen: Pen, message: filao.sync.Message[Any]) -> None:
    how = pace(pen.chance, message.attempt)
    if how == "forget":
        return
    if how == "dawdle":
        time.sleep(CLAIMS.lease * pen.chance.uniform(0, 0.3))
    elif how == "oversleep":
        time.sleep(CLAIMS.lease * 1.1)
    elif how == "extend":
        _attempt(pen, "extend", message, lambda: message.extend(2 * CLAIMS.lease), seconds=2 * CLAIMS.lease)
    settle = way(pen.chance)
    ways: dict[str, Callable[[], None]] = {
        "ack": message.ack,
        "commit": lambda: _commit(message),
        "nack": lambda: message.nack(reason="it did not work"),
        "reject": lambda: message.reject("it cannot work"),
        "release": message.release,
    }
    _attempt(pen, settle, message, ways[settle])


def _attempt(
    pen: Pen, call: Verb, message: filao.sync.Message[Any], settle: Callable[[], None], *, seconds: float = 0.0
) -> None:
    began = pen.begin(call, **lease_of(message), seconds=seconds)
    try:
        settle()
    except filao.LeaseLost:
        pen.end(began, "lease_lost")
    else:
        pen.end(began, "done")


def _commit(message: filao.sync.Message[Any]) -> None:
    with message.transaction() as transaction:
        transaction.execute(EFFECT, (message.id,))
