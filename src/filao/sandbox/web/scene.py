"""The room as the page draws it: plain JSON, small enough to be sent several times in a second.

Everything is computed from what the room has found out; nothing is remembered here.
"""

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from filao.engine import QueueStats, StoredMessage
from filao.sandbox.web.effects import Wrong
from filao.sandbox.web.lanes import Lane, Lease
from filao.sandbox.web.orders import CLAIMS, number_in
from filao.sandbox.web.room import Room

SLOTS = 36  # of the queue that are drawn
ASIDE = 8  # delayed messages and dead letters that are drawn
DONE = 10  # of the last claims that were paid
FALLEN_MAX = 3  # workers that are gone which the timeline still shows
WINDOW, WINDOW_LEAST = 60.0, 15.0  # seconds that the timeline shows, and those that it shows of a room that is new
ROWS = 8  # of the ledger
WRONGS = 6  # claims of each kind that the ledger names
COLOURS = 8  # that policies are told apart by

Json = dict[str, Any]


def stage(room: Room) -> Json:
    """Return what the stage shows: portal, queue, workers, and what is done."""
    view, now = room.view, time.time()
    held = {message.id: message for message in view.leased}
    waiting = [*view.ready, *view.blocked]
    waiting.sort(key=lambda message: _number(message.id))
    stats = view.stats
    return {
        "has_queue": stats is not None,
        "queue": CLAIMS,
        "portal": {
            "pid": room.portal_pid,
            "sent": len(room.effects.fates),
            "answer_ms": room.answer_ms,
            "refused": room.refused,
        },
        "waiting": [_chip(room, message) for message in islice(waiting, SLOTS)],
        "more": max(0, (stats.ready + stats.blocked if stats else 0) - SLOTS),
        "delayed": [_chip(room, message) | {"due": _left(message, now)} for message in view.delayed[:ASIDE]],
        "more_delayed": max(0, (stats.delayed if stats else 0) - ASIDE),
        "dead": [_chip(room, message) for message in view.dead[:ASIDE]],
        "more_dead": max(0, (stats.dead if stats else 0) - ASIDE),
        "workers": [_worker(room, lane, held, now) for lane in room.lanes.by_number.values() if lane.lives],
        "fallen": [_worker(room, lane, held, now) for lane in _fallen(room)],
        "done": [_paid(room, message) for message in room.effects.last_paid(DONE) if message not in held],
        "paid": len(room.effects.payments),
        "frozen": room.is_frozen,
    }


def _fallen(room: Room) -> list[Lane]:
    """Return the worker that died last, for as long as nobody takes its place."""
    fallen = [lane for lane in room.lanes.by_number.values() if lane.state in ("killed", "crashed")]
    return fallen[-1:]


def _chip(room: Room, message: StoredMessage) -> Json:
    policy = number_in(message.body, "policy")
    return {
        "id": message.id,
        "number": _number(message.id),
        "claim": number_in(message.body, "claim_id"),
        "policy": policy,
        "colour": _colour(policy),
        "attempt": message.attempts,
        "locked": message.state == "blocked",
        "paid": bool(room.effects.fates[message.id].payments) if message.id in room.effects.fates else False,
    }


def _paid(room: Room, message: str) -> Json:
    fate = room.effects.fates[message]
    policy = room.policies.get(fate.claim, 0)
    return {
        "id": f"{message}",
        "number": _number(message),
        "claim": fate.claim,
        "policy": policy,
        "colour": _colour(policy),
        "attempt": 1,
        "locked": False,
        "times": len(fate.payments),
    }


def _worker(room: Room, lane: Lane, held: dict[str, StoredMessage], now: float) -> Json:
    holds = lane.holds
    stored = held.get(holds.message) if holds is not None else None
    is_over = stored is not None and holds is not None and stored.attempts != holds.attempt  # another has the claim
    stored = None if is_over else stored
    shown = None
    if holds is not None:
        policy = room.policies.get(holds.claim, 0)
        shown = _chip(room, stored) if stored is not None else _bare(holds, policy)
    return {
        "number": lane.number,
        "pid": lane.pid,
        "guest": lane.is_guest,
        "state": lane.state,
        "slow": lane.slow > 1,
        "fails": lane.fails,
        "handled": lane.handled,
        "share": room.lanes.shares().get(lane.number, 0.0),
        "holds": shown,
        "paid": bool(holds and (holds.paid or holds.paying)),
        "once": bool(holds and holds.once),
        "over": is_over,
        "left": None if stored is None else max(0.0, _left(stored, now)),
        "lease": room.setting.lease,
    }


def _bare(lease: Lease, policy: int) -> Json:
    """Return the chip of a claim that is not in the queue any more, though its worker is still at it."""
    return {
        "id": lease.message,
        "number": _number(lease.message),
        "claim": lease.claim,
        "policy": policy,
        "colour": _colour(policy),
        "attempt": lease.attempt,
        "locked": False,
        "paid": lease.paid,
    }


def timeline(room: Room, focus: Lease | None) -> Json:
    """Return the lanes of the timeline: a bar for each lease, with its marks; times are seconds of the room's life."""
    now = time.monotonic() - room.born
    start = max(0.0, (now if focus is None else focus.began - room.born + WINDOW / 2) - WINDOW)
    end = max(start + WINDOW_LEAST, min(now, start + WINDOW))
    return {
        "now": round(now, 2),
        "start": round(start, 2),
        "end": round(end, 2),
        "live": focus is None,
        "lanes": [
            {
                "number": lane.number,
                "pid": lane.pid,
                "guest": lane.is_guest,
                "state": lane.state,
                "bars": [
                    _bar(room, one, focus) for one in _bars(room, lane, focus) if _is_within(room, one, start, end)
                ],
            }
            for lane in _shown(room, focus)
        ],
    }


def _shown(room: Room, focus: Lease | None = None) -> list[Lane]:
    """Return the living, the last of those that are gone, and those who had the claim that is looked at."""
    lanes = list(room.lanes.by_number.values())
    looked_at = {lease.lane for lease in room.lanes.attempts(focus.message)} if focus is not None else set[int]()
    fallen = {lane.number for lane in [lane for lane in lanes if not lane.lives][-FALLEN_MAX:]} | looked_at
    return [lane for lane in lanes if lane.lives or lane.number in fallen]


def _bars(room: Room, lane: Lane, focus: Lease | None) -> list[Lease]:
    """Return the last leases of a worker, and those of the claim that is looked at, however long ago they were."""
    looked_at = room.lanes.attempts(focus.message) if focus is not None else []
    return [*(one for one in looked_at if one.lane == lane.number and one not in lane.leases), *lane.leases]


def _is_within(room: Room, lease: Lease, start: float, end: float) -> bool:
    return lease.began - room.born < end and (lease.ended is None or lease.ended - room.born > start)


def _bar(room: Room, lease: Lease, focus: Lease | None) -> Json:
    policy = room.policies.get(lease.claim, 0)
    return {
        "id": lease.message,
        "number": _number(lease.message),
        "claim": lease.claim,
        "attempt": lease.attempt,
        "policy": policy,
        "colour": _colour(policy),
        "began": round(lease.began - room.born, 2),
        "ended": None if lease.ended is None else round(lease.ended - room.born, 2),
        "how": lease.how,
        "paid": None if lease.paid_at is None else round(lease.paid_at - room.born, 2),
        "ticks": [round(at - room.born, 2) for at in lease.extensions],
        "lost": None if lease.lost_at is None else round(lease.lost_at - room.born, 2),
        "focus": lease is focus,
    }


def books(room: Room, doubled: Sequence[Wrong], lost: Sequence[Wrong]) -> Json:
    """Return the invariants, computed from the engine's counters, and the ledger of effects."""
    stats = room.view.stats
    effects = room.effects
    return {
        "sums": None if stats is None else _sums(stats),
        "sent": len(effects.fates),
        "paid": sum(1 for fate in effects.fates.values() if fate.payments),
        "payments": len(effects.payments),
        "cents": effects.cents,
        "lost": len(lost),
        "unexplained": sum(1 for wrong in lost if not wrong.cause),
        "doubled": len(doubled),
        "wrongs": [_wrong(wrong, "lost") for wrong in lost[-WRONGS:]]
        + [_wrong(wrong, "doubled") for wrong in doubled[-WRONGS:]],
        "rows": [
            {
                "number": payment.number,
                "claim": payment.claim,
                "cents": payment.cents,
                "by": payment.paid_by,
                "attempt": payment.attempt,
            }
            for payment in reversed(effects.payments[-ROWS:])
        ],
    }


def _sums(stats: QueueStats) -> Json:
    """Return both sides of: sent = ready + delayed + leased + acknowledged + dead, and what operators removed."""
    removed = stats.purged + stats.cancelled + stats.dropped
    ready = stats.ready + stats.blocked
    right = ready + stats.delayed + stats.leased + stats.acked + stats.dead + removed
    return {
        "sent": stats.sent,
        "ready": ready,
        "delayed": stats.delayed,
        "leased": stats.leased,
        "acked": stats.acked,
        "dead": stats.dead,
        "removed": removed,
        "holds": stats.sent == right,
    }


def _wrong(wrong: Wrong, kind: str) -> Json:
    lease = wrong.lease
    return {
        "kind": kind,
        "claim": wrong.claim,
        "message": wrong.message,
        "paid": wrong.paid,
        "cause": wrong.cause,
        "worker": lease.lane if lease is not None else 0,
        "attempt": lease.attempt if lease is not None else 0,
    }


def _left(message: StoredMessage, now: float) -> float:
    return round(message.at.timestamp() - now, 2)


def _number(message: str) -> int:
    """Return the number of a message, its place in the file; 0 for one whose sender named it."""
    number = message.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _colour(policy: int) -> int:
    return policy % COLOURS
