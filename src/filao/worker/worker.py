"""The worker: it receives from queues, calls their handlers, keeps the leases meanwhile, and settles what they decided.

It claims only what it can start now. A message whose last consumer's process died is handled alone, so that if it kills
this one too, it takes no other message's attempt with it. Told to stop, it receives no more, gives back what has not
started, and lets the rest finish for a while; told again, it gives everything back at once.
"""

import asyncio
import logging
import random
import signal
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
from anyio.from_thread import BlockingPortal

from filao import sync
from filao.broker import Broker, connect
from filao.engine import HEALTHY, Feature, Outcome, Release
from filao.errors import ConfigurationError, EngineUnavailable, UnsupportedFeature
from filao.message import Message
from filao.queue import Queue, check_duration, check_name, not_found
from filao.worker.handlers import handler_of
from filao.worker.keeper import BLOCKED_AFTER, Keeper
from filao.worker.leaks import Leaks
from filao.worker.outcomes import Outcomes, check_outcomes
from filao.worker.pool import Pool
from filao.worker.run import ENDS_WITHIN, RETRY_MAX, Consumer, Ground, Handled, Run, WorkerGuarantee
from filao.worker.threads import Threads

log = logging.getLogger("filao.worker")

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

POLL = 5.0  # seconds after which a wait for messages begins anew, which shows that the queue can still be reached
SILENT_AFTER = (
    30.0  # seconds without a successful look, with room to start something, after which a consumer is unhealthy
)
HUNG_MAX = 10  # handlers that do not end: with more, so much of the process is lost that it is unhealthy
AT_ONCE = 0.5  # seconds for handlers to end when a worker stops at once
CONCURRENCY_MAX = 1_000  # messages at once in one process: what one receive and one group commit can carry
DRAINED_MAX = 10_000  # attempts of one `drain`, so that a handler that always releases does not run for ever


@dataclass(frozen=True, slots=True)
class Status:
    """How a worker is doing."""

    ready: bool
    """It has reached its engine and receives."""
    healthy: bool
    """Every consumer that has room has managed to poll lately, and the event loop turns."""
    running: dict[str, int]
    """Messages being worked on, by queue."""
    handled: int
    """Attempts that have ended."""
    problems: list[str]

    def told(self) -> str:
        """Return it in words, for the doctor."""
        how = HEALTHY if self.healthy else "ready" if self.ready else "not ready"
        running = ", ".join(f"{count:,} of {name!r} running" for name, count in self.running.items())
        return "; ".join([f"{how}, {running}, {self.handled:,} handled", *self.problems])


class Worker:
    """Handlers for the queues of one broker.

    `broker` is a URL or a path, which the worker opens when it runs, or an open `Broker` that it shares. `concurrency`
    bounds what all consumers run together, and shares it by their weights; without it each has its own bound. `grace`
    is how many seconds a worker that stops waits for what it runs.

        worker = filao.Worker("claims.db")

        @worker.consumer("claims.processing", concurrency=4, timeout=60)
        async def process_claim(message: filao.Message) -> None: ...

        asyncio.run(worker.run())  # or, in a shell: filao work app:worker --processes 3
    """

    def __init__(self, broker: str | Path | Broker, *, concurrency: int | None = None, grace: float = 30.0) -> None:
        if concurrency is not None:
            _check_count("worker", "concurrency", concurrency)
        check_duration("worker", "grace", grace)
        self._source = broker
        self._concurrency = concurrency
        self.grace = grace
        """Seconds for which a worker that stops waits for what it runs."""
        self._consumers: dict[str, Consumer] = {}
        self._declared: list[Queue[Any]] = []
        self._stopping: asyncio.Event | None = None
        self._at_once: asyncio.Event | None = None
        self._pools: list[Pool] = []
        self._runs: dict[asyncio.Task[None], Run] = {}
        self._hung: dict[asyncio.Task[None], Run] = {}
        """Handlers that were told to end, did not, and whose messages were settled without them."""
        self._not_begun: set[asyncio.Task[None]] = set()
        self._receiving: set[asyncio.Task[list[Message[Any]]]] = set()
        self._suspect: Run | None = None
        """The message that is to be handled alone."""
        self._moved = asyncio.Event()
        self._on_handled: Callable[[Handled], None] = lambda _: None
        self._ground: Ground | None = None
        self.handled = 0
        """How many attempts have ended."""

    # --- consumers ---------------------------------------------------------------------------------------------------

    def consumer(
        self,
        queue: str | Queue[Any],
        *,
        concurrency: int = 1,
        timeout: float | None = 600.0,
        guarantee: WorkerGuarantee = "at-least-once",
        weight: float = 1.0,
        outcomes: Outcomes | None = None,
    ) -> Callable[[F], F]:
        """Let the decorated function handle a queue's messages, up to `concurrency` at once in this process.

        A `Queue` is declared when the worker starts; a name must have been. A coroutine function runs on the event loop
        and gets `filao.Message`; a plain one runs in a thread and gets `filao.sync.Message`. Returning acknowledges;
        raising is a nack; `filao.Retry`, `Reject` and `Release` steer. `timeout` is how many seconds the handler may
        take (None: for ever) before it is cancelled and counts as failed; its lease is kept as long.

        `guarantee`: "at-least-once"; "at-most-once" deletes the message before the handler runs; "exactly-once" gives
        the handler a `filao.Transaction` as its second argument, in which its own statements, its sends and the
        acknowledgement commit together. It begins with the first statement: do what is slow before.

        `outcomes` maps exceptions to what shall become of the message, as `{ValueError: filao.Reject}`. `weight` is the
        consumer's part of the worker's `concurrency`. Raises `ConfigurationError`.
        """
        name = queue.name if isinstance(queue, Queue) else queue
        check_name(name)
        if name in self._consumers:
            raise _second(name, self._consumers[name])
        _check_count(f"consumer of {name!r}", "concurrency", concurrency)
        if timeout is not None:
            check_duration(f"consumer of {name!r}", "timeout", timeout, least=0.001)
        if guarantee not in ("at-most-once", "at-least-once", "exactly-once"):
            raise ConfigurationError(
                f'consumer of {name!r}: guarantee is {guarantee!r}; it must be "at-most-once", "at-least-once" or '
                f'"exactly-once"'
            )
        if not weight > 0:
            raise ConfigurationError(f"consumer of {name!r}: weight is {weight!r}; it must be above 0")
        mapped = dict(outcomes or {})
        check_outcomes(mapped)

        def register(function: F) -> F:
            handler = handler_of(function, with_transaction=guarantee == "exactly-once")
            rules = queue if isinstance(queue, Queue) else Queue(name)
            if handler.body is not None and rules.body not in (None, handler.body):
                raise ConfigurationError(
                    f"the handler {handler.name} asks for bodies of {handler.body!r}; queue {name!r} has {rules.body!r}"
                )
            if name in self._consumers:
                raise _second(name, self._consumers[name])
            if isinstance(queue, Queue):
                self._declared.append(queue)
            self._consumers[name] = Consumer(rules, handler, concurrency, timeout, guarantee, weight, mapped)
            return function

        return register

    @property
    def has_hung(self) -> bool:
        """Whether handlers have not ended though they were told to; a process may have to end without them."""
        return bool(self._hung)

    @property
    def queues(self) -> list[str]:
        """The names of the queues that it consumes."""
        return list(self._consumers)

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(self, *, until: Callable[[], bool] = lambda: False, ready: Callable[[], None] = lambda: None) -> None:
        """Work until told to stop: by SIGTERM or SIGINT in the main thread, or by `stop`.

        The first time, it finishes what it has begun, for `grace` seconds at most; the second time it stops at once.
        It reconnects for ever when its engine goes away. `ready` is called when it begins to receive; it stops when
        `until` says so after a message. Raises `QueueNotFound`, `UnsupportedFeature` and `ConfigurationError` at its
        start.
        """
        async with self._opened(self._source, forever=True) as ground, _signals(self.stop):
            assert self._stopping is not None
            stopping = self._stopping
            self._on_handled = lambda _: stopping.set() if until() else None
            ready()
            work = [asyncio.create_task(self._feed(ground, pool)) for pool in self._pools]
            work.append(asyncio.create_task(self._watch()))
            told = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait([told, *work], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.set()
                await _cancel(told, *work)
                await self._finish(self.grace)
            for task in work:
                if not task.cancelled():
                    task.result()

    def stop(self) -> None:
        """Stop gracefully; called again, at once. For the loop that runs the worker; harmless when it does not run."""
        if self._stopping is None or self._at_once is None:
            return
        (self._at_once if self._stopping.is_set() else self._stopping).set()

    async def drain(self, broker: Broker | None = None, *, limit: int = DRAINED_MAX) -> list[Handled]:
        """Handle everything that is ready, and what becomes ready meanwhile, and return what happened; for tests.

        `broker` is an open one to drain in place of the worker's own, such as `filao.connect("sqlite://:memory:")`.
        What is delayed, or comes again after a backoff, is left. It ends after `limit` attempts in any case.
        """
        handled: list[Handled] = []
        async with self._opened(self._source if broker is None else broker, forever=False) as ground:
            self._on_handled = handled.append
            try:
                while len(handled) + len(self._runs) < limit:
                    took = [
                        await self._sweep(ground, pool, limit - len(handled) - len(self._runs)) for pool in self._pools
                    ]
                    if self._runs:
                        await asyncio.wait(self._runs, return_when=asyncio.FIRST_COMPLETED)
                    elif not any(took):
                        break
                if self._runs:
                    await asyncio.wait(self._runs)
            finally:
                await self._finish(0.0)
        return handled

    def status(self) -> Status:
        """Tell how it is doing; safe from any thread."""
        now = time.monotonic()
        looking = [pool for pool in self._pools if not pool.is_full()] if self._suspect is None else []
        silent = [(pool, now - pool.polled_at) for pool in looking]
        problems = [
            f"the consumer of {' and '.join(map(repr, pool.consumers))} has not managed to poll for {seconds:.0f} s"
            for pool, seconds in silent
            if seconds > SILENT_AFTER
        ]
        if len(self._hung) > HUNG_MAX:
            problems.append(
                f"{len(self._hung)} handlers have not ended though they were cancelled: replace this process"
            )
        blocked = self._ground.keeper.blocked_for() if self._ground is not None else 0.0
        if blocked > BLOCKED_AFTER:
            problems.append(f"the event loop has been blocked for {blocked:.0f} s")
        running = {name: count for pool in self._pools for name, count in pool.running().items()}
        ready = self._ground is not None
        return Status(ready, ready and not problems, running, self.handled, problems)

    # --- opening -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _opened(self, source: str | Path | Broker, *, forever: bool) -> AsyncGenerator[Ground]:
        """Reach the engine, learn the queues, and provide all that runs need."""
        if not self._consumers:
            raise ConfigurationError("this worker has no consumers: decorate a function with @worker.consumer(queue)")
        if self._ground is not None or self._stopping is not None:
            raise ConfigurationError("this worker runs already")
        self._stopping, self._at_once = asyncio.Event(), asyncio.Event()
        try:
            async with AsyncExitStack() as stack:
                broker = source if isinstance(source, Broker) else connect(source)
                is_own = broker is not source
                if is_own:
                    stack.push_async_callback(broker.close)
                await _until_available(lambda: self._reach(broker, is_own=is_own), self._stopping, forever=forever)
                portal = await stack.enter_async_context(BlockingPortal())
                stack.push_async_callback(portal.stop, cancel_remaining=True)
                shortest = min(consumer.queue.lease for consumer in self._consumers.values())
                keeper = Keeper(broker, shortest, lambda: self.status().told())
                stack.push_async_callback(keeper.stop)
                await keeper.start()
                threads = Threads("filao handler")
                stack.callback(threads.close)
                blocking = sync.Broker.beside(broker, portal)
                leaks = Leaks()
                stack.enter_context(leaks.seen(asyncio.get_running_loop()))
                to_blocking = partial(sync.Transaction, portal)
                self._ground = Ground(broker, blocking, to_blocking, keeper, threads, leaks)
                self._pools = self._make_pools()
                yield self._ground
        finally:
            self._stopping = self._at_once = self._ground = None
            self._pools = []

    async def _reach(self, broker: Broker, *, is_own: bool) -> None:
        """Open the broker and learn the rules of all queues."""
        if is_own:
            await broker.open()
        await broker.declare(*self._declared)
        stored = {queue.name: queue for queue in await broker.queues()}
        for name, consumer in self._consumers.items():
            if name not in stored:
                raise not_found(name, stored)
            if consumer.guarantee == "exactly-once" and Feature.TRANSACTIONS not in broker.features:
                raise UnsupportedFeature(
                    f'consumer of {name!r}: guarantee="exactly-once" needs transactions, which this engine does not '
                    f"have. Use filao.Inbox with the default guarantee."
                )
            body = consumer.queue.body if consumer.handler.body is None else consumer.handler.body
            self._consumers[name] = replace(consumer, queue=replace(stored[name], body=body))

    def _make_pools(self) -> list[Pool]:
        if self._concurrency is not None:
            return [Pool(self._consumers.values(), self._concurrency)]
        return [Pool([consumer], consumer.concurrency) for consumer in self._consumers.values()]

    # --- feeding -----------------------------------------------------------------------------------------------------

    async def _feed(self, ground: Ground, pool: Pool) -> None:
        """Start messages whenever there is room for them, for ever."""
        pause = 0.0
        while True:
            await pool.has_room()
            while self._suspect is not None:
                self._moved.clear()
                await self._moved.wait()
                pool.polled_at = time.monotonic()  # it was not allowed to look
            try:
                await self._take(ground, pool)
            except EngineUnavailable as error:
                if not pause:
                    log.warning("the engine is away; trying again until it is back: %s", error)
                pause = min(2 * pause or 0.1, RETRY_MAX)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            else:
                if pause:
                    log.warning("the engine is back")
                pause = 0.0
                pool.polled_at = time.monotonic()

    async def _take(self, ground: Ground, pool: Pool) -> None:
        """Receive what can start now; wait a while when there is nothing."""
        if len(pool.consumers) == 1:
            (consumer,) = pool.consumers.values()
            for message in await self._receive(ground, consumer, pool.room(consumer.queue.name), POLL):
                self._start(ground, pool, consumer, message)
        elif not await self._sweep(ground, pool, pool.room()):
            await self._first_of(ground, pool)

    async def _sweep(self, ground: Ground, pool: Pool, limit: int) -> int:
        """Look into each queue in its turn, without waiting, and return how many messages were started."""
        started = 0
        for name in pool.turns.order():
            room = min(pool.room(name), limit - started)
            if room <= 0:
                continue
            share = pool.turns.share(name, room)
            messages = await self._receive(ground, pool.consumers[name], share, 0.0)
            for message in messages:
                self._start(ground, pool, pool.consumers[name], message)
            started += len(messages)
            if messages:
                pool.turns.took(name, len(messages))
            else:
                pool.turns.had_nothing(name)
        return started

    async def _first_of(self, ground: Ground, pool: Pool) -> None:
        """Wait for the first message of any queue; should others come in the same moment, they go back."""
        names = [name for name in pool.turns.order() if pool.room(name) > 0]
        waits = {name: asyncio.create_task(self._receive(ground, pool.consumers[name], 1, POLL)) for name in names}
        try:
            await asyncio.wait(waits.values(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for name, wait in waits.items():
                await _cancel(wait)
                if wait.cancelled() or wait.exception() is not None:
                    continue
                for message in wait.result():
                    if pool.room(name) > 0:
                        self._start(ground, pool, pool.consumers[name], message)
                        pool.turns.took(name, 1)
                    else:
                        await ground.broker.settle(message.delivery, Release())
        for wait in waits.values():
            if not wait.cancelled():
                wait.result()

    async def _receive(self, ground: Ground, consumer: Consumer, limit: int, wait: float) -> Sequence[Message[Any]]:
        """Receive, unless a suspect is here or comes meanwhile."""
        if self._suspect is not None:
            return []
        receive = ground.broker.receive_many(consumer.queue, limit, wait=wait)
        receiving = asyncio.get_running_loop().create_task(receive)
        self._receiving.add(receiving)
        try:
            return await receiving
        except asyncio.CancelledError:
            if receiving.cancelled() and not _current().cancelling():
                return []  # by a suspect
            for message in _came(receiving):
                await ground.broker.settle(message.delivery, Release())
            raise
        finally:
            self._receiving.discard(receiving)
            self._moved.set()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _start(self, ground: Ground, pool: Pool, consumer: Consumer, message: Message[Any]) -> None:
        run = Run(ground, consumer, message, lambda: self._give_up(pool, run))
        run.keep()  # from now on, not from its first step: another handler may block the loop before
        pool.began(consumer.queue.name)
        if message.delivery.crashed and self._suspect is None:
            self._suspect = run
            for receiving in self._receiving:
                receiving.cancel()
        task = asyncio.get_running_loop().create_task(self._live(pool, run))
        self._runs[task] = run

    async def _live(self, pool: Pool, run: Run) -> None:
        """Run a message when it may, and make room for the next as soon as its handler has ended."""
        task = asyncio.current_task()
        assert task is not None
        try:
            try:
                outcome = await self._work(task, run)
            finally:
                if task in self._runs:
                    pool.ended(
                        run.queue
                    )  # before it is settled, so that the next receive joins the settle's transaction
            handled = await run.settle(outcome)
        except Exception:
            log.exception("%s: an error of the worker's own; its lease runs out", run.about())
            return
        finally:
            self._hung.pop(task, None)
            self._forget(task, run)
        self.handled += 1
        self._on_handled(handled)

    def _give_up(self, pool: Pool, run: Run) -> None:
        """Let others have the place of a handler that does not end, and whose message is settled without it."""
        task = next(task for task, one in self._runs.items() if one is run)
        self._hung[task] = run
        pool.ended(run.queue)
        self._forget(task, run)

    def _forget(self, task: "asyncio.Task[None]", run: Run) -> None:
        self._runs.pop(task, None)
        if run is self._suspect:
            self._suspect = None
        self._moved.set()

    async def _work(self, task: "asyncio.Task[None]", run: Run) -> Outcome | None:
        if run.delivery.crashed and run is not self._suspect:
            return Release()  # one at a time: another process may have room for it
        if run is self._suspect:
            try:
                await self._be_alone(task, run)
            except _NotBegunError:
                return Release()
        return await run.work()

    async def _be_alone(self, task: "asyncio.Task[None]", run: Run) -> None:
        """Wait until this process holds no other message, nor asks for any: should it die, only this one was there."""
        log.warning("%s: its last consumer's process died; it is handled alone, in case it dies of it", run.about())
        self._not_begun.add(task)
        try:
            while self._receiving or len(self._runs) > 1:
                self._moved.clear()
                await self._moved.wait()
        except asyncio.CancelledError as error:
            while task.cancelling():
                task.uncancel()
            raise _NotBegunError from error
        finally:
            self._not_begun.discard(task)

    # --- stopping ----------------------------------------------------------------------------------------------------

    async def _finish(self, grace: float) -> None:
        """Give back what has not begun, let the rest finish for a while, and end what does not."""
        assert self._at_once is not None
        for task in list(self._not_begun):
            task.cancel()
        told = asyncio.create_task(self._at_once.wait())
        await self._wait_for_runs(grace, told)
        for run in list(self._runs.values()):
            run.end("stopped")
        await self._wait_for_runs(ENDS_WITHIN, told)
        await _cancel(told)
        await self._wait_for_runs(AT_ONCE)
        for task, run in list(self._runs.items()):
            self._hung[task] = run
            with suppress(EngineUnavailable, asyncio.TimeoutError):
                async with asyncio.timeout(AT_ONCE):
                    await run.abandon()
            task.cancel()
        await asyncio.sleep(0)

    async def _wait_for_runs(self, seconds: float, *until: "asyncio.Task[Any]") -> None:
        deadline = time.monotonic() + seconds
        while self._runs and not any(task.done() for task in until):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            await asyncio.wait([*self._runs, *until], timeout=left, return_when=asyncio.FIRST_COMPLETED)

    async def _watch(self) -> None:
        """Report consumers that have not managed to poll."""
        while True:
            await asyncio.sleep(SILENT_AFTER / 2)
            for problem in self.status().problems:
                log.error("%s", problem)


def _second(queue: str, first: Consumer) -> ConfigurationError:
    return ConfigurationError(
        f"queue {queue!r} has a consumer in this worker already, {first.handler.name}: two would take each other's messages. "
        f"Let one function handle both kinds, or use two queues."
    )


class _NotBegunError(Exception):
    """The worker stopped before a message's handler began."""


async def _until_available(reach: Callable[[], Awaitable[None]], stopping: asyncio.Event, *, forever: bool) -> None:
    """Do it, again and again while the engine is away; being told to stop ends that."""
    pause = 0.1
    while True:
        try:
            return await reach()
        except EngineUnavailable as error:
            if not forever or stopping.is_set():
                raise
            log.warning("the engine cannot be reached; trying again: %s", error)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause * random.uniform(0.5, 1.5)):
                await stopping.wait()
        pause = min(2 * pause, RETRY_MAX)


@asynccontextmanager
async def _signals(stop: Callable[[], None]) -> AsyncGenerator[None]:
    """Call `stop` at each SIGTERM and SIGINT, if this is the main thread, which alone is told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:

        async def listen() -> None:
            async for _ in received:
                stop()

        listening = asyncio.create_task(listen())
        try:
            yield
        finally:
            await _cancel(listening)


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _came(receiving: "asyncio.Task[list[Message[Any]]]") -> list[Message[Any]]:
    """Return what came in the very moment in which whoever asked for it was cancelled."""
    if not receiving.done() or receiving.cancelled() or receiving.exception() is not None:
        return []
    return receiving.result()


def _current() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None
    return task


def _check_count(owner: str, what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= CONCURRENCY_MAX:
        raise ConfigurationError(f"{owner}: {what} is {value!r}; it must be a whole number from 1 to {CONCURRENCY_MAX}")
