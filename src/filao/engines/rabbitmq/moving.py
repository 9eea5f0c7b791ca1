"""A queue on its way: its messages as they are taken out for another engine, and published as they come from one.

What lies on the ladder cannot be reached: it is carried once it has come down.
"""

from collections.abc import Awaitable, Callable, Sequence

from aiormq import Channel
from aiormq.abc import DeliveredMessage

from filao.engine import Draft, Packing, Parcel
from filao.engines.rabbitmq import envelope
from filao.engines.rabbitmq.server import ANSWERS_WITHIN
from filao.engines.rabbitmq.topology import dead_name


class QueuePacking(Packing):
    """Receives the messages, first those that are ready and then the dead letters, and acknowledges what is safe."""

    def __init__(
        self, channel: Channel, queue: str, unnamed: Callable[[], str], held: Callable[[], Awaitable[int]]
    ) -> None:
        self._channel = channel
        self._queue = queue
        self._unnamed = unnamed
        self._held = held

    async def take(self, limit: int) -> list[Parcel]:
        """Receive."""
        parcels: list[Parcel] = []
        for source in (self._queue, dead_name(self._queue)):
            while len(parcels) < limit:
                message = await self._channel.basic_get(source, timeout=ANSWERS_WITHIN)
                if message.delivery_tag is None:
                    break
                parcels.append(self._parcel(message, is_dead=source != self._queue))
        return parcels

    async def delivered(self, parcels: Sequence[Parcel]) -> None:
        """Acknowledge, and wait until the server has heard it."""
        for parcel in parcels:
            await self._channel.basic_ack(parcel.handle, wait=False)
        await self._channel.basic_qos(prefetch_count=0, timeout=ANSWERS_WITHIN)

    async def held(self) -> int:
        """Count what waits on the ladder, of this queue or another; the server does not tell what consumers hold."""
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


def properties(queue: str, parcel: Parcel) -> tuple[str, envelope.Properties]:
    """Return where a message that came from elsewhere is published, and with what."""
    written = envelope.written(queue, parcel.draft, parcel.id, parcel.draft.ttl, envelope.now())
    headers = dict(written.headers or {}) | {envelope.SENT_AT: parcel.sent_at}
    if parcel.attempts:
        headers[envelope.ATTEMPT] = parcel.attempts
    written.headers = headers
    if parcel.reason is None:
        return queue, written
    error = parcel.history[-1].error if parcel.history else ""
    return dead_name(queue), envelope.dead(written, parcel.attempts, parcel.reason, error, parcel.died_at)
