"""The seam for monitoring: observers learn of operations and of a worker's runs; tracers follow each message.

A broker that nobody watches pays one look at an empty list for each batch, and for each send and settle. What an
observer raises is logged once and never reaches a message, even what is no `Exception`, such as `SystemExit` or an
`asyncio.CancelledError` of its own. Only a `KeyboardInterrupt` passes: it comes from outside, in the midst of anything.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar, cast, runtime_checkable

from filao.engine import Delivery, Extend, Operation, Receive, Received, Result, Send, Settle
from filao.guarded import Log

log: Log = Log(logging.getLogger("filao.observing"))

Verb = Literal["send", "receive", "settle", "extend"]
_VERBS: Mapping[type, Verb] = {Send: "send", Receive: "receive", Settle: "settle", Extend: "extend"}
Results = Sequence["Result | asyncio.Future[Result] | BaseException"]
Ended = Callable[["Result | BaseException"], None]
"""Is told what came of an operation."""
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Operated:
    """Operations of one kind on one queue, in one batch, that were done or failed with the same error."""

    verb: Verb
    queue: str
    operations: int
    messages: int
    seconds: float
    """How long the whole batch took."""
    error: str = ""
    """The name of the error; empty when they were done."""


class Observer(Protocol):
    """Learns of everything that one broker or worker does.

    It is called in two threads, on the broker's event loop and on that of a worker's keeper, and must return at once.
    """

    def operated(self, done: Operated) -> None:
        """Learn of operations, except looks that found nothing and what a transaction does."""

    def began(self, delivery: Delivery) -> None:
        """Learn that a worker begins to handle a message."""

    def ended(self, delivery: Delivery, how: str, seconds: float) -> None:
        """Learn how that ended, as in `Handled.how`, and how long the handler took."""


@runtime_checkable
class Tracer(Protocol):
    """Follows messages from their sender to their handler; `engine` is SQLite, PostgreSQL or RabbitMQ.

    It is called in the context of the code that asks for an operation, and must return at once.
    """

    def asked(self, engine: str, operation: Send | Settle) -> tuple[Send | Settle, Ended]:
        """Learn of a send or a settle before it is done, also in a transaction.

        Return the operation to do in its place, in which only headers may be added, and a function that is told how it
        ended.
        """
        ...

    def received(self, engine: str, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Learn what a caller has received, at least one message, by a look that took so many seconds."""

    def handling(self, engine: str, delivery: Delivery) -> None:
        """Learn that a worker begins to handle a message; its handler sees the context variables that are set here."""

    def handled(self, delivery: Delivery, how: str, seconds: float, error: str) -> None:
        """Learn how that ended, as in `Handled.how`, and with which kind of exception; empty: with none."""


class Observers:
    """The observers and tracers of one broker."""

    def __init__(self) -> None:
        self.all: list[Observer] = []
        """A batcher checks it for each batch, so no observers cost next to nothing."""
        self.tracers: list[Tracer] = []
        """A session checks it for each send and each settle."""
        self.engine: str = ""
        """The engine's name for users."""
        self._failed: set[int] = set()
        """The identities of those whose failure has been logged."""

    def __bool__(self) -> bool:
        return bool(self.all or self.tracers)

    def __contains__(self, observer: Observer | Tracer) -> bool:
        return observer in self._like(observer)

    def add(self, observer: Observer | Tracer) -> None:
        """Tell it of everything from now on."""
        self._like(observer).append(observer)

    def remove(self, observer: Observer | Tracer) -> None:
        """Tell it nothing more; harmless if it was never added."""
        if observer in self:
            self._like(observer).remove(observer)
            self._failed.discard(id(observer))

    def _like(self, observer: Observer | Tracer) -> "list[Observer | Tracer]":
        return cast("list[Observer | Tracer]", self.tracers if isinstance(observer, Tracer) else self.all)

    # --- runs of a worker --------------------------------------------------------------------------------------------

    def began(self, delivery: Delivery) -> None:
        """Tell that a run began, in the context that its handler gets."""
        self._tell(self.all, lambda observer: observer.began(delivery))
        self._tell(self.tracers, lambda tracer: tracer.handling(self.engine, delivery))

    def ended(self, delivery: Delivery, how: str, seconds: float, error: str) -> None:
        """Tell how a run ended."""
        self._tell(self.all, lambda observer: observer.ended(delivery, how, seconds))
        self._tell(self.tracers, lambda tracer: tracer.handled(delivery, how, seconds, error))

    # --- operations --------------------------------------------------------------------------------------------------

    def operated(self, operations: Sequence[Operation], results: Results, seconds: float) -> None:
        """Tell the observers what a batch has done; an operation whose result is a future is not done yet."""
        for done in _summed_up(operations, results, seconds):
            self._tell(self.all, partial(_operated, done))

    def asked(self, operation: Send | Settle) -> "Asked":
        """Tell the tracers of an operation that a caller has asked for."""
        told: list[tuple[Tracer, Ended]] = []
        for tracer in list(self.tracers):
            try:
                operation, ended = tracer.asked(self.engine, operation)
                told.append((tracer, ended))
            except BaseException as error:
                self.complain(tracer, error)
        return Asked(self, operation, told)

    def received(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Tell the tracers what a caller has received."""
        self._tell(self.tracers, lambda tracer: tracer.received(self.engine, deliveries, seconds))

    def _tell(self, watchers: Sequence[W], call: Callable[[W], None]) -> None:
        for watcher in list(watchers):
            try:
                call(watcher)
            except BaseException as error:
                self.complain(watcher, error)

    def complain(self, watcher: object, error: BaseException) -> None:
        """Log that an observer has failed, once for each."""
        if isinstance(error, KeyboardInterrupt):
            raise error
        if id(watcher) not in self._failed:
            self._failed.add(id(watcher))
            said = "the observer %r failed; it goes on, and is not complained of again"
            log.error(said, watcher, exc_info=error)


_DONE: frozenset[type] = frozenset({type(None), list, Received})
"""The types of the results of operations that were done."""


class Asked:
    """An operation as tracers changed it; as a context manager it tells them its `result`, or the error."""

    __slots__ = ("_observers", "_told", "operation", "result")

    def __init__(self, observers: Observers, operation: Send | Settle, told: Sequence[tuple[Tracer, Ended]]) -> None:
        self._observers = observers
        self._told = told
        self.operation: Send | Settle = operation
        self.result: Result = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell(self.result if error is None else error)

    def done(self, future: "asyncio.Future[Result]") -> None:
        """Tell them what came of it; to be called back by its future."""
        self._tell(asyncio.CancelledError() if future.cancelled() else future.exception() or future.result())

    def _tell(self, result: Result | BaseException) -> None:
        for tracer, ended in self._told:
            try:
                ended(result)
            except BaseException as error:
                self._observers.complain(tracer, error)


def _operated(done: Operated, observer: Observer) -> None:
    observer.operated(done)


def _summed_up(operations: Sequence[Operation], results: Results, seconds: float) -> list[Operated]:
    """Count operations with the same end together; leave out looks that found nothing and what is not done yet."""
    counts: dict[tuple[Verb, str, str], tuple[int, int]] = {}
    if not _DONE.issuperset(map(type, results)):
        for operation, result in zip(operations, results, strict=True):
            if isinstance(result, BaseException):
                verb, queue, error = _VERBS[type(operation)], operation.queue, type(result).__name__
                number, messages = counts.get((verb, queue, error), (0, 0))
                counts[verb, queue, error] = number + 1, messages + (verb in ("settle", "extend"))
        done = [type(result) in _DONE for result in results]
        operations, results = list(compress(operations, done)), list(compress(results, done))
    for verb, numbers, contents in _done(operations, results):
        counts.update({(verb, queue, ""): (number, contents[queue]) for queue, number in numbers.items()})
    return [
        Operated(verb, queue, number, messages, seconds, error)
        for (verb, queue, error), (number, messages) in counts.items()
    ]


def _done(
    operations: Sequence[Operation], results: Results
) -> Iterator[tuple[Verb, Mapping[str, int], Mapping[str, int]]]:
    """Yield, for each verb, how many operations each queue had, and how many messages were in them.

    Invariant: all of these were done. No function is called for a single operation, so that it costs little.
    """
    kinds = set(map(type, operations))
    if Send in kinds:
        sends = [one for one in operations if type(one) is Send]
        numbers = _numbers([one.queue for one in sends])
        if len(numbers) == 1:
            yield "send", numbers, {sends[0].queue: sum([len(one.drafts) for one in sends])}
        else:
            yield "send", numbers, Counter(one.queue for one in sends for _ in one.drafts)
    if Receive in kinds:
        came = [one.deliveries for one in results if type(one) is Received and one.deliveries]
        messages = _numbers([delivery.queue for deliveries in came for delivery in deliveries])
        yield "receive", _numbers([deliveries[0].queue for deliveries in came]), messages
    if Settle in kinds:
        numbers = _numbers([one.delivery.queue for one in operations if type(one) is Settle])
        yield "settle", numbers, numbers
    if Extend in kinds:
        numbers = _numbers([one.delivery.queue for one in operations if type(one) is Extend])
        yield "extend", numbers, numbers


def _numbers(queues: Sequence[str]) -> Mapping[str, int]:
    """Count how often each queue occurs; most often all are the same."""
    if queues and queues.count(queues[0]) == len(queues):
        return {queues[0]: len(queues)}
    return Counter(queues)
