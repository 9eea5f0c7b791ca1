"""An independent judge: it reads a history, and what was left in the end, and names every promise that was broken.

It knows nothing of the engine, its tables or its clock. Lines are written by different processes after the fact, so it
trusts intervals only: a lease runs *for certain* from the moment at which its receive had returned until its seconds
have passed since that receive was called, unless its holder began to settle it, or was killed, before. Only what is
certain is held against the queue.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Literal

from tests.torture.history import Outcome, Record, Verb

ROUNDING = 0.005  # seconds: engines keep milliseconds, and a process reads two clocks a moment apart
ACKS: tuple[Verb, ...] = ("ack", "commit")
SETTLES: tuple[Verb, ...] = (*ACKS, "nack", "reject", "release")
TIMELY = 0.05  # seconds: by how much the engine's clock and a process's may differ over a time to live
Span = tuple[float, float]
Kept = Literal["all", "while allowed", "until received"]
"""What a queue keeps: all that was sent, all but what the operator deletes or its limits drop, or what nobody received.
"""


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
    undrained: str = ""
    """What could not be received in the end, though it should be there."""
    epochs: dict[str, int] = field(default_factory=dict)
    """How often the dead letters had been sent back before."""
    keys: dict[str, str] = field(default_factory=dict)
    """What their senders meant."""
    queues: dict[str, str] = field(default_factory=dict)
    """Where they lie."""
    queue: str = ""
    """Whose counters those are."""


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

    def __init__(self, history: Sequence[Record], kept: Mapping[str, Kept] | None = None) -> None:
        self._kept = dict(kept or {})
        self.killed = {record.process: record for record in history if record.call == "live"}
        """Processes that were killed, or told to end; from then on nothing is certain of what they held."""
        self.ended = {process for process, record in self.killed.items() if record.outcome == "ended"}
        self.stops = [record for record in history if record.call == "stop"]
        self.calls = _calls(history)
        self.deliveries: dict[str, list[Record]] = {}
        self._settles: dict[str, list[Call]] = {}
        self._by_holder: dict[tuple[str, int], list[Call]] = {}
        for call in self.calls:
            if call.begin.call == "receive":
                for end in call.ends:
                    if end.outcome == "done":
                        self.deliveries.setdefault(end.id, []).append(end)
            elif call.begin.call in (*SETTLES, "extend"):
                self._by_holder.setdefault((call.begin.id, call.begin.token), []).append(call)
                self._settles.setdefault(call.begin.id, []).append(call)
        for delivered in self.deliveries.values():
            delivered.sort(key=lambda record: (record.epoch, record.attempt, record.ended))
        self.sends = [call for call in self.calls if call.begin.call == "send"]
        self.stored = {end.id: end for call in self.sends for end in call.ends if end.outcome == "done"}
        """Sends that were confirmed, by the message's id."""
        self.first_seen = {**{id_: seen[0] for id_, seen in self.deliveries.items()}, **self.stored}
        """Every message that is known to have been stored, with what is known of it."""
        self.redriven = {call.begin.id for call in self.did("redrive") if call.begin.id}

    def did(self, *verbs: str) -> list[Call]:
        """Return all calls of some kinds."""
        return [call for call in self.calls if call.begin.call in verbs]

    def keeps(self, record: Record) -> Kept:
        """Return what the queue of a message keeps."""
        return self._kept.get(record.queue, "all")

    def faithful(self) -> Iterator[tuple[str, list[Record]]]:
        """Yield the messages, with their deliveries, of queues that keep all."""
        for message, delivered in self.deliveries.items():
            if self.keeps(delivered[0]) == "all":
                yield message, delivered

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


def check(history: Sequence[Record], left: Left, kept: Mapping[str, Kept] | None = None) -> list[str]:
    """Return every promise that was broken, in words; `kept` is what queues keep that do not keep all."""
    story = Story(history, kept)
    return [
        *_lost(story, left),
        *_lost_while_allowed(story, left),
        *_received_twice(story, left),
        *_invented(story),
        *_undone_but_there(story, left),
        *_stored_twice(story),
        *_at_the_wrong_time(story),
        *_acked_but_back(story, left),
        *_unexplained(story),
        *_held_by_two(story),
        *_accepted_too_late(story),
        *_refused_too_early(story),
        *_out_of_order(story, left),
        *_attempts(story, left),
        *_effects(story, left),
        *_counters(story, left),
        *(f"audit: {end.text}" for call in story.did("audit") for end in call.ends if end.text),
        *([] if left.integrity == "ok" else [f"the file is damaged: {left.integrity}"]),
        *([f"cannot be received: {left.undrained}"] if left.undrained else []),
    ]


def _calls(history: Iterable[Record]) -> list[Call]:
    """Pair what each task began with how it ended."""
    calls: list[Call] = []
    running: dict[tuple[str, int], Call] = {}
    for record in history:
        task = record.process, record.task
        if record.call in ("live", "stop"):
            continue
        if not record.outcome:
            running[task] = Call(record)
            calls.append(running[task])
        elif record.outcome != "failed":
            running[task].ends.append(record)
    return calls


def _over(lease: Record) -> float:
    """Return until when a lease runs for certain; of a worker's it is not known when it began."""
    return -inf if not lease.seconds else lease.began + lease.seconds - ROUNDING


# --- messages --------------------------------------------------------------------------------------------------------


def _lost(story: Story, left: Left) -> Iterator[str]:
    """Find messages that were confirmed, or seen, and then neither handled nor kept as dead letters."""
    for message, record in story.first_seen.items():
        if story.keeps(record) == "all" and not _has_ended(story, left, message):
            known = "confirmed" if message in story.stored else "seen"
            yield f"lost message {message}: {known}, never handled, not dead"


def _has_ended(story: Story, left: Left, message: str) -> bool:
    return bool(story.settled(message, "ack") or message in left.effects or message in left.dead)


def _lost_while_allowed(story: Story, left: Left) -> Iterator[str]:
    """Count what is missing of queues whose messages may be deleted, or dropped when they outlived their ttl."""
    missing = Counter(
        record.queue
        for message, record in story.first_seen.items()
        if story.keeps(record) == "while allowed" and not record.ttl and not _has_ended(story, left, message)
    )
    removed = Counter[str]()
    for call in story.did("purge", "cancel"):
        removed[call.begin.queue] += call.ends[0].count if call.ends else call.begin.limit
    for queue, count in missing.items():
        if count > removed[queue]:
            yield f"lost messages of {queue}: {count} are missing, and {removed[queue]} at most were deleted"


def _received_twice(story: Story, left: Left) -> Iterator[str]:
    """Find what was received twice though at most once was asked for, and count what nobody received."""
    missing = Counter[str]()
    for message, record in story.first_seen.items():
        if story.keeps(record) == "until received":
            if len(story.deliveries.get(message, ())) > 1:
                yield f"message {message} was received twice, at most once was asked for"
            missing[record.queue] += message not in story.deliveries and message not in left.dead
    for queue, count in missing.items():
        if count > (room := unseen_room(story, queue)):
            yield f"lost messages of {queue}: nobody received {count}, but kills can have hidden {room} at most"


def _invented(story: Story) -> Iterator[str]:
    keys = {call.begin.key for call in story.sends}
    for message, delivered in story.deliveries.items():
        if delivered[0].key not in keys:
            yield f"message {message} was never sent"


def _undone_but_there(story: Story, left: Left) -> Iterator[str]:
    """Find messages of sends that were refused, or undone with their transaction."""
    there = {record.key for record in story.first_seen.values()} | set(left.keys.values())
    meant = {call.begin.key for call in story.sends if call.outcome not in ("undone", "refused")}
    for call in story.sends:
        if call.outcome in ("undone", "refused") and call.begin.key in there - meant:
            yield f"the send of {call.begin.key} was {call.outcome}, and the message is there"


def _stored_twice(story: Story) -> Iterator[str]:
    """Find messages stored twice by one send, and sends that deduplication should have caught, or should not have."""
    ids: defaultdict[str, set[str]] = defaultdict(set)
    named: defaultdict[str, set[str]] = defaultdict(set)
    confirmed = Counter[str]()
    for message, record in story.first_seen.items():
        ids[record.key].add(message)
    for call in story.sends:
        if call.begin.dedup_key and call.outcome in ("done", "duplicate"):
            named[call.begin.dedup_key].add(call.ends[0].id)
        if call.begin.message_id and call.outcome == "done":
            confirmed[call.begin.message_id] += 1
        if call.outcome == "duplicate" and not call.begin.dedup_key and not call.begin.message_id:
            yield f"message {call.begin.key} was taken for a duplicate, but has no key to be known by"
    for key, messages in ids.items():
        if len(messages) > 1:
            yield f"message {key} was stored twice, as {', '.join(sorted(messages))}"
    for name, messages in named.items():
        if len(messages) > 1:
            yield f"unexplained duplicate: dedup_key {name} was stored as {', '.join(sorted(messages))}"
    for name, count in confirmed.items():
        if count > 1:
            yield f"unexplained duplicate: message_id {name} was stored {count} times"


def _at_the_wrong_time(story: Story) -> Iterator[str]:
    """Find deliveries before the delay was over, after the time to live, or while the queue was paused.

    Of a delivery to a worker (whose lease has no seconds) it is not known when it was asked for. What was sent back no
    longer expires; where the operator sends back all at once, it is not known what.
    """
    pauses = _pauses(story)
    for message, delivered in story.deliveries.items():
        sent = story.stored.get(message)
        for delivery in delivered:
            if sent and not delivery.epoch and delivery.ended < sent.began + sent.delay - ROUNDING:
                yield f"message {message} was delivered before its delay was over"
            if not delivery.seconds:
                continue
            if sent and _has_outlived(sent, delivery) and story.keeps(sent) == "all":
                yield f"message {message} was delivered after its time to live, as attempt {delivery.attempt}"
            if any(delivery.began > start and delivery.ended < over for start, over in pauses[delivery.queue]):
                yield f"message {message} was delivered while its queue was paused"


def _has_outlived(sent: Record, delivery: Record) -> bool:
    return bool(sent.ttl and not delivery.epoch and delivery.began > sent.ended + sent.ttl + TIMELY)


def _pauses(story: Story) -> defaultdict[str, list[Span]]:
    """Return when each queue was paused for certain: from a pause that had returned to the next resume's call."""
    pauses: defaultdict[str, list[Span]] = defaultdict(list)
    resumes = story.did("resume")
    for call in story.did("pause"):
        if call.ends:
            after = (one.begin.began for one in resumes if one.begin.began >= call.ends[0].ended)
            pauses[call.begin.queue].append((call.ends[0].ended, min(after, default=inf)))
    return pauses


# --- deliveries ------------------------------------------------------------------------------------------------------


def _acked_but_back(story: Story, left: Left) -> Iterator[str]:
    for message in story.first_seen:
        done = [call.ends[0] for call in story.settled(message, *ACKS) if call.outcome == "done"]
        if len(done) > 1:
            yield f"message {message} was acked twice, and both times it was confirmed"
        if done and message in left.dead:
            yield f"message {message} was acked and is a dead letter"
        for delivery in story.deliveries.get(message, ()):
            if done and delivery.seconds and delivery.began > done[0].ended:
                yield f"message {message} was acked, and then attempt {delivery.attempt} was delivered"


def causes(story: Story) -> Iterator[tuple[str, Record]]:
    """Yield why each message was delivered again; an empty cause is none."""
    for _, delivered in story.faithful():
        for before, again in pairwise(delivered):
            yield _cause(story, before, again), again


def _cause(story: Story, before: Record, again: Record) -> str:
    if again.epoch > before.epoch:
        return "redriven" if again.id in story.redriven else ""
    for call in story.held(before):
        if call.begin.call in ("nack", "release") and call.may_be_done and call.begin.began <= again.ended:
            return call.begin.call
    killed = story.killed.get(before.process)
    if killed is not None and killed.began <= again.ended:
        return killed.outcome
    return "" if any(again.ended < over for _, over in story.spans(before)) else "lease over"


def _unexplained(story: Story) -> Iterator[str]:
    for cause, again in causes(story):
        if not cause:
            yield f"unexplained duplicate: message {again.id} was delivered again as attempt {again.attempt}"


def _held_by_two(story: Story) -> Iterator[str]:
    """Find moments at which one message, or two of one group, were leased twice for certain."""
    held: defaultdict[str, list[tuple[float, float, Record]]] = defaultdict(list)
    for message, delivered in story.deliveries.items():
        for lease in delivered if story.keeps(delivered[0]) != "until received" else ():
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
    for message, delivered in story.faithful():
        for before, again in pairwise(delivered):
            for call in story.held(before):
                if call.outcome == "done" and call.begin.began > again.ended:
                    yield f"message {message}: a stale {call.begin.call} of attempt {before.attempt} was accepted"


def _refused_too_early(story: Story) -> Iterator[str]:
    """Find live leases that were refused to their holders."""
    for _, delivered in story.faithful():
        for lease in delivered:
            for call in story.held(lease):
                if call.outcome == "lease_lost" and any(call.ends[0].ended < over for _, over in story.spans(lease)):
                    yield f"message {lease.id}: its holder's {call.begin.call} was refused while its lease ran"


def _out_of_order(story: Story, left: Left) -> Iterator[str]:
    """Find deliveries in a group that came before an earlier message of the group could have been handled.

    What came back from the dead letters takes its old place, but those behind it may have gone meanwhile.
    """
    groups: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for message, record in story.first_seen.items():
        if record.group:
            groups[record.group][message] = record
    for group, members in groups.items():
        busy_until = -inf
        for message, sent in sorted(members.items(), key=lambda item: item[1].place):
            delivered = [delivery for delivery in story.deliveries.get(message, ()) if not delivery.epoch]
            if any(delivery.ended < busy_until for delivery in delivered):
                yield f"group order of {group} broken: message {message} at {sent.place} overtook those before it"
            if message not in left.dead and message not in story.redriven:
                acks = story.settled(message, *ACKS)
                busy_until = max(busy_until, min((call.begin.began for call in acks), default=inf))


def _attempts(story: Story, left: Left) -> Iterator[str]:
    """Count: attempts are deliveries less releases, so in the end each attempt has one delivery that was not released.

    Only a delivery to a process that was killed while it received may have gone unseen.
    """
    unseen = 0
    queues = set()
    for message, delivered in story.faithful():
        queues.add(delivered[0].queue)
        for epoch in {delivery.epoch for delivery in delivered}:
            times = Counter(delivery.attempt for delivery in delivered if delivery.epoch == epoch)
            is_last = epoch == left.epochs.get(message, 0)
            last = left.dead.get(message, max(times)) if is_last else max(times)
            released, perhaps = _releases(story, message, epoch)
            for attempt, count in times.items():
                if count > 1 + perhaps[attempt] or not 1 <= attempt <= last + (perhaps[attempt] > 0):
                    what = f"{count} deliveries as attempt {attempt} of {last}"
                    yield f"attempts of message {message} don't add up: {what}"
            unseen += sum(max(0, 1 + released[attempt] - times[attempt]) for attempt in range(1, last + 1))
    room = unseen_room(story, *queues)
    if unseen > room:
        hidden = f"kills can have hidden {room} at most"
        yield f"attempts don't add up: {unseen} deliveries were seen by nobody, but {hidden}"


def _releases(story: Story, message: str, epoch: int) -> tuple[Counter[int], Counter[int]]:
    """Return how often each attempt was given back for certain, and how often perhaps: who closes gives back."""
    released, perhaps = Counter[int](), Counter[int]()
    for call in story.settled(message, "release"):
        if call.begin.epoch == epoch:
            perhaps[call.begin.attempt] += 1
            released[call.begin.attempt] += call.outcome == "done"
    for delivery in story.deliveries[message]:
        perhaps[delivery.attempt] += delivery.epoch == epoch and _may_be_given_back(story, delivery)
    return released, perhaps


def _may_be_given_back(story: Story, delivery: Record) -> bool:
    settled = any(call.begin.call in SETTLES and call.ends for call in story.held(delivery))
    return delivery.process in story.ended and not settled


def unseen_room(story: Story, *queues: str) -> int:
    """Return how many deliveries may have been made to processes that were killed before they wrote them down.

    A worker that has stood still may have found a lease over before it had called the handler.
    """
    receives = (call for call in story.did("receive") if not call.ends and call.begin.queue in (*queues, ""))
    return sum(call.begin.limit for call in receives) + sum(stop.limit for stop in story.stops)


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
    dead = sum(queue == left.queue for queue in left.queues.values()) if left.queues else len(left.dead)
    if counted["dead"] != dead:
        yield f"counters: {counted['dead']} dead, but there are {dead} dead letters"
    hidden_by_ends = unseen_room(story, left.queue) + sum(
        _may_be_given_back(story, delivery) for _, delivered in story.faithful() for delivery in delivered
    )
    for counter, verbs, outcome in (
        ("sent", ("send",), "done"),
        ("duplicates", ("send",), "duplicate"),
        ("received", ("receive",), "done"),
        ("acked", ACKS, "done"),
        ("nacked", ("nack",), "done"),
        ("released", ("release",), "done"),
    ):
        calls = [call for call in story.did(*verbs) if call.begin.queue in (left.queue, "")]
        least = sum(end.outcome == outcome for call in calls for end in call.ends)
        most = least + sum(call.begin.limit or 1 for call in calls if not call.ends)
        if counter in ("received", "released"):
            most += hidden_by_ends
        if not least <= counted[counter] <= most:
            yield f"counters: {counter} is {counted[counter]}, but by the history it is {least} to {most}"
