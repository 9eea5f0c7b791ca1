"""What observers cost the processor: send-one and drain on a file, by many tasks. Run: python -m bench.observing

On a busy machine: `python -m bench.observing --messages 2560 --rounds 4`.

Two answers. **Telling**: how much of a process's time goes by in telling a worker's measures, timed inside one run:
what others on the machine do hardly matters, but the clock's own calls are counted in. **Side by side**: the time of a
process for each message without anybody who watches (twice: what is between the two is noise), with a worker's
measures, with OpenTelemetry whose SDK does nothing, which leaves what is Filao's own part, with one whose sampler takes
one trace in a hundred, and with a span for each operation, which a batch processor exports to nowhere; each measured in
turn, round after round, of which the least is told.
"""

import argparse
import asyncio
import gc
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Self

from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

import filao
from filao.batching import Batcher
from filao.observing import Observer, Tracer
from filao.opentelemetry import OpenTelemetry
from filao.prometheus.worker import WorkerMetrics

MESSAGES, SENDERS, ROUNDS = 10_000, 64, 7

Watchers = Sequence[Observer | Tracer]
Spent = tuple[float, float]
"""The seconds of send-one and of drain."""


class Telling:
    """The processor's seconds that went by in telling; as a context manager it times them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._tell: Callable[..., None] = Batcher._tell  # noqa: SLF001

    def __enter__(self) -> Self:
        Batcher._tell = self._timed  # type: ignore[method-assign]  # noqa: SLF001
        return self

    def __exit__(self, *_: object) -> None:
        Batcher._tell = self._tell  # type: ignore[method-assign]  # noqa: SLF001

    @property
    def _timed(self) -> Callable[..., None]:
        def timed(batcher: Batcher, *arguments: Any) -> None:
            began = time.thread_time()
            self._tell(batcher, *arguments)
            self.seconds += time.thread_time() - began

        return timed


class Nowhere(SpanExporter):
    """Exports spans to nowhere."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:  # noqa: ARG002
        return SpanExportResult.SUCCESS


class Idle(trace.TracerProvider, trace.NoOpTracer):
    """Stands for an SDK that costs nothing: all its spans are one, with a context that travels, and record nothing."""

    def __init__(self) -> None:
        context = trace.SpanContext(1, 1, is_remote=False, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
        self._span = trace.NonRecordingSpan(context)

    def get_tracer(self, *_: Any, **__: Any) -> trace.Tracer:
        return self

    def start_span(self, *_: Any, **__: Any) -> trace.Span:
        return self._span


def telemetry(sampler: Sampler) -> OpenTelemetry:
    """Return a tracer with an SDK of its own."""
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    return OpenTelemetry(tracer_provider=provider, meter_provider=MeterProvider([InMemoryMetricReader()]))


async def spent(path: Path, messages: int, watchers: Watchers, each: Callable[[str, float], None]) -> None:
    """Report the processor's seconds of send-one and of drain to `each`."""
    async with filao.connect(path) as broker:
        await broker.declare(filao.Queue("claims"))
        for one in watchers:
            broker.observers.add(one)

        async def send() -> None:
            for number in range(messages // SENDERS):
                await broker.send_to_queue("claims", {"claim_id": number})

        async def drain() -> None:
            while (message := await broker.receive_from_queue("claims", wait=0)) is not None:
                await message.ack()

        async def share(name: str, work: Callable[[], Awaitable[None]]) -> None:
            gc.collect()
            began = time.process_time()
            await asyncio.gather(*(work() for _ in range(SENDERS)))
            each(name, time.process_time() - began)

        await share("send-one", send)
        await share("drain", drain)


def tell(folder: Path, messages: int, rounds: int) -> None:
    """Print how much of the time goes by in telling."""
    shares: dict[str, list[float]] = {}
    with Telling() as telling:

        def each(name: str, seconds: float) -> None:
            shares.setdefault(name, []).append(100 * telling.seconds / seconds)
            telling.seconds = 0.0

        for number in range(rounds):
            asyncio.run(spent(folder / f"told{number}.db", messages, [WorkerMetrics()], each))
    for name, found in shares.items():
        print(f"telling   {name:<9} {median(found):5.1f} % of the processor's time (median of {rounds})")


def compare(folder: Path, messages: int, rounds: int) -> None:
    """Print what each way to watch costs, side by side."""
    ways: dict[str, Callable[[], Watchers]] = {
        "nobody": list,
        "nobody, again": list,
        "Prometheus": lambda: [WorkerMetrics()],
        "and OpenTelemetry, an idle SDK": lambda: [
            WorkerMetrics(),
            OpenTelemetry(tracer_provider=Idle(), meter_provider=NoOpMeterProvider()),
        ],
        "and OpenTelemetry, 1 trace in 100": lambda: [
            WorkerMetrics(),
            telemetry(ParentBased(TraceIdRatioBased(0.01))),
        ],
        "and OpenTelemetry, a span for each": lambda: [WorkerMetrics(), telemetry(ALWAYS_ON)],
    }
    least: dict[tuple[str, str], float] = {}
    numbers = count()
    for _ in range(rounds):
        for way, watchers in ways.items():

            def each(name: str, seconds: float, way: str = way) -> None:
                least[name, way] = min(seconds, least.get((name, way), seconds))

            asyncio.run(spent(folder / f"{next(numbers)}.db", messages, watchers(), each))
    for (name, way), seconds in sorted(least.items(), key=lambda one: one[0][0], reverse=True):
        more = 100 * (seconds / least[name, "nobody"] - 1)
        print(f"{name:<9} {way:<34} {1e6 * seconds / messages:6.1f} us for each message, {more:+6.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tell(Path(folder), options.messages, options.rounds)
        compare(Path(folder), options.messages, options.rounds)


if __name__ == "__main__":
    main()
