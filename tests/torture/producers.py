"""Producers: they send with every option, alone, in a transaction of the broker's, or within one of their own
connection.
"""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from itertools import count
from typing import Any

import filao
from tests.torture.history import Outcome, Record, read
from tests.torture.scene import BILLS, CLAIMS, ELSEWHERE, LETTERS, Pen, Scene, until_told

PACE = 0.06  # seconds between two sends of a task, at most: consumers that oversleep must keep up
BUSY = 30.0  # seconds that a connection of our own waits for the file


class Undo(Exception):
    """Raised in a transaction, to undo it."""


def play(scene: Scene) -> None:
    """Be a producer until killed or told to stop."""
    before = unconfirmed(scene)

    async def produce(broker: filao.Broker, pen: Pen) -> None:
        if pen.task in before:
            began = before[pen.task]
            await send(broker, pen, began.key, **_same(began))
        for number in count():
            await _one(broker, pen, number)
            await asyncio.sleep(pen.chance.uniform(0, PACE))

    until_told(scene, produce)


def unconfirmed(scene: Scene) -> dict[int, Record]:
    """Return the named sends, by task, of which this actor's earlier life did not learn whether they were stored."""
    last: dict[int, Record] = {}
    path = scene.histories / scene.name
    for record in read(path) if path.exists() else ():
        if record.call == "send" and not record.outcome:
            last[record.task] = record
        elif record.call == "send":
            last.pop(record.task, None)
    return {task: record for task, record in last.items() if record.dedup_key or record.message_id}


def _same(began: Record) -> dict[str, Any]:
    return {
        "group": began.group,
        "place": began.place,
        "dedup_key": began.dedup_key,
        "message_id": began.message_id,
    }


async def _one(broker: filao.Broker, pen: Pen, number: int) -> None:
    """Send one message, and sometimes the same once more."""
    key = f"{pen.scene.process}.{pen.task}.{number}"
    place = pen.scene.life, number
    queue = pen.chance.choices((CLAIMS, LETTERS, BILLS), (70, 20, 10))[0]
    if queue is not CLAIMS:
        await send(broker, pen, key, queue=queue, place=place, ttl=pen.chance.choice((0.0, 0.0, 0.3)))
        return
    about: dict[str, Any] = {"group": pen.chance.choice(("", f"{pen.scene.name}.{pen.task}.{number % 2}"))}
    named = pen.chance.choice(("", "dedup_key", "message_id"))
    if named:
        about[named] = key
    else:
        about["ttl"] = pen.chance.choice((0.0, 0.0, 0.0, 0.3))
    if pen.chance.random() < 0.1:
        await send_and_undo(broker, pen, f"{key}.undone", place=place, group=str(about["group"]))
    await send(broker, pen, key, place=place, how=pen.chance.choice(("", "", "", "transaction", "within")), **about)
    if named and pen.chance.random() < 0.2:
        again = f"{key}.again" if named == "dedup_key" else key
        await send(broker, pen, again, place=(*place, 1), **about)


async def send(
    broker: filao.Broker,
    pen: Pen,
    key: str,
    *,
    queue: filao.Queue = CLAIMS,
    how: str = "",
    group: str = "",
    place: tuple[int, ...] = (),
    dedup_key: str = "",
    message_id: str = "",
    ttl: float = 0.0,
) -> None:
    """Send a message, sometimes with a delay or a priority."""
    delay = pen.chance.choice((0.0, 0.0, 0.0, 0.05))
    about = {"group": group, "place": place, "dedup_key": dedup_key, "message_id": message_id}
    began = pen.begin("send", queue=queue.name, key=key, delay=delay, ttl=ttl, **about)
    options: dict[str, Any] = {
        "group": group or None,
        "dedup_key": dedup_key or None,
        "message_id": message_id or None,
        "priority": 0 if group else pen.chance.randrange(3),
        "delay": delay,
        "ttl": ttl or None,
    }
    body = {"key": key, "group": group, "place": list(place), "epoch": 0}
    outcome: Outcome = "done"
    about_it = {}
    try:
        async with sending(broker, pen.scene, how) as door:
            receipt = await door.send_to_queue(queue, body, **options)
        outcome = "duplicate" if receipt.duplicate else "done"
        about_it = {"id": receipt.id}
    except (filao.QueueFull, filao.QueueNotFound):
        outcome = "refused"
        await asyncio.sleep(ELSEWHERE)
    pen.end(began, outcome, about_it)


async def send_and_undo(broker: filao.Broker, pen: Pen, key: str, *, group: str, place: tuple[int, ...]) -> None:
    """Send in a transaction that is undone: nobody may ever see it."""
    began = pen.begin("send", queue=CLAIMS.name, key=key, group=group, place=place)
    try:
        async with sending(broker, pen.scene, pen.chance.choice(("transaction", "within"))) as door:
            body = {"key": key, "group": group, "place": list(place), "epoch": 0}
            await door.send_to_queue(CLAIMS, body, group=group or None)
            raise Undo
    except Undo:
        pen.end(began, "undone")


class _Within:
    """Sends within a transaction of the actor's own."""

    def __init__(self, broker: filao.Broker, connection: Any) -> None:
        self._broker = broker
        self._connection = connection

    async def send_to_queue(self, queue: filao.Queue, body: Any, **options: Any) -> filao.Receipt:
        return await self._broker.send_to_queue(queue, body, within=self._connection, **options)


@asynccontextmanager
async def sending(broker: filao.Broker, scene: Scene, how: str) -> AsyncGenerator[Any]:
    """Give what a message is sent with: the broker, a transaction of its, or one of our own connection."""
    if how == "transaction":
        async with broker.transaction() as transaction:
            await transaction.execute("SELECT 1")
            yield transaction
    elif how == "within":
        async with own_transaction(scene) as connection:
            yield _Within(broker, connection)
    else:
        yield broker


@asynccontextmanager
async def own_transaction(scene: Scene) -> AsyncGenerator[Any]:
    """Open a connection of our own with a transaction, which is committed unless the block raises.

    It waits for the file in a thread: on the loop it would wait for ever for another task's transaction. Who is told to
    end meanwhile waits for the thread, for a connection may not be closed under it.
    """
    if scene.is_file:
        with closing(sqlite3.connect(scene.db, timeout=BUSY, isolation_level=None, check_same_thread=False)) as file:
            beginning = asyncio.create_task(asyncio.to_thread(file.execute, "BEGIN IMMEDIATE"))
            try:
                await asyncio.shield(beginning)
            finally:
                await beginning
            yield file
            file.execute("COMMIT")
        return
    import psycopg  # so that a play on a file needs no driver

    with psycopg.connect(str(scene.db)) as server:
        yield server
