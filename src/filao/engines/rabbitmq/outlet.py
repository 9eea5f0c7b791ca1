"""A channel on which messages are published, and the server confirms each or returns it.

Invariant: of several messages with one id, one is under way. The client tells what the server returns by its id alone:
otherwise a message that found no queue would pass for confirmed, and be lost, and another one for returned.
"""

import asyncio
from contextlib import suppress
from typing import cast

from aiormq import Channel
from aiormq.exceptions import AMQPError, ChannelInvalidStateError
from pamqp.commands import Basic

CLOSED_WITHIN = 0.5  # seconds for the farewell to the channel: a server that blocks those who send gives none


class _Turn:
    """Whose turn it is among the messages with one id."""

    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


class Outlet:
    """One such channel, shared by all that are published to a queue, or to several, at the same time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._turns: dict[str | int, _Turn] = {}
        self._users = 0
        self._is_retired = False

    @property
    def is_open(self) -> bool:
        """Whether more can be published."""
        return not self._is_retired and not self._channel.is_closed

    def enter(self) -> None:
        """Keep it open until the caller leaves it."""
        self._users += 1

    async def leave(self) -> None:
        """Let go of it: the last one to leave closes a channel that was retired."""
        self._users -= 1
        if self._is_retired and not self._users and not self._channel.is_closed:
            with suppress(AMQPError, ChannelInvalidStateError, TimeoutError, OSError):
                async with asyncio.timeout(CLOSED_WITHIN):
                    await self._channel.close()

    def retire(self) -> None:
        """Take no more: on 3.10, a channel that met a queue without a leader never works again."""
        self._is_retired = True

    async def publish(self, content: bytes, properties: Basic.Properties, *, exchange: str = "", key: str) -> None:
        """Publish a message, and return once it is confirmed. Raises `PublishError` if it is returned.

        Where the server is closing the channel, so that the message is not even written, what it closed it for is
        raised.
        """
        name = properties.message_id or id(properties)  # without one, the client gives it an id of its own
        turn = self._turns.get(name)
        if turn is None:
            turn = self._turns[name] = _Turn()
        turn.users += 1
        try:
            async with turn.lock:
                await self._channel.basic_publish(
                    content, exchange=exchange, routing_key=key, properties=properties, mandatory=True, wait=False
                )
        except ChannelInvalidStateError as error:
            raise await self._closed_by() or error from None
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[name]

    async def _closed_by(self) -> AMQPError | None:
        """Return the error that the channel ends with, if the server or the connection ends it."""
        closing = cast("asyncio.Future[None]", self._channel.closing)  # pyright: ignore[reportUnknownMemberType]
        await asyncio.wait([closing])
        error = None if closing.cancelled() else closing.exception()
        return error if isinstance(error, AMQPError) else None
