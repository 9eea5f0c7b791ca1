"""Traces and metrics for OpenTelemetry, as an SDK sees them, and as a collector gets them from three processes."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import filao
import filao.sync
from filao.engine import Delivery
from filao.opentelemetry import SCHEMA_URL, OpenTelemetry, carrier
from tests.conftest import engine_of
from tests.support.collector import Collector, collecting

pytestmark = pytest.mark.anyio

ENDS_WITHIN = 60.0  # seconds for a program of these tests, on a machine that does other things too


class Watched:
    """A tracer, and what the SDK behind it got."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = OpenTelemetry(tracer_provider=provider, meter_provider=meters)
        self.program = provider.get_tracer("program")

    def spans(self, *names: str) -> list[Any]:
        """Return the spans that have ended, by their ends, all or those of these names."""
        return [span for span in self._exporter.get_finished_spans() if not names or span.name in names]

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]

    def measures(self) -> dict[str, dict[str, float]]:
        """Return, by metric and operation or error, how often it was measured, or how many messages were counted."""
        data = self._reader.get_metrics_data()
        found: dict[str, dict[str, float]] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
            for point in metric.data.data_points:
                attributes = dict(point.attributes or {})
                key = str(attributes.get("error.type", attributes["messaging.operation.name"]))
                counted: Any = point
                found.setdefault(metric.name, {})[key] = counted.count if hasattr(point, "count") else counted.value
        return found


@pytest.fixture
def watched() -> Watched:
    return Watched()


def context(span: Any) -> tuple[int, int]:
    return span.context.trace_id, span.context.span_id


def linked(span: Any) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


async def test_each_operation_has_a_span_of_its_kind_and_its_words(url, watched) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(watched.tracer)
        with watched.program.start_as_current_span("order") as order:
            receipt = await broker.send_to_queue("claims", 7)
        message = await broker.receive_from_queue("claims")
        await message.ack()
        assert await broker.receive_from_queue("claims", wait=0) is None
        assert await broker.receive_from_queue("claims", wait=0.01) is None
    send, _, receive, settle = watched.spans()
    assert watched.names() == ["send claims", "order", "receive claims", "settle claims"]  # no look that found nothing
    assert [span.kind for span in (send, receive, settle)] == [SpanKind.PRODUCER, SpanKind.CLIENT, SpanKind.CLIENT]
    assert send.parent.span_id == order.get_span_context().span_id
    assert linked(receive) == linked(settle) == [context(send)]
    for span, verb in ((send, "send"), (receive, "receive"), (settle, "settle")):
        assert span.instrumentation_scope.schema_url == SCHEMA_URL
        assert span.attributes["messaging.system"] == "filao"
        assert span.attributes["messaging.destination.name"] == "claims"
        assert span.attributes["messaging.operation.name"] == span.attributes["messaging.operation.type"] == verb
        assert span.attributes["messaging.message.id"] == receipt.id
        assert span.start_time <= span.end_time
    assert settle.attributes["filao.outcome"] == "acked"
    assert receive.parent is None


async def test_a_wait_is_no_part_of_a_span(url, watched) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(watched.tracer)
        with watched.program.start_as_current_span("job") as job:
            waiting = asyncio.create_task(broker.receive_from_queue("claims"))
            lines = engine_of(broker)._lines
            async with asyncio.timeout(ENDS_WITHIN):
                while "claims" not in lines or not lines["claims"].is_quiet():
                    await asyncio.sleep(0.01)
        await broker.send_to_queue("claims", 7)
        await waiting
    (job_span,) = watched.spans("job")
    (receive,) = watched.spans("receive claims")
    assert receive.start_time >= job_span.end_time  # for it waited while the job ended
    assert receive.parent.span_id == job.get_span_context().span_id


async def test_the_context_travels_beside_the_headers_of_the_sender(url, watched) -> None:
    own = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    headers = {f"h{number}": "x" for number in range(64)}  # as many as there may be
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(watched.tracer)
        await broker.send_to_queue("claims", 1, headers=headers)
        await broker.send_to_queue("claims", 2, headers=own)
        first, second = [await broker.receive_from_queue("claims") for _ in range(2)]
        assert {name for name in first.headers if name not in headers} == {"traceparent"}
        assert second.headers == own
        assert len(headers) == 64
    assert linked(watched.spans("send claims")[1]) == [(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)]


IDS = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"


@pytest.mark.parametrize(
    "carried",
    [
        *({"traceparent": f"00-{IDS}-{flags}"} for flags in ("00", "01", "03")),
        *({"traceparent": f"{before}-{IDS}-{after}"} for before, after in (("00", "1"), ("00", "01-x"), ("00", "01 "))),
        *(
            {"traceparent": f"{before}-{IDS}-{after}"}
            for before, after in (("01", "01-x"), ("ff", "01"), (" 00", "01"))
        ),
        *({"traceparent": f"00-{IDS}-01\n"}, {"traceparent": f"00-{IDS.upper()}-01"}, {"traceparent": ""}),
        *({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, {"traceparent": "00-" + "1" * 600}),
        *({"traceparent": f"00-{IDS}-01", "tracestate": state} for state in ("vendor=1,other=2", "", "=", "a" * 600)),
    ],
)
def test_a_context_is_read_and_written_as_the_propagator_does(watched, carried: dict[str, str]) -> None:
    propagator = TraceContextTextMapPropagator()
    parent = trace.get_current_span(propagator.extract(carried)).get_span_context()
    headers = msgspec.json.encode(carried).decode()
    delivery = Delivery("q", "id", 1, 1, 1, 0, None, None, None, headers, 0, b"", 0, 0)
    watched.tracer.received("SQLite", [delivery], 0.1)
    (receive,) = watched.spans("receive q")
    assert [link.context for link in receive.links] == [parent] * parent.is_valid
    written: dict[str, str] = {}
    with trace.use_span(trace.NonRecordingSpan(parent)):
        propagator.inject(written)
        assert carrier() == written


async def test_many_messages_are_one_span_and_a_transaction_is_followed(url, watched) -> None:
    async with filao.connect(url) as broker:
        await broker.declare(filao.Queue("claims"), filao.Queue("letters"))
        broker.observers.add(watched.tracer)
        await broker.send_many("claims", range(3))
        first, *_ = await broker.receive_many("claims", 3)
        async with first.transaction() as transaction:
            await transaction.send_to_queue("letters", "dear")
        letter = await broker.receive_from_queue("letters")
    send, receive = watched.spans("send claims")[0], watched.spans("receive claims")[0]
    assert send.attributes["messaging.batch.message_count"] == receive.attributes["messaging.batch.message_count"] == 3
    assert linked(receive) == [context(send)] * 3
    (sent,) = watched.spans("send letters")
    assert letter.headers["traceparent"].split("-")[2] == f"{sent.context.span_id:016x}"
    assert watched.spans("settle claims")[0].attributes["filao.outcome"] == "acked"


async def test_a_handler_runs_in_a_trace_of_its_own_that_is_linked_to_its_sender(tmp_path, watched) -> None:
    worker = filao.Worker(tmp_path / "claims.db")
    worker.observers.append(watched.tracer)
    seen: dict[str, int] = {}

    @worker.consumer(filao.Queue("claims", max_attempts=1))
    async def handle(message: filao.Message[str]) -> None:
        seen[message.body] = trace.get_current_span().get_span_context().span_id
        if message.body == "bad":
            raise ValueError(message.body)

    @worker.consumer(filao.Queue("letters"))
    def write(message: filao.sync.Message[str]) -> None:
        seen[message.body] = trace.get_current_span().get_span_context().span_id

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims", max_attempts=1), filao.Queue("letters"))
        broker.observers.add(watched.tracer)
        await broker.send_many("claims", ["good", "bad"])
        await broker.send_to_queue("letters", "dear")
        broker.observers.remove(watched.tracer)
        with watched.program.start_as_current_span("shift"):
            await worker.drain(broker)
    spans = {span.context.span_id: span for span in watched.spans("process claims", "process letters")}
    good, bad, dear = (spans[seen[body]] for body in ("good", "bad", "dear"))
    assert {good.kind, bad.kind, dear.kind} == {SpanKind.CONSUMER}
    assert good.parent is bad.parent is dear.parent is None
    assert len({good.context.trace_id, bad.context.trace_id, dear.context.trace_id}) == 3
    assert linked(good) == linked(bad) == [context(watched.spans("send claims")[0])]
    assert [good.attributes["filao.outcome"], bad.attributes["filao.outcome"]] == ["acked", "dead"]
    assert (good.status.status_code, bad.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert bad.attributes["error.type"] == "ValueError"
    settles = watched.spans("settle claims", "settle letters")
    assert {span.parent.span_id for span in settles} == set(spans)


async def test_what_fails_says_how(tmp_path, watched) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims", max_length=1))
        broker.observers.add(watched.tracer)
        await broker.send_to_queue("claims", 1)
        with pytest.raises(filao.QueueFull):
            await broker.send_to_queue("claims", 2)
        message = await broker.receive_from_queue("claims")
        await broker.purge("claims", state="leased")
        with pytest.raises(filao.LeaseLost):
            await message.ack()
    full, lost = watched.spans("send claims")[1], watched.spans("settle claims")[0]
    assert [span.attributes["error.type"] for span in (full, lost)] == ["QueueFull", "LeaseLost"]
    assert {full.status.status_code, lost.status.status_code} == {StatusCode.ERROR}


async def test_operations_and_runs_are_measured_by_their_names(tmp_path, watched) -> None:
    worker = filao.Worker(tmp_path / "claims.db")

    @worker.consumer(filao.Queue("claims"))
    async def handle(message: filao.Message[int]) -> None: ...

    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(watched.tracer)
        await broker.send_many("claims", range(3))
        with pytest.raises(filao.MessageTooLarge):
            await broker.send_to_queue(filao.Queue("claims", body_max=10**6), "x" * 300_000)
        assert len(await worker.drain(broker)) == 3
    assert watched.measures() == {
        "messaging.client.operation.duration": {"send": 1, "MessageTooLarge": 1, "receive": 3, "settle": 3},
        "messaging.client.sent.messages": {"send": 3, "MessageTooLarge": 1},
        "messaging.client.consumed.messages": {"receive": 3},
        "messaging.process.duration": {"process": 3},
    }


def test_the_blocking_twin_sends_and_settles_in_the_trace_of_its_thread(tmp_path, watched) -> None:
    with filao.sync.connect(tmp_path / "claims.db") as broker:
        broker.declare(filao.Queue("claims"))
        broker.observers.add(watched.tracer)
        with watched.program.start_as_current_span("order") as order:
            broker.send_to_queue("claims", 7)
            assert carrier({"a": "b"})["traceparent"].split("-")[1] == f"{order.get_span_context().trace_id:032x}"
            broker.receive_from_queue("claims").ack()
    for name in ("send claims", "settle claims"):
        assert watched.spans(name)[0].parent.span_id == order.get_span_context().span_id


async def test_without_an_sdk_nothing_travels_and_nothing_fails(tmp_path) -> None:
    async with filao.connect(tmp_path / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        broker.observers.add(OpenTelemetry())
        await broker.send_to_queue("claims", 7)
        message = await broker.receive_from_queue("claims")
        assert message.headers == {}
        await message.ack()


async def test_on_rabbitmq_the_system_is_rabbitmq(rabbitmq, watched) -> None:
    async with filao.connect(rabbitmq.url()) as broker:
        await broker.declare(filao.Queue("traced", backoff=filao.Backoff(first=0)))
        broker.observers.add(watched.tracer)
        await broker.send_to_queue("traced", 7, headers={"a": "b"})
        message = await broker.receive_from_queue("traced", wait=ENDS_WITHIN)
        assert message is not None
        await message.ack()
        assert set(message.headers) == {"a", "traceparent"}
        broker.observers.remove(watched.tracer)
        await broker.delete_queue("traced")
    assert {span.attributes["messaging.system"] for span in watched.spans()} == {"rabbitmq"}
    assert watched.names() == ["send traced", "receive traced", "settle traced"]
    assert linked(watched.spans("receive traced")[0]) == [context(watched.spans("send traced")[0])]


PROGRAM = """
import asyncio
import sys

import filao
from filao.opentelemetry import OpenTelemetry
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

part, path, collector = sys.argv[1:]
resource = Resource.create({"service.name": part})
tracers = TracerProvider(resource=resource)
tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(collector + "/v1/traces")))
trace.set_tracer_provider(tracers)
meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(collector + "/v1/metrics"))], resource)
metrics.set_meter_provider(meters)

claims, letters = filao.Queue("claims"), filao.Queue("letters")
worker = filao.Worker(path)
worker.observers.append(OpenTelemetry())


@worker.consumer(claims)
async def decide(message: filao.Message):
    async with filao.connect(path) as broker:
        broker.observers.add(OpenTelemetry())
        await broker.send_to_queue(letters, "dear")


async def main():
    async with filao.connect(path) as broker:
        await broker.declare(claims, letters)
        if part == "worker":
            await worker.drain(broker)
            return
        broker.observers.add(OpenTelemetry())
        if part == "portal":
            with trace.get_tracer("portal").start_as_current_span("order"):
                await broker.send_to_queue(claims, {"claim_id": 7})
        else:
            message = await broker.receive_from_queue(letters)
            await message.ack()


asyncio.run(main())
tracers.shutdown()
meters.shutdown()
"""


def _run(part: str, folder: Path, collector: Collector) -> None:
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    program = [sys.executable, "program.py", part, "claims.db", collector.url]
    done = subprocess.run(program, cwd=folder, timeout=ENDS_WITHIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_collector_sees_one_story_from_three_processes(tmp_path) -> None:
    with collecting() as collector:
        for part in ("portal", "worker", "printer"):
            _run(part, tmp_path, collector)
    spans = {(one.service, one.span.name): one for one in collector.spans}
    assert set(spans) == {
        *(("portal", name) for name in ("order", "send claims")),
        *(("worker", name) for name in ("receive claims", "process claims", "send letters", "settle claims")),
        *(("printer", name) for name in ("receive letters", "settle letters")),
    }
    assert len(collector.spans) == len(spans)
    send, process = spans["portal", "send claims"].span, spans["worker", "process claims"].span
    follow_up, receive = spans["worker", "send letters"].span, spans["printer", "receive letters"].span
    assert send.parent_span_id == spans["portal", "order"].span.span_id
    assert [(link.trace_id, link.span_id) for link in process.links] == [(send.trace_id, send.span_id)]
    assert spans["worker", "settle claims"].span.parent_span_id == process.span_id
    assert (follow_up.trace_id, follow_up.parent_span_id) == (process.trace_id, process.span_id)
    assert [(link.trace_id, link.span_id) for link in receive.links] == [(follow_up.trace_id, follow_up.span_id)]
    kinds = {one.span.name.partition(" ")[0]: one.kind for one in collector.spans if one.schema_url}
    assert kinds == {
        "send": "SPAN_KIND_PRODUCER",
        "receive": "SPAN_KIND_CLIENT",
        "process": "SPAN_KIND_CONSUMER",
        "settle": "SPAN_KIND_CLIENT",
    }
    assert {one.schema_url for one in collector.spans} == {"", SCHEMA_URL}
    assert collector.metrics == {
        "messaging.client.operation.duration",
        "messaging.client.sent.messages",
        "messaging.client.consumed.messages",
        "messaging.process.duration",
    }


AWAY = """
import asyncio
import os
import sys

import filao
from filao.opentelemetry import OpenTelemetry
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

path, silent, closed = sys.argv[1:]
tracers = TracerProvider(shutdown_on_exit=False)
exporter = OTLPSpanExporter(silent + "/v1/traces")
tracers.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=20, max_export_batch_size=10))
reader = PeriodicExportingMetricReader(OTLPMetricExporter(closed + "/v1/metrics"), export_interval_millis=50)
observer = OpenTelemetry(tracer_provider=tracers, meter_provider=MeterProvider([reader], shutdown_on_exit=False))
claims = filao.Queue("claims")
worker = filao.Worker(path)
worker.observers.append(observer)


@worker.consumer(claims)
async def decide(message: filao.Message): ...


async def main():
    async with filao.connect(path) as broker:
        broker.observers.add(observer)
        await broker.declare(claims)
        for number in range(100):
            await broker.send_to_queue(claims, number)
        await worker.drain(broker)
        print((await broker.stats("claims")).acked)


asyncio.run(main())
sys.stdout.flush()
os._exit(0)  # an exporter that tries again and again is not waited for
"""


def test_a_collector_that_is_away_neither_holds_up_nor_fails_a_message(tmp_path) -> None:
    """Spans go to one that takes the connection and says nothing, more than are kept; measures to a closed port."""
    (tmp_path / "program.py").write_text(AWAY, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens on it, and nobody else can
        urls = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in (silent, closed)]
        program = [sys.executable, "program.py", "claims.db", *urls]
        done = subprocess.run(program, cwd=tmp_path, timeout=ENDS_WITHIN, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "100\n"), done.stderr
