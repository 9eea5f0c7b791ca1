"""What the learner sets, and what the processes of a room are told, at their start and by lines on their stdin."""

from typing import Literal, cast

import msgspec

import filao

CLAIMS, DOCUMENTS = "claims.processing", "documents"
CONSUMERS_MAX = 6  # in one room: each is a process
DELAY_CEILING = 60.0  # seconds of a backoff: during a longer one, a learner would think that nothing happens
WORK_LEAST = 0.002  # seconds

NUMBER_MAX = 2**53  # of a claim: what JSON carries, SQLite holds and a browser reads exactly

Guarantee = Literal["at-most-once", "at-least-once", "exactly-once"]
GUARANTEES: tuple[Guarantee, ...] = ("at-most-once", "at-least-once", "exactly-once")

Moment = Literal["evaluating", "paid"]
MOMENTS: tuple[Moment, ...] = ("evaluating", "paid")

PAYMENTS = """
    CREATE TABLE IF NOT EXISTS payment (
      id      INTEGER PRIMARY KEY,
      message TEXT    NOT NULL,
      claim   INTEGER NOT NULL,
      cents   INTEGER NOT NULL,
      paid_by TEXT    NOT NULL,  -- the consumer
      attempt INTEGER NOT NULL
    )
"""  # claims are not unique in it, so that one that is paid twice can be seen


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the learner chooses: rules of the queue, and how the insurer works."""

    lease: float = 6.0
    max_attempts: int = 3
    backoff: float
    """Seconds before the second attempt, doubled for each further one."""
    guarantee: Guarantee = "at-least-once"
    grouped: bool = False
    """Whether claims of one policy are worked on in order."""
    documents: bool = False
    """Whether every decision is sent to the queue of the documents."""
    work: float
    """Seconds that a claim of normal effort takes."""
    failing: float = 0.0
    """The share of attempts that fail."""
    arrivals: float = 0.0
    """Claims per second that customers hand in by themselves."""

    def queue(self) -> filao.Queue:
        """Return the queue of the claims under these rules."""
        return filao.Queue(
            CLAIMS,
            lease=self.lease,
            max_attempts=self.max_attempts,
            backoff=filao.Backoff(first=self.backoff, ceiling=DELAY_CEILING, jitter=0.0),
        )


class Post(msgspec.Struct, frozen=True):
    """What a process is told at its start: its number, and where its files are."""

    file: str
    journals: str
    number: int
    speed: float = 1.0
    """How many times as fast it works, if nobody sets the seconds."""


class Halt(msgspec.Struct, frozen=True):
    """A moment at which a consumer stands still for a while, so that it can be killed exactly then."""

    claim: int
    moment: Moment


class Duty(msgspec.Struct, frozen=True):
    """How a consumer works, from this moment on."""

    guarantee: Guarantee
    lease: float
    work: float
    """Seconds that a claim of normal effort takes."""
    fails: bool
    failing: float
    documents: bool
    halt: Halt | None = None


class Claim(msgspec.Struct, frozen=True):
    """A claim as the producer sends it; consumers read it as a plain mapping."""

    claim_id: int
    policy: int
    amount: int
    """Cents."""
    kind: str = msgspec.field(name="type")
    effort: float = 1.0
    """How many times as long as a normal one it takes."""


class Submission(msgspec.Struct, frozen=True):
    """Claims that customers hand in at the portal at one moment."""

    claims: tuple[Claim, ...]
    grouped: bool


def number_in(body: object, key: str) -> int:
    """Return a number in a claim's body; 0 if a body that was written by hand has no proper one."""
    value = _value(body, key)
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= NUMBER_MAX
    return cast("int", value) if is_number else 0


def effort_in(body: object) -> float:
    """Return a claim's effort; 1 if its body has no sensible one."""
    value = _value(body, "effort")
    return float(value) if isinstance(value, int | float) and 0 < value <= 1000 else 1.0


def _value(body: object, key: str) -> object:
    return cast("dict[object, object]", body).get(key) if isinstance(body, dict) else None
