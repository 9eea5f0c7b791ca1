"""What one look finds in the insurer's file: messages by state, payments, and samples for the charts."""

import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

import filao
from filao.checks import PEEK_MAX
from filao.engine import QueueStats, State, StoredMessage
from filao.engines.sqlite.doctor import ROOM_LEAST
from filao.sandbox.effects import Effects, Payment
from filao.sandbox.lanes import Lanes
from filao.sandbox.orders import CLAIMS, DOCUMENTS

SHOWN = 60  # messages of each state that one look reads
SHOWN_STATES = (State.READY, State.DELAYED, State.BLOCKED, State.LEASED, State.DEAD)
REMEMBERED, REMEMBERED_EVERY = 240, 0.5  # samples for the charts, and seconds between them
AUDIT_EVERY = 0.5  # seconds between two looks at the whole queue


class Sample(NamedTuple):
    """The figures of one moment, for the charts."""

    at: float
    """Monotonic time."""
    depth: int
    """Claims in the queue, including leased ones."""
    age: float
    sent: int
    paid: int
    busy: int
    """Consumers at work."""
    consumers: int


class View(msgspec.Struct, frozen=True):
    """What one look found."""

    stats: QueueStats | None
    """None: the queue is not created yet."""
    documents: QueueStats | None
    ready: Sequence[StoredMessage] = ()
    delayed: Sequence[StoredMessage] = ()
    blocked: Sequence[StoredMessage] = ()
    leased: Sequence[StoredMessage] = ()
    dead: Sequence[StoredMessage] = ()
    notes: Sequence[StoredMessage] = ()
    """What waits in the queue of the documents."""
    is_full: bool = False
    """Whether the disk is full."""
    error: str = ""
    """The error of the storage, when it could not be read."""


class Viewer:
    """Reads the file again and again, and tells lanes and effects what it found."""

    def __init__(self, folder: Path, broker: filao.Broker, lanes: Lanes, effects: Effects) -> None:
        self.view: View = View(None, None)
        """What the last look found."""
        self.gave_up: set[str] = set()
        """Messages that were seen among the dead letters."""
        self.history: deque[Sample] = deque(maxlen=REMEMBERED)
        self._folder = folder
        self._broker = broker
        self._lanes = lanes
        self._effects = effects
        self._last_payment = 0
        self._audited_at = 0.0

    def open(self, file: Path) -> None:
        """Connect to the insurer's own table."""
        self._business = sqlite3.connect(file)

    def close(self) -> None:
        """Close the connection."""
        self._business.close()

    async def look(self, now: float) -> View:
        """Read the file; when it cannot be read, return the last view with the error."""
        try:
            self.view = await self._see(now)
            self._remember(now)
        except (filao.FilaoError, sqlite3.Error) as error:
            self.view = msgspec.structs.replace(self.view, error=str(error), is_full=self._is_full())
        return self.view

    async def ids(self, states: Iterable[State]) -> list[str]:
        """Return the ids of all messages in some states."""
        ids: list[str] = []
        for state in states:
            after: str | None = None
            while page := await self._broker.peek(CLAIMS, state=state, limit=PEEK_MAX, after=after):
                ids += [message.id for message in page]
                after = page[-1].id
                if len(page) < PEEK_MAX:
                    break
        return ids

    def _remember(self, now: float) -> None:
        """Add to what the charts show, now and then."""
        stats = self.view.stats
        if stats is None or (self.history and now - self.history[-1].at < REMEMBERED_EVERY):
            return
        depth = stats.ready + stats.blocked + stats.delayed + stats.leased
        living = self._lanes.living()
        busy = sum(lane.holds is not None for lane in living)
        counts = (stats.sent, len(self._effects.payments), busy, len(living))
        self.history.append(Sample(now, depth, stats.oldest_ready_age or 0.0, *counts))

    async def _see(self, now: float) -> View:
        found = {stats.name: stats for stats in await self._broker.stats()}
        stats = found.get(CLAIMS)
        if stats is None:
            return View(None, None, is_full=self._is_full())
        ready, delayed, blocked, leased, dead = [await self._peek(state, stats) for state in SHOWN_STATES]
        self._lanes.see(leased, now)
        self.gave_up.update(message.id for message in dead)
        self._lanes.bury((message.id for message in dead), now)
        self._read_payments()
        if now - self._audited_at >= AUDIT_EVERY:
            self._audited_at = now
            self._effects.audit(set(await self.ids(SHOWN_STATES)))
        documents = found.get(DOCUMENTS)
        notes = await self._broker.peek(DOCUMENTS, limit=SHOWN) if documents is not None and documents.ready else ()
        return View(stats, documents, ready, delayed, blocked, leased, dead, notes, is_full=self._is_full())

    async def _peek(self, state: State, stats: QueueStats) -> Sequence[StoredMessage]:
        return await self._broker.peek(CLAIMS, state=state, limit=SHOWN) if getattr(stats, state) else ()

    def _read_payments(self) -> None:
        rows = self._business.execute(
            "SELECT id, message, claim, cents, paid_by, attempt FROM payment WHERE id > ? ORDER BY id",
            (self._last_payment,),
        ).fetchall()
        if rows:
            self._last_payment = rows[-1][0]
            payments = [Payment(*row) for row in rows]
            self._effects.paid(payments)
            for payment in payments:
                if not payment.paid_by.isdecimal():
                    self._lanes.guest_paid(payment.message, payment.attempt, time.monotonic())

    def _is_full(self) -> bool:
        return shutil.disk_usage(self._folder).free < ROOM_LEAST
