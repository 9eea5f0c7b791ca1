"""Django's connections around a message: those that are too old or broken are closed, as around a request.

What is open at the end of a worker is closed, too: in Django's tests nobody may be connected to a database that goes.
"""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from collections.abc import AsyncGenerator, Generator
from typing import Any

from asgiref.sync import sync_to_async
from django.db import close_old_connections, connections

from filao.forks import Living
from filao.message import Message


class HandlersConnections:
    """The connections that the handlers of one worker use, kept for the next message as Django keeps them."""

    def __init__(self) -> None:
        self._idle: Living[Any] = Living()
        """Those of threads in which no handler runs now; a thread that ended is gone from here with its own."""

    def around_function(self, _: Any) -> Generator[None]:
        """Close the old ones in the thread of a plain handler."""
        close_old_connections()
        for connection in connections.all(initialized_only=True):
            self._idle.discard(connection)
        try:
            yield
        finally:
            close_old_connections()
            for connection in connections.all(initialized_only=True):
                self._idle.add(connection)

    async def around_coroutine(self, _: Message[Any]) -> AsyncGenerator[None]:
        """Close the old ones in the thread in which asynchronous code uses the database."""
        close = sync_to_async(close_old_connections, thread_sensitive=True)
        await close()
        try:
            yield
        finally:
            await close()

    async def until_the_end(self) -> AsyncGenerator[None]:
        """Close all when the last handler has ended."""
        try:
            yield
        finally:
            await sync_to_async(self._close, thread_sensitive=True)()

    def _close(self) -> None:
        for connection in connections.all(initialized_only=True):
            if not connection.in_atomic_block:  # of a TestCase, in whose thread this may be
                connection.close()
        for connection in self._idle:
            connection.inc_thread_sharing()  # it is of another thread
            connection.close()
            connection.dec_thread_sharing()
