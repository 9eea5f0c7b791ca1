"""The measures: each plays its roles, peers taking turns round by round, and returns what it found."""

import asyncio
import json
import os
import signal
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filao
from bench.crew import crew, let_go, play, result
from bench.peers import QUEUE
from bench.roles import BODY

ROUNDS = 3
SLOW = {"persist-queue": 0.1, "litequeue": 0.15, "huey": 0.25, "honker": 0.15, "RabbitMQ": 0.3, "Redis": 0.6}
"""How much of Filao's number of messages the others get, so that all take some seconds."""


@dataclass(frozen=True, slots=True)
class Ground:
    """The folder, servers and peers of a run."""

    folder: Path
    ports: dict[str, str]
    """The ports of the servers, by peer."""
    peers: tuple[str, ...]
    scale: float
    """1 for a full run; less for a quick one."""

    def count(self, number: int, peer: str = "Filao") -> int:
        return max(100, round(number * self.scale * SLOW.get(peer, 1.0)))

    def place(self, peer: str) -> str:
        """Return a fresh place: a folder of its own, or the server's port, emptied."""
        if peer in self.ports:
            _empty(peer, self.ports[peer])
            return self.ports[peer]
        folder = self.folder / f"{peer}-{time.monotonic_ns()}"
        folder.mkdir()
        return str(folder)


def _empty(peer: str, port: str) -> None:
    if peer == "Redis":
        import redis

        with redis.Redis(port=int(port)) as client:
            client.flushall()
    else:
        asyncio.run(_purge(port))


async def _purge(port: str) -> None:
    import aio_pika

    async with await aio_pika.connect(f"amqp://guest:guest@127.0.0.1:{port}/") as connection:
        channel = await connection.channel()
        await channel.queue_delete(QUEUE)


def _median_of_rounds(names: Iterable[str], measure: Callable[[str], float]) -> dict[str, float]:
    """Return the median of three for each, taken in turns, so that a disturbance meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in list(found):
            try:
                found[name].append(measure(name))
            except RuntimeError as error:
                if name == "Filao":
                    raise
                print(f"{name}: out of this measure, because {error}")
                del found[name]
    return {name: statistics.median(figures) for name, figures in found.items()}


def _rate(found: dict[str, Any]) -> float:
    return float(found["count"] / (found["ended"] - found["began"]))


def sending(ground: Ground) -> dict[str, Any]:
    """Messages a second: 64 producers or, where that is more, one; and a lone producer."""

    def together(peer: str) -> float:
        if peer == "raw SQLite":
            return raw(ground)["send"]
        return _rate(play("send", peer, ground.place(peer), ground.count(60_000, peer)))

    def alone(peer: str) -> float:
        return _rate(play("lone", peer, ground.place(peer), ground.count(6_000, peer)))

    return {
        "together": _median_of_rounds([*ground.peers, "raw SQLite"], together),
        "alone": _median_of_rounds(ground.peers, alone),
    }


def draining(ground: Ground) -> dict[str, Any]:
    """Messages a second that one consumer process receives and acknowledges, each for itself."""

    def drain(peer: str) -> float:
        if peer == "raw SQLite":
            return raw(ground)["drain"]
        place, count = ground.place(peer), ground.count(40_000, peer)
        play("send", peer, place, count)
        return _rate(play("drain", peer, place, count))

    return {"drain": _median_of_rounds([*ground.peers, "raw SQLite"], drain)}


def competing(ground: Ground) -> dict[str, Any]:
    """One producer and three consumer processes: messages a second from the first send to the last ack."""
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in ground.peers}

    def compete(peer: str) -> float:
        place = ground.place(peer)
        count = ground.count(240_000 if peer == "Filao" else 60_000, peer)  # some seconds for all but the slowest
        with crew([("drain", peer, place, 0)] * 3 + [("send", peer, place, count)]) as processes:
            let_go(processes)
            found = [result(process) for process in processes]
        numbers = [number for consumer in found[:3] for number in consumer["numbers"]]
        shares = [consumer["count"] / max(1, len(numbers)) for consumer in found[:3]]
        lost, doubled = count - len(set(numbers)), len(numbers) - len(set(numbers))
        runs[peer].append({"shares": shares, "lost": lost, "doubled": doubled})
        return float(len(numbers) / (max(consumer["ended"] for consumer in found[:3]) - found[3]["began"]))

    return {"rate": _median_of_rounds(ground.peers, compete), "runs": runs}


def fairness(ground: Ground) -> dict[str, Any]:
    """Eight processes write at once for three seconds: Jain's index (1: all equal), and the longest wait in ms."""
    found: dict[str, Any] = {}
    for peer in ("Filao", "sqlite3"):
        rounds: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            place = ground.place(peer)
            play("write", peer, place, 0)  # creates the file
            with crew([("write", peer, place, 3 if ground.scale >= 1 else 1)] * 8) as processes:
                let_go(processes)
                results = [result(process) for process in processes]
            counts = [one["count"] for one in results]
            jain = sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))
            longest = max(one["longest"] for one in results) * 1000
            rounds.append({"jain": jain, "longest": longest, "rate": sum(counts) / 3})
        found[peer] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return found


def waking(ground: Ground) -> dict[str, Any]:
    """Milliseconds from before the send to the receipt in a waiting process; the cost of waiting in percent of
    a core.
    """
    found: dict[str, Any] = {}
    peers = [peer for peer in ("Filao", "Redis") if peer in ground.peers]
    rounds: dict[str, list[float]] = {peer: [] for peer in peers}
    for _ in range(ROUNDS * 2):
        for peer in peers:
            place, count = ground.place(peer), ground.count(250)
            with crew([("latency", peer, place, count), ("stamp", peer, place, count)]) as processes:
                let_go(processes)
                rounds[peer] += result(processes[0])["latencies"]
    for name, latencies in rounds.items():
        latencies.sort()
        found[name] = {"median": statistics.median(latencies), "p99": latencies[int(len(latencies) * 0.99)]}
    seconds = 10 if ground.scale >= 1 else 2
    found["idle"] = play("idle", "Filao", ground.place("Filao"), seconds)["percent"]
    return found


def depth(ground: Ground) -> dict[str, Any]:
    """Drain with much waiting and with little; a claim (ms) with much in the other states and with nothing."""
    small, large = ground.count(20_000), ground.count(1_000_000)
    rates: dict[str, list[float]] = {"small": [], "large": []}
    deep = ground.place("Filao")
    asyncio.run(_fill(deep, large + ROUNDS * small))
    for _ in range(ROUNDS):
        shallow = ground.place("Filao")
        asyncio.run(_fill(shallow, small))
        rates["small"].append(_rate(play("drain", "Filao", shallow, small)))
        rates["large"].append(_rate(play("drain", "Filao", deep, small)))
    claims = asyncio.run(_claims(ground))
    return {**{key: statistics.median(one) for key, one in rates.items()}, "claims": claims}


async def _fill(place: str, count: int) -> None:
    async with filao.connect(Path(place) / "filao.db") as broker:
        await broker.declare(filao.Queue(QUEUE))
        for first in range(0, count, 10_000):
            size = min(10_000, count - first)
            await broker.send_many(QUEUE, [f"{number}:".encode().ljust(BODY, b"x") for number in range(size)])


async def _claims(ground: Ground) -> dict[str, float]:
    """Return the median milliseconds of a claim, each case in a file of its own, taken in turns."""
    cases = {"nothing": 0, "in flight": 50_000, "delayed": 100_000, "groups": 10_000}
    brokers: dict[str, filao.Broker] = {}
    for case, number in cases.items():
        brokers[case] = broker = filao.connect(Path(ground.place("Filao")) / "filao.db")
        await broker.open()
        await broker.declare(filao.Queue(QUEUE, lease=3600))
        for first in range(0, ground.count(number) if number else 0, 1000):
            await _burden(broker, case, first)
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(300):
        for case, broker in brokers.items():
            await broker.send_to_queue(QUEUE, "the one", priority=1)
            began = time.perf_counter()
            message = await broker.receive_from_queue(QUEUE)
            times[case].append(1000 * (time.perf_counter() - began))
            await message.ack()
    for broker in brokers.values():
        await broker.close()
    return {case: statistics.median(one) for case, one in times.items()}


async def _burden(broker: filao.Broker, case: str, first: int) -> None:
    if case == "groups":
        sends = [broker.send_to_queue(QUEUE, number, group=f"{number}") for number in range(first, first + 1000)]
        await asyncio.gather(
            *sends, *(broker.send_to_queue(QUEUE, 0, group=f"{n}") for n in range(first, first + 1000))
        )
        return
    await broker.send_many(QUEUE, ["x" * BODY] * 1000, delay=86_400.0 if case == "delayed" else 0.0)
    if case == "in flight":
        await broker.receive_many(QUEUE, 1000)


def takeover(ground: Ground) -> dict[str, Any]:
    """Milliseconds from the SIGKILL of a consumer to the receipt of its message by another that waits."""
    place = ground.place("Filao")
    kills = 50 if ground.scale >= 1 else 3
    return {"milliseconds": asyncio.run(_takeovers(place, kills)), "kills": kills}


async def _takeovers(place: str, kills: int) -> float:
    times: list[float] = []
    async with filao.connect(Path(place) / "filao.db") as broker:
        for _ in range(kills):
            await broker.declare(filao.Queue(QUEUE, lease=3600))
            await broker.send_to_queue(QUEUE, b"held")
            with crew([("hold", "Filao", place, 0)]) as (holder,):
                waiting = asyncio.ensure_future(broker.receive_from_queue(QUEUE))
                await asyncio.sleep(0.3)  # it waits as it would in life, not as it does in its first moments
                began = time.monotonic()
                os.kill(holder.pid, signal.SIGKILL)
                message = await waiting
                times.append(1000 * (time.monotonic() - began))
                await message.ack()
    return statistics.median(times)


def space(ground: Ground) -> dict[str, Any]:
    """Return the file's bytes with a backlog and after it, and a consumer's memory (KiB), tenth by tenth."""
    place, count = ground.place("Filao"), ground.count(200_000)
    path = Path(place) / "filao.db"
    asyncio.run(_fill(place, count))
    full = _size(path)
    play("drain", "Filao", place, count)
    after = asyncio.run(_settle(path))
    sizes = play("grow", "Filao", ground.place("Filao"), max(10_000, ground.count(500_000) // 10_000 * 10_000))["sizes"]
    return {"full": full, "drained": after, "memory": sizes}


async def _settle(path: Path) -> int:
    """Let an idle broker tidy up until the file stops shrinking."""
    async with filao.connect(path) as broker:
        await (await broker.receive_from_queue(QUEUE, wait=0) or await _one(broker)).ack()
        sizes = [_size(path)]
        while len(sizes) < 4 or sizes[-1] != sizes[-4]:
            await asyncio.sleep(1.0)
            sizes.append(_size(path))
    return sizes[-1]


async def _one(broker: filao.Broker) -> filao.Message[Any]:
    await broker.send_to_queue(QUEUE, b"one")
    return await broker.receive_from_queue(QUEUE)


def _size(path: Path) -> int:
    files = (path, path.with_name(path.name + "-wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def raw(ground: Ground) -> dict[str, float]:
    """Plain `sqlite3` in batches of 100, durable: the ceiling. Messages a second."""
    count = ground.count(100_000) // 100 * 100
    db = sqlite3.connect(Path(ground.place("raw SQLite")) / "raw.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(
        "CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, state INTEGER NOT NULL, body BLOB NOT NULL)"
    )
    db.execute("CREATE INDEX ready ON message (id) WHERE state = 0")
    rows = [(0, b"x" * BODY)] * 100
    began = time.perf_counter()
    for _ in range(count // 100):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO message (state, body) VALUES (?, ?)", rows)
        db.execute("COMMIT")
    sent = time.perf_counter()
    for _ in range(count // 100):
        db.execute("BEGIN IMMEDIATE")
        ready = "SELECT id FROM message INDEXED BY ready WHERE state = 0 ORDER BY id LIMIT 100"
        found = db.execute(f"UPDATE message SET state = 1 WHERE id IN ({ready}) RETURNING id, body").fetchall()
        db.execute("COMMIT")
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM message WHERE id = ?", [(number,) for number, _ in found])
        db.execute("COMMIT")
    drained = time.perf_counter()
    db.close()
    return {"send": count / (sent - began), "drain": count / (drained - sent)}


MEASURES: dict[str, Callable[[Ground], dict[str, Any]]] = {
    measure.__name__: measure for measure in (sending, draining, competing, fairness, waking, depth, takeover, space)
}


def to_json(found: dict[str, Any]) -> str:
    """Return the figures as JSON."""
    return json.dumps(found, indent=2, sort_keys=True)
