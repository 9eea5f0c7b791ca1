"""The blocking twin: the same names without `await`, for programs that have no event loop.

One thread with an event loop runs an async broker. A call that need not wait is done in the calling thread, unless a
handler of the program's signals could interrupt it and make another call; all others are handed to the loop. So any
number of threads may share a `Broker`, and what they do at the same moment shares commits, as concurrent tasks do.
Guarantees, units and errors are those of `filao.broker` and `filao.message`, from which the calls are derived, with
their types and docstrings. Only what differs is written out: opening and closing, what returns or takes messages, and
what is no coroutine.

A program without a place for `with` may open it anywhere, even in a module: `broker = filao.sync.connect(url);
broker.open()`. It closes itself when the interpreter ends, and opens itself again in a child process that uses it.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Self, TypeVar, cast, overload

from filao.broker import Broker as AsyncBroker
from filao.broker import connect as connect_async
from filao.broker import received_at_once, receiving_of, session_of
from filao.calls import Caller, Held, stay_if_it_ends
from filao.codec import shown
from filao.draft import listed
from filao.engine import Engine, Feature
from filao.engines import Durability
from filao.errors import ConfigurationError
from filao.forks import Living, keep
from filao.loop_thread import LoopThread
from filao.message import Guarantee, inside_of, settled_by
from filao.message import Message as AsyncMessage
from filao.message import Transaction as AsyncTransaction
from filao.observing import Observers
from filao.queue import Queue, T
from filao.session import OPEN_ALREADY, Session, current_transaction, own_transaction

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K", bound=type[Any])

_FORMS = "`with filao.sync.connect(…) as broker:`, or `broker.open()` in a program without a place for `with`"
_NOT_OPEN = f"this broker is not open: use {_FORMS}"
_CLOSED = "this broker is closed: open it again, with `with broker:` or `broker.open()`"
_brokers: "Living[Broker]" = Living()
_open_brokers: "set[Broker]" = set()
"""They live until they are closed, though the program has forgotten them."""


def connect(
    url: str | Path | Callable[[], Engine],
    *,
    durability: Durability = "full",
    clock: Callable[[], float] = time.time,
) -> "Broker":
    """Return a blocking broker; `with` opens and closes it, or `open` and `close` do. See `filao.connect`."""
    return Broker(connect_async(url, durability=durability, clock=clock))


def _blocking(function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that runs a coroutine function of `_inner` on the loop, by `_caller`, and waits for it.

    Type checkers carry over parameters, overloads and type variables; `wraps` carries over docstring and signature.
    Such methods are `Final`, because in an installed package checkers rely on an inferred type only then.
    """

    @wraps(function)
    def call(self: Any, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        caller: Caller = self._caller
        return caller.call(partial(function, self._inner, *arguments, **keywords))

    call.__module__ = __name__
    return call


def _done_here(function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that runs a coroutine function of `_here`, whose session blocks, in the calling thread."""

    @wraps(function)
    def call(self: Any, /, *arguments: P.args, **keywords: P.kwargs) -> R:
        return _run_here(function(self._here, *arguments, **keywords))

    call.__module__ = __name__
    return call


def _reading(send: F) -> F:
    """Return a method that reads the bodies in the calling thread: their source may belong to it, or block."""

    @wraps(send)
    def call(self: Any, /, queue: Any, bodies: Iterable[Any], **terms: Any) -> Any:
        return send(self, queue, listed(bodies), **terms)

    return cast("F", call)


def _documented_by(twin: type[Any]) -> Callable[[K], K]:
    """Give members that are written out without a docstring the one of their twin."""

    def documented(ours: K) -> K:
        for name, member in vars(ours).items():
            if not name.startswith("_") and member.__doc__ is None:
                member.__doc__ = vars(twin)[name].__doc__
        return ours

    return documented


@_documented_by(AsyncBroker)
class Broker:
    """See `filao.Broker`; safe from many threads.

    A broker that is open when the interpreter ends closes itself. In a forked child process it opens itself again when
    it is used; messages and transactions stay with the process that received or began them.
    """

    def __init__(self, broker: AsyncBroker) -> None:
        self._inner = broker
        self._thread: LoopThread | None = None
        self._refusal = _NOT_OPEN
        self._opening = threading.RLock()  # the handler of a signal may close a broker that is half open
        self._is_inherited = False
        self._is_used = False
        _brokers.add(self)

    @property
    def observers(self) -> Observers:
        """Are told what this broker does, in the thread of its event loop; see `filao.Observer`."""
        return self._inner.observers

    def __enter__(self) -> Self:
        with self._opening:  # so that of two blocks that begin together one is refused
            if self._thread is not None:
                raise ConfigurationError(OPEN_ALREADY)
            self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect to the engine; `with` does it. Idempotent. A closed broker can be opened again."""
        with self._opening:
            if self._thread is not None:
                return
            if self._is_used:
                self._inner = _again(self._inner)  # the last one may still be closing, if `close` was interrupted
            self._is_used = True
            thread = LoopThread(self._inner)
            try:
                thread.start()
                _open_brokers.add(self)
                self._thread = thread
            except BaseException:
                thread.stop()
                raise
            self._is_inherited = False

    def close(self) -> None:
        """Finish what has begun, give back the leases that are still held, and close, within 30 s. Idempotent."""
        with self._opening:
            thread = self._thread
            if thread is not None:
                thread.caller.check_thread()
                thread.leave(threading.get_ident())
                thread.stop()
                self._refusal = _CLOSED
            self._thread = None
            self._is_inherited = False
            _open_brokers.discard(self)
        if thread is not None:
            thread.join()

    @property
    def features(self) -> frozenset[Feature]:
        return self._inner.features

    @property
    def emulated(self) -> frozenset[Feature]:
        return self._inner.emulated

    declare: Final = _blocking(AsyncBroker.declare)
    queues: Final = _blocking(AsyncBroker.queues)
    delete_queue: Final = _blocking(AsyncBroker.delete_queue)

    send_to_queue: Final = _done_here(AsyncBroker.send_to_queue)
    send_many: Final = _reading(_done_here(AsyncBroker.send_many))

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
        here = self._here
        caller = self._caller
        messages = _run_here(received_at_once(here, queue, limit, wait=wait, lease=lease, guarantee=guarantee))
        if messages is None:
            receive = partial(self._inner.receive_many, queue, limit, wait=wait, lease=lease, guarantee=guarantee)
            messages = caller.take(receive, _back(self._inner))
        return [Message(caller, session_of(here), message) for message in messages]

    def consume(
        self,
        queue: str | Queue[T],
        *,
        prefetch: int = 1,
        wait: float | None = None,
        lease: float | None = None,
        guarantee: Guarantee = "at-least-once",
    ) -> "Generator[Message[T]]":
        outside = session_of(self._here)
        caller = self._caller
        messages = self._inner.consume(queue, prefetch=prefetch, wait=wait, lease=lease, guarantee=guarantee)
        turn = asyncio.Lock()  # a call that was taken back may still be ending

        async def take() -> AsyncMessage[T]:
            async with turn:
                return await anext(messages)

        async def end() -> None:
            async with turn:
                await messages.aclose()

        try:
            while True:
                yield Message(caller, outside, caller.take(take, receiving_of(self._inner).give_back))
        except StopAsyncIteration:
            return
        finally:
            with suppress(ConfigurationError):  # it was closed, and gave back what it held
                caller.call(end)

    def transaction(self) -> "AbstractContextManager[Transaction]":
        return _transaction(self._caller, self._inner.transaction)

    stats: Final = _blocking(AsyncBroker.stats)
    peek: Final = _blocking(AsyncBroker.peek)
    dead_letters: Final = _blocking(AsyncBroker.dead_letters)
    redrive: Final = _blocking(AsyncBroker.redrive)
    purge: Final = _blocking(AsyncBroker.purge)
    cancel: Final = _blocking(AsyncBroker.cancel)
    discard: Final = _blocking(AsyncBroker.discard)
    pause: Final = _blocking(AsyncBroker.pause)
    resume: Final = _blocking(AsyncBroker.resume)
    trace: Final = _blocking(AsyncBroker.trace)
    doctor: Final = _blocking(AsyncBroker.doctor)

    # --- below the door ----------------------------------------------------------------------------------------------

    @property
    def _caller(self) -> Caller:
        """Makes calls on the loop. Raises `ConfigurationError` when the broker is not open."""
        return self._usable().caller

    @property
    def _here(self) -> AsyncBroker:
        """Does what it can in the calling thread. Raises `ConfigurationError` where it cannot be used."""
        thread = self._usable()
        thread.caller.check_thread()
        return thread.here

    def _usable(self) -> LoopThread:
        if self._thread is None and self._is_inherited:
            self.open()
        own_transaction()  # so that this thread is in none that it only began in
        thread = self._thread
        if thread is None:
            raise ConfigurationError(self._refusal)
        return thread

    def _inherit(self) -> None:
        """In a child process: become a broker that opens itself when it is used, if it was open."""
        self._opening = threading.RLock()  # another thread of the parent's may have been opening or closing it
        if not self._is_used:
            return
        keep((self._inner, self._thread))
        self._is_inherited = self._thread is not None
        self._inner, self._is_used = _again(self._inner), False
        self._thread = None


@_documented_by(AsyncMessage)
class Message(Generic[T]):
    """See `filao.Message`."""

    __slots__ = ("_caller", "_inner")

    def __init__(self, caller: Caller, outside: Session, message: AsyncMessage[T]) -> None:
        self._caller = caller
        self._inner = settled_by(message, outside)

    @property
    def body(self) -> T:
        """The body, of the queue's type."""
        return self._inner.body

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def queue(self) -> str:
        return self._inner.queue

    @property
    def attempt(self) -> int:
        return self._inner.attempt

    @property
    def headers(self) -> dict[str, str]:
        return self._inner.headers

    @property
    def group(self) -> str | None:
        return self._inner.group

    @property
    def priority(self) -> int:
        return self._inner.priority

    @property
    def sent_at(self) -> datetime:
        return self._inner.sent_at

    @property
    def settled(self) -> bool:
        return self._inner.settled

    def __getitem__(self, key: Any) -> Any:
        return self._inner[key]

    def __contains__(self, key: object) -> bool:
        return key in self._inner

    __iter__ = None

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def _here(self) -> AsyncMessage[T]:
        """What does it in this thread. Raises `ConfigurationError` where nothing can be done."""
        own_transaction()  # so that this thread is in none that it only began in
        self._caller.check_thread()
        return self._inner

    ack: Final = _done_here(AsyncMessage[Any].ack)
    nack: Final = _done_here(AsyncMessage[Any].nack)
    reject: Final = _done_here(AsyncMessage[Any].reject)
    release: Final = _done_here(AsyncMessage[Any].release)
    extend: Final = _done_here(AsyncMessage[Any].extend)

    def transaction(self) -> "AbstractContextManager[Transaction]":
        return _transaction(self._caller, self._inner.transaction)


@_documented_by(AsyncTransaction)
class Transaction:
    """See `filao.Transaction`."""

    def __init__(self, caller: Caller, transaction: AsyncTransaction) -> None:
        self._caller = caller
        self._inner = transaction

    execute: Final = _blocking(AsyncTransaction.execute)
    send_to_queue: Final = _blocking(AsyncTransaction.send_to_queue)
    send_many: Final = _reading(_blocking(AsyncTransaction.send_many))

    def ack(self, message: Message[Any]) -> None:
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
            raise ConfigurationError(f"ack was given {shown(message)}; give a message that this broker has received")
        self._caller.call(self._inner.ack, inner_of(message))


def inner_of(message: Message[T]) -> AsyncMessage[T]:
    """Return the async message behind a blocking one."""
    return message._inner  # noqa: SLF001


def door_of(broker: Broker) -> AsyncBroker:
    """Return the async broker behind a blocking one, for functions that `call_on` runs on its loop."""
    return broker._inner  # noqa: SLF001


def call_on(broker: Broker, function: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
    """Run a coroutine function on a broker's loop, and return its result."""
    return broker._caller.call(function, *arguments)  # noqa: SLF001


def _again(broker: AsyncBroker) -> AsyncBroker:
    """Return another broker on the same storage."""
    session = session_of(broker)
    return AsyncBroker(Session(session.make, session.observers))


def _back(broker: AsyncBroker) -> Callable[[list[AsyncMessage[Any]]], None]:
    """Return a function that gives back messages whose receiver has gone."""
    give_back = receiving_of(broker).give_back
    return lambda came: give_back(*came)


def _transaction(caller: Caller, opening: Callable[[], Any]) -> Held[AsyncTransaction, Transaction]:
    """Return a transaction for a thread, in whose context `current_transaction` is set meanwhile."""
    outer = own_transaction()

    def entered(transaction: AsyncTransaction) -> Transaction:
        inside = inside_of(transaction)
        inside.holder = threading.get_ident()
        current_transaction.set(inside)
        return Transaction(caller, transaction)

    return caller.held(opening, entered, lambda: current_transaction.set(outer))


def _run_here(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never suspends in the calling thread."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        result: R = returned.value
        return result
    except BaseException:
        stay_if_it_ends()
        raise
    coroutine.close()
    raise AssertionError("what is done in the calling thread waited")


def _after_fork() -> None:
    for broker in _brokers:
        broker._inherit()  # noqa: SLF001 - users do not see it
    _open_brokers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
