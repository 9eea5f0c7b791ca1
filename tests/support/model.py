"""A queue in plain Python: what Filao's SQL must do, without SQL, indexes, batches or counters kept in passing.

It has no ready, delayed and blocked states: a message is pending, leased or dead, and who may be received is worked out
from scratch each time. Time is in milliseconds, and, as in the engine, is looked at when something is received.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from filao.queue import Queue, retry_delay

Settlement = Literal["ack", "nack", "reject", "release"]


@dataclass
class Held:
    """A message of the model; its number is its place in the order of sending."""

    number: int
    body: int
    priority: int
    group: str | None
    dedup_key: str | None
    message_id: str | None
    at: int
    expires_at: int | None
    state: Literal["pending", "leased", "dead"] = "pending"
    attempts: int = 0
    lease: int = 0
    reason: str = ""


@dataclass
class Terms:
    """What the messages of one send have in common."""

    priority: int
    group: str | None
    delay: int
    ttl: int | None


@dataclass
class Model:
    """One queue, one clock."""

    queue: Queue
    now: int
    messages: dict[int, Held] = field(default_factory=dict)
    keys: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Of a dedup_key as it is, and of a message_id behind a #: who has it, and until when; None: while it is pending.
    """
    halted: set[str] = field(default_factory=set)
    last: int = 0
    leases: int = 0

    def send(
        self, bodies: Sequence[int], keys: Sequence[tuple[str | None, str | None]], terms: Terms
    ) -> list[int] | None:
        """Return the numbers of the messages, or of those that they repeat; None when the queue is full."""
        before = dict(self.keys)
        number = self.last
        numbers: list[int] = []
        new: list[tuple[int, int, str | None, str | None]] = []
        for body, (dedup_key, message_id) in zip(bodies, keys, strict=True):
            names = [name for name in (dedup_key, message_id and f"#{message_id}") if name is not None]
            first = next((self.keys[name][0] for name in names if self._is_known(name)), None)
            if first is None:
                number += 1
                new.append((number, body, dedup_key, message_id))
                self.keys.update(dict.fromkeys(names, (number, None)))
            numbers.append(number if first is None else first)
        pending = len(self._in("pending", "leased"))
        if new and self.queue.max_length is not None and pending + len(new) > self.queue.max_length:
            self.keys = before
            return None
        for number, body, dedup_key, message_id in new:
            expires_at = None if terms.ttl is None else self.now + terms.ttl
            self.messages[number] = Held(
                number, body, terms.priority, terms.group, dedup_key, message_id, self.now + terms.delay, expires_at
            )
        self.last = number
        return numbers

    def receive(self, limit: int) -> list[tuple[int, int]]:
        """Return the numbers received and the lease of each."""
        self._look_at_the_time()
        received: list[tuple[int, int]] = []
        while len(received) < limit and (ready := [held for held in self._in("pending") if self._is_ready(held)]):
            first = min(ready, key=lambda held: (-held.priority, held.number))
            self.leases += 1
            first.state, first.lease, first.attempts = "leased", self.leases, first.attempts + 1
            first.at = self.now + round(self.queue.lease * 1000)
            received.append((first.number, first.lease))
        return sorted(received, key=lambda one: (-self.messages[one[0]].priority, one[0]))

    def settle(self, number: int, lease: int, how: Settlement, delay: int = 0) -> bool:
        """Return whether the lease was still the message's last; `delay` is of a release, in milliseconds."""
        held = self.messages.get(number)
        if held is None or held.lease != lease:
            return False
        held.lease = 0
        if how == "ack":
            self._end(held)
        elif how == "reject":
            self._die(held, "rejected")
        elif how == "release":
            held.attempts -= 1
            held.state, held.at = "pending", self.now + delay
        else:
            self._fail(held)
        return True

    def extend(self, number: int, lease: int, milliseconds: int) -> bool:
        """Return whether the lease was still the message's last."""
        held = self.messages.get(number)
        if held is None or held.lease != lease:
            return False
        held.at = self.now + milliseconds
        return True

    def redrive(self, limit: int) -> int:
        """Return how many dead letters were sent back."""
        dead = self._in("dead")[:limit]
        for held in dead:
            held.state, held.at, held.attempts, held.expires_at, held.reason = "pending", self.now, 0, None, ""
            if held.dedup_key is not None and (self._has_its_key(held) or not self._is_known(held.dedup_key)):
                self.keys[held.dedup_key] = (held.number, None)
        return len(dead)

    def cancel(self, number: int) -> bool:
        """Return whether the message waited."""
        held = self.messages.get(number)
        if held is None or held.state != "pending":
            return False
        self._end(held)
        return True

    def purge(self) -> int:
        """Return how many waited."""
        pending = self._in("pending")
        for held in pending:
            del self.messages[held.number]
            self._forget(held, held.message_id)
        return len(pending)

    def count(self, state: Literal["pending", "leased", "dead"]) -> int:
        """Return how many messages are in a state."""
        return len(self._in(state))

    def _in(self, *states: str) -> list[Held]:
        return [held for held in self.messages.values() if held.state in states]

    def _look_at_the_time(self) -> None:
        for held in self._in("leased"):
            if held.at <= self.now:
                if held.attempts >= self.queue.max_attempts:
                    self._die(held, "max_attempts")
                else:
                    held.state, held.at = "pending", self.now
        self.let_expire()

    def let_expire(self) -> None:
        """End messages that outlived their ttl: they do not count any more."""
        for held in self._in("pending"):
            if held.expires_at is not None and held.expires_at <= self.now:
                if self.queue.on_expiry == "drop":
                    self._end(held)
                    self._forget(held, held.message_id)
                else:
                    self._die(held, "expired")
                self._forget(held, None)

    def _is_ready(self, held: Held) -> bool:
        if held.group is None:
            return held.at <= self.now
        if held.group in self.halted or any(other.group == held.group for other in self._in("leased")):
            return False
        others = [other for other in self._in("pending") if other.group == held.group]
        if self.queue.group_failure == "skip":
            others = [other for other in others if other.at <= self.now]
        return held.at <= self.now and all(held.number <= other.number for other in others)

    def _fail(self, held: Held) -> None:
        delay = retry_delay(self.queue, held.attempts, 0.0)
        if delay is None:
            self._die(held, "max_attempts")
        else:
            held.state, held.at = "pending", self.now + round(delay * 1000)

    def _die(self, held: Held, reason: str) -> None:
        held.state, held.reason, held.lease = "dead", reason, 0
        self._start_window(held, None)  # it lies there under its message_id, which stays known
        if held.group is not None and self.queue.group_dead == "halt":
            self.halted.add(held.group)

    def _end(self, held: Held) -> None:
        del self.messages[held.number]
        self._start_window(held, held.message_id)

    def _is_known(self, dedup_key: str) -> bool:
        _, until = self.keys.get(dedup_key, (0, 0))
        return until is None or until > self.now

    def _has_its_key(self, held: Held) -> bool:
        return self.keys.get(held.dedup_key or "", (0, 0))[0] == held.number

    def _names(self, held: Held, message_id: str | None) -> list[str]:
        """Return those of a message's keys that are remembered as its own."""
        names = [name for name in (held.dedup_key, message_id and f"#{message_id}") if name is not None]
        return [name for name in names if self.keys.get(name, (0, 0))[0] == held.number]

    def _start_window(self, held: Held, message_id: str | None) -> None:
        for name in self._names(held, message_id):
            self.keys[name] = (held.number, self.now + round(self.queue.dedup_window * 1000))

    def _forget(self, held: Held, message_id: str | None) -> None:
        for name in self._names(held, message_id):
            del self.keys[name]


class QuorumModel:
    """A queue as RabbitMQ keeps one, without delays, which need a clock: it differs from `Model` where the docs say so.

    What is given back comes before all that is ready, in the order in which it was given back; what is redriven comes
    behind it. Whatever comes back has used an attempt, released or not.
    """

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.returned: deque[tuple[int, int]] = deque()
        """A message's body, and the attempts that it has used."""
        self.ready: deque[tuple[int, int]] = deque()
        self.held: dict[int, int] = {}
        self.dead: deque[tuple[int, str]] = deque()

    def send(self, body: int) -> None:
        """Store a message."""
        self.ready.append((body, 0))

    def receive(self, limit: int) -> list[tuple[int, int]]:
        """Return bodies and their attempts."""
        while self.returned or self.ready:
            taken = [(self.returned or self.ready).popleft() for _ in range(min(limit, self.waiting))]
            self.dead += [(body, "max_attempts") for body, used in taken if used >= self.max_attempts]
            alive = [(body, used + 1) for body, used in taken if used < self.max_attempts]
            self.held.update(alive)
            if alive:
                return alive
        return []

    def settle(self, body: int, how: Settlement) -> None:
        """End a lease."""
        attempt = self.held.pop(body)
        if how == "reject":
            self.dead.append((body, "rejected"))
        elif how == "nack" and attempt >= self.max_attempts:
            self.dead.append((body, "max_attempts"))
        elif how != "ack":
            self.returned.append((body, attempt))

    def redrive(self, limit: int) -> int:
        """Return how many dead letters were sent back."""
        redriven = [self.dead.popleft() for _ in range(min(limit, len(self.dead)))]
        self.ready += [(body, 0) for body, _ in redriven]
        return len(redriven)

    def purge(self) -> int:
        """Return how many were ready."""
        purged = self.waiting
        self.returned.clear()
        self.ready.clear()
        return purged

    @property
    def waiting(self) -> int:
        """How many are ready."""
        return len(self.returned) + len(self.ready)
