"""Moving a queue: its messages are taken out for another engine, or come from one and are published.

Messages on the ladder of delays cannot be reached: they can be moved once they have come down.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from aiormq import Channel
from aiormq.abc import DeliveredMessage

from filao.engine import Draft
from filao.engines.rabbitmq import envelope
from filao.engines.rabbitmq.control import TAKEN_WITHIN, on_the_ladder, reserve, reserve_for_move
from filao.engines.rabbitmq.publisher import Limited, Publisher
from filao.engines.rabbitmq.refusals import check_draft, check_rules, has_delay, refused
from filao.engines.rabbitmq.register import Declared
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY, Server, Session
from filao.engines.rabbitmq.topology import dead_name
from filao.errors import EngineUnavailable
from filao.moving import SLICE, Memory, Packing, Parcel
from filao.queue import Queue

TOGETHER = 32  # messages given back at once: RabbitMQ 3.10 keeps the order of so many, and shuffles more


class RabbitmqMover:
    """See `filao.moving.Mover`."""

    def __init__(self, server: Server, declared: Declared, publisher: Publisher, limited: Limited) -> None:
        self._server = server
        self._declared = declared
        self._publisher = publisher
        self._limited = limited
        self._alone: list[tuple[str, Session]] = []
        """The queues to which this process moves messages, with the connections that keep others from it."""

    async def identity(self) -> str:
        """Return the name of the cluster and the virtual host."""
        async with self._declared.apart() as call:
            return f"rabbitmq {call.session.cluster} {self._server.vhost}"

    def check(self, queue: Queue, drafts: Sequence[Draft] = ()) -> None:
        """Raise `ConfigurationError` or `MessageError` for what cannot be declared, or sent, here."""
        check_rules(queue)
        for draft in drafts:
            check_draft(queue, draft)
            envelope.check_headers(queue.name, draft)

    @asynccontextmanager
    async def packing(self, queue: str) -> AsyncGenerator[Packing]:
        """Begin to move a queue's messages away; those that were not delivered go back when the block ends."""
        async with self._declared.apart(queue) as call, call.session.aside() as channel:
            await reserve(call, queue)
            call.goes_on()
            rules = self._declared.rules[queue]

            async def held() -> int:
                return await on_the_ladder(call.session) if has_delay(rules) else 0

            packing = QueuePacking(channel, queue, self._publisher.name, held)
            try:
                yield packing
            finally:
                await packing.give_back()

    @asynccontextmanager
    async def alone(self, queue: str) -> AsyncGenerator[None]:
        """Wait until no other program moves messages to a queue, and let none begin: each would publish them."""
        async with self._declared.apart(queue) as call:
            await reserve_for_move(call, queue)
            call.goes_on()
            kept = (queue, call.session)
            self._alone.append(kept)
            try:
                yield
            finally:
                self._alone.remove(kept)

    async def unpack(self, queue: str, parcels: Sequence[Parcel]) -> None:
        """Publish messages from another engine; those that were published before are doubled.

        Raises `EngineUnavailable` if others are no longer kept from it, because the connection for that was lost.
        """
        self.check(await self._declared.rules_of(queue), [parcel.draft for parcel in parcels])
        for session in self._keeping_others_away(queue):
            try:
                async with session.aside():  # the server may have ended it while this process was paused
                    pass
            except AWAY as error:
                raise _no_longer_alone(queue) from error
        for parcel in parcels:
            self._keeping_others_away(queue)
            async with self._limited():
                await self._publisher.store(queue, parcel)

    def _keeping_others_away(self, queue: str) -> list[Session]:
        """Return the connections that keep others from moving to a queue. Raises `EngineUnavailable` if one is lost."""
        sessions = [session for name, session in self._alone if name == queue]
        if not all(session.is_open for session in sessions):
            raise _no_longer_alone(queue)
        return sessions

    async def memory(self, queue: str) -> Memory:
        """Return an empty memory."""
        await self._declared.rules_of(queue)
        return Memory()

    async def remember(self, queue: str, memory: Memory) -> None:
        """Refuse halted groups, and ignore the keys of messages that have ended."""
        await self._declared.rules_of(queue)
        if memory.halted:
            raise refused(queue, f"group {memory.halted[0]!r} is halted", "groups")


def _no_longer_alone(queue: str) -> EngineUnavailable:
    return EngineUnavailable(
        f"queue {queue!r}: the connection that kept other programs from moving messages there was lost, so another may "
        f"have begun to. This move has ended, and some of its last {SLICE} messages may be there twice. Move again: "
        f"that waits for the other, up to {TAKEN_WITHIN:g} s, and goes on."
    )


class QueuePacking(Packing):
    """Receives the ready messages, then the dead letters, and acknowledges those that are stored elsewhere."""

    def __init__(
        self, channel: Channel, queue: str, unnamed: Callable[[], str], held: Callable[[], Awaitable[int]]
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._unnamed = unnamed
        self._held = held
        self._taken: list[Parcel] = []
        """The messages that were not delivered yet."""

    async def take(self, limit: int) -> list[Parcel]:
        """Receive no more messages at once than the server can put back in order."""
        limit = min(limit, TOGETHER)
        parcels: list[Parcel] = []
        for source in (self._queue, dead_name(self._queue)):
            while len(parcels) < limit:
                message = await self._channel.basic_get(source, timeout=ANSWERS_WITHIN)
                if message.delivery_tag is None:
                    break
                parcels.append(self._parcel(message, is_dead=source != self._queue))
        self._taken = parcels
        return parcels

    async def give_back(self) -> None:
        """Put back in order what was not delivered; if the process dies, the server puts it back in any order."""
        if self._taken and not self._channel.is_closed:
            with suppress(*AWAY):
                await self._channel.basic_nack(self._taken[-1].handle, multiple=True, requeue=True)

    async def delivered(self, parcels: Sequence[Parcel]) -> None:
        """Acknowledge messages, and wait until the server has done so."""
        for parcel in parcels:
            await self._channel.basic_ack(parcel.handle, wait=False)
        await self._channel.basic_qos(prefetch_count=0, timeout=ANSWERS_WITHIN)
        self._taken = []

    async def held(self) -> int:
        """Count what waits on the ladder, for all queues; the server does not tell what consumers hold."""
        return await self._held()

    def _parcel(self, message: DeliveredMessage, *, is_dead: bool) -> Parcel:
        delivery = envelope.read(self._queue, message, 0, self._unnamed)
        expires_at = None if is_dead else envelope.expires_at(message.header.properties)
        ttl = None if expires_at is None else max(1, expires_at - envelope.now()) / 1000
        draft = Draft(delivery.kind, delivery.content, delivery.headers, ttl=ttl, message_id=delivery.id)
        if not is_dead:
            used = delivery.attempt - 1
            return Parcel(delivery.handle, delivery.id, draft, delivery.sent_at, used, expires_at=expires_at)
        dead = envelope.stored(self._queue, message)
        died_at = round(dead.at.timestamp() * 1000)
        return Parcel(
            *(delivery.handle, delivery.id, draft, delivery.sent_at, dead.attempts, dead.history, None, dead.reason),
            died_at,
        )
