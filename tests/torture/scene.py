"""What all actors share: the queues, what they know of the play, and the pen with which they write down what they do.

They are forked from a parent that holds nothing open, so that a killed one is back in a few milliseconds. One that ends
in any other way than by a signal has met an error that Filao should not have raised.
"""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import msgspec

import filao
import filao.sync
from filao.message import delivery_of
from tests.torture.checker import Kept
from tests.torture.history import History, Outcome, Record, Verb, now

AT_ONCE = filao.Backoff(first=0.01, ceiling=0.1)
CLAIMS: filao.Queue = filao.Queue("claims.processing", lease=1.0, max_attempts=6, backoff=AT_ONCE)
"""Keeps every promise: what is sent here is handled, or a dead letter in the end. Dead letters come back one by one."""
LETTERS: filao.Queue = filao.Queue(
    "letters", lease=1.0, max_attempts=3, backoff=AT_ONCE, max_length=40, overflow="drop_oldest", on_expiry="drop"
)
"""The operator's: purged, cancelled, redriven, deleted and declared anew."""
BILLS: filao.Queue = filao.Queue("bills", lease=1.0, max_attempts=3, backoff=AT_ONCE, max_length=20)
"""Refuses what is too much, and is received at most once."""
QUEUES = (CLAIMS, LETTERS, BILLS)
KEPT: dict[str, Kept] = {CLAIMS.name: "all", LETTERS.name: "while allowed", BILLS.name: "until received"}
EFFECT = "INSERT INTO effect VALUES (?)"
EFFECTS = "CREATE TABLE IF NOT EXISTS effect (message TEXT NOT NULL)"  # not unique: a second effect shall be seen
TASKS = 4  # of each process, so that they share transactions
ELSEWHERE = 0.02  # seconds until a queue that was deleted is looked for again


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

    @property
    def is_file(self) -> bool:
        return not str(self.db).startswith("postgresql:")


class Pen:
    """Writes down what one task does; a call within a call is written with a pen of its own."""

    def __init__(self, scene: Scene, history: History, task: int = 0, numbers: Iterator[int] | None = None) -> None:
        self.scene = scene
        self.task = task
        self.chance = Random(f"{scene.seed} {scene.process} {task}")
        self._history = history
        self._numbers = count(task + 1_000, 1_000) if numbers is None else numbers
        """Of all that were had from the first pen, at whatever remove: a number is one task's."""

    def another(self) -> "Pen":
        """Return a pen for what goes on beside or within what this one writes. From any thread."""
        return Pen(self.scene, self._history, next(self._numbers), self._numbers)

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


Act = Callable[[filao.Broker, Pen], Coroutine[Any, Any, None]]


def until_told(scene: Scene, act: Act, tasks: int = TASKS) -> None:
    """Act in several tasks of one broker, until killed, or told by SIGTERM to close it and leave."""

    async def play() -> None:
        here = asyncio.current_task()
        assert here is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
        history = History(scene.histories / scene.name)
        async with filao.connect(scene.db) as broker, asyncio.TaskGroup() as group:
            for task in range(tasks):
                group.create_task(act(broker, Pen(scene, history, task)))

    with suppress(asyncio.CancelledError):
        asyncio.run(play())


def described(message: Any) -> dict[str, Any]:
    """Return what is written down about a delivery."""
    sent = message.body
    about = {"key": sent["key"], "group": sent["group"], "place": tuple(sent["place"]), "epoch": sent["epoch"]}
    return {"id": message.id, "attempt": message.attempt, "token": token_of(message), **about}


def lease_of(message: Any) -> dict[str, Any]:
    """Return what is written down of who settles or extends."""
    return {
        "queue": message.queue,
        "id": message.id,
        "token": token_of(message),
        "attempt": message.attempt,
        "epoch": message.body["epoch"],
    }


def token_of(message: Any) -> int:
    """Look inside a message, of either face, for what tells this delivery from the next."""
    inner: filao.Message[Any] = message._inner if isinstance(message, filao.sync.Message) else message
    return delivery_of(inner).token
