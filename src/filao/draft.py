"""From what a user sends to a `Draft`: every argument is checked and the body encoded before any I/O."""

import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from filao.codec import codec_for, encode_headers, shown
from filao.engine import Draft, State
from filao.errors import ConfigurationError, MessageError, MessageTooLarge
from filao.queue import Queue, check_duration

R = TypeVar("R")
SEND_MANY_MAX = 10_000  # messages that one atomic `send_many` takes: about 0.1 s of the write lock
RECEIVE_MANY_MAX = 10_000  # messages that one `receive_many` returns
PEEK_MAX = 10_000  # messages that one look returns
PRIORITY_MAX = 1_000_000  # either side of 0
KEY_MAX = 256  # characters of a group, a dedup_key or a message_id
GIVEN_ID = re.compile(r"[0-9a-f]{16}-[0-9]+")  # the ids that SQL engines give: a random salt and the message's number


def draft(
    queue: Queue[Any],
    body: object,
    *,
    headers: Mapping[str, str] | None = None,
    delay: float = 0.0,
    priority: int = 0,
    group: str | None = None,
    dedup_key: str | None = None,
    ttl: float | None = None,
    message_id: str | None = None,
) -> Draft:
    """Return the message that these arguments describe, or raise the error that names the wrong one."""
    name = queue.name
    if delay != 0.0:
        check_duration(f"queue {name!r}", "delay", delay)
    if priority != 0:
        _check_priority(name, priority)
    if ttl is not None:
        check_duration(f"queue {name!r}", "ttl", ttl, least=0.001)
    if group is not None:
        _check_key(name, "group", group)
    if dedup_key is not None:
        _check_key(name, "dedup_key", dedup_key)
    if message_id is not None:
        _check_key(name, "message_id", message_id)
        _check_own_id(name, message_id)
    written = None if headers is None else encode_headers(name, headers)
    kind, content = codec_for(queue.body).encode(name, body)
    if len(content) > queue.body_max:
        raise too_large(name, len(content), queue.body_max)
    return Draft(kind, content, written, delay, priority, group, dedup_key, ttl, message_id)


def drafts(
    queue: Queue[Any],
    bodies: Iterable[object],
    *,
    headers: Mapping[str, str] | None,
    delay: float,
    priority: int,
    group: str | None,
    ttl: float | None,
) -> list[Draft]:
    """Return a message for each body; all go with the same terms."""
    bodies = list(bodies)
    if len(bodies) > SEND_MANY_MAX:
        raise ConfigurationError(
            f"queue {queue.name!r}: {len(bodies):,} messages in one send_many; at most {SEND_MANY_MAX:,} are stored as "
            f"one. Send them in slices."
        )
    return [
        draft(queue, body, headers=headers, delay=delay, priority=priority, group=group, ttl=ttl) for body in bodies
    ]


async def by_rules(
    known: Queue[Any], learn: Callable[[str], Awaitable[Queue[Any]]] | None, make: Callable[[Queue[Any]], R]
) -> R:
    """Return what `make` drafts by the rules that are known; or, when it is too large, by those that are declared by now."""
    try:
        return make(known)
    except MessageTooLarge:
        declared = None if learn is None else await learn(known.name)
        if declared is None or declared.body_max <= known.body_max:
            raise
        return make(dataclasses.replace(known, body_max=declared.body_max))


def too_large(queue: str, size: int, most: int) -> MessageTooLarge:
    """Return the error for a body above its queue's limit."""
    return MessageTooLarge(
        f"queue {queue!r}: the body takes {size:,} bytes and the limit is {most:,}. Nothing was sent. Store the content "
        f"elsewhere and send a reference to it, or declare the queue with a larger body_max."
    )


def check_limit(queue: str, limit: object, most: int) -> None:
    """Raise `ConfigurationError` unless `limit` is a number of messages from 1 to `most`."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= most:
        raise ConfigurationError(
            f"queue {queue!r}: limit is {shown(limit)}; it must be a whole number from 1 to {most}"
        )


def check_state(state: State | str) -> State:
    """Return the state, or raise `ConfigurationError` when there is none of that name."""
    try:
        return State(state)
    except ValueError:
        raise ConfigurationError(f"state is {state!r}; it must be one of {', '.join(State)}") from None


def check_ids(queue: str, ids: Iterable[str]) -> list[str]:
    """Return the ids, each once; a lone string, which is an iterable of characters, is a mistake."""
    if isinstance(ids, str):
        raise ConfigurationError(
            f"queue {queue!r}: ids is the string {shown(ids)}; give a list, such as [{shown(ids)}]"
        )
    return list(dict.fromkeys(ids))


def _check_priority(queue: str, priority: object) -> None:
    whole = isinstance(priority, int) and not isinstance(priority, bool)
    if not whole or not -PRIORITY_MAX <= priority <= PRIORITY_MAX:  # type: ignore[operator]  # whole says that it is an int
        raise ConfigurationError(
            f"queue {queue!r}: priority is {shown(priority)}; it must be a whole number from {-PRIORITY_MAX} to {PRIORITY_MAX}"
        )


def _check_key(queue: str, what: str, key: object) -> None:
    if not isinstance(key, str) or not 0 < len(key) <= KEY_MAX or not _is_text(key):
        raise ConfigurationError(
            f"queue {queue!r}: {what} is {shown(key)}; it must be a text of 1 to {KEY_MAX} characters"
        )


def _check_own_id(queue: str, message_id: str) -> None:
    """Refuse an id of the shape that engines give: whoever could choose one could claim what is another's."""
    if GIVEN_ID.fullmatch(message_id):
        raise MessageError(
            f"queue {queue!r}: message_id {message_id!r} has the shape of the ids that Filao gives, 16 hexadecimal digits "
            f"and a number; put something before it, such as 'copy-{message_id}'. Nothing was sent."
        )


def _is_text(key: str) -> bool:
    """Return whether UTF-8 can hold it: half a surrogate pair cannot be stored; a NUL would end it early in SQL."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in key
