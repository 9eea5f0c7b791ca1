"""What an operator should know of the server, of the queues on it, and of what other programs have put into them."""

import asyncio
import secrets
from contextlib import suppress
from typing import Any

from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionInternalError,
    DeliveryError,
)
from pamqp.commands import Basic

from filao.engine import Finding
from filao.engines.rabbitmq import topology
from filao.engines.rabbitmq.refusals import has_delay
from filao.engines.rabbitmq.register import Declared
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, AWAY, FAREWELL_WITHIN, Server, Session
from filao.engines.rabbitmq.topology import DELAY, PROBE, QUORUM, REGISTER, SAFE_DEATH, UNDELIVERED, dead_name
from filao.errors import ConfigurationError, FilaoError
from filao.printable import some
from filao.queue import Queue

PROBED_WITHIN = 5.0  # seconds for one message to expire and to arrive; it takes a tenth of a second
BLOCKED_AFTER = 10.0  # seconds without an answer to what is sent
PROBE_LASTS = 60_000  # milliseconds after which the server removes the queues of a doctor that died
LOOK_AGAIN = 0.05  # seconds
NO_REASON = "INTERNAL_ERROR"  # is all that a server says whose worker has ended; if a leader is missing, it says so


async def examine(session: Session, server: Server, declared: Declared) -> list[Finding]:
    """Examine the server and the queues that are known to be declared."""
    findings = [Finding("server", "ok", f"{server.name}, version {session.version}")]
    queues = list(declared.rules.values())
    findings += [await _queue(session, server, queue) for queue in queues]
    if declared.strange:
        findings.append(Finding("register", "warning", _STRANGE.format(what="; ".join(declared.strange[:5]))))
    if any(map(has_delay, queues)):
        findings += await _ladder(session)
    return [*findings, await _expiry(server), Finding("leases", "note", _CONSUMER_TIMEOUT)]


async def _queue(session: Session, server: Server, queue: Queue[Any]) -> Finding:
    """Look whether a queue and that of its dead letters are there, and are what was declared."""
    try:
        ready, dead = await session.depth(queue.name), await session.depth(dead_name(queue.name))
        if ready is None or dead is None:
            missing = queue.name if ready is None else dead_name(queue.name)
            return _finding(queue, "error", f"{missing!r} was deleted on the server: declare the queue again")
        with suppress(ChannelAccessRefused):  # we may not declare it: its depth is all that we are told
            async with asyncio.timeout(ANSWERS_WITHIN), session.aside() as channel:
                await topology.declare_queue(channel, queue)
    except ConfigurationError as error:
        return _finding(queue, "error", str(error))
    except AWAY as error:
        if not session.is_open:
            raise
        return _finding(queue, "error", str(server.engine_error(error)))
    return _finding(queue, "note" if dead else "ok", f"{ready:,} ready, {some(dead, 'dead letter')}")


async def _ladder(session: Session) -> list[Finding]:
    """Look for the parts of the ladder of delays, and for what came down it and found no queue."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN), session.aside() as channel:
            await topology.look_for_ladder(channel)
    except (ChannelNotFoundEntity, ChannelLockedResource) as error:
        return [Finding("delays", "error", _BROKEN.format(what=error.args[-1]))]
    undelivered = await session.depth(UNDELIVERED)
    return (
        [Finding("delays", "warning", _LOST.format(messages=some(undelivered, "delayed message", ("is", "are"))))]
        if undelivered
        else []
    )


async def _expiry(server: Server) -> Finding:
    """Let a message expire, and look whether the server passes it on.

    This uses a connection of its own, because a server with this fault ends it.
    """
    session: Session | None = None
    passes = False
    try:
        session = await server.connect()
        async with asyncio.timeout(PROBED_WITHIN + ANSWERS_WITHIN):
            passes = await _passes_on(session)
    except TimeoutError:
        return Finding("server", "error", _BLOCKED)
    except ChannelAccessRefused:
        return Finding("expiry", "note", f"not examined: we may not declare queues that begin with {PROBE!r}")
    except (ChannelPreconditionFailed, DeliveryError) as error:  # a limit, or a policy
        return Finding("expiry", "note", f"not examined: {server.engine_error(error)}")
    except FilaoError as error:
        return Finding("expiry", "note", f"not examined: {error}")
    except ConnectionInternalError as error:
        if error.args[-1:] == (NO_REASON,):
            return Finding("expiry", "error", f"{_STUCK} It said: {NO_REASON}")
        return Finding("expiry", "error", f"not examined: {server.engine_error(error, begun=False)}")
    except AWAY as error:
        return Finding("expiry", "note", f"not examined: the connection ended meanwhile: {error}")
    finally:
        if session is not None:
            await session.close(FAREWELL_WITHIN)
    return Finding("expiry", *(("ok", "the server passes expired messages on") if passes else ("error", _STUCK)))


async def _passes_on(session: Session) -> bool:
    name = f"{PROBE}{secrets.token_hex(8)}"
    death = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead_name(name), "x-expires": PROBE_LASTS}
    async with session.aside(confirms=True) as channel:
        await channel.queue_declare(dead_name(name), durable=True, arguments=QUORUM | {"x-expires": PROBE_LASTS})
        await channel.queue_declare(name, durable=True, arguments=QUORUM | SAFE_DEATH | death)
        expires = Basic.Properties(expiration="1")
        await channel.basic_publish(b"", routing_key=name, properties=expires, timeout=BLOCKED_AFTER)
        until = asyncio.get_running_loop().time() + PROBED_WITHIN
        while not (
            has_come := (await channel.basic_get(dead_name(name), no_ack=True, timeout=BLOCKED_AFTER)).delivery_tag
        ):
            if asyncio.get_running_loop().time() > until:
                break
            await asyncio.sleep(LOOK_AGAIN)
        await channel.queue_delete(name)
        await channel.queue_delete(dead_name(name))
        return bool(has_come)


def _finding(queue: Queue[Any], level: str, text: str) -> Finding:
    return Finding(f"queue {queue.name}", level, text)


_STRANGE = (
    f"{REGISTER!r} holds what is not Filao's, and is passed over: {{what}}. Take from producers the right to write "
    "there (SECURITY.md says how); declare anew the queue of a rule that cannot be, and take other messages out by "
    "your own means"
)
_BROKEN = (
    "a part of the ladder on which delayed messages wait was deleted: {what}. They are lost with its queues, and wait "
    "where an exchange is missing. Declare a queue with delays again, which mends it"
)
_LOST = (
    f"{{messages}} in {UNDELIVERED!r}, which came down when their queues had been deleted, or unbound from {DELAY!r}"
)
_BLOCKED = (
    f"the server has not answered for {BLOCKED_AFTER:g} s: it blocks those who send while its memory or its disk "
    "runs out, or most nodes of its cluster are away. rabbitmq-diagnostics alarms tells"
)
_STUCK = (
    "the server no longer passes on what expired: dead letters by age and delayed messages of all queues wait. On "
    "3.10 one message with a header 'x-death' that is no list of tables, and an expiration, ends the server's own "
    "worker: find its queue by 'rabbit_fifo_dlx' in the server's log, move the rest of it elsewhere, delete it, and "
    "restart the node."
)
_CONSUMER_TIMEOUT = (
    "a lease ends with its connection, and after the server's consumer_timeout (30 minutes unless rabbitmq.conf or a "
    "policy says otherwise), with all other leases of its queue in that process: raise it where handlers take longer"
)
