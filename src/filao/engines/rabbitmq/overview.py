"""What the dashboard sees of RabbitMQ: dead letters, which must be received and given back to be seen.

The server shows no message that waits or is held, knows no groups, and has no place for a log.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol, TypeVar

import msgspec

from filao.engine import State, StoredMessage
from filao.overview import Glimpse, HeldGroup, seen_error

T = TypeVar("T")

LOOKED_AT_MAX = 10_000  # dead letters that are received to make a list, or to find one


class Look(Protocol):
    """The engine's own look, which keeps of each dead letter what it is told to."""

    def __call__(
        self, queue: str, state: State, keep: Callable[[StoredMessage], T], *, limit: int, after: str | None = None
    ) -> Awaitable[list[T]]: ...


class RabbitmqOverview:
    """See `filao.overview.Overview`."""

    log = None
    sees: tuple[State, ...] = (State.DEAD,)
    glance_max: int = LOOKED_AT_MAX

    def __init__(self, look: Look) -> None:
        self._look = look

    async def now(self) -> datetime:
        """Return our own time: the server has none to tell, and the times of messages are their senders'."""
        return datetime.now(UTC)

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return dead letters. Raises `UnsupportedFeature` for other states."""
        if group is not None:
            return []
        return await self._look(queue, state, _glimpse, limit=min(limit, LOOKED_AT_MAX), after=after)

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one dead letter."""

        def keep(message: StoredMessage) -> StoredMessage | None:
            return message if message.id == message_id else None

        found = await self._look(queue, State.DEAD, keep, limit=LOOKED_AT_MAX)
        return next(filter(None, found), None)

    async def held_groups(self, queue: str) -> list[HeldGroup]:  # noqa: ARG002
        """Return none: there are no groups."""
        return []


def _glimpse(message: StoredMessage) -> Glimpse:
    body = message.body
    return Glimpse(
        message.id,
        len(body) if isinstance(body, bytes) else len(msgspec.json.encode(body)),
        message.headers,
        message.attempts,
        message.priority,
        message.group,
        message.sent_at,
        message.at,
        message.reason,
        seen_error(message.error),
    )
