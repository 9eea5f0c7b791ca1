"""The seam for whoever watches a program: observers are told of operations and of the runs of a worker.

A broker without observers pays one look at an empty list for each batch. What an observer raises is logged once and
never reaches a message.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from filao.engine import Batch, Delivery, Operation, Receive, Received, Result, Send, Settle
from filao.errors import FilaoError

log = logging.getLogger("filao.observing")

Verb = Literal["send", "receive", "settle", "extend"]
Execute = Callable[[Batch], Awaitable[Sequence["Result | asyncio.Future[Result]"]]]


@dataclass(frozen=True, slots=True)
class Operated:
    """Operations of one kind on one queue, which one batch has done; or which failed alike."""

    verb: Verb
    queue: str
    operations: int
    messages: int
    seconds: float
    """From the batch's beginning to its end: it is shared by all in it."""
    error: str = ""
    """The name of the error; empty when they were done."""


class Observer(Protocol):
    """What is told of everything. It is called on event loops, the broker's and that of a worker's keeper, so in two
    threads;
    and must return at once.
    """

    def operated(self, done: Operated) -> None:
        """Learn of operations. Looks that found nothing are not told; nor is what a transaction does."""

    def began(self, delivery: Delivery) -> None:
        """Learn that a worker begins to handle a message."""

    def ended(self, delivery: Delivery, how: str, seconds: float) -> None:
        """Learn how that ended, as in `Handled.how`, and how long the handler took."""


class Observers:
    """Those that watch one broker."""

    def __init__(self) -> None:
        self.all: list[Observer] = []
        """A batcher looks at it for each batch, and so pays nothing for those that are not there."""
        self._failed: set[int] = set()
        """Those that were complained of."""

    def __bool__(self) -> bool:
        return bool(self.all)

    def add(self, observer: Observer) -> None:
        """Tell it from now on."""
        self.all.append(observer)

    def remove(self, observer: Observer) -> None:
        """Tell it no more; harmless when it was not told."""
        if observer in self.all:
            self.all.remove(observer)
            self._failed.discard(id(observer))

    def began(self, delivery: Delivery) -> None:
        """Tell that a run began."""
        self._tell(lambda observer: observer.began(delivery))

    def ended(self, delivery: Delivery, how: str, seconds: float) -> None:
        """Tell how a run ended."""
        self._tell(lambda observer: observer.ended(delivery, how, seconds))

    def watch(self, execute: Execute) -> Execute:
        """Return what executes a batch and tells of it."""
        return partial(self._executed, execute)

    async def _executed(self, execute: Execute, batch: Batch) -> "Sequence[Result | asyncio.Future[Result]]":
        taken: list[Operation] = []

        def take(accept: Callable[[Operation], bool]) -> list[Operation]:
            operations = batch.take(accept)
            taken.extend(operations)
            return operations

        began = time.perf_counter()
        try:
            results = await execute(Batch(batch.receives, batch.writes, take))
        except (Exception, asyncio.CancelledError) as error:
            self._tell_all(taken, [error] * len(taken), time.perf_counter() - began)
            raise
        self._tell_all(taken, results, time.perf_counter() - began)
        for operation, result in zip(taken, results, strict=True):
            if isinstance(result, asyncio.Future):  # it waits for somebody, and is told when it is done
                result.add_done_callback(partial(self._tell_late, operation, began))
        return results

    def _tell_late(self, operation: Operation, began: float, late: "asyncio.Future[Result]") -> None:
        if not late.cancelled():
            self._tell_all([operation], [late.exception() or late.result()], time.perf_counter() - began)

    def _tell_all(
        self,
        operations: Sequence[Operation],
        results: "Sequence[Result | asyncio.Future[Result] | BaseException]",
        seconds: float,
    ) -> None:
        counts: dict[tuple[Verb, str, str], list[int]] = {}
        for operation, result in zip(operations, results, strict=True):
            if isinstance(result, asyncio.Future):
                continue
            error = type(result).__name__ if isinstance(result, BaseException) else ""
            verb, queue, messages = _described(operation, result)
            if messages or error:
                key = (verb, queue, error)
                if key in counts:
                    count = counts[key]
                    count[0] += 1
                    count[1] += messages
                else:
                    counts[key] = [1, messages]
        for (verb, queue, error), (number, messages) in counts.items():
            self._tell(partial(_operated, Operated(verb, queue, number, messages, seconds, error)))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in list(self.all):
            try:
                call(observer)
            except Exception:
                if id(observer) not in self._failed:
                    self._failed.add(id(observer))
                    log.exception("the observer %r failed; it goes on, and is not complained of again", observer)


def _operated(done: Operated, observer: Observer) -> None:
    observer.operated(done)


def _described(operation: Operation, result: Result | BaseException) -> tuple[Verb, str, int]:
    """Return what was done, to which queue, and to how many messages."""
    if isinstance(operation, Settle):
        return "settle", operation.delivery.queue, 1
    if isinstance(operation, Receive):
        return "receive", operation.queue, len(result.deliveries) if isinstance(result, Received) else 0
    if isinstance(operation, Send):
        return "send", operation.queue, 0 if isinstance(result, FilaoError) else len(operation.drafts)
    return "extend", operation.delivery.queue, 1
