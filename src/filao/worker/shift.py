"""One run of a worker: it receives what it can start now, starts it, and brings all of it to an end.

A shift is made once the engine has been reached, and dropped when it ends. While the storage fails, it waits for as
long as that takes. Two errors end it: that of a broker which the program has closed meanwhile, and that of a storage
which must be opened anew, such as a restored file; then whatever supervises the process starts it again.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from filao.engine import OpenAgain
from filao.errors import EngineUnavailable, QueueNotFound
from filao.guarded import Log
from filao.message import Message, delivery_of
from filao.printable import some
from filao.process import HEALTHY, running_loop
from filao.worker.handlers import Consumer
from filao.worker.handling import ENDS_WITHIN, Shared
from filao.worker.outage import pauses
from filao.worker.pool import Pool
from filao.worker.pulse import BLOCKED_AFTER, Pulse
from filao.worker.run import Handled, Run

log: Log = Log(logging.getLogger("filao.worker"))

LOOKS_EVERY = 0.5  # seconds between two looks while handlers run, of a worker that ends when there is nothing to do
POLL = 5.0  # seconds after which a wait for messages begins anew, to see whether the queue can still be reached
SILENT_AFTER = 30.0  # seconds without a successful look after which a pool with room is unhealthy
HUNG_MAX = 10  # handlers that do not end; with more, the process is unhealthy
AT_ONCE = 0.5  # seconds in which the messages of handlers that did not end are given back


@dataclass(frozen=True, slots=True)
class Status:
    """How a worker is doing."""

    ready: bool
    """Whether it has reached its engine and receives."""
    healthy: bool
    """Whether every consumer with room has managed to poll lately, and the event loop turns."""
    running: dict[str, int]
    """Messages being worked on, by queue."""
    handled: int
    """Attempts that have ended."""
    problems: list[str]

    def told(self) -> str:
        """Return the status in words, for the doctor."""
        how = HEALTHY if self.healthy else "ready" if self.ready else "not ready"
        running = ", ".join(f"{count:,} of {name!r} running" for name, count in self.running.items())
        return "; ".join([f"{how}, {running}, {self.handled:,} handled", *self.problems])


def at_rest(handled: int) -> Status:
    """Return the status of a worker that does not run."""
    return Status(ready=False, healthy=False, running={}, handled=handled, problems=[])


class Stop:
    """What a worker was told: nothing, to stop gracefully, or to stop at once. It is made on the worker's loop."""

    def __init__(self) -> None:
        self.told: asyncio.Event = asyncio.Event()
        self.at_once: asyncio.Event = asyncio.Event()
        self._loop = running_loop()

    def tell(self) -> None:
        """Tell it to stop gracefully, or at the second call at once. Called on its loop."""
        (self.at_once if self.told.is_set() else self.told).set()

    def tell_from_any_thread(self) -> None:
        """Tell it from wherever."""
        with suppress(RuntimeError):  # its loop has ended, and it with that
            self._loop.call_soon_threadsafe(self.tell)


class Shift:
    """Feeds messages to runs, from the moment it is made until `finish`."""

    def __init__(
        self, shared: Shared, pools: Sequence[Pool], stop: Stop, on_handled: Callable[[Handled], None], *, patient: bool
    ) -> None:
        self._shared = shared
        self._stop = stop
        self._on_handled = on_handled
        self._patient = patient
        """Whether it waits while the engine is away; a test wants the error."""
        self.pools = pools
        self.hung: set[Run] = set()
        """Runs whose handlers were told to end and did not; their messages were settled without them."""
        self._runs: dict[Run, Pool] = {}
        self._receiving: set[asyncio.Task[list[Message[Any]]]] = set()
        self._suspects: set[Run] = set()
        """At most one: the message that must be handled alone."""
        self.pulse: Pulse = Pulse()
        """Watches whether the event loop turns."""
        self._moved = asyncio.Event()
        self._is_ending = False
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        """Has what `on_handled` raised, as a result: a future bears not every exception."""
        self._later: dict[str, tuple[float, Iterator[float]]] = {}
        """Queues that failed, each with the monotonic time of its next look and the pauses to come."""
        self._never: dict[str, Exception | None] = {}
        """Until idle: queues of which no look has succeeded yet, each with what the last one raised."""

    async def work(self, grace: float, *, until_idle: bool) -> bool:
        """Start messages until it is told to stop or has nothing to do, and then finish; return whether it was idle.

        Of a shift that ends when it is idle, queues that could be looked into are waited for; if others are all that is
        left, it raises what the first of them did.
        """
        if until_idle:
            self._never = dict.fromkeys(name for pool in self.pools for name in pool.consumers)
        clearing = [asyncio.create_task(self._clear(sys.maxsize))] if until_idle else []
        work = clearing or [asyncio.create_task(self._feed(pool)) for pool in self.pools]
        work = [*work, asyncio.create_task(self._watch())]
        told = asyncio.create_task(self._stop.told.wait())
        try:
            ends: list[asyncio.Future[Any]] = [told, self._failed, *work]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop.told.set()
            try:
                await cancel(told, *work)
                self._rest(*self.pools)
            except asyncio.CancelledError:  # cancelled again
                grace = 0.0
                raise
            finally:
                if self._runs:
                    begun = some(len(self._runs), "message")
                    log.info("stopping: %s may finish within %g s; told again, it stops at once", begun, grace)
                await self.finish(grace)
        for task in work:
            if not task.cancelled():
                task.result()
        if self._failed.done():
            raise self._failed.result()
        return any(not task.cancelled() for task in clearing)

    async def drain(self, limit: int) -> None:
        """Start what is ready, and what becomes ready meanwhile, at most `limit` messages, and finish."""
        await self._clear(limit)
        while self._runs:
            await self._next_move()
        await self.finish(0.0)
        if self._failed.done():
            raise self._failed.result()

    def status(self, handled: int) -> Status:
        """Return how it is doing. May be called from any thread."""
        problems = self.problems()
        running = {name: count for pool in self.pools for name, count in pool.running().items()}
        return Status(ready=True, healthy=not problems, running=running, handled=handled, problems=problems)

    def problems(self) -> list[str]:
        """Return what is wrong. May be called from any thread."""
        now = time.monotonic()
        looking = [] if self._suspects else [pool for pool in self.pools if not pool.is_full()]
        problems = [
            f"the consumer of {' and '.join(map(repr, pool.consumers))} has not managed to poll for "
            f"{now - pool.polled_at:.0f} s"
            for pool in looking
            if now - pool.polled_at > SILENT_AFTER
        ]
        if len(self.hung) > HUNG_MAX:
            problems.append(f"{len(self.hung)} handlers have not ended though they were told to: replace this process")
        if (blocked := self.pulse.blocked_for()) > BLOCKED_AFTER:
            problems.append(f"the event loop has been blocked for {blocked:.0f} s")
        return problems

    # --- feeding -----------------------------------------------------------------------------------------------------

    async def _feed(self, pool: Pool) -> None:
        """Start messages whenever there is room for them, for ever."""
        while True:
            await pool.has_room()
            while self._suspects:
                await self._next_move()
                pool.polled_at = time.monotonic()  # until now it was not allowed to look
            if len(pool.consumers) == 1:
                (name,) = pool.consumers
                self._start_all(pool, name, await self._receive(pool, name, pool.room(name), POLL))
            elif not await self._sweep(pool, pool.room()):
                await self._first_of(pool)

    async def _clear(self, limit: int) -> None:
        """Start what is ready, and what becomes ready meanwhile, at most `limit` messages.

        It ends when no queue had anything in one sweep before which nothing ran: what ran during it may have sent more.
        """
        started = 0
        while started < limit:
            at_rest, took = not self._runs, 0
            for pool in self.pools:
                took += await self._sweep(pool, limit - started - took)
            started += took
            if took:
                continue
            if self._runs or self._later.keys() - self._never.keys():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOKS_EVERY):
                        await self._next_move()
            elif at_rest:
                for error in filter(None, self._never.values()):
                    raise error
                break

    async def _sweep(self, pool: Pool, limit: int) -> int:
        """Look into each queue in turn, without waiting, and return how many messages were started."""
        started = 0
        for name in pool.turns.order():
            room = min(pool.room(name), limit - started)
            if room <= 0:
                continue
            messages = await self._receive(pool, name, pool.turns.share(name, room), 0.0)
            self._start_all(pool, name, messages)
            started += len(messages)
            if messages:
                pool.turns.took(name, len(messages))
            else:
                pool.turns.had_nothing(name)
        return started

    async def _first_of(self, pool: Pool) -> None:
        """Wait for the first message of any queue; others that come at the same moment go back, if there is no room."""
        names = [name for name in pool.turns.order() if pool.room(name) > 0]
        waits = {name: asyncio.create_task(self._receive(pool, name, 1, POLL)) for name in names}
        try:
            await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for name, wait in waits.items():
                await cancel(wait)
                if wait.cancelled() or wait.exception() is not None:
                    continue
                for message in wait.result():
                    if pool.room(name) > 0:
                        self._start(pool, pool.consumers[name], message)
                        pool.turns.took(name, 1)
                    else:
                        self._shared.session.give_back(delivery_of(message))
            self._rest(pool)  # the next place may be another queue's
        for wait in waits.values():
            if not wait.cancelled():
                wait.result()

    async def _receive(self, pool: Pool, name: str, limit: int, wait: float) -> list[Message[Any]]:
        """Receive, unless a suspect is here or comes meanwhile; after a failure, look into the queue again later."""
        at, _ = self._later.get(name, (0.0, None))
        if (left := at - time.monotonic()) > 0:
            await asyncio.sleep(min(left, wait))
            return []
        if self._suspects:
            return []
        try:
            messages = await self._received(pool.consumers[name], limit, wait)
        except Exception as error:
            self._shared.session.check_open()
            if not self._patient or isinstance(error, OpenAgain):
                raise
            self._fails(pool, name, error)
            return []
        if self._later.pop(name, None) is not None:
            self._shared.outages.is_over(f"receiving from {name!r}")
        self._shared.outages.is_over("receiving")
        self._never.pop(name, None)
        pool.polled_at = time.monotonic()
        return messages

    def _fails(self, pool: Pool, name: str, error: Exception) -> None:
        if isinstance(error, QueueNotFound):  # the engine works; only this queue is gone
            pool.polled_at = time.monotonic()
        if name in self._never:  # which is raised, or works at last
            self._never[name] = error
        else:
            what = "receiving" if isinstance(error, EngineUnavailable) else f"receiving from {name!r}"
            self._shared.outages.fails(what, error)
        _, still = self._later.get(name, (0.0, pauses()))
        self._later[name] = time.monotonic() + next(still), still

    async def _received(self, consumer: Consumer, limit: int, wait: float) -> list[Message[Any]]:
        receive = self._shared.broker.receive_many(consumer.queue, limit, wait=wait)
        receiving = asyncio.get_running_loop().create_task(receive)
        self._receiving.add(receiving)
        try:
            return await receiving
        except asyncio.CancelledError:
            if receiving.cancelled() and not current().cancelling():
                return []  # a suspect has come
            for message in _came(receiving):
                self._shared.session.give_back(delivery_of(message))
            raise
        finally:
            self._receiving.discard(receiving)
            self._move()

    def _move(self) -> None:
        """Wake those that wait for something to end."""
        self._moved.set()
        if self._suspects:
            self._try_suspect()

    async def _next_move(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _start_all(self, pool: Pool, name: str, messages: Sequence[Message[Any]]) -> None:
        for message in messages:
            self._start(pool, pool.consumers[name], message)

    def _start(self, pool: Pool, consumer: Consumer, message: Message[Any]) -> None:
        run = Run(self._shared, consumer, message, self._make_room, self._ended)
        pool.began(run.queue)
        self._runs[run] = pool
        if self._suspects and (delivery_of(message).crashed or self._is_at_suspect()):
            run.release()  # one suspect at a time, and nothing beside it; another process may have room for this one
        elif not delivery_of(message).crashed:
            run.begin()
        else:
            self._suspects.add(run)
            for receiving in self._receiving:
                receiving.cancel()
            about = run.about()
            run.log.warning("%s: its last consumer's process died; it is handled alone, in case it dies of it", about)
            self._try_suspect()

    def _is_at_suspect(self) -> bool:
        """Return whether a suspect is being handled."""
        return any(run.has_begun for run in self._suspects)

    def _try_suspect(self) -> None:
        """Begin a suspect, which may kill the process, once there is no other message in it or on its way."""
        for run in list(self._suspects):
            if run.has_begun:
                continue
            if self._is_ending:
                run.release()
            elif not self._receiving and len(self._runs) == 1:
                run.begin()

    def _make_room(self, run: Run) -> None:
        """Make the run's place free for another message."""
        self._runs[run].ended(run.queue)

    def _ended(self, run: Run, handled: Handled) -> None:
        del self._runs[run]
        self._suspects.discard(run)
        if run.handling.has_hung:
            self.hung.add(run)
            run.handling.when_handler_ends(partial(self.hung.discard, run))
        self._move()
        try:
            self._on_handled(handled)
        except BaseException as raised:
            if not self._failed.done():
                self._failed.set_result(raised)

    # --- stopping ----------------------------------------------------------------------------------------------------

    async def finish(self, grace: float) -> None:
        """Give back what has not begun, let the rest finish for a while, and end what does not.

        It ends within `grace`, `ENDS_WITHIN` and twice `AT_ONCE` seconds; the first two end early if it is told to stop
        at once.
        """
        self._is_ending = True
        self._move()
        at_once = asyncio.create_task(self._stop.at_once.wait())
        at_once.add_done_callback(lambda _: self._moved.set())
        try:
            await self._wait_for_runs(grace, at_once)
            for run in list(self._runs):
                run.handling.end("stopped")
            await self._wait_for_runs(ENDS_WITHIN, at_once)
            await self._wait_for_runs(AT_ONCE)
            for run in list(self._runs):
                run.handling.give_up()
            await self._wait_for_runs(AT_ONCE)
        finally:
            await cancel(at_once)
            for run in list(self._runs):
                run.abandon()

    def _rest(self, *pools: Pool) -> None:
        """Let nothing more be pushed in the place of what is settled: it would go back, with an attempt used."""
        self._shared.session.rest([name for pool in pools for name in pool.consumers])

    async def _wait_for_runs(self, seconds: float, *until: "asyncio.Task[Any]") -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._runs and not any(task.done() for task in until):
                    await self._next_move()

    async def _watch(self) -> None:
        """Log problems, such as a consumer that has not managed to poll."""
        while True:
            await asyncio.sleep(SILENT_AFTER / 2)
            for problem in self.problems():
                log.error("%s", problem)


async def cancel(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks and wait for their ends."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _came(receiving: "asyncio.Task[list[Message[Any]]]") -> list[Message[Any]]:
    """Return what a receive got in the very moment in which its caller was cancelled."""
    if not receiving.done() or receiving.cancelled() or receiving.exception() is not None:
        return []
    return receiving.result()


def current() -> "asyncio.Task[Any]":
    """Return the running task."""
    task = asyncio.current_task()
    assert task is not None
    return task
