"""Metrics of a worker's process: how long handlers take, how long messages waited, how busy it is."""

import time
from functools import lru_cache
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from filao.engine import Delivery
from filao.observing import Operated

_HANDLED = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # seconds
_WAITED = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 6 * 3600)
LABELS_MAX = 1_024  # sets of labels whose series are cached: a worker's queues and their outcomes
_OPERATED = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30)

M = TypeVar("M", bound=MetricWrapperBase)


def _labelled(metric: M, *labels: str) -> M:
    return metric.labels(*labels)


class WorkerMetrics:
    """An observer that measures. Its labels are the worker's own queues, outcomes and verbs, which are few."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._handled = Histogram(
            *("filao_handler_seconds", "Time that handlers took.", ["queue", "outcome"]),
            buckets=_HANDLED,
            registry=registry,
        )
        self._waited = Histogram(
            *(
                "filao_message_wait_seconds",
                "From the sending of a message to the beginning of its handler.",
                ["queue"],
            ),
            buckets=_WAITED,
            registry=registry,
        )
        self._busy = Gauge("filao_worker_busy_slots", "Handlers that run.", ["queue"], registry=registry)
        self._operated = Histogram(
            *("filao_operation_seconds", "Time that batches of operations took.", ["verb"]),
            buckets=_OPERATED,
            registry=registry,
        )
        self._messages = Counter("filao_operation_messages", "Messages in them.", ["verb"], registry=registry)
        self._errors = Counter(
            "filao_operation_errors", "Operations that failed.", ["verb", "error"], registry=registry
        )
        # `labels` would check its arguments for every message, so what it returns is cached.
        self._labelled = lru_cache(LABELS_MAX)(_labelled)

    def operated(self, done: Operated) -> None:
        """Measure operations."""
        self._labelled(self._operated, done.verb).observe(done.seconds)
        self._labelled(self._messages, done.verb).inc(done.messages)
        if done.error:
            self._errors.labels(done.verb, done.error).inc(done.operations)

    def began(self, delivery: Delivery) -> None:
        """Measure how long a message has waited."""
        self._labelled(self._busy, delivery.queue).inc()
        self._labelled(self._waited, delivery.queue).observe(max(0.0, time.time() - delivery.sent_at / 1000))

    def ended(self, delivery: Delivery, how: str, seconds: float) -> None:
        """Measure how long its handler took."""
        self._labelled(self._busy, delivery.queue).dec()
        self._labelled(self._handled, delivery.queue, how).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format. May be called from any thread."""
        return generate_latest(self._registry)
