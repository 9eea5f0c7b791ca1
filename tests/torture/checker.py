"""An independent judge: it reads a history, and what was left in the end, and names every promise that was broken.

It knows nothing of the engine, its tables or its clock. Lines are written by different processes after the fact, so it
trusts intervals only: a lease runs *for certain* from the moment at which its receive had returned until its seconds
have passed since that receive was called, unless its holder began to settle it, or was killed, before. Only what is
certain is held against the queue.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

from tests.torture.history import Outcome, Record, Verb

ROUNDING = 0.005  # seconds: engines keep milliseconds, and a process reads two clocks a moment apart
ACKS: tuple[Verb, ...] = ("ack", "commit")
SETTLES: tuple[Verb, ...] = (*ACKS, "nack", "reject", "release")
Span = tuple[float, float]


@dataclass(frozen=True)
class Left:
    """What is found when everything was drained and nobody works any more."""

    dead: dict[str, int] = field(default_factory=dict)
    """The dead letters' ids, with their attempts."""
    effects: Sequence[str] = ()
    """The ids that transactions wrote down together with their acks."""
    counters: dict[str, int] = field(default_factory=dict)
    """The queue's own statistics; empty: not examined."""
    integrity: str = "ok"


@dataclass(frozen=True)
class Call:
    """A call with its ends. Without one, its process was killed, and whether it took effect is not known."""

    begin: Record
    ends: list[Record] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        return self.ends[0].outcome if self.ends else "failed"

    @property
    def may_be_done(self) -> bool:
        return self.outcome in ("done", "failed")


class Story:
    """A history, sorted by what was done and to which message."""

    def __init__(self, history: Sequence[Record]) -> None:
        self.killed = {record.process: record for record in history if record.call == "live"}
        self.calls = _calls(history)
        self.deliveries: dict[str, list[Record]] = {}
        self._settles: dict[str, list[Call]] = {}
        self._by_holder: dict[tuple[str, int], list[Call]] = {}
        for call in self.calls:
            if call.begin.call == "receive":
                for end in call.ends:
                    if end.outcome == "done":
                        self.deliveries.setdefault(end.id, []).append(end)
            elif call.begin.call != "send":
                self._by_holder.setdefault((call.begin.id, call.begin.token), []).append(call)
                self._settles.setdefault(call.begin.id, []).append(call)
        for delivered in self.deliveries.values():
            delivered.sort(key=lambda record: (record.attempt, record.ended))
        self.sends = [call for call in self.calls if call.begin.call == "send"]
        self.stored = {end.id: end for call in self.sends for end in call.ends if end.outcome == "done"}
        """Sends that were confirmed, by the message's id."""
        self.first_seen = {**{id_: seen[0] for id_, seen in self.deliveries.items()}, **self.stored}
        """Every message that is known to have been stored, with what is known of it."""

    def held(self, lease: Record) -> list[Call]:
        """Return what the holder of a lease did with it."""
        return self._by_holder.get((lease.id, lease.token), [])

    def settled(self, message: str, *verbs: str) -> list[Call]:
        """Return how the message was settled, or may have been."""
        return [call for call in self._settles.get(message, ()) if call.begin.call in verbs and call.may_be_done]

    def spans(self, lease: Record) -> list[Span]:
        """Return the spans of time in which a lease runs for certain, if nobody ends it."""
        start, over = lease.ended, _over(lease)
        spans = []
        for call in self.held(lease):
            if call.begin.call == "extend":
                spans.append((start, min(over, call.begin.began)))
                if call.outcome != "done":
                    return spans
                start, over = call.ends[0].ended, _over(call.ends[0])
        return [*spans, (start, over)]

    def certain(self, lease: Record) -> list[Span]:
        """Return the spans of time in which a delivery's holder held it for certain."""
        ends = [call.begin.began for call in self.held(lease) if call.begin.call in SETTLES]
        stop = min([*ends, self.killed[lease.process].began if lease.process in self.killed else inf])
        return [(start, min(over, stop)) for start, over in self.spans(lease) if start < min(over, stop)]


def check(history: Sequence[Record], left: Left) -> list[str]:
    """Return every promise that was broken, in words."""
    story = Story(history)
    return [
        *_lost(story, left),
        *_invented(story),
        *_stored_twice(story),
        *_acked_but_back(story, left),
        *_unexplained(story),
        *_held_by_two(story),
        *_accepted_too_late(story),
        *_refused_too_early(story),
        *_out_of_order(story, left),
        *_attempts(story, left),
        *_effects(story, left),
        *_counters(story, left),
        *([] if left.integrity == "ok" else [f"the file is damaged: {left.integrity}"]),
    ]


def _calls(history: Iterable[Record]) -> list[Call]:
    """Pair what each task began with how it ended."""
    calls: list[Call] = []
    running: dict[tuple[str, int], Call] = {}
    for record in history:
        task = record.process, record.task
        if record.call == "live":
            continue
        if not record.outcome:
            running[task] = Call(record)
            calls.append(running[task])
        elif record.outcome != "failed":
            running[task].ends.append(record)
    return calls


def _over(lease: Record) -> float:
    return lease.began + lease.seconds - ROUNDING


# --- messages --------------------------------------------------------------------------------------------------------


def _lost(story: Story, left: Left) -> Iterator[str]:
    """Find messages that were confirmed, or seen, and then neither handled nor kept as dead letters."""
    for message in story.first_seen:
        acked = story.settled(message, "ack") or message in left.effects
        if not acked and message not in left.dead:
            yield f"lost message {message}: {'confirmed' if message in story.stored else 'seen'}, never handled, not dead"


def _invented(story: Story) -> Iterator[str]:
    keys = {call.begin.key for call in story.sends}
    for message, delivered in story.deliveries.items():
        if delivered[0].key not in keys:
            yield f"message {message} was never sent"


def _stored_twice(story: Story) -> Iterator[str]:
    """Find messages stored twice by one send, and sends that deduplication should have caught, or should not have."""
    ids: defaultdict[str, set[str]] = defaultdict(set)
    named: defaultdict[str, set[str]] = defaultdict(set)
    for message, record in story.first_seen.items():
        ids[record.key].add(message)
    for call in story.sends:
        if call.begin.dedup_key and call.ends:
            named[call.begin.dedup_key].add(call.ends[0].id)
        if call.outcome == "duplicate" and not call.begin.dedup_key:
            yield f"message {call.begin.key} was taken for a duplicate, but has no key to be known by"
    for key, messages in ids.items():
        if len(messages) > 1:
            yield f"message {key} was stored twice, as {', '.join(sorted(messages))}"
    for name, messages in named.items():
        if len(messages) > 1:
            yield f"unexplained duplicate: dedup_key {name} was stored as {', '.join(sorted(messages))}"


# --- deliveries ------------------------------------------------------------------------------------------------------


def _acked_but_back(story: Story, left: Left) -> Iterator[str]:
    for message in story.first_seen:
        done = [call.ends[0] for call in story.settled(message, *ACKS) if call.outcome == "done"]
        if len(done) > 1:
            yield f"message {message} was acked twice, and both times it was confirmed"
        if done and message in left.dead:
            yield f"message {message} was acked and is a dead letter"
        for delivery in story.deliveries.get(message, ()):
            if done and delivery.began > done[0].ended:
                yield f"message {message} was acked, and then attempt {delivery.attempt} was delivered"


def causes(story: Story) -> Iterator[tuple[str, Record]]:
    """Yield why each message was delivered again; an empty cause is none."""
    for delivered in story.deliveries.values():
        for before, again in pairwise(delivered):
            yield _cause(story, before, again), again


def _cause(story: Story, before: Record, again: Record) -> str:
    for call in story.held(before):
        if call.begin.call in ("nack", "release") and call.may_be_done and call.begin.began <= again.ended:
            return call.begin.call
    killed = story.killed.get(before.process)
    if killed is not None and killed.began <= again.ended:
        return "killed"
    return "" if any(again.ended < over for _, over in story.spans(before)) else "lease over"


def _unexplained(story: Story) -> Iterator[str]:
    for cause, again in causes(story):
        if not cause:
            yield f"unexplained duplicate: message {again.id} was delivered again as attempt {again.attempt}"


def _held_by_two(story: Story) -> Iterator[str]:
    """Find moments at which one message, or two of one group, were leased twice for certain."""
    held: defaultdict[str, list[tuple[float, float, Record]]] = defaultdict(list)
    for message, delivered in story.deliveries.items():
        for lease in delivered:
            for start, over in story.certain(lease):
                held[f"message {message}"].append((start, over, lease))
                if lease.group:
                    held[f"group {lease.group}"].append((start, over, lease))
    for what, spans in held.items():
        spans.sort(key=lambda span: span[:2])
        for (_, over, first), (start, _, second) in pairwise(spans):
            if start < over and (first.id, first.token) != (second.id, second.token):
                yield f"{what}: two live leases at once, of {first.process} and {second.process}, from {start:.3f}"


def _accepted_too_late(story: Story) -> Iterator[str]:
    """Find calls of former holders that were accepted when another consumer had the message already."""
    for message, delivered in story.deliveries.items():
        for before, again in pairwise(delivered):
            for call in story.held(before):
                if call.outcome == "done" and call.begin.began > again.ended:
                    yield f"message {message}: a stale {call.begin.call} of attempt {before.attempt} was accepted"


def _refused_too_early(story: Story) -> Iterator[str]:
    """Find live leases that were refused to their holders."""
    for delivered in story.deliveries.values():
        for lease in delivered:
            for call in story.held(lease):
                if call.outcome == "lease_lost" and any(call.ends[0].ended < over for _, over in story.spans(lease)):
                    yield f"message {lease.id}: its holder's {call.begin.call} was refused while its lease ran"


def _out_of_order(story: Story, left: Left) -> Iterator[str]:
    """Find deliveries in a group that came before an earlier message of the group could have been handled."""
    groups: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for message, record in story.first_seen.items():
        if record.group:
            groups[record.group][message] = record
    for group, members in groups.items():
        busy_until = -inf
        for message, sent in sorted(members.items(), key=lambda item: item[1].place):
            if any(delivery.ended < busy_until for delivery in story.deliveries.get(message, ())):
                yield f"group order of {group} broken: message {message} at {sent.place} overtook those before it"
            if message not in left.dead:
                acks = story.settled(message, *ACKS)
                busy_until = max(busy_until, min((call.begin.began for call in acks), default=inf))


def _attempts(story: Story, left: Left) -> Iterator[str]:
    """Count: attempts are deliveries less releases, so in the end each attempt has one delivery that was not released.

    Only a delivery to a process that was killed while it received may have gone unseen.
    """
    unseen = 0
    for message, delivered in story.deliveries.items():
        times = Counter(delivery.attempt for delivery in delivered)
        last = left.dead.get(message, max(times))
        released, perhaps = Counter[int](), Counter[int]()
        for call in story.settled(message, "release"):
            perhaps[call.begin.attempt] += 1
            released[call.begin.attempt] += call.outcome == "done"
        for attempt, count in times.items():
            if count > 1 + perhaps[attempt] or not 1 <= attempt <= last:
                yield f"attempts of message {message} don't add up: {count} deliveries as attempt {attempt} of {last}"
        unseen += sum(max(0, 1 + released[attempt] - times[attempt]) for attempt in range(1, last + 1))
    room = unseen_room(story)
    if unseen > room:
        yield f"attempts don't add up: {unseen} deliveries were seen by nobody, but kills can have hidden {room} at most"


def unseen_room(story: Story) -> int:
    """Return how many deliveries may have been made to processes that were killed before they wrote them down."""
    return sum(call.begin.limit for call in story.calls if call.begin.call == "receive" and not call.ends)


# --- the end ---------------------------------------------------------------------------------------------------------


def _effects(story: Story, left: Left) -> Iterator[str]:
    """Compare what transactions wrote with the acks that they held: both or neither, once."""
    for message, count in Counter(left.effects).items():
        if count > 1:
            yield f"message {message} took effect {count} times"
        if not story.settled(message, "commit"):
            yield f"message {message} took effect, but no commit of it was begun or all were refused"
    for message in story.first_seen:
        done = any(call.outcome == "done" for call in story.settled(message, "commit"))
        if done and message not in left.effects:
            yield f"message {message} was committed, but its effect is missing"
        if message in left.effects and any(call.outcome == "done" for call in story.settled(message, "ack")):
            yield f"message {message} took effect in a transaction, and was acked outside it too"


def _counters(story: Story, left: Left) -> Iterator[str]:
    """Compare the queue's statistics with what was seen; what was cut off may have been counted or not."""
    counted = left.counters
    if not counted:
        return
    kept = ("ready", "delayed", "blocked", "leased", "dead", "acked", "dropped", "purged", "cancelled")
    if counted["sent"] != sum(counted[state] for state in kept):
        yield f"counters don't add up: {counted}"
    if counted["dead"] != len(left.dead):
        yield f"counters: {counted['dead']} dead, but there are {len(left.dead)} dead letters"
    for counter, verbs, outcome in (
        ("sent", ("send",), "done"),
        ("duplicates", ("send",), "duplicate"),
        ("received", ("receive",), "done"),
        ("acked", ACKS, "done"),
        ("nacked", ("nack",), "done"),
        ("released", ("release",), "done"),
    ):
        calls = [call for call in story.calls if call.begin.call in verbs]
        least = sum(end.outcome == outcome for call in calls for end in call.ends)
        most = least + sum(call.begin.limit or 1 for call in calls if not call.ends)
        if not least <= counted[counter] <= most:
            yield f"counters: {counter} is {counted[counter]}, but by the history it is {least} to {most}"
