"""What RabbitMQ cannot do: it is refused by name, and never imitated unless the queue asked for that. Pure."""

from typing import Any

from filao.engine import Draft
from filao.engines.rabbitmq.topology import DEAD, DELAY_MAX
from filao.errors import ConfigurationError, UnsupportedFeature
from filao.queue import Backoff, Queue

_RESERVED = ("filao.", "amq.")
_DEFAULT: Queue[Any] = Queue("default")
_RULES = {
    "lease": "leases that end by time: a lease lasts as long as its connection",
    "on_expiry": "way to drop what expired: it becomes a dead letter",
    "dedup_window": "deduplication",
    "max_length": "exact limit to a queue's length",
    "overflow": "exact limit to a queue's length",
    "group_failure": "groups",
    "group_dead": "groups",
    "history": "history of its messages",
}
_TERMS = {"group": "groups", "dedup_key": "deduplication", "priority": "priorities on quorum queues"}
_OPT_IN = (
    "delays, but what resembles them: messages wait in a ladder of queues, to a tenth of a second and more, come back "
    'behind all others, and may double in a crash. Where that will do, declare the queue with emulate=("delay",), in a '
    "shell --emulate delay"
)


def refused(queue: str, what: str, lacks: str) -> UnsupportedFeature:
    """Return the error for something that RabbitMQ `lacks`."""
    return UnsupportedFeature(
        f"queue {queue!r}: {what}: RabbitMQ has no {lacks}. Engines that can: SQLite, PostgreSQL."
    )


def check_rules(queue: Queue[Any]) -> None:
    """Raise `UnsupportedFeature` or `ConfigurationError` for a queue that cannot be declared here."""
    if queue.name.endswith(DEAD) or queue.name.startswith(_RESERVED):
        raise ConfigurationError(
            f"queue name {queue.name!r}: on RabbitMQ, names that end in {DEAD!r} or begin with "
            f"{' or '.join(_RESERVED)} are taken for other things. Choose another"
        )
    for rule, lacks in _RULES.items():
        value = getattr(queue, rule)
        if value != getattr(_DEFAULT, rule):
            raise refused(queue.name, f"{rule}={value!r}", lacks)
    if queue.backoff.first > 0 and not has_delay(queue):
        shown = "the default backoff" if queue.backoff == Backoff() else f"backoff={queue.backoff!r}"
        raise refused(queue.name, shown, f"{_OPT_IN}, or with backoff=Backoff(first=0)")


def check_draft(queue: Queue[Any], draft: Draft) -> None:
    """Raise `UnsupportedFeature` for a message that cannot be sent here."""
    for term, lacks in _TERMS.items():
        if getattr(draft, term):
            raise refused(queue.name, f"{term}={getattr(draft, term)!r}", lacks)
    check_delay(queue, draft.delay)


def check_delay(queue: Queue[Any], delay: float) -> None:
    """Raise `UnsupportedFeature` for a delay that the queue did not ask for, or that is longer than the ladder."""
    if delay > 0 and not has_delay(queue):
        raise refused(queue.name, f"delay={delay:g}", _OPT_IN)
    if delay > DELAY_MAX:
        raise UnsupportedFeature(
            f"queue {queue.name!r}: delay is {delay:g}; RabbitMQ can be made to wait for up to {DELAY_MAX:,.0f} seconds"
        )


def has_delay(queue: Queue[Any]) -> bool:
    """Return whether the queue asked for delays to be imitated."""
    return "delay" in queue.emulate
