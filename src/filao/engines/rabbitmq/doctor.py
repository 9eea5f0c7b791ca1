"""What an operator should know of the server, of the queues on it, and of what other programs have put into them."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from aiormq.exceptions import ChannelAccessRefused
from pamqp.commands import Basic

from filao.engine import Finding
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY, Server, Session
from filao.engines.rabbitmq.topology import PROBE, QUORUM, REGISTER, SAFE_DEATH, UNDELIVERED, dead_name
from filao.printable import some
from filao.queue import Queue

PROBED_WITHIN = 5.0  # seconds for one message to expire and to arrive; it takes a tenth of a second
PROBE_LASTS = 60_000  # milliseconds after which the server removes the queues of a doctor that died
LOOK_AGAIN = 0.05  # seconds


async def examine(
    session: Session, server: Server, queues: Sequence[Queue[Any]], strange: Sequence[str]
) -> list[Finding]:
    """Examine the server and these queues; `strange` describes what is in the register but cannot be read."""
    findings = [Finding("server", "ok", f"{server.name}, version {session.version}")]
    for queue in queues:
        ready, dead = await session.depth(queue.name), await session.depth(dead_name(queue.name))
        if ready is None or dead is None:
            missing = queue.name if ready is None else dead_name(queue.name)
            findings.append(_finding(queue, "error", f"{missing!r} was deleted on the server: declare the queue again"))
        else:
            findings.append(_finding(queue, "note" if dead else "ok", f"{ready:,} ready, {some(dead, 'dead letter')}"))
    if strange:
        findings.append(Finding("register", "warning", _STRANGE.format(what="; ".join(strange[:5]))))
    undelivered = await session.depth(UNDELIVERED)
    if undelivered:
        text = (
            f"{undelivered:,} messages were delayed for queues that have been deleted meanwhile: they are in "
            f"{UNDELIVERED!r}"
        )
        findings.append(Finding("delays", "warning", text))
    return [*findings, await _expiry(server), Finding("leases", "note", _CONSUMER_TIMEOUT)]


async def _expiry(server: Server) -> Finding:
    """Let a message expire, and look whether the server passes it on.

    This uses a connection of its own, because a server with this fault ends it.
    """
    session = await server.connect()
    try:
        async with asyncio.timeout(PROBED_WITHIN + ANSWERS_WITHIN):
            passes = await _passes_on(session)
    except ChannelAccessRefused:
        return Finding("expiry", "note", f"not examined: we may not declare queues that begin with {PROBE!r}")
    except AWAY as error:
        return Finding("expiry", "error", f"{_STUCK} It said: {type(error).__name__}")
    finally:
        await session.close()
    return (
        Finding("expiry", "ok", "the server passes expired messages on")
        if passes
        else Finding("expiry", "error", _STUCK)
    )


async def _passes_on(session: Session) -> bool:
    name = f"{PROBE}{secrets.token_hex(8)}"
    death = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead_name(name), "x-expires": PROBE_LASTS}
    async with session.aside(confirms=True) as channel:
        await channel.queue_declare(dead_name(name), durable=True, arguments=QUORUM | {"x-expires": PROBE_LASTS})
        await channel.queue_declare(name, durable=True, arguments=QUORUM | SAFE_DEATH | death)
        try:
            await channel.basic_publish(b"", routing_key=name, properties=Basic.Properties(expiration="1"))
            until = asyncio.get_running_loop().time() + PROBED_WITHIN
            while (await channel.basic_get(dead_name(name), no_ack=True)).delivery_tag is None:
                if asyncio.get_running_loop().time() > until:
                    return False
                await asyncio.sleep(LOOK_AGAIN)
            return True
        finally:
            await channel.queue_delete(name)
            await channel.queue_delete(dead_name(name))


def _finding(queue: Queue[Any], level: str, text: str) -> Finding:
    return Finding(f"queue {queue.name}", level, text)


_STRANGE = (
    f"{REGISTER!r} holds what is not Filao's, and is passed over: {{what}}. Take from producers the right to write "
    "there (SECURITY.md says how); declare anew the queue of a rule that cannot be, and take other messages out by "
    "your own means"
)
_STUCK = (
    "the server no longer passes on what expired: dead letters by age and delayed messages of all queues wait. On "
    "3.10 one message with a header 'x-death' that is no list of tables, and an expiration, ends the server's own "
    "worker: find its queue by 'rabbit_fifo_dlx' in the server's log, move the rest of it elsewhere, delete it, and "
    "restart the node."
)
_CONSUMER_TIMEOUT = (
    "a lease ends with its connection, and after the server's consumer_timeout (30 minutes unless rabbitmq.conf says "
    "otherwise): raise it where handlers take longer"
)
