"""What one process of a measurement does: `python -m bench.roles ROLE PEER PLACE [NUMBER]`.

It says "ready" on stdout, begins when a line comes on stdin, and ends with one line of JSON. Times are of the machine's
monotonic clock, which all processes share.
"""

import asyncio
import json
import os
import resource
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bench.peers import PEERS, QUEUE, Filao, Peer

BODY = 256  # bytes
QUIET = 1.5  # seconds without a message after which a consumer takes the queue for drained
PAUSE = 0.002  # seconds between the messages whose latency is measured

Result = dict[str, Any]


def _body(number: int) -> bytes:
    return f"{number}:".encode().ljust(BODY, b"x")


def _number(body: bytes) -> int:
    return int(body.split(b":", 1)[0])


async def _begin() -> float:
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    return time.monotonic()


async def send(peer: Peer, count: int, tasks: int | None = None) -> Result:
    """Send so many messages, from as many tasks as suit the peer."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await peer.send(_body(number))

    began = await _begin()
    await asyncio.gather(*(work() for _ in range(tasks or peer.tasks)))
    return {"began": began, "ended": time.monotonic(), "count": count}


async def lone(peer: Peer, count: int) -> Result:
    """Send so many messages, one after the other."""
    return await send(peer, count, 1)


async def drain(peer: Peer, count: int) -> Result:
    """Receive and acknowledge so many messages (0: until it is quiet)."""
    numbers: list[int] = []
    last = 0.0

    async def work() -> None:
        nonlocal last
        while not count or len(numbers) < count:
            received = await peer.receive(QUIET)
            if received is None:
                return
            await peer.ack(received[1])
            numbers.append(_number(received[0]))
            last = time.monotonic()

    began = await _begin()
    await asyncio.gather(*(work() for _ in range(peer.tasks)))
    return {"began": began, "ended": last, "count": len(numbers), "numbers": numbers if not count else []}


async def stamp(peer: Peer, count: int) -> Result:
    """Send messages that carry the time of their sending."""
    await _begin()
    for _ in range(count):
        await asyncio.sleep(PAUSE)
        await peer.send(str(time.monotonic_ns()).encode())
    return {}


async def latency(peer: Peer, count: int) -> Result:
    """Wait for each message, and say in milliseconds how long after its sending it came."""
    await _begin()
    latencies: list[float] = []
    for _ in range(count):
        received = await peer.receive(30.0)
        now = time.monotonic_ns()
        if received is None:
            break
        await peer.ack(received[1])
        latencies.append((now - int(received[0])) / 1e6)
    return {"latencies": sorted(latencies)}


async def idle(peer: Peer, seconds: int) -> Result:
    """Wait for a message that does not come, and say what that cost in percent of a core."""
    await _begin()
    waiting = asyncio.ensure_future(peer.receive(seconds + 60.0))
    await asyncio.sleep(3.0)  # the time to fall quiet
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    await asyncio.sleep(seconds)
    after, ended = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    waiting.cancel()
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"percent": 100 * used / (ended - began)}


async def write(peer: Peer, seconds: int) -> Result:
    """Send one message after the other for so many seconds; say how many, and the longest wait."""
    until = await _begin() + seconds
    count, longest = 0, 0.0
    while (began := time.monotonic()) < until:
        await peer.send(_body(count))
        count += 1
        longest = max(longest, time.monotonic() - began)
    return {"count": count, "longest": longest}


async def hold(peer: Peer, _: int) -> Result:
    """Receive a message, say so, and hold it until killed."""
    await peer.receive(30.0)
    print("held", flush=True)
    await asyncio.Event().wait()
    return {}


async def grow(peer: Peer, count: int) -> Result:
    """Send and consume so many messages, and say what memory was in use after each tenth, in KiB."""
    await _begin()
    sizes: list[int] = []
    for _ in range(10):
        for _ in range(count // 10_000):
            assert isinstance(peer, Filao)
            await peer.broker.send_many(QUEUE, [_body(number) for number in range(1000)])

            async def work() -> None:
                while (received := await peer.receive(0)) is not None:
                    await peer.ack(received[1])

            await asyncio.gather(*(work() for _ in range(64)))
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        sizes.append(int(pages) * os.sysconf("SC_PAGE_SIZE") // 1024)
    return {"sizes": sizes}


class PlainSqlite:
    """A table and SQLite's own busy handler: what the turnstile is compared with."""

    tasks = 1

    async def open(self, place: str) -> None:
        self.db = sqlite3.connect(f"{place}/plain.db", isolation_level=None, timeout=60)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY, body BLOB)")

    async def send(self, body: bytes) -> None:
        self.db.execute("INSERT INTO message (body) VALUES (?)", (body,))

    async def receive(self, wait: float) -> None:
        """Never: it only writes."""

    async def ack(self, handle: Any) -> None:
        """Never."""

    async def close(self) -> None:
        self.db.close()


ROLES: dict[str, Callable[[Peer, int], Awaitable[Result]]] = {
    role.__name__: role for role in (send, lone, drain, stamp, latency, idle, write, hold, grow)
}


async def main(role: str, name: str, place: str, number: str = "0") -> None:
    """Play a role to its end."""
    peer = PlainSqlite() if name == "sqlite3" else PEERS[name]()
    await peer.open(place)
    result = await ROLES[role](peer, int(number))
    print(json.dumps(result), flush=True)
    await peer.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
