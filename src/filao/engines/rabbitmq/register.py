"""Which queues are declared, by which rules: one message in a queue of its own, which whoever reads it holds meanwhile.

RabbitMQ tells its clients neither which queues there are nor what they were declared with, so Filao keeps a register.
It is read by taking the message and giving it back, within a millisecond; to change it, a new one is published before
the old one is acknowledged. Should two be there, after a crash between the two, they are merged.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelNotFoundEntity
from pamqp.commands import Basic

from filao.engines.rabbitmq.refusals import has_delay
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, Server, Session
from filao.engines.rabbitmq.topology import QUORUM, REGISTER
from filao.errors import EngineUnavailable
from filao.queue import Queue, rules_from_json, rules_to_json

HELD_MAX = 10.0  # seconds that somebody else may hold the register: a process that was paused in the middle
LOOK_AGAIN = 0.005  # seconds


class Page(msgspec.Struct, frozen=True):
    """The rules of a queue, and how often they have been written."""

    version: int
    rules: msgspec.Raw


Pages = dict[str, Page]


async def queues(session: Session, server: Server) -> dict[str, Queue]:
    """Return every declared queue."""
    async with _held(session, server) as (_, _, pages):
        return {name: rules_from_json(name, bytes(page.rules).decode()) for name, page in sorted(pages.items())}


async def enter(session: Session, server: Server, queue: Queue[Any]) -> None:
    """Write down a queue's rules."""
    rules = rules_to_json(queue).encode()
    async with _held(session, server) as (channel, messages, pages):
        page = pages.get(queue.name)
        if page is None or bytes(page.rules) != rules:
            pages[queue.name] = Page(page.version + 1 if page else 1, msgspec.Raw(rules))
            await _replace(channel, messages, pages)


async def strike_out(session: Session, server: Server, queue: str, last: Callable[[], Awaitable[None]]) -> None:
    """Forget a queue; `last` is done, while nobody can declare any, if it was the last that asked for delays."""
    async with _held(session, server) as (channel, messages, pages):
        if pages.pop(queue, None) is None:
            return
        await _replace(channel, messages, pages)
        left = [rules_from_json(name, bytes(page.rules).decode()) for name, page in pages.items()]
        if not any(map(has_delay, left)):
            await last()


@asynccontextmanager
async def _held(session: Session, server: Server) -> AsyncGenerator[tuple[Channel, list[DeliveredMessage], Pages]]:
    """Hold the register; it goes back by itself when the channel ends, as it does in a process that dies."""
    await _create(session)
    async with session.aside(confirms=True) as channel:
        until = asyncio.get_running_loop().time() + HELD_MAX
        while not (messages := await _take(channel)):
            if asyncio.get_running_loop().time() > until:
                raise EngineUnavailable(
                    f"{server.name}: the register, the one message of the queue {REGISTER!r}, has not been there for "
                    f"{HELD_MAX:g} s. Nothing was done. Either another process holds it: end one that is paused, or try "
                    f"again in a minute. Or somebody has purged that queue: then delete the exchange {REGISTER!r}, and "
                    f"declare your queues again; their messages are not touched."
                )
            await asyncio.sleep(LOOK_AGAIN)
        pages: Pages = {}
        for message in messages:
            for name, page in msgspec.json.decode(message.body, type=Pages).items():
                if name not in pages or pages[name].version < page.version:
                    pages[name] = page
        if len(messages) > 1:
            await _replace(channel, messages, pages)
        yield channel, messages, pages


async def _create(session: Session) -> None:
    """Create the register; an exchange of its name says that its first message was put there."""
    try:
        async with session.aside() as channel:
            await channel.exchange_declare(REGISTER, passive=True, timeout=ANSWERS_WITHIN)
    except ChannelNotFoundEntity:
        async with session.aside(confirms=True) as channel:
            await channel.queue_declare(REGISTER, durable=True, arguments=dict(QUORUM))  # being read counts as a return
            await _publish(channel, {})
            await channel.exchange_declare(REGISTER, exchange_type="fanout", durable=True)


async def _take(channel: Channel) -> list[DeliveredMessage]:
    messages: list[DeliveredMessage] = []
    while (message := await channel.basic_get(REGISTER, timeout=ANSWERS_WITHIN)).delivery_tag is not None:
        messages.append(message)
    return messages


async def _replace(channel: Channel, messages: list[DeliveredMessage], pages: Pages) -> None:
    await _publish(channel, pages)
    for message in messages:
        await channel.basic_ack(message.delivery_tag or 0)
    messages.clear()


async def _publish(channel: Channel, pages: Pages) -> None:
    properties = Basic.Properties(content_type="application/json", delivery_mode=2)
    content = msgspec.json.encode(pages)
    await channel.basic_publish(
        content, routing_key=REGISTER, properties=properties, mandatory=True, timeout=ANSWERS_WITHIN
    )
