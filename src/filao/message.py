"""What a consumer holds: a `Message` to settle, and the `Transaction` in which it can settle it together with its work.

`receiving.py` makes messages of an engine's deliveries. Each is settled once, through the session that it came from, by
`ack`, `nack`, `reject` or `release`. Until then its consumer holds a lease on it, and nobody else does.
"""

import asyncio
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, Literal, Self, cast

from filao.checks import check_duration
from filao.codec import decode_headers, shown
from filao.draft import Outgoing, draft, drafts
from filao.engine import (
    Ack,
    Delivery,
    EngineTransaction,
    Nack,
    Operation,
    Outcome,
    Receipt,
    Reject,
    Release,
    Result,
    Send,
    Settle,
    instant,
)
from filao.errors import ConfigurationError, FilaoError, LeaseLost, QueueNotFound
from filao.queue import Queue, T
from filao.session import Inside, Session, current_transaction

Guarantee = Literal["at-least-once", "at-most-once"]
ERROR_MAX = 8 * 1024  # bytes of an error and its traceback that are kept
AT_MOST_ONCE = "acked before it was handed over (at most once)"


class Message(Generic[T]):
    """A message that this consumer, and no other, holds until its lease ends.

    `message["claim_id"]` reads a key of the body. Once another consumer has received the message, or this one has
    settled it, every way to settle it raises `LeaseLost` and changes nothing.
    """

    __slots__ = ("_delivery", "_ended", "_session", "body")

    def __init__(self, session: Session, delivery: Delivery, body: T) -> None:
        self._session = session
        self._delivery = delivery
        self._ended = ""
        self.body: T = body
        """The body, of the queue's type."""

    @property
    def id(self) -> str:
        """The message's identity: the same on every attempt."""
        return self._delivery.id

    @property
    def queue(self) -> str:
        """The name of the queue it came from."""
        return self._delivery.queue

    @property
    def attempt(self) -> int:
        """1 on the first delivery. A consumer that crashes has used an attempt; a `release` gives it back."""
        return self._delivery.attempt

    @property
    def headers(self) -> dict[str, str]:
        """The sender's headers; a new dict each time."""
        return decode_headers(self._delivery.headers)

    @property
    def group(self) -> str | None:
        """The ordering key that its sender gave."""
        return self._delivery.group

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self._delivery.priority

    @property
    def sent_at(self) -> datetime:
        """When it was stored, by the engine's clock."""
        return instant(self._delivery.sent_at)

    @property
    def settled(self) -> bool:
        """True once this consumer has settled it."""
        return bool(self._ended)

    def __getitem__(self, key: Any) -> Any:
        """Read a key of the body, as `message["claim_id"]`."""
        return self.body[key]  # type: ignore[index]  # whether the body has keys is its sender's choice

    def __contains__(self, key: object) -> bool:
        """Return whether the body has a key, as `"claim_id" in message`."""
        return key in self.body  # type: ignore[operator]

    __iter__ = None  # Python would take `message[0]`, `message[1]` … for its items

    def __repr__(self) -> str:
        return f"<Message {self.id} of {self.queue!r}, attempt {self.attempt}{self._ended and ', ' + self._ended}>"

    async def ack(self) -> None:
        """Say that the work is done: the message is deleted, durably, before this returns."""
        await self._settle(Ack(), "acked")

    async def nack(self, *, delay: float | None = None, reason: str | BaseException = "") -> None:
        """Say that the work failed: the message returns to its old place after `delay` seconds, or dies.

        Without `delay` the queue's backoff decides. When `max_attempts` is spent it becomes a dead letter at once.
        `reason` is kept in its history; an exception is kept with its traceback, 8 KiB at most.
        """
        if delay is not None:
            self._check_delay(delay)
        await self._settle(Nack(delay, error_text(reason)), "nacked")

    async def reject(self, reason: str | BaseException = "") -> None:
        """Say that no attempt can succeed: the message becomes a dead letter now."""
        await self._settle(Reject(error_text(reason)), "rejected")

    async def release(self, *, delay: float = 0.0) -> None:
        """Give the message back: it returns to its old place, at once or after `delay` seconds.

        The attempt does not count, so a message can be released any number of times, until its `ttl` ends.
        """
        self._check_delay(delay)
        await self._settle(Release(delay), "released")

    async def extend(self, seconds: float) -> None:
        """Keep the lease for `seconds` from now on."""
        self._check_held("extended")
        await self._session.extend(self._delivery, seconds)

    def transaction(self) -> AbstractAsyncContextManager["Transaction"]:
        """Open a transaction that commits the caller's statements, further sends and this acknowledgement together.

        Leaving its block normally commits; an exception undoes all of it, and the message stays leased. See
        `Broker.transaction`.
        """
        self._check_held("acked")
        return _transaction_for(self)

    async def _settle(self, outcome: Outcome, how: str) -> None:
        if self._ended is AT_MOST_ONCE and isinstance(outcome, Ack):
            return  # the same code runs under either guarantee
        self._check_held(how)
        await self._session.settle(self._delivery, outcome)
        self._ended = how

    def _check_delay(self, delay: object) -> None:
        check_duration(f"queue {self.queue!r}", "delay", delay)

    def _check_held(self, wanted: str) -> None:
        """Raise `LeaseLost` when this consumer has settled it already."""
        if self._ended:
            raise LeaseLost(
                f"message {self.id} of queue {self.queue!r} was already {self._ended}, so it can no longer be "
                f"{wanted}. Nothing was changed. A consumer settles each message once."
            )


class Transaction:
    """What can be done in a transaction; `Broker.transaction` and `Message.transaction` open it."""

    def __init__(self, inside: Inside, within: EngineTransaction) -> None:
        self._inside = inside
        self._within = within
        self._acked: dict[Message[Any], None] = {}

    async def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Run one statement of your own, with its parameters, and return its rows."""
        self._check_open()
        return await self._within.execute(sql, parameters)

    async def send_to_queue(
        self,
        queue: str | Queue[T],
        body: T,
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        dedup_key: str | None = None,
        ttl: float | None = None,
        message_id: str | None = None,
    ) -> Receipt:
        """Send as `Broker.send_to_queue` does; the message appears when the transaction commits."""
        known = self._inside.session.unasked(queue)
        outgoing = Outgoing(
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
        )
        return (await self._send(Send(known.name, (draft(known, outgoing),))))[0]

    async def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T | Outgoing[T]],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
    ) -> list[Receipt]:
        """Send as `Broker.send_many` does; the messages appear when the transaction commits."""
        known = self._inside.session.unasked(queue)
        terms = Outgoing(None, headers=headers, delay=delay, priority=priority, group=group, ttl=ttl)
        return await self._send(Send(known.name, drafts(known, bodies, terms)))

    async def ack(self, message: Message[Any]) -> None:
        """Acknowledge a message with this transaction. Raises `LeaseLost`, which should undo the rest."""
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
            raise ConfigurationError(f"ack was given {shown(message)}; give a message that this broker has received")
        if message in self._acked:
            return
        check_held(message, "acked")
        try:
            await self._apply(Settle(delivery_of(message), Ack()))
        except (LeaseLost, QueueNotFound) as error:
            if message._session.engine is self._inside.session.engine:  # noqa: SLF001
                raise
            raise ConfigurationError(
                f"message {message.id} of queue {message.queue!r} was received by another broker, and the storage of "
                f"this transaction knows no such lease: a transaction acknowledges what lies in its own storage. "
                f"Nothing was changed."
            ) from error
        self._acked[message] = None

    async def _send(self, operation: Send) -> list[Receipt]:
        return cast("list[Receipt]", await self._apply(operation))

    async def _apply(self, operation: Send | Settle) -> Result:
        self._check_open()
        with self._inside.session.observers.asked(operation) as asked:
            (result,) = await self._within.apply([asked.operation])
            asked.result = result
        if isinstance(result, FilaoError):
            raise result
        return result

    def _check_open(self) -> None:
        if not self._inside.is_open:
            raise ConfigurationError("this transaction has ended: use it inside its `async with` block")
        self._inside.session.check_open()


class Deferred:
    """A transaction that begins with its first statement, so that nobody waits for slow work before that.

    On SQLite a transaction holds the one write lock of the file. See `filao.engine.EngineTransaction`.

    Invariant: what begins here is ended here. A handler that was given up may still be waiting to begin when its block
    is left; what begins then is undone at once.
    """

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[EngineTransaction]]) -> None:
        self._opening = opening
        self._opened = AsyncExitStack()
        self._transaction: EngineTransaction | None = None
        self._is_over = False
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        await self._opened.__aexit__(kind, error, trace)

    def has_begun(self) -> bool:
        """Return whether a statement has been asked for."""
        return self._transaction is not None or self._lock.locked()

    async def execute(self, sql: str, parameters: Any) -> list[Any]:
        """Begin, unless it has begun, and run one statement."""
        return await (await self._begun()).execute(sql, parameters)

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Begin, unless it has begun, and do the operations."""
        return await (await self._begun()).apply(operations)

    async def _begun(self) -> EngineTransaction:
        async with self._lock:
            if self._transaction is None:
                self._check_open()
                async with AsyncExitStack() as stack:
                    transaction = await stack.enter_async_context(self._opening())
                    self._check_open()
                    self._transaction, self._opened = transaction, stack.pop_all()
            return self._transaction

    def _check_open(self) -> None:
        if self._is_over:
            raise ConfigurationError("this transaction has ended meanwhile; nothing of it was done")


# --- for the modules above, not for users ----------------------------------------------------------------------------


def delivery_of(message: Message[Any]) -> Delivery:
    """Return what the engine handed over."""
    return message._delivery  # noqa: SLF001 - users of a message do not see it; nor what is used below


def settled_by(message: Message[T], session: Session) -> Message[T]:
    """Let a message be settled through another session on the same engine, and return it."""
    message._session = session  # noqa: SLF001
    return message


def mark_settled(message: Message[Any], how: str) -> None:
    """Record how a message was settled, when it was not settled through its own methods."""
    message._ended = how  # noqa: SLF001


def check_held(message: Message[Any], wanted: str) -> None:
    """Raise `LeaseLost` when this consumer has settled a message already."""
    message._check_held(wanted)  # noqa: SLF001


def inside_of(transaction: Transaction) -> Inside:
    """Return the record by which other calls know that they are in this transaction."""
    return transaction._inside  # noqa: SLF001


@asynccontextmanager
async def entered(session: Session, *, deferred: bool = False) -> AsyncGenerator[Transaction]:
    """Open a transaction; `deferred`: it begins with its first statement. `current_transaction` is set in its block."""
    session.check_usable()
    begin = session.transactions("transactions").begin
    async with Deferred(begin) if deferred else begin() as within:
        has_begun = within.has_begun if isinstance(within, Deferred) else lambda: True
        outer, inside = current_transaction.get(), Inside(session, has_begun)
        transaction = Transaction(inside, within)
        current_transaction.set(inside)
        try:
            yield transaction
        finally:
            inside.is_open = False
            current_transaction.set(outer)
    for message in transaction._acked:  # noqa: SLF001
        mark_settled(message, "acked")


@asynccontextmanager
async def _transaction_for(message: Message[Any]) -> AsyncGenerator[Transaction]:
    """Open a transaction with the message's acknowledgement in it."""
    session = message._session  # noqa: SLF001
    async with entered(session) as transaction:
        await transaction.ack(message)
        yield transaction


@asynccontextmanager
async def deferred_transaction_for(message: Message[Any]) -> AsyncGenerator[Transaction]:
    """Open a transaction that begins with its first statement and acknowledges with its last; for workers."""
    session = message._session  # noqa: SLF001
    async with entered(session, deferred=True) as transaction:
        yield transaction
        await transaction.ack(message)


def error_text(reason: object) -> str:
    """Return what is kept of an error: an exception's traceback, or a text; of a long one, the end.

    A group's ends with the last of its exceptions: lists show the line that names it, and letters are told apart by it.
    """
    try:
        text = "".join(traceback.format_exception(reason)) if isinstance(reason, BaseException) else str(reason)
        if isinstance(reason, BaseException) and _last_of(reason) is not reason:
            text += "".join(traceback.format_exception_only(_last_of(reason)))
    except Exception:
        text = f"a {type(reason).__name__} that cannot be printed"
    kept = text.encode(errors="backslashreplace")
    if len(kept) > ERROR_MAX:
        kept = "…".encode() + kept[-(ERROR_MAX - 3) :]
    return kept.decode(errors="ignore")


def _last_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[-1]
    return error
