"""The ledger of effects: what really happened to each claim in the business database and, if not exactly once, why.

What was paid is read from the table of payments, and what is in the queue from the engine; the journals tell only the
causes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from filao.sandbox.lanes import Lanes, Lease

Cause = Literal["killed", "overslept", "failed", "guest", ""]


@dataclass(frozen=True, slots=True)
class Payment:
    """A row of the business table."""

    number: int
    message: str
    claim: int
    cents: int
    paid_by: str
    attempt: int


@dataclass(slots=True)
class Fate:
    """A claim that the portal has confirmed, and what became of it."""

    message: str
    claim: int
    place: int
    """In the order of sending."""
    sent_at: float = 0.0
    """Monotonic time; 0: not sent by our portal."""
    payments: list[Payment] = field(default_factory=list[Payment])
    removed: bool = False
    """Whether an operator purged it."""
    is_gone: bool = False
    """Whether it is no longer in the queue."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A claim that was not paid exactly once: how often it was, why, and the attempt that shows it."""

    claim: int
    message: str
    paid: int
    cause: Cause
    """Empty: nothing explains it."""
    lease: Lease | None


class Effects:
    """What was sent, and what was paid."""

    def __init__(self) -> None:
        self.fates: dict[str, Fate] = {}
        """By message."""
        self.payments: list[Payment] = []
        self.cents: int = 0
        self._by_claim: dict[int, Fate] = {}
        self._again: list[str] = []
        """Messages that were paid more than once."""
        self._missing: set[str] = set()

    def sent(self, message: str, claim: int, at: float = 0.0) -> None:
        """Take note of a claim that was confirmed."""
        fate = self.fates.get(message)
        if fate is None:
            fate = self.fates[message] = Fate(message, claim, len(self.fates) + 1)
        fate.sent_at = at
        self._by_claim[claim] = fate

    def by_claim(self, claim: int) -> Fate | None:
        """Return what became of a claim."""
        return self._by_claim.get(claim)

    def paid(self, payments: Sequence[Payment]) -> None:
        """Take note of new rows in the business table."""
        for payment in payments:
            self.payments.append(payment)
            self.cents += payment.cents
            if payment.message not in self.fates:  # sent by the learner's own program
                self.sent(payment.message, payment.claim)
            fate = self.fates[payment.message]
            fate.payments.append(payment)
            if len(fate.payments) == 2:
                self._again.append(fate.message)

    def removed(self, messages: Iterable[str]) -> None:
        """Take note of what an operator purged."""
        for message in messages:
            if message in self.fates:
                self.fates[message].removed = True

    def audit(self, in_queue: set[str]) -> None:
        """Compare with the queue's messages. They are not read at one moment, so one that is missing twice is gone."""
        missing = {message for message in self.fates if message not in in_queue}
        for message in missing & self._missing:
            self.fates[message].is_gone = True
        for message in in_queue & self.fates.keys():
            self.fates[message].is_gone = False
        self._missing = missing

    # --- what is asked -----------------------------------------------------------------------------------------------

    def doubled(self, lanes: Lanes) -> list[Wrong]:
        """Return the claims that were paid more than once."""
        wrong: list[Wrong] = []
        for message in self._again:
            fate = self.fates[message]
            told = [(_lease_of(lanes, payment), payment) for payment in fate.payments]
            causes: list[tuple[Cause, Lease | None]] = [
                (_why_again(lease, payment), lease) for lease, payment in told
            ]  # a consumer that lost its lease may pay first or last
            cause, lease = next((found for found in causes if found[0]), causes[0])
            wrong.append(Wrong(fate.claim, message, len(fate.payments), cause, lease))
        return wrong

    def lost(self, lanes: Lanes) -> list[Wrong]:
        """Return the claims that are neither in the queue nor paid, nor purged."""
        wrong: list[Wrong] = []
        for fate in self.fates.values():
            if not fate.is_gone or fate.payments or fate.removed:
                continue
            lease = next(reversed(lanes.attempts(fate.message)), None)
            if lease is None or lease.ended is not None:  # otherwise its consumer still works on it
                wrong.append(Wrong(fate.claim, fate.message, 0, _why_never(lease), lease))
        return wrong

    def last_paid(self, count: int) -> list[str]:
        """Return the messages that were paid last, each once, the newest first."""
        return list(dict.fromkeys(payment.message for payment in reversed(self.payments[-2 * count :])))[:count]


def _lease_of(lanes: Lanes, payment: Payment) -> Lease | None:
    attempts = (one for one in lanes.attempts(payment.message) if one.attempt == payment.attempt)
    return next((one for one in attempts if str(one.lane) == payment.paid_by), None)


def _why_again(lease: Lease | None, payment: Payment) -> Cause:
    """Return why a claim that was paid came back."""
    if lease is None:
        return "guest" if not payment.paid_by.isdecimal() else ""
    if lease.how == "killed":
        return "killed"
    return "overslept" if lease.how == "refused" or lease.lost_at is not None else ""


def _why_never(lease: Lease | None) -> Cause:
    """Return why a claim left the queue without having been paid: it was received at most once."""
    if lease is None or not lease.once:
        return "guest" if lease is not None and lease.how == "settled" else ""
    if lease.how == "killed":
        return "killed"
    return "failed" if lease.how == "failed" else ""
