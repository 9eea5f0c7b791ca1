"""The relay: it sends what an outbox has recorded, in order, and deletes it there once it is sent.

A relay that dies between the two sends again when it is back; the queue recognises the message by its id, for as long
as it is pending and for the queue's `dedup_window` after. Where the relay may be away for longer, or the engine has no
deduplication, let the receiver use an inbox. Several relays of one outbox may run: the same holds.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Any, TypeVar

from filao.broker import Broker, session_of
from filao.errors import ConfigurationError, EngineError, FilaoError, QueueFull, QueueNotFound
from filao.outbox import Failed, Outbox, Recorded
from filao.printable import printable

log: logging.Logger = logging.getLogger("filao.relay")

R = TypeVar("R")

_OF_A_ROW = (ValueError, TypeError, LookupError, ArithmeticError)  # what a row that is none of ours may raise anywhere

BATCH = 500  # recorded sends that one look takes: what one transaction of the queue's stores in some 10 ms
PAUSE_FIRST, PAUSE_MAX = 0.1, 5.0  # seconds between two tries while a database or the engine is away
REFUSED_FOR = 1.0  # seconds for which a queue that refused its messages is left alone, while others go on


class Relay:
    """Relays one outbox to one broker.

    `connect` opens a connection to the outbox's database; it is called, and the connection used, in a thread of the
    relay's own. `poll` is how many seconds pass between two looks; `wake` makes the next one come at once.
    """

    def __init__(self, outbox: Outbox, connect: Callable[[], Any], broker: Broker, *, poll: float = 0.1) -> None:
        if not poll > 0:
            raise ConfigurationError(f"relay of {outbox.table!r}: poll is {poll!r}; it must be above 0 seconds")
        self._outbox = outbox
        self._connect = connect
        self._session = session_of(broker)
        self._poll = poll
        self._connection: Any = None
        self._refused: dict[str, float] = {}
        """Queues that refused, and the monotonic time until which they are left alone."""
        self._wakened = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None

    async def run(self) -> None:
        """Relay for ever, until cancelled; databases and engines that go away are waited for."""
        pause = PAUSE_FIRST
        try:
            while True:
                self._wakened.clear()
                try:
                    sent = await self.step()
                except asyncio.CancelledError:
                    raise
                except Exception as error:
                    log.warning(
                        "relay of %s: trying again: %s: %s",
                        self._outbox.table,
                        type(error).__name__,
                        printable(str(error)),
                    )
                    await self._drop_connection()
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                    pause = min(2 * pause, PAUSE_MAX)
                    continue
                pause = PAUSE_FIRST
                if not sent:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._poll):
                            await self._wakened.wait()
        finally:
            await self.close()

    def wake(self) -> None:
        """Look now: something was committed. For the loop that the relay runs on."""
        self._wakened.set()

    async def step(self) -> int:
        """Send up to 500 recorded messages, delete them, and return how many there were.

        A queue that refuses (it is full, or nobody has declared it) keeps its messages in the outbox, in order, and is
        tried again a second later; the others go on. A message that can never be sent as it is (its body is above the
        queue's `body_max`, say) is set aside, and those behind it go on: see `Outbox.failed` and `Outbox.retry`. Raises
        what the database raises, and `EngineError`.
        """
        now = time.monotonic()
        self._refused = {queue: until for queue, until in self._refused.items() if until > now}
        found = await self._in_thread(self._read)
        failed = [one for one in found if isinstance(one, Failed)]
        sent: list[int] = []
        by_queue = _by_queue([one for one in found if isinstance(one, Recorded)])
        errors = await asyncio.gather(*(self._send(some, sent, failed) for some in by_queue), return_exceptions=True)
        if sent or failed:
            await self._in_thread(lambda: self._forget(sent, failed))
        for error in errors:
            if error is not None:
                raise error
        return len(sent) + len(failed)

    async def close(self) -> None:
        """Close the connection; `run` does it."""
        await self._drop_connection()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _send(self, recorded: list[Recorded], sent: list[int], failed: list[Failed]) -> None:
        """Send the messages of one queue in order; add what was sent, and what can never be, to these lists.

        All at once; where they are refused, fewer: as many as a queue has room for, or one, to find which is refused.
        """
        queue, size, done = recorded[0].queue, len(recorded), 0
        while done < len(recorded):
            some = recorded[done : done + size]
            try:
                await self._session.known(queue)
                await self._session.send(queue, [one.draft for one in some])
            except EngineError:
                raise
            except (FilaoError, *_OF_A_ROW) as error:
                waits = isinstance(error, QueueFull | QueueNotFound)
                if size > 1 and not isinstance(error, QueueNotFound):
                    size = (size + 1) // 2
                    continue
                if waits:
                    self._wait_with(recorded[done:], error)
                    return
                self._session.check_usable()  # else it is not this row that cannot be sent
                size = len(recorded)
                done += 1
                failed.append(Failed(some[0].number, some[0].draft.message_id or "", queue, _reason(error)))
            else:
                sent += [one.number for one in some]
                done += len(some)

    def _wait_with(self, recorded: list[Recorded], error: Exception) -> None:
        """Leave the messages of a queue in the outbox for a while."""
        queue, first = recorded[0].queue, recorded[0].draft.message_id
        told = (self._outbox.table, len(recorded), printable(str(error)))
        log.warning("relay of %s: %d messages stay in it: %s", *told, extra=_fields(queue, first))
        self._refused[queue] = time.monotonic() + REFUSED_FOR

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _read(self) -> list[Recorded | Failed]:
        if self._connection is None:
            self._connection = self._connect()
            self._outbox.update(self._connection)
            self._connection.commit()
        recorded = self._outbox.recorded(self._connection, BATCH, without=self._refused)
        self._connection.commit()
        return recorded

    def _forget(self, sent: list[int], failed: list[Failed]) -> None:
        self._outbox.forget(self._connection, sent)
        for one in failed:
            self._outbox.set_aside(self._connection, one)
        self._connection.commit()
        for one in failed:
            told = (self._outbox.table, one.number, one.queue, printable(one.reason))
            log.error(
                "relay of %s: send %d, to %r, was set aside, for it can never be sent: %s",
                *told,
                extra=_fields(one.queue, one.id),
            )

    async def _in_thread(self, job: Callable[[], R]) -> R:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="filao relay")
        return await asyncio.get_running_loop().run_in_executor(self._thread, job)

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                await self._in_thread(connection.close)


def _fields(queue: str, message_id: str | None) -> dict[str, object]:
    """Return what a record says of a message beside its text, as those of a worker do; nobody has received it yet."""
    return {"queue": queue, "message_id": message_id, "attempt": 0}


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, FilaoError) else f"{type(error).__name__}: {error}"


def _by_queue(recorded: list[Recorded]) -> list[list[Recorded]]:
    in_order = sorted(recorded, key=lambda one: (one.queue, one.number))
    return [list(some) for _, some in groupby(in_order, key=lambda one: one.queue)]
