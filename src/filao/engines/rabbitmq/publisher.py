"""Publishing: with confirms, on a connection of its own, and `mandatory`, so that no message vanishes."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import count
from typing import Any

from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed, DeliveryError, PublishError

from filao.engine import Delivery, Draft
from filao.engines.rabbitmq import envelope
from filao.engines.rabbitmq.outlet import Outlet
from filao.engines.rabbitmq.refusals import check_draft
from filao.engines.rabbitmq.server import DOUBT, Link
from filao.engines.rabbitmq.topology import DEAD, DELAY, dead_name, route
from filao.errors import EngineUnavailable, MessageTooLarge, QueueNotFound
from filao.moving import Parcel
from filao.queue import Queue

LARGE = 128 * 1024  # bytes; a larger body gets a channel of its own, which ends if the server refuses the body
LARGE_AT_ONCE = 32  # of these channels in one process; a connection may have 2,047, unless the server says otherwise

Limited = Callable[[], AbstractAsyncContextManager[object]]
"""Makes a block with the time limit of a call on the sending connection; it raises nothing but `FilaoError`."""
_Ready = tuple[bytes, envelope.Properties, float]  # a body, its properties and its delay


class Publisher:
    """Publishes on a link's session, and returns once the server has confirmed."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = count(1)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    def name(self) -> str:
        """Return an id that no other message has, and that nobody can guess."""
        return f"{secrets.token_hex(8)}-{next(self._numbers)}"

    async def send(self, queue: Queue[Any], drafts: Sequence[Draft]) -> list[str]:
        """Send messages and return their ids. They are sent at once: some may be stored though others fail."""
        moment = envelope.now()
        names: list[str] = []
        ready: list[_Ready] = []
        for draft in drafts:
            check_draft(queue, draft)
            names.append(draft.message_id or self.name())
            properties = envelope.written(queue.name, draft, names[-1], draft.ttl or queue.ttl, moment)
            ready.append((draft.content, properties, draft.delay))
        await self._publish_all(queue.name, ready)
        return names

    async def store(self, queue: str, parcel: Parcel) -> None:
        """Publish a message from another engine."""
        place, properties = envelope.of_parcel(queue, parcel)
        delay = 0.0 if parcel.reason else parcel.draft.delay
        await self._publish_all(place, [(parcel.draft.content, properties, delay)])

    async def again(self, queue: str, message: DeliveredMessage, delay: float, used: int) -> None:
        """Send a message again, to come back after `delay` seconds, with `used` attempts."""
        await self._repeat(queue, message.body, envelope.again(message.header.properties, used), delay)

    async def bury(self, delivery: Delivery, message: DeliveredMessage, used: int, reason: str, error: str) -> None:
        """Send a message to the dead letters of its queue, with `used` attempts."""
        properties = envelope.dead(message.header.properties, used, reason, error, envelope.now())
        await self._repeat(dead_name(delivery.queue), message.body, properties, 0)

    async def redrive(self, queue: str, message: DeliveredMessage, edited: Draft | None) -> None:
        """Send a dead letter to its queue, perhaps `edited`."""
        properties = envelope.redriven(message.header.properties, edited)
        if edited is None:
            await self._repeat(queue, message.body, properties, 0)
        else:
            await self._publish_all(queue, [(edited.content, properties, 0)])

    async def _repeat(self, queue: str, content: bytes, properties: envelope.Properties, delay: float) -> None:
        """Publish what the server has had before; that it takes less now is mended there, and no refusal for good."""
        try:
            await self._publish_all(queue, [(content, properties, delay)])
        except MessageTooLarge as error:
            raise EngineUnavailable(
                f"queue {queue!r}: a message of {len(content):,} bytes is above the server's max_message_size, which "
                f"was higher when it was sent. Nothing was done. Raise it in rabbitmq.conf."
            ) from error

    async def _publish_all(self, queue: str, messages: Sequence[_Ready]) -> None:
        if any(len(content) > LARGE for content, _, _ in messages):
            async with self._large, (await self._link.session()).aside(confirms=True) as channel:
                await _publish_all(Outlet(channel), queue, messages)
            return
        outlet = await (await self._link.session()).publishing(queue)
        try:
            await _publish_all(outlet, queue, messages)
        except (DeliveryError, asyncio.CancelledError):
            outlet.retire()
            raise
        finally:
            await outlet.leave()


async def _publish_all(outlet: Outlet, queue: str, messages: Sequence[_Ready]) -> None:
    if len(messages) == 1:
        await _publish(outlet, queue, *messages[0])
        return
    confirmed = await asyncio.gather(
        *(_publish(outlet, queue, *message) for message in messages), return_exceptions=True
    )
    for error in confirmed:
        if isinstance(error, BaseException):
            raise error


async def _publish(outlet: Outlet, queue: str, content: bytes, properties: envelope.Properties, delay: float) -> None:
    exchange, key = route(queue, delay)
    try:
        await outlet.publish(content, properties, exchange=exchange, key=key)
    except PublishError as error:
        raise broken(queue, error) if exchange else deleted(queue) from None
    except ChannelNotFoundEntity as error:
        if not exchange or f"'{exchange}'" not in str(error):
            raise  # another send's exchange, and its channel was ours, too
        raise broken(queue, error) from None
    except ChannelPreconditionFailed as error:
        if "message size" not in str(error):
            raise
        if f"message size {len(content)} " not in str(error):
            raise EngineUnavailable(
                f"queue {queue!r}: a message that was sent together with this one is too large for the server "
                f"({error.args[-1]}), which ended the channel of both. {DOUBT}"
            ) from None
        raise MessageTooLarge(
            f"queue {queue!r}: the body takes {len(content):,} bytes, and the server takes no more than its "
            f"max_message_size ({error.args[-1]}). Nothing was sent. Send a reference to the content instead."
        ) from None


def broken(queue: str, error: Exception) -> EngineUnavailable:
    """Return the error for a delayed message that found no way down the ladder, where somebody has deleted a step."""
    return EngineUnavailable(
        f"queue {queue!r}: a part of the ladder of delays, {DELAY!r}, was deleted on the server, or unbound: "
        f"{error.args[0]}. Nothing was sent. Declare the queue again, which mends the ladder."
    )


def deleted(queue: str) -> QueueNotFound:
    """Return the error for a queue that was declared, but that somebody has deleted on the server."""
    owner = queue.removesuffix(DEAD)
    what = f"queue {queue!r}" if owner == queue else f"the queue of the dead letters of {owner!r}, {queue!r},"
    return QueueNotFound(
        f"{what} was deleted on the server, with what was in it. Declare it again with "
        f"broker.declare(Queue({owner!r}))."
    )
