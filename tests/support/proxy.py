"""A TCP proxy that can stall, reset, or swallow the answer to something: what networks do between a client and a
server.
"""

import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by a reset, not by a farewell


@dataclass(eq=False)
class _Line:
    """One connection through the proxy."""

    client: socket.socket
    server: socket.socket
    asked: threading.Event = field(default_factory=threading.Event)
    """Whether the client has sent what the proxy waits for, so that the answer must be swallowed."""

    def reset(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens on a free port, and passes everything on to `port` until told otherwise."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._lines: set[_Line] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._swallow: tuple[bytes, bytes] | None = None
        self._stall_at: bytes | None = None
        self.delay: float = 0.0
        """Seconds by which each answer comes later."""
        self.accepted: int = 0
        """How many connections there have been."""
        self.swallowed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Pass nothing on from now, but keep the connections."""
        self._flowing.clear()

    def stall_at(self, question: bytes) -> None:
        """Once: stall as soon as a client sends this."""
        self._stall_at = question

    def go_on(self) -> None:
        """Pass on what has come meanwhile, and all that follows."""
        self._flowing.set()

    def lead_to(self, port: int) -> None:
        """Pass new connections on to another port, as a name does that points elsewhere; those there are end."""
        self._target = port
        self.reset()

    def reset(self) -> None:
        """Reset all connections."""
        for line in list(self._lines):
            line.reset()

    def swallow(self, question: bytes, answer: bytes) -> None:
        """Once: let the `question` pass, wait for the server's `answer`, and reset the connection instead of passing it
        on.
        """
        self.swallowed.clear()
        self._swallow = (question, answer)

    def close(self) -> None:
        """End the proxy and all connections."""
        self._flowing.set()
        self._listening.close()
        self.reset()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.accepted += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                line = _Line(client, server)
                self._lines.add(line)
                for pump in (self._ask, self._answer):
                    threading.Thread(target=pump, args=(line,), daemon=True).start()

    def _ask(self, line: _Line) -> None:
        with suppress(OSError):
            while data := line.client.recv(65_536):
                if self._stall_at is not None and self._stall_at in data:
                    self._stall_at = None
                    self.stall()
                self._flowing.wait()
                if self._swallow is not None and self._swallow[0] in data:
                    line.asked.set()
                line.server.sendall(data)
        self._end(line)

    def _answer(self, line: _Line) -> None:
        with suppress(OSError):
            while data := line.server.recv(65_536):
                time.sleep(self.delay)
                self._flowing.wait()
                if line.asked.is_set():
                    if self._swallow is not None and self._swallow[1] in data:
                        self._swallow = None
                        self.swallowed.set()
                        break
                    continue
                line.client.sendall(data)
        self._end(line)

    def _end(self, line: _Line) -> None:
        self._lines.discard(line)
        line.reset()
