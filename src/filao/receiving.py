"""Receiving: look, wait in line, decode; bury what does not fit its queue's type, delete first what is had at most once.

Whatever is received and cannot be handed over is given back: its caller was cancelled, or the broker closes.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar, cast

from filao.at_most_once import AtMostOnce
from filao.batching import Batcher, look_away
from filao.codec import codec_for
from filao.engine import Delivery, Engine, Receive, Received, Reject, Release, Settle
from filao.message import Guarantee, Message, Settler
from filao.queue import Queue, T

R = TypeVar("R")


class Receiving:
    """What a broker does to receive."""

    def __init__(
        self,
        settler: Settler,
        engine: Engine,
        batcher: Batcher,
        check_usable: Callable[[], None],
        is_open: Callable[[], bool],
    ) -> None:
        self._settler = settler
        self._engine = engine
        self._batcher = batcher
        self._check_usable = check_usable
        self._is_open = is_open
        self.at_most_once = AtMostOnce(settler)

    async def wait(
        self, known: Queue[T], receive: Receive, wait: float | None, guarantee: Guarantee
    ) -> list[Message[T]]:
        """Look, and wait in line, until there is something or the time is up."""
        now = asyncio.get_running_loop().time
        deadline = None if wait is None else now() + wait
        while True:
            self._check_usable()
            place = self._engine.waiter(receive, self._batcher.submit, self.return_unread)
            messages, due_in = ([], None) if place.is_behind() else await self.look(known, receive, guarantee)
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
        self, known: Queue[T], receive: Receive, guarantee: Guarantee
    ) -> tuple[list[Message[T]], float | None]:
        """Return the messages that are there or, when there are none, the seconds until one is due."""
        if guarantee == "at-most-once" and (deleted := self.at_most_once.left(known.name, receive.limit)):
            return deleted, None
        while True:
            received = cast("Received", await self._taken(self._batcher.submit(receive)))
            messages = await self._read(known, received, guarantee) if received.deliveries else []
            if messages or not received.deliveries:  # else all that came was malformed, and is dead now
                return messages, received.due_in

    async def _taken(self, future: "asyncio.Future[R]") -> R:
        """Return what was received, or give it back when our caller was cancelled in the turn in which it came."""
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.return_unread(future.result())
            raise

    async def _read(self, known: Queue[T], received: Received, guarantee: Guarantee) -> list[Message[T]]:
        """Make messages of deliveries; what does not decode dies, what is received at most once is deleted first."""
        read = codec_for(known.body).decode
        messages: list[Message[T]] = []
        malformed: list[tuple[Delivery, str]] = []
        for delivery in received.deliveries:
            try:
                messages.append(Message(self._settler, delivery, read(delivery.kind, delivery.content)))
            except ValueError as error:
                malformed.append((delivery, f"the body does not fit the queue's type: {error}"))
        try:
            for delivery, why in malformed:
                await self._settler.settle(delivery, Reject(why, malformed=True))
        except asyncio.CancelledError:
            self.return_unread(received)
            raise
        return await self.at_most_once.deleted(messages) if guarantee == "at-most-once" else messages

    def return_unread(self, result: object) -> None:
        """Give back what nobody will look at, because its caller was cancelled: deliveries, or messages."""
        if isinstance(result, Received):
            for delivery in result.deliveries:
                self.give_back(delivery)
        messages = cast("list[object]", result) if isinstance(result, list) else [result]
        for message in messages:
            if isinstance(message, Message):
                unread = cast("Message[object]", message)
                if unread.settled:
                    self.at_most_once.leave([unread])  # which was deleted already
                else:
                    self.give_back(unread.delivery)

    def give_back(self, delivery: Delivery) -> None:
        """Release a message, and wait for nothing."""
        if self._is_open():  # a closing engine gives back all it holds
            self._batcher.submit(Settle(delivery, Release())).add_done_callback(look_away)
