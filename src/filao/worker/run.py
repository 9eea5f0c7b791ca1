"""One attempt at one message: its handler runs while the lease is kept, and the run ends in one settle.

Invariant: whatever a handler does, its run ends in a settle; and if there is a transaction, it is undone unless the
handler's work is done. (`handling.py` runs the handler.)
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import msgspec

from filao import engine
from filao.errors import (
    ConfigurationError,
    EngineError,
    EngineUnavailable,
    LeaseLost,
    QueueNotFound,
    UnsupportedFeature,
)
from filao.guarded import Log, failure_of
from filao.message import AT_MOST_ONCE, Message, deferred_transaction_for, delivery_of, error_text, mark_settled
from filao.overview import raised_line
from filao.queue import retry_delay
from filao.worker.handlers import Consumer
from filao.worker.handling import ENDS_WITHIN, NEVER_ENDED, Handling, Raised, Shared, Why
from filao.worker.outage import pauses
from filao.worker.outcomes import is_decision, of_error, of_value, without_our_frames

log: logging.Logger = logging.getLogger("filao.worker")

P = ParamSpec("P")
R = TypeVar("R")
How = Literal["acked", "retried", "dead", "released", "lost", "failed", "settled"]


@dataclass(frozen=True, slots=True)
class Handled:
    """What happened to a message in one attempt."""

    queue: str
    id: str
    attempt: int
    how: How
    """acked, retried (it comes again), dead (it does not), released, lost (this worker no longer holds it), failed (it
    was received at most once, and is gone), settled (its handler settled it itself).
    """
    error: str
    """What the handler raised, with its traceback; empty when it raised nothing."""
    seconds: float


class _Undone(Exception):
    """Leaves the block of a transaction that must not be committed."""


class _NoHandling:
    """Stands for a handler that has not been started, or never is, because its message is given back."""

    has_hung = False

    def end(self, why: Why) -> None:
        """See `Handling.end`; here and in the other methods there is nothing to do."""

    def lose(self) -> None: ...
    def give_up(self) -> None: ...
    def abandon(self) -> None: ...
    def when_handler_ends(self, callback: Callable[[], None]) -> None: ...


_NO_HANDLING = _NoHandling()


def _whatever_happens(step: Callable[Concatenate["Run", P], None]) -> Callable[Concatenate["Run", P], None]:
    """End a run when one of its own steps fails, because a message must not be kept that nobody works on."""

    @wraps(step)
    def guarded(run: "Run", /, *arguments: P.args, **options: P.kwargs) -> None:
        try:
            step(run, *arguments, **options)
        except BaseException:  # even one that ends programs: reading a handler's error runs the handler's code
            run.log.exception("%s: an error of the worker's own; its lease runs out", run.about())
            run.abandon()

    return guarded


class Run:
    """Runs a message's handler once; see `filao.worker.keeper.Kept` for what the keeper sees of it.

    It is written with callbacks, so that a message costs one task, the handler's. `freed` is called when its place can
    be taken by another message, and `ended` when it has ended, in any case.
    """

    __slots__ = (
        *("_began", "_consumer", "_ended", "_freed", "_has_made_room", "_message", "_raised", "_shared"),
        *("_stop_beside", "delivery", "extended_at", "handling", "is_over", "keep_until", "lease"),
    )

    def __init__(
        self,
        shared: Shared,
        consumer: Consumer,
        message: Message[Any],
        freed: Callable[["Run"], None],
        ended: Callable[["Run", Handled], None],
    ) -> None:
        self._shared = shared
        self._consumer = consumer
        self._message = message
        self._freed = freed
        self._ended = ended
        self.handling: Handling | _NoHandling = _NO_HANDLING
        """The handler at work, once it is started."""
        self._stop_beside: Callable[[], object] = _nothing
        """Cancels the task beside the handler: its transaction, or a settle that must be tried again."""
        self._raised = ""
        """The class of the exception that the handler raised; for observers."""
        self._began = 0.0
        self.is_over: bool = False
        self._has_made_room = False
        self.delivery: engine.Delivery = delivery_of(message)
        self.lease: float = consumer.queue.lease
        self.extended_at: float = time.monotonic()
        self.keep_until: float = math.inf
        if consumer.guarantee != "at-most-once":  # such a message has no lease while its handler runs
            shared.keeper.keep(self)  # now, because another handler may block the loop before this one begins

    @property
    def queue(self) -> str:
        """The name of the queue."""
        return self._consumer.queue.name

    @property
    def has_begun(self) -> bool:
        """Whether the handler was started, or the message given back."""
        return self._began > 0.0

    @property
    def log(self) -> Log:
        """A log whose records have the queue, the message's id and the attempt as fields."""
        delivery = self.delivery
        fields = {"queue": delivery.queue, "message_id": delivery.id, "attempt": delivery.attempt}
        return Log(log, fields)

    def about(self) -> str:
        """Return the words for this run in the log."""
        return f"message {self.delivery.id} of {self.queue!r}, attempt {self.delivery.attempt}"

    # --- its beginning -----------------------------------------------------------------------------------------------

    @_whatever_happens
    def begin(self) -> None:
        """Start the handler, in a transaction or after the deletion if its guarantee wants that."""
        self._began = time.monotonic()
        if self._consumer.guarantee == "at-least-once":
            self._start(self._conclude)
        elif self._consumer.guarantee == "at-most-once":
            self._beside(self._work_once_at_most(), self._settle)
        else:
            self._beside(self._work_in_transaction(), self._settle)

    def release(self) -> None:
        """Give the message back without its handler."""
        self._began = time.monotonic()
        self._settle(engine.Release())

    def _beside(self, work: Coroutine[Any, Any, R], then: Callable[[R], None]) -> None:
        """Do in a task what takes more than one step, and then go on with its result."""
        side = asyncio.get_running_loop().create_task(work)
        self._stop_beside = side.cancel

        def done(task: asyncio.Task[R]) -> None:
            if task.cancelled():
                self._end("lost", None)
            elif (error := task.exception()) is not None:
                self.log.error("%s: an error of the worker's own; its lease runs out", self.about(), exc_info=error)
                self._end("lost", None)
            else:
                then(task.result())

        side.add_done_callback(done)

    async def _work_once_at_most(self) -> engine.Outcome | None:
        """Delete the message before its handler runs; when that fails, the handler does not run."""
        try:
            await self._shared.session.settle(self.delivery, engine.Ack(before_work=True))
        except LeaseLost as error:
            self.log.warning("%s", error)
            return None
        except EngineError as error:
            self.log.warning("%s: its handler does not run, as it could not be deleted before: %s", self.about(), error)
            return engine.Release()
        mark_settled(self._message, AT_MOST_ONCE)
        return self._decided(await self._handled())

    async def _work_in_transaction(self) -> engine.Outcome | None:
        """Commit the handler's work and the ack together, or undo it, even if the handler never ends."""
        outcome: engine.Outcome | None = None
        try:
            async with deferred_transaction_for(self._message) as transaction:
                outcome = self._decided(await self._handled(transaction))
                if not isinstance(outcome, engine.Ack):
                    raise _Undone
        except _Undone:
            return outcome
        except LeaseLost as error:
            self.log.warning("%s The work of its handler is undone.", error)
            return None
        except Exception as error:
            if not isinstance(outcome, engine.Ack):  # only undoing has failed: the engine does it by itself
                self.log.warning("%s: its transaction could not be ended properly: %s", self.about(), error)
                return outcome
            self.log.warning("%s: its work could not be committed: %s: %s", self.about(), type(error).__name__, error)
            return engine.Nack(error=error_text(error))
        return None

    # --- the handler -------------------------------------------------------------------------------------------------

    async def _handled(self, *transaction: Any) -> Handling:
        """Start the handler, and return it once it has ended or is given up."""
        over: asyncio.Future[Handling] = asyncio.get_running_loop().create_future()
        self._start(lambda handling: None if over.done() else over.set_result(handling), *transaction)
        return await over

    def _start(self, then: Callable[[Handling], None], *transaction: Any) -> None:
        if self._consumer.timeout is not None:
            self.keep_until = self._began + self._consumer.timeout + ENDS_WITHIN
        self.handling = Handling(self._shared, self._consumer, self._message, then, *transaction)

    @_whatever_happens
    def _conclude(self, handling: Handling) -> None:
        self._settle(self._decided(handling))

    def lose(self) -> None:
        """See `Handling.lose`."""
        self.handling.lose()

    def abandon(self) -> None:
        """End the run without a settle: the lease runs out, or goes back when the broker is closed."""
        self._stop_beside()
        self.handling.abandon()
        self._end("lost", None)

    # --- the outcome -------------------------------------------------------------------------------------------------

    def _decided(self, handling: Handling) -> engine.Outcome | None:
        """Return what becomes of the message; None when its lease is lost."""
        if handling.children:
            self._shared.strays.report(self._consumer.handler.name, handling.children, self.log)
        ending = handling.ending
        if not isinstance(ending, Raised) and ending is not NEVER_ENDED:
            return self._outcome(lambda: of_value(ending))
        if handling.why == "timeout":
            self._raised = "TimeoutError"
            text = f"TimeoutError: the handler ran longer than its timeout of {self._consumer.timeout:g} s"
            self.log.warning("%s: %s", self.about(), text)
            return engine.Nack(error=text)
        if handling.why == "lost":
            self.log.warning("%s: its lease was lost, so its handler was told to end", self.about())
            return None
        if not isinstance(ending, Raised) or handling.why == "stopped":
            return engine.Release()
        error = ending.error
        return self._outcome(lambda: self._of_error(error))

    def _of_error(self, error: BaseException) -> engine.Outcome:
        raised = without_our_frames(error)
        if not is_decision(raised, self._consumer.outcomes):
            self._raised = type(raised).__qualname__
            trace = (type(raised), raised, raised.__traceback__)
            self.log.warning("%s failed: %s", self.about(), raised_line(error_text(raised)), exc_info=trace)
        return of_error(raised, self._consumer.outcomes)

    def _outcome(self, decide: Callable[[], engine.Outcome]) -> engine.Outcome:
        try:
            return decide()
        except BaseException as error:  # reading the handler's result or error has failed: so the handler has
            self.log.warning("%s: what its handler decided cannot be read", self.about(), exc_info=True)
            return engine.Nack(error=error_text(error))

    # --- the settle --------------------------------------------------------------------------------------------------

    @_whatever_happens
    def _settle(self, outcome: engine.Outcome | None) -> None:
        """End the lease as the handler decided, and with it the run.

        The place becomes free before that, so that the next receive shares the settle's transaction.
        """
        self.keep_until = math.inf
        self._make_room()
        if self._message.settled:
            self._end(self._settled_before(outcome), outcome)
        elif outcome is None or self._is_left():
            self._end("lost", None)
        else:
            self._shared.session.settle(self.delivery, outcome).add_done_callback(partial(self._answered, outcome))

    @_whatever_happens
    def _answered(self, outcome: engine.Outcome, answer: "asyncio.Future[Any]") -> None:
        if (error := failure_of(answer)) is not None:
            self._beside(self._settle_again(outcome, error), lambda ended: self._end(*ended))
        else:
            mark_settled(self._message, "settled by its worker")
            self._end(self._how(outcome), outcome)

    async def _settle_again(
        self, outcome: engine.Outcome, error: BaseException | None
    ) -> tuple[How, engine.Outcome | None]:
        """Settle until it is done, and return how.

        If the engine refuses the text of an error, it gets it in plain characters. If it cannot do what the handler
        wants, such as a delay, the handler has failed. Other refusals pass once they are mended: a permission, say.
        """
        plain, instead = _in_plain_characters(outcome), None
        for pause in pauses():
            if isinstance(error, LeaseLost):
                self.log.warning("%s", error)
                return "lost", outcome
            if error is None:
                break
            if self._is_left():
                return "lost", None
            if isinstance(error, UnsupportedFeature) and instead is None:
                self.log.warning("%s cannot be settled as its handler wants: %s", self.about(), error)
                outcome = plain = instead = engine.Nack(error=error_text(error))
            else:
                if not isinstance(error, EngineUnavailable):
                    if outcome is plain and not _may_pass(error):
                        self.log.error("%s could not be settled: its lease runs out", self.about(), exc_info=error)
                        return "lost", outcome
                    outcome = plain
                self._shared.outages.fails("settling", error)
                await asyncio.sleep(pause)
            try:
                await self._shared.session.settle(self.delivery, outcome)
                error = None
            except Exception as raised:
                error = raised
        self._shared.outages.is_over("settling")
        mark_settled(self._message, "settled by its worker")
        return self._how(outcome), outcome

    def _is_left(self) -> bool:
        """Return whether the program has closed the broker, which ended all leases, and tell so."""
        left = not self._shared.session.is_open
        if left:
            self.log.warning("%s comes again: its program closed the broker while it was handled", self.about())
        return left

    def _make_room(self) -> None:
        if not self._has_made_room:
            self._has_made_room = True
            self._freed(self)

    def _end(self, how: How, outcome: engine.Outcome | None) -> None:
        """Let go of the lease, and report what happened; only the first call counts."""
        if self.is_over:
            return
        self.is_over = True
        self._shared.keeper.let_go(self)
        self._make_room()
        if self.handling.has_hung:
            self.log.error(
                "%s: its handler %s was told to end and still runs; the message was settled without it (%s)",
                *(self.about(), self._consumer.handler.name, how),
            )
        self._tell(how, outcome)
        error = outcome.error if isinstance(outcome, (engine.Nack, engine.Reject)) else ""
        was_handled = self.handling is not _NO_HANDLING
        seconds = time.monotonic() - self._began if was_handled else 0.0
        if self._shared.session.observers and was_handled:
            self._shared.session.observers.ended(self.delivery, how, seconds, self._raised)
        self._ended(self, Handled(self.queue, self.delivery.id, self.delivery.attempt, how, error, seconds))

    def _settled_before(self, outcome: engine.Outcome | None) -> How:
        if self._consumer.guarantee == "at-most-once":
            return "acked" if isinstance(outcome, engine.Ack) else "failed"
        return "acked" if outcome is None else "settled"

    def _how(self, outcome: engine.Outcome) -> How:
        if isinstance(outcome, engine.Nack):
            return "dead" if retry_delay(self._consumer.queue, self.delivery.attempt, 0.0) is None else "retried"
        if isinstance(outcome, engine.Ack):
            return "acked"
        return "released" if isinstance(outcome, engine.Release) else "dead"

    def _tell(self, how: How, outcome: engine.Outcome | None) -> None:
        """Log in one line what becomes of the message."""
        if how in ("acked", "settled"):
            if log.isEnabledFor(logging.DEBUG):
                self.log.debug("%s: %s", self.about(), how)
            return
        text = raised_line(outcome.error) if isinstance(outcome, (engine.Nack, engine.Reject)) else ""
        follows: str = how
        if how == "retried" and isinstance(outcome, engine.Nack):
            tries = self._consumer.queue.max_attempts
            delay = retry_delay(self._consumer.queue, self.delivery.attempt, 0.0) if outcome.delay is None else None
            when = f"{outcome.delay:g} s" if delay is None else f"about {delay:g} s"
            follows = f"again in {when}, attempt {self.delivery.attempt + 1} of {tries}"
        elif isinstance(outcome, engine.Release) and outcome.delay and how == "released":
            follows = f"again in {outcome.delay:g} s, the attempt not counted"
        elif how == "dead":
            follows = "a dead letter"
        self.log.info("%s: %s%s", self.about(), follows, f": {text}" if text else "")


def _nothing() -> None:
    """Do nothing: there is no task beside the handler."""


def _may_pass(error: BaseException) -> bool:
    """Return whether a settle that failed so may succeed later, once somebody has mended its cause."""
    passing = EngineError | ConfigurationError | QueueNotFound  # that of its dead letters, which somebody has deleted
    return isinstance(error, passing) and not isinstance(error, UnsupportedFeature)


def _in_plain_characters(outcome: engine.Outcome) -> engine.Outcome:
    if isinstance(outcome, (engine.Nack, engine.Reject)):
        plain = outcome.error.encode("ascii", "backslashreplace").decode().replace("\0", "\\0")
        return msgspec.structs.replace(outcome, error=plain)
    return outcome
