"""A toy engine: dictionaries in memory, for one event loop. It proves that the seam is one, and shows how to write one.

Engines with the same `Store` are engines on the same storage. What one claims in `features` is held to the contract by
`tests/test_memory.py`; all else is refused when it is asked for.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from filao import engine as seam
from filao.codec import seen_body, seen_headers
from filao.engine import Draft, Feature, Receive, Send, State, instant
from filao.engines.waiters import Lines, Place
from filao.errors import ConfigurationError, FilaoError, LeaseLost, UnsupportedFeature
from filao.queue import Queue, not_found, retry_delay

RULES = ("ttl", "on_expiry", "dedup_window", "max_length", "overflow", "group_failure", "group_dead")  # not kept here


@dataclass(slots=True)
class Row:
    told: seam.Delivery  # with the token of the last lease, until that is settled; 0: there is none
    at: float  # seconds since 1970, when it is due, its lease ends, or it died
    holder: object = None
    reason: str | None = None  # of a dead letter
    history: tuple[seam.Failure, ...] = ()  # the last one

    def state(self, now: float) -> State:
        if self.reason is not None:
            return State.DEAD
        return State.READY if self.at <= now else State.LEASED if self.told.token else State.DELAYED

    def end(self, now: float, failure: str = "", error: str = "", used: int = 0) -> None:
        """End its lease, with a failure or with another number of attempts used."""
        self.told, self.at = replace(self.told, token=0, attempt=self.told.attempt + used), now
        if failure:
            self.history = (seam.Failure(self.told.attempt, instant(round(now * 1000)), failure, error, ""),)


class Store:
    """The storage, and what operators do with it: see `filao.engine.Operators`."""

    pausing = tracing = None

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.rules: dict[str, Queue] = {}
        self.rows: dict[str, dict[int, Row]] = {}  # by queue and place in the order of sending
        self.engines: list[MemoryEngine] = []
        self.sent = 0

    def of(self, queue: str, *states: State, ids: Iterable[str] | None = None) -> list[Row]:
        """Return the messages in these states, in their order. Raises `QueueNotFound`."""
        if queue not in self.rows:
            raise not_found(queue, self.rows)
        now = self.clock()
        found = [row for row in self.rows[queue].values() if row.state(now) in states]
        found.sort(key=lambda row: (-row.told.priority * (row.reason is None), row.told.handle))
        return found if ids is None else [row for row in found if row.told.id in ids]

    async def queues(self) -> list[Queue]:
        return [self.rules[name] for name in sorted(self.rules)]

    async def delete(self, queue: str) -> int:
        held = len(self.of(queue, *State))
        if not held:
            del self.rows[queue], self.rules[queue]
        return held

    async def stats(self, queue: str | None = None) -> list[seam.QueueStats]:
        names = sorted(self.rows) if queue is None else [queue]
        told: list[dict[str, Any]] = [{"name": n} | {str(s): len(self.of(n, s)) for s in State} for n in names]
        return [seam.QueueStats(paused=False, oldest_ready_age=None, **one) for one in told]

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[seam.StoredMessage]:
        rows = self.of(queue, state)
        names = [row.told.id for row in rows]
        if after not in (None, *names):
            raise ConfigurationError(f"queue {queue!r}: there is no message {after!r} to go on behind; begin again")
        first = 0 if after is None else names.index(after) + 1
        return [_stored(row, state) for row in rows[first : first + limit]]

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        dead = self.of(queue, State.DEAD, ids=ids)[:limit]
        for row in dead:
            row.end(self.clock(), used=-row.told.attempt)
            row.reason = None
            if edited is not None:
                new = {"kind": edited.kind, "content": edited.content, "headers": edited.headers or row.told.headers}
                row.told = replace(row.told, **new)
        self.call(queue)
        return len(dead)

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        found = self.of(queue, *states, ids=ids)
        for row in found:
            del self.rows[queue][row.told.handle]
        return len(found)

    async def report(self, state: str) -> None: ...

    async def doctor(self) -> list[seam.Finding]:
        return [seam.Finding("memory", "warning", "all that is here is lost when the process ends")]

    def call(self, queue: str) -> None:
        """Let all who wait for a queue look."""
        for line in [engine.lines[queue] for engine in self.engines if queue in engine.lines]:
            line.call()


class MemoryEngine:
    """See `filao.engine.Engine`."""

    name = "a dictionary"
    features: frozenset[Feature] = frozenset(
        map(Feature, ("leases", "fencing", "release", "place", "delay", "priorities", "atomic", "dead_letters"))
    )
    emulated: frozenset[Feature] = frozenset()
    concurrent_batches = 1
    transactions: None = None

    def __init__(self, store: Store) -> None:
        self.operators = store
        self.lines = Lines()

    async def open(self) -> None:
        self.operators.engines.append(self)

    def sibling(self) -> None: ...

    async def close(self) -> None:
        self.drop()

    def drop(self) -> None:
        self.operators.engines.remove(self)
        self.lines.close()
        for queue in self.operators.rows:
            for row in self.operators.of(queue, State.LEASED):
                if row.holder is self:
                    row.end(self.operators.clock(), used=-1)
            self.operators.call(queue)

    async def declare(self, queue: Queue) -> None:
        _refuse(queue.name, queue, Queue("default"), RULES)
        self.operators.rules[queue.name] = queue
        self.operators.rows.setdefault(queue.name, {})

    async def find(self, queue: str) -> Queue:
        self.operators.of(queue)
        return self.operators.rules[queue]

    async def execute(self, batch: seam.Batch) -> Sequence[seam.Result]:
        operations = batch.take(lambda _: True)
        results = [self._result(operation) for operation in operations]
        for operation in operations:
            if not isinstance(operation, Receive):
                self.operators.call(operation.queue if isinstance(operation, Send) else operation.delivery.queue)
        return results

    def waiter(self, receive: Receive, submit: seam.Submit, abandoned: seam.Abandoned) -> Place:
        return self.lines.place(receive, submit, abandoned)

    def _result(self, operation: seam.Operation) -> seam.Result:
        try:
            if isinstance(operation, Send | Receive):
                self.operators.of(operation.queue)
                return self._send(operation) if isinstance(operation, Send) else self._receive(operation)
            about = operation.delivery
            row = self.operators.rows.get(about.queue, {}).get(about.handle)
            if row is None or row.told.token != about.token:
                raise LeaseLost(f"message {about.id} of queue {about.queue!r}: its lease was lost; nothing was changed")
            if isinstance(operation, seam.Settle):
                self._settle(about.queue, row, operation.outcome)
            else:
                row.at = self.operators.clock() + operation.seconds
        except FilaoError as error:
            return error
        return None

    def _send(self, send: Send) -> list[seam.Receipt]:
        store, salt, now, receipts = self.operators, secrets.token_hex(8), self.operators.clock(), list[seam.Receipt]()
        for draft in send.drafts:
            _refuse(send.queue, draft, Draft(0, b""), ("group", "dedup_key", "ttl"))
        for draft in send.drafts:
            store.sent += 1
            name = draft.message_id or f"{salt}-{store.sent}"
            terms = (draft.priority, None, None, draft.message_id, draft.headers, draft.kind, draft.content)
            told = seam.Delivery(send.queue, name, store.sent, 0, 0, *terms, sent_at=round(now * 1000), failures=0)
            store.rows[send.queue][told.handle] = Row(told, now + draft.delay)
            receipts.append(seam.Receipt(told.id))
        return receipts

    def _receive(self, receive: Receive) -> seam.Received:
        store, now, taken = self.operators, self.operators.clock(), list[seam.Delivery]()
        for row in store.of(receive.queue, State.READY):
            if len(taken) == receive.limit:
                break
            if row.told.token:  # its lease is over, and its holder was silent
                row.end(now, "lease_expired")
            if row.told.attempt >= store.rules[receive.queue].max_attempts:
                row.reason = "max_attempts"
                continue
            row.told = replace(row.told, token=secrets.randbits(62) + 1, attempt=row.told.attempt + 1)
            row.at, row.holder = now + (receive.lease or store.rules[receive.queue].lease), self
            taken.append(row.told)
        later = store.of(receive.queue, State.DELAYED, State.LEASED)
        return seam.Received(taken, min((row.at - now for row in later), default=None))

    def _settle(self, queue: str, row: Row, outcome: seam.Outcome) -> None:
        now = self.operators.clock()
        if isinstance(outcome, seam.Ack):
            del self.operators.rows[queue][row.told.handle]
        elif isinstance(outcome, seam.Release):
            row.end(now + outcome.delay, used=-1)
        elif isinstance(outcome, seam.Reject):
            row.reason = "malformed" if outcome.malformed else "rejected"
            row.end(now, row.reason, outcome.error)
        else:
            backoff = retry_delay(self.operators.rules[queue], row.told.attempt, random.random())
            row.end(now, "nacked", outcome.error)
            row.reason = "max_attempts" if backoff is None else None
            row.at += (backoff or 0.0) if outcome.delay is None else outcome.delay


def _refuse(queue: str, given: object, default: object, names: Sequence[str]) -> None:
    for name in names:
        if getattr(given, name) != getattr(default, name):
            raise UnsupportedFeature(f"queue {queue!r}: a dictionary has no {name}; SQLite and PostgreSQL have it")


def _stored(row: Row, state: State) -> seam.StoredMessage:
    told, at = row.told, instant(round(row.at * 1000))
    body, headers = seen_body(told.kind, told.content), seen_headers(told.headers)
    about = (told.id, told.queue, state, body, headers, told.attempt, told.priority, None, None)
    return seam.StoredMessage(*about, instant(told.sent_at), at, None, row.reason, row.history)
