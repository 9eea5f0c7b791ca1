"""Receiving from one queue, over a channel of its own, with no more prefetch than the callers want.

For callers that can wait, the server pushes: consumers on the channel have a prefetch that adds up to the messages that
callers hold and wait for, and no more, so that nothing lies here that another process could work on. What was pushed
for a caller that has gone is given back after a second. A lease is a delivery tag of the channel, and ends with it.

The server tells that it pushes no more to one of these consumers when the queue was deleted and, since RabbitMQ 4.3,
when a message was held for longer than its `consumer_timeout`. It has then given that one to others, passes over an
ack that comes too late, and does not say which one it is. So all leases of the channel end, as they did before 4.3.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from aiormq import Channel
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY

LINGER = 1.0  # seconds without a caller after which what was pushed is given back
PREFETCH_MAX = 65_535  # the most that AMQP can express


class Consumer:
    """The receiving end of one queue."""

    def __init__(
        self, channel: Channel, token: int, queue: str, called: Callable[[], object], wanted: Callable[[], int]
    ) -> None:
        self.channel = channel
        self.token = token
        """The token of all leases on this channel."""
        self.held: dict[int, DeliveredMessage] = {}
        """The messages that callers hold, by delivery tag."""
        self._queue = queue
        self._called = called
        self._wanted = wanted
        """Returns how many messages callers wait for."""
        self._buffer: deque[DeliveredMessage] = deque()
        self._room: dict[str, int] = {}
        """How much more the server may push to each of our consumers."""
        self._prefetch = 0
        """How much all our consumers together may hold."""
        self._used_at = asyncio.get_running_loop().time()
        self._busiest = 0
        """The most that callers have held and wanted since we last tidied up."""
        self._asking = asyncio.Lock()
        self._numbers = count()
        self._farewell: asyncio.Task[None] | None = None
        """Closes the channel, once the server has told that leases on it have ended."""
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(self._closed)  # pyright: ignore[reportUnknownMemberType]  # untyped there

    @property
    def is_open(self) -> bool:
        """Whether the channel, and so every lease on it, lasts."""
        return self._farewell is None and not self.channel.is_closed

    def has_room(self) -> bool:
        """Return whether the server may push more."""
        return any(self._room.values())

    async def take(self, limit: int, waiting: int) -> list[DeliveredMessage]:
        """Return up to `limit` messages; let the server push when there are callers `waiting` for more."""
        self._used_at = asyncio.get_running_loop().time()
        self._busiest = max(self._busiest, len(self.held) + max(limit, waiting))
        if not waiting:
            await self.rest()
        taken = self._from_buffer(limit)
        try:
            if not waiting:
                await self._get(taken, limit)
            elif not taken or len(taken) < waiting:
                await self._ask_for(waiting - len(taken))
        except BaseException:
            self._buffer.extendleft(reversed(taken))
            raise
        for message in taken:
            self.held[message.delivery_tag or 0] = message
        return taken

    @contextmanager
    def settling(self, tag: int) -> Generator[DeliveredMessage]:
        """Give a held message, which nobody else can settle meanwhile; it is held again if the block raises."""
        message = self.held.pop(tag)
        try:
            yield message
        except BaseException:
            self.held[tag] = message
            raise
        if message.consumer_tag in self._room:
            self._room[message.consumer_tag] += 1

    async def rest(self, *, whatever: bool = False) -> None:
        """Let the server push no more if nobody waits: what is given back unseen has used an attempt before 4.3.

        `whatever`: though it has no room, which it has again with each message that is settled.
        """
        if whatever or (self.has_room() and not self._wanted()):
            async with self._asking:
                await self._stop_pushing()
            self._called()  # those that wait, or began to meanwhile, ask again

    async def give_back(self, messages: Sequence[DeliveredMessage]) -> None:
        """Give back those of these messages that are still held."""
        for message in messages:
            tag = message.delivery_tag or 0
            if tag in self.held and self.is_open:
                with self.settling(tag):
                    await self.channel.basic_nack(tag, requeue=True, wait=False)

    async def confirm(self) -> None:
        """Wait until the server has done all that was asked on the channel: it answers in order."""
        async with self._asking:
            await self.channel.basic_qos(prefetch_count=1, timeout=ANSWERS_WITHIN)

    async def tidy(self) -> None:
        """Let the server push less when the callers want less; with no caller left, give back what it has pushed."""
        wanted = self._wanted()
        is_left = not wanted and asyncio.get_running_loop().time() - self._used_at > LINGER
        now = len(self.held) + wanted
        busiest, self._busiest = max(self._busiest, now), now
        if self._room and (is_left or (busiest and self._prefetch > 2 * busiest)):
            async with self._asking:
                await self._stop_pushing()
            self._called()  # those that wait ask again
        if is_left:
            while self._buffer:
                await self.channel.basic_nack(self._buffer.popleft().delivery_tag or 0, requeue=True, wait=False)

    async def _get(self, taken: list[DeliveredMessage], limit: int) -> None:
        """Ask the server for more, until there are `limit` messages or it has none."""
        while len(taken) < limit:
            message = await self.channel.basic_get(self._queue, timeout=ANSWERS_WITHIN)
            taken += self._from_buffer(limit - len(taken))  # the server pushed these before it answered
            if message.delivery_tag is None:
                break
            if len(taken) < limit:
                taken.append(message)
            else:
                self._buffer.appendleft(message)

    def _from_buffer(self, limit: int) -> list[DeliveredMessage]:
        return [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]

    async def _ask_for(self, waiting: int) -> None:
        async with self._asking:
            lacking = min(waiting - sum(self._room.values()) - len(self._buffer), PREFETCH_MAX)
            if lacking > 0:
                await self.channel.basic_qos(prefetch_count=lacking, timeout=ANSWERS_WITHIN)
                tag = f"filao.{self.token}.{next(self._numbers)}"
                self._room[tag] = lacking
                self._prefetch += lacking
                try:
                    await self.channel.basic_consume(
                        self._queue, self._pushed, consumer_tag=tag, timeout=ANSWERS_WITHIN
                    )
                except BaseException:
                    self._forget(tag)
                    raise

    async def _stop_pushing(self) -> None:
        tags = list(self._room)
        self._room.clear()
        self._prefetch = 0
        for tag in tags:
            await self.channel.basic_cancel(tag, timeout=ANSWERS_WITHIN)

    async def _pushed(self, message: DeliveredMessage) -> None:
        if message.consumer_tag in self._room:
            self._room[message.consumer_tag] -= 1
        if not self._buffer:  # later, so that one look sees all that comes in this turn of the loop
            asyncio.get_running_loop().call_soon(self._called)
        self._buffer.append(message)

    async def _cancelled(self, _: Basic.Cancel) -> None:
        """End all leases, as the server has ended some of them; those who wait ask on another channel."""
        if self.is_open:
            self._farewell = asyncio.get_running_loop().create_task(self.channel.close())
        self._called()

    def _closed(self, ended: "asyncio.Future[Any]") -> None:
        """Let those who wait ask on another channel: the server closes one alone when a message was held too long."""
        if not ended.cancelled():
            ended.exception()  # whoever uses the channel is told
        self._called()

    def _forget(self, tag: str) -> None:
        self._prefetch -= self._room.pop(tag, 0)


class Consumers(dict[str, Consumer]):
    """The receiving ends of one process, by queue. Those that need it are told to rest."""

    def __init__(self) -> None:
        super().__init__()
        self._untidy = asyncio.Event()
        """Set when the server may push what nobody waits for."""
        self._forsaken: set[str] = set()
        """Queues for which the server is to push nothing more, though it has no room just now."""

    def left(self, queue: str) -> None:
        """Learn that the last caller that waited for a queue has gone."""
        consumer = self.get(queue)
        if consumer is not None and consumer.has_room():
            self._untidy.set()

    def forsaken(self, queues: Iterable[str]) -> None:
        """Learn that the callers who hold messages of these queues want no others in their place."""
        self._forsaken.update(queues)
        self._untidy.set()

    async def rest(self) -> None:
        """Let the server push nothing more, once there is something that nobody would take."""
        await self._untidy.wait()
        self._untidy.clear()
        forsaken, self._forsaken = self._forsaken, set()
        for queue, consumer in list(self.items()):
            with suppress(*AWAY):  # the callers of a server that fails get its error
                if consumer.is_open:
                    await consumer.rest(whatever=queue in forsaken)

    def held(self) -> dict[str, int]:
        """Return how many messages of each queue this process holds."""
        return {name: len(consumer.held) for name, consumer in self.items() if consumer.is_open}
