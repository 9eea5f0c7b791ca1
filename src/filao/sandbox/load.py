"""What queueing theory predicts for a queue under load, and what was measured: the numbers beside the sliders.

The prediction is Allen and Cunneen's for several servers: Erlang's waiting time, scaled by the variation of arrivals
and work. Claims arrive at random moments (variation 1) and nearly all take the same time.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from filao.sandbox.room import Room
from filao.sandbox.view import Sample

WINDOW = 20.0  # seconds that are measured
VARIATION_OF_WORK = 0.06  # the coefficient of variation of the time that a claim takes


@dataclass(frozen=True, slots=True)
class Load:
    """How a queue is loaded."""

    arrivals: float
    """Claims per second."""
    busy: float | None
    """The share of their time that the consumers work: the utilisation; a prediction may exceed 1. None: there are no
    consumers.
    """
    depth: float | None
    """Claims in the queue and in hand, on average: Little's L. None: it grows without end, or nothing was measured."""
    latency: float | None
    """Seconds from the sending of a claim to its payment: Little's W."""


def predicted(arrivals: float, work: float, consumers: int, failing: float) -> Load:
    """Return what theory predicts if each claim is tried until it succeeds."""
    tries = 1 / max(0.05, 1 - failing)
    offered = arrivals * work * tries
    if not consumers:
        return Load(arrivals, None, None if arrivals else 0.0, None)
    busy = offered / consumers
    if busy >= 1:
        return Load(arrivals, busy, None, None)
    waiting = _erlang_c(offered, consumers) * work / (consumers - offered)
    latency = tries * (waiting * (1 + VARIATION_OF_WORK**2) / 2 + work)
    return Load(arrivals, busy, arrivals * latency, latency)


def _erlang_c(offered: float, servers: int) -> float:
    """Return the probability that all servers are busy."""
    blocked = 1.0
    for server in range(1, servers + 1):  # Erlang B, step by step
        blocked = offered * blocked / (server + offered * blocked)
    return servers * blocked / (servers - offered * (1 - blocked)) if offered else 0.0


def measured(room: Room, since: float) -> Load | None:
    """Return what was measured in the last seconds, but not before `since`; None until there is enough of it."""
    begins = max(since, time.monotonic() - WINDOW)
    samples = [sample for sample in room.viewer.history if sample.at >= begins]
    if len(samples) < 4:
        return None
    span = samples[-1].at - samples[0].at
    latencies = _latencies(room, begins)
    return Load(
        arrivals=(samples[-1].sent - samples[0].sent) / span,
        busy=_mean(samples, lambda sample: sample.busy / max(1, sample.consumers)),
        depth=_mean(samples, lambda sample: sample.depth),
        latency=sum(latencies) / len(latencies) if latencies else None,
    )


def _latencies(room: Room, begins: float) -> list[float]:
    found: list[float] = []
    for lane in room.lanes.by_number.values():
        for lease in lane.leases:
            fate = room.effects.fates.get(lease.message)
            if lease.paid_at is not None and lease.paid_at >= begins and fate is not None and fate.sent_at:
                found.append((lease.ended or lease.paid_at) - fate.sent_at)
    return found


def _mean(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    """Return a mean over time, each value weighed by how long it lasted."""
    span = samples[-1].at - samples[0].at
    return sum(value(before) * (after.at - before.at) for before, after in pairwise(samples)) / span
