"""What the dashboard sees of RabbitMQ: dead letters, which must be received and given back to be seen.

The server shows no message that waits or is held, knows no groups, and has no place for a log.
"""

from collections.abc import Awaitable, Sequence
from typing import Protocol

import msgspec

from filao.engine import State, StoredMessage
from filao.overview import Glimpse, HeldGroup, seen_error

LOOKED_AT_MAX = 10_000  # dead letters that are received to make a list, or to find one


class Peek(Protocol):
    """The engine's own `peek`."""

    def __call__(
        self, queue: str, state: State, *, limit: int, after: str | None
    ) -> Awaitable[Sequence[StoredMessage]]: ...


class RabbitmqOverview:
    """See `filao.overview.Overview`."""

    log = None
    sees: tuple[State, ...] = (State.DEAD,)
    glance_max: int = LOOKED_AT_MAX

    def __init__(self, peek: Peek) -> None:
        self._peek = peek

    async def glance(
        self, queue: str, state: State, *, limit: int, after: str | None = None, group: str | None = None
    ) -> list[Glimpse]:
        """Return dead letters. Raises `UnsupportedFeature` for other states."""
        if group is not None:
            return []
        found = await self._peek(queue, state, limit=min(limit, LOOKED_AT_MAX), after=after)
        return [_glimpse(message) for message in found]

    async def find(self, queue: str, message_id: str) -> StoredMessage | None:
        """Return one dead letter."""
        found = await self._peek(queue, State.DEAD, limit=LOOKED_AT_MAX, after=None)
        return next((message for message in found if message.id == message_id), None)

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
