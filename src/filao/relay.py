"""The relay: it sends what an outbox has recorded, in order, and deletes it there once it is sent.

If a relay dies in between, it sends the message again later. The queue recognises the message by its id while it is
pending, and for the queue's `dedup_window` after that. If the relay may be away for longer, or the engine has no
deduplication, let the receiver use an inbox. Several relays may serve one outbox; the same holds for them.
"""

import asyncio
import logging
import random
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Any, TypeVar

from filao.broker import Broker, session_of
from filao.codec import shown
from filao.engine import OpenAgain
from filao.errors import ConfigurationError, EngineError, FilaoError, QueueFull, QueueNotFound
from filao.guarded import Log
from filao.outbox import Failed, Outbox, Recorded
from filao.printable import printable, some
from filao.process import no_thread
from filao.session import CLOSES_WITHIN

log: Log = Log(logging.getLogger("filao.relay"))

R = TypeVar("R")

_OF_A_ROW = (ValueError, TypeError, LookupError, ArithmeticError)  # what a row that another program wrote may raise

BATCH = 500  # recorded sends that one look takes: one transaction of the queue's stores them in some 10 ms
PAUSE_FIRST, PAUSE_MAX = 0.1, 5.0  # seconds between tries while the database or the engine is away
REFUSED_FOR = 1.0  # seconds for which a queue that refused its messages is left alone, while others go on


class Relay:
    """Relays one outbox to one broker.

    `connect` opens a connection to the outbox's database; the relay calls it, and uses the connection, in a thread of
    its own. `poll` is the number of seconds between two looks; `wake` makes the next one come at once.
    """

    def __init__(self, outbox: Outbox, connect: Callable[[], Any], broker: Broker, *, poll: float = 0.1) -> None:
        if not poll > 0:
            raise ConfigurationError(f"relay of {outbox.table!r}: poll is {poll!r}; it must be above 0 seconds")
        if not callable(connect):
            raise ConfigurationError(
                f"relay of {outbox.table!r}: connect is {shown(connect)}; give a function that opens a connection, "
                f"such as lambda: sqlite3.connect(…)"
            )
        self._outbox = outbox
        self._connect = connect
        self._session = session_of(broker)
        self._poll = poll
        self._connection: Any = None
        self._refused: dict[str, float] = {}
        """Queues that refused their messages, and the monotonic time until which they are left alone."""
        self._wakened = asyncio.Event()
        self._thread: ThreadPoolExecutor | None = None
        self._was_open = self._session.is_open
        """Whether the broker has been open since this was made."""

    async def run(self) -> None:
        """Relay until cancelled; while the database or the engine is away, wait for it.

        Raises `ConfigurationError` when its broker was closed or is open on another event loop, and `EngineError` when
        another file has taken the place of the queue's, after a restore, say: open the broker again, and run it again.
        """
        pause = PAUSE_FIRST
        try:
            while True:
                self._wakened.clear()
                self._check_open()
                try:
                    sent = await self.step()
                except OpenAgain:
                    raise
                except Exception as error:
                    await self._let_go(error)
                    await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                    pause = min(2 * pause, PAUSE_MAX)
                else:
                    pause = PAUSE_FIRST
                    if not sent:
                        await self._rest()
        finally:
            await self.close()

    async def _let_go(self, error: Exception) -> None:
        """Tell of a look that failed, and close the connection, which may be broken: the next look opens another."""
        self._check_open()
        about = (self._outbox.table, type(error).__name__, printable(str(error)))
        log.warning("relay of %s: trying again: %s: %s", *about)
        if self._thread is not None:
            await self._in_thread(self._disconnect)

    async def _rest(self) -> None:
        """Wait until it is wakened, or until it is time for the next look."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._poll):
                await self._wakened.wait()

    def wake(self) -> None:
        """Look now, because something was committed. Call this on the relay's event loop."""
        self._wakened.set()

    async def step(self) -> int:
        """Send up to 500 recorded messages, delete them, and return how many those were.

        Messages for a queue that refuses them, because it is full or undeclared, stay in the outbox, in order, and are
        tried again a second later; other queues go on. A message that can never be sent as it is, because its body is
        above the queue's `body_max`, say, is set aside, and those behind it go on: see `Outbox.failed` and
        `Outbox.retry`. Raises what the database raises, and `EngineError`.
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
        """Close the connection, within 30 s; `run` does it. If its database hangs, it is closed when that is over."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        closed = asyncio.get_running_loop().run_in_executor(thread, self._disconnect)
        thread.shutdown(wait=False)
        await asyncio.wait([closed], timeout=CLOSES_WITHIN)
        if not closed.done():
            log.warning("relay of %s: its database has not answered for %g s", self._outbox.table, CLOSES_WITHIN)

    def _check_open(self) -> None:
        """Raise `ConfigurationError` if the broker was closed meanwhile, or is open on another event loop.

        One that is not open yet is waited for.
        """
        self._was_open |= self._session.is_open
        if self._was_open:
            self._session.check_open()
            self._session.check_loop()

    async def _send(self, recorded: list[Recorded], sent: list[int], failed: list[Failed]) -> None:
        """Send the messages of one queue in order, and add those that were sent, or never can be, to these lists.

        All are sent at once. If they are refused, fewer are tried, down to a single one: so many as the queue has room
        for are sent, and one that can never be sent is found.
        """
        queue, size, done = recorded[0].queue, len(recorded), 0
        while done < len(recorded):
            part = recorded[done : done + size]
            try:
                await self._session.learned(queue)
                await self._session.send(queue, [one.draft for one in part])
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
                self._session.check_usable()  # otherwise the broker is at fault, not this row
                size = len(recorded)
                done += 1
                failed.append(Failed(part[0].number, part[0].draft.message_id or "", queue, _reason(error)))
            else:
                sent += [one.number for one in part]
                done += len(part)

    def _wait_with(self, recorded: list[Recorded], error: Exception) -> None:
        """Leave the messages of a queue in the outbox for a while."""
        queue, first = recorded[0].queue, recorded[0].draft.message_id
        stay = some(len(recorded), "message", ("stays", "stay"))
        told = (self._outbox.table, stay, printable(str(error)))
        log.warning("relay of %s: %s in it: %s", *told, extra=_fields(queue, first))
        self._refused[queue] = time.monotonic() + REFUSED_FOR

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _read(self) -> list[Recorded | Failed]:
        if self._connection is None:
            self._connection = self._connect()
            if isinstance(self._connection, sqlite3.Connection):
                self._connection.text_factory = _whatever_it_holds
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

    def _disconnect(self) -> None:
        """Close the connection, also one that was opened for a call that was cancelled meanwhile."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    async def _in_thread(self, job: Callable[[], R]) -> R:
        """Do a job in the thread. Raises `EngineUnavailable` when it cannot be started; the next job tries again."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="filao relay")
        try:
            done = asyncio.get_running_loop().run_in_executor(self._thread, job)
        except RuntimeError as error:
            self._thread = None
            raise no_thread(error) from error
        return await done


def _whatever_it_holds(text: bytes) -> str:
    """Return a text of SQLite's that may be no UTF-8, so that it stops no other row: such a row is set aside."""
    return text.decode(errors="surrogateescape")


def _fields(queue: str, message_id: str | None) -> dict[str, object]:
    """Return the fields of a log record about a message, as a worker's have them; nobody has received it yet."""
    return {"queue": queue, "message_id": message_id, "attempt": 0}


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, FilaoError) else f"{type(error).__name__}: {error}"


def _by_queue(recorded: list[Recorded]) -> list[list[Recorded]]:
    in_order = sorted(recorded, key=lambda one: (one.queue, one.number))
    return [list(some) for _, some in groupby(in_order, key=lambda one: one.queue)]
