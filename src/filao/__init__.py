"""Filao: a point-to-point message queue. Every message is durable, in order, and handled by exactly one consumer.

     send ─▶ READY ─receive─▶ LEASED ─ack──────────────────────────▶ gone
               ▲                │
               │                ├─ release ───────────▶ READY (its old place; the attempt is given back)
               │                ├─ crash, lease over ─▶ READY (its old place, at once; the attempt is used)
               │                ├─ nack ─▶ DELAYED (backoff) ─▶ READY (its old place)
            DELAYED ◀─ send(delay=…)
                                └─ reject, attempts spent, expired, malformed ─▶ DEAD ─redrive─▶ READY

    import filao

    async with filao.connect("claims.db") as broker:
        await broker.declare(filao.Queue("claims.processing"))
        await broker.send_to_queue("claims.processing", {"claim_id": 7})
        message = await broker.receive_from_queue("claims.processing")
        await message.ack()

`filao.sync` is the blocking twin; `filao.Worker` runs handlers.
"""

from filao.broker import Broker, connect
from filao.draft import Outgoing
from filao.engine import Event, Failure, Feature, Finding, QueueStats, Receipt, Receiver, State, StoredMessage
from filao.engines import Durability
from filao.errors import (
    ConfigurationError,
    EngineError,
    EngineUnavailable,
    FilaoError,
    LeaseLost,
    MessageError,
    MessageNotEncodable,
    MessageTooLarge,
    QueueFull,
    QueueNotFound,
    UnsupportedFeature,
)
from filao.message import Guarantee, Message, Transaction
from filao.observing import Observer, Observers, Operated, Tracer
from filao.outbox import Inbox, Outbox
from filao.queue import Backoff, Queue
from filao.relay import Relay
from filao.worker import Handled, Outcomes, Reject, Release, Retry, Status, Worker, WorkerGuarantee

__version__ = "0.1.0"

__all__ = [
    "Backoff",
    "Broker",
    "ConfigurationError",
    "Durability",
    "EngineError",
    "EngineUnavailable",
    "Event",
    "Failure",
    "Feature",
    "FilaoError",
    "Finding",
    "Guarantee",
    "Handled",
    "Inbox",
    "LeaseLost",
    "Message",
    "MessageError",
    "MessageNotEncodable",
    "MessageTooLarge",
    "Observer",
    "Observers",
    "Operated",
    "Outbox",
    "Outcomes",
    "Outgoing",
    "Queue",
    "QueueFull",
    "QueueNotFound",
    "QueueStats",
    "Receipt",
    "Receiver",
    "Reject",
    "Relay",
    "Release",
    "Retry",
    "State",
    "Status",
    "StoredMessage",
    "Tracer",
    "Transaction",
    "UnsupportedFeature",
    "Worker",
    "WorkerGuarantee",
    "__version__",
    "connect",
]
