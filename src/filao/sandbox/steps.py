"""The lesson of EVT-02: eleven steps, what a learner does in each, and how the sandbox sees that it has been done.

Each step makes its phenomenon happen by construction: one claim takes longer than the others, so that it is
overtaken; claims last until somebody was killed; a lease is shorter than a sleep. So it cannot be missed, whatever
the speed of the machine. The texts are in `lesson.en.toml` and `lesson.fr.toml`, the Python in `programs/`.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from filao.sandbox.customers import Case
from filao.sandbox.exercise import CHECKS, SHARED
from filao.sandbox.lanes import Lane
from filao.sandbox.lesson import Facts
from filao.sandbox.orders import GUARANTEES, MOMENTS, Guarantee
from filao.sandbox.room import Room, RoomError
from filao.sandbox.trials import try_kills

FEW, MANY = 5, 12  # claims that a step wants to see
LONG = 60.0  # seconds for a claim that lasts until something has been done to its consumer
SLOW_CLAIM = 4.0  # how many times as long as the others the claim takes that is overtaken
SHORT_LEASE = 3.0  # seconds

OUTCOMES: Mapping[Guarantee, tuple[int, int]] = {
    "at-most-once": (0, 1),
    "at-least-once": (1, 2),
    "exactly-once": (1, 1),
}
"""How often a claim is paid whose consumer is killed before it pays, and after."""

Action = Callable[[Room, Facts], Awaitable[None]]
Condition = Callable[[Facts], bool]
Values = dict[str, str | int]


def _always(_: Facts) -> bool:
    return True


def _nothing(_: Facts) -> Values:
    return {}


def _no_hint(_: Facts) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Act:
    """What a button of a step does, and when it can be pressed."""

    do: Action
    ready: Condition = _always
    begins: bool = False
    """Whether it sets the scene, so that the step begins anew."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step."""

    key: str
    acts: Mapping[str, Act]
    conditions: Mapping[str, Condition]
    answer: int
    """Which of the predictions comes true."""
    values: Callable[[Facts], Values] = _nothing
    """The values for the placeholders in its texts."""
    hint: Callable[[Facts], str] = _no_hint
    """The key of the text that says what to do now, when a condition waits for the learner."""
    follow: Action | None = None
    """What is done again and again while the step is open."""
    is_worked: bool = True
    """Whether consumers of the room are meant to work in it."""
    hero: Callable[[Facts], int] = field(default=lambda facts: facts.numbers[0] if facts.numbers else 0)
    """The claim that the step is about."""


# --- setting the scene -----------------------------------------------------------------------------------------------


async def _create(room: Room, _: Facts) -> None:
    await room.create()


async def _send_few(room: Room, _: Facts) -> None:
    await room.clear()
    await room.change(grouped=False, documents=False)
    await room.have_consumers(0)
    await room.submit(room.customers.cases(FEW))


async def _one(room: Room, _: Facts) -> None:
    await room.create()
    rules = {"lease": 6.0, "grouped": False, "documents": False, "guarantee": "at-least-once", "arrivals": 0.0}
    await room.change(work=1.0 / room.speed, **rules)
    stats = room.view.stats
    if stats is None or stats.ready < FEW:
        await room.submit(room.customers.cases(FEW))
    await room.have_consumers(1)


async def _plain(room: Room, consumers: int, *, work: float, lease: float = 6.0) -> None:
    """Empty the scene, set plain rules, and wait until so many consumers are ready."""
    await room.clear()
    rules = {"lease": lease, "max_attempts": 3, "backoff": 1.0 / room.speed, "guarantee": "at-least-once"}
    await room.change(work=work, grouped=False, documents=False, **rules)
    await room.have_consumers(consumers)
    await room.until_ready()


async def _three(room: Room, _: Facts) -> None:
    await _plain(room, 3, work=1.0 / room.speed)
    await room.submit([room.customers.case(effort=SLOW_CLAIM), *room.customers.cases(MANY - 1)])


async def _long_claims(room: Room, _: Facts) -> None:
    await _plain(room, 3, work=LONG)
    await room.submit(room.customers.cases(2))  # so that one consumer is free to take over


async def _kill(room: Room, facts: Facts) -> None:
    room.kill(_holder(facts))


def _holder(facts: Facts) -> int:
    lane = _target(facts)
    if lane is None:
        raise RoomError("nobody_works")
    return lane.number


def _target(facts: Facts) -> Lane | None:
    """Return the consumer that holds a claim of the step; of several, the second."""
    held = facts.held
    return held[min(1, len(held) - 1)] if held else None


async def _hurry(room: Room, facts: Facts) -> None:
    """Shorten the work once somebody was killed: it need not last any longer."""
    if room.setting.work == LONG and facts.killed() is not None:
        await room.change(work=2.0 / room.speed)


async def _poison(room: Room, _: Facts) -> None:
    await _plain(room, 3, work=1.0 / room.speed)
    await room.submit([room.customers.case(policy=0), *room.customers.cases(4)])


async def _mend(room: Room, facts: Facts) -> None:
    dead = facts.dead()
    if dead is None:
        raise RoomError("no_letter")
    await room.mend(dead.message, 12)


def _try(guarantee: Guarantee) -> Act:
    async def run(room: Room, _: Facts) -> None:
        await try_kills(room, guarantee)

    return Act(run)


async def _short_lease(room: Room, _: Facts) -> None:
    await _plain(room, 2, work=LONG, lease=SHORT_LEASE)
    await room.submit([room.customers.case()])


async def _pause(room: Room, facts: Facts) -> None:
    await room.pause(_holder(facts))


async def _wake(room: Room, facts: Facts) -> None:
    sleeper = facts.overslept()
    if sleeper is None:
        raise RoomError("nobody_sleeps")
    room.go_on(sleeper.lane)


async def _follow_sleeper(room: Room, facts: Facts) -> None:
    """Let a consumer that was woken end its work soon, and the new holder of its claim only after it was refused."""
    sleeper = facts.overslept()
    if sleeper is None or room.setting.work != LONG:
        return
    lane = room.lanes.by_number[sleeper.lane]
    if sleeper.how == "refused" or not lane.lives:
        await room.change(work=1.0 / room.speed)
    elif lane.state != "paused" and lane.slow == 1.0:
        room.set_consumer(lane.number, slow=2.0 / room.speed / LONG)


async def _groups(room: Room, _: Facts) -> None:
    await _plain(room, 3, work=0.8 / room.speed)
    await room.change(grouped=True)
    await room.submit(_by_policy(room))


def _by_policy(room: Room) -> list[Case]:
    """Return three claims of each of four policies. Without groups the first of each, which is long, is overtaken."""
    policies, efforts = (12, 27, 33, 48), (2.5, 1.0, 1.0)
    return [room.customers.case(policy=policy, effort=effort) for policy in policies for effort in efforts]


async def _documents(room: Room, _: Facts) -> None:
    await _plain(room, 3, work=1.0 / room.speed)
    await room.change(documents=True, guarantee="exactly-once")
    await room.submit(room.customers.cases(FEW))


# --- what must be seen -----------------------------------------------------------------------------------------------


def _is_killed(facts: Facts) -> bool:
    return facts.killed() is not None


def _taken_over(facts: Facts) -> bool:
    lease = facts.killed()
    return lease is not None and facts.after(lease) is not None


def _finished(facts: Facts) -> bool:
    lease = facts.killed()
    after = facts.after(lease) if lease is not None else None
    return after is not None and after.how == "acked"


def _kill_values(facts: Facts) -> Values:
    lease = facts.killed()
    if lease is None:
        target = _target(facts)
        return {"consumer": target.number if target else "…", "claim": "…", "other": "…", "after": "…"}
    after = facts.after(lease)
    waited = "…" if after is None or lease.ended is None else max(1, round(1000 * (after.began - lease.ended)))
    return {"consumer": lease.lane, "claim": lease.claim, "other": after.lane if after else "…", "after": waited}


def _kill_hint(facts: Facts) -> str:
    if facts.killed() is None:
        return "kill" if facts.held else "missed" if facts.at_rest else ""
    return ""


def _kill_hero(facts: Facts) -> int:
    lease, target = facts.killed(), _target(facts)
    if lease is None and target is not None:
        lease = target.holds
    return lease.claim if lease is not None else 0


def _shared(facts: Facts) -> bool:
    return len(facts.own_paid) >= MANY and len({lease.lane for lease in facts.own_paid}) >= 3


def _shares(facts: Facts) -> str:
    counts = Counter(lease.lane for lease in facts.own_paid)
    return SHARED.join(str(counts[lane]) for lane in sorted(counts)) or "…"


def _three_values(facts: Facts) -> Values:
    pair = facts.overtaking() or ("…", "…")
    return {"fast": pair[0], "slow": pair[1], "shares": _shares(facts)}


def _poison_values(facts: Facts) -> Values:
    return {"claim": facts.numbers[0] if facts.numbers else "…"}


def _poison_hint(facts: Facts) -> str:
    if facts.dead() is not None and not facts.redriven():
        return "mend"
    return "missed" if facts.at_rest and facts.dead() is None else ""


def _retried(facts: Facts) -> bool:
    return any(lease.how in ("nacked", "dead") and lease.attempt > 1 for lease in facts.own)


def _mended(facts: Facts) -> bool:
    dead = facts.dead()
    return dead is not None and bool(dead.payments)


def _was_tried(guarantee: Guarantee) -> Condition:
    return lambda facts: tuple(facts.trials().get((guarantee, moment)) for moment in MOMENTS) == OUTCOMES[guarantee]


def _trials_hint(facts: Facts) -> str:
    trials = facts.trials()
    if None in trials.values():
        return ""
    for guarantee, times in OUTCOMES.items():
        found = tuple(trials.get((guarantee, moment)) for moment in MOMENTS)
        if found != times and guarantee in {tried for tried, _ in trials}:
            return "missed"
    return "more" if trials else ""


def _refused(facts: Facts) -> bool:
    lease = facts.overslept()
    return lease is not None and lease.how == "refused"


def _safe(facts: Facts) -> bool:
    lease = facts.overslept()
    after = facts.after(lease) if lease is not None else None
    return _refused(facts) and after is not None and after.how == "acked"


def _is_asleep(facts: Facts) -> bool:
    return any(lane.state == "paused" for lane in facts.held)


def _can_wake(facts: Facts) -> bool:
    lease = facts.overslept()
    return lease is not None and facts.room.lanes.by_number[lease.lane].state == "paused"


def _zombie_values(facts: Facts) -> Values:
    lease = facts.overslept()
    after = facts.after(lease) if lease is not None else None
    held = facts.held
    sleeper = lease.lane if lease is not None else held[0].number if held else "…"
    return {
        "consumer": sleeper,
        "claim": facts.numbers[0] if facts.numbers else "…",
        "other": after.lane if after else "…",
        "paid": len(facts.sent[0].payments) if facts.sent else 0,
    }


def _zombie_hint(facts: Facts) -> str:
    if _can_wake(facts):
        return "wake"
    if facts.overslept() is not None:
        return ""
    if _is_asleep(facts):
        return "wait"
    return "pause" if facts.held else "missed" if facts.at_rest else ""


def _is_passed(check: str) -> Condition:
    return lambda facts: facts.room.exercise.results[check].state == "green"


STEPS: tuple[Step, ...] = (
    Step("create", {"create": Act(_create)}, {"created": lambda facts: facts.has_queue}, 1),
    Step(
        "send",
        {"send_few": Act(_send_few, begins=True)},
        {
            "nobody": lambda facts: facts.has_queue and facts.consumers == 0,
            "sent": lambda facts: len(facts.sent) >= FEW,
            "answered": lambda facts: len(facts.sent) >= FEW and facts.room.news.answer_ms is not None,
            "waiting": lambda facts: facts.room.view.stats is not None and facts.room.view.stats.ready >= FEW,
        },
        0,
        is_worked=False,
        values=lambda facts: {
            "answer_ms": "…" if facts.room.news.answer_ms is None else f"{facts.room.news.answer_ms:.1f}"
        },
    ),
    Step(
        "one",
        {"one_consumer": Act(_one, begins=True)},
        {
            "one_consumer": lambda facts: facts.consumers == 1,
            "paid": lambda facts: len(facts.paid) >= FEW,
            "in_order": lambda facts: (
                len(facts.paid) >= FEW and facts.in_order() and len({one.lane for one in facts.paid}) == 1
            ),
        },
        2,
        hero=lambda facts: facts.leases[-1].claim if facts.leases else 0,
    ),
    Step(
        "three",
        {"three_consumers": Act(_three, begins=True)},
        {
            "three_consumers": lambda facts: facts.consumers >= 3,
            "overtaken": lambda facts: facts.overtaking() is not None,
            "paid": lambda facts: len(facts.own_paid) >= MANY,
            "shared": _shared,
        },
        1,
        values=_three_values,
    ),
    Step(
        "kill",
        {
            "long_claims": Act(_long_claims, begins=True),
            "kill": Act(_kill, lambda facts: bool(facts.held) and facts.killed() is None),
        },
        {"killed": _is_killed, "taken_over": _taken_over, "finished": _finished},
        1,
        values=_kill_values,
        hint=_kill_hint,
        follow=_hurry,
        hero=_kill_hero,
    ),
    Step(
        "poison",
        {
            "poison": Act(_poison, begins=True),
            "mend": Act(_mend, lambda facts: facts.dead() is not None and not facts.redriven()),
        },
        {
            "retried": _retried,
            "dead": lambda facts: facts.dead() is not None,
            "redriven": lambda facts: facts.dead() is not None and facts.redriven(),
            "mended": _mended,
        },
        2,
        values=_poison_values,
        hint=_poison_hint,
    ),
    Step(
        "guarantees",
        {f"try_{guarantee}": _try(guarantee) for guarantee in GUARANTEES},
        {
            "lost": _was_tried("at-most-once"),
            "doubled": _was_tried("at-least-once"),
            "exact": _was_tried("exactly-once"),
        },
        1,
        hint=_trials_hint,
        hero=lambda facts: facts.numbers[-1] if facts.numbers else 0,
    ),
    Step(
        "zombie",
        {
            "short_lease": Act(_short_lease, begins=True),
            "pause": Act(
                _pause, lambda facts: bool(facts.held) and not _is_asleep(facts) and facts.overslept() is None
            ),
            "wake": Act(_wake, _can_wake),
        },
        {"taken_over": lambda facts: facts.overslept() is not None, "refused": _refused, "safe": _safe},
        2,
        values=_zombie_values,
        hint=_zombie_hint,
        follow=_follow_sleeper,
    ),
    Step(
        "groups",
        {"groups": Act(_groups, begins=True)},
        {
            "grouped": lambda facts: facts.room.setting.grouped,
            "competing": lambda facts: len({one.lane for one in facts.own}) >= 2 and facts.at_once() >= 2,
            "ordered": lambda facts: len(facts.own_paid) >= MANY and facts.orderly_policies(),
        },
        0,
    ),
    Step(
        "documents",
        {"documents": Act(_documents, begins=True)},
        {
            "documents": lambda facts: facts.room.setting.documents,
            "paid": lambda facts: len(facts.own_paid) >= FEW,
            "letters": lambda facts: facts.letters() >= FEW,
        },
        1,
    ),
    Step("implement", {}, {check: _is_passed(check) for check in CHECKS}, 2, is_worked=False),
)
