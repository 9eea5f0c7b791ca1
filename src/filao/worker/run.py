"""One attempt at one message: its handler runs while the lease is kept, and it ends in one settle.

Two clocks run. The lease says that the worker lives: the keeper extends it. The timeout says how long the handler may
take. Whoever ends a run early (its timeout, a lost lease, a worker that stops) says why, and the handler is cancelled:
a coroutine at its next await, a thread at its next bytecode. One that will not end is settled without it.
"""

import asyncio
import inspect
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from filao import engine, sync
from filao.broker import Broker
from filao.errors import EngineUnavailable, FilaoError, LeaseLost
from filao.message import AT_MOST_ONCE, Message
from filao.queue import Queue, retry_delay
from filao.worker.handlers import Handler
from filao.worker.keeper import Keeper
from filao.worker.leaks import Leaks
from filao.worker.outcomes import Outcomes, of_error, of_value
from filao.worker.threads import Call, Threads

log = logging.getLogger("filao.worker")

WorkerGuarantee = Literal["at-most-once", "at-least-once", "exactly-once"]
Why = Literal["timeout", "lost", "stopped"]
How = Literal["acked", "retried", "dead", "released", "lost", "failed", "settled"]

ENDS_WITHIN = 5.0  # seconds that a cancelled handler may take to end before its message is settled without it
RETRY_MAX = 5.0  # seconds between two tries while the engine is away


@dataclass(frozen=True, slots=True)
class Consumer:
    """A queue, its handler, and how the two go together."""

    queue: Queue[Any]
    handler: Handler
    concurrency: int
    timeout: float | None
    guarantee: WorkerGuarantee
    weight: float
    outcomes: Outcomes


@dataclass(frozen=True, slots=True)
class Handled:
    """What happened to a message in one attempt."""

    queue: str
    id: str
    attempt: int
    how: How
    """acked, retried (it comes again), dead (it does not), released, lost (another consumer has it now), failed (it was
    received at most once, and is gone), settled (its handler did it by itself)."""
    error: str
    """What the handler raised, with its traceback; empty when it did not."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Ground:
    """What all runs of a worker share."""

    broker: Broker
    blocking: sync.Broker
    to_blocking: Callable[[Any], sync.Transaction]
    keeper: Keeper
    threads: Threads
    leaks: Leaks


class _Undone(Exception):
    """Leaves a transaction that a handler steered away from."""

    def __init__(self, outcome: engine.Outcome) -> None:
        self.outcome = outcome


class Run:
    """Runs a message's handler once; see `filao.worker.keeper.Kept` for what the keeper sees of it."""

    __slots__ = (
        *(
            "_abandoning",
            "_began",
            "_call",
            "_consumer",
            "_given_up",
            "_ground",
            "_message",
            "_task",
            "_why",
            "delivery",
            "extended_at",
        ),
        *("keep_until", "lease", "settling"),
    )

    def __init__(
        self, ground: Ground, consumer: Consumer, message: Message[Any], given_up: Callable[[], None] = lambda: None
    ) -> None:
        self._ground = ground
        self._given_up = given_up
        self._consumer = consumer
        self._message = message
        self._task: asyncio.Task[Any] | None = None
        self._call: Call | None = None
        self._why: Why | None = None
        self._abandoning: asyncio.TimerHandle | None = None
        self._began = 0.0
        self.settling: asyncio.Task[How] | None = None
        """Settles the message without its handler, which does not end."""
        self.delivery = message.delivery
        self.lease = consumer.queue.lease
        self.extended_at = time.monotonic()
        self.keep_until: float | None = None

    @property
    def queue(self) -> str:
        """The name of the queue."""
        return self._consumer.queue.name

    def about(self) -> str:
        """Return the words for it in the log."""
        return f"message {self.delivery.id} of {self.queue!r}, attempt {self.delivery.attempt}"

    def keep(self) -> None:
        """Let its lease be extended until the run ends."""
        if self._consumer.guarantee != "at-most-once":  # which has none while its handler runs
            self._ground.keeper.keep(self)

    async def work(self) -> engine.Outcome | None:
        """Run the handler to its end, and return what shall become of the message; None when that has happened."""
        self._began = time.monotonic()
        self._task = asyncio.current_task()
        timer = None
        timeout = self._consumer.timeout
        children = self._ground.leaks.begin()
        if timeout is not None:
            self.keep_until = self._began + timeout + ENDS_WITHIN
            timer = asyncio.get_running_loop().call_later(timeout, self.end, "timeout")
        try:
            if self._consumer.guarantee == "at-most-once" and not await self._consume():
                return None
            return await self._handle()
        except BaseException as raised:
            if self._is_cancelled_from_outside(raised):
                raise
            return await self._outcome_of(raised)
        finally:
            self._task = None
            if children:
                self._ground.leaks.report(self._consumer.handler.name, children)
            for handle in (timer, self._abandoning):
                if handle is not None:
                    handle.cancel()

    async def settle(self, outcome: engine.Outcome | None) -> Handled:
        """End the lease as the handler decided."""
        self.keep_until = None
        error = outcome.error if isinstance(outcome, (engine.Nack, engine.Reject)) else ""
        seconds = time.monotonic() - self._began if self._began else 0.0
        try:
            how = await (self.settling or self._settle(outcome))
        finally:
            self._ground.keeper.let_go(self)
        return Handled(self.queue, self.delivery.id, self.delivery.attempt, how, error, seconds)

    def end(self, why: Why) -> None:
        """End the handler early; harmless when it has ended."""
        if self._task is None or self._why is not None:
            return
        self._why = why
        self._abandoning = asyncio.get_running_loop().call_later(ENDS_WITHIN, self._give_up)
        if self._call is not None:
            self._call.interrupt()
        else:
            self._task.cancel()

    def lose(self) -> None:
        """End the handler because another consumer has the message."""
        self.end("lost")

    async def _consume(self) -> bool:
        """Delete the message before its handler runs; return whether that is done, so that it may."""
        try:
            await self._ground.broker.settle(self.delivery, engine.Ack(before_work=True))
        except LeaseLost as error:
            log.warning("%s", error)
            return False
        except EngineUnavailable as error:
            log.warning("%s: it is open whether it was deleted, so its handler does not run: %s", self.about(), error)
            return False
        self._message.mark_settled(AT_MOST_ONCE)
        return True

    # --- the handler -------------------------------------------------------------------------------------------------

    async def _handle(self) -> engine.Outcome | None:
        """Return what the handler decided; None when that has happened already."""
        if self._consumer.guarantee != "exactly-once":
            return of_value(await self._invoke())
        try:
            async with self._ground.broker.deferred_transaction_for(self._message) as transaction:
                outcome = of_value(await self._invoke(transaction))
                if not isinstance(outcome, engine.Ack):
                    raise _Undone(outcome)
        except _Undone as undone:
            return undone.outcome
        return None

    async def _invoke(self, *transaction: Any) -> Any:
        function = self._consumer.handler.function
        if self._consumer.handler.is_async:
            return await function(self._message, *transaction)
        blocking = [self._ground.to_blocking(one) for one in transaction]
        self._call = self._ground.threads.start(function, sync.Message(self._ground.blocking, self._message), *blocking)
        result = await self._call.future
        if inspect.iscoroutine(result):  # a plain wrapper around a coroutine function: nothing has run
            result.close()
            raise TypeError(
                f"the handler {self._consumer.handler.name} is a plain function, and returned a coroutine that nobody runs: "
                f"make it `async def`, and await in it"
            )
        return result

    def _is_cancelled_from_outside(self, raised: BaseException) -> bool:
        """Return whether the task itself is to end; a handler may also let a cancellation of its own escape."""
        if isinstance(raised, KeyboardInterrupt):
            return True
        return isinstance(raised, asyncio.CancelledError) and self._why is None and bool(_current().cancelling())

    async def _outcome_of(self, raised: BaseException) -> engine.Outcome | None:
        """Return what becomes of the message when its handler raised."""
        if self._why is None:
            self._log_failure(raised)
            return of_error(raised, self._consumer.outcomes)
        while _current().cancelling():
            _current().uncancel()
        if self._why == "lost":
            log.warning("%s: its lease was lost, so its handler was cancelled; another consumer has it", self.about())
        return self._outcome_of_end()

    def _outcome_of_end(self) -> engine.Outcome | None:
        if self._why == "timeout":
            text = f"TimeoutError: the handler ran longer than its timeout of {self._consumer.timeout:g} s"
            log.warning("%s: %s", self.about(), text)
            return engine.Nack(error=text)
        return engine.Release() if self._why == "stopped" else None

    def _log_failure(self, raised: BaseException) -> None:
        if of_error(raised, self._consumer.outcomes) != engine.Release():
            trace = (type(raised), raised, raised.__traceback__)
            log.warning("%s failed: %s: %s", self.about(), type(raised).__name__, raised, exc_info=trace)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        log.error(
            "%s: its handler %s was cancelled %g s ago and still runs; the message is settled without it",
            *(self.about(), self._consumer.handler.name, ENDS_WITHIN),
        )
        self.abandon()
        self._given_up()

    def abandon(self) -> "asyncio.Task[How]":
        """Settle without the handler, which was cancelled and does not end."""
        if self.settling is None:
            self._ground.keeper.let_go(self)
            self.settling = asyncio.get_running_loop().create_task(self._settle(self._outcome_of_end()))
        return self.settling

    async def _settle(self, outcome: engine.Outcome | None) -> How:
        """End the lease, however long the engine is away; whoever has lost it meanwhile has nothing to end."""
        if self._message.settled:
            if self._consumer.guarantee == "at-most-once":
                return "acked" if isinstance(outcome, engine.Ack) else "failed"
            return "acked" if outcome is None else "settled"
        if outcome is None:
            return "lost"
        pause = 0.1
        while True:
            try:
                await self._ground.broker.settle(self.delivery, outcome)
            except LeaseLost as error:
                log.warning("%s", error)
                return "lost"
            except EngineUnavailable as error:
                log.warning("%s could not be settled; trying again: %s", self.about(), error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, RETRY_MAX)
            except FilaoError:
                log.exception("%s could not be settled", self.about())
                return "lost"
            else:
                self._message.mark_settled("settled by its worker")
                return self._how(outcome)

    def _how(self, outcome: engine.Outcome) -> How:
        if isinstance(outcome, engine.Nack):
            return "dead" if retry_delay(self._consumer.queue, self.delivery.attempt, 0.0) is None else "retried"
        if isinstance(outcome, engine.Ack):
            return "acked"
        return "released" if isinstance(outcome, engine.Release) else "dead"


def _current() -> "asyncio.Task[Any]":
    task = asyncio.current_task()
    assert task is not None
    return task
