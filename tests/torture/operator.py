"""The operator: pauses and resumes, sends dead letters back, purges, cancels, deletes queues and declares them anew."""

import asyncio
from contextlib import suppress

import filao
from tests.torture.scene import CLAIMS, ELSEWHERE, LETTERS, QUEUES, Pen, Scene, until_told

PACE = 0.2  # seconds between two of its deeds, on average
PAUSED = 0.2  # seconds at most
DEEDS = ("redrive", "redrive all", "pause", "purge", "purge leased", "cancel", "delete")


def play(scene: Scene) -> None:
    """Be the operator until killed or told to stop."""
    until_told(scene, operate, tasks=1)


async def operate(broker: filao.Broker, pen: Pen) -> None:
    """Begin by mending what an earlier life may have left: a paused queue, or one that is missing."""
    await broker.declare(*QUEUES)
    await resume(broker, pen)
    while True:
        await asyncio.sleep(pen.chance.uniform(0, 2 * PACE))
        (deed,) = pen.chance.choices(DEEDS, (40, 8, 12, 10, 5, 15, 3))
        match deed:
            case "redrive":
                await redrive(broker, pen)
            case "redrive all":
                began = pen.begin("redrive", queue=LETTERS.name)
                pen.end(began, "done", {"count": await broker.redrive(LETTERS, limit=pen.chance.choice((5, None)))})
            case "pause":
                await pause(broker, pen)
            case "purge":
                await purge(broker, pen, pen.chance.choice((None, filao.State.DEAD)))
            case "purge leased":
                await purge(broker, pen, filao.State.LEASED)
            case "cancel":
                await cancel(broker, pen)
            case _:
                await delete(broker, pen)


async def redrive(broker: filao.Broker, pen: Pen) -> None:
    """Send a claim back by its id, with a body that says how often that has happened."""
    letters = await broker.dead_letters(CLAIMS, limit=20)
    if not letters:
        return
    letter = pen.chance.choice(letters)
    epoch = letter.body["epoch"] + 1
    began = pen.begin("redrive", queue=CLAIMS.name, id=letter.id, epoch=epoch)
    count = await broker.redrive(CLAIMS, ids=[letter.id], body={**letter.body, "epoch": epoch})
    pen.end(began, "done", {"count": count})


async def pause(broker: filao.Broker, pen: Pen) -> None:
    """Let nothing be delivered for a while."""
    began = pen.begin("pause", queue=CLAIMS.name)
    await broker.pause(CLAIMS)
    pen.end(began, "done")
    await asyncio.sleep(pen.chance.uniform(0, PAUSED))
    await resume(broker, pen)


async def resume(broker: filao.Broker, pen: Pen) -> None:
    """Let claims be delivered again."""
    began = pen.begin("resume", queue=CLAIMS.name)
    await broker.resume(CLAIMS)
    pen.end(began, "done")


async def purge(broker: filao.Broker, pen: Pen, state: filao.State | None) -> None:
    """Delete letters."""
    dead = (await broker.stats(LETTERS)).dead
    most = dead + 1_000 if state is filao.State.DEAD else LETTERS.max_length  # deleted, were it killed meanwhile
    began = pen.begin("purge", queue=LETTERS.name, limit=most)
    pen.end(began, "done", {"count": await broker.purge(LETTERS, state=state)})


async def cancel(broker: filao.Broker, pen: Pen) -> None:
    """Delete one letter that waits."""
    state = pen.chance.choice((filao.State.READY, filao.State.DELAYED))
    waiting = await broker.peek(LETTERS, state=state, limit=20)
    if waiting:
        letter = pen.chance.choice(waiting)
        began = pen.begin("cancel", queue=LETTERS.name, id=letter.id, limit=1)
        pen.end(began, "done", {"count": int(await broker.cancel(LETTERS, letter.id))})


async def delete(broker: filao.Broker, pen: Pen) -> None:
    """Delete a queue when it is empty, which it seldom is unless it was purged, and declare it anew."""
    for state in (None, filao.State.LEASED, filao.State.DEAD):
        await purge(broker, pen, state)
    began = pen.begin("delete", queue=LETTERS.name)
    with suppress(filao.ConfigurationError):  # it holds something by now
        await broker.delete_queue(LETTERS)
    await asyncio.sleep(ELSEWHERE)
    await broker.declare(LETTERS)
    pen.end(began, "done")
