"""The blocking twin: the same names without `await`, for programs that have no event loop.

One event-loop thread runs an async broker, and every call is handed to it. So a `Broker` may be shared by any number of
threads, and what they do at the same moment shares commits, as concurrent tasks do. Guarantees, units and errors are
those of `filao.broker` and `filao.message`.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from anyio.from_thread import BlockingPortal, start_blocking_portal
from msgspec import UNSET, UnsetType

from filao.broker import Broker as AsyncBroker
from filao.broker import Guarantee
from filao.broker import connect as connect_async
from filao.engine import Delivery, Feature, Finding, QueueStats, Receipt, State, StoredMessage
from filao.engines import Durability
from filao.errors import ConfigurationError
from filao.message import Message as AsyncMessage
from filao.message import Transaction as AsyncTransaction
from filao.message import current_transaction
from filao.queue import Queue, T

R = TypeVar("R")


def connect(url: str | Path, *, durability: Durability = "full", clock: Callable[[], float] = time.time) -> "Broker":
    """Return a blocking broker; `with` opens it and closes it. See `filao.connect`."""
    return Broker(connect_async(url, durability=durability, clock=clock))


class Broker:
    """See `filao.Broker`; safe from many threads."""

    def __init__(self, broker: AsyncBroker) -> None:
        self._broker = broker
        self._portal: BlockingPortal | None = None
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect to the engine; `with` does it."""
        if self._portal is not None:
            return
        with ExitStack() as opened:
            with _signals_left_to_us():
                portal = opened.enter_context(start_blocking_portal("asyncio"))
            self._loop = portal.call(asyncio.get_running_loop)
            portal.call(self._broker.open)
            self._portal = portal
            self._opened = opened.pop_all()

    @classmethod
    def beside(cls, broker: AsyncBroker, portal: BlockingPortal) -> Self:
        """Return the twin of a broker that is open on the running loop, for the threads of a worker."""
        twin = cls(broker)
        twin._loop = asyncio.get_running_loop()
        twin._portal = portal
        return twin

    def close(self) -> None:
        """Finish what was begun, give back the leases that are still held, and let go. Idempotent."""
        if self._portal is not None:
            portal, self._portal = self._portal, None
            with self._opened:
                portal.call(self._broker.close)

    @property
    def features(self) -> frozenset[Feature]:
        """See `filao.Broker.features`."""
        return self._broker.features

    @property
    def emulated(self) -> frozenset[Feature]:
        """See `filao.Broker.emulated`."""
        return self._broker.emulated

    def declare(self, *queues: Queue[Any]) -> None:
        """See `filao.Broker.declare`."""
        self.call(self._broker.declare, *queues)

    def queues(self) -> list[Queue[Any]]:
        """See `filao.Broker.queues`."""
        return self.call(self._broker.queues)

    def delete_queue(self, queue: str | Queue[Any], *, messages: bool = False) -> None:
        """See `filao.Broker.delete_queue`."""
        self.call(partial(self._broker.delete_queue, queue, messages=messages))

    def send_to_queue(
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
        within: object = None,
    ) -> Receipt:
        """See `filao.Broker.send_to_queue`; `within` is used in the calling thread, to which the connection belongs."""
        send = partial(
            self._broker.send_to_queue,
            queue,
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
            within=within,
        )
        return self.call(send) if within is None else _run_here(send())

    def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T],
        *,
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        priority: int = 0,
        group: str | None = None,
        ttl: float | None = None,
        within: object = None,
    ) -> list[Receipt]:
        """See `filao.Broker.send_many`."""
        send = partial(
            self._broker.send_many,
            queue,
            list(bodies),
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            ttl=ttl,
            within=within,
        )
        return self.call(send) if within is None else _run_here(send())

    @overload
    def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Message[T]": ...
    @overload
    def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: float,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Message[T] | None": ...
    def receive_from_queue(
        self,
        queue: str | Queue[T],
        *,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Message[T] | None":
        """See `filao.Broker.receive_from_queue`."""
        messages = self.receive_many(queue, 1, wait=wait, lease=lease, guarantee=guarantee)
        return messages[0] if messages else None

    def receive_many(
        self,
        queue: str | Queue[T],
        limit: int,
        *,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "list[Message[T]]":
        """See `filao.Broker.receive_many`."""
        receive = partial(self._broker.receive_many, queue, limit, wait=wait, lease=lease, guarantee=guarantee)
        return [Message(self, message) for message in self.call(receive)]

    def consume(
        self,
        queue: str | Queue[T],
        *,
        prefetch: int = 1,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Generator[Message[T]]":
        """See `filao.Broker.consume`."""
        messages = self._broker.consume(queue, prefetch=prefetch, lease=lease, guarantee=guarantee)
        try:
            while True:
                yield Message(self, self.call(partial(anext, messages)))
        finally:
            if self._portal is not None:
                self.call(messages.aclose)

    @contextmanager
    def transaction(self) -> "Generator[Transaction]":
        """See `filao.Broker.transaction`."""
        with self._held(self._broker.transaction()) as transaction:
            yield transaction

    @overload
    def stats(self, queue: str | Queue[Any]) -> QueueStats: ...
    @overload
    def stats(self, queue: None = None) -> list[QueueStats]: ...
    def stats(self, queue: str | Queue[Any] | None = None) -> QueueStats | list[QueueStats]:
        """See `filao.Broker.stats`."""
        return self.call(self._broker.stats) if queue is None else self.call(self._broker.stats, queue)

    def peek(
        self,
        queue: str | Queue[Any],
        *,
        state: State | str = State.READY,
        limit: int = 10,
        after: str | None = None,
    ) -> list[StoredMessage]:
        """See `filao.Broker.peek`."""
        return self.call(partial(self._broker.peek, queue, state=state, limit=limit, after=after))

    def dead_letters(
        self, queue: str | Queue[Any], *, limit: int = 100, after: str | None = None
    ) -> list[StoredMessage]:
        """See `filao.Broker.dead_letters`."""
        return self.call(partial(self._broker.dead_letters, queue, limit=limit, after=after))

    def redrive(
        self,
        queue: str | Queue[T],
        *,
        ids: Iterable[str] | None = None,
        limit: int | None = None,
        body: T | UnsetType = UNSET,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        """See `filao.Broker.redrive`."""
        return self.call(partial(self._broker.redrive, queue, ids=ids, limit=limit, body=body, headers=headers))

    def purge(self, queue: str | Queue[Any], *, state: State | str | None = None) -> int:
        """See `filao.Broker.purge`."""
        return self.call(partial(self._broker.purge, queue, state=state))

    def cancel(self, queue: str | Queue[Any], message_id: str) -> bool:
        """See `filao.Broker.cancel`."""
        return self.call(self._broker.cancel, queue, message_id)

    def pause(self, queue: str | Queue[Any]) -> None:
        """See `filao.Broker.pause`."""
        self.call(self._broker.pause, queue)

    def resume(self, queue: str | Queue[Any], *, group: str | None = None) -> None:
        """See `filao.Broker.resume`."""
        self.call(partial(self._broker.resume, queue, group=group))

    def doctor(self) -> list[Finding]:
        """See `filao.Broker.doctor`."""
        return self.call(self._broker.doctor)

    # --- what messages and transactions need of their broker ---------------------------------------------------------

    def call(self, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
        """Run a coroutine function on the loop and wait for it; whoever is interrupted takes his call back."""
        self._broker.check_usable()
        if self._portal is None:
            raise ConfigurationError("this broker is not open: use it inside `with filao.sync.connect(…) as broker`")
        future = asyncio.run_coroutine_threadsafe(function(*arguments), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @contextmanager
    def held(self, message: AsyncMessage[Any]) -> "Generator[Transaction]":
        """Open a transaction with a message's acknowledgement in it."""
        with self._held(message.transaction()) as transaction:
            yield transaction

    @contextmanager
    def _held(self, opening: Any) -> "Generator[Transaction]":
        self._broker.check_usable()
        if self._portal is None:
            raise ConfigurationError("this broker is not open: use it inside `with filao.sync.connect(…) as broker`")
        with self._portal.wrap_async_context_manager(opening) as transaction:
            outer = current_transaction.get()
            current_transaction.set(transaction)
            try:
                yield Transaction(self._portal, transaction)
            finally:
                current_transaction.set(outer)


class Message(Generic[T]):
    """See `filao.Message`."""

    __slots__ = ("_broker", "_message")

    def __init__(self, broker: Broker, message: AsyncMessage[T]) -> None:
        self._broker = broker
        self._message = message

    @property
    def body(self) -> T:
        """The body, of the queue's type."""
        return self._message.body

    @property
    def id(self) -> str:
        """See `filao.Message.id`."""
        return self._message.id

    @property
    def queue(self) -> str:
        """The name of the queue it came from."""
        return self._message.queue

    @property
    def attempt(self) -> int:
        """See `filao.Message.attempt`."""
        return self._message.attempt

    @property
    def headers(self) -> dict[str, str]:
        """The sender's headers; a new dict each time."""
        return self._message.headers

    @property
    def group(self) -> str | None:
        """The ordering key that its sender gave."""
        return self._message.group

    @property
    def priority(self) -> int:
        """Higher goes first."""
        return self._message.priority

    @property
    def sent_at(self) -> datetime:
        """When it was stored, by the engine's clock."""
        return self._message.sent_at

    @property
    def settled(self) -> bool:
        """True once this consumer has settled it."""
        return self._message.settled

    @property
    def delivery(self) -> Delivery:
        """What the engine handed over; for brokers."""
        return self._message.delivery

    @property
    def inner(self) -> AsyncMessage[T]:
        """The async message; for brokers."""
        return self._message

    def __getitem__(self, key: Any) -> Any:
        """Read a key of the body, as `message["claim_id"]`."""
        return self._message[key]

    def __repr__(self) -> str:
        return repr(self._message)

    def ack(self) -> None:
        """See `filao.Message.ack`."""
        self._broker.call(self._message.ack)

    def nack(self, *, delay: float | None = None, reason: str | BaseException = "") -> None:
        """See `filao.Message.nack`."""
        self._broker.call(partial(self._message.nack, delay=delay, reason=reason))

    def reject(self, reason: str | BaseException = "") -> None:
        """See `filao.Message.reject`."""
        self._broker.call(self._message.reject, reason)

    def release(self) -> None:
        """See `filao.Message.release`."""
        self._broker.call(self._message.release)

    def extend(self, seconds: float) -> None:
        """See `filao.Message.extend`."""
        self._broker.call(self._message.extend, seconds)

    @contextmanager
    def transaction(self) -> "Generator[Transaction]":
        """See `filao.Message.transaction`."""
        with self._broker.held(self._message) as transaction:
            yield transaction


class Transaction:
    """See `filao.Transaction`."""

    def __init__(self, portal: BlockingPortal, transaction: AsyncTransaction) -> None:
        self._portal = portal
        self._transaction = transaction

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """See `filao.Transaction.execute`."""
        return self._portal.call(self._transaction.execute, sql, parameters)

    def send_to_queue(
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
        """See `filao.Transaction.send_to_queue`."""
        send = partial(
            self._transaction.send_to_queue,
            queue,
            body,
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            dedup_key=dedup_key,
            ttl=ttl,
            message_id=message_id,
        )
        return self._portal.call(send)

    def send_many(
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
        """See `filao.Transaction.send_many`."""
        send = partial(
            self._transaction.send_many,
            queue,
            list(bodies),
            headers=headers,
            delay=delay,
            priority=priority,
            group=group,
            ttl=ttl,
        )
        return self._portal.call(send)

    def ack(self, message: Message[Any]) -> None:
        """See `filao.Transaction.ack`."""
        self._portal.call(self._transaction.ack, message.inner)


@contextmanager
def _signals_left_to_us() -> Generator[None]:
    """Let the threads that are started here inherit a mask, so that a Ctrl-C wakes the thread that waits for an answer."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_here(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never waits in the calling thread: a send within its transaction touches no loop."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        result: R = returned.value
        return result
    coroutine.close()
    raise AssertionError("a send within a transaction waited")
