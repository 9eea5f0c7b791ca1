"""The HTTP health check of `filao work --health`: 200 while all is well, 503 while it is not, with the reasons as JSON.

`/ready` asks only whether the workers receive; every other path asks whether they are healthy. It answers from a thread
and a loop of its own, so also while a handler blocks the worker's. Strangers may reach its port: each connection has a
few seconds in all, and when there are many the oldest makes room, so that half a request takes nothing from a probe.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

log = logging.getLogger("filao.worker")

ANSWERS_WITHIN = 5.0  # seconds from a connection to its end
CONNECTIONS_MAX = 32  # at once; a probe that comes then takes the place of the oldest
REQUEST_MAX = 8_192  # bytes of a request, headers included

State = Callable[[], Mapping[str, object]]


@contextmanager
def health_check(host: str, port: int, state: State) -> Generator[int]:
    """Serve `state`, of which "ready" and "healthy" decide; yield the port, which port 0 lets the system choose."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        loop = asyncio.new_event_loop()
        stopped = asyncio.Event()
        serving = _Server(state).serve(listening, stopped)
        thread = threading.Thread(target=_run, args=(loop, serving), name="filao health", daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(stopped.set)
            thread.join(ANSWERS_WITHIN)


def _run(loop: asyncio.AbstractEventLoop, serving: Coroutine[Any, Any, None]) -> None:
    try:
        loop.run_until_complete(serving)
    finally:
        loop.close()


class _Server:
    """Answers, one request for each connection."""

    def __init__(self, state: State) -> None:
        self._state = state
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
        self._open.pop(task).transport.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a health check failed: %s: %s", type(error).__name__, error)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            async with asyncio.timeout(ANSWERS_WITHIN):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(request.partition(b"\r\n")[0]))
                await writer.drain()
                writer.close()
                await writer.wait_closed()

    def _answer(self, line: bytes) -> bytes:
        method, _, rest = line.partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return (
                b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
        path = rest.partition(b" ")[0].partition(b"?")[0]
        now = self._state()
        code = b"200 OK" if now["ready" if path == b"/ready" else "healthy"] else b"503 Service Unavailable"
        body = msgspec.json.encode(now)
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        return head % (code, len(body)) + (b"" if method == b"HEAD" else body)
