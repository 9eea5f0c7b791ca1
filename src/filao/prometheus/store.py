"""Metrics of a store: depth, age and totals of its queues, which are right even if no worker runs, and counted once.

Names are those of `QueueStats`, in base units. A label has no more values than there are exported queues, states or
reasons.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from filao.engine import REASONS, Feature, QueueStats, State

QUEUES_MAX = 500  # queues that are exported, with some 20 series each: as many as a small Prometheus takes easily
_TOTALS = {
    "sent": "Messages stored.",
    "duplicates": "Sends that found their message already there.",
    "refused": "Sends that found the queue full.",
    "received": "Deliveries; a message delivered twice counts twice.",
    "acked": "Messages done.",
    "late": "Settles that came after the lease had ended, before anyone else took the message.",
    "nacked": "Failed attempts after which the message comes again, or dies.",
    "released": "Messages given back, the attempt unused.",
    "dropped": "Messages that outlived their ttl in a queue whose rule is to drop them.",
    "redriven": "Dead letters sent back to their queue.",
    "purged": "Messages deleted by a purge.",
    "cancelled": "Messages deleted one by one.",
}


class Figures(NamedTuple):
    """What was read of a store."""

    queues: Sequence[QueueStats]
    features: Collection[Feature]
    file: Path | None = None
    """The file of a SQLite store."""


class StoreCollector:
    """Reads a store at each scrape; `filao_store_up` shows whether it could be read."""

    def __init__(self, read: Callable[[], Figures], *, only: Sequence[str] = (), most: int = QUEUES_MAX) -> None:
        self._read = read
        self._only = only
        """Names or patterns of the queues to export; none: all."""
        self._most = most
        self._reading = Lock()

    def collect(self) -> Iterator[Metric]:
        """Yield the present metrics. Raises what reading the store raised, after `filao_store_up`."""
        up = GaugeMetricFamily("filao_store_up", "Whether the store could be read.")
        try:
            with self._reading:  # other scrapes wait meanwhile, so that a slow store is read once at a time
                figures = self._read()
        except Exception:
            up.add_metric([], 0)
            yield up
            raise
        up.add_metric([], 1)
        yield up
        yield from metrics(figures, only=self._only, most=self._most)


def exposition(collector: StoreCollector) -> tuple[bytes, Exception | None]:
    """Return metrics in Prometheus' text format, and the error after which no more came, if there was one."""
    collected: list[Metric] = []
    error: Exception | None = None
    try:
        for metric in collector.collect():
            collected.append(metric)  # noqa: PERF402  # what came before an error is kept
    except Exception as raised:
        error = raised
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(collected))
    return generate_latest(registry), error


class _Collected:
    """Metrics that were collected before."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def metrics(figures: Figures, *, only: Sequence[str] = (), most: int = QUEUES_MAX) -> Iterator[Metric]:
    """Yield the metrics of the chosen queues, the first `most` by name, and how many others are hidden."""
    chosen = [one for one in figures.queues if not only or any(fnmatchcase(one.name, pattern) for pattern in only)]
    queues = sorted(chosen, key=lambda one: one.name)[:most]  # RabbitMQ's come as they were declared
    hidden = GaugeMetricFamily("filao_queues_hidden", f"Queues beyond the first {most} by name, which are not shown.")
    hidden.add_metric([], len(chosen) - len(queues))
    yield hidden
    has_counters = Feature.COUNTERS in figures.features
    yield _messages(queues, tuple(State) if has_counters else (State.READY, State.DEAD))
    if has_counters:
        yield from _counted(queues)
    yield from _sizes(figures.file)


def _messages(queues: Sequence[QueueStats], states: Sequence[State]) -> Metric:
    messages = GaugeMetricFamily("filao_queue_messages", "Messages by state.", labels=["queue", "state"])
    for queue in queues:
        for state in states:
            messages.add_metric([queue.name, state.value], getattr(queue, state.value))
    return messages


def _counted(queues: Sequence[QueueStats]) -> Iterator[Metric]:
    ages = GaugeMetricFamily(
        "filao_queue_oldest_age_seconds",
        "Since the oldest message of a state was sent; of delayed ones, since the first was due. 0: there is none.",
        labels=["queue", "state"],
    )
    paused = GaugeMetricFamily("filao_queue_paused", "Whether nothing is delivered.", labels=["queue"])
    receivers = GaugeMetricFamily(
        "filao_queue_receivers", "Processes that wait for messages or hold some.", labels=["queue"]
    )
    lost = CounterMetricFamily("filao_leases_lost", "Leases that ended without a word.", labels=["queue"])
    died = CounterMetricFamily("filao_messages_died", "Messages that became dead letters.", labels=["queue", "reason"])
    for queue in queues:
        for state in State:
            ages.add_metric([queue.name, state.value], queue.oldest_age(state) or 0.0)
        paused.add_metric([queue.name], int(queue.paused))
        receivers.add_metric([queue.name], len(queue.receivers))
        lost.add_metric([queue.name], queue.lost)
        for reason in sorted({*REASONS, *queue.died_by_reason}):  # even 0, so that the first death is an increase
            died.add_metric([queue.name, reason], queue.died_by_reason.get(reason, 0))
    yield from (ages, paused, receivers, lost, died)
    for name, what in _TOTALS.items():
        total = CounterMetricFamily(f"filao_messages_{name}", what, labels=["queue"])
        for queue in queues:
            total.add_metric([queue.name], getattr(queue, name))
        yield total


def _sizes(file: Path | None) -> Iterator[Metric]:
    """Yield the sizes of a SQLite file and its WAL; a missing one has size 0."""
    if file is None:
        return
    sizes = GaugeMetricFamily("filao_store_bytes", "Bytes of the database and of its WAL.", labels=["part"])
    for part, path in (("database", file), ("wal", file.with_name(file.name + "-wal"))):
        sizes.add_metric([part], path.stat().st_size if path.exists() else 0)
    yield sizes
