"""What a storage engine must do: one Protocol for each of its users, and the records that cross them.

The seam is cut at the verbs of a queue, never at SQL or AMQP. The data plane is one method, `execute`: a batch of
operations goes in, and one result for each comes out. An operation that cannot be done (an unknown queue, a full one, a
lost lease) has its `FilaoError` as its result and changes nothing; an exception means that nothing of the batch was
done. Durations are seconds; the engine's own clock turns them into instants. `moving.py` is about moving queues.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, Protocol, runtime_checkable

import msgspec

from filao.errors import EngineError, FilaoError
from filao.queue import Queue, T

EVENTS_MAX = 1_000  # events that one look at the history of a message returns
HISTORY_MAX = 20  # failed attempts that are remembered of one message
LEASES_LOOKED_AT = 1_000  # by `stats`, of each queue: a millisecond, however many are held
INSTANT_MAX = 253_402_300_799_000  # milliseconds: the end of the year 9999, the last one that Python knows
REASONS = ("max_attempts", "rejected", "expired", "malformed", "overflow")  # why a message is a dead letter
FAILURES = ("nacked", "rejected", "malformed", "crashed", "lease_expired", "expired", "overflow")
"""How an attempt failed."""
EDITED = "edited"  # the detail of a redrive with another body


class Feature(StrEnum):
    """What an engine may or may not be able to do; a queue that needs more is refused when it is declared."""

    LEASES = "leases"
    """A lease ends after a time and can be extended. Without this, it ends with its connection."""
    LIVENESS = "liveness"
    """The leases of a process that died are taken over at once, not when they run out."""
    FENCING = "fencing"
    """A late settle is refused once another consumer has the message."""
    RELEASE = "release"
    """A release gives the attempt back."""
    PLACE = "place"
    """A message that was delayed or redriven comes back to its old place."""
    GROUPS = "groups"
    """`group=` keeps the order of a key while consumers compete."""
    PRIORITIES = "priorities"
    """`priority=` goes before the order of sending."""
    DELAY = "delay"
    """`delay=`, and a backoff between attempts."""
    TTL = "ttl"
    """A message that outlived its `ttl` is a dead letter, not delivered."""
    DROP = "drop"
    """... or is dropped, where the queue says so."""
    DEDUPLICATION = "deduplication"
    """A send repeated with its `dedup_key` or `message_id` is stored once."""
    MAX_LENGTH = "max_length"
    """`max_length` is kept exactly."""
    ATOMIC = "atomic"
    """`send_many` stores all or none."""
    TRANSACTIONS = "transactions"
    """Work, sends and the acknowledgement commit together."""
    WITHIN = "within"
    """Sends can join a transaction that the user holds on the engine's database."""
    DEAD_LETTERS = "dead_letters"
    """Dead letters can be looked at, mended and redriven."""
    HISTORY = "history"
    """Each failed attempt is remembered with its error."""
    PEEK = "peek"
    """What waits or is held can be looked at, and cancelled one by one."""
    PAUSE = "pause"
    """The deliveries of a queue can be stopped."""
    TRACE = "trace"
    """Each event in the life of a message is remembered, where the queue says so."""
    COUNTERS = "counters"
    """`stats` counts all that ever happened. Without this, only what is ready and what is dead; all else is 0."""


class State(StrEnum):
    """Where a message stands; the package's docstring draws how it moves."""

    READY = "ready"
    DELAYED = "delayed"
    LEASED = "leased"
    BLOCKED = "blocked"
    DEAD = "dead"


class OpenAgain(EngineError):
    """An open engine lost its storage for good. A sound one is in its place: open a new engine on it."""


class Receipt(msgspec.Struct, frozen=True):
    """What a sender gets once its message is durable."""

    id: str
    duplicate: bool = False
    """True when a message with the same `dedup_key` or `message_id` was already there: `id` is that one's."""


class Delivery(msgspec.Struct, frozen=True):
    """A leased message as its engine hands it over; `handle` and `token` are the engine's own proof of the lease."""

    queue: str
    id: str
    handle: int
    token: int
    attempt: int
    priority: int
    group: str | None
    dedup_key: str | None
    message_id: str | None
    headers: str | None
    kind: int
    content: bytes
    sent_at: int
    """Milliseconds since 1970."""
    failures: int
    """How many failed attempts its history holds."""
    crashed: bool = False
    """Whether the process of its last consumer died: the message itself may have killed it."""


class Ack(msgspec.Struct, frozen=True):
    """Done: delete it."""

    before_work: bool = False
    """The message is received at most once: it must be gone before the work begins."""


class Nack(msgspec.Struct, frozen=True):
    """Failed: again after `delay` seconds (None: the queue's backoff), or dead when its attempts are spent."""

    delay: float | None = None
    error: str = ""


class Reject(msgspec.Struct, frozen=True):
    """Failed for good: a dead letter."""

    error: str = ""
    malformed: bool = False


class Release(msgspec.Struct, frozen=True):
    """Not done and not failed: back to its old place, at once or after `delay` seconds, the attempt given back."""

    delay: float = 0.0


Outcome = Ack | Nack | Reject | Release


class Draft(msgspec.Struct, frozen=True):
    """A message before it has an identity: checked and encoded."""

    kind: int
    content: bytes
    headers: str | None = None
    delay: float = 0.0
    priority: int = 0
    group: str | None = None
    dedup_key: str | None = None
    ttl: float | None = None
    message_id: str | None = None


class Send(msgspec.Struct, frozen=True):
    """Store the drafts, all or none; its result is a list of receipts."""

    queue: str
    drafts: Sequence[Draft]


class Receive(msgspec.Struct, frozen=True):
    """Lease up to `limit` messages; its result is `Received`."""

    queue: str
    limit: int
    lease: float | None = None
    """Seconds; None: the queue's rule."""
    waiting: int = 0
    """How many callers are about to wait if there is nothing for them: wake them when there is."""


class Received(msgspec.Struct, frozen=True):
    """What a `Receive` got."""

    deliveries: list[Delivery]
    due_in: float | None = None
    """If fewer came than were asked for: the seconds until the queue's next delay or lease ends."""
    took: float = 0.0
    """For tracers: the seconds that the successful look took; 0 when there are none."""


class Settle(msgspec.Struct, frozen=True):
    """End a lease, in one of the ways that `Outcome` lists; its result is None."""

    delivery: Delivery
    outcome: Outcome

    @property
    def queue(self) -> str:
        """The name of the message's queue."""
        return self.delivery.queue


class Extend(msgspec.Struct, frozen=True):
    """Let a lease end `seconds` from now; its result is None."""

    delivery: Delivery
    seconds: float

    @property
    def queue(self) -> str:
        """The name of the message's queue."""
        return self.delivery.queue


Operation = Send | Receive | Settle | Extend
Result = list[Receipt] | Received | None | FilaoError
Abandoned = Callable[[Result], None]
"""Is told the result of an operation whose caller was cancelled while it was being done."""
Submit = Callable[[Operation], "asyncio.Future[Result]"]
"""Does an operation with the next batch."""


class Failure(msgspec.Struct, frozen=True):
    """One failed attempt in the history of a message."""

    attempt: int
    at: datetime
    outcome: str
    """nacked, rejected, malformed, crashed (its process died), lease_expired, expired (its ttl) or overflow."""
    error: str
    """What the consumer said, with the traceback of an exception; empty if it said nothing."""
    consumer: str
    """The host and process that held the lease."""


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a message of a queue with `history=True`."""

    queue: str
    at: datetime
    what: str
    """sent, received, extended, released, acked; as `Failure.outcome`; died; redriven, cancelled, purged or dropped."""
    attempt: int
    by: str
    """The host and process that did it or held the lease; for the user's own transaction on PostgreSQL, its
    `application_name` or role. Empty when time did it.
    """
    detail: str = ""
    """What a consumer said of a failure; a death's reason; an extension's seconds; edited: redriven with a new body."""


class StoredMessage(msgspec.Struct, Generic[T], frozen=True):
    """A message as operators see it: looking at it changes nothing."""

    id: str
    queue: str
    state: State
    body: T
    """Of the type of the `Queue` that was given to the call. If only a name was given, or the body is not of that
    type, it is the JSON value, or bytes if it is not valid JSON.
    """
    headers: dict[str, str]
    attempts: int
    priority: int
    group: str | None
    dedup_key: str | None
    sent_at: datetime
    at: datetime
    """Delayed: when it is due. Leased: when the lease ends. Dead: when it died. Otherwise: since when."""
    expires_at: datetime | None
    reason: str | None = None
    """Of a dead letter: max_attempts, rejected, expired, malformed or overflow."""
    history: tuple[Failure, ...] = ()
    """The last 20 failed attempts, the oldest first."""
    consumer: str = ""
    """Of a leased message: the host and process that hold it."""

    @property
    def error(self) -> str:
        """The last error that was recorded."""
        return self.history[-1].error if self.history else ""


class Batch(msgspec.Struct, frozen=True):
    """Operations that wait to be done as one."""

    receives: bool
    """Whether there is a receive among them."""
    writes: bool
    """Whether there is anything else among them, which must be durable."""
    take: Callable[[Callable[[Operation], bool]], list[Operation]]
    """Called once, when the engine can begin: takes all that wait, in order, up to the first that is not accepted."""
    since: float
    """When the first of them began to wait, by the loop's clock: the engine's time limit counts from then."""


class Receiver(msgspec.Struct, frozen=True):
    """A process that receives from a queue: it waits for messages there, or holds some."""

    name: str
    """Its host and process."""
    held: int
    """How many of the queue's messages it holds, among the 1,000 leases that end first."""
    since: datetime
    """When it first received anything."""
    worker: str = ""
    """How its worker is, in the worker's own words; empty when the process runs none."""
    reported_ago: float | None = None
    """Seconds since the worker said so. After 20 s, do not rely on it."""


class QueueStats(msgspec.Struct, frozen=True):
    """The counters of a queue, kept in the transactions that change them: reading them costs the same at any depth.

    Always: sent = ready + delayed + blocked + leased + dead + acked + dropped + purged + cancelled.
    """

    name: str
    paused: bool
    ready: int
    """Could be received now."""
    delayed: int
    """Wait for their time: sent with a delay, or failed and backing off."""
    blocked: int
    """Wait behind another message of their group."""
    leased: int
    """Held by a consumer."""
    dead: int
    """Given up: dead letters."""
    oldest_ready_age: float | None
    """Seconds since the oldest ready message was sent."""
    sent: int = 0
    """Stored, ever."""
    duplicates: int = 0
    """Sends that found their message already there."""
    refused: int = 0
    """Sends that found the queue full."""
    received: int = 0
    """Deliveries, ever: a message delivered twice counts twice."""
    acked: int = 0
    """Done and gone, including those received at most once."""
    late: int = 0
    """Settles and extends that came after the lease had ended, but before another consumer took the message."""
    nacked: int = 0
    released: int = 0
    lost: int = 0
    """Leases that ended without a settle: the consumer died, or took too long."""
    died: int = 0
    """Messages that became dead letters, ever."""
    dropped: int = 0
    """Messages that outlived their ttl in a queue whose rule is to drop them."""
    redriven: int = 0
    purged: int = 0
    cancelled: int = 0
    oldest_delayed_age: float | None = None
    """Seconds since the first delayed message was due; None while none is. If it grows, nobody receives."""
    oldest_leased_age: float | None = None
    """Seconds since the oldest leased message was sent, among the 1,000 whose leases end first."""
    oldest_blocked_age: float | None = None
    """Seconds since the oldest blocked message was sent."""
    oldest_dead_age: float | None = None
    """Seconds since the oldest dead letter was sent."""
    dead_by_reason: dict[str, int] = {}
    """The present dead letters, by their reason."""
    died_by_reason: dict[str, int] = {}
    """The messages that ever became dead letters, by their reason. It began with those that were still there."""
    receivers: tuple[Receiver, ...] = ()
    """The processes that receive from it, by name: 1,000 at most."""

    def oldest_age(self, state: State | str) -> float | None:
        """Return the field `oldest_<state>_age`."""
        age: float | None = getattr(self, f"oldest_{State(state)}_age")
        return age


class Finding(msgspec.Struct, frozen=True):
    """One thing that the doctor looked at."""

    subject: str
    level: str
    """ok, note, warning or error."""
    text: str


class Waiter(Protocol):
    """A place to wait, taken before the first look, so that nothing that comes in between is missed."""

    def is_behind(self) -> bool:
        """Return whether others of this process already wait and will be called, so that a look would find nothing."""
        ...

    def wait(self, due_in: float | None, timeout: float | None) -> "asyncio.Future[Received]":
        """Return what the receive gets once there is something; nothing after `timeout`, or when the engine closes.

        `due_in` is the one of the look before. Cancel the future to stop waiting.
        """
        ...


class EngineTransaction(Protocol):
    """A transaction on the engine's database: before it commits, nothing in it is kept or visible to others."""

    async def execute(self, sql: str, parameters: Any) -> list[Any]:
        """Run one statement of the user's and return its rows."""
        ...

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Do operations as part of this transaction."""
        ...


class Transactions(Protocol):
    """What an engine with `Feature.TRANSACTIONS` and `Feature.WITHIN` hands out."""

    def begin(self) -> AbstractAsyncContextManager[EngineTransaction]:
        """Begin a transaction, which commits durably when the block is left, and is undone by an exception."""
        ...

    def send_within(self, connection: object, operation: Send) -> list[Receipt] | FilaoError:
        """Do a send in the transaction that the user holds on `connection`, on the user's own thread."""
        ...


class Pausing(Protocol):
    """What operators can do on an engine with `Feature.PAUSE`."""

    async def pause(self, queue: str, *, paused: bool) -> None:
        """Stop or resume deliveries; sends go on."""

    async def pause_group(self, queue: str, group: str, *, paused: bool) -> None:
        """Halt a group as a dead letter does, or let it go on. Raises `ConfigurationError` if no group can halt."""


class Tracing(Protocol):
    """What operators can do on an engine with `Feature.TRACE`."""

    async def trace(self, message_id: str) -> list[Event]:
        """Return what happened to the messages with this id, the oldest event first; the last 1,000 at most."""
        ...


class Operators(Protocol):
    """What people who look after queues need. All raise `QueueNotFound`; what each touches is fixed when it begins."""

    @property
    def pausing(self) -> Pausing | None:
        """None where a queue cannot be paused."""
        ...

    @property
    def tracing(self) -> Tracing | None:
        """None where no events are remembered."""
        ...

    async def queues(self) -> list[Queue[Any]]:
        """Return every declared queue with its rules, by name."""
        ...

    async def delete(self, queue: str) -> int:
        """Delete a queue, with its rules and counters, if it holds no message; return how many it holds."""
        ...

    async def stats(self, queue: str | None = None) -> list[QueueStats]:
        """Return the counters of every queue, by name, or of one."""
        ...

    async def peek(self, queue: str, state: State, *, limit: int, after: str | None) -> list[StoredMessage]:
        """Return messages in order, from the one behind the id `after`, and change nothing."""
        ...

    async def redrive(self, queue: str, ids: Sequence[str] | None, limit: int | None, edited: Draft | None) -> int:
        """Make dead letters ready again, in their old places, with fresh attempts; `edited` replaces their content."""
        ...

    async def remove(self, queue: str, states: Sequence[State], ids: Sequence[str] | None) -> int:
        """Delete messages in these states (`ids`: only those) and return how many were deleted."""
        ...

    async def report(self, state: str) -> None:
        """Record how this process is doing, for the doctor; an engine that keeps no list of processes does nothing."""

    async def doctor(self) -> list[Finding]:
        """Examine the storage and say what an operator should know."""
        ...


@runtime_checkable
class Immediate(Protocol):
    """An engine that can do operations in the calling thread: see `filao.outside`."""

    @property
    def takes_turns(self) -> bool:
        """Whether other processes wrote, too, between its last two transactions."""
        ...

    def at_once(self, operations: Sequence[Operation], results: list[Result]) -> bool:
        """Do operations durably in the calling thread, if nobody must be waited for; return whether they were done.

        An exception means that none was done; if the disk failed or it interrupts, those with a result may have been.
        """
        ...


class Engine(Protocol):
    """The storage that keeps the promises, as a broker needs it. One engine belongs to one event loop.

    Each of its other users gets an object: `transactions`, `operators` and, where queues can be moved to another
    engine, the `mover` of `filao.moving.Movable`.
    """

    @property
    def name(self) -> str:
        """Its name for users, as in error texts."""
        ...

    @property
    def features(self) -> frozenset[Feature]: ...

    @property
    def emulated(self) -> frozenset[Feature]:
        """What it can only imitate, at a price, for queues that ask for it with `emulate=`."""
        ...

    @property
    def concurrent_batches(self) -> int:
        """How many batches it does at once."""
        ...

    @property
    def transactions(self) -> Transactions | None:
        """None where nothing can commit together with other work."""
        ...

    @property
    def operators(self) -> Operators: ...

    async def open(self) -> None:
        """Connect, and create or migrate what is stored. Raises `EngineError`, `ConfigurationError`."""

    def sibling(self) -> "Engine | None":
        """Return an engine on the same storage for another event loop; None where there can be only one."""
        ...

    async def close(self) -> None:
        """Give back the leases that are still held and release everything; when cancelled, release it at once."""

    def drop(self) -> None:
        """Release everything without waiting: the event loop has ended."""

    async def declare(self, queue: Queue[Any]) -> None:
        """Create the queue or give it these rules. Idempotent. Raises `UnsupportedFeature`."""

    async def find(self, queue: str) -> Queue[Any]:
        """Return a declared queue with its rules; the cost does not grow with their number. Raises `QueueNotFound`."""
        ...

    def execute(self, batch: Batch) -> "Awaitable[Sequence[Result | asyncio.Future[Result]]]":
        """Durably do all operations that it takes, and return one result for each; if it raises, none was done.

        An operation that must wait for another transaction has a future as its result, so that the rest need not wait.
        """
        ...

    def waiter(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Waiter:
        """Take a place to wait; `submit` looks again, `abandoned` is told what came for a caller that had gone."""
        ...


def instant(milliseconds: int) -> datetime:
    """Return an engine's time as an aware datetime in UTC, kept between 1970 and the end of the year 9999."""
    return datetime.fromtimestamp(min(max(milliseconds, 0), INSTANT_MAX) / 1000, tz=UTC)
