"""How a message looks on RabbitMQ, so that programs without Filao can send and read it. Pure.

The body is JSON or bytes, as its content type says. The id, the time and the user's headers are where AMQP has them.
What only Filao needs is in headers that begin with `x-filao-`.
"""

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import msgspec
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from filao.checks import KEY_MAX
from filao.codec import BYTES, JSON, decode_headers, seen_body
from filao.engine import INSTANT_MAX, REASONS, Delivery, Draft, Failure, State, StoredMessage, instant
from filao.engines.rabbitmq.topology import dead_name
from filao.engines.rabbitmq.wire import NAME_MAX, SHORT_MAX, carried, text
from filao.errors import MessageNotEncodable, MessageTooLarge
from filao.moving import Parcel

Properties = Basic.Properties

ATTEMPT = "x-filao-attempt"
"""How many attempts a message had used when it was published again, to be delayed."""
EXPIRES_AT = "x-filao-expires-at"
"""Milliseconds since 1970; for messages on the ladder, where AMQP's own expiration would mean another time."""
SENT_AT = "x-filao-sent-at"
"""Milliseconds since 1970; AMQP's timestamp has whole seconds."""
ID = "x-filao-id"
"""An id that is longer than AMQP's."""
REASON, ERROR, DIED_AT, SPENT = "x-filao-reason", "x-filao-error", "x-filao-died-at", "x-filao-attempts"

_RETURNS = "x-delivery-count"  # by which the server counts a message's returns to a quorum queue
_SERVERS = ("x-death", "x-first-death-", "x-last-death-", _RETURNS, "x-acquired-count", "x-stream-offset")
_COPIES = frozenset({"CC", "BCC"})  # name other queues to which the server delivers each message that is published
_OTHERS = (*_SERVERS, "x-filao-")
_TYPES = {JSON: "application/json", BYTES: "application/octet-stream"}
_REASONS = {"expired": "expired", "rejected": "rejected", "delivery_limit": "max_attempts", "maxlen": "overflow"}


def now() -> int:
    """Return the milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def written(queue: str, draft: Draft, name: str, ttl: float | None, moment: int) -> Properties:
    """Return the properties with which a message is published. Raises `MessageTooLarge` for what AMQP cannot hold."""
    headers: dict[str, Any] = check_headers(queue, draft)
    headers[SENT_AT] = moment
    expiration = None
    if ttl is not None and draft.delay > 0:
        headers[EXPIRES_AT] = moment + round(ttl * 1000)
    elif ttl is not None:
        expiration = str(round(ttl * 1000))
    message_id: str | None = name
    if len(name.encode()) > SHORT_MAX:
        headers[ID], message_id = name, None
    return Properties(
        content_type=_TYPES[draft.kind],
        delivery_mode=2,
        message_id=message_id,
        timestamp=instant(moment),
        expiration=expiration,
        headers=headers,
    )


def check_headers(queue: str, draft: Draft) -> dict[str, Any]:
    """Return a draft's headers. Raises `MessageError` for one that cannot be sent here."""
    headers = dict(decode_headers(draft.headers))
    for header in headers:
        _check_header(queue, header)
    return headers


def _check_header(queue: str, header: str) -> None:
    if header.startswith(_OTHERS) or header in _COPIES:
        raise MessageNotEncodable(
            f"queue {queue!r}: header {header!r}: RabbitMQ or Filao acts upon headers of this name. Nothing was sent. "
            f"Choose another name."
        )
    if len(header.encode()) > NAME_MAX:
        raise MessageTooLarge(
            f"queue {queue!r}: the name of header {header[:40]!r}… takes more than {NAME_MAX} bytes, which AMQP "
            f"cannot carry. Nothing was sent."
        )


def read(queue: str, message: DeliveredMessage, token: int, unnamed: Callable[[], str]) -> Delivery:
    """Return a received message as a delivery; `unnamed` makes the id of one that has none."""
    properties = message.header.properties
    headers = properties.headers or {}
    users = {name: text(value) for name, value in headers.items() if not name.startswith(_OTHERS)}
    return Delivery(
        queue=queue,
        id=name_of(properties) or unnamed(),
        handle=message.delivery_tag or 0,
        token=token,
        attempt=attempts(properties) + 1,
        priority=0,
        group=None,
        dedup_key=None,
        message_id=None,
        headers=msgspec.json.encode(users).decode() if users else None,
        kind=_kind(properties, message.body),
        content=message.body,
        sent_at=_sent_at(properties),
        failures=0,
    )


def attempts(properties: Properties) -> int:
    """Return how many attempts a message has used: before it was last published, and by its returns since."""
    headers = properties.headers or {}
    return _number(headers.get(ATTEMPT)) + _number(headers.get(_RETURNS))


def is_expired(properties: Properties, moment: int) -> bool:
    """Return whether a message outlived its time while it waited on the ladder; the server ends all others."""
    expires_at = _number((properties.headers or {}).get(EXPIRES_AT))
    return 0 < expires_at <= moment


def expires_at(properties: Properties) -> int | None:
    """Return when a message expires; None if it does not say."""
    late = _number((properties.headers or {}).get(EXPIRES_AT))
    if not late and properties.expiration:
        late = _sent_at(properties) + _number(properties.expiration)
    return late or None


def again(properties: Properties, used: int) -> Properties:
    """Return the properties with which a message is published to come back later, with `used` attempts."""
    headers = _cleaned(properties)
    headers[ATTEMPT] = used
    late = expires_at(properties)
    if late:
        headers[EXPIRES_AT] = late
    return _copy(properties, headers)


def dead(properties: Properties, used: int, reason: str, error: str, moment: int) -> Properties:
    """Return the properties with which a message is published as a dead letter."""
    headers = _cleaned(properties)
    headers |= {REASON: reason, ERROR: error, DIED_AT: moment, SPENT: used}
    return _copy(properties, headers)


def redriven(properties: Properties, edited: Draft | None) -> Properties:
    """Return the properties with which a dead letter is published to be ready again."""
    headers = _cleaned(properties)
    for name in (REASON, ERROR, DIED_AT, SPENT, ATTEMPT, EXPIRES_AT):
        headers.pop(name, None)
    if edited is not None and edited.headers is not None:
        headers = {name: value for name, value in headers.items() if name.startswith("x-filao-")}
        headers |= decode_headers(edited.headers)
    copy = _copy(properties, headers)
    if edited is not None:
        copy.content_type = _TYPES[edited.kind]
    return copy


def stored(queue: str, message: DeliveredMessage) -> StoredMessage:
    """Return a dead letter as operators see it."""
    properties = message.header.properties
    headers = properties.headers or {}
    delivery = read(queue, message, 0, str)
    reason, died_at = text(headers.get(REASON, "")), instant(_number(headers.get(DIED_AT)))
    if reason not in REASONS:  # none of ours: a stranger may write any
        reason, died_at = _servers_record(headers.get("x-death"))
    spent = _number(headers.get(SPENT)) or _number(headers.get(ATTEMPT))
    error = text(headers.get(ERROR, ""))
    failed = Failure(spent, died_at, "nacked" if reason == "max_attempts" else reason, error, consumer="")
    return StoredMessage(
        id=delivery.id,
        queue=queue,
        state=State.DEAD,
        body=seen_body(delivery.kind, delivery.content),
        headers=decode_headers(delivery.headers),
        attempts=spent,
        priority=0,
        group=None,
        dedup_key=None,
        sent_at=instant(delivery.sent_at),
        at=died_at,
        expires_at=None,
        reason=reason,
        history=(failed,) if error else (),
    )


def _servers_record(deaths: object) -> tuple[str, datetime]:
    """Return why and when a message died last, by the server's record, which another program may have forged."""
    latest = cast("list[object]", deaths)[0] if isinstance(deaths, list) and deaths else None
    record = cast("dict[str, object]", latest) if isinstance(latest, dict) else {}
    reason, died_at = record.get("reason"), record.get("time")
    return (
        _REASONS.get(reason, "rejected") if isinstance(reason, str) else "rejected",
        died_at if isinstance(died_at, datetime) else instant(0),
    )


def of_parcel(queue: str, parcel: Parcel) -> tuple[str, Properties]:
    """Return the queue to which a message from another engine is published, and its properties."""
    properties = written(queue, parcel.draft, parcel.id, parcel.draft.ttl, now())
    properties.headers = dict(properties.headers or {}) | {SENT_AT: parcel.sent_at}
    if parcel.attempts:
        properties.headers[ATTEMPT] = parcel.attempts
    if parcel.reason is None:
        return queue, properties
    error = parcel.history[-1].error if parcel.history else ""
    return dead_name(queue), dead(properties, parcel.attempts, parcel.reason, error, parcel.died_at)


def name_of(properties: Properties) -> str:
    """Return a message's id, empty when a foreign producer gave none."""
    name = text((properties.headers or {}).get(ID, "")) or str(properties.message_id or "")
    if len(name) <= KEY_MAX and "\0" not in name:
        return name
    return f"sha256-{hashlib.sha256(name.encode()).hexdigest()}"  # no other engine and no inbox could hold it whole


def _sent_at(properties: Properties) -> int:
    sent_at = _number((properties.headers or {}).get(SENT_AT))
    if not sent_at and isinstance(properties.timestamp, datetime):
        sent_at = round(properties.timestamp.astimezone(UTC).timestamp() * 1000)
    return sent_at


def _kind(properties: Properties, body: bytes) -> int:
    """Tell JSON from bytes by the content type or, if there is none, by trying to read it."""
    if properties.content_type:
        return JSON if "json" in properties.content_type else BYTES
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return BYTES
    return JSON


def _number(value: object) -> int:
    """Return the number in a header that another program may have written; 0 for one that cannot be ours."""
    try:
        number = int(value)  # type: ignore[call-overload]  # whatever it is
    except (TypeError, ValueError, OverflowError):
        return 0
    return number if 0 <= number <= INSTANT_MAX else 0  # a time, or a count of attempts, which is far lower


def _cleaned(properties: Properties) -> dict[str, Any]:
    """Return the headers without those on which the server acts, such as its record of deaths, which stops circles."""
    headers = properties.headers or {}
    return carried(
        {name: value for name, value in headers.items() if not name.startswith(_SERVERS) and name not in _COPIES}
    )


def _copy(properties: Properties, headers: dict[str, Any]) -> Properties:
    """Return the properties that a foreign producer may have set, except the expiration, with these headers."""
    kept = {name: getattr(properties, name) for name in _KEPT}
    return Properties(**kept, delivery_mode=2, headers=headers)


_KEPT = (
    *("content_type", "content_encoding", "correlation_id", "reply_to"),
    *("message_id", "timestamp", "message_type", "app_id"),
)
