"""Who held which claim, from when to when, and how it ended: one lane for each consumer, one lease for each
attempt.

It only listens: to the journals of our own processes, and to what the engine says about who holds what, which is all
that is known of a consumer that the learner brought along. Times are the machine's monotonic clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from filao.engine import StoredMessage
from filao.sandbox.journal import Record
from filao.sandbox.orders import number_in

LEASES_MAX = 60  # leases that one lane shows
EVENTS_MAX = 200  # events that are remembered
MOVES_MAX = 3_000  # moves that can be stepped through
GUESTS_FROM = 101  # the number of the first consumer that is not ours

State = Literal["starting", "waiting", "working", "paused", "leaving", "killed", "crashed", "gone"]
End = Literal["", "acked", "nacked", "dead", "failed", "released", "refused", "killed", "settled"]
_ENDS: dict[str, End] = {
    "acked": "acked",
    "nacked": "nacked",
    "failed": "failed",
    "released": "released",
    "refused": "refused",
}


@dataclass(frozen=True, slots=True)
class Event:
    """An event for the page's list; `key` is that of its text."""

    number: int
    at: float
    key: str
    values: Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Move:
    """Something that happened to a claim, with its row on the disk just after that; slow motion shows these."""

    number: int
    at: float
    what: str
    claim: int
    lane: int
    attempt: int
    row: str
    message: str


@dataclass(slots=True)
class Lease:
    """One attempt at one claim."""

    message: str
    claim: int
    attempt: int
    lane: int
    began: float
    once: bool = False
    """Whether it was acknowledged before the work began."""
    until: float = 0.0
    """When the lease ends, or ended."""
    ended: float | None = None
    how: End = ""
    why: str = ""
    paid_at: float | None = None
    together: bool = False
    """Whether it was paid and acknowledged in one transaction."""
    paying: bool = False
    halted: str = ""
    """The moment at which its consumer stands still, because it was told to."""
    extensions: list[float] = field(default_factory=list[float])
    lost_at: float | None = None
    """When its consumer found that another one had the claim."""

    @property
    def paid(self) -> bool:
        """Whether the claim was paid in this attempt."""
        return self.paid_at is not None


@dataclass(slots=True)
class Lane:
    """One consumer."""

    number: int
    pid: int
    is_guest: bool = False
    state: State = "starting"
    slow: float = 1.0
    fails: bool = False
    handled: int = 0
    holds: Lease | None = None
    words: str = ""
    """The last words of a process that crashed."""
    left_at: float | None = None
    leases: "deque[Lease]" = field(default_factory=lambda: deque[Lease](maxlen=LEASES_MAX))

    @property
    def lives(self) -> bool:
        """Whether its process is there, be it working, stopped or about to end."""
        return self.state not in ("killed", "crashed", "gone")

    def turns(self, state: State) -> None:
        """Note what its journal says that it does, which is not heard of one that is stopped or was sent home."""
        if self.state in ("starting", "waiting", "working"):
            self.state = state


class Lanes:
    """All consumers that there have been."""

    def __init__(self, row_of: Callable[[str], str] = lambda _: "") -> None:
        self._row_of = row_of  # a message's row on the disk, for what no process of ours could read
        self.by_number: dict[int, Lane] = {}
        self.events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self.moves: deque[Move] = deque(maxlen=MOVES_MAX)
        self.moved: int = 0
        """Moves so far."""
        self.told: int = 0
        """Events so far."""
        self.order: list[str] = []
        """Messages in the order in which they were paid first."""
        self._attempts: dict[str, list[Lease]] = {}
        self._guests: dict[str, Lane] = {}

    # --- what comes in -----------------------------------------------------------------------------------------------

    def expect(self, number: int, pid: int) -> Lane:
        """Take note of a consumer that was started."""
        self.by_number[number] = Lane(number, pid)
        return self.by_number[number]

    def feed(self, record: Record) -> None:
        """Take note of what a consumer of ours wrote down."""
        lane = self.by_number[record.who]
        lease = self._lease_of(record)
        match record.what:
            case "started":
                lane.turns("waiting")
                self.tell(record.at, "started", consumer=lane.number, pid=record.pid)
            case "received":
                self._received(lane, record)
            case "extended" if lease:
                lease.extensions.append(record.at)
                lease.until = record.until
            case "lost" if lease:
                lease.lost_at = record.at
            case "paying" if lease:
                lease.paying = True
            case "halted" if lease:
                lease.halted = record.note
            case "handled" if lease:
                lease.together = record.note == "together"
                self._paid(lane, lease, record.at)
            case "troubled":
                self.tell(record.at, "troubled", consumer=lane.number, why=record.note)
            case what if lease:
                self._ended(lane, lease, record.at, _ENDS[what], record.note)
            case _:
                pass
        if record.message:
            self.move(record)

    def move(self, record: Record) -> None:
        """Remember a thing that happened to a claim."""
        about = (record.claim, record.who, record.attempt, record.row, record.message)
        self.moved += 1
        self.moves.append(Move(self.moved, record.at, record.what, *about))

    def _lease_of(self, record: Record) -> Lease | None:
        found = (one for one in reversed(self._attempts.get(record.message, [])) if one.lane == record.who)
        return next((one for one in found if one.attempt == record.attempt), None)

    def _received(self, lane: Lane, record: Record) -> None:
        lease = self._begin(lane, record.message, record.claim, record.attempt, record.at)
        lease.once, lease.until = record.note == "once", record.until
        before = self._attempts[record.message][:-1]
        if before and before[-1].how in ("killed", ""):
            about = {"consumer": lane.number, "claim": record.claim, "attempt": record.attempt, "of": before[-1].lane}
            self.tell(record.at, "took_over", **about)

    def _begin(self, lane: Lane, message: str, claim: int, attempt: int, at: float) -> Lease:
        lease = Lease(message, claim, attempt, lane.number, at)
        self._attempts.setdefault(message, []).append(lease)
        lane.leases.append(lease)
        lane.holds = lease
        lane.turns("working")
        return lease

    def _paid(self, lane: Lane, lease: Lease, at: float) -> None:
        if not any(one.paid for one in self._attempts[lease.message]):
            self.order.append(lease.message)
        lease.paid_at = at
        lane.handled += 1

    def _ended(self, lane: Lane, lease: Lease, at: float, how: End, why: str) -> None:
        lease.ended, lease.how, lease.why = at, how, why
        if lane.holds is lease:
            lane.holds = None
            lane.turns("waiting")
        if how in ("nacked", "failed", "refused"):
            about = {"consumer": lane.number, "claim": lease.claim, "attempt": lease.attempt}
            self.tell(at, how, why=why, **about)

    def bury(self, messages: Iterable[str], now: float) -> None:
        """Take note of messages that were found among the dead letters."""
        for message in messages:
            lease = next(reversed(self.attempts(message)), None)
            if lease is None or lease.how != "nacked":
                continue
            lease.how = "dead"
            self.tell(now, "dead", claim=lease.claim, attempt=lease.attempt)
            self.moved += 1
            about = (lease.claim, lease.lane, lease.attempt, self._row_of(message), message)
            self.moves.append(Move(self.moved, lease.ended or now, "dead", *about))

    def leaves(self, number: int) -> None:
        """Take note of a consumer that was sent home: it ends what it has in hand, and then its process."""
        self.by_number[number].state = "leaving"

    def left(self, number: int, at: float, state: State, words: str = "") -> None:
        """Take note of a consumer whose process has ended, and of whom all is read that it wrote down."""
        lane = self.by_number[number]
        lane.state, lane.words, lane.left_at = state, words, at
        claim = lane.holds.claim if lane.holds else 0
        if lane.holds is not None:
            held = lane.holds
            held.ended, held.how, lane.holds = at, "killed", None
            self.moved += 1
            about = (claim, number, held.attempt, self._row_of(held.message), held.message)
            self.moves.append(Move(self.moved, at, "killed", *about))
        key = state if state == "gone" or not claim else f"{state}_holding"
        self.tell(at, key, consumer=number, pid=lane.pid, claim=claim)

    def stood_still(self, number: int, at: float) -> None:
        """Take note of a consumer that was stopped."""
        lane = self.by_number[number]
        lane.state = "paused"
        self.tell(at, "paused", consumer=number, claim=lane.holds.claim if lane.holds else 0)

    def went_on(self, number: int, at: float) -> None:
        """Take note of a consumer that goes on."""
        lane = self.by_number[number]
        lane.state = "working" if lane.holds else "waiting"
        self.tell(at, "resumed", consumer=number)

    def see(self, leased: Iterable[StoredMessage], now: float) -> None:
        """Note who holds what, from the engine, which also shows guests, who keep no journal."""
        ours = {str(lane.pid) for lane in self.by_number.values() if not lane.is_guest}
        held = {one.id: one for one in leased if one.consumer.rpartition(":")[2] not in ours}
        for one in held.values():
            lane = self._guest(one.consumer, now)
            if lane.holds is None or (lane.holds.message, lane.holds.attempt) != (one.id, one.attempts):
                self._let_go(lane, now)
                self._begin(lane, one.id, number_in(one.body, "claim_id"), one.attempts, now)
        for lane in self._guests.values():
            if lane.holds is not None and lane.holds.message not in held:
                self._let_go(lane, now)

    def _guest(self, consumer: str, now: float) -> Lane:
        if consumer not in self._guests:
            pid = consumer.rpartition(":")[2]
            lane = self.expect(GUESTS_FROM + len(self._guests), int(pid) if pid.isdecimal() else 0)
            lane.is_guest, lane.state = True, "waiting"
            self._guests[consumer] = lane
            self.tell(now, "guest", consumer=lane.number, pid=lane.pid)
        return self._guests[consumer]

    def guest_paid(self, message: str, attempt: int, at: float) -> None:
        """Take note of a payment by a consumer that keeps no journal."""
        for lease in self.attempts(message):
            if lease.attempt == attempt and lease.lane >= GUESTS_FROM and not lease.paid:
                lease.paid_at = at
                self.by_number[lease.lane].handled += 1

    def guests(self) -> list[Lane]:
        """Return the consumers that are not ours and whose processes seem to be there."""
        return [lane for lane in self._guests.values() if lane.lives]

    def _let_go(self, lane: Lane, now: float) -> None:
        if lane.holds is not None:
            lane.holds.ended, lane.holds.how = now, "settled"
            lane.holds = None
            lane.turns("waiting")

    def tell(self, at: float, key: str, **values: int | str) -> None:
        """Write down an event."""
        self.told += 1
        self.events.append(Event(self.told, at, key, values))

    # --- what is asked -----------------------------------------------------------------------------------------------

    def latest(self, claim: int) -> Move | None:
        """Return what last happened to a claim, but not a send that was written down after its delivery."""
        return next(
            (
                move
                for move in reversed(self.moves)
                if move.claim == claim and not (move.what == "sent" and self.attempts(move.message))
            ),
            None,
        )

    def attempts(self, message: str) -> list[Lease]:
        """Return the attempts at a message, in order."""
        return self._attempts.get(message, [])

    def living(self) -> list[Lane]:
        """Return our consumers whose processes are there and were not sent home."""
        return [
            lane for lane in self.by_number.values() if lane.lives and lane.state != "leaving" and not lane.is_guest
        ]

    def able(self) -> list[Lane]:
        """Return our consumers that can do something: those that live and are not stopped."""
        return [lane for lane in self.living() if lane.state != "paused"]

    def leaving(self) -> list[Lane]:
        """Return our consumers that were sent home but whose processes are still there."""
        return [lane for lane in self.by_number.values() if lane.state == "leaving"]

    def since(self, at: float) -> Iterator[Lease]:
        """Yield the attempts that go on, or ended after a moment."""
        for attempts in self._attempts.values():
            yield from (lease for lease in attempts if lease.ended is None or lease.ended >= at)
