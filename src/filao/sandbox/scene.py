"""The room as a page draws it: plain JSON, small enough to be sent several times in a second.

Everything is computed from what the room has found out; nothing is remembered here. A claim has one number everywhere.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from filao.engine import QueueStats, StoredMessage
from filao.sandbox.effects import Wrong
from filao.sandbox.exercise import CHECKS
from filao.sandbox.lanes import Lane, Lease, Move
from filao.sandbox.lesson import Mark
from filao.sandbox.load import measured, predicted
from filao.sandbox.orders import CLAIMS, number_in
from filao.sandbox.room import Room, number_of

SLOTS = 40  # messages of the queue that are drawn at most
ASIDE = 6  # delayed messages and dead letters that are drawn
DONE = 24  # of the last claims that were paid
BARS = 40  # attempts in one lane of the timeline
WRONGS = 6  # claims of each kind that the books name
MOVES = 150  # moves in one scene at most
CHARTED = 80  # samples of a chart
DELIVERED = 0.7  # seconds for which a claim is shown as just delivered
STAGES = {"sent": 1, "received": 3, "extended": 3, "halted": 3, "lost": 3, "paying": 4, "handled": 4, "acked": 5}

Json = dict[str, Any]


def stage(room: Room, since: Mark) -> Json:
    """Return what the stage shows: producer, queues, consumers, and what is done."""
    view, stats = room.view, room.view.stats
    consumers = _shown_consumers(room, since)
    in_hand = {lane.holds.message for lane in consumers if lane.holds is not None}
    stored = {one.id for state in (view.ready, view.blocked, view.delayed, view.leased, view.dead) for one in state}
    return {
        "frozen": room.is_frozen,
        "producer": {"sent": len(room.effects.fates), "answer_ms": room.news.answer_ms, "refused": room.news.refused},
        "queue": None if stats is None else _queue(room, stats),
        "documents": _documents(room) if room.setting.documents else None,
        "consumers": [_consumer(room, lane) for lane in consumers],
        "done": [_paid(room, one) for one in room.effects.last_paid(DONE) if _is_done(room, one, in_hand, stored)],
        "processed": _processed(room, in_hand, stored),
        "cents": room.effects.cents,
        "error": "full" if view.is_full else view.error,
    }


def _queue(room: Room, stats: QueueStats) -> Json:
    view, now = room.view, time.time()
    waiting = sorted((*view.ready, *view.blocked), key=_place)
    ready = stats.ready + stats.blocked
    removed = stats.purged + stats.cancelled + stats.dropped
    right = ready + stats.delayed + stats.leased + stats.acked + stats.dead + removed
    return {
        "name": CLAIMS,
        "waiting": [_chip(room, message) for message in islice(waiting, SLOTS)],
        "late": [_chip(room, one) | {"due": round(one.at.timestamp() - now, 1)} for one in view.delayed[:ASIDE]],
        "letters": [_letter(room, message) for message in view.dead[:ASIDE]],
        "oldest": round(stats.oldest_ready_age or 0.0, 1),
        "ready": ready,
        "delayed": stats.delayed,
        "leased": stats.leased,
        "acked": stats.acked,
        "dead": stats.dead,
        "sent": stats.sent,
        "removed": removed,
        "holds": stats.sent == right,
    }


def _documents(room: Room) -> Json:
    stats = room.view.documents
    return {
        "waiting": [{"id": f"note-{number_of(note)}", "claim": number_of(note)} for note in room.view.notes[:12]],
        "ready": stats.ready if stats is not None else 0,
        "printing": room.news.printing,
        "letters": room.news.letters[-6:],
        "count": len(room.news.letters),
    }


def _shown_consumers(room: Room, since: Mark) -> list[Lane]:
    """Return the living consumers, and the last that died in this step, so that its card does not vanish."""
    lanes = [lane for lane in room.lanes.by_number.values() if lane.lives]
    fallen = [lane for lane in room.lanes.by_number.values() if lane.state in ("killed", "crashed")]
    recent = [lane for lane in fallen[-1:] if (lane.left_at or 0.0) >= since.at]
    return sorted((*lanes, *recent), key=lambda lane: lane.number)


def _place(message: StoredMessage) -> int:
    number = message.id.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _chip(room: Room, message: StoredMessage) -> Json:
    claim = number_of(message)
    return {
        "id": message.id,
        "claim": claim,
        "policy": room.policies.get(claim, number_in(message.body, "policy")),
        "again": message.attempts > 0,
        "locked": message.state == "blocked",
    }


def _letter(room: Room, message: StoredMessage) -> Json:
    error = (message.error.strip().splitlines() or [""])[-1].rpartition(": ")[2]
    return _chip(room, message) | {"reason": str(message.reason), "attempts": message.attempts, "error": error[:200]}


def _is_done(room: Room, message: str, in_hand: set[str], stored: set[str]) -> bool:
    """Return whether a paid claim has left the queue; its consumer's journal may say so before the queue is read."""
    attempts = room.lanes.attempts(message)
    return message not in in_hand and (message not in stored or bool(attempts and attempts[-1].how == "acked"))


def _processed(room: Room, in_hand: set[str], stored: set[str]) -> int:
    """Return how many claims were paid and have left the queue."""
    paid = {fate.message for fate in room.effects.fates.values() if fate.payments}
    return len(paid) - sum(not _is_done(room, one, in_hand, stored) for one in paid & (in_hand | stored))


def _paid(room: Room, message: str) -> Json:
    fate = room.effects.fates[message]
    policy = room.policies.get(fate.claim, 0)
    return {"id": message, "claim": fate.claim, "policy": policy, "times": len(fate.payments)}


def _consumer(room: Room, lane: Lane) -> Json:
    holds, now = lane.holds, time.monotonic()
    attempts = room.lanes.attempts(holds.message) if holds is not None else []
    over = bool(holds is not None and attempts and attempts[-1] is not holds)  # another has the claim
    return {
        "number": lane.number,
        "pid": lane.pid,
        "guest": lane.is_guest,
        "state": lane.state,
        "slow": lane.slow > 1,
        "fails": lane.fails,
        "handled": lane.handled,
        "holds": None if holds is None else _held(room, holds),
        "over": over,
        "lease": room.setting.lease,
        "left": None if holds is None or over or holds.once else round(max(0.0, holds.until - now), 1),
    }


def _held(room: Room, lease: Lease) -> Json:
    return {
        "id": lease.message,
        "claim": lease.claim,
        "policy": room.policies.get(lease.claim, 0),
        "again": lease.attempt > 1,
        "attempt": lease.attempt,
        "paid": lease.paid,
        "paying": lease.paying,
        "once": lease.once,
    }


# --- the timeline ----------------------------------------------------------------------------------------------------


def timeline(room: Room, since: Mark) -> Json:
    """Return the lanes of the timeline, with a bar for each attempt. Times are in seconds since the step began."""
    lanes: list[Json] = []
    for lane in room.lanes.by_number.values():
        leases = [lease for lease in lane.leases if lease.ended is None or lease.ended >= since.at]
        if lane.lives or leases:
            bars = [_bar(lease, since) for lease in leases[-BARS:]]
            lanes.append({"number": lane.number, "guest": lane.is_guest, "state": lane.state, "bars": bars})
    return {"now": _when(time.monotonic(), since), "lanes": lanes}


def _when(at: float | None, since: Mark) -> float | None:
    return None if at is None else round(max(0.0, at - since.at), 2)


def _bar(lease: Lease, since: Mark) -> Json:
    ran_out = lease.until and lease.until < min(time.monotonic(), lease.ended or lease.until + 1)
    return {
        "id": lease.message,
        "claim": lease.claim,
        "attempt": lease.attempt,
        "from": _when(lease.began, since),
        "to": _when(lease.ended, since),
        "how": lease.how,
        "paid": _when(lease.paid_at, since),
        "together": lease.together,
        "lease_end": _when(lease.until, since) if ran_out and not lease.once else None,
        "extended": [_when(at, since) for at in lease.extensions[-20:] if at >= since.at],
    }


# --- one claim -------------------------------------------------------------------------------------------------------


def life(room: Room, claim: int) -> Json | None:
    """Return where a claim is among the six stages of its life, and its row on the disk."""
    last = room.lanes.latest(claim)
    if last is None:
        return None
    place = STAGES.get(last.what, 1 if last.row else 5)
    if last.what == "received" and time.monotonic() - last.at < DELIVERED:
        place = 2
    return {
        "claim": claim,
        "stage": place,
        "what": last.what,
        "attempt": last.attempt,
        "row": last.row,
        "lane": last.lane,
    }


def story(room: Room, since: Mark, claim: int) -> Json | None:
    """Return the life of a claim: when it was sent, each attempt at it, and what became of it."""
    fate = room.effects.by_claim(claim)
    if fate is None:
        return None
    return {
        "claim": claim,
        "policy": room.policies.get(claim, 0),
        "message": fate.message,
        "sent": round(fate.sent_at - since.at, 2) if fate.sent_at else None,
        "paid": len(fate.payments),
        "gone": fate.is_gone,
        "attempts": [
            _bar(lease, since) | {"lane": lease.lane, "why": lease.why} for lease in room.lanes.attempts(fate.message)
        ],
        "dead": next((_letter(room, one) for one in room.view.dead if one.id == fate.message), None),
    }


def moves(room: Room, since: Mark, after: int) -> list[Json]:
    """Return the moves of this step after the last one that the page has."""
    first = max(after, since.moves)
    found: list[Move] = []
    for move in reversed(room.lanes.moves):
        if move.number <= first:
            break
        found.append(move)
    return [
        {
            "n": move.number,
            "at": _when(move.at, since),
            "what": move.what,
            "claim": move.claim,
            "lane": move.lane,
            "attempt": move.attempt,
            "row": move.row,
            "id": move.message,
        }
        for move in reversed(found[-MOVES:])
    ]


# --- numbers ---------------------------------------------------------------------------------------------------------


def books(room: Room) -> Json:
    """Return what was lost and what was paid twice, with the reasons."""
    doubled, lost = room.effects.doubled(room.lanes), room.effects.lost(room.lanes)
    wrongs = [*(_wrong(one, "lost") for one in lost[-WRONGS:]), *(_wrong(one, "doubled") for one in doubled[-WRONGS:])]
    return {"lost": len(lost), "doubled": len(doubled), "wrongs": wrongs}


def _wrong(wrong: Wrong, kind: str) -> Json:
    lane = wrong.lease.lane if wrong.lease is not None else 0
    return {"kind": kind, "claim": wrong.claim, "paid": wrong.paid, "cause": wrong.cause, "lane": lane}


def load(room: Room, since: float) -> Json:
    """Return the load: what theory predicts, what was measured, and samples of the last minutes."""
    setting, consumers = room.setting, len(room.lanes.living())
    seen = measured(room, since)
    samples: Sequence[Any] = list(room.viewer.history)[-CHARTED:]
    return {
        "predicted": asdict(predicted(setting.arrivals, setting.work, consumers, setting.failing)),
        "measured": None if seen is None else asdict(seen),
        "depth": [sample.depth for sample in samples],
        "age": [round(sample.age, 1) for sample in samples],
        "arrivals": setting.arrivals,
        "work": setting.work,
        "failing": setting.failing,
        "consumers": consumers,
    }


def exercise(room: Room) -> Json:
    """Return the results of the checks of the learner's code."""
    found = room.exercise
    results = [(check, found.results[check]) for check in CHECKS]
    checks = [{"key": key, "state": one.state, "told": one.key, "values": one.values} for key, one in results]
    return {"run": found.started, "running": found.is_running, "checks": checks, "output": found.output}
