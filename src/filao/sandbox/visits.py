"""Visits: every session has one, with a room of its own, for as long as one of its pages is open.

A page that closes may be about to load anew, so a room is kept for a moment after its last page has gone.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filao.sandbox import scene
from filao.sandbox.lesson import Facts, Mark, mark
from filao.sandbox.orders import GUARANTEES, MOMENTS
from filao.sandbox.room import Room, RoomError
from filao.sandbox.steps import STEPS, Step

ROOMS_MAX = 6  # each has up to ten processes
LINGER = 8.0  # seconds that a room is kept after its last page has gone
RESTED = 1.5  # seconds without any change, after which no more is expected
LOOK_EVERY = 0.1  # seconds between two looks into a room
PREFIX = "filao-sandbox-"
LOCK = "in-use"

log: logging.Logger = logging.getLogger("filao.sandbox")


class NoRoomError(Exception):
    """All rooms are taken."""


@dataclass(slots=True)
class Progress:
    """How far a learner has come."""

    current: int = 0
    """The step that is open."""
    done: set[str] = field(default_factory=set[str])
    chosen: dict[str, int] = field(default_factory=dict[str, int])
    """By step, which prediction the learner chose."""
    met: set[str] = field(default_factory=set[str])
    """The conditions of the open step that have held since it began."""
    ran: bool = False
    """Whether the learner has begun to do what the step says."""
    proofs: dict[str, dict[str, str | int]] = field(default_factory=dict[str, dict[str, str | int]])
    """By step, the values of its texts when it was done."""
    since: Mark = field(default_factory=Mark)


class Visit:
    """A learner's room, and how far the learner has come."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.progress: Progress = Progress()
        self.pages: int = 0
        self.left_at: float = time.monotonic()
        self.loaded_at: float = 0.0
        """When the sliders were moved last: the load is measured from then on."""
        self.busy: bool = False
        self._looked = asyncio.Event()  # each look has one of its own
        self._rests_since: float | None = None
        self._rested = False  # as of the last look: when one is late, the step is not missed for that
        self._looking = asyncio.create_task(self._keep_looking())

    async def close(self) -> None:
        """End the room."""
        self._looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._looking
        await self.room.__aexit__(None, None, None)

    async def _keep_looking(self) -> None:
        """Look into the room until it closes; an error in one look does not prevent the next."""
        while True:
            try:
                await self.room.look()
                await self.room.arrive()
                await self._judge()
            except Exception as error:
                log.warning("a look into the room failed: %r", error)
            looked, self._looked = self._looked, asyncio.Event()
            looked.set()
            await asyncio.sleep(LOOK_EVERY)

    async def seen(self) -> None:
        """Wait for two looks: the first may have begun before what has just been done, the second has seen it."""
        for _ in range(2):
            await self._looked.wait()

    # --- the lesson --------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        """The step that is open."""
        return STEPS[self.progress.current]

    def facts(self) -> Facts:
        """Return what has happened since the step began."""
        return Facts(self.room, self.progress.since)

    async def _judge(self) -> None:
        """See which conditions of the open step hold by now; with all of them it is done."""
        progress, step, facts = self.progress, self.step, self.facts()
        now = time.monotonic()
        self._rests_since = (self._rests_since or now) if facts.at_rest or self._is_stranded(facts) else None
        self._rested = self._rests_since is not None and now - self._rests_since > RESTED
        if step.follow is not None and progress.ran:
            await step.follow(self.room, facts)
        if len(progress.met) == len(step.conditions):
            return
        progress.met |= {key for key, holds in step.conditions.items() if holds(facts)}
        if len(progress.met) == len(step.conditions):
            progress.done.add(step.key)
            progress.proofs[step.key] = step.values(facts)

    def go(self, place: int) -> None:
        """Open a step."""
        self.progress.current = max(0, min(place, len(STEPS) - 1))
        self.begin()
        self.progress.ran = False

    def begin(self) -> None:
        """Let the open step begin anew: what came before does not count."""
        self.progress.since = mark(self.room)
        self.progress.met = set()
        self.progress.ran = True

    async def act(self, key: str) -> None:
        """Do what a button of the open step does. Raises `RoomError` when it cannot be done now."""
        act = self.step.acts.get(key)
        if act is None or self.busy:
            raise RoomError("busy")
        if act.begins or not self.progress.ran:
            self.begin()
        if not act.ready(self.facts()):
            raise RoomError("not_now")
        self.busy = True
        try:
            await act.do(self.room, self.facts())
        finally:
            self.busy = False

    def measure_anew(self) -> None:
        """Forget what was measured of the load."""
        self.loaded_at = time.monotonic()

    def restore(self, done: set[str], chosen: Mapping[str, int], current: int) -> None:
        """Take up the progress that the browser has kept, unless this room has some already."""
        if not self.progress.done and not self.progress.current and not self.progress.ran:
            known = {step.key for step in STEPS}
            self.progress.done = done & known
            self.progress.chosen = {key: place for key, place in chosen.items() if key in known}
            self.go(current)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def shown(self, *, known: int, claim: int) -> scene.Json:
        """Return all that a page shows. `known` is the last move that it has, `claim` the one whose story it tells."""
        room, since = self.room, self.progress.since
        hero = claim or self.step.hero(self.facts()) or (room.lanes.moves[-1].claim if room.lanes.moves else 0)
        return {
            "lesson": self._lesson(),
            "stage": scene.stage(room, since),
            "timeline": scene.timeline(room, since),
            "life": scene.life(room, hero),
            "story": scene.story(room, since, claim) if claim else None,
            "books": scene.books(room),
            "load": scene.load(room, self.loaded_at),
            "exercise": scene.exercise(room) if self.step.key == "implement" else None,
            "moves": scene.moves(room, since, known),
            "since": since.moves,
            "events": [
                {"n": event.number, "key": event.key, "values": dict(event.values)}
                for event in list(room.lanes.events)[-3:]
            ],
        }

    def _lesson(self) -> scene.Json:
        progress, step, facts = self.progress, self.step, self.facts()
        is_done = len(progress.met) == len(step.conditions)
        values = progress.proofs[step.key] if is_done else step.values(facts)  # the explanation does not change later
        return {
            "current": progress.current,
            "done": [one.key for one in STEPS if one.key in progress.done],
            "chosen": progress.chosen,
            "met": sorted(progress.met),
            "is_done": is_done,
            "ran": progress.ran,
            "busy": self.busy,
            "values": values,
            "ready": [key for key, act in step.acts.items() if not self.busy and act.ready(facts)],
            "hint": "" if is_done or not progress.ran or self.busy else self._hint(step, facts),
            "trials": self._trials(facts) if step.key == "guarantees" else None,
            "proofs": progress.proofs,
            "setting": {"guarantee": self.room.setting.guarantee, "grouped": self.room.setting.grouped},
        }

    def _hint(self, step: Step, facts: Facts) -> str:
        """Return the key of what to do now. "missed" comes only when nothing has changed for a while."""
        if self._rested and self._is_stranded(facts):
            return "stranded"
        hint = step.hint(facts) or ("missed" if facts.at_rest and step.conditions else "")
        return "" if hint == "missed" and not self._rested else hint

    def _is_stranded(self, facts: Facts) -> bool:
        return self.step.is_worked and facts.is_stranded

    def _trials(self, facts: Facts) -> list[scene.Json]:
        found = facts.trials()
        rows = [(guarantee, [found.get((guarantee, moment), "none") for moment in MOMENTS]) for guarantee in GUARANTEES]
        return [
            {"guarantee": guarantee, "times": ["open" if times is None else str(times) for times in row]}
            for guarantee, row in rows
        ]

    # --- its pages ---------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Count a page that opens."""
        self.pages += 1

    def leave(self) -> None:
        """Count a page that has gone."""
        self.pages -= 1
        self.left_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether all its pages have been gone for a while."""
        return self.pages == 0 and time.monotonic() - self.left_at > LINGER


class Visits:
    """All visits, by session; each has its room in one folder."""

    def __init__(self, folder: Path, speed: float) -> None:
        self._folder = folder
        self._speed = speed
        self._by_session: dict[str, Visit] = {}
        self._rooms = 0
        self._opening = asyncio.Lock()

    async def of(self, session: str) -> Visit:
        """Return a session's visit; a new one begins with an empty room. Raises `NoRoomError`."""
        async with self._opening:
            if session not in self._by_session:
                if len(self._by_session) >= ROOMS_MAX:
                    raise NoRoomError
                self._rooms += 1
                folder = self._folder / f"room-{self._rooms}"
                folder.mkdir(mode=0o700)
                self._by_session[session] = Visit(await Room(folder, self._speed).__aenter__())
            return self._by_session[session]

    async def close_those_over(self) -> None:
        """End the visits whose pages have gone."""
        for session, visit in list(self._by_session.items()):
            if visit.is_over:
                del self._by_session[session]
                await visit.close()

    async def close(self) -> None:
        """End all visits."""
        visits = list(self._by_session.values())
        self._by_session.clear()
        await asyncio.gather(*(visit.close() for visit in visits))


@contextmanager
def own_folder() -> Generator[Path]:
    """Yield a temporary folder and remove it at the end; remove those of sandboxes that were killed, too."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        _remove_if_left(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when we die, however
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # another user's, or one that is just being made
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # its sandbox runs
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
