"""Django's connections around a message: those that are too old or broken are closed, as around a request."""
# pyright: basic, reportMissingTypeStubs=false
# Django has no types of its own.

from collections.abc import AsyncGenerator, Generator
from typing import Any

from asgiref.sync import sync_to_async
from django.db import close_old_connections

from filao.message import Message


def around_function(_: Any) -> Generator[None]:
    """Close them in the thread of a plain handler."""
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


async def around_coroutine(_: Message[Any]) -> AsyncGenerator[None]:
    """Close them in the thread in which asynchronous code uses the database."""
    close = sync_to_async(close_old_connections, thread_sensitive=True)
    await close()
    try:
        yield
    finally:
        await close()
