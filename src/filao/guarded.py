"""Background tasks that no input can kill: an error ends one turn, and the next turn begins.

If a notification, a datagram or a row that nobody expected could end such a task, consumers would be woken late or not
at all, and nobody would learn why. Nor can the log: a filter of the program's that fails ends nothing of ours.
"""

import asyncio
import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from filao.errors import EngineUnavailable, FilaoError


class Log(logging.LoggerAdapter[logging.Logger]):
    """A log for what must go on: `logging` bears what fails in a handler, but not what fails in a filter."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log, or print what a filter raised."""
        try:
            super().log(level, msg, *args, stacklevel=2, **kwargs)  # as called by whoever called the method before
        except Exception:
            traceback.print_exc()

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the fields of this log; without any, a record keeps its own."""
        return (msg, kwargs) if self.extra is None else super().process(msg, kwargs)


log: Log = Log(logging.getLogger("filao"))

_CLOSED = (
    "the broker was closed before the engine had answered. If this was a send, it is open whether the message was "
    "stored: send it again with the same message_id."
)

PAUSE_MIN = 0.1  # seconds after a first turn that failed
PAUSE_MAX = 5.0  # seconds at most after one of many that failed in a row


async def for_ever(
    what: str,
    turn: Callable[[], Awaitable[object]],
    *,
    wake: asyncio.Event | None = None,
    pause_max: float = PAUSE_MAX,
) -> NoReturn:
    """Take one turn after another until the task is cancelled.

    A turn that failed is followed by a pause. It grows while turns keep failing, is partly random, so that many
    processes do not retry at once, and ends early when `wake` is set. A `FilaoError` also reaches the callers of the
    storage, so it is logged at debug level only. Any other error is unforeseen: it is logged with its traceback, once
    while it repeats.
    """
    pause, said = 0.0, ""
    while True:
        try:
            await turn()
            check_cancelled()
            pause, said = 0.0, ""
        except Exception as error:
            check_cancelled()
            said = _say(what, error, said)
            pause = min(2 * pause or PAUSE_MIN, pause_max)
            await _rest(pause * random.uniform(0.5, 1.0), wake)


def look_away(future: "asyncio.Future[Any]") -> None:
    """Take the error of a future that nobody waits for, so that asyncio does not report it as forgotten."""
    if not future.cancelled():
        future.exception()


def failure_of(ended: "asyncio.Future[Any]") -> BaseException | None:
    """Return the error of a future that has ended, if it ended in one; only a broker that is closed cancels it."""
    return EngineUnavailable(_CLOSED) if ended.cancelled() else ended.exception()


def check_cancelled() -> None:
    """Raise a cancellation of the running task that a call below has swallowed; call it between two turns of a loop.

    Before Python 3.12, `asyncio.wait_for`, which the servers' clients use, forgets a cancellation that arrives at the
    same moment as its result.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextmanager
def cancellable() -> Generator[None]:
    """When the block ends, raise a cancellation that came during it and was lost in it.

    A call in the block may have swallowed it, or turned it into an error of its own, as RabbitMQ's client does. A
    cancellation that came before the block does not count: a cancelled task may have to tidy up.
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    except Exception as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError


async def _rest(seconds: float, wake: asyncio.Event | None) -> None:
    if wake is None:
        await asyncio.sleep(seconds)
        return
    wake.clear()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wake.wait()


def _say(what: str, error: Exception, said_before: str) -> str:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, FilaoError) or text == said_before:
        log.debug("%s failed and goes on: %r", what, text)
    else:
        log.error("%s failed and goes on: %r", what, text, exc_info=error)
    return text
