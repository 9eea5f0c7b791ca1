"""What becomes of a message that was received: it is acked, given back, tried again, or buried.

A lease is a delivery of a channel, and ends with it. What takes two steps, a retry after a delay or a dead letter with
its reason, is published before it is acknowledged: a crash in between doubles the message, but never loses it.
"""

import random

from aiormq import Channel
from aiormq.abc import DeliveredMessage

from filao.engine import Ack, Delivery, Nack, Reject, Release, Settle
from filao.engines.rabbitmq.consumer import Consumer, Consumers
from filao.engines.rabbitmq.publisher import Publisher
from filao.engines.rabbitmq.refusals import check_delay
from filao.engines.rabbitmq.server import AWAY
from filao.errors import LeaseLost
from filao.queue import Queue, retry_delay


class Settles:
    """Settles what the consumers of one process have received."""

    def __init__(self, consumers: Consumers, publisher: Publisher) -> None:
        self._consumers = consumers
        self._publisher = publisher

    def consumer_of(self, delivery: Delivery) -> Consumer:
        """Return the consumer that received a message. Raises `LeaseLost` if its lease has ended."""
        consumer = self._consumers.get(delivery.queue)
        if consumer is None or not consumer.is_open or consumer.token != delivery.token:
            raise lease_lost(delivery)
        if delivery.handle not in consumer.held:
            raise lease_lost(delivery)
        return consumer

    async def settle(self, queue: Queue, settle: Settle) -> None:
        """Do what is to become of a message. Raises `LeaseLost` if its lease has ended, before or meanwhile."""
        delivery, outcome = settle.delivery, settle.outcome
        consumer = self.consumer_of(delivery)
        channel, tag = consumer.channel, delivery.handle
        try:
            with consumer.settling(tag) as message:
                match outcome:
                    case Ack():
                        await channel.basic_ack(tag, wait=False)
                    case Release(0):
                        await channel.basic_nack(tag, requeue=True, wait=False)
                    case Release(delay):
                        await self._later(queue, delivery, message, delay, delivery.attempt - 1)
                        await channel.basic_ack(tag, wait=False)
                    case Reject(error, malformed):
                        reason = "malformed" if malformed else "rejected"
                        await self._publisher.bury(delivery, message, delivery.attempt, reason, error)
                        await channel.basic_ack(tag, wait=False)
                    case Nack():
                        await self._fail(queue, delivery, message, outcome, channel)
            if isinstance(outcome, Ack) and outcome.before_work:
                await consumer.confirm()  # outside `settling`: whether it succeeds or not, the message is not held
                if not consumer.is_open:  # the server has passed over the ack, if it said so before it answered
                    raise lease_lost(delivery)
        except AWAY:
            if consumer.is_open:
                raise
            raise lease_lost(delivery) from None

    async def _fail(
        self, queue: Queue, delivery: Delivery, message: DeliveredMessage, nack: Nack, channel: Channel
    ) -> None:
        """Let a failed message be tried again, or die."""
        tag = delivery.handle
        delay = retry_delay(queue, delivery.attempt, random.random())
        if delay is None:
            await self._publisher.bury(delivery, message, delivery.attempt, "max_attempts", nack.error)
            await channel.basic_ack(tag, wait=False)
            return
        delay = delay if nack.delay is None else nack.delay
        if delay > 0:
            await self._later(queue, delivery, message, delay, delivery.attempt)
            await channel.basic_ack(tag, wait=False)
        else:
            await channel.basic_reject(tag, requeue=True, wait=False)

    async def _later(
        self, queue: Queue, delivery: Delivery, message: DeliveredMessage, delay: float, used: int
    ) -> None:
        """Publish a message again to come back after `delay` seconds; the caller then acks the one that it received."""
        check_delay(queue, delay)
        await self._publisher.again(delivery.queue, message, delay, used)


def lease_lost(delivery: Delivery) -> LeaseLost:
    """Return the error of who settles or extends a message that others may have by now."""
    return LeaseLost(
        f"message {delivery.id} of queue {delivery.queue!r}: the lease of attempt {delivery.attempt} was lost: it was "
        "settled, its queue was deleted, a message of the queue was held here for longer than the server's "
        "consumer_timeout, or the connection that it was had on has ended, and the message goes to the next consumer."
    )
