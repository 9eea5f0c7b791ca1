"""The worker: it receives from queues, calls their handlers, keeps the leases meanwhile, and settles as they decide.

Here is what is declared, and what a run needs; `shift.py` is one run. A worker receives only what it can start now. A
message whose last consumer's process died is handled alone, so that if it kills this process too, no other message
loses an attempt. Told to stop, a worker receives no more, gives back what has not started, and lets the rest finish for
a while; told again, it gives everything back at once.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from filao import sync
from filao.broker import Broker, connect, session_of
from filao.calls import Caller
from filao.checks import check_count, check_duration, check_name, check_number
from filao.codec import codec_for, shown
from filao.engine import Engine, Feature, OpenAgain
from filao.errors import ConfigurationError, EngineError, FilaoError, UnsupportedFeature
from filao.guarded import Log
from filao.message import Message
from filao.observing import Observer, Tracer
from filao.outside import outside
from filao.queue import Queue, T, not_found
from filao.worker.handlers import Consumer, WorkerGuarantee, check_body, handler_of
from filao.worker.handling import Shared
from filao.worker.keeper import Keeper
from filao.worker.outage import Outages, pauses
from filao.worker.outcomes import Outcomes, check_outcomes
from filao.worker.pool import Pool
from filao.worker.run import Handled
from filao.worker.shift import Shift, Status, Stop, at_rest, cancel
from filao.worker.signals import clean_forks, told_by_signals
from filao.worker.strays import Strays
from filao.worker.surroundings import Lifespan, Middleware, Surroundings, check_lifespan, lived, supplied
from filao.worker.threads import Threads

log: Log = Log(logging.getLogger("filao.worker"))

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L", bound=Lifespan)
M = TypeVar("M", bound=Middleware)

CONCURRENCY_MAX = 1_000  # messages at once in one process: as many as one receive and one group commit can take
WEIGHT_MIN, WEIGHT_MAX = 1e-6, 1e6  # parts of a capacity: if two are further apart, one never has a turn
DRAINED_MAX = 10_000  # attempts of one `drain`, so that a handler that always releases does not run for ever


class Registering(Protocol[T]):
    """Takes a handler of messages with such bodies: a coroutine function, or a plain one with `filao.sync.Message`."""

    @overload
    def __call__(
        self, function: Callable[Concatenate[Message[T], P], Awaitable[R]], /
    ) -> Callable[Concatenate[Message[T], P], Awaitable[R]]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[sync.Message[T], P], R], /
    ) -> Callable[Concatenate[sync.Message[T], P], R]: ...


class Worker:
    """Handlers for the queues of one broker.

    `broker` is what `filao.connect` takes, or a `Broker` that it shares; while it runs, it opens what is not open.
    `concurrency` bounds how many messages all consumers together handle at once, shared by their weights; without it,
    each has only its own bound. `grace` is how many seconds a stopping worker waits for what it runs.

        worker = filao.Worker("claims.db")

        @worker.consumer("claims.processing", concurrency=4, timeout=60)
        async def process_claim(message: filao.Message) -> None: ...

        asyncio.run(worker.run())  # or, in a shell: filao work app:worker --processes 3
    """

    def __init__(
        self,
        broker: str | Path | Callable[[], Engine] | Broker,
        *,
        concurrency: int | None = None,
        grace: float = 30.0,
    ) -> None:
        if concurrency is not None:
            check_count("worker", "concurrency", concurrency, most=CONCURRENCY_MAX)
        check_duration("worker", "grace", grace)
        _check_broker(broker)
        self._source = broker
        self._concurrency = concurrency
        self.grace = grace
        """Seconds for which a stopping worker waits for what it runs."""
        self._consumers: dict[str, Consumer] = {}
        self._declared: list[Queue[Any]] = []
        self._lifespans: list[Lifespan] = []
        self._surroundings = Surroundings()
        self._tell: Callable[[], None] = _nobody
        """Tells the present run to stop."""
        self._status: Callable[[int], Status] = at_rest
        """Asks the present run how it is doing, once it has reached the engine."""
        self.observers: list[Observer | Tracer] = []
        """Are told what it does while it runs; see `filao.Observer` and `filao.Tracer`."""
        self.handled = 0
        """How many attempts have ended."""
        self.has_hung: bool = False
        """Whether the last run left handlers or a lifespan behind that did not end when told to; the process can end
        without them.
        """

    # --- consumers ---------------------------------------------------------------------------------------------------

    def consumer(
        self,
        queue: str | Queue[T],
        *,
        concurrency: int = 1,
        timeout: float | None = 600.0,
        guarantee: WorkerGuarantee = "at-least-once",
        weight: float = 1.0,
        outcomes: Outcomes | None = None,
    ) -> "Registering[T]":
        """Let the decorated function handle a queue's messages, up to `concurrency` at once in this process.

        A `Queue` is declared when the worker starts; a queue given by name must have been declared. A coroutine
        function runs on the event loop and gets `filao.Message`; a plain one runs in a thread and gets
        `filao.sync.Message`. Returning acknowledges; raising is a nack; `filao.Retry`, `Reject` and `Release` decide
        otherwise. `timeout` is how many seconds the handler may take (None: for ever) before it is cancelled and counts
        as failed; its lease is kept as long.

        `guarantee`: "at-least-once"; "at-most-once" deletes the message before the handler runs; "exactly-once" gives
        the handler a `filao.Transaction` as its second argument, in which its own statements, its sends and the
        acknowledgement commit together. It begins with the first statement, so do slow work before that.

        `outcomes` maps exceptions to what becomes of the message, such as `{ValueError: filao.Reject}`. `weight` is the
        consumer's part of the worker's `concurrency`. Raises `ConfigurationError`.
        """
        if inspect.isroutine(queue):
            raise ConfigurationError("the consumer has no queue: write @worker.consumer(queue), with its name say")
        name = queue.name if isinstance(queue, Queue) else queue
        check_name(name)
        self._check_first(name)
        _check_terms(name, concurrency, timeout, guarantee, weight)
        mapped = check_outcomes(outcomes)

        def register(function: F) -> F:
            handler = handler_of(function, with_transaction=guarantee == "exactly-once")
            rules = queue if isinstance(queue, Queue) else Queue(name)
            check_body(handler, rules)
            self._check_first(name)
            if isinstance(queue, Queue):
                self._declared.append(queue)
            self._consumers[name] = Consumer(rules, handler, concurrency, timeout, guarantee, weight, mapped)
            return function

        return cast("Registering[T]", register)

    def _check_first(self, queue: str) -> None:
        if queue in self._consumers:
            raise ConfigurationError(
                f"queue {queue!r} has a consumer in this worker already, {self._consumers[queue].handler.name}: two "
                f"would take each other's messages. Let one function handle both kinds, or use two queues."
            )

    def lifespan(self, function: L) -> L:
        """Let the decorated generator function open what a process needs once, such as a pool of connections.

        It runs on the event loop: up to its `yield` before messages are received, and on from there when the worker has
        stopped and handlers have ended, within 30 s. A handler gets the value that it yields by a parameter of that
        type, after the message (and the transaction). An error that it raises ends the worker.
        """
        check_lifespan(function)
        self._lifespans.append(function)
        return function

    def middleware(self, function: M) -> M:
        """Let the decorated generator function wrap each handler, for error reports, timing or a tenant, say.

        It gets the message, and yields once while the handler runs. It sees the handler's exception; one that it lets
        through decides what becomes of the message, and one that it suppresses makes the message done, unless the
        handler was told to end. An `async def` runs on the event loop; a plain function runs inside those, where the
        handler does: for a plain handler, in its thread. The first is outermost. The timeout counts for all of them.
        """
        self._surroundings.add(function)
        return function

    def only(self, queues: Iterable[str]) -> None:
        """Consume only these of its queues from now on.

        Raises `ConfigurationError` for a queue for which it has no consumer.
        """
        chosen = list(queues)
        for name in chosen:
            if name not in self._consumers:
                raise ConfigurationError(
                    f"this worker has no consumer of queue {name!r}; it has those of "
                    f"{', '.join(map(repr, self._consumers))}"
                )
        self._consumers = {name: self._consumers[name] for name in self._consumers if name in chosen}
        self._declared = [queue for queue in self._declared if queue.name in chosen]

    @property
    def queues(self) -> list[str]:
        """The names of the queues that it consumes."""
        return list(self._consumers)

    # --- running -----------------------------------------------------------------------------------------------------

    async def run(
        self,
        *,
        until: Callable[[], bool] = lambda: False,
        ready: Callable[[], None] = lambda: None,
        signals: bool = True,
        until_idle: bool = False,
    ) -> bool:
        """Work until told to stop: by SIGTERM, SIGINT or SIGHUP in the main thread, or by `stop`.

        The first time, it finishes what it has begun, within `grace` seconds; the second time it stops at once. The
        program's own handlers of these signals are called as well, and are back afterwards. SIGHUP, as when a terminal
        is closed, counts only as a first time; the program ends by it afterwards, and where it would not, SIGHUP stops
        no worker. With `signals=False` the signals are left to the program, which calls `stop`.

        With `until_idle` it stops as well, and returns True, once it finds nothing to receive in any of its queues and
        none of its handlers runs. What is delayed, comes again after a backoff, or is leased by others, is left. If
        its storage is away at its start, it raises `EngineError`; so it does, once all else is done, if it could never
        receive from a queue.

        While its storage is away, full, locked or read-only, or a queue is deleted, it waits and tries again for as
        long as that takes. `ready` is called when it begins to receive. `until` is called after each message; when it
        returns True, the worker stops. Raises `QueueNotFound`, `UnsupportedFeature` and `ConfigurationError` at its
        start. Later it raises only what `until` raises, `ConfigurationError` when its broker was closed, and
        `EngineError` when another file has taken the place of its own, after a restore, say: start it again to work
        with that file.
        """

        def on_handled(_: Handled) -> None:
            if until():
                stop.told.set()

        with self._once() as stop, told_by_signals(stop.tell) if signals else nullcontext():
            async with _opened(self._source) as broker:
                reach = partial(self._reach, broker, opens=not session_of(broker).is_open)
                consumers = await _reached(reach, stop, patient=not until_idle)
                if consumers is None:
                    return False
                async with lived(self._lifespans, stop.told, self._hangs) as values:
                    if values is None:
                        return False
                    async with self._on_shift(broker, _supplied(consumers, values), stop, on_handled) as shift:
                        ready()
                        return await shift.work(self.grace, until_idle=until_idle)

    def stop(self) -> None:
        """Stop gracefully, or at the second call at once. From any thread; harmless if it does not run."""
        self._tell()

    async def drain(self, broker: Broker | None = None, *, limit: int = DRAINED_MAX) -> list[Handled]:
        """Handle everything that is ready, and what becomes ready meanwhile, and return what happened; for tests.

        `broker` is a broker to use in place of the worker's own, such as an open `filao.connect("sqlite://:memory:")`.
        What is delayed, or comes again after a backoff, is left. It ends after `limit` attempts in any case.
        """
        handled: list[Handled] = []
        _check_broker(broker)
        with self._once() as stop:
            async with _opened(self._source if broker is None else broker) as reached:
                consumers = await self._reach(reached, opens=not session_of(reached).is_open)
                async with lived(self._lifespans, stop.told, self._hangs) as values:
                    consumers = _supplied(consumers, values or [])
                    async with self._on_shift(reached, consumers, stop, handled.append, patient=False) as shift:
                        await shift.drain(limit)
        return handled

    def status(self) -> Status:
        """Return how it is doing. May be called from any thread."""
        return self._status(self.handled)

    # --- opening -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _once(self) -> Generator[Stop]:
        """Refuse to run twice at the same time."""
        if not self._consumers:
            raise ConfigurationError("this worker has no consumers: decorate a function with @worker.consumer(queue)")
        if self._tell is not _nobody:
            raise ConfigurationError("this worker runs already")
        stop = Stop()
        self._tell = stop.tell_from_any_thread
        try:
            with clean_forks():
                yield stop
        finally:
            self._tell = _nobody

    async def _reach(self, broker: Broker, *, opens: bool) -> dict[str, Consumer]:
        """Open the broker, if the worker `opens` it, and return the consumers with the rules of their queues."""
        if opens:
            await broker.open()
        await broker.declare(*self._declared)
        # A queue of ours that is deleted before the look is waited for, as it is later.
        stored = {queue.name: queue for queue in (*self._declared, *await broker.queues())}
        consumers: dict[str, Consumer] = {}
        for name, consumer in self._consumers.items():
            if name not in stored:
                raise not_found(name, stored)
            if consumer.guarantee == "exactly-once" and Feature.TRANSACTIONS not in broker.features:
                raise UnsupportedFeature(
                    f'consumer of {name!r}: guarantee="exactly-once" needs transactions, which this engine does not '
                    f"have. Use filao.Inbox with the default guarantee."
                )
            body = consumer.queue.body if consumer.handler.body is None else consumer.handler.body
            codec_for(body)  # it raises now what each receive would raise
            consumers[name] = replace(consumer, queue=replace(stored[name], body=body))
        return consumers

    @asynccontextmanager
    async def _on_shift(
        self,
        broker: Broker,
        consumers: Mapping[str, Consumer],
        stop: Stop,
        on_handled: Callable[[Handled], None],
        *,
        patient: bool = True,
    ) -> AsyncGenerator[Shift]:
        """Provide all that runs need, and clear it away on leaving."""

        def count(handled: Handled) -> None:
            self.handled += 1
            on_handled(handled)

        async with AsyncExitStack() as stack:
            for observer in [one for one in self.observers if one not in broker.observers]:
                broker.observers.add(observer)
                stack.callback(broker.observers.remove, observer)
            shared = await self._shared(broker, min(one.queue.lease for one in consumers.values()), stack)
            shift = Shift(shared, self._pools(consumers), stop, count, patient=patient)
            stack.callback(shift.pulse.stop)
            self._status = shift.status
            try:
                yield shift
            finally:
                self.has_hung = bool(shift.hung)
                self._status = at_rest

    async def _shared(self, broker: Broker, shortest_lease: float, stack: AsyncExitStack) -> Shared:
        """Make what all runs share; the stack clears it away."""
        session, loop = session_of(broker), asyncio.get_running_loop()
        caller = Caller(loop, loop_thread=threading.get_ident())
        stack.callback(caller.end, "the worker has stopped, so this message is settled without its handler")
        keeper = Keeper(session, shortest_lease, lambda: self.status().told())
        stack.push_async_callback(keeper.stop)
        await keeper.start()
        threads = Threads("filao handler")
        stack.callback(threads.close)
        strays = Strays()
        stack.enter_context(strays.seen(loop))
        beyond, around = outside(session, caller), self._surroundings
        return Shared(broker, session, caller, beyond, keeper, threads, strays, Outages(), around)

    def _hangs(self) -> None:
        self.has_hung = True

    def _pools(self, consumers: Mapping[str, Consumer]) -> list[Pool]:
        if self._concurrency is not None:
            return [Pool(consumers.values(), self._concurrency)]
        return [Pool([consumer], consumer.concurrency) for consumer in consumers.values()]


@asynccontextmanager
async def _opened(source: str | Path | Callable[[], Engine] | Broker) -> AsyncGenerator[Broker]:
    """Give the program's own broker, or make one; the caller opens what is not open, and on leaving it is closed."""
    if isinstance(source, Broker) and session_of(source).is_open:
        yield source
        return
    broker = source if isinstance(source, Broker) else connect(source)
    try:
        yield broker
    finally:
        try:
            await broker.close()
        except FilaoError as error:
            log.warning("the worker has ended, but what it held may have to wait for its leases to end: %s", error)


async def _reached(
    reach: Callable[[], Awaitable[dict[str, Consumer]]], stop: Stop, *, patient: bool
) -> dict[str, Consumer] | None:
    """Call `reach`, again and again while the engine fails and we are `patient`; return None once told to stop."""
    outages = Outages()
    told = asyncio.create_task(stop.told.wait())
    try:
        for pause in pauses():
            reaching = asyncio.ensure_future(reach())
            try:
                await asyncio.wait([reaching, told], return_when=asyncio.FIRST_COMPLETED)
                if told.done():
                    return None
                consumers = reaching.result()
            except OpenAgain:
                raise
            except EngineError as error:
                if not patient:
                    raise
                outages.fails("reaching the engine", error)
            else:
                outages.is_over("reaching the engine")
                return consumers
            finally:
                await cancel(reaching)
            await asyncio.wait([told], timeout=pause)
    finally:
        await cancel(told)
    raise AssertionError("pauses have no end")


def _supplied(consumers: Mapping[str, Consumer], values: Sequence[Any]) -> dict[str, Consumer]:
    """Return the consumers, whose handlers have the lifespans' values."""
    return {name: replace(one, handler=supplied(one.handler, values)) for name, one in consumers.items()}


def _nobody() -> None:
    """Do nothing: no run can be told to stop."""


def _check_broker(broker: object) -> None:
    """Raise `ConfigurationError` for a blocking broker, which has an event loop of its own."""
    if isinstance(broker, sync.Broker):
        raise ConfigurationError(
            "a worker cannot share a filao.sync.Broker, which has an event loop of its own: give the URL, or a "
            "filao.Broker; in tests, filao.testing.drain(worker, broker)"
        )


def _check_terms(name: str, concurrency: int, timeout: float | None, guarantee: str, weight: float) -> None:
    check_count(f"consumer of {name!r}", "concurrency", concurrency, most=CONCURRENCY_MAX)
    if timeout is not None:
        check_duration(f"consumer of {name!r}", "timeout", timeout, least=0.001)
    if guarantee not in ("at-most-once", "at-least-once", "exactly-once"):
        raise ConfigurationError(
            f'consumer of {name!r}: guarantee is {shown(guarantee)}; it must be "at-most-once", "at-least-once" or '
            f'"exactly-once"'
        )
    check_number(f"consumer of {name!r}", "weight", weight, least=WEIGHT_MIN, most=WEIGHT_MAX)
