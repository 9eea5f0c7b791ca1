"""What both SQL engines share when they read messages' rows: to show them, to move them, to say what became of one."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec

from filao.codec import seen_body, seen_headers
from filao.engine import Delivery, Draft, Failure, Operators, Result, Send, State, StoredMessage, instant
from filao.errors import LeaseLost
from filao.moving import Packing, Parcel

LEAVING = (State.READY, State.DELAYED, State.BLOCKED, State.DEAD)
"""The states in which a message can be moved away: all but leased."""


class RowPacking(Packing):
    """Takes messages by their numbers, which are their places in the order of sending."""

    def __init__(
        self,
        queue: str,
        read: Callable[[int, int], Awaitable[list[Parcel]]],
        remove: Callable[[Sequence[str]], Awaitable[None]],
        operators: Operators,
    ) -> None:
        self._queue = queue
        self._read = read
        self._remove = remove
        self._operators = operators
        self._last = 0
        self._has_delivered = False

    async def take(self, limit: int) -> list[Parcel]:
        """Read the next rows and, at the end, those that consumers have given back meanwhile."""
        parcels = await self._read(self._last, limit)
        if not parcels and self._has_delivered:
            self._has_delivered = False
            parcels = await self._read(0, limit)
        self._last = parcels[-1].handle if parcels else self._last
        return parcels

    async def delivered(self, parcels: Sequence[Parcel]) -> None:
        """Remove rows."""
        await self._remove([parcel.id for parcel in parcels])
        self._has_delivered = True

    async def held(self) -> int:
        """Count the leases that have not ended."""
        return (await self._operators.stats(self._queue))[0].leased


def age(now: int, since: int | None) -> float | None:
    """Return the seconds between two times in milliseconds since 1970; None if there is no earlier one."""
    return None if since is None else max(0.0, (now - since) / 1000)


COLUMNS = "kind, content, headers, attempts, priority, grp, dedup_key, sent_at, at, expires_at, reason"
"""The columns of a message that `stored` and `parcel` read."""


def stored(
    queue: str, name: str, state: State, columns: Sequence[Any], *, history: tuple[Failure, ...], consumer: str
) -> StoredMessage:
    """Return a message as operators see it, from the columns `COLUMNS`; `consumer` had it last."""
    kind, content, headers, attempts, priority, group, dedup_key, sent_at, at, expires_at, reason = columns
    return StoredMessage(
        id=name,
        queue=queue,
        state=state,
        body=seen_body(kind, content),
        headers=seen_headers(headers),
        attempts=attempts,
        priority=priority,
        group=group,
        dedup_key=dedup_key,
        sent_at=instant(sent_at),
        at=instant(at),
        expires_at=None if expires_at is None else instant(expires_at),
        reason=reason,
        history=history,
        consumer=consumer if state == State.LEASED else "",
    )


def failures(rows: Iterable[Sequence[Any]]) -> tuple[Failure, ...]:
    """Return a history from rows of attempt, at, outcome, error and consumer."""
    return tuple(
        Failure(attempt, instant(at), outcome, error, consumer) for attempt, at, outcome, error, consumer in rows
    )


def failure_rows(number: int, parcel: Parcel) -> list[tuple[Any, ...]]:
    """Return the rows of a history: the message's number, then what `failures` reads, with times in milliseconds."""
    return [
        (number, one.attempt, round(one.at.timestamp() * 1000), one.outcome, one.error, one.consumer)
        for one in parcel.history
    ]


def lease_lost(delivery: Delivery, now: tuple[str, int] | None, *, queue_deleted: bool = False) -> LeaseLost:
    """Return the error for a settle or an extend whose lease was lost.

    `now` is the message's state with the number of its attempts; None when it is gone.
    """
    if queue_deleted:
        became = "its queue was deleted, and the message with it"
    elif now is None:
        became = "it is gone: somebody else finished it, or it was purged"
    elif now[0] == "leased":
        became = f"another consumer holds it, as attempt {now[1]}"
    else:
        became = f"it is {now[0]} again" if now[0] == "ready" else f"it is {now[0]}"
    return LeaseLost(
        f"message {delivery.id} of queue {delivery.queue!r}: the lease of attempt {delivery.attempt} was lost; "
        f"{became}. Nothing was changed. Work that takes longer than the queue's lease must extend it."
    )


def parcel(row: Sequence[Any], name: str, history: tuple[Failure, ...], now: int) -> Parcel:
    """Return a message on its way to another engine, from its number, its state and the columns `COLUMNS`."""
    number, state, kind, content, headers, attempts, priority, group, dedup_key, sent_at, at, expires_at, reason = row
    is_dead = reason is not None
    due_in = max(0, at - now) / 1000 if state in ("delayed", "blocked") else 0.0
    ttl = None if expires_at is None or is_dead else max(1, expires_at - now) / 1000
    draft = Draft(kind, content, headers, due_in, priority, group, dedup_key, ttl, name)
    return Parcel(number, name, draft, sent_at, attempts, history, expires_at, reason, at if is_dead else 0)


def sends(queue: str, parcels: Sequence[Parcel]) -> list[Send]:
    """Return the sends that store messages from another engine, without the keys that dead letters no longer have."""
    drafts = [
        msgspec.structs.replace(parcel.draft, dedup_key=None, delay=0.0) if parcel.reason else parcel.draft
        for parcel in parcels
    ]
    return [Send(queue, [draft]) for draft in drafts]


def is_new(result: Result) -> bool:
    """Return whether a send stored its message; False if it was there already. Raises the send's error."""
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, list)
    return not result[0].duplicate


def has_rival(parcel: Parcel, result: Result) -> bool:
    """Return whether another message has the `dedup_key`: both were confirmed to their senders, so both are kept."""
    return isinstance(result, list) and result[0].duplicate and result[0].id != parcel.id


def without_key(parcel: Parcel) -> Parcel:
    """Return a message without its `dedup_key`, which another one has."""
    return msgspec.structs.replace(parcel, draft=msgspec.structs.replace(parcel.draft, dedup_key=None))
