"""The processes that are tortured: producers and consumers that do a little of everything, and write down what they do.

They are forked from a parent that holds nothing open, so that a killed one is back in a few milliseconds. One that ends
in any other way than by SIGKILL has met an error that Filao should not have raised.
"""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import msgspec

import filao
from tests.torture.checker import SETTLES, Left
from tests.torture.history import History, Outcome, Record, Verb, now, read

QUEUE: filao.Queue = filao.Queue(
    "claims.processing", lease=1.0, max_attempts=6, backoff=filao.Backoff(first=0.01, ceiling=0.1)
)
EFFECTS = "CREATE TABLE IF NOT EXISTS effect (message TEXT NOT NULL)"  # not unique: a second effect shall be seen
TASKS = 4  # of each process, so that they share transactions
PACE = 0.04  # seconds between two sends of a task, at most: consumers that oversleep must keep up
PACES = ("at once", "dawdle", "extend", "oversleep", "forget")  # of consumers
DRAINED_WITHIN = 60.0  # seconds
DRAIN_LIMIT = 100  # messages received at once at the end


@dataclass(frozen=True)
class Scene:
    """What an actor knows of the play."""

    db: Path | str
    """A file, or the URL of a server's database."""
    histories: Path
    name: str
    life: int = 0
    seed: int = 0

    @property
    def process(self) -> str:
        return f"{self.name}.{self.life}"


class Pen:
    """Writes down what one task does."""

    def __init__(self, scene: Scene, history: History, task: int = 0) -> None:
        self.scene = scene
        self.task = task
        self.chance = Random(f"{scene.seed} {scene.process} {task}")
        self._history = history

    def begin(self, call: Verb, **about: Any) -> Record:
        """Write down that a call begins."""
        record = Record(process=self.scene.process, task=self.task, call=call, began=now(), **about)
        self._history.write(record)
        return record

    def end(self, began: Record, outcome: Outcome, *found: dict[str, Any]) -> None:
        """Write down how it ended, with what it found."""
        ended = now()
        about = found or ({},)
        self._history.write(*(msgspec.structs.replace(began, outcome=outcome, ended=ended, **one) for one in about))


async def prepare(db: Path | str) -> None:
    """Make what the play needs, and leave nothing open."""
    async with filao.connect(db) as broker:
        await broker.declare(QUEUE)
        async with broker.transaction() as transaction:
            await transaction.execute(EFFECTS)


def play(scene: Scene) -> None:
    """Be a producer or a consumer until killed."""
    asyncio.run(_play(scene))


async def _play(scene: Scene) -> None:
    before = unconfirmed(scene)
    history = History(scene.histories / scene.name)
    act = produce if scene.name.startswith("producer") else consume
    async with filao.connect(scene.db) as broker:
        await broker.declare(QUEUE)
        async with asyncio.TaskGroup() as tasks:
            for task in range(TASKS):
                tasks.create_task(act(broker, Pen(scene, history, task), before))


# --- producers -------------------------------------------------------------------------------------------------------


def unconfirmed(scene: Scene) -> dict[int, Record]:
    """Return the sends, by task, of which this actor's earlier life did not learn whether they were stored."""
    last: dict[int, Record] = {}
    path = scene.histories / scene.name
    for record in read(path) if path.exists() else ():
        if record.call == "send" and not record.outcome:
            last[record.task] = record
        elif record.call == "send":
            last.pop(record.task, None)
    return last


async def produce(broker: filao.Broker, pen: Pen, before: dict[int, Record]) -> None:
    """Send again what was not confirmed and can be recognised; then send one message after the other."""
    if pen.task in before and before[pen.task].dedup_key:
        began = before[pen.task]
        await send(broker, pen, began.key, group=began.group, place=began.place, dedup_key=began.dedup_key)
    for number in count():
        key = f"{pen.scene.process}.{pen.task}.{number}"
        group = pen.chance.choice(("", f"{pen.scene.name}.{pen.task}.{number % 2}"))
        dedup_key = pen.chance.choice(("", key))
        place = pen.scene.life, number
        await send(broker, pen, key, group=group, place=place, dedup_key=dedup_key)
        if dedup_key and pen.chance.random() < 0.2:
            await send(broker, pen, f"{key}.again", group=group, place=(*place, 1), dedup_key=dedup_key)
        await asyncio.sleep(pen.chance.uniform(0, PACE))


async def send(broker: filao.Broker, pen: Pen, key: str, *, group: str, place: tuple[int, ...], dedup_key: str) -> None:
    """Send a message, sometimes with a delay or a priority."""
    began = pen.begin("send", key=key, group=group, place=place, dedup_key=dedup_key)
    receipt = await broker.send_to_queue(
        QUEUE,
        {"key": key, "group": group, "place": place},
        group=group or None,
        dedup_key=dedup_key or None,
        priority=0 if group else pen.chance.randrange(3),
        delay=pen.chance.choice((0.0, 0.0, 0.0, 0.05)),
    )
    pen.end(began, "duplicate" if receipt.duplicate else "done", {"id": receipt.id})


# --- consumers -------------------------------------------------------------------------------------------------------


async def consume(broker: filao.Broker, pen: Pen, before: dict[int, Record]) -> None:
    """Receive, and settle in one of many ways."""
    while True:
        for message in await receive(broker, pen, pen.chance.choice((1, 1, 3))):
            await handle(pen, message)


async def receive(
    broker: filao.Broker, pen: Pen, limit: int, *, lease: float = QUEUE.lease
) -> list[filao.Message[Any]]:
    """Receive up to `limit` messages, waiting a little."""
    began = pen.begin("receive", limit=limit, seconds=lease)
    messages = await broker.receive_many(QUEUE, limit, wait=0.2, lease=lease)
    if messages:
        pen.end(began, "done", *(described(message) for message in messages))
    else:
        pen.end(began, "nothing")
    return messages


def described(message: filao.Message[Any]) -> dict[str, Any]:
    """Return what is written down about a delivery."""
    sent = message.body
    about = {"key": sent["key"], "group": sent["group"], "place": tuple(sent["place"])}
    return {"id": message.id, "attempt": message.attempt, "token": message.delivery.token, **about}


async def handle(pen: Pen, message: filao.Message[Any]) -> None:
    """Work on a message quickly, slowly, too long or not at all; then settle it well or badly."""
    (pace,) = pen.chance.choices(PACES, (85, 5 * message.attempt, 6, 2, 0.5))
    if pace == "forget":
        return
    if pace == "dawdle":
        await asyncio.sleep(QUEUE.lease * pen.chance.uniform(0, 0.3))
    elif pace == "oversleep":
        await asyncio.sleep(QUEUE.lease * 1.1)
    elif pace == "extend":
        await attempt(pen, "extend", message, message.extend(2 * QUEUE.lease), seconds=2 * QUEUE.lease)
    ways = {
        "ack": message.ack,
        "commit": lambda: commit(message),
        "nack": lambda: message.nack(reason="it did not work"),
        "reject": lambda: message.reject("it cannot work"),
        "release": message.release,
    }
    (way,) = pen.chance.choices(SETTLES, (65, 15, 12, 0.5, 7))
    await attempt(pen, way, message, ways[way]())


async def attempt(
    pen: Pen, call: Verb, message: filao.Message[Any], settling: Awaitable[None], *, seconds: float = 0.0
) -> None:
    """Settle or extend, and write down whether it was still ours to do."""
    token = message.delivery.token
    began = pen.begin(call, id=message.id, token=token, attempt=message.attempt, seconds=seconds)
    try:
        await settling
    except filao.LeaseLost:
        pen.end(began, "lease_lost")
    else:
        pen.end(began, "done")


async def commit(message: filao.Message[Any]) -> None:
    """Write an effect and acknowledge in one transaction."""
    async with message.transaction() as transaction:
        await transaction.execute("INSERT INTO effect VALUES (?)", (message.id,))


# --- the end ---------------------------------------------------------------------------------------------------------


async def drain(scene: Scene) -> Left:
    """When all others are dead: handle what is left, and tell what is found then."""
    pen = Pen(scene, History(scene.histories / scene.name))
    async with filao.connect(scene.db) as broker, asyncio.timeout(DRAINED_WITHIN):
        stats = await broker.stats(QUEUE)
        while stats.ready + stats.delayed + stats.blocked + stats.leased:
            for message in await receive(broker, pen, DRAIN_LIMIT, lease=DRAINED_WITHIN):
                await attempt(pen, "ack", message, message.ack())
            stats = await broker.stats(QUEUE)
        dead = {letter.id: letter.attempts for letter in await broker.dead_letters(QUEUE, limit=10_000)}
        async with broker.transaction() as transaction:
            effects = [found[0] for found in await transaction.execute("SELECT message FROM effect")]
        integrity = [finding.text for finding in await broker.doctor() if finding.level == "error"]
    return Left(dead, effects, msgspec.structs.asdict(stats), "; ".join(integrity) or "ok")
