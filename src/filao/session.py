"""What a broker, its messages, its transactions and a worker share: one engine, open on one event loop.

From here a send or a settle goes down to the batcher, and with its batch to the engine. Nothing here knows the layers
above.
"""

import asyncio
import copy
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context, ContextVar
from typing import Any, Protocol, cast, runtime_checkable

from filao.batching import batcher_of
from filao.checks import check_duration, check_name
from filao.engine import (
    Abandoned,
    Delivery,
    Draft,
    Engine,
    Extend,
    Immediate,
    Operation,
    Operators,
    Outcome,
    Receipt,
    Received,
    Release,
    Result,
    Send,
    Settle,
    Transactions,
)
from filao.errors import ConfigurationError, EngineUnavailable, FilaoError, UnsupportedFeature
from filao.forks import Living, gate, keep
from filao.guarded import look_away
from filao.observing import Asked, Observers
from filao.process import running_loop
from filao.queue import BODY_MAX_EVER, LEASE_MAX, Queue, T, name_of

CLOSES_WITHIN = 30.0  # seconds, for all that closing does
FINISHES = 2 / 3  # of that time, for what has begun; the rest is left for the engine to close
OPEN_ALREADY = "this broker is open already: the block would close it under those who opened it"
_NOT_OPEN = "is not open: use it inside `async with filao.connect(…) as broker`"
_ON_ANOTHER_LOOP = (
    "this broker is open on another event loop, and can be used only there: open one on each loop, or use filao.sync, "
    "which has a loop of its own"
)


class SubmitSince(Protocol):
    """As `Submit`; `since`: when the caller began to wait, if it has waited for something else (`time.monotonic`)."""

    def __call__(self, operation: Operation, since: float | None = None, /) -> "asyncio.Future[Result]":
        """Return the future result."""
        ...


@runtime_checkable
class Pushing(Protocol):
    """An engine whose server pushes messages to those who wait, and one more in the place of each that they settle."""

    def rest(self, queues: Iterable[str]) -> None:
        """Let nothing more be pushed for these queues until somebody waits for them anew. Does not wait."""


AtOnce = Callable[[Operation, list[Result]], bool]


def _not_here(_: Operation, __: list[Result]) -> bool:
    return False


class Inside:
    """The transaction that the running code is in: what other calls look at, because they could wait for it."""

    __slots__ = ("has_begun", "holder", "is_open", "session")

    def __init__(self, session: "Session", has_begun: Callable[[], bool]) -> None:
        self.session: Session = session
        self.has_begun: Callable[[], bool] = has_begun
        """Returns whether it holds anything for which a call outside it would wait."""
        self.is_open: bool = True
        self.holder: int = threading.get_ident()
        """The thread whose block it is: the loop's or, with the blocking twin, the caller's."""


THREADS_INHERIT: bool = bool(getattr(sys.flags, "thread_inherit_context", False))
"""Whether a thread begins in a copy of its starter's context, as those of a free-threaded Python do."""
current_transaction: "ContextVar[Inside | None]" = ContextVar("filao_transaction", default=None)
"""The transaction that the running code is in: its other calls of that broker would wait for it for ever."""


def own_transaction() -> Inside | None:
    """Return the transaction that the running code is in, once this thread has left that of the one that started it.

    The other thread's block may end while this one waits for it; not so where code is run in another thread in a copy
    of its caller's context, as by `asyncio.to_thread`: it is waited for.
    """
    transaction = current_transaction.get()
    if not THREADS_INHERIT or transaction is None or transaction.holder == threading.get_ident():
        return transaction
    began_in: Context | None = getattr(threading.current_thread(), "_context", None)  # no public name tells
    if began_in is None or began_in.get(current_transaction) is not transaction:
        return transaction
    current_transaction.set(None)
    if began_in.get(current_transaction) is not None:  # this code runs in another context, which was copied for it
        current_transaction.set(transaction)
    return current_transaction.get()


_open_sessions: "Living[Session]" = Living()
"""Those that are open, or being opened."""


class Session:
    """An engine, what is on its way to it, and what is known of its queues; opened and closed any number of times."""

    def __init__(self, make: Callable[[], Engine], observers: Observers | None = None) -> None:
        self.make = make
        """Makes an engine on the same storage."""
        self.observers: Observers = Observers() if observers is None else observers
        """Are told what is done."""
        self.give_back_unread: Abandoned = self._give_back_unread
        """Gives back what was received for a caller that has gone."""
        self._begin_anew()
        self._unusable = _NOT_OPEN
        self._is_inherited = False

    def _begin_anew(self) -> None:
        self.engine: Engine = self.make()
        self._immediate = self.engine if isinstance(self.engine, Immediate) else None
        self.observers.engine = self.engine.name
        self._batcher = batcher_of(self.engine, self.give_back_unread, self.observers)
        self.submit: SubmitSince = self._batcher.submit
        """Does an operation with the next batch."""
        self.find: Callable[[str], Awaitable[Queue]] = self.engine.find
        """Returns a declared queue. Raises `QueueNotFound`."""
        self.at_once: AtOnce = _not_here
        """Does an operation without the loop and appends its result, or returns False: see `anywhere`."""
        self._queues: dict[str, Queue] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_anywhere: bool = False
        """Whether it can be used in any thread while it is open."""
        self._opening = asyncio.Lock()
        self._is_used = False

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self, *, for_block: bool = False) -> None:
        """Connect to the engine, unless it is open already.

        `for_block`: raise `ConfigurationError` then, because the block would close it for the code that opened it.
        """
        loop = running_loop()
        if not self._unusable:
            self._stay_open(for_block=for_block)
            return
        if self._is_inherited:
            self.check_open()
        async with self._opening:
            if not self._unusable:
                self._stay_open(for_block=for_block)
                return
            _open_sessions.add(self)  # already: a child that is forked meanwhile would wait for the parent to open it
            try:
                if self._is_used:
                    opening = self._opening
                    self._begin_anew()
                    self._opening = opening
                self._is_used = True
                await self.engine.open()
            except BaseException:
                _open_sessions.discard(self)
                raise
            self._loop = loop
            self._unusable = ""

    def _stay_open(self, *, for_block: bool) -> None:
        self.check_loop()
        if for_block:
            raise ConfigurationError(OPEN_ALREADY)

    async def close(self) -> None:
        """Finish what has begun, give back the leases that are still held, and close, all within one bound."""
        if self._unusable:
            return
        is_orphan = self._loop is not None and self._loop.is_closed()
        if not is_orphan:
            self.check_loop()
            self._check_outside()
        self._unusable = "is closed: open it again, or another with filao.connect"
        _open_sessions.discard(self)
        self._opening = asyncio.Lock()
        if is_orphan:
            self.engine.drop()
            return
        try:
            async with asyncio.timeout(CLOSES_WITHIN):
                try:
                    async with asyncio.timeout(CLOSES_WITHIN * FINISHES):
                        await self._batcher.drain()
                finally:
                    await self.engine.close()
        except TimeoutError:
            raise EngineUnavailable(
                f"what was under way did not end within {CLOSES_WITHIN * FINISHES:g} s of closing, or the engine did "
                f"not let go within {CLOSES_WITHIN:g} s: the broker has let go at once. What it held comes back when "
                f"its leases run out or, on RabbitMQ, as soon as its connection has ended."
            ) from None

    def anywhere(
        self,
        submit: Callable[[Operation, float | None], Awaitable[Result]],
        find: Callable[[str], Awaitable[Queue]],
        give_back_unread: Abandoned,
        at_once: AtOnce,
    ) -> "Session":
        """Return a view of this open session for any thread, given what reaches its loop from there, or need not."""
        view = copy.copy(self)
        view.is_anywhere = True
        view.submit = cast("SubmitSince", submit)  # its result is only awaited
        view.find = find
        view.give_back_unread = give_back_unread
        view.at_once = at_once
        return view

    def sibling(self) -> "Session | None":
        """Return a session on the same storage for another event loop; None where leases are bound to this loop."""
        engine = self.engine.sibling()
        return None if engine is None else Session(lambda: engine, self.observers)

    def inherit(self) -> None:
        """In a child process: become unusable, without touching what is shared with the parent."""
        self._unusable = (
            f"was opened by the process that has forked this one (pid {os.getpid()}), and can be used only there: open "
            f"another here, with filao.connect"
        )
        self._is_inherited = True
        keep((self.engine, self._batcher, self._loop))

    # --- whether it can be used --------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it is open in this process."""
        return not self._unusable

    def check_open(self) -> None:
        """Raise `ConfigurationError` when it is closed, not yet open, or inherited through a fork."""
        if self._unusable:
            raise ConfigurationError(f"this broker {self._unusable}")

    @property
    def operators(self) -> Operators:
        """The engine's calls for operators, after a check that they can be made now."""
        self.check_usable()
        return self.engine.operators

    def check_usable(self, *, anywhere: bool = False, before_it_begins: bool = False) -> None:
        """Raise `ConfigurationError` when a call cannot be made now or, unless it can be made `anywhere`, on this loop.

        `before_it_begins`: the call may be made in a transaction that has not begun to hold anything.
        """
        if self._unusable:
            self.check_open()
        if not (anywhere or self.is_anywhere) and asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(_ON_ANOTHER_LOOP)
        if current_transaction.get() is not None:
            self._check_outside(before_it_begins=before_it_begins)

    def check_loop(self) -> None:
        """Raise `ConfigurationError` when it is open on another event loop than this."""
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(_ON_ANOTHER_LOOP)

    def _check_outside(self, *, before_it_begins: bool = False) -> None:
        transaction = current_transaction.get()
        if transaction is None or (before_it_begins and not transaction.has_begun()):
            return
        if transaction.is_open and transaction.session.engine is self.engine:
            raise ConfigurationError(
                "this call would wait for the transaction that it is made in: use the transaction's own methods"
            )

    # --- queues ------------------------------------------------------------------------------------------------------

    def known(self, queue: str | Queue[T], within: object = None) -> Queue[T] | None:
        """Return a queue with its rules, or None when the engine must be asked for them: see `learned`.

        Nobody asks it `within` a user's transaction.
        """
        self.check_usable(anywhere=within is not None)
        if isinstance(queue, Queue):
            return queue
        if not isinstance(queue, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
            check_name(queue)  # type: ignore[unreachable]
        return self._queues.get(queue) or (None if within is None else self.unasked(queue))

    async def learned(self, queue: str | Queue[T], within: object = None) -> tuple[Queue[T], float | None]:
        """Return a queue with its rules and, if the engine had to be asked, since when (`time.monotonic`).

        The time limit of the call counts from then, so that one limit holds for all that it waits for.
        """
        known = self.known(queue, within)
        if known is not None:
            return known, None
        since, name = time.monotonic(), name_of(queue)
        asked = self._queues[name] = await self.find(name)
        return asked, since

    def unasked(self, queue: str | Queue[T]) -> Queue[T]:
        """Return a queue without asking the engine, because a transaction holds its file.

        One that is unknown here gets the widest limit; the engine then checks against the stored rules.
        """
        if isinstance(queue, Queue):
            return queue
        check_name(queue)
        return self._queues.get(queue) or Queue(queue, body_max=BODY_MAX_EVER)

    async def declare(self, queue: Queue[Any]) -> None:
        """Create a queue or give it these rules, and remember them."""
        await self.engine.declare(queue)
        self._queues[queue.name] = queue

    def forget(self, queue: str) -> None:
        """Forget the rules of a queue."""
        self._queues.pop(queue, None)

    # --- what is done ------------------------------------------------------------------------------------------------

    def send(
        self, queue: str, drafts: Sequence[Draft], within: object = None, since: float | None = None
    ) -> Awaitable[list[Receipt]]:
        """Store messages, all or none; in the user's transaction on `within`, if that connection is given.

        `since`: when the caller began to wait, if it had to wait for the queue's rules (`time.monotonic`).
        """
        operation = Send(queue, drafts)
        return (
            cast("asyncio.Future[list[Receipt]]", self._do(operation, since))
            if within is None
            else self._send(operation, within)
        )

    async def _send(self, operation: Send, within: object) -> list[Receipt]:
        transactions = self.transactions("joining a transaction of your own (within=)")
        with self.observers.asked(operation) as asked:
            asked.result = receipts = transactions.send_within(within, cast("Send", asked.operation))
        if isinstance(receipts, FilaoError):
            raise receipts
        return receipts

    @property
    def is_immediate(self) -> bool:
        """Whether operations may be done in any thread; not while observers watch, which are told on the loop."""
        return self._immediate is not None and not self.observers

    def all_at_once(self, operations: Sequence[Operation], results: list[Result]) -> bool:
        """Do operations in the calling thread as `Immediate.at_once` does, if nothing on the loop comes before them.

        Where processes take turns, callers who shared a batch a moment ago will come together again: one that goes
        ahead takes the turn from them.
        """
        engine, batcher = self._immediate, self._batcher
        if engine is None or self.observers or not batcher.is_idle() or (batcher.had_company and engine.takes_turns):
            return False
        return engine.at_once(operations, results)

    def _do(self, operation: Send | Settle, since: float | None = None) -> "asyncio.Future[Result]":
        """Do an operation with the next batch, and tell the tracers."""
        if not self.observers.tracers:
            return self.submit(operation, since)
        asked = self.observers.asked(operation)
        if self.is_anywhere:
            return cast("asyncio.Future[Result]", self._followed(asked, since))
        future = self.submit(asked.operation, since)
        future.add_done_callback(asked.done)
        return future

    async def _followed(self, asked: Asked, since: float | None) -> Result:
        """Do an operation that tracers follow in any thread, where no future calls back."""
        with asked:
            asked.result = result = await self.submit(asked.operation, since)
        return result

    def settle(self, delivery: Delivery, outcome: Outcome) -> "asyncio.Future[Result]":
        """End a lease."""
        self.check_usable()
        return self._do(Settle(delivery, outcome))

    async def extend(self, delivery: Delivery, seconds: float) -> None:
        """Let a lease end `seconds` from now."""
        self.check_usable(before_it_begins=True)
        check_duration(f"queue {delivery.queue!r}", "extend", seconds, least=0.001, most=LEASE_MAX)
        await self.submit(Extend(delivery, seconds))

    def give_back(self, delivery: Delivery) -> None:
        """Release a message without waiting; where that fails, its lease runs out."""
        if self.is_open:  # a closing engine gives back all that it holds
            self.submit(Settle(delivery, Release())).add_done_callback(look_away)

    def _give_back_unread(self, result: Result) -> None:
        if isinstance(result, Received):
            for delivery in result.deliveries:
                self.give_back(delivery)

    def rest(self, queues: Iterable[str]) -> None:
        """Ask for nothing more of these queues until somebody waits for them anew; what is held stays held."""
        if self.is_open and isinstance(self.engine, Pushing):
            self.engine.rest(queues)

    def report(self, state: str) -> Awaitable[None]:
        """Record for the doctor how this process is doing; for workers."""
        return self.engine.operators.report(state)

    def transactions(self, what: str) -> Transactions:
        """Return the engine's transactions. Raises `UnsupportedFeature`, which says that it has no `what`."""
        if self.engine.transactions is None:
            raise UnsupportedFeature(f"{self.engine.name} has no {what}. Engines that have: SQLite, PostgreSQL.")
        return self.engine.transactions


def _before_fork() -> None:
    transaction = own_transaction()
    gate.shut(in_transaction=transaction is not None and transaction.is_open and transaction.has_begun())


def _after_fork() -> None:
    gate.inherit()
    for session in _open_sessions:
        session.inherit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=gate.open, after_in_child=_after_fork)
