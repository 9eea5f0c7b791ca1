"""What has happened since a step of the lesson began: only facts, by which the step is judged.

They come from the broker, the business table and the processes' journals, never from which button was pressed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from filao.sandbox.effects import Fate
from filao.sandbox.lanes import Lane, Lease
from filao.sandbox.orders import GUARANTEES, MOMENTS
from filao.sandbox.room import Room


@dataclass(frozen=True, slots=True)
class Mark:
    """Where things stood when a step began: what came before it does not count."""

    at: float = 0.0
    """Monotonic time."""
    sent: int = 0
    """Claims."""
    moves: int = 0
    redriven: int = 0
    letters: int = 0


def mark(room: Room) -> Mark:
    """Return where things stand."""
    stats = room.view.stats
    redriven = stats.redriven if stats is not None else 0
    return Mark(time.monotonic(), len(room.effects.fates), room.lanes.moved, redriven, len(room.news.letters))


class Facts:
    """What has happened in a room since a mark."""

    def __init__(self, room: Room, since: Mark) -> None:
        self.room = room
        self.since = since

    @property
    def has_queue(self) -> bool:
        """Whether the queue is created."""
        return self.room.has_queue and self.room.view.stats is not None

    @property
    def consumers(self) -> int:
        """How many live."""
        return len(self.room.lanes.living())

    @cached_property
    def sent(self) -> list[Fate]:
        """The claims that were sent, in order."""
        return list(self.room.effects.fates.values())[self.since.sent :]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the claims that were sent, in order."""
        return [fate.claim for fate in self.sent]

    @cached_property
    def leases(self) -> list[Lease]:
        """The attempts that go on, or have ended since, in order of their beginning."""
        return sorted(self.room.lanes.since(self.since.at), key=lambda lease: lease.began)

    @cached_property
    def own(self) -> list[Lease]:
        """The attempts at claims that were sent since, in order of their beginning."""
        messages = {fate.message for fate in self.sent}
        return [lease for lease in self.leases if lease.message in messages]

    @cached_property
    def paid(self) -> list[Lease]:
        """The first payments of all claims, in order."""
        seen: set[str] = set()
        found: list[Lease] = []
        payments = [lease for lease in self.leases if lease.paid_at is not None and lease.began >= self.since.at]
        for lease in sorted(payments, key=lambda lease: lease.paid_at or 0.0):
            if lease.message not in seen:
                seen.add(lease.message)
                found.append(lease)
        return found

    @cached_property
    def own_paid(self) -> list[Lease]:
        """The first payments of claims that were sent since, in order."""
        messages = {fate.message for fate in self.sent}
        return [lease for lease in self.paid if lease.message in messages]

    @property
    def held(self) -> list[Lane]:
        """Our consumers that hold a claim that was sent since."""
        messages = {fate.message for fate in self.sent}
        living = self.room.lanes.living()
        return [lane for lane in living if lane.holds is not None and lane.holds.message in messages]

    @property
    def at_rest(self) -> bool:
        """Whether all that was sent since is done, and the consumers' journals say so."""
        view = self.room.view
        queues = [stats for stats in (view.stats, view.documents) if stats is not None]
        moving = sum(stats.ready + stats.blocked + stats.delayed + stats.leased for stats in queues)
        return bool(self.sent) and not moving and not any(lane.holds for lane in self.room.lanes.living())

    @property
    def is_stranded(self) -> bool:
        """Whether there are claims but nobody is left to work on them."""
        lanes, stats = self.room.lanes, self.room.view.stats
        if stats is None or self.room.is_frozen or lanes.able() or lanes.guests():
            return False
        return bool(stats.ready + stats.blocked + stats.delayed + stats.leased)

    def overtaking(self) -> tuple[int, int] | None:
        """Return the claim that was paid first, and the one that was sent first, if that is another."""
        if not self.sent or not self.own_paid or self.own_paid[0].claim == self.sent[0].claim:
            return None
        return self.own_paid[0].claim, self.sent[0].claim

    def killed(self) -> Lease | None:
        """Return the first attempt that a SIGKILL ended."""
        return next((lease for lease in self.own if lease.how == "killed"), None)

    def after(self, lease: Lease) -> Lease | None:
        """Return the next attempt at the same claim."""
        return next((one for one in self.room.lanes.attempts(lease.message) if one.attempt > lease.attempt), None)

    def overslept(self) -> Lease | None:
        """Return the attempt whose consumer stood still while another received the claim."""
        return next((lease for lease in self.own if lease.how in ("", "refused") and self.after(lease)), None)

    def dead(self) -> Fate | None:
        """Return the first claim sent since that became a dead letter."""
        return next((fate for fate in self.sent if fate.message in self.room.viewer.gave_up), None)

    def redriven(self) -> bool:
        """Return whether dead letters were sent back."""
        stats = self.room.view.stats
        return stats is not None and stats.redriven > self.since.redriven

    def orderly_policies(self) -> bool:
        """Return whether the claims of each policy were paid in the order of sending."""
        last: dict[int, int] = {}
        for lease in self.own_paid:
            policy = self.room.policies.get(lease.claim, 0)
            if last.get(policy, 0) > lease.claim:
                return False
            last[policy] = lease.claim
        return True

    def at_once(self) -> int:
        """Return how many of the claims sent since were at most worked on at the same time."""
        edges = [(lease.began, 1) for lease in self.own]
        edges += [(lease.ended, -1) for lease in self.own if lease.ended is not None]
        most = now = 0
        for _, change in sorted(edges):
            now += change
            most = max(most, now)
        return most

    def in_order(self) -> bool:
        """Return whether the claims that were paid went in the order of sending."""
        return all(before.claim < after.claim for before, after in pairwise(self.paid))

    def trials(self) -> Mapping[tuple[str, str], int | None]:
        """Return by guarantee and moment of the kill how often the claim was paid; None while that is open."""
        found: dict[tuple[str, str], int | None] = {}
        for guarantee in GUARANTEES:
            for moment in MOMENTS:
                claim = self.room.trials.get((guarantee, moment))
                fate = self.room.effects.by_claim(claim or 0)
                if fate is not None and fate.place > self.since.sent:
                    found[guarantee, moment] = self._outcome(fate)
        return found

    def _outcome(self, fate: Fate) -> int | None:
        if not fate.is_gone:
            return None
        last = self.room.lanes.attempts(fate.message)[-1:]
        return len(fate.payments) if last and last[0].ended is not None else None

    def letters(self) -> int:
        """Return how many letters were written."""
        return len(self.room.news.letters) - self.since.letters
