"""Messages that were taken but must not be handed over: unreadable, spent or expired, they become dead letters.

Each is buried by a task of its own. A receive waits a moment for those that it met, and goes on without them: a server
without room confirms nothing, and no receive or settle should wait for that. A message stays here until its dead letter
is confirmed; if that fails, it goes back to the head of its queue.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiormq.abc import DeliveredMessage

from filao.engine import Delivery
from filao.engines.rabbitmq import envelope, wire
from filao.engines.rabbitmq.consumer import Consumer
from filao.engines.rabbitmq.publisher import Limited, Publisher
from filao.errors import FilaoError
from filao.guarded import Log
from filao.printable import printable
from filao.queue import Queue

MOMENT = 1.0  # seconds that a receive waits for burials: a server that has room takes milliseconds
AT_ONCE_MAX = 200  # burials in one process, above which no receive looks for more: with the largest bodies some 50 MB
ENDED_WITHIN = 0.5  # seconds that closing waits for burials: whoever receives such a message next buries it

log: Log = Log(logging.getLogger("filao.rabbitmq"))


@dataclass(frozen=True, slots=True)
class Burial:
    """A message to be buried, and why."""

    delivery: Delivery
    message: DeliveredMessage
    used: int
    reason: str
    error: str


def burial_of(queue: Queue, delivery: Delivery, message: DeliveredMessage) -> Burial | None:
    """Return the burial of a message that must not be handed over; None for any other."""
    used = delivery.attempt - 1
    unreadable = wire.trouble(message.header.properties)
    if unreadable:
        return Burial(delivery, message, used, "malformed", unreadable)
    if used >= queue.max_attempts:
        return Burial(delivery, message, used, "max_attempts", "every consumer that had it vanished or gave it back")
    if envelope.is_expired(message.header.properties, envelope.now()):
        return Burial(delivery, message, used, "expired", "")
    return None


class Burials:
    """The burials of one process that are under way."""

    def __init__(self, publisher: Publisher, limited: Limited, ended: Callable[[str], None]) -> None:
        self._publisher = publisher
        self._limited = limited
        self._ended = ended
        """Is told the queue of each burial that has ended."""
        self._under_way: set[asyncio.Task[FilaoError | None]] = set()
        self._said = ""

    def is_full(self) -> bool:
        """Return whether there are so many that no receive should look for more."""
        return len(self._under_way) >= AT_ONCE_MAX

    def begin(self, consumer: Consumer, burial: Burial) -> "asyncio.Task[FilaoError | None]":
        """Begin to bury a message that the consumer holds; the task returns the error, if there was one."""
        task = asyncio.get_running_loop().create_task(self._bury(consumer, burial))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def close(self) -> None:
        """Wait a moment for those under way, and cancel the rest: their messages go back with their connection."""
        if self._under_way:
            _, cut_off = await asyncio.wait(self._under_way, timeout=ENDED_WITHIN)
            for task in cut_off:
                task.cancel()
            await asyncio.gather(*cut_off, return_exceptions=True)

    async def _bury(self, consumer: Consumer, burial: Burial) -> FilaoError | None:
        delivery = burial.delivery
        try:
            with consumer.settling(delivery.handle):
                async with self._limited():
                    await self._publisher.bury(delivery, burial.message, burial.used, burial.reason, burial.error)
                    await consumer.channel.basic_ack(delivery.handle, wait=False)
            self._said = ""
        except FilaoError as error:
            if consumer.is_open:  # otherwise the server has the message back already
                self._say(burial, error)
                await consumer.give_back([burial.message])
            return error
        finally:
            self._ended(delivery.queue)
        return None

    def _say(self, burial: Burial, error: FilaoError) -> None:
        """Log a failure, once while it repeats."""
        if self._said != str(error):
            self._said = str(error)
            log.warning(
                "message %s of %r cannot be made a dead letter (%s), so it is back at the head of its queue: %s",
                *(printable(burial.delivery.id), burial.delivery.queue, burial.reason, printable(str(error))),
                extra={"queue": burial.delivery.queue, "message_id": burial.delivery.id},
            )


async def failure(burials: "Iterable[asyncio.Task[FilaoError | None]]", until: float) -> FilaoError | None:
    """Wait for these burials, but not longer than `until` (the loop's clock); return the error of one that failed."""
    done, _ = await asyncio.wait(burials, timeout=max(0.0, until - asyncio.get_running_loop().time()))
    return next((error for task in done if not task.cancelled() and (error := task.result()) is not None), None)
