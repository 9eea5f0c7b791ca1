"""The lesson of EVT-02: ten steps, and by what one sees that each has been done.

A step is validated by facts alone, which come from the broker, from the business table and from the processes' journals: never
by which button was pressed. What it says stands in `lesson.en.toml` and `lesson.fr.toml`, its Python in `programs/`.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from filao.sandbox.web.lanes import Lease
from filao.sandbox.web.orders import GUARANTEES
from filao.sandbox.web.room import MOMENTS, Room

FEW, MANY = 5, 24  # claims that a step wants to see
EVEN = 0.2  # of the load is the least that each of three workers must have had


@dataclass(frozen=True, slots=True)
class Mark:
    """Where things stood when a step began: what came before it does not count."""

    at: float = 0.0
    """Monotonic time."""
    sent: int = 0
    paid: int = 0
    letters: int = 0
    redriven: int = 0
    gave_up: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Facts:
    """What has happened since a step began."""

    has_queue: bool
    workers: int
    """That live."""
    ready: int
    sent: int
    answered: bool
    paid_by: Mapping[int, int]
    """How many claims each worker has paid."""
    places: tuple[int, ...]
    """Where the claims that were paid stood in the order of sending, in the order in which they were paid."""
    payers: tuple[int, ...]
    """Who paid them."""
    orderly_groups: bool
    """The claims of each policy were paid in the order of sending."""
    leases: tuple[Lease, ...]
    """Attempts that have ended since, or last."""
    followers: Mapping[str, int]
    """By message: how often it was received."""
    acked: frozenset[str]
    dead: bool
    redriven: bool
    mended: bool
    """A claim that was a dead letter is paid."""
    trials: Mapping[tuple[str, str], int | None]
    """By guarantee and moment of the kill: how often the claim was paid; None while that is open."""
    grouped: bool
    documents: bool
    letters: int

    @property
    def paid(self) -> int:
        """How many claims were paid, each counted once."""
        return len(self.places)

    @property
    def in_order(self) -> bool:
        """Whether claims were paid in the order of sending."""
        return all(before < after for before, after in pairwise(self.places))

    def killed(self) -> list[Lease]:
        """Return the attempts that a SIGKILL ended."""
        return [lease for lease in self.leases if lease.how == "killed"]

    def overslept(self) -> list[Lease]:
        """Return the attempts whose worker stood still while another received the claim."""
        return [
            lease for lease in self.leases if lease.attempt < self.followers[lease.message] and lease.how != "killed"
        ]


def mark(room: Room) -> Mark:
    """Return where things stand."""
    stats = room.view.stats
    return Mark(
        at=time.monotonic(),
        sent=len(room.effects.fates),
        paid=len(room.lanes.order),
        letters=room.letters,
        redriven=stats.redriven if stats is not None else 0,
        gave_up=frozenset(room.gave_up),
    )


def facts(room: Room, since: Mark) -> Facts:
    """Return what has happened since a mark."""
    stats, effects, lanes = room.view.stats, room.effects, room.lanes
    gave_up = room.gave_up - since.gave_up
    paid = [message for message in lanes.order[since.paid :] if message in effects.fates]
    leases = tuple(lease for lease in lanes.every_lease() if lease.ended is None or lease.ended >= since.at)
    by: dict[int, int] = {}
    for message in paid:
        by[lanes.paid_by[message][0]] = by.get(lanes.paid_by[message][0], 0) + 1
    return Facts(
        has_queue=room.has_queue and stats is not None,
        workers=len(lanes.living()),
        ready=stats.ready if stats else 0,
        sent=len(effects.fates) - since.sent,
        answered=room.answer_ms is not None,
        paid_by=by,
        places=tuple(effects.running_numbers(paid)),
        payers=tuple(lanes.paid_by[message][0] for message in paid),
        orderly_groups=_orderly(room, paid),
        leases=leases,
        followers={lease.message: len(lanes.attempts(lease.message)) for lease in leases},
        acked=frozenset(lease.message for lease in leases if lease.how == "acked"),
        dead=bool(gave_up),
        redriven=stats is not None and stats.redriven > since.redriven,
        mended=any(effects.fates[message].payments for message in gave_up & effects.fates.keys()),
        trials=_trials(room),
        grouped=room.setting.grouped,
        documents=room.setting.documents,
        letters=room.letters - since.letters,
    )


def _orderly(room: Room, paid: list[str]) -> bool:
    last: dict[int, int] = {}
    for message in paid:
        fate = room.effects.fates[message]
        policy = room.policies.get(fate.claim, 0)
        if last.get(policy, 0) > fate.place:
            return False
        last[policy] = fate.place
    return True


def _trials(room: Room) -> dict[tuple[str, str], int | None]:
    by_claim = {fate.claim: fate for fate in room.effects.fates.values()} if room.trials else {}
    found: dict[tuple[str, str], int | None] = {}
    for key, claim in room.trials.items():
        fate = by_claim.get(claim)
        over = fate is not None and fate.is_gone and room.lanes.attempts(fate.message)[-1:]
        found[key] = len(fate.payments) if fate is not None and over and over[0].ended is not None else None
    return found


# --- the steps -------------------------------------------------------------------------------------------------------

Condition = Callable[[Facts], bool]
Action = Callable[[Room], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its key, what the learner can do at a push of a button, and what must then be seen."""

    key: str
    actions: Mapping[str, Action]
    conditions: Mapping[str, Condition]
    answer: int
    """Which of the predictions comes true."""


async def _create(room: Room) -> None:
    await room.create()


async def _send_few(room: Room) -> None:
    await _alone(room)
    await room.submit(room.next_claims(FEW))


async def _alone(room: Room) -> None:
    await room.create()
    await room.have_workers(0)


async def _one_worker(room: Room) -> None:
    await room.create()
    await room.change(work=1.0, grouped=False)
    await room.have_workers(1)
    if room.view.stats is None or room.view.stats.ready < FEW:
        await room.submit(room.next_claims(FEW))


async def _three_workers(room: Room) -> None:
    await room.create()
    await room.change(work=1.0, grouped=False, guarantee="at-least-once")
    await room.have_workers(3)
    await room.submit(room.next_claims(MANY))


async def _long_claims(room: Room) -> None:
    await room.create()
    await room.purge()
    await room.change(work=6.0, lease=6.0, grouped=False, guarantee="at-least-once")
    await room.have_workers(3)
    await room.submit(room.next_claims(4))


async def _poison(room: Room) -> None:
    await room.create()
    await room.change(work=1.0, max_attempts=3, backoff=1.0, grouped=False, guarantee="at-least-once")
    if not room.lanes.living():
        await room.have_workers(3)
    await room.submit([room.next_claim(policy=0)])


def _try(guarantee: str) -> Action:
    async def run(room: Room) -> None:
        await room.create()
        await room.try_kills(next(known for known in GUARANTEES if known == guarantee))

    return run


async def _short_lease(room: Room) -> None:
    await room.create()
    await room.purge()
    await room.change(work=3.0, lease=3.0, grouped=False, guarantee="at-least-once")
    await room.have_workers(2)
    await room.submit(room.next_claims(2))


async def _groups(room: Room) -> None:
    await room.create()
    await room.purge()
    await room.change(work=0.8, lease=6.0, grouped=True, guarantee="at-least-once")
    await room.have_workers(3)
    await room.submit(room.next_claims(MANY))


async def _documents(room: Room) -> None:
    await room.create()
    await room.change(work=1.0, documents=True, guarantee="exactly-once", grouped=False)
    if not room.lanes.living():
        await room.have_workers(3)
    await room.submit(room.next_claims(6))


def _is_alone_in_order(facts: Facts) -> bool:
    """Return whether the last few claims were paid by one worker in the order of sending; others may have been before."""
    places, payers = facts.places[-FEW:], facts.payers[-FEW:]
    return len(places) == FEW and len(set(payers)) == 1 and all(before < after for before, after in pairwise(places))


def _is_shared(facts: Facts) -> bool:
    shares = sorted(facts.paid_by.values(), reverse=True)[:3]
    return len(shares) == 3 and shares[-1] >= EVEN * sum(shares)


def _was_tried(guarantee: str, times: tuple[int, int]) -> Condition:
    return lambda facts: tuple(facts.trials.get((guarantee, moment)) for moment in MOMENTS) == times


STEPS: tuple[Step, ...] = (
    Step("create", {"create": _create}, {"created": lambda facts: facts.has_queue}, 1),
    Step(
        "send",
        {"send_few": _send_few},
        {
            "nobody": lambda facts: facts.has_queue and facts.workers == 0,
            "sent": lambda facts: facts.sent >= FEW,
            "answered": lambda facts: facts.answered and facts.sent >= FEW,
            "waiting": lambda facts: facts.ready >= FEW,
        },
        0,
    ),
    Step(
        "one",
        {"one_worker": _one_worker},
        {
            "one_worker": lambda facts: facts.workers == 1,
            "paid": lambda facts: facts.paid >= FEW,
            "in_order": _is_alone_in_order,
        },
        2,
    ),
    Step(
        "three",
        {"three_workers": _three_workers},
        {
            "three_workers": lambda facts: facts.workers >= 3,
            "paid": lambda facts: facts.paid >= MANY,
            "shared": lambda facts: facts.paid >= MANY and _is_shared(facts),
            "disorder": lambda facts: facts.paid >= MANY and not facts.in_order,
        },
        1,
    ),
    Step(
        "kill",
        {"long_claims": _long_claims},
        {
            "killed": lambda facts: bool(facts.killed()),
            "taken_over": lambda facts: any(facts.followers[lease.message] > lease.attempt for lease in facts.killed()),
            "finished": lambda facts: any(lease.message in facts.acked for lease in facts.killed()),
        },
        1,
    ),
    Step(
        "poison",
        {"poison": _poison},
        {
            "retried": lambda facts: any(lease.how == "nacked" and lease.attempt > 1 for lease in facts.leases),
            "dead": lambda facts: facts.dead,
            "redriven": lambda facts: facts.dead and facts.redriven,
            "mended": lambda facts: facts.mended,
        },
        2,
    ),
    Step(
        "guarantees",
        {f"try_{guarantee}": _try(guarantee) for guarantee in GUARANTEES},
        {
            "lost": _was_tried("at-most-once", (0, 1)),
            "doubled": _was_tried("at-least-once", (1, 2)),
            "exact": _was_tried("exactly-once", (1, 1)),
        },
        1,
    ),
    Step(
        "zombie",
        {"short_lease": _short_lease},
        {
            "taken_over": lambda facts: bool(facts.overslept()),
            "refused": lambda facts: any(lease.how == "refused" for lease in facts.overslept()),
            "safe": lambda facts: any(
                lease.how == "refused" and lease.message in facts.acked for lease in facts.overslept()
            ),
        },
        2,
    ),
    Step(
        "groups",
        {"groups": _groups},
        {
            "grouped": lambda facts: facts.grouped,
            "competing": lambda facts: facts.paid >= MANY // 2 and len(facts.paid_by) >= 2,
            "ordered": lambda facts: facts.grouped and facts.paid >= MANY // 2 and facts.orderly_groups,
        },
        0,
    ),
    Step(
        "documents",
        {"documents": _documents},
        {
            "documents": lambda facts: facts.documents,
            "paid": lambda facts: facts.paid >= FEW,
            "letters": lambda facts: facts.letters >= FEW,
        },
        1,
    ),
)
