"""Receiving: look, wait in line, decode; what does not fit its queue's type becomes a dead letter.

What is received but cannot be handed over, because its caller was cancelled or the broker closes, is given back. What
is received at most once is deleted before it is handed over.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

from filao.at_most_once import AtMostOnce
from filao.codec import codec_for, decode_headers, said
from filao.engine import Delivery, Receive, Received, Reject, Result
from filao.errors import EngineError, FilaoError, LeaseLost
from filao.guarded import Log
from filao.message import Guarantee, Message, delivery_of, error_text
from filao.printable import printable
from filao.queue import Queue, T
from filao.session import Session

log: Log = Log(logging.getLogger("filao"))
LOGGED_MAX = 500  # characters of why a body is malformed, in which pydantic quotes the body


class Receiving:
    """Receives for a broker."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.at_most_once: AtMostOnce = AtMostOnce(session)

    async def wait(
        self, known: Queue[T], receive: Receive, wait: float | None, guarantee: Guarantee, since: float | None
    ) -> list[Message[T]]:
        """Look and wait in line until there is something or the time is up; `since` as in `look`."""
        now = asyncio.get_running_loop().time
        deadline = None if wait is None else now() + wait
        while True:
            self._session.check_usable()
            place = self._session.engine.waiter(receive, self._session.submit, self._session.give_back_unread)
            rests = place.is_behind() and not self.at_most_once.has_left(known.name)
            messages, due_in = ([], None) if rests else await self.look(known, receive, guarantee, since)
            since = None
            if not messages:
                left = None if deadline is None else max(0.0, deadline - now())
                came = place.wait(due_in, left)
                if guarantee == "at-most-once":
                    received = await self.at_most_once.wait(known.name, came, self._taken)
                else:
                    received = await self._taken(came)
                messages = await self._read(known, received, guarantee)
            if messages or (deadline is not None and now() >= deadline):
                return messages

    async def look(
        self, known: Queue[T], receive: Receive, guarantee: Guarantee, since: float | None
    ) -> tuple[list[Message[T]], float | None]:
        """Return the messages that are there or, when there are none, the seconds until one is due.

        `since`: when the caller began to wait, if it had to wait for the queue's rules (`time.monotonic`).
        """
        if guarantee == "at-most-once" and (deleted := self.at_most_once.left(known.name, receive.limit)):
            return deleted, None
        while True:
            received = cast("Received", await self._taken(self._session.submit(receive, since)))
            messages = await self._read(known, received, guarantee) if received.deliveries else []
            if messages or not received.deliveries:  # otherwise all that came was malformed: look again
                return messages, received.due_in

    async def at_once(self, known: Queue[T], receive: Receive) -> list[Message[T]] | None:
        """Return the messages that are there, if the calling thread can get them without waiting; otherwise None.

        If any exception interrupts the thread, what it got is given back.
        """
        results: list[Result] = []
        try:
            if not self._session.at_once(receive, results):
                return None
            (received,) = results
            if isinstance(received, FilaoError):
                raise received
            deliveries = cast("Received", received).deliveries
            messages = await self._read(known, cast("Received", received), "at-least-once")
        except BaseException:
            for result in results:
                self._session.give_back_unread(result)
            raise
        return messages if messages or not (deliveries or receive.waiting) else None

    async def each(self, receive: Callable[[], Awaitable[list[Message[T]]]]) -> AsyncGenerator[Message[T]]:
        """Yield messages one by one until none comes; when the loop is left, those that were not yielded go back."""
        ahead: list[Message[T]] = []
        try:
            while ahead := await receive():
                ahead.reverse()
                while ahead:
                    yield ahead.pop()
        finally:
            self.give_back(*reversed(ahead))

    async def _taken(self, future: "asyncio.Future[Any]") -> Any:
        """Return what was received; if the caller is cancelled in the moment in which it comes, give it back."""
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._session.give_back_unread(future.result())
            raise

    async def _read(self, known: Queue[T], received: Received, guarantee: Guarantee) -> list[Message[T]]:
        """Make messages of deliveries; bury those that do not decode, and delete those received at most once."""
        if received.deliveries and self._session.observers.tracers:
            self._session.observers.received(received.deliveries, received.took)
        try:
            messages, malformed = self._fitting(known, received.deliveries)
            if malformed:
                await self._bury(malformed)
        except BaseException:  # a cancelled caller, an error of the type's own code, an engine that is away
            self._session.give_back_unread(received)
            raise
        return await self.at_most_once.deleted(messages) if guarantee == "at-most-once" else messages

    def _fitting(
        self, known: Queue[T], deliveries: list[Delivery]
    ) -> tuple[list[Message[T]], list[tuple[Delivery, str]]]:
        """Return messages of the deliveries that decode, and the others, each with the reason."""
        read = codec_for(known.body).decode
        messages: list[Message[T]] = []
        malformed: list[tuple[Delivery, str]] = []
        for delivery in deliveries:
            try:
                if delivery.headers is not None:
                    decode_headers(delivery.headers)
                messages.append(Message(self._session, delivery, read(delivery.kind, delivery.content)))
            except ValueError as error:
                malformed.append((delivery, f"the body does not fit the queue's type: {said(error)}"))
            except EngineError as error:
                malformed.append((delivery, str(error)))
        return messages, malformed

    async def _bury(self, malformed: list[tuple[Delivery, str]]) -> None:
        for delivery, why in malformed:
            with suppress(LeaseLost):  # decoding took longer than the lease, and another consumer has it
                await self._session.settle(delivery, Reject(error_text(why), malformed=True))
                _log_malformed(delivery, why)

    def give_back(self, *messages: Message[Any]) -> None:
        """Give back messages that nobody gets, because their caller was cancelled."""
        for message in messages:
            if message.settled:
                self.at_most_once.leave([message])  # it was deleted already
            else:
                self._session.give_back(delivery_of(message))


def _log_malformed(delivery: Delivery, why: str) -> None:
    """Log a malformed message at once: after a change of the type, all that waits in a queue may be malformed."""
    log.warning(
        "message %s of %r, attempt %d: a dead letter, malformed: %s",
        *(printable(delivery.id), delivery.queue, delivery.attempt, printable(why[:LOGGED_MAX])),
        extra={"queue": delivery.queue, "message_id": delivery.id, "attempt": delivery.attempt},
    )
