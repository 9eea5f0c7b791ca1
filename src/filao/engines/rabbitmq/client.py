"""The client library, where we need it otherwise: how a connection is opened, and what is written to it.

It has two layers: aio-pika's connection, with callbacks, above aiormq's, which reads and writes the frames.
"""

import asyncio
import os
import socket
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, cast

import aio_pika
import aiormq
from aio_pika.abc import UnderlayConnection
from aiormq.abc import AbstractConnection, ChannelFrame, ExceptionType
from aiormq.connection import (
    FrameReceiver,
    ReceivedFrame,
    TCPTransportFactory,
    TLSTransportFactory,
    TransportFactory,
    exception_by_code,
)
from aiormq.exceptions import AMQPConnectionError, ChannelInvalidStateError
from pamqp import commands
from pamqp.base import Frame
from pamqp.constants import FRAME_METHOD
from pamqp.frame import FrameTypes
from yarl import URL

from filao.forks import cut_off, gate, keep

FILES = ("cafile", "capath", "certfile", "keyfile")  # the settings of a URL that name files for TLS
SETTINGS = (
    *FILES,
    "auth",
    "cadata",
    "happy_eyeballs_delay",
    "heartbeat",
    "interleave",
    "name",
    "no_verify_ssl",
    "timeout",
)
"""All settings of a URL that the library knows; it passes over others."""
REFUSED_LOGIN = 403  # AMQP's code, when it comes in place of a welcome; the library knows it
_OPEN, _CLOSE, _CLOSE_OK, _CANCEL_OK = (
    method.index.to_bytes(4)
    for method in (commands.Channel.Open, commands.Channel.Close, commands.Channel.CloseOk, commands.Basic.CancelOk)
)


class UnusableFiles(AMQPConnectionError):
    """What the URL names for TLS cannot be used on this machine."""


class Sockets(TransportFactory):
    """Opens sockets for the library, which does not show them, and knows those that are open."""

    def __init__(self, *, is_safe: bool) -> None:
        self._is_safe = is_safe
        self._inner = TLSTransportFactory() if is_safe else TCPTransportFactory()
        self._writers: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()  # to uvloop's transports none can be
        gate.connect(self)

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a socket. Raises `UnusableFiles` before that, of which the library tells as if the server were away."""
        if self._is_safe:
            try:
                await options["ssl_context_provider"].get_context()
            except OSError as error:
                named = ", ".join(f"{name}={url.query[name]}" for name in FILES if name in url.query)
                raise UnusableFiles(f"{named}: {error.strerror or error}") from error
        reader, writer = await self._inner.create(url, **options)
        self._writers.add(writer)
        return reader, writer

    def drop(self) -> None:
        """Close all sockets, without a goodbye and without an event loop."""
        for writer in list(self._writers):
            with suppress(OSError), socket.socket(fileno=os.dup(_number(writer))) as end:
                end.shutdown(socket.SHUT_RDWR)

    def inherit(self) -> None:
        """In a child: cut off its ends of the sockets, so that it cannot end the sessions of its parent."""
        for writer in list(self._writers):
            cut_off(lambda: _number(writer))  # noqa: B023 - called at once
            keep(writer)


def _number(writer: asyncio.StreamWriter) -> int:
    """Return the number of its socket; -1 when it is closed, and has none any more under uvloop."""
    found: socket.socket | None = writer.get_extra_info("socket")
    return -1 if found is None else found.fileno()


class _Socket(TransportFactory):
    """Opens the socket of one connection."""

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the socket."""
        reader, self._writer = await self._sockets.create(url, **options)
        return reader, self._writer

    def abort(self) -> None:
        """Close the socket at once and drop what waits to be written."""
        if self._writer is not None:
            self._writer.transport.abort()


class _Outgoing(asyncio.Queue[ChannelFrame]):
    """What is to be written. Invariant: nothing is on a channel that one side has closed, until it is opened anew.

    The library goes on publishing for a moment after it has answered the server's farewell to a channel, and the server
    ends the whole connection for that. And where its queue is full, the library drops that answer, without which the
    server ignores the next channel of the same number: so this one has no limit. The writer empties it in one go.
    """

    def __init__(self) -> None:
        super().__init__()
        self._closed: set[bytes] = set()
        """The numbers of these channels."""

    def put_nowait(self, item: ChannelFrame) -> None:
        """Add what the library wants to write. Raises `ChannelInvalidStateError` if its channel is closed."""
        number = item.payload[1:3]
        kind = item.payload[7:11] if item.payload[0] == FRAME_METHOD else b""
        if kind == _OPEN:
            self._closed.discard(number)
        elif number in self._closed and kind != _CLOSE_OK:
            if kind in (_CLOSE, _CANCEL_OK):  # nobody waits for an answer
                return
            raise ChannelInvalidStateError("the channel was closed")
        elif kind in (_CLOSE, _CLOSE_OK):
            self._closed.add(number)
        super().put_nowait(item)


class _Welcome:
    """The frames that greet us; a farewell in their place becomes the error that it tells of."""

    def __init__(self, frames: FrameReceiver) -> None:
        self._frames = frames

    async def get_frame(self) -> ReceivedFrame:
        """Return the next frame."""
        weight, channel, frame = await self._frames.get_frame()
        if isinstance(frame, commands.Connection.Close) and frame.reply_code != REFUSED_LOGIN:
            raise exception_by_code(frame)
        return weight, channel, frame


class _Wire(aiormq.Connection):
    """The lower layer, which itself takes silence for a cancellation, and an early farewell for a broken frame."""

    async def close(self, exc: ExceptionType | None = asyncio.CancelledError, timeout: float | None = None) -> None:
        """Close it. If it was silent, the library would let all that wait for it believe that they were cancelled."""
        if isinstance(exc, asyncio.CancelledError) and self.connected.is_set():
            exc = AMQPConnectionError("the server gave no sign of life")
        await super().close(exc, timeout)

    @staticmethod
    async def _rpc(
        request: Frame, writer: asyncio.StreamWriter, frame_receiver: FrameReceiver, *how: Any, **named: Any
    ) -> FrameTypes | None:
        welcome = cast("FrameReceiver", _Welcome(frame_receiver))
        return await aiormq.Connection._rpc(request, writer, welcome, *how, **named)  # noqa: SLF001 - our own base's


_Ended = Callable[..., Awaitable[Any]]


class _Underlay(UnderlayConnection):
    """Opens a connection of the lower layer."""

    @classmethod
    async def make_connection(cls, url: URL, timeout: float | None = None, **options: Any) -> AbstractConnection:
        """Open one, and wait until it is welcomed."""
        connection = _Wire(url, **options)
        connection.write_queue = _Outgoing()
        connect = cast("Callable[[], Awaitable[bool]]", connection.connect)  # pyright: ignore[reportUnknownMemberType]
        try:
            await asyncio.wait_for(connect(), timeout)
        except StopAsyncIteration:  # how the library tells of an end that was there before it began to read
            raise AMQPConnectionError("Server connection unexpectedly closed") from None
        return connection


class Connection(aio_pika.Connection):
    """A connection that needs no closing when it is collected: a `Session` or the server has closed it before."""

    def __init__(self, url: str, sockets: Sockets) -> None:
        super().__init__(URL(url), client_properties={"connection_name": "filao"})
        self._socket = self.kwargs["transport_factory"] = _Socket(sockets)

    async def connect(self, timeout: float | None = None) -> None:
        """Open it, with a lower layer of ours."""
        ended = cast("_Ended", self._on_connection_close)  # pyright: ignore[reportUnknownMemberType]  # untyped there
        self.transport = await _Underlay.connect(self.url, ended, timeout=timeout, **self.kwargs)
        await self._on_connected()

    def abort(self) -> None:
        """Close its socket at once and drop what waits to be written, for which the library would wait for ever."""
        self._socket.abort()

    def __del__(self) -> None:
        """Do nothing, where the library's own would try to close it, perhaps without an event loop."""
