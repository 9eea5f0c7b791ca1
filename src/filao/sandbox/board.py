"""What is going on, as far as the journals tell: who handles what, how fast, and what happened. It only listens.

The scenario feeds it records and the queue's counters; the display draws it, and the scenario chooses by it whom to kill.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from filao.engine import QueueStats
from filao.sandbox.claims import Claim
from filao.sandbox.journal import PORTAL, Record
from filao.sandbox.orders import QUEUE

EVENTS_MAX = 200  # that are remembered
RATE_WINDOW = 2.0  # seconds over which a rate is taken
DEPTHS_MAX = 240  # samples of the queue's depth
KILL_MOMENTS = {"work": "received", "ack": "handled"}

KillWhen = Literal["work", "ack"]
State = Literal["starting", "waiting", "evaluating", "killed", "ended"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something worth a line; `key` says what, in `texts.py`."""

    at: float
    key: str
    values: Mapping[str, int | str | float]


@dataclass(slots=True)
class WorkerView:
    """One worker as it is seen."""

    number: int
    pid: int
    state: State = "starting"
    handled: int = 0
    in_hand: dict[str, Record] = field(default_factory=dict[str, Record])
    """The last record of each claim that it holds, by message, the newest last."""


@dataclass(slots=True)
class Board:
    """The state of the play."""

    claims: Mapping[int, Claim]
    began: float
    portal_pid: int = 0
    portal_ended: bool = False
    sent: int = 0
    taken: int = 0
    """Claims that a worker received, each counted once."""
    handled: int = 0
    """Claims that were handled, each counted once."""
    now: float = 0.0
    stats: QueueStats | None = None
    workers: dict[int, WorkerView] = field(default_factory=dict[int, WorkerView])
    events: deque[Event] = field(default_factory=lambda: deque[Event](maxlen=EVENTS_MAX))
    told: int = 0
    """Events so far, those that are forgotten included."""
    depths: deque[int] = field(default_factory=lambda: deque[int](maxlen=DEPTHS_MAX))
    _seen: Counter[str] = field(default_factory=Counter[str])
    _done: set[str] = field(default_factory=set[str])
    _orphans: dict[str, Record] = field(default_factory=dict[str, Record])
    _orphaned: int = 0
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque[tuple[float, int, int]])

    # --- what comes in -----------------------------------------------------------------------------------------------

    def expect(self, number: int, pid: int) -> None:
        """Take note of a process that was started."""
        if number == PORTAL:
            self.portal_pid = pid
        else:
            self.workers[number] = WorkerView(number, pid)

    def feed(self, record: Record) -> None:
        """Take note of a record."""
        if record.who == PORTAL:
            self._of_portal(record)
        else:
            self._of_worker(record, self.workers[record.who])

    def measure(self, now: float, stats: QueueStats) -> None:
        """Take note of the queue's counters."""
        self.now = now
        self.stats = stats
        self.depths.append(stats.ready)
        self._samples.append((now, self.sent, self.handled))
        while now - self._samples[0][0] > RATE_WINDOW:
            self._samples.popleft()

    def portal_left(self, now: float) -> None:
        """Take note that the portal has ended well."""
        self.portal_ended = True
        self._tell(now, "portal_done", sent=self.sent)

    def _of_portal(self, record: Record) -> None:
        if record.what == "started":
            self._tell(record.at, "portal_ready", pid=record.pid)
        else:
            self.sent += 1

    def _of_worker(self, record: Record, worker: WorkerView) -> None:
        match record.what:
            case "started":
                worker.state = "waiting"
                self._tell(record.at, "worker_ready", worker=worker.number, pid=record.pid)
            case "received":
                self._received(record, worker)
            case "handled":
                worker.handled += 1
                worker.in_hand[record.message] = record
                self._handled(record)
            case "killed":
                self._killed(record, worker)
            case _:
                worker.in_hand.pop(record.message, None)
                if record.what != "acked":
                    self._failed(record)
        if worker.state in ("waiting", "evaluating"):
            worker.state = "evaluating" if worker.in_hand else "waiting"

    def _received(self, record: Record, worker: WorkerView) -> None:
        worker.in_hand[record.message] = record
        self.taken += record.message not in self._seen
        self._seen[record.message] += 1
        killed = self._orphans.pop(record.message, None)
        if killed is None:
            return
        after = record.at - killed.at
        if len(self._orphans) == self._orphaned - 1:
            about = {"worker": worker.number, "claim": record.claim, "attempt": record.attempt}
            self._tell(record.at, "took_over", after=after, **about)
        elif not self._orphans:
            self._tell(record.at, "all_taken_over", count=self._orphaned, killed=killed.who, after=after)

    def _handled(self, record: Record) -> None:
        if record.message in self._done:
            self._tell(record.at, "handled_again", worker=record.who, claim=record.claim)
        else:
            self._done.add(record.message)
            self.handled += 1

    def _failed(self, record: Record) -> None:
        about: dict[str, str | int] = {
            "worker": record.who,
            "claim": record.claim,
            "attempt": record.attempt,
            "why": record.note,
        }
        if record.what == "refused":
            self._tell(record.at, "refused", **about)
        elif record.attempt >= QUEUE.max_attempts:
            self._tell(record.at, "died", **about)
        else:
            self._tell(record.at, "failed", **about)

    def _killed(self, record: Record, worker: WorkerView) -> None:
        worker.state = "killed"
        self._orphans = dict.fromkeys(worker.in_hand, record)
        self._orphaned = len(worker.in_hand)
        first = min((held.claim for held in worker.in_hand.values()), default=0)
        key = "killed_one" if self._orphaned == 1 else "killed_many"
        self._tell(record.at, key, worker=worker.number, pid=record.pid, claim=first, count=self._orphaned)
        worker.in_hand.clear()

    def _tell(self, at: float, key: str, **values: float | str) -> None:
        self.events.append(Event(at, key, values))
        self.told += 1

    # --- what is asked -----------------------------------------------------------------------------------------------

    def rates(self) -> tuple[float, float]:
        """Return how many claims were sent and handled per second of late."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (then, sent, handled), (now, sent_now, handled_now) = self._samples[0], self._samples[-1]
        passed = now - then
        return (sent_now - sent) / passed, (handled_now - handled) / passed

    def is_half_way(self) -> bool:
        """Return whether half of the claims have been taken by a worker."""
        return self.taken >= math.ceil(len(self.claims) / 2)

    def holders(self, when: KillWhen) -> list[int]:
        """Return the workers that hold a claim in the wanted moment: at work, or between the work and the ack."""
        return [worker.number for worker in self.workers.values() if self._holds(worker, when)]

    @staticmethod
    def _holds(worker: WorkerView, when: KillWhen) -> bool:
        wanted = KILL_MOMENTS[when]
        return worker.state == "evaluating" and any(
            held.what == wanted and held.attempt == 1 for held in worker.in_hand.values()
        )
