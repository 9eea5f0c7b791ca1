"""The blocking twin: the same names without `await`, for programs that have no event loop.

One event-loop thread runs an async broker, and every call is handed to it. So a `Broker` may be shared by any number of
threads, and what they do at the same moment shares commits, as concurrent tasks do. Guarantees, units and errors are
those of `filao.broker` and `filao.message`.

A program without a place for `with` opens it where it likes, a module included: `broker = filao.sync.connect(url);
broker.open()`. It closes itself when the interpreter ends, and opens itself again in a child process that uses it.
"""

import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

from msgspec import UNSET, UnsetType

from filao.broker import Broker as AsyncBroker
from filao.broker import connect as connect_async
from filao.broker import receiving_of, session_of
from filao.calls import Caller, Held
from filao.draft import Outgoing
from filao.engine import Feature, Finding, QueueStats, Receipt, State, StoredMessage
from filao.engines import Durability
from filao.errors import ConfigurationError
from filao.forks import keep
from filao.loop_thread import LoopThread
from filao.message import Guarantee, inside_of
from filao.message import Message as AsyncMessage
from filao.message import Transaction as AsyncTransaction
from filao.observing import Observers
from filao.queue import Queue, T
from filao.session import Session, current_transaction

R = TypeVar("R")

_FORMS = "`with filao.sync.connect(…) as broker:`, or `broker.open()` in a program without a place for `with`"
_NOT_OPEN = f"this broker is not open: use {_FORMS}"
_CLOSED = "this broker is closed: open it again, with `with broker:` or `broker.open()`"
_open_brokers: "set[Broker]" = set()


def connect(url: str | Path, *, durability: Durability = "full", clock: Callable[[], float] = time.time) -> "Broker":
    """Return a blocking broker; `with` opens it and closes it, or `open` and `close`. See `filao.connect`."""
    return Broker(connect_async(url, durability=durability, clock=clock))


class Broker:
    """See `filao.Broker`; safe from many threads.

    One that is open when the interpreter ends closes itself. In a child process that was forked, it opens itself again
    when it is used; messages and transactions belong to the process that has begun them.
    """

    def __init__(self, broker: AsyncBroker) -> None:
        self._broker = broker
        self._caller: Caller | None = None
        self._thread: LoopThread | None = None
        self._refusal = _NOT_OPEN
        self._opening = threading.RLock()  # a signal's handler may close what it finds half open
        self._is_inherited = False
        self._is_used = False

    @property
    def observers(self) -> Observers:
        """See `filao.Broker.observers`; they are called in the thread of the event loop."""
        return self._broker.observers

    def __enter__(self) -> Self:
        if self._caller is not None:
            raise ConfigurationError("this broker is open already: the block would close it under those who opened it")
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect to the engine; `with` does it. Idempotent; what is closed can be opened again."""
        with self._opening:
            if self._caller is not None:
                return
            if self._is_used:
                self._broker = _again(self._broker)  # the last one may still be closing: a close that was interrupted
            self._is_used = True
            thread = LoopThread(self._broker)
            try:
                thread.start()
                _open_brokers.add(self)
                self._thread, self._caller = thread, thread.caller
            except BaseException:
                thread.stop()
                raise
            self._is_inherited = False

    def close(self) -> None:
        """Finish what was begun, give back the leases that are still held, and let go, within 30 s. Idempotent."""
        with self._opening:
            thread = self._thread
            if thread is not None:
                thread.leave(threading.get_ident())
                thread.stop()
                self._refusal = _CLOSED
            self._thread = self._caller = None
            self._is_inherited = False
            _open_brokers.discard(self)
        if thread is not None:
            thread.join()

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
        self._call(self._broker.declare, *queues)

    def queues(self) -> list[Queue[Any]]:
        """See `filao.Broker.queues`."""
        return self._call(self._broker.queues)

    def delete_queue(self, queue: str | Queue[Any], *, messages: bool = False) -> None:
        """See `filao.Broker.delete_queue`."""
        self._call(partial(self._broker.delete_queue, queue, messages=messages))

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
        return self._call(send) if within is None else _run_here(send())

    def send_many(
        self,
        queue: str | Queue[T],
        bodies: Iterable[T | Outgoing[T]],
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
        return self._call(send) if within is None else _run_here(send())

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
        caller = self._usable()
        receive = partial(self._broker.receive_many, queue, limit, wait=wait, lease=lease, guarantee=guarantee)
        return [Message(caller, message) for message in caller.take(receive, _back(self._broker))]

    def consume(
        self,
        queue: str | Queue[T],
        *,
        prefetch: int = 1,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Generator[Message[T]]":
        """See `filao.Broker.consume`."""
        caller = self._usable()
        messages = self._broker.consume(queue, prefetch=prefetch, wait=wait, lease=lease, guarantee=guarantee)
        try:
            while True:
                yield Message(caller, caller.take(messages.__anext__, receiving_of(self._broker).give_back))
        except StopAsyncIteration:
            return
        finally:
            with suppress(ConfigurationError):  # it was closed, and gave back what it held
                caller.call(messages.aclose)

    def transaction(self) -> "AbstractContextManager[Transaction]":
        """See `filao.Broker.transaction`."""
        return _transaction(self._usable(), self._broker.transaction)

    @overload
    def stats(self, queue: str | Queue[Any]) -> QueueStats: ...
    @overload
    def stats(self, queue: None = None) -> list[QueueStats]: ...
    def stats(self, queue: str | Queue[Any] | None = None) -> QueueStats | list[QueueStats]:
        """See `filao.Broker.stats`."""
        return self._call(self._broker.stats) if queue is None else self._call(self._broker.stats, queue)

    def peek(
        self,
        queue: str | Queue[Any],
        *,
        state: State | str = State.READY,
        limit: int = 10,
        after: str | None = None,
    ) -> list[StoredMessage]:
        """See `filao.Broker.peek`."""
        return self._call(partial(self._broker.peek, queue, state=state, limit=limit, after=after))

    def dead_letters(
        self, queue: str | Queue[Any], *, limit: int = 100, after: str | None = None
    ) -> list[StoredMessage]:
        """See `filao.Broker.dead_letters`."""
        return self._call(partial(self._broker.dead_letters, queue, limit=limit, after=after))

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
        return self._call(partial(self._broker.redrive, queue, ids=ids, limit=limit, body=body, headers=headers))

    def purge(self, queue: str | Queue[Any], *, state: State | str | None = None) -> int:
        """See `filao.Broker.purge`."""
        return self._call(partial(self._broker.purge, queue, state=state))

    def cancel(self, queue: str | Queue[Any], message_id: str) -> bool:
        """See `filao.Broker.cancel`."""
        return self._call(self._broker.cancel, queue, message_id)

    def pause(self, queue: str | Queue[Any]) -> None:
        """See `filao.Broker.pause`."""
        self._call(self._broker.pause, queue)

    def resume(self, queue: str | Queue[Any], *, group: str | None = None) -> None:
        """See `filao.Broker.resume`."""
        self._call(partial(self._broker.resume, queue, group=group))

    def doctor(self) -> list[Finding]:
        """See `filao.Broker.doctor`."""
        return self._call(self._broker.doctor)

    # --- below the door ----------------------------------------------------------------------------------------------------

    def _call(self, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
        """Run a coroutine function on the loop and wait for it; a caller that is interrupted takes its call back."""
        return self._usable().call(function, *arguments)

    def _usable(self) -> Caller:
        """Return whom to ask. Raises `ConfigurationError` when it is not open."""
        caller = self._caller
        if caller is None and self._is_inherited:
            self.open()
            caller = self._caller
        if caller is None:
            raise ConfigurationError(self._refusal)
        return caller

    def _inherit(self) -> None:
        """Become, in a child process, a broker that opens itself when it is used."""
        keep((self._broker, self._thread))
        self._is_inherited = self._caller is not None
        self._opening = threading.RLock()
        self._broker, self._is_used = _again(self._broker), False
        self._caller = self._thread = None


class Message(Generic[T]):
    """See `filao.Message`."""

    __slots__ = ("_caller", "_message")

    def __init__(self, caller: Caller, message: AsyncMessage[T]) -> None:
        self._caller = caller
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

    def __getitem__(self, key: Any) -> Any:
        """Read a key of the body, as `message["claim_id"]`."""
        return self._message[key]

    def __repr__(self) -> str:
        return repr(self._message)

    def ack(self) -> None:
        """See `filao.Message.ack`."""
        self._caller.call(self._message.ack)

    def nack(self, *, delay: float | None = None, reason: str | BaseException = "") -> None:
        """See `filao.Message.nack`."""
        self._caller.call(partial(self._message.nack, delay=delay, reason=reason))

    def reject(self, reason: str | BaseException = "") -> None:
        """See `filao.Message.reject`."""
        self._caller.call(self._message.reject, reason)

    def release(self) -> None:
        """See `filao.Message.release`."""
        self._caller.call(self._message.release)

    def extend(self, seconds: float) -> None:
        """See `filao.Message.extend`."""
        self._caller.call(self._message.extend, seconds)

    def transaction(self) -> "AbstractContextManager[Transaction]":
        """See `filao.Message.transaction`."""
        return _transaction(self._caller, self._message.transaction)


class Transaction:
    """See `filao.Transaction`."""

    def __init__(self, caller: Caller, transaction: AsyncTransaction) -> None:
        self._caller = caller
        self._transaction = transaction

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """See `filao.Transaction.execute`."""
        return self._caller.call(self._transaction.execute, sql, parameters)

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
        return self._caller.call(send)

    def send_many(
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
        return self._caller.call(send)

    def ack(self, message: Message[Any]) -> None:
        """See `filao.Transaction.ack`."""
        self._caller.call(self._transaction.ack, inner_of(message))


def inner_of(message: Message[T]) -> AsyncMessage[T]:
    """Return the async message behind a blocking one."""
    return message._message  # noqa: SLF001


def door_of(broker: Broker) -> AsyncBroker:
    """Return the async broker behind a blocking one, for what runs on its loop by `call_on`."""
    return broker._broker  # noqa: SLF001


def call_on(broker: Broker, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
    """Run a coroutine function on a broker's loop, and return what it does."""
    return broker._call(function, *arguments)  # noqa: SLF001


def _again(broker: AsyncBroker) -> AsyncBroker:
    """Return another broker on the same storage."""
    session = session_of(broker)
    return AsyncBroker(Session(session.make, session.observers))


def _back(broker: AsyncBroker) -> Callable[[list[AsyncMessage[Any]]], None]:
    """Return what gives back messages that came for somebody who has gone away."""
    give_back = receiving_of(broker).give_back
    return lambda came: give_back(*came)


def _transaction(caller: Caller, opening: Callable[[], Any]) -> Held[AsyncTransaction, Transaction]:
    """Return a transaction for a thread, which knows meanwhile that it is in one."""
    outer = current_transaction.get()

    def entered(transaction: AsyncTransaction) -> Transaction:
        current_transaction.set(inside_of(transaction))
        return Transaction(caller, transaction)

    return caller.held(opening, entered, lambda: current_transaction.set(outer))


def _run_here(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never waits in the calling thread: a send within its transaction touches no loop."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        result: R = returned.value
        return result
    coroutine.close()
    raise AssertionError("a send within a transaction waited")


def _after_fork() -> None:
    brokers = list(_open_brokers)
    _open_brokers.clear()
    for broker in brokers:
        broker._inherit()  # noqa: SLF001 - the ones below too: users do not see what is not for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
