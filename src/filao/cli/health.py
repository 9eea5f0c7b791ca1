"""The HTTP health check of `filao work --health`: 200 while all is well, 503 while it is not, with the reasons as JSON.

`/ready` asks only whether the workers receive; every other path asks whether they are healthy.
"""

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec


@contextmanager
def health_check(host: str, port: int, state: Callable[[], Mapping[str, object]]) -> Generator[int]:
    """Serve `state`, of which "ready" and "healthy" decide; yield the port, which port 0 lets the system choose."""

    class Check(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that the library calls
            now = state()
            body = msgspec.json.encode(now)
            self.send_response(200 if now["ready" if self.path == "/ready" else "healthy"] else 503)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as above
            """Keep quiet: a load balancer asks every second."""

    server = ThreadingHTTPServer((host, port), Check)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="filao health", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
