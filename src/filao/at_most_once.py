"""At most once: a message is durably deleted before it is handed over.

Invariant: a message that was deleted for a receive is given to a receive. If its own is cancelled during the deletion,
another receive from the same queue and broker gets the message, now or later. What is left when the broker closes is
lost, which this guarantee allows.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import Any

from filao.engine import Ack, Received
from filao.errors import LeaseLost
from filao.guarded import Log
from filao.message import AT_MOST_ONCE, Message, delivery_of, mark_settled
from filao.session import Session

log: Log = Log(logging.getLogger("filao"))

Taken = Callable[["asyncio.Future[Received]"], Awaitable[Received]]


class AtMostOnce:
    """Deletes what is received, and keeps what was deleted for receives that were cancelled."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._left: defaultdict[str, deque[Message[Any]]] = defaultdict(deque)
        self._waiting: defaultdict[str, list[asyncio.Future[Received]]] = defaultdict(list)

    async def deleted(self, messages: list[Message[Any]]) -> list[Message[Any]]:
        """Delete messages, and return those that were deleted; a message whose lease was lost is left out."""
        deleting = [self._session.settle(delivery_of(message), Ack(before_work=True)) for message in messages]
        done = asyncio.gather(*deleting, return_exceptions=True)
        try:
            answers = await asyncio.shield(done)
        except asyncio.CancelledError:
            done.add_done_callback(lambda done: self.leave(_acked(messages, done.result())))
            raise
        for error in answers:
            if isinstance(error, BaseException) and not isinstance(error, LeaseLost):
                self.leave(_acked(messages, answers))
                raise error
        return _acked(messages, answers)

    def has_left(self, queue: str) -> bool:
        """Return whether something is left of a queue, which a look into the queue would not find."""
        return bool(self._left.get(queue))

    def left(self, queue: str, limit: int) -> list[Message[Any]]:
        """Return messages that were deleted for a receive that did not get them."""
        left = self._left.get(queue)
        return [left.popleft() for _ in range(min(limit, len(left)))] if left else []

    async def wait(self, queue: str, came: "asyncio.Future[Received]", taken: Taken) -> Received:
        """Wait by `taken` for what comes from the queue; return nothing once something is left."""
        if self.has_left(queue):  # it was left after the look before this wait
            came.cancel()
            return Received([])
        self._waiting[queue].append(came)
        try:
            return await taken(came)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if came.cancelled() and task is not None and not task.cancelling():
                return Received([])
            raise
        finally:
            self._waiting[queue].remove(came)

    def close(self) -> None:
        """Log what is lost."""
        for queue, left in self._left.items():
            for message in left:
                log.warning(
                    "message %s of %r was received at most once, by a call that was cancelled",
                    *(message.id, queue),
                    extra={"queue": queue, "message_id": message.id, "attempt": message.attempt},
                )
            left.clear()

    def leave(self, messages: list[Message[Any]]) -> None:
        """Keep messages that were deleted for a receive that does not get them, and wake a receive for each."""
        for message in messages:
            self._left[message.queue].append(message)
            any(came.cancel() for came in self._waiting[message.queue])  # cancels the first that has nothing yet


def _acked(messages: list[Message[Any]], answers: list[Any]) -> list[Message[Any]]:
    acked = [message for message, error in zip(messages, answers, strict=True) if error is None]
    for message in acked:
        mark_settled(message, AT_MOST_ONCE)
    return acked
