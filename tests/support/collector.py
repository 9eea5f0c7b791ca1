"""A collector of OpenTelemetry: it keeps all that programs export to it by OTLP over HTTP."""

import gzip
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collected(NamedTuple):
    """A span, and the program that exported it."""

    service: str
    schema_url: str
    span: Span

    @property
    def kind(self) -> str:
        return str(Span.SpanKind.Name(self.span.kind))


class Collector:
    """What was exported so far."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Collected] = []
        self.metrics: set[str] = set()

    def take(self, path: str, body: bytes) -> None:
        """Read what was posted. Raises an error if it is not OTLP."""
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    found = [Collected(named["service.name"], scope.schema_url, span) for span in scope.spans]
                    self.spans.extend(found)
        elif path == "/v1/metrics":
            for resources in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.metrics |= {one.name for scope in resources.scope_metrics for one in scope.metrics}


@contextmanager
def collecting() -> Generator[Collector]:
    """Yield a collector that listens until the block ends."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
