"""What a consumer holds: a `Message` to settle, and the `Transaction` in which it can do so together with its work.

The broker makes messages from an engine's deliveries and is told, through `Settler`, how each one ended. A message is
settled once: `ack`, `nack`, `reject` or `release`. Until then its consumer holds a lease on it, and no one else does.
"""

import traceback
from collections.abc import Awaitable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Generic, Literal, Protocol, cast

from filao.codec import decode_headers
from filao.draft import draft, drafts
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
from filao.errors import ConfigurationError, FilaoError, LeaseLost
from filao.queue import Queue, T

Guarantee = Literal["at-least-once", "at-most-once"]
ERROR_MAX = 8 * 1024  # bytes of an error and its traceback that are kept
current_transaction: "ContextVar[Transaction | None]" = ContextVar("filao_transaction", default=None)
"""The transaction that the running code is in: other calls of its broker would wait for it for ever."""
AT_MOST_ONCE = "acked before it was handed over (at most once)"


class Settler(Protocol):
    """What messages and transactions need of their broker."""

    def check_open(self) -> None:
        """Raise `ConfigurationError` when the broker is closed or was inherited through a fork."""

    def settle(self, delivery: Delivery, outcome: Outcome) -> Awaitable[object]:
        """End a lease."""
        ...

    async def extend(self, delivery: Delivery, seconds: float) -> None:
        """Let a lease end `seconds` from now."""

    def transaction_for(self, message: "Message[Any]") -> AbstractAsyncContextManager["Transaction"]:
        """Open a transaction with the message's acknowledgement in it."""
        ...

    def known_within(self, queue: str | Queue[T]) -> Queue[T]:
        """Return a queue as far as it is known without asking the engine."""
        ...


class Message(Generic[T]):
    """A message that this consumer, and no other, holds until its lease ends.

    `message["claim_id"]` reads a key of the body. Every way to settle it raises `LeaseLost`, and changes nothing, once
    another consumer has received it or once it was settled before.
    """

    __slots__ = ("_ended", "_settler", "body", "delivery")

    def __init__(self, settler: Settler, delivery: Delivery, body: T) -> None:
        self._settler = settler
        self.delivery = delivery
        """What the engine handed over; for brokers."""
        self._ended = ""
        self.body = body
        """The body, of the queue's type."""

    @property
    def id(self) -> str:
        """The message's identity: the same on every attempt, unique across queues and files."""
        return self.delivery.id

    @property
    def queue(self) -> str:
        """The name of the queue it came from."""
        return self.delivery.queue

    @property
    def attempt(self) -> int:
        """1 on the first delivery; a crash of its consumer uses an attempt, a `release` gives it back."""
        return self.delivery.attempt

    @property
    def headers(self) -> dict[str, str]:
        """The sender's headers; a new dict each time."""
        return decode_headers(self.delivery.headers)

    @property
    def group(self) -> str | None:
        """The ordering key that its sender gave."""
        return self.delivery.group

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self.delivery.priority

    @property
    def sent_at(self) -> datetime:
        """When it was stored, by the engine's clock."""
        return instant(self.delivery.sent_at)

    @property
    def settled(self) -> bool:
        """True once this consumer has settled it."""
        return bool(self._ended)

    def __getitem__(self, key: Any) -> Any:
        """Read a key of the body, as `message["claim_id"]`."""
        return self.body[key]  # type: ignore[index]  # whether the body has keys is its sender's choice

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
        await self._settle(Nack(delay, error_text(reason)), "nacked")

    async def reject(self, reason: str | BaseException = "") -> None:
        """Say that no attempt can succeed: the message becomes a dead letter now."""
        await self._settle(Reject(error_text(reason)), "rejected")

    async def release(self) -> None:
        """Give it back unworked: it returns to its old place at once, and the attempt is not counted."""
        await self._settle(Release(), "released")

    async def extend(self, seconds: float) -> None:
        """Keep the lease for `seconds` from now on."""
        self.check_held("extend")
        await self._settler.extend(self.delivery, seconds)

    def transaction(self) -> AbstractAsyncContextManager["Transaction"]:
        """Open a transaction that commits the caller's statements, follow-up sends and this acknowledgement together.

        `async with message.transaction() as tx:`; leaving it normally commits, an exception undoes all of it and the
        message stays leased. See `Broker.transaction`.
        """
        self.check_held("ack")
        return self._settler.transaction_for(self)

    def mark_settled(self, how: str) -> None:
        """Record how it was settled; the broker calls it when that happened otherwise than through this object."""
        self._ended = how

    async def _settle(self, outcome: Outcome, how: str) -> None:
        if self._ended is AT_MOST_ONCE and isinstance(outcome, Ack):
            return  # so that the same code runs under either guarantee
        self.check_held(how)
        await self._settler.settle(self.delivery, outcome)
        self._ended = how

    def check_held(self, wanted: str) -> None:
        """Raise `LeaseLost` when this consumer has settled it already."""
        if self._ended:
            raise LeaseLost(
                f"message {self.id} of queue {self.queue!r} was already {self._ended} by this consumer, so it cannot be "
                f"{wanted} again. Nothing was changed. Settle each message once."
            )


class Transaction:
    """What can be done in a transaction; `Broker.transaction` and `Message.transaction` open it."""

    def __init__(self, broker: Settler, within: EngineTransaction) -> None:
        self.broker = broker
        self._within = within
        self._acked: list[Message[Any]] = []
        self.is_open = True

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
        known = self.broker.known_within(queue)
        sent = draft(
            known,
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
        )
        return (await self._send(Send(known.name, (sent,))))[0]

    async def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
    ) -> list[Receipt]:
        """Send as `Broker.send_many` does; the messages appear when the transaction commits."""
        known = self.broker.known_within(queue)
        sent = drafts(known, bodies, headers=headers, delay=delay, priority=priority, group=group, ttl=ttl)
        return await self._send(Send(known.name, sent))

    async def ack(self, message: Message[Any]) -> None:
        """Acknowledge a message with this transaction. Raises `LeaseLost`, which should undo the rest."""
        message.check_held("acked")
        await self._apply(Settle(message.delivery, Ack()))
        self._acked.append(message)

    def end(self) -> None:
        """Refuse further work; the broker calls it when the block is left."""
        self.is_open = False

    def mark_settled(self) -> None:
        """Tell the acknowledged messages that the commit is durable; the broker calls it."""
        for message in self._acked:
            message.mark_settled("acked")

    async def _send(self, operation: Send) -> list[Receipt]:
        return cast("list[Receipt]", await self._apply(operation))

    async def _apply(self, operation: Operation) -> Result:
        self._check_open()
        (result,) = await self._within.apply([operation])
        if isinstance(result, FilaoError):
            raise result
        return result

    def _check_open(self) -> None:
        if not self.is_open:
            raise ConfigurationError("this transaction has ended: use it inside its `async with` block")
        self.broker.check_open()


@contextmanager
def inside(transaction: Transaction) -> Generator[None]:
    """Let the code in this block know which transaction it is in, and end it."""
    outer = current_transaction.get()
    current_transaction.set(transaction)
    try:
        yield
    finally:
        transaction.end()
        current_transaction.set(outer)


def error_text(reason: object) -> str:
    """Return what is kept of an error: an exception with its traceback, the end of it when it is long."""
    try:
        text = "".join(traceback.format_exception(reason)) if isinstance(reason, BaseException) else str(reason)
    except Exception:
        text = f"a {type(reason).__name__} that cannot be printed"
    kept = text.encode(errors="backslashreplace")
    if len(kept) > ERROR_MAX:
        kept = "…".encode() + kept[-(ERROR_MAX - 3) :]
    return kept.decode(errors="ignore")
