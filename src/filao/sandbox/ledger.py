"""The ledger: what became of every claim, computed from what the processes wrote down, and from nothing else.

It is a pure function of the records, of the dead letters and of the engine's own counters, which it compares with the
records. Whatever cannot be explained is a fault; a ledger balances when it has none. A killed worker explains what it
could not write down any more, and a lease that ran out explains why an acknowledgement was refused: nothing else does.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from filao.engine import QueueStats, StoredMessage
from filao.sandbox.journal import PORTAL, Record, What

Values = dict[str, int | str]

LOST_SHOWN = 5  # lost claims that are named


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker did."""

    worker: int
    pid: int
    handled: int
    of_all: float
    killed_at: float | None


@dataclass(frozen=True, slots=True)
class Double:
    """A claim that was handled twice, by whom, and why: "killed", "refused", or "" for no reason that is known."""

    claim: int
    first: int
    second: int
    cause: str


@dataclass(frozen=True, slots=True)
class Takeover:
    """A claim that a killed worker held, and who got it."""

    claim: int
    killed: int
    worker: int
    attempt: int
    after: float
    """Seconds from the kill."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A claim that was given up."""

    claim: int
    reason: str
    attempts: int
    error: str


@dataclass(frozen=True, slots=True)
class Count:
    """One number as the journals and as the engine have it."""

    name: str
    journals: int
    engine: int
    slack: int = 0
    """Leases that ran out, and whose claims were acked all the same before anyone else got them."""

    @property
    def agrees(self) -> bool:
        """Whether both have the same."""
        return self.journals <= self.engine <= self.journals + self.slack


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that nothing explains; `key` says what, in `texts.py`."""

    key: str
    values: Values


@dataclass(frozen=True, slots=True)
class Ledger:
    """See `draw_up`."""

    planned: int
    sent: int
    handled: int
    """Claims that were handled, each counted once."""
    lost: tuple[int, ...]
    doubles: tuple[Double, ...]
    dead: tuple[DeadLetter, ...]
    takeovers: tuple[Takeover, ...]
    shares: tuple[Share, ...]
    counts: tuple[Count, ...]
    faults: tuple[Fault, ...]

    @property
    def balances(self) -> bool:
        """Whether everything is explained."""
        return not self.faults


@dataclass(slots=True)
class Delivery:
    """One attempt at one claim by one worker, as its journal tells it."""

    message: str
    claim: int
    worker: int
    attempt: int
    at: float
    did: Counter[What] = field(default_factory=Counter[What])
    """How often it was received, handled, acked, nacked or refused: once or never, when all is well."""

    @property
    def has_word(self) -> bool:
        """Whether the worker wrote down how it settled the claim."""
        return bool(self.did["acked"] or self.did["nacked"] or self.did["refused"])


@dataclass(slots=True)
class Story:
    """The records, in order of time, by what they are about."""

    sent: Counter[str] = field(default_factory=Counter[str])
    claims: dict[str, int] = field(default_factory=dict[str, int])
    pids: dict[int, int] = field(default_factory=dict[int, int])
    killed: dict[int, float] = field(default_factory=dict[int, float])
    deliveries: dict[str, list[Delivery]] = field(default_factory=dict[str, list[Delivery]])

    def every(self) -> Iterator[Delivery]:
        """Yield all deliveries."""
        for deliveries in self.deliveries.values():
            yield from deliveries

    def handled(self, message: str) -> list[Delivery]:
        """Return the deliveries of a message that ended in its effect, as often as they had it."""
        return [found for found in self.deliveries.get(message, ()) for _ in range(found.did["handled"])]


def draw_up(
    records: Iterable[Record], dead: Sequence[StoredMessage], stats: QueueStats, *, planned: int, desks: int
) -> Ledger:
    """Return the ledger of a run that is over, in which `planned` claims were to be sent.

    `desks` is how many claims a worker has in hand at most: a kill explains what happened to so many, and no more.
    """
    story = _story(records)
    handled = [message for message in story.deliveries if story.handled(message)]
    given_up = {letter.id for letter in dead}
    lost = tuple(story.claims[id_] for id_ in story.sent if id_ not in given_up and not story.handled(id_))
    doubles = tuple(_doubles(story))
    counts = tuple(_counts(story, dead, stats))
    faults = (
        *_wrong_sums(story, planned, lost),
        *_wrong_claims(story, given_up),
        *_wordless(story, desks),
        *(Fault("fault_double", {"claim": double.claim}) for double in doubles if not double.cause),
        *_miscounted(counts),
    )
    return Ledger(
        planned=planned,
        sent=len(story.sent),
        handled=len(handled),
        lost=lost,
        doubles=doubles,
        dead=tuple(_dead(story, dead)),
        takeovers=tuple(_takeovers(story)),
        shares=tuple(_shares(story)),
        counts=counts,
        faults=faults,
    )


def _story(records: Iterable[Record]) -> Story:
    story = Story()
    deliveries: dict[tuple[str, int, int], Delivery] = {}
    for record in sorted(records, key=lambda record: record.at):
        if record.message:
            story.claims[record.message] = record.claim
        match record.what:
            case "started":
                story.pids[record.who] = record.pid
            case "killed":
                story.killed[record.who] = record.at
            case "sent":
                story.sent[record.message] += 1
            case what:
                key = record.message, record.who, record.attempt
                if key not in deliveries:
                    deliveries[key] = Delivery(record.message, record.claim, record.who, record.attempt, record.at)
                    story.deliveries.setdefault(record.message, []).append(deliveries[key])
                deliveries[key].did[what] += 1
    return story


# --- what happened ---------------------------------------------------------------------------------------------------


def _doubles(story: Story) -> Iterator[Double]:
    for message in story.deliveries:
        for before, again in pairwise(story.handled(message)):
            yield Double(before.claim, before.worker, again.worker, "" if before is again else _cause(story, before))


def _cause(story: Story, before: Delivery) -> str:
    """Return why a claim came back although it was handled."""
    if before.did["acked"]:
        return ""
    if before.did["refused"]:
        return "refused"
    return "killed" if before.at <= story.killed.get(before.worker, 0) else ""


def _takeovers(story: Story) -> Iterator[Takeover]:
    for deliveries in story.deliveries.values():
        for before, again in pairwise(deliveries):
            killed_at = story.killed.get(before.worker)
            if killed_at is not None and before.at <= killed_at <= again.at and not before.did["nacked"]:
                yield Takeover(again.claim, before.worker, again.worker, again.attempt, again.at - killed_at)


def _shares(story: Story) -> Iterator[Share]:
    effects = Counter[int]()
    for delivery in story.every():
        effects[delivery.worker] += delivery.did["handled"]
    total = max(1, effects.total())
    for worker in sorted((story.pids.keys() | effects.keys()) - {PORTAL}):
        handled = effects[worker]
        yield Share(worker, story.pids.get(worker, 0), handled, handled / total, story.killed.get(worker))


def _dead(story: Story, dead: Sequence[StoredMessage]) -> Iterator[DeadLetter]:
    for letter in dead:
        last = (letter.error.strip().splitlines() or [""])[-1]
        error = last.partition("Error: ")[2] or last
        yield DeadLetter(story.claims.get(letter.id, 0), letter.reason or "", letter.attempts, error)


# --- what nothing explains -------------------------------------------------------------------------------------------


def _wrong_sums(story: Story, planned: int, lost: Sequence[int]) -> Iterator[Fault]:
    if len(story.sent) != planned:
        yield Fault("fault_not_sent", {"sent": len(story.sent), "planned": planned})
    if lost:
        shown = ", ".join(map(str, lost[:LOST_SHOWN]))
        more = f" … ({len(lost)})" if len(lost) > LOST_SHOWN else ""
        yield Fault("fault_lost", {"claims": shown + more})


def _wrong_claims(story: Story, given_up: set[str]) -> Iterator[Fault]:
    for message, times in story.sent.items():
        if times > 1:
            yield Fault("fault_sent_twice", {"claim": story.claims[message]})
    for message, deliveries in story.deliveries.items():
        claim = story.claims[message]
        if message not in story.sent:
            yield Fault("fault_never_sent", {"claim": claim})
        if any(not delivery.did["received"] for delivery in deliveries):
            yield Fault("fault_never_received", {"claim": claim})
        if any(before.did["acked"] for before, _ in pairwise(deliveries)):
            yield Fault("fault_acked_but_back", {"claim": claim})
        if message in given_up and any(
            not _cause(story, delivery) for delivery in deliveries if delivery.did["handled"]
        ):
            yield Fault("fault_handled_and_dead", {"claim": claim})


def _wordless(story: Story, desks: int) -> Iterator[Fault]:
    """Find claims that somebody left without a word, and could not have had in hand when killed."""
    wordless = Counter(delivery.worker for delivery in story.every() if not delivery.has_word)
    for worker, count in sorted(wordless.items()):
        if count > (desks if worker in story.killed else 0):
            yield Fault("fault_wordless", {"worker": worker, "claims": count})


def _counts(story: Story, dead: Sequence[StoredMessage], stats: QueueStats) -> Iterator[Count]:
    """Compare the engine's counters with the journals, plus what a killed worker could not write down any more.

    That is no guess: the queue is empty, so a claim which was handled by the killed worker and never came back was
    acked; and a delivery that is missing among the attempts of a claim was made to it.
    """
    unsaid_acks = unsaid_deliveries = cut_off = 0
    letters = {letter.id: letter.attempts for letter in dead}
    for message, deliveries in story.deliveries.items():
        last = deliveries[-1]
        cut_short = last.worker in story.killed and not last.has_word
        unsaid_acks += bool(cut_short and last.did["handled"] and message not in letters)
        missing = letters.get(message, last.attempt) - len(deliveries)
        unsaid_deliveries += min(missing, len(story.killed))
        failed = deliveries if message in letters else deliveries[:-1]
        cut_off += missing + sum(not (delivery.did["acked"] or delivery.did["nacked"]) for delivery in failed)
    acked = sum(delivery.did["acked"] for delivery in story.every())
    nacked = sum(delivery.did["nacked"] for delivery in story.every())
    received = sum(delivery.did["received"] for delivery in story.every())
    yield Count("sent", len(story.sent), stats.sent)
    yield Count("received", received + unsaid_deliveries, stats.received - stats.released)
    yield Count("acked", acked + unsaid_acks, stats.acked)
    yield Count("failed", nacked + cut_off, stats.nacked + stats.lost, slack=stats.late)
    yield Count("dead", len(dead), stats.dead)
    yield Count("left", 0, stats.ready + stats.delayed + stats.blocked + stats.leased)


def _miscounted(counts: Sequence[Count]) -> Iterator[Fault]:
    for count in counts:
        if not count.agrees:
            yield Fault("fault_count", {"count": count.name, "ours": count.journals, "theirs": count.engine})
