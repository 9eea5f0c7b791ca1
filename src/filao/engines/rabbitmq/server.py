"""The server: where it is, how it is reached, and what its errors mean to a user of Filao."""

import asyncio
import logging
import math
import random
import re
from collections.abc import AsyncGenerator, Callable, Generator, Sized
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import cast
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import aiormq
from aiormq import Channel
from aiormq.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelClosed,
    ChannelInvalidStateError,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionInternalError,
    ConnectionNotAllowed,
    ConnectionNotImplemented,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from pamqp.commands import Basic

from filao.engines.rabbitmq import wire
from filao.engines.rabbitmq.client import FILES, SETTINGS, Connection, Sockets, UnusableFiles
from filao.engines.rabbitmq.outlet import Outlet
from filao.errors import ConfigurationError, EngineError, EngineUnavailable
from filao.guarded import Log
from filao.printable import printable
from filao.urls import checked, hosts, is_bare, shown_url

AWAY = (AMQPError, ChannelInvalidStateError, TimeoutError, OSError)  # what the client raises when the server is away

log: Log = Log(logging.getLogger("filao.rabbitmq"))

for _name in ("aiormq", "aio_pika"):  # without this, what is raised here would be printed too
    logging.getLogger(_name).addHandler(logging.NullHandler())

wire.install()

VERSION_MIN = (3, 10)  # where quorum queues got message TTLs, and dead letters that cannot be lost on their way
CONNECTED_WITHIN = 10.0  # seconds
ANSWERS_WITHIN = 30.0  # seconds for a reply or a confirm; a server that takes longer counts as away
FAREWELL_WITHIN = 0.5  # seconds to close the connection to a server that has not answered in time
OUTLETS_MAX = 64  # queues of one process with a channel of their own for what is sent to them
SHARED = ""  # the place of the outlet for all other queues
FREE_MIN = 64  # channels that are left for other things, such as large bodies, where the server allows few
STEADY_AFTER = 10.0  # seconds after which a session no longer counts as short
LOST_OFTEN = 5  # short sessions in a row after which a warning is logged
UNREADABLE = ". A message that cannot be read does it, at the head of its queue: look at it with another client"
HUNG_UP = ("Server connection ", "Server communication error: SSLError")
"""Begin the client's words where a server, or what is before it, ends a connection before its welcome."""
PAUSE_FIRST, PAUSE_MAX = 0.05, 2.0  # seconds between short sessions
HEARTBEAT = 30  # seconds; a connection without a sign of life for two of them is lost, and its messages are given back

DOUBT = (
    "If this was a send, it is open whether the message was stored: send it again with the same message_id, by which "
    "its consumer can tell."
)


class Server:
    """A RabbitMQ, by its URL: one host, or the nodes of a cluster."""

    def __init__(self, url: str) -> None:
        parts = checked(url)
        if is_bare(parts.query):  # the client library would write it into its log
            raise ConfigurationError(
                f"the URL {shown_url(url)} cannot be read: RabbitMQ takes the password before the host, "
                "amqp://user:password@host"
            )
        user = parts.netloc.rpartition("@")[0]
        nodes = hosts(parts)
        ports = [urlsplit(f"//{node}").port for node in nodes]
        vhost = unquote(parts.path[1:]) or "/"
        if not nodes or not all(urlsplit(f"//{node}").hostname for node in nodes):
            raise ConfigurationError("the RabbitMQ URL names no host; give amqp://user:password@host:5672/vhost")
        settings = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := [name for name in settings if name not in SETTINGS]:
            raise ConfigurationError(
                f"the URL {shown_url(url)} has the setting {printable(unknown[0])!r}, which does nothing here: leave "
                f"it out. There are {', '.join(SETTINGS)}."
            )
        self._is_safe = parts.scheme == "amqps"
        if not self._is_safe and (idle := [name for name in FILES if name in settings]):
            raise ConfigurationError(
                f"the URL {shown_url(url)} has {idle[0]}=, and asks for no TLS: begin it with amqps://, and name the "
                f"port for that, mostly 5671"
            )
        query = parts.query if "heartbeat=" in parts.query else f"{parts.query}&heartbeat={HEARTBEAT}".lstrip("&")
        at = f"{user}@" if user else ""
        self._urls = [urlunsplit((parts.scheme, f"{at}{node}", parts.path or "/", query, "")) for node in nodes]
        default = 5671 if self._is_safe else 5672
        named = [node if port else f"{node}:{default}" for node, port in zip(nodes, ports, strict=True)]
        self._sockets = Sockets(is_safe=self._is_safe)
        self.vhost = vhost
        self.name: str = f"RabbitMQ at {', '.join(named)}, virtual host {vhost!r}"
        """Its name in error texts, without the password."""
        self.version: str = ""

    async def connect(self) -> "Session":
        """Open a connection to the first node that answers; the next time, that one is asked first."""
        failed: EngineUnavailable | None = None
        refused = False
        for url in list(self._urls):
            try:
                with self.mapped(begun=False):
                    connection = Connection(url, self._sockets)
                    await connection.connect(timeout=CONNECTED_WITHIN)
            except ValueError:  # its text may hold the password
                refused = True
                break
            except EngineUnavailable as error:
                failed = error
                self._urls.append(self._urls.pop(0))
                continue
            session = Session(connection)
            self.version = session.version
            if _numbers(self.version) < VERSION_MIN:
                await session.close()
                raise ConfigurationError(
                    f"{self.name} is version {self.version}; Filao needs {'.'.join(map(str, VERSION_MIN))} or newer"
                )
            return session
        if refused:
            raise ConfigurationError(f"the URL of {self.name} cannot be read: a setting behind its ? is wrong")
        raise failed or EngineUnavailable(f"{self.name} cannot be reached")

    def drop(self) -> None:
        """Close all connections at once, whatever they are doing; what was received goes back to its queues."""
        self._sockets.drop()

    @contextmanager
    def mapped(self, *, begun: bool = True) -> Generator[None]:
        """Turn the client's errors into ours, which name the server and say what to do.

        `begun`: the server may have done something already.
        """
        try:
            yield
        except AWAY as error:
            raise self.engine_error(error, begun=begun) from error

    def engine_error(self, error: BaseException, *, begun: bool = True) -> EngineError | ConfigurationError:
        """Return our error for one of the client or the server; `begun`: the server may have done something."""
        said = _said(error)
        match error:
            case (
                AuthenticationError() | ProbableAuthenticationError() | ConnectionNotAllowed() | ChannelAccessRefused()
            ):
                return _refusal(self.name, error, said)
            case ChannelPreconditionFailed():
                return ConfigurationError(f"{self.name}: {said}")
            case ConnectionNotImplemented():
                return ConfigurationError(
                    f"{self.name}: {said}. Another program has made this queue anew as one of another type. Move what "
                    f"is in it elsewhere, delete it, and declare it again."
                )
            case ChannelNotFoundEntity():
                return EngineUnavailable(
                    f"{self.name}: {said}: it was deleted there. Declare your queue again, which makes anew what is "
                    f"missing. {DOUBT}"
                )
            case ChannelLockedResource():
                return EngineUnavailable(
                    f"{self.name}: {said}. Another program has it for its own connection alone: end that program, or "
                    f"choose another name."
                )
            case ChannelInvalidStateError() | ChannelClosed(args=(None, None)):  # its words name a wrong cause, or none
                return EngineUnavailable(
                    f"{self.name}: the channel of this call was closed meanwhile: with its connection, by the server, "
                    f"or because a call on it had no answer or was cut off. The next call opens another. "
                    f"{DOUBT if begun else 'Nothing was done.'}"
                )
            case DeliveryError():
                return EngineUnavailable(f"{self.name} did not store the message: {said}. Send it again.")
            case ConnectionInternalError():
                return EngineUnavailable(
                    f"{self.name} ended the connection for an error of its own: {said}. Perhaps nodes of its cluster "
                    f"are away: rabbitmqctl cluster_status tells. {DOUBT if begun else 'Nothing was done.'}"
                )
            case TimeoutError() if not begun:
                return EngineUnavailable(f"{self.name} has not answered for {CONNECTED_WITHIN:g} s. Nothing was done.")
            case AMQPError() if not begun and (advice := _advice(error, said)):
                return EngineUnavailable(
                    f"{self.name}: no TLS connection could be made: {said}. Nothing was done. {advice}"
                )
            case AMQPConnectionError() if not begun and said.startswith(HUNG_UP):
                perhaps = (
                    "If it asks its clients for certificates, name one that it trusts in the URL: "
                    "?certfile=/path/to/client.pem&keyfile=/path/to/client.key"
                    if self._is_safe
                    else "If it expects TLS on this port, begin the URL with amqps://"
                )
                return EngineUnavailable(f"{self.name} is away: {said}. Nothing was done. {perhaps}.")
            case TimeoutError():
                return EngineUnavailable(
                    f"{self.name} has not answered for {ANSWERS_WITHIN:g} s; it blocks those who send while its "
                    f"memory or its disk runs out, or most nodes of its cluster are away. {DOUBT}"
                )
            case _:
                return EngineUnavailable(f"{self.name} is away: {said}. {DOUBT if begun else 'Nothing was done.'}")


class Session:
    """One connection to the server, while it lasts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ended = asyncio.get_running_loop().create_future()
        self._connection.close_callbacks.add(self._end)
        self._outlets: dict[str, Outlet] = {}
        self._opening = asyncio.Lock()
        inner = cast("aiormq.Connection | None", connection.transport and connection.transport.connection)
        self._channels: Sized = () if inner is None else inner.channels
        self._channels_max: int = 0 if inner is None else inner.connection_tune.channel_max or 0
        """How many the server allows at once; 0: no limit of its own."""
        properties = {} if inner is None else inner.server_properties
        self.version: str = str(properties.get("version", "0"))
        self.cluster: str = str(properties.get("cluster_name", ""))
        self.opened_at: float = asyncio.get_running_loop().time()
        self.ended_by: str = ""
        """The words of the error that it ended with."""
        self.is_unreadable: bool = False
        """Whether it ended because what came could not be read."""
        self.lasted: float = math.inf
        """How many seconds, once it has ended."""

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return not self._ended.done()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call back once it has ended, whichever side ended it."""
        self._ended.add_done_callback(lambda _: call())

    @contextmanager
    def hurrying(self, limit: asyncio.Timeout) -> Generator[None]:
        """End a wait for the server soon after its connection, whose end a caller that waits to write does not see."""
        now = asyncio.get_running_loop().time

        def hurry(_: object) -> None:
            with suppress(RuntimeError):  # it has ended by itself
                limit.reschedule(min(limit.when() or now(), now() + FAREWELL_WITHIN))

        self._ended.add_done_callback(hurry)
        try:
            yield
        finally:
            self._ended.remove_done_callback(hurry)

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel. Raises `ConfigurationError` when the server allows no more.

        If it were asked for one more, the server would end the connection, and with it every lease.
        """
        if self._channels_max and len(self._channels) >= self._channels_max:
            raise ConfigurationError(
                f"the server allows {self._channels_max:,} channels on a connection, and all are open: one for each "
                f"queue that this process receives from, and for each large body on its way. Nothing was done. Raise "
                f"channel_max in rabbitmq.conf, or use fewer at once."
            )
        channel = self._connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
        try:
            async with asyncio.timeout(ANSWERS_WITHIN):  # the library's own limit does not cover the server's answer
                await channel.initialize()
        except RuntimeError as error:  # aio-pika's error for a connection that has just ended
            raise ConnectionResetError(str(error)) from error
        return cast("Channel", await channel.get_underlay_channel())

    async def publishing(self, queue: str) -> Outlet:
        """Enter the outlet of all who publish to a queue; the caller leaves it.

        Each queue has one of its own, as long as there are few: the server's end of a channel waits, with all that came
        over it, for a queue to which it has sent nothing before, and whose leader does not answer.
        """
        most = min(OUTLETS_MAX, self._channels_max - FREE_MIN) if self._channels_max else OUTLETS_MAX
        async with self._opening:  # nobody overtakes those that wait for it to open
            place = queue if queue in self._outlets or len(self._outlets) < most else SHARED
            outlet = self._outlets.get(place)
            if outlet is None or not outlet.is_open:
                outlet = self._outlets[place] = Outlet(await self.channel(confirms=True))
            outlet.enter()
            return outlet

    @asynccontextmanager
    async def aside(self, *, confirms: bool = False) -> AsyncGenerator[Channel]:
        """Open a channel for what may fail: an error ends the channel, and all that runs on it."""
        channel = await self.channel(confirms=confirms)
        within = FAREWELL_WITHIN  # after an error: perhaps the server does not answer
        try:
            yield channel
            within = CONNECTED_WITHIN
        finally:
            if not channel.is_closed and self.is_open:
                with suppress(*AWAY):
                    async with asyncio.timeout(within):
                        await channel.close()

    async def answers(self) -> bool:
        """Return whether the server answers on it, within half a second."""
        with suppress(*AWAY, ConfigurationError):
            async with asyncio.timeout(FAREWELL_WITHIN), self.aside():
                return True
        return False

    async def depth(self, queue: str) -> int | None:
        """Return how many messages are ready in a queue of the server; None when there is no such queue."""
        try:
            async with self.aside() as channel:
                return (await channel.queue_declare(queue, passive=True, timeout=ANSWERS_WITHIN)).message_count or 0
        except ChannelNotFoundEntity:
            return None

    async def ready(self, queue: str) -> int:
        """Return how many messages are ready in a queue; that there is none its leader says itself.

        `depth` is 0, too, where the leader has not answered within a quarter of a second, or there is none just now. A
        message that is met goes back to the head.
        """
        found = await self.depth(queue)
        if found != 0:
            return found or 0
        try:
            async with self.aside() as channel:
                met = (await channel.basic_get(queue, timeout=ANSWERS_WITHIN)).delivery
        except ChannelNotFoundEntity:
            return 0
        return 1 + (met.message_count or 0) if isinstance(met, Basic.GetOk) else 0

    async def close(self, within: float = CONNECTED_WITHIN) -> None:
        """Close it, and wait `within` so many seconds for the server; what was not settled goes back to its queues."""
        with suppress(*AWAY):
            async with asyncio.timeout(within):
                await self._connection.close()
        if not self._connection.is_closed:
            self._connection.abort()
            await self._connection.close()  # its first close failed; now it only notes that it is closed
        self._end()

    def _end(self, *why: object) -> None:
        if not self._ended.done():
            self.lasted = asyncio.get_running_loop().time() - self.opened_at
            for error in why:
                if isinstance(error, BaseException):
                    self.ended_by = _said(error)
                    self.is_unreadable = isinstance(error, InvalidFrameError) or not isinstance(error, AWAY)
            self._ended.set_result(None)


class Link:
    """A session that is opened when it is needed, and again after it was lost."""

    def __init__(self, server: Server, ended: Callable[[], None]) -> None:
        self._server = server
        self._ended = ended
        self._session: Session | None = None
        self._lock = asyncio.Lock()
        self._pause = 0.0
        self._short = 0
        """How many sessions in a row were short."""

    async def session(self) -> Session:
        """Return an open session; if the last one was short, only after a pause."""
        async with self._lock:  # nobody overtakes those that wait for it to open: sends keep their order
            if self._session is None or not self._session.is_open:
                ended, self._session = self._session, None  # told of and counted once, however long the server is away
                if ended is not None:
                    await self._rest(ended)
                self._session = await self._server.connect()
                self._session.when_ended(self._ended)
            return self._session

    async def _rest(self, ended: Session) -> None:
        """Tell of a session that has ended; if it was short, pause, longer each time: what ended it may still go on."""
        why = printable(ended.ended_by) or "no error"
        self._short = self._short + 1 if ended.lasted <= STEADY_AFTER else 0
        if self._short <= 1:
            log.info("%s: a connection was lost after %.0f s, by: %s", self._server.name, ended.lasted, why)
        if not self._short:
            self._pause = 0.0
            return
        if self._short % LOST_OFTEN == 0:
            log.warning(
                "%s: the connection was lost %d times, each time soon after it was opened, the last time by: %s%s",
                *(self._server.name, self._short, why, UNREADABLE if ended.is_unreadable else ""),
            )
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.5))
        self._pause = min(2 * self._pause or PAUSE_FIRST, PAUSE_MAX)

    async def close(self, within: float = CONNECTED_WITHIN) -> None:
        """Close the session, and wait `within` so many seconds for the server."""
        session, self._session = self._session, None
        if session is not None:
            await session.close(within)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _refusal(name: str, error: BaseException, said: str) -> EngineError | ConfigurationError:
    """Return our error for a server that does not let us in, or not to what we want there."""
    if isinstance(error, AuthenticationError):  # the server has not even been asked
        return ConfigurationError(
            f"{name} allows these ways to log in: {said}. Filao has PLAIN and, with ?auth=external in the URL, "
            f"EXTERNAL. Nothing was done. Mend auth= in the URL, or auth_mechanisms in rabbitmq.conf."
        )
    if isinstance(error, ProbableAuthenticationError):
        mend = "the user name or the password in the URL; the user guest is mostly let in on the server's own host only"
        if "EXTERNAL" in said:
            mend = "the certificate: its name must be that of a user of the server"
        return ConfigurationError(f"{name} refused us: {said}. Mend {mend}.")
    if "limit" in said:
        return EngineUnavailable(
            f"{name} refused us: {said}. Nothing was done. Close connections, or raise the limit: rabbitmqctl "
            f"set_vhost_limits, set_user_limits."
        )
    return ConfigurationError(
        f"{name} refused us: {said}. Create the virtual host, or grant the user its permissions: rabbitmqctl "
        f'set_permissions -p VHOST USER ".*" ".*" ".*"'
    )


def _advice(error: AMQPError, said: str) -> str:
    """Return what to do about an error of TLS; empty for any other."""
    if isinstance(error, UnusableFiles):
        return "Mend these files, or the URL."
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return (
            "The server's certificate must be valid for the host in the URL, and be signed by an authority that is "
            "trusted here: renew it, or name an authority of your own in the URL, ?cafile=/path/to/ca.pem."
        )
    if said.startswith("[SSL"):
        return "Mend its certificate or the URL: amqps:// needs a port with TLS, mostly 5671."
    return ""


def _said(error: BaseException) -> str:
    """Return the words of the server or the client, which are among the arguments of the client's exceptions."""
    words = [str(part) for part in error.args if isinstance(part, str | bytes) and part]
    said = (words[-1] if words else str(error) or type(error).__name__).strip().rstrip(".")
    return _OBJECT.sub(lambda found: "its channel" if found[1] == "Channel" else "its connection", said)


_OBJECT = re.compile(r'<(\w+): "[^"]*" at 0x[0-9a-f]+>')  # as the client calls what has been closed
