"""Where the time goes from a send to its receipt in a process that waits: `python -m bench.hops`.

Both processes note when they pass each station of the way, by the clock that they share; told is the median of what
lies between two. The lines that begin with a dot run beside the others: the receiver wakes up while the disk works.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

import filao
from filao.engines.sqlite import thread
from filao.engines.sqlite.bell import Belfry
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.engine import SqliteEngine
from filao.engines.sqlite.hold import Hold
from filao.engines.sqlite.turnstile import Turnstile

QUEUE, MESSAGES, PAUSE = "hops", 500, 0.005  # seconds between two sends: by then the receiver waits again
WAY = (
    *("sent", "rung", "committed", "turn left", "turn taken", "claimed", "back on the loop", "received"),
    *("confirmed", ". heard", ". in line"),
)
FROM = {"confirmed": "turn left", ". heard": "rung", ". in line": ". heard"}
passed: dict[str, int] = {}
"""When this process passed each station last, in nanoseconds."""


def note(station: str) -> None:
    """Pass a station."""
    passed[station] = time.perf_counter_ns()


def watch(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
    """Note when a function is called, and when it returns."""
    function: Callable[..., Any] = getattr(owner, name)

    def watched(*arguments: Any, **keywords: Any) -> Any:
        if before:
            note(before)
        try:
            return function(*arguments, **keywords)
        finally:
            if after:
                note(after)

    setattr(owner, name, watched)


async def receive(path: str) -> None:
    """Receive all, and print when each passed the stations of this side."""
    watch(SqliteEngine, "_hear", before=". heard")
    watch(Hold, "take_turn", before=". in line", after="turn taken")
    watch(Database, "commit", after="claimed")
    watch(thread, "_resolve", before="back on the loop")
    found: list[dict[str, int]] = []
    async with filao.connect(path) as broker:
        for _ in range(MESSAGES):
            message = await broker.receive_from_queue(QUEUE)
            note("received")
            found.append(dict(passed))
            passed.clear()
            await message.ack()
    print(msgspec.json.encode(found).decode())


async def send(path: Path) -> list[dict[str, int]]:
    """Send to a process that waits, and return when each message passed the stations of both sides."""
    watch(Belfry, "ring", after="rung")
    watch(Hold, "look_at_commit", before="committed")
    watch(Turnstile, "leave", after="turn left")
    found: list[dict[str, int]] = []
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue(QUEUE))
        program = (sys.executable, "-m", "bench.hops", path)
        receiver = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
        await asyncio.sleep(1.0)
        for number in range(MESSAGES):
            await asyncio.sleep(PAUSE)
            passed.clear()
            note("sent")
            await broker.send_to_queue(QUEUE, number)
            note("confirmed")
            found.append(dict(passed))
        theirs, _ = await asyncio.wait_for(receiver.communicate(), 60)
    return [ours | other for ours, other in zip(found, msgspec.json.decode(theirs), strict=True)]


def _has_waited(passed: dict[str, int]) -> bool:
    """Return whether the receiver waited as this message was sent, and so it went the whole way."""
    if any(station not in passed for station in WAY):
        return False
    on_the_way = [passed[station] for station in WAY if station not in FROM]
    return on_the_way == sorted(on_the_way)


def main() -> None:
    """Print the account."""
    if len(sys.argv) > 1:
        asyncio.run(receive(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        stamps = asyncio.run(send(Path(folder).absolute() / "filao.db"))
    stamps = [one for one in stamps if _has_waited(one)]
    for before, station in pairwise(WAY):
        since = FROM.get(station, before)
        took = median((one[station] - one[since]) / 1000 for one in stamps)
        print(f"{station:<18} {took:7.1f} us after {since}")
    print(f"{len(stamps)} of {MESSAGES} messages")
    print(f"{'in all':<18} {median((one['received'] - one['sent']) / 1000 for one in stamps):7.1f} us")


if __name__ == "__main__":
    main()
