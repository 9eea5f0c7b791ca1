"""A handler at work on one message: it is started, told to end, waited for and, if it does not end, left behind.

Invariant: the handler has a task (and a plain function a thread) of its own. So nothing that it does, raises or
swallows can stop the code that waits for it, and that code goes on exactly once, with the handler's result or without.

Two clocks run. The lease shows that the worker lives, and the keeper extends it. The timeout bounds the handler. If its
timeout, a lost lease or a stopping worker ends it early, the handler is cancelled: a coroutine at its next await, a
thread at its next bytecode. A handler that does not end then is left behind.
"""

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from filao import sync
from filao.broker import Broker
from filao.calls import Caller
from filao.engine import Feature
from filao.errors import EngineUnavailable
from filao.message import Message, delivery_of
from filao.session import Session
from filao.worker.handlers import Consumer, Handler
from filao.worker.keeper import Keeper
from filao.worker.outage import Outages
from filao.worker.outcomes import Release
from filao.worker.strays import Children, Strays
from filao.worker.surroundings import SUPPRESSED, Surroundings
from filao.worker.threads import Call, Threads, children_end

Why = Literal["itself", "timeout", "lost", "stopped"]
"""What ended a handler."""

ENDS_WITHIN = 5.0  # seconds that a cancelled handler may take to end before its message is settled without it
NO_THREAD_FOR = 1.0  # seconds until the next try for a message for whose handler no thread could be started
ANSWERED_WITHIN = 0.1  # seconds in which a settle by the handler itself is answered after the lease has ended with it


@dataclass(frozen=True, slots=True)
class Shared:
    """What all runs of a worker share."""

    broker: Broker
    session: Session
    caller: Caller
    """Makes calls for plain handlers, in their threads."""
    outside: Session
    """The session by which plain handlers settle."""
    keeper: Keeper
    threads: Threads
    strays: Strays
    outages: Outages
    surroundings: Surroundings


class Raised:
    """What a handler raised, as a value, because it must not end the task, the transaction or the loop."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


NEVER_ENDED = object()
"""In place of a result: the handler was told to end and did not."""


class Handling:
    """Calls a handler, and calls `then` with itself when the handler has ended or is given up."""

    __slots__ = (
        *("_cancel", "_consumer", "_is_awaited", "_message", "_shared", "_task", "_then", "_timers", "_undo"),
        *("children", "ending", "why"),
    )

    def __init__(
        self,
        shared: Shared,
        consumer: Consumer,
        message: Message[Any],
        then: Callable[["Handling"], None],
        *transaction: Any,
    ) -> None:
        self._shared = shared
        self._consumer = consumer
        self._message = message
        self._then = then
        self.ending: object = NEVER_ENDED
        """What the handler returned, or `Raised`, or `NEVER_ENDED`."""
        self.why: Why = "itself"
        """What ended it."""
        self.children: Children = {}
        """Tasks that the handler has started."""
        self._is_awaited = True
        self._timers: list[asyncio.TimerHandle] = []
        self._cancel: Callable[[], object] = self._cancel_task
        """Tells the handler to end, in its task or its thread."""
        self._undo: Callable[[], object] = _nothing
        """Undoes the transactions that a plain handler has itself begun."""
        loop = asyncio.get_running_loop()
        context = shared.strays.context(self.children)
        if shared.session.observers:
            context.run(shared.session.observers.began, delivery_of(message))
        if consumer.timeout is not None:
            self._timers.append(loop.call_later(consumer.timeout, self.end, "timeout"))
        self._task: asyncio.Task[object] = loop.create_task(self._invoke(*transaction), context=context)
        self._task.add_done_callback(self._handler_ended)

    @property
    def has_hung(self) -> bool:
        """Whether the handler still runs although nobody waits for it any more."""
        return not self._is_awaited and not self._task.done()

    def when_handler_ends(self, callback: Callable[[], None]) -> None:
        """Call back when a handler that has hung ends after all."""
        self._task.add_done_callback(lambda _: callback())

    # --- the call ----------------------------------------------------------------------------------------------------

    async def _invoke(self, *transaction: Any) -> object:
        """Return what the handler returned, or what it raised.

        Middleware may suppress what the handler raised, but not that it was told to end: its work is not done.
        """
        around, came = self._shared.surroundings, SUPPRESSED
        try:
            if not around:
                return await self._invoke_in(None, *transaction)
            async with around.around(self._message):
                came = await self._invoke_in(around, *transaction)
        except BaseException as raised:
            return Raised(raised)
        if came is not SUPPRESSED:
            return came
        return None if self.why == "itself" else Raised(asyncio.CancelledError())

    async def _invoke_in(self, around: Surroundings | None, *transaction: Any) -> object:
        handler = self._consumer.handler
        function = handler.function
        if handler.is_async:
            calling = function if around is None else partial(around.call, function)
            with children_end():
                came = await calling(self._message, *transaction)
            return _result(handler, came)
        calling = function if around is None else partial(around.call_plain, function)
        caller = self._shared.caller
        blocking = [sync.Transaction(caller, one) for one in transaction]
        call = await self._in_thread(calling, sync.Message(caller, self._shared.outside, self._message), *blocking)
        self._cancel, self._undo = call.interrupt, call.give_up
        try:
            return _result(handler, await call.future)
        finally:
            self._cancel, self._undo = self._cancel_task, _nothing  # middleware on the loop may follow

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Call:
        """Start a plain function; where no thread can be had, its message comes again, and the handler has not failed.

        Where a release would use the attempt, or the message is deleted already, it is kept and the start tried again,
        until the handler is told to end.
        """
        can_release = Feature.RELEASE in self._shared.broker.features and not self._message.settled
        while True:
            try:
                return self._shared.threads.start(function, *arguments)
            except EngineUnavailable as error:
                self._shared.outages.fails("starting handlers", error)
                if can_release:
                    raise Release(delay=NO_THREAD_FOR) from error
            await asyncio.sleep(NO_THREAD_FOR)

    # --- its end -----------------------------------------------------------------------------------------------------

    def end(self, why: Why) -> None:
        """Tell the handler to end; harmless when it has ended, or was told before."""
        if not self._is_awaited or self.why != "itself":
            return
        self.why = why
        self._timers.append(asyncio.get_running_loop().call_later(ENDS_WITHIN, self.give_up))
        self._cancel()

    def lose(self) -> None:
        """End the handler because its lease is lost, unless the handler itself has settled the message."""
        if self._is_awaited:
            self._timers.append(asyncio.get_running_loop().call_later(ANSWERED_WITHIN, self._lost))

    def give_up(self) -> None:
        """Go on without the handler; harmless when it has ended."""
        if self._is_awaited:
            self._undo()
            self._go_on()

    def abandon(self) -> None:
        """Tell the handler to end, and never go on."""
        if self._is_awaited and self.why == "itself":
            self._cancel()
        self._undo()
        self._is_awaited = False

    def _lost(self) -> None:
        if not self._message.settled:
            self.end("lost")

    def _cancel_task(self) -> None:
        self._task.cancel()

    def _handler_ended(self, task: "asyncio.Task[object]") -> None:
        if self._is_awaited:
            self.ending = Raised(asyncio.CancelledError()) if task.cancelled() else task.result()
            self._go_on()

    def _go_on(self) -> None:
        self._is_awaited = False
        for timer in self._timers:
            timer.cancel()
        self._then(self)


def _nothing() -> None: ...


def _result(handler: Handler, result: object) -> object:
    """Return a handler's result, but refuse work that is not done yet, such as a future: it would be lost."""
    if isinstance(result, concurrent.futures.Future):
        raise TypeError(f"the handler {handler.name} returned a Future, whose end nobody waits for: return its result")
    if not inspect.isawaitable(result) and not inspect.isgenerator(result) and not inspect.isasyncgen(result):
        return result
    if inspect.iscoroutine(result):
        result.close()  # otherwise Python warns that nobody awaited it
    advice = "await it" if handler.is_async else "make the handler `async def`, and await in it"
    raise TypeError(f"the handler {handler.name} returned a {type(result).__name__} that nobody runs: {advice}")
