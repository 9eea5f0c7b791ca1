"""Who is there: every browser has a visit, with a room of its own, for as long as one of its pages is open.

A page that closes may be a page that is loaded anew, so a room is kept for a moment after its last page has gone.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filao.sandbox.web.lesson import STEPS, Mark, facts, mark
from filao.sandbox.web.room import Room

ROOMS_MAX = 6  # each has up to ten processes
LINGER = 8.0  # seconds that a room is kept when its last page has gone
LOOK_EVERY = 0.12  # seconds between two looks into a room
PREFIX = "filao-sandbox-"
LOCK = "in-use"


class NoRoomError(Exception):
    """All rooms are taken."""


@dataclass(slots=True)
class Progress:
    """How far a learner has come."""

    current: int = 0
    """The step that is open."""
    done: set[str] = field(default_factory=set[str])
    chosen: dict[str, int] = field(default_factory=dict[str, int])
    """By step, what was predicted."""
    met: set[str] = field(default_factory=set[str])
    """Conditions of the open step that were seen to hold."""
    since: Mark = field(default_factory=Mark)

    def open(self, place: int, since: Mark) -> None:
        """Open a step; what came before does not count."""
        self.current, self.since = place, since
        self.met = set()


class Visit:
    """A browser's room, and how far its learner has come."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.progress = Progress()
        self.pages = 0
        self.left_at = time.monotonic()
        self._looking = asyncio.create_task(self._keep_looking())

    async def close(self) -> None:
        """End the room."""
        self._looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._looking
        await self.room.__aexit__(None, None, None)

    async def _keep_looking(self) -> None:
        while True:
            await self.room.look()
            self._judge()
            await asyncio.sleep(LOOK_EVERY)

    def _judge(self) -> None:
        """See which conditions of the open step hold by now; with all of them it is done."""
        progress, step = self.progress, STEPS[self.progress.current]
        if len(progress.met) == len(step.conditions):
            return
        found = facts(self.room, progress.since)
        progress.met |= {key for key, holds in step.conditions.items() if holds(found)}
        if len(progress.met) == len(step.conditions):
            progress.done.add(step.key)

    def trials(self) -> Mapping[tuple[str, str], int | None]:
        """Return how the trials of the guarantees have ended so far."""
        return facts(self.room, self.progress.since).trials

    def go(self, place: int) -> None:
        """Open a step."""
        self.progress.open(place, mark(self.room))

    def enter(self) -> None:
        """Count a page."""
        self.pages += 1

    def leave(self) -> None:
        """Count a page that is gone."""
        self.pages -= 1
        self.left_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether all its pages have been gone for a while."""
        return self.pages == 0 and time.monotonic() - self.left_at > LINGER


class Visits:
    """All visits, by what the browser's cookie says, in a folder that goes with them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_browser: dict[str, Visit] = {}
        self._rooms = 0
        self._opening = asyncio.Lock()

    async def of(self, browser: str) -> Visit:
        """Return a browser's visit; a new one begins with an empty room. Raises `NoRoomError`."""
        async with self._opening:
            if browser not in self._by_browser:
                if len(self._by_browser) >= ROOMS_MAX:
                    raise NoRoomError
                self._rooms += 1
                folder = self._folder / f"room-{self._rooms}"
                folder.mkdir(mode=0o700)
                self._by_browser[browser] = Visit(await Room(folder).__aenter__())
            return self._by_browser[browser]

    async def close_those_over(self) -> None:
        """End the visits whose pages are gone."""
        for browser, visit in list(self._by_browser.items()):
            if visit.is_over:
                del self._by_browser[browser]
                await visit.close()

    async def close(self) -> None:
        """End all visits."""
        visits = list(self._by_browser.values())
        self._by_browser.clear()
        await asyncio.gather(*(visit.close() for visit in visits))


@contextmanager
def own_folder() -> Generator[Path]:
    """Return a temporary folder, and remove it at the end; those of sandboxes that were killed are removed too."""
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
