"""The trials of the three guarantees: a consumer is killed at a chosen moment, not at one that is hit by luck.

The consumer of a claim is told to stand still at that moment, and is killed while it does.
"""

import asyncio
import time

from filao.sandbox.lanes import Lane
from filao.sandbox.orders import MOMENTS, Guarantee, Halt, Moment
from filao.sandbox.room import Room, RoomError

WAITED, LOOK_EVERY = 30.0, 0.02  # seconds of waiting for a moment, and between two looks
WORK, CONSUMERS = 1.0, 3


async def try_kills(room: Room, guarantee: Guarantee) -> None:
    """Kill the consumer of one claim before it pays, and that of another between payment and acknowledgement."""
    await room.clear()
    await room.change(guarantee=guarantee, work=WORK / room.speed, lease=6.0, grouped=False, documents=False)
    for moment in MOMENTS:
        await room.have_consumers(CONSUMERS)
        await _kill_at(room, guarantee, moment)
    await room.have_consumers(CONSUMERS)


async def _kill_at(room: Room, guarantee: Guarantee, moment: Moment) -> None:
    """Let the next claim's consumer stand still at a moment of its work, and kill it there."""
    claim = room.customers.upcoming
    try:
        room.halt(Halt(claim, moment))
        room.trials[guarantee, moment] = claim
        await room.submit([room.customers.case()])
        lane = await _until_halted(room, claim)
        room.kill(lane.number)
    finally:
        room.halt(None)
    await _until_over(room, claim)


async def _until_halted(room: Room, claim: int) -> Lane:
    until = time.monotonic() + WAITED
    while time.monotonic() < until and room.lanes.able():
        lane = room.halted(claim)
        if lane is not None:
            return lane
        await asyncio.sleep(LOOK_EVERY)
    raise RoomError("no_moment", claim=claim)


async def _until_over(room: Room, claim: int) -> None:
    """Wait until a claim has left the queue, but not for ever, because a learner may have stopped all consumers."""
    until = time.monotonic() + WAITED
    while time.monotonic() < until and room.lanes.able():
        fate = room.effects.by_claim(claim)
        if fate is not None and fate.is_gone and not any(lane.holds for lane in room.lanes.living()):
            return
        await asyncio.sleep(LOOK_EVERY)
