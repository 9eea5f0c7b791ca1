"""Pages over HTTP for probes and scrapers: GET and HEAD, one request for each connection.

It answers from a thread and a loop of its own, so even while a handler blocks the worker's loop. Anybody may reach its
port: each connection lasts a few seconds at most, and when there are many the oldest is closed, so that unfinished
requests cannot keep a probe out.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from filao.cli.shell import usage
from filao.process import start

log: logging.Logger = logging.getLogger("filao.worker")

ANSWERS_WITHIN = 5.0  # seconds from a connection to its end
CONNECTIONS_MAX = 32  # at once; one more takes the place of the oldest
REQUEST_MAX = 8_192  # bytes of a request, headers included


class Page(NamedTuple):
    """An answer."""

    body: bytes
    kind: bytes = b"application/json"
    """Its content type."""
    status: bytes = b"200 OK"


Answer = Callable[[bytes], Awaitable[Page]]
"""Returns the page of a path; it is called on the server's loop."""


@contextmanager
def served(option: str, host: str, port: int, answer: Answer, *, name: str) -> Generator[int]:
    """Serve pages where an option says; yield the port, which port 0 lets the system choose. `name` is the thread's."""
    with listening_at(option, host, port) as listening:
        loop = asyncio.new_event_loop()
        stopped = asyncio.Event()
        serving = _Server(answer).serve(listening, stopped)
        thread = threading.Thread(target=_run, args=(loop, serving), name=name, daemon=True)
        start(thread)
        try:
            yield listening.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(ANSWERS_WITHIN)


def address_of(option: str, given: str) -> tuple[str, int]:
    """Return the host and port of `[HOST:]PORT`; loopback if no host is given."""
    host, _, port = given.rpartition(":")
    if not port.isdecimal() or len(port) > 5 or int(port) > 65_535:
        raise usage(f"{option} {given!r}: give a port, or HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def shown_address(host: str, port: int) -> str:
    """Return an address as a URL shows it."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def listening_at(option: str, host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address of an option, or raise the error that says why none can."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, TypeError) as error:  # the latter of what can be no host's name
        why = str(getattr(error, "strerror", error)).partition(" (while")[0]  # Python repeats the address
        raise usage(
            f"{option}: {host}:{port} cannot be listened on: {why}. Give another address; port 0 is any that is free"
        ) from error


def _run(loop: asyncio.AbstractEventLoop, serving: Coroutine[Any, Any, None]) -> None:
    try:
        loop.run_until_complete(serving)
    finally:
        loop.close()


class _Server:
    """Answers, one request for each connection."""

    def __init__(self, answer: Answer) -> None:
        self._page = answer
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        """The connections, the oldest first."""

    async def serve(self, listening: socket.socket, stopped: asyncio.Event) -> None:
        """Serve until stopped."""
        server = await asyncio.start_server(self._met, sock=listening, limit=REQUEST_MAX)
        await stopped.wait()
        server.close()
        for task in list(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._meet(reader, writer))
        self._open[task] = writer
        task.add_done_callback(self._end)
        if len(self._open) > CONNECTIONS_MAX:
            next(iter(self._open)).cancel()

    def _end(self, task: "asyncio.Task[None]") -> None:
        writer = self._open.pop(task)  # kept until it is closed, or it warns of that since Python 3.13
        writer.transport.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a page could not be given: %s: %s", type(error).__name__, error)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            async with asyncio.timeout(ANSWERS_WITHIN):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(request.partition(b"\r\n")[0]))
                await writer.drain()
                writer.close()
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> bytes:
        method, _, rest = line.partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return (
                b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        path = rest.partition(b" ")[0].partition(b"?")[0]
        body, kind, status = await self._page(path)
        head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        return head % (status, kind, len(body)) + (b"" if method == b"HEAD" else body)
