"""The cast: who is who, what they find at the beginning, and what is found in the end."""

from collections.abc import Callable

import msgspec

import filao
from tests.torture import auditor, consumers, operator, producers, workers
from tests.torture.checker import Left
from tests.torture.history import History, now
from tests.torture.scene import BILLS, CLAIMS, EFFECTS, QUEUES, Pen, Scene

PARTS: dict[str, Callable[[Scene], None]] = {
    "producer": producers.play,
    "consumer": consumers.play,
    "blocking": consumers.play_blocking,
    "worker": workers.play,
    "operator": operator.play,
    "auditor": auditor.play,
}
CAST = (
    *("producer-1", "producer-2", "consumer-1", "consumer-2", "blocking-1", "worker-1", "worker-2"),
    *("operator-1", "auditor-1"),
)
DRAINED_WITHIN = 60.0  # seconds for each queue
DRAIN_LIMIT = 100  # messages received at once at the end


def part_of(name: str) -> str:
    """Return what an actor is."""
    return name.partition("-")[0]


def play(scene: Scene) -> None:
    """Be an actor until killed or told to stop."""
    PARTS[part_of(scene.name)](scene)


async def prepare(db: object) -> None:
    """Make what the play needs, and leave nothing open."""
    async with filao.connect(str(db)) as broker:
        await broker.declare(*QUEUES)
        async with broker.transaction() as transaction:
            await transaction.execute(EFFECTS)


async def drain(scene: Scene) -> Left:
    """When all others are gone: handle what is left, and tell what is found then."""
    pen = Pen(scene, History(scene.histories / scene.name))
    async with filao.connect(scene.db) as broker:
        await broker.declare(*QUEUES)
        await operator.resume(broker, pen)
        undrained = [rest for queue in QUEUES if (rest := await _empty(broker, pen, queue))]
        dead = {letter.id: letter for queue in QUEUES for letter in await _dead(broker, queue)}
        async with broker.transaction() as transaction:
            effects = [found[0] for found in await transaction.execute("SELECT message FROM effect")]
        counters = msgspec.structs.asdict(await broker.stats(CLAIMS))
        integrity = [finding.text for finding in await broker.doctor() if finding.level == "error"]
    return Left(
        dead={id_: letter.attempts for id_, letter in dead.items()},
        epochs={id_: letter.body["epoch"] for id_, letter in dead.items()},
        keys={id_: letter.body["key"] for id_, letter in dead.items()},
        queues={id_: letter.queue for id_, letter in dead.items()},
        effects=effects,
        counters=counters,
        queue=CLAIMS.name,
        integrity="; ".join(integrity) or "ok",
        undrained="; ".join(undrained),
    )


async def _empty(broker: filao.Broker, pen: Pen, queue: filao.Queue) -> str:
    """Handle what waits; what a killed process holds comes back when its lease ends. Return what never came."""
    until = now() + DRAINED_WITHIN
    stats = await broker.stats(queue)
    while stats.ready + stats.delayed + stats.blocked + stats.leased:
        if now() > until:
            return f"{queue.name} after {DRAINED_WITHIN:g} s: {stats}"
        for message in await consumers.receive(broker, pen, queue, DRAIN_LIMIT, lease=DRAINED_WITHIN):
            if queue is not BILLS:
                await consumers.attempt(pen, "ack", message, message.ack())
        stats = await broker.stats(queue)
    return ""


async def _dead(broker: filao.Broker, queue: filao.Queue) -> list[filao.StoredMessage]:
    """Return all dead letters, page by page."""
    letters: list[filao.StoredMessage] = []
    while page := await broker.dead_letters(queue, limit=1_000, after=letters[-1].id if letters else None):
        letters += page
    return letters
