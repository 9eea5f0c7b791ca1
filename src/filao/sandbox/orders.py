"""What the processes are told: the queue that they share, who sends and works how fast, and what will go wrong.

The pace is computed from the number of claims and from the seconds that the whole shall take. Workers are busy three
quarters of their time, as in real life, so that the queue fills in a rush and empties after it; without one of them, it
fills.
"""

import math
from collections.abc import Sequence
from random import Random

import msgspec

import filao
from filao.sandbox.claims import Claim
from filao.sandbox.texts import Language

QUEUE: filao.Queue[Claim] = filao.Queue(
    "claims.processing",
    Claim,
    lease=10,
    max_attempts=3,
    backoff=filao.Backoff(first=0.2, ceiling=1.0),
)

LOAD = 0.75  # of their time the workers are busy
SENDING = 0.8  # of the time the portal sends
WORK_LEAST = 0.06  # seconds: with less, reading and writing the queue would be most of the work
WORK_MOST = 0.6  # seconds: with more, nothing seems to move
DESKS_MAX = 64  # claims that one worker has in hand
SILENT_SHARE, SILENT_MAX = 0.03, 12  # claims for which the policy register does not answer at first
UNKNOWN_EVERY, UNKNOWN_MAX = 150, 3  # claims whose policy it does not know: they become dead letters


class Pace(msgspec.Struct, frozen=True):
    """How fast the portal sends and the workers work."""

    sending: float
    """Seconds."""
    desks: int
    """Claims that each worker has in hand at once."""
    work: float
    """Seconds for one claim, on average."""


class PortalOrders(msgspec.Struct, frozen=True):
    """What the portal is told."""

    file: str
    journals: str
    claims: str
    sending: float


class WorkerOrders(msgspec.Struct, frozen=True):
    """What a worker is told."""

    file: str
    journals: str
    number: int
    language: Language
    desks: int
    work: float
    silent: tuple[int, ...]
    """Claims for which the policy register does not answer when it is asked first."""
    unknown: tuple[int, ...]
    """Claims whose policy it does not know."""


def pace(count: int, *, workers: int, seconds: float) -> Pace:
    """Return the pace at which so many claims take so many seconds; few of them take less."""
    slowest = count * WORK_MOST / (LOAD * workers)
    sending = min(seconds * SENDING, slowest)
    work_of_one_desk = LOAD * workers * sending / count
    desks = min(DESKS_MAX, math.ceil(WORK_LEAST / work_of_one_desk))
    return Pace(sending=sending, desks=desks, work=work_of_one_desk * desks)


def trouble(seed: int, claims: Sequence[Claim]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the claims for which the policy register is silent at first, and those whose policy it does not know.

    There is at least one of the second kind. They are not among the last, so that the end need not wait for them.
    """
    early = [claim.number for claim in claims[: math.ceil(len(claims) * 0.9)]]
    silent = min(SILENT_MAX, math.ceil(len(claims) * SILENT_SHARE))
    unknown = min(UNKNOWN_MAX, 1 + len(claims) // UNKNOWN_EVERY)
    drawn = Random(seed).sample(early, min(len(early), silent + unknown))
    return tuple(drawn[unknown:]), tuple(drawn[:unknown])


def due(passed: float) -> float:
    """Return the share of the claims that the portal has sent when a share of its time has `passed`.

    It sends in two rushes with a lull between them, as customers do before and after lunch.
    """
    if passed >= 1:
        return 1.0
    return passed - 0.7 * math.sin(4 * math.pi * passed) / (4 * math.pi)
