"""The register of declared queues and their rules: one message in a queue of its own, held while it is read.

RabbitMQ tells its clients neither which queues there are nor how they were declared, so Filao keeps a register. It is
read by taking the message and giving it back, within a millisecond. To change it, a new message is published before the
old one is acknowledged. After a crash in between there are two, which are merged.

A producer with the right to write to the default exchange can put anything into that queue. A message that is no
register is left where it is, an impossible rule gets its default, and both are reported: no queue stops because of it.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from aiormq import Channel
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import (
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionNotImplemented,
)
from pamqp.commands import Basic

from filao.checks import check_name
from filao.codec import shown
from filao.engines.rabbitmq.refusals import has_delay
from filao.engines.rabbitmq.server import ANSWERS_WITHIN, CONNECTED_WITHIN, FAREWELL_WITHIN, Server, Session
from filao.engines.rabbitmq.topology import QUORUM, REGISTER
from filao.errors import ConfigurationError, EngineUnavailable
from filao.guarded import Log, cancellable
from filao.queue import Backoff, Queue, not_found, rules_from_json, rules_to_json

log: Log = Log(logging.getLogger("filao.rabbitmq"))

LOOKED_AT_MAX = 100  # messages of the register's queue: two after a crash, and what other programs may have put there
VERSION_MAX = 2**53  # of a page, which gets a new version with each change of a rule
HELD_MAX = 10.0  # seconds that another process may hold the register, because it was paused in the middle
LOOK_AGAIN = 0.005  # seconds


class Page(msgspec.Struct, frozen=True):
    """The rules of a queue, and how often they have been written."""

    version: int
    rules: msgspec.Raw


Pages = dict[str, Page]


@dataclass(slots=True)
class _Hold:
    """The register, while it is held."""

    channel: Channel
    messages: list[DeliveredMessage]
    """The messages from which it was read: one, as a rule."""
    pages: Pages
    strange: list[str]
    """Descriptions of what is in its queue but cannot be read."""


@dataclass(frozen=True, slots=True)
class Apart:
    """A session for a single call, and the call's time limit."""

    session: Session
    limit: asyncio.Timeout

    def until(self) -> float:
        """Return when the call's time is over, by the loop's clock."""
        return self.limit.when() or math.inf

    def goes_on(self) -> None:
        """Lift the limit: what follows is done piece by piece, and each piece has a limit of its own."""
        self.limit.reschedule(None)


class Declared:
    """The queues that this process knows to be declared, as of its last look at the register."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.rules: dict[str, Queue] = {}
        self.strange: list[str] = []
        """Descriptions of what is in the register but cannot be read."""
        self.learnt_at: float = 0.0
        self._coming: asyncio.Task[list[Queue]] | None = None
        """A look that has not begun to read, so that it sees all that was declared before a caller joins it."""
        self._looks: set[asyncio.Task[list[Queue]]] = set()

    async def learn(self) -> list[Queue]:
        """Read the register, and return every declared queue with its rules, by name.

        Callers that come together share a look, which goes on for the others when one of them is cancelled.
        """
        if self._coming is None:
            self._coming = asyncio.get_running_loop().create_task(self._look())
            self._looks.add(self._coming)
            self._coming.add_done_callback(self._looked)
        look = self._coming
        try:
            return list(await asyncio.shield(look))
        except asyncio.CancelledError:
            if look.cancelled():
                raise EngineUnavailable("the broker was closed meanwhile") from None
            raise

    async def close(self) -> None:
        """End the looks that are under way."""
        for look in self._looks:
            look.cancel()
        await asyncio.gather(*self._looks, return_exceptions=True)

    async def _look(self) -> list[Queue]:
        async with self.apart() as call:
            self._coming = None
            return await self.read(call.session)

    def _looked(self, look: "asyncio.Task[list[Queue]]") -> None:
        self._looks.discard(look)
        if look is self._coming:  # it has failed
            self._coming = None
        if not look.cancelled():
            look.exception()  # raised by the callers that waited for it, if any are left

    async def read(self, session: Session) -> list[Queue]:
        """Read the register on a session."""
        self.rules, strange = await queues(session, self._server)
        for what in strange:
            if what not in self.strange:
                log.warning("%s: the register %r holds %s", self._server.name, REGISTER, what)
        self.strange = strange
        self.learnt_at = asyncio.get_running_loop().time()
        return list(self.rules.values())

    async def rules_of(self, queue: str, *, anew: bool = False) -> Queue:
        """Return a queue with its rules; the register is read for an unknown one, or `anew`. Raises `QueueNotFound`."""
        if anew or queue not in self.rules:
            await self.learn()
        return self.known(queue)

    @asynccontextmanager
    async def apart(self, queue: str | None = None) -> AsyncGenerator[Apart]:
        """Open a session for one call: what goes wrong there costs no lease and leaves no send in doubt.

        Connecting and the whole block share one limit. If an unknown `queue` is given, the register is read, and
        `QueueNotFound` is raised if it is not declared.
        """
        session: Session | None = None
        within = FAREWELL_WITHIN  # after an error: perhaps the server does not answer
        with cancellable():
            try:
                async with asyncio.timeout(ANSWERS_WITHIN) as limit:
                    session = await self._server.connect()
                    with self._server.mapped():
                        if queue is not None and queue not in self.rules:
                            await self.read(session)
                        if queue is not None:
                            self.known(queue)
                        yield Apart(session, limit)
                within = CONNECTED_WITHIN
            except TimeoutError as error:
                raise self._server.engine_error(error, begun=session is not None) from error
            finally:
                if session is not None:
                    await session.close(within)

    def known(self, queue: str) -> Queue:
        """Return a queue as of the last look. Raises `QueueNotFound`."""
        if queue not in self.rules:
            raise not_found(queue, self.rules)
        return self.rules[queue]


async def queues(session: Session, server: Server) -> tuple[dict[str, Queue], list[str]]:
    """Return every declared queue, and descriptions of what is in the register but cannot be read."""
    async with _held(session, server) as hold:
        found = {name: _queue(name, page, hold.strange) for name, page in sorted(hold.pages.items())}
        return found, hold.strange


async def enter(session: Session, server: Server, queue: Queue[Any]) -> None:
    """Write a queue's rules into the register."""
    rules = rules_to_json(queue).encode()
    async with _held(session, server) as hold:
        if _says(hold, queue.name, rules):
            return
    await until_heard(session)
    async with _held(session, server) as hold:
        if not _says(hold, queue.name, rules):
            page = hold.pages.get(queue.name)
            hold.pages[queue.name] = Page(page.version + 1 if page else 1, msgspec.Raw(rules))
            await _replace(hold)


def _says(hold: _Hold, queue: str, rules: bytes) -> bool:
    page = hold.pages.get(queue)
    return page is not None and bytes(page.rules) == rules


async def until_heard(session: Session) -> None:
    """Send something to nobody, and return once it is confirmed; do so before the register is held to be changed.

    A server that blocks those who send hears no more of their connections, not even that they were closed: the register
    would stay with one of them, and nobody could connect.
    """
    async with session.aside(confirms=True) as channel:
        await channel.basic_publish(b"", routing_key=f"{REGISTER}#nobody", timeout=ANSWERS_WITHIN)


async def strike_out(session: Session, server: Server, queue: str, last: Callable[[], Awaitable[None]]) -> None:
    """Remove a queue; if it was the last that asked for delays, do `last` while nobody can declare another."""
    async with _held(session, server) as hold:
        if hold.pages.pop(queue, None) is None:
            return
        await _replace(hold)
        left = [_queue(name, page, []) for name, page in hold.pages.items()]
        if not any(map(has_delay, left)):
            await last()


@asynccontextmanager
async def _held(session: Session, server: Server) -> AsyncGenerator[_Hold]:
    """Hold the register; it goes back by itself when the channel ends, even because the process died."""
    with _told(server):
        await _create(session)
    async with session.aside(confirms=True) as channel:
        with _told(server):
            hold = await _taken(channel, server)
        if len(hold.messages) > 1:
            await _replace(hold)
        yield hold


@contextmanager
def _told(server: Server) -> Generator[None]:
    """Say what is wrong with the register's queue, and how it is mended."""
    try:
        yield
    except (ChannelNotFoundEntity, ChannelLockedResource, ChannelPreconditionFailed, ConnectionNotImplemented) as error:
        if isinstance(error, ChannelPreconditionFailed) and "inequivalent" not in str(error):
            raise  # a limit, say
        raise EngineUnavailable(
            f"{server.name}: the register, the queue {REGISTER!r}, was deleted, or made anew by another program: "
            f"{error.args[-1]}. Nothing was done. To mend it, {_MEND}"
        ) from error


async def _taken(channel: Channel, server: Server) -> _Hold:
    """Take the register, as soon as nobody else holds it."""
    until = asyncio.get_running_loop().time() + HELD_MAX
    while not (hold := await _take(channel)).messages:
        if asyncio.get_running_loop().time() > until:
            raise EngineUnavailable(_missing(server, hold))
        await channel.basic_nack(0, multiple=True, requeue=True, wait=False)
        await asyncio.sleep(LOOK_AGAIN)
    return hold


def _missing(server: Server, hold: _Hold) -> str:
    others = f" What lies there instead: {'; '.join(hold.strange[:3])}." if hold.strange else ""
    return (
        f"{server.name}: the register, the one message of the queue {REGISTER!r}, has not been there for {HELD_MAX:g} "
        f"s. Nothing was done.{others} Either another process holds it: end one that is paused, or try again in a "
        f"minute. Or somebody, or a policy, has emptied that queue, filled it, or made it anew: then {_MEND}"
    )


_MEND = (
    f"delete the queue and the exchange {REGISTER!r}, and declare your queues again; their messages are not touched."
)


async def _create(session: Session) -> None:
    """Create the register, unless an exchange of its name shows that this was done."""
    try:
        async with session.aside() as channel:
            await channel.exchange_declare(REGISTER, passive=True, timeout=ANSWERS_WITHIN)
    except ChannelNotFoundEntity:
        async with session.aside(confirms=True) as channel:
            await channel.queue_declare(REGISTER, durable=True, arguments=dict(QUORUM))  # being read counts as a return
            await _publish(channel, {})
            await channel.exchange_declare(REGISTER, exchange_type="fanout", durable=True)


async def _take(channel: Channel) -> _Hold:
    """Receive all that is in the register's queue, and read it."""
    hold = _Hold(channel, [], {}, [])
    for _ in range(LOOKED_AT_MAX):
        message = await channel.basic_get(REGISTER, timeout=ANSWERS_WITHIN)
        if message.delivery_tag is None:
            break
        _read(message, hold)
    return hold


def _read(message: DeliveredMessage, hold: _Hold) -> None:
    """Read a message's pages and keep the newest of each queue; a message without a readable one is no register."""
    try:
        entries = msgspec.json.decode(message.body.decode(), type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        hold.strange.append(f"a message of {len(message.body):,} bytes that is no register: {message.body[:40]!r}")
        return
    pages: Pages = {}
    for name, entry in entries.items():
        try:
            check_name(name)
            pages[name] = _page(entry)
        except (ConfigurationError, ValueError, RecursionError):
            hold.strange.append(f"an entry that is none: {shown(name)}")
    if entries and not pages:
        return
    hold.messages.append(message)
    for name, page in pages.items():
        if name not in hold.pages or hold.pages[name].version < page.version:
            hold.pages[name] = page


def _page(entry: msgspec.Raw) -> Page:
    page = msgspec.json.decode(entry, type=Page)
    msgspec.json.decode(page.rules, type=dict[str, msgspec.Raw])
    if not 0 <= page.version < VERSION_MAX:
        raise ValueError(page.version)
    return page


def _queue(name: str, page: Page, strange: list[str]) -> Queue[Any]:
    """Return a queue with its rules; an impossible one gets its default, and its description is added to `strange`."""
    kept: dict[str, msgspec.Raw] = {}
    for rule, value in msgspec.json.decode(page.rules, type=dict[str, msgspec.Raw]).items():
        try:
            rules_from_json(name, msgspec.json.encode({rule: value}).decode())
        except ConfigurationError as error:
            strange.append(f"a rule that cannot be: {error}")
        else:
            kept[rule] = value
    queue = rules_from_json(name, msgspec.json.encode(kept).decode())
    return queue if has_delay(queue) or not queue.backoff.first else replace(queue, backoff=Backoff(first=0))


async def _replace(hold: _Hold) -> None:
    await _publish(hold.channel, hold.pages)
    for message in hold.messages:
        await hold.channel.basic_ack(message.delivery_tag or 0)
    hold.messages.clear()


async def _publish(channel: Channel, pages: Pages) -> None:
    properties = Basic.Properties(content_type="application/json", delivery_mode=2)
    content = msgspec.json.encode(pages)
    await channel.basic_publish(
        content, routing_key=REGISTER, properties=properties, mandatory=True, timeout=ANSWERS_WITHIN
    )
