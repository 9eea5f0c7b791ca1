"""From what a user sends to a `Draft`: every argument is checked and the body encoded before any I/O."""

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Generic, cast

import msgspec

from filao.checks import check_duration, check_key, check_own_id, check_priority
from filao.codec import codec_for, encode_headers, shown
from filao.engine import Draft
from filao.errors import ConfigurationError, MessageTooLarge
from filao.queue import Queue, T

SEND_MANY_MAX = 10_000  # messages that one atomic `send_many` takes: about 0.1 s of the write lock


class _Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The terms of a message, which `Outgoing` adds to its body."""

    headers: Mapping[str, str] | None = None
    """Texts by name, 64 at most."""
    delay: float = 0.0
    """Seconds before it can be received."""
    priority: int = 0
    """Higher goes first."""
    group: str | None = None
    """Messages of one group are handled one at a time, in order."""
    dedup_key: str | None = None
    """While it is remembered, another message with the same key is not stored."""
    ttl: float | None = None
    """Seconds after which the message expires; None: the queue's rule."""
    message_id: str | None = None
    """The message's id, remembered as a `dedup_key` is; None: the engine gives one."""


class Outgoing(_Terms, Generic[T], frozen=True):
    """A message to be sent, with terms of its own: `send_many` takes such values beside plain bodies.

        urgent = filao.Outgoing({"claim_id": 8}, priority=5, group="policy-12")
        await broker.send_many("claims", [{"claim_id": 7}, urgent])

    See `Broker.send_to_queue` for the terms.
    """

    body: T


_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping)


def listed(bodies: Iterable[Any]) -> list[Any]:
    """Return bodies as a list; refuse a text, bytes or a dict, which iterate over their parts."""
    if isinstance(bodies, _NO_LISTS) or not hasattr(bodies, "__iter__"):
        given = cast("object", bodies)
        raise ConfigurationError(f"send_many was given {shown(given)} for its bodies; give a list. Nothing was sent")
    return list(bodies)


def draft(queue: Queue[Any], outgoing: Outgoing[Any]) -> Draft:
    """Return the message, checked and encoded, or raise the error that names what is wrong."""
    return _draft(queue, outgoing.body, outgoing)


def drafts(queue: Queue[Any], bodies: Iterable[object], terms: Outgoing[None]) -> list[Draft]:
    """Return a message for each body, all with the same terms, except an `Outgoing`, which brings its own."""
    bodies = listed(bodies)
    if len(bodies) > SEND_MANY_MAX:
        raise ConfigurationError(
            f"queue {queue.name!r}: {len(bodies):,} messages in one send_many; at most {SEND_MANY_MAX:,} are stored as "
            f"one. Send them in slices."
        )
    return [_draft(queue, *_parts(body, terms)) for body in bodies]


def _parts(body: object, terms: Outgoing[Any]) -> tuple[object, Outgoing[Any]]:
    """Return a body and its terms, its own if it brings them."""
    is_own = isinstance(body, Outgoing)
    own = cast("Outgoing[Any]", body) if is_own else terms
    return (own.body if is_own else body), own


def _draft(queue: Queue[Any], body: object, terms: Outgoing[Any]) -> Draft:
    name = queue.name
    if terms.delay != 0.0:
        check_duration(f"queue {name!r}", "delay", terms.delay)
    if terms.priority != 0:
        check_priority(name, terms.priority)
    if terms.ttl is not None:
        check_duration(f"queue {name!r}", "ttl", terms.ttl, least=0.001)
    if terms.group is not None:
        check_key(name, "group", terms.group)
    if terms.dedup_key is not None:
        check_key(name, "dedup_key", terms.dedup_key)
    if terms.message_id is not None:
        check_key(name, "message_id", terms.message_id)
        check_own_id(name, terms.message_id)
    written = None if terms.headers is None else encode_headers(name, terms.headers)
    kind, content = codec_for(queue.body).encode(name, body)
    if len(content) > queue.body_max:
        raise too_large(name, len(content), queue.body_max)
    keys = (terms.group, terms.dedup_key, terms.ttl, terms.message_id)
    return Draft(kind, content, written, terms.delay, terms.priority, *keys)


async def larger(
    known: Queue[T], learn: Callable[[str], Awaitable[Queue[Any]]] | None, error: MessageTooLarge
) -> Queue[T]:
    """Return the rules for another try if the queue takes larger bodies by now; otherwise raise the error."""
    declared = None if learn is None else await learn(known.name)
    if declared is None or declared.body_max <= known.body_max:
        raise error
    return dataclasses.replace(known, body_max=declared.body_max)


def too_large(queue: str, size: int, most: int) -> MessageTooLarge:
    """Return the error for a body above its queue's limit."""
    return MessageTooLarge(
        f"queue {queue!r}: the body takes {size:,} bytes and the limit is {most:,}. Nothing was sent. Store the "
        "content elsewhere and send a reference to it, or declare the queue with a larger body_max."
    )
