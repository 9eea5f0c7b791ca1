"""What Filao declares on a server: the names and arguments of its queues and exchanges.

A queue `claims` is the quorum queue `claims`; its dead letters go to `claims.dead`. The server itself moves a message
there that outlives its time. At-least-once dead-lettering keeps a message until its dead letter is confirmed.

Delays are imitated by a ladder of 28 queues, of which the kth holds each message for 2^k units (NServiceBus and Celery
do the same). The routing key spells the delay in binary. So a message climbs down through the steps whose bits are set,
and each step's queue hands it to the next exchange when its time is up.
"""

from typing import Any

from aiormq import Channel
from aiormq.exceptions import ChannelPreconditionFailed

from filao.errors import ConfigurationError
from filao.queue import Queue

STEPS = 28
UNIT = 0.1  # seconds that the lowest step lasts: delays are rounded up to it
DELAY_MAX = (2**STEPS - 1) * UNIT  # seconds: 310 days
RETURNS_MAX = 1_000_000_000  # any limit makes a returned message go to the head; Filao counts attempts itself
DEAD = ".dead"
DELAY = "filao.delay"
UNDELIVERED = "filao.undelivered"  # holds what came down the ladder for a queue that had been deleted
REGISTER = "filao.queues"
PROBE = "filao.probe."  # begins the names of queues by which the doctor tests whether expired messages are passed on

QUORUM: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": RETURNS_MAX}
FULL = {"x-overflow": "reject-publish"}  # where a policy limits its length, and does not ask for another overflow
SAFE_DEATH = FULL | {"x-dead-letter-strategy": "at-least-once"}


def dead_name(queue: str) -> str:
    """Return the name of the queue that holds a queue's dead letters."""
    return queue + DEAD


def route(queue: str, delay: float) -> tuple[str, str]:
    """Return the exchange and the routing key that bring a message to a queue after `delay` seconds."""
    units = -int(-delay // UNIT)
    if units <= 0:
        return "", queue
    bits = f"{units:0{STEPS}b}"
    return _step(units.bit_length() - 1), ".".join([*bits, queue])


async def declare_queue(channel: Channel, queue: Queue[Any]) -> None:
    """Create a queue and that of its dead letters. Raises `ConfigurationError` if they exist with other arguments."""
    death = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead_name(queue.name)}
    for name, arguments in ((queue.name, QUORUM | SAFE_DEATH | death), (dead_name(queue.name), QUORUM | FULL)):
        try:
            await channel.queue_declare(name, durable=True, arguments=dict(arguments))
        except ChannelPreconditionFailed as error:
            if "inequivalent" not in str(error):
                raise
            raise ConfigurationError(
                f"queue {queue.name!r}: {name!r} is on the server already, with other arguments: {error.args[-1]}. "
                f"Filao needs {arguments}. Move what is in it elsewhere and delete it there, or choose another name."
            ) from None


async def declare_ladder(channel: Channel) -> None:
    """Create the ladder."""
    await channel.exchange_declare(UNDELIVERED, exchange_type="fanout", durable=True)
    await channel.queue_declare(UNDELIVERED, durable=True, arguments=dict(QUORUM))
    await channel.queue_bind(UNDELIVERED, UNDELIVERED)
    lost = {"alternate-exchange": UNDELIVERED}
    await channel.exchange_declare(DELAY, exchange_type="topic", durable=True, arguments=lost)
    for step in range(STEPS):
        name, below = _step(step), _step(step - 1)
        await channel.exchange_declare(name, exchange_type="topic", durable=True)
        arguments = QUORUM | SAFE_DEATH | {"x-dead-letter-exchange": below, "x-message-ttl": _milliseconds(step)}
        await channel.queue_declare(name, durable=True, arguments=arguments)
        higher = "*." * (STEPS - 1 - step)
        await channel.queue_bind(name, name, f"{higher}1.#")
        await channel.exchange_bind(below, name, routing_key=f"{higher}0.#")


async def look_for_ladder(channel: Channel) -> None:
    """Ask for each part of the ladder; the channel ends at the first that is missing. Bindings cannot be asked for."""
    for name in [*ladder(), UNDELIVERED]:
        await channel.queue_declare(name, passive=True)
        await channel.exchange_declare(name, passive=True)
    await channel.exchange_declare(DELAY, passive=True)


def ladder() -> list[str]:
    """Return the names of the ladder's queues."""
    return [_step(step) for step in range(STEPS)]


async def remove_ladder(channel: Channel) -> None:
    """Delete the ladder, which no queue needs any more."""
    for name in [*ladder(), UNDELIVERED]:
        await channel.queue_delete(name)
        await channel.exchange_delete(name)
    await channel.exchange_delete(DELAY)


async def bind_to_ladder(channel: Channel, queue: str) -> None:
    """Let a queue receive what comes down the ladder for it."""
    await channel.queue_bind(queue, DELAY, "*." * STEPS + queue)


def _step(step: int) -> str:
    """Return the name of a step's exchange and queue; below the lowest is the exchange of the queues themselves."""
    return f"{DELAY}.{step:02}" if step >= 0 else DELAY


def _milliseconds(step: int) -> int:
    return round(UNIT * 1000) << step
