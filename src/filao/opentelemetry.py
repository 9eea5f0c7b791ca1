"""Traces and metrics for OpenTelemetry, by its conventions for messaging, from the seam of `observing.py`.

It needs `opentelemetry-api`, from the extra `opentelemetry`; the program's own SDK decides where spans and measures go.
A message carries the context of its send in its headers, as `traceparent` and `tracestate` of W3C's Trace Context.
(https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)

Invariant: a span covers one operation or one run of a handler. A wait has none, and neither has a look that found
nothing, so no span is as long as a loop.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Literal

import msgspec

from filao.codec import decode_headers
from filao.engine import Ack, Delivery, Draft, Nack, Reject, Release, Result, Send, Settle
from filao.errors import FilaoError
from filao.extras import Extra
from filao.observing import Ended

with Extra("filao[opentelemetry]", of="filao.opentelemetry"):
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context, attach
    from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
LINKS_MAX = 128  # links of one span: as many as an SDK keeps unless it is told otherwise
TRACESTATE_MAX = 512  # characters: W3C asks to carry at least so many; a longer one is left out
SENDERS_KEPT_MAX = 1_024  # contexts of messages that are being worked on: 434 KiB, or 8 MiB if all have many headers
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)  # seconds, by convention
_FAILED = frozenset({"retried", "dead", "failed", "lost"})
"""The values of `Handled.how` of a run that did not do its work."""
_OUTCOMES = {Ack: "acked", Nack: "nacked", Reject: "rejected", Release: "released"}

Attributes = dict[str, str | int]
Type = Literal["send", "receive", "process", "settle"]
_PLAIN = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")  # a traceparent of W3C's version 00
_propagator = TraceContextTextMapPropagator()


class OpenTelemetry:
    """A tracer for `broker.observers.add` and `worker.observers.append`; see `filao.Tracer`.

    Without providers it uses the program's global ones. It may watch any number of brokers and workers.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("filao", tracer_provider=tracer_provider, schema_url=SCHEMA_URL)
        meter = metrics.get_meter("filao", meter_provider=meter_provider, schema_url=SCHEMA_URL)
        self._operated = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "How long a send, a receive or a settle took.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._processed = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long a handler took, its settle included.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Messages that a program asked to send."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Messages that were delivered to a program."
        )
        self._running: dict[int, tuple[Span, Attributes]] = {}
        """The spans of handlers, by the identities of their deliveries, which live as long."""

    # --- send and settle ---------------------------------------------------------------------------------------------

    def asked(self, engine: str, operation: Send | Settle) -> tuple[Send | Settle, Ended]:
        """Begin the span of a send, whose context travels with its messages, or of a settle."""
        return self._send(engine, operation) if isinstance(operation, Send) else self._settle(engine, operation)

    def _send(self, engine: str, send: Send) -> tuple[Send, Ended]:
        """Begin a span; a message that brings a context of its own keeps it, and is linked to."""
        number = len(send.drafts)
        attributes = _attributes(engine, "send", send.queue)
        several: Attributes = {"messaging.batch.message_count": number}
        own = [context for draft in send.drafts[:LINKS_MAX] if (context := _sender(draft.headers)) is not None]
        span = self._tracer.start_span(
            f"send {send.queue}",
            kind=SpanKind.PRODUCER,
            attributes=attributes if number == 1 else attributes | several,
            links=[Link(one) for one in own],
        )
        carried = _carried(span)
        written = msgspec.json.encode(carried).decode()
        drafts = [_with_headers(draft, carried, written) for draft in send.drafts] if carried else send.drafts
        began = time.perf_counter()

        def ended(result: Result | BaseException) -> None:
            if number == 1 and isinstance(result, list):
                span.set_attribute("messaging.message.id", result[0].id)
            self._sent.add(number, self._end(span, attributes, began, result))

        return Send(send.queue, drafts), ended

    def _settle(self, engine: str, settle: Settle) -> tuple[Settle, Ended]:
        """Begin a span within that of the handler, if one runs, and else where the caller is."""
        delivery = settle.delivery
        running = self._running.get(id(delivery))
        attributes = _attributes(engine, "settle", delivery.queue)
        span = self._tracer.start_span(
            f"settle {delivery.queue}",
            context=None if running is None else trace.set_span_in_context(running[0], Context()),
            kind=SpanKind.CLIENT,
            attributes={**attributes, **_about(delivery), "filao.outcome": _OUTCOMES[type(settle.outcome)]},
            links=_links([delivery]),
        )
        began = time.perf_counter()

        def ended(result: Result | BaseException) -> None:
            self._end(span, attributes, began, result)

        return settle, ended

    def _end(self, span: Span, attributes: Attributes, began: float, result: Result | BaseException) -> Attributes:
        """End a span and measure what it took; return what measures are told of it."""
        took = time.perf_counter() - began
        if isinstance(result, BaseException):
            kind = type(result).__qualname__
            attributes = attributes | {"error.type": kind}
            _fail(span, kind, str(result))
        self._operated.record(took, attributes)
        span.end()
        return attributes

    # --- receive -----------------------------------------------------------------------------------------------------

    def received(self, engine: str, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Record the span of a look that found messages, with links to the spans that sent them."""
        queue = deliveries[0].queue
        attributes = _attributes(engine, "receive", queue)
        several: Attributes = {"messaging.batch.message_count": len(deliveries)}
        about = several if len(deliveries) > 1 else _about(deliveries[0])
        now = time.time_ns()
        span = self._tracer.start_span(
            f"receive {queue}",
            kind=SpanKind.CLIENT,
            attributes=attributes | about,
            links=_links(deliveries),
            start_time=now - round(seconds * 1e9),
        )
        span.end(now)
        self._operated.record(seconds, attributes)
        self._consumed.add(len(deliveries), attributes)

    # --- process -----------------------------------------------------------------------------------------------------

    def handling(self, engine: str, delivery: Delivery) -> None:
        """Begin the span of a handler, a trace of its own that is linked to the message's sender."""
        attributes = _attributes(engine, "process", delivery.queue)
        span = self._tracer.start_span(
            f"process {delivery.queue}",
            context=Context(),
            kind=SpanKind.CONSUMER,
            attributes=attributes | _about(delivery),
            links=_links([delivery]),
        )
        attach(trace.set_span_in_context(span))  # the handler's context ends with it: nothing needs to be taken back
        self._running[id(delivery)] = span, attributes

    def handled(self, delivery: Delivery, how: str, seconds: float, error: str) -> None:
        """End the span of a handler."""
        if id(delivery) not in self._running:
            return  # the run began before this tracer was added
        span, attributes = self._running.pop(id(delivery))
        span.set_attribute("filao.outcome", how)
        if how in _FAILED or error:
            kind = error or how
            _fail(span, kind, how)
            attributes = attributes | {"error.type": kind}
        span.end()
        self._processed.record(seconds, attributes)


def carrier(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return headers with the context of the running code, for a message that is sent later: `Outbox.send`, say."""
    carried = dict(headers or {})
    return carried if "traceparent" in carried else carried | _carried(trace.get_current_span())


def _attributes(engine: str, verb: Type, queue: str) -> Attributes:
    """Return what spans and measures of an operation have in common."""
    attributes: Attributes = {
        "messaging.system": "filao",
        "messaging.operation.name": verb,
        "messaging.operation.type": verb,
        "messaging.destination.name": queue,
    }
    if engine == "RabbitMQ":
        attributes |= {"messaging.system": "rabbitmq", "messaging.rabbitmq.destination.routing_key": queue}
    return attributes


def _about(delivery: Delivery) -> Attributes:
    """Return the attributes of a span about one message."""
    return {"messaging.message.id": delivery.id, "filao.message.attempt": delivery.attempt}


def _fail(span: Span, kind: str, why: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, why))


# --- the context that travels ----------------------------------------------------------------------------------------


def _carried(span: Span) -> dict[str, str]:
    """Return the headers that carry a span's context; none when there is no span, as without an SDK.

    As the propagator writes them, which would have the span put into a context to take it out again.
    """
    context = span.get_span_context()
    if not context.is_valid:
        return {}
    headers = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    state = context.trace_state
    if state and len(written := state.to_header()) <= TRACESTATE_MAX:
        headers["tracestate"] = written
    return headers


def _with_headers(draft: Draft, carried: Mapping[str, str], written: str) -> Draft:
    """Return a message with more headers (`written`: as JSON); its sender's own headers stay as they are."""
    own = decode_headers(draft.headers)
    if "traceparent" in own:
        return draft
    headers = msgspec.json.encode({**carried, **own}).decode() if own else written
    return msgspec.structs.replace(draft, headers=headers)


def _links(deliveries: Sequence[Delivery]) -> list[Link]:
    senders = [_sender(delivery.headers) for delivery in deliveries[:LINKS_MAX]]
    return [Link(sender) for sender in senders if sender is not None]


def _sender(headers: str | None) -> SpanContext | None:
    """Return the context that a message carries, if it carries a valid one."""
    return None if headers is None or '"traceparent"' not in headers else _context(headers)


@lru_cache(maxsize=SENDERS_KEPT_MAX)
def _context(headers: str) -> SpanContext | None:
    """Return what `_sender` does; kept, for it is asked when a message is received, handled and settled.

    The propagator reads what is not plain: it takes thrice as long.
    """
    with suppress(FilaoError):
        carried = decode_headers(headers)
        plain = _PLAIN.fullmatch(carried.get("traceparent", ""))
        if plain is None or "tracestate" in carried:
            context = trace.get_current_span(_propagator.extract(carried)).get_span_context()
        else:
            trace_id, span_id, flags = (int(part, 16) for part in plain.groups())
            context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
        return context if context.is_valid else None
    return None
