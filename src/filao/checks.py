"""A caller's arguments, checked once, where they enter; everything inside trusts them.

Every check raises an error that names the queue, the value and what would be right. All are pure.
"""

import re
import time
from collections.abc import Callable, Iterable

from filao.codec import shown
from filao.errors import ConfigurationError, MessageError

NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
DURATION_MAX = 10 * 365 * 86_400.0  # seconds; for delays, time to live and windows
RECEIVE_MANY_MAX = 10_000  # messages that one `receive_many` returns
PEEK_MAX = 10_000  # messages that one look returns
PRIORITY_MAX = 1_000_000  # either side of 0
KEY_MAX = 256  # characters of a group, a dedup_key or a message_id
GIVEN_ID = re.compile(r"[0-9a-f]{16}-[0-9]+")  # the ids that SQL engines give: a random salt and the message's number
_NUMBER = (int, float)  # a tuple: a union in the call would be built anew for every check


def check_name(name: object) -> None:
    """Raise `ConfigurationError` unless `name` may name a queue."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigurationError(f"queue name {shown(name)}: a name is 1 to 128 characters of A-Z a-z 0-9 . _ -")


def is_system_clock(clock: Callable[[], float], system: Callable[[], float] = time.time) -> bool:
    """Return whether a clock is the machine's own, which is the default, rather than a test's.

    A library that freezes time replaces `time.time`, but not the default of a parameter.
    """
    return clock is system


def check_duration(owner: str, what: str, value: object, *, least: float = 0.0, most: float = DURATION_MAX) -> None:
    """Raise `ConfigurationError` unless `value` is a number of seconds from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not least <= value <= most:
        raise ConfigurationError(
            f"{owner}: {what} is {shown(value)}; it must be a number of seconds from {least:.10g} to {most:.10g}"
        )


def check_number(owner: str, what: str, value: object, *, least: float, most: float) -> None:
    """Raise `ConfigurationError` unless `value` is a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, _NUMBER) or not least <= value <= most:
        raise ConfigurationError(
            f"{owner}: {what} is {shown(value)}; it must be a number from {least:.10g} to {most:.10g}"
        )


def check_count(owner: str, what: str, value: object, *, most: int) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigurationError(f"{owner}: {what} is {shown(value)}; it must be a whole number from 1 to {most}")


def check_limit(queue: str, limit: object, most: int) -> None:
    """Raise `ConfigurationError` unless `limit` is a number of messages from 1 to `most`."""
    if type(limit) is not int or not 1 <= limit <= most:  # before the text of an error is built
        check_count(f"queue {queue!r}", "limit", limit, most=most)


def check_priority(queue: str, priority: object) -> None:
    """Raise `ConfigurationError` unless `priority` is a whole number within its limits."""
    whole = isinstance(priority, int) and not isinstance(priority, bool)
    if not whole or not -PRIORITY_MAX <= priority <= PRIORITY_MAX:  # type: ignore[operator]  # it is an int
        raise ConfigurationError(
            f"queue {queue!r}: priority is {shown(priority)}; it must be a whole number from {-PRIORITY_MAX} to "
            f"{PRIORITY_MAX}"
        )


def check_key(queue: str, what: str, key: object) -> None:
    """Raise `ConfigurationError` unless `key` is a text that can be a group, a dedup_key or a message_id."""
    if not isinstance(key, str) or not 0 < len(key) <= KEY_MAX or not is_text(key):
        raise ConfigurationError(
            f"queue {queue!r}: {what} is {shown(key)}; it must be a text of 1 to {KEY_MAX} characters"
        )


def check_own_id(queue: str, message_id: str) -> None:
    """Refuse an id of the shape that engines give: a sender that chose one could claim another message's."""
    if GIVEN_ID.fullmatch(message_id):
        raise MessageError(
            f"queue {queue!r}: message_id {message_id!r} has the shape of the ids that Filao gives, 16 hexadecimal "
            f"digits and a number; put something before it, such as 'copy-{message_id}'. Nothing was sent."
        )


def check_ids(queue: str, ids: Iterable[str]) -> list[str]:
    """Return the ids, each once, that a message can have; a lone string is refused, although it is iterable.

    The empty id is left out: no message has it, but on RabbitMQ it would match all that strangers sent without an id.
    """
    if isinstance(ids, str):
        raise ConfigurationError(
            f"queue {queue!r}: ids is the string {shown(ids)}; give a list, such as [{shown(ids)}]"
        )
    if not isinstance(ids, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise ConfigurationError(f"queue {queue!r}: ids is {shown(ids)}; give a list of ids")
    found = list(ids)
    for one in found:
        if not isinstance(one, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(f"queue {queue!r}: {shown(one)} is no id: an id is a text")
    return [one for one in dict.fromkeys(found) if one and is_text(one)]


def is_text(key: object) -> bool:
    """Return whether a key is a text that can be stored: it holds no half of a surrogate pair, and no NUL."""
    if not isinstance(key, str):
        return False
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in key
