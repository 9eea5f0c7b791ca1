"""Threads whose calls come together: one of them does all that has gathered, and the others wait for it.

A thread that comes while nobody leads does its own operation at once. What others ask for meanwhile gathers; then one
of them leads, and does all of it in one batch. So a lone call waits for nobody, calls that come together share a flush,
and neither crosses to the loop.

Invariant: an operation is done by the one thread that has taken it, or by none; a thread whose operation nobody has
done hands it to the loop. An exception that interrupts a thread between any two instructions (the time limit of a
handler is one) loses neither the lead nor the answer to anybody else.

The main thread first tries to do its call alone, and keeps to itself where the program has a handler of signals: those
run in it, and may call the broker.
"""

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from filao.batching import BATCH_MAX
from filao.calls import LOOKED_AFTER
from filao.engine import Abandoned, Operation, Receive, Result, Send
from filao.errors import EngineUnavailable, FilaoError
from filao.process import may_be_handled
from filao.session import Session

ROOM = 32  # frames of the stack: more than clearing away takes, wherever a call was interrupted


class _Entry:
    """An operation in the hands of the company."""

    __slots__ = ("is_done", "is_left", "is_over", "operation", "result", "taken", "turn")

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.taken = threading.Lock()
        """Held by whoever does it: the leader or, once it leaves, its own thread."""
        self.turn = threading.Lock()
        """Released when its thread should look: it is over, or nobody leads."""
        self.turn.acquire()
        self.is_over = False
        self.is_done = False
        """Whether it was done, or failed, before it was over; otherwise it goes to the loop."""
        self.result: Result = None
        """What came of it if it was done; an error, too."""
        self.is_left = False
        """Whether its thread was interrupted, so that nobody waits for the result."""

    def wake(self) -> None:
        """Let its thread look."""
        try:
            self.turn.release()
        except RuntimeError:
            return  # it was woken before


class _Here(threading.local):
    """What the calling thread is at."""

    is_calling = False
    """Whether it is in the midst of a call; a `__del__` may make another one there."""


class Company:
    """The threads that use an open session at the same time."""

    def __init__(self, session: Session, abandoned: Abandoned) -> None:
        """`abandoned` gets what was received for a thread that no longer waits for it."""
        self._session = session
        self._abandoned = abandoned
        self._main = threading.main_thread().ident
        self._gathered: deque[_Entry] = deque()
        """What has come, in order, from the first that is not over."""
        self._leading = threading.RLock()
        """Held by the leader. It knows its owner, which may be interrupted before it knows itself."""
        self._taken: list[_Entry] = []
        """What the leader does."""
        self._results: list[Result] = []
        """What the engine says came of it; it may yet be undone."""
        self._answers: Sequence[Result] | None = None
        """What came of it, once that is certain; nothing if it was not done."""
        self._here = _Here()

    def at_once(self, operation: Operation, results: list[Result]) -> bool:
        """Do an operation without waiting for anybody but these threads, and append its result.

        Return False when nothing of it was done, and it has to go to the loop.
        """
        if not self._session.is_immediate:
            return False
        _find_room(ROOM)
        here = self._here
        is_alone = here.is_calling
        if is_alone or threading.get_ident() == self._main:
            is_done = self._session.all_at_once((operation,), results)
            if is_done or is_alone or may_be_handled():
                return is_done
        try:
            here.is_calling = True
            if self._gathered or not self._leading.acquire(blocking=False):
                return self._together(_Entry(operation), results)
            is_done = self._session.all_at_once((operation,), results)
            self._resign()
        except BaseException as error:
            while not self._is_mended(error):
                pass
            raise
        finally:
            here.is_calling = False
        return is_done

    def _together(self, entry: _Entry, results: list[Result]) -> bool:
        """Do what has gathered, or let another thread do it, until the entry is over."""
        try:
            self._gathered.append(entry)
            while not entry.is_over:
                is_led = self._lead() or entry.turn.acquire(timeout=LOOKED_AFTER)
                if not is_led and entry.taken.acquire(blocking=False):
                    entry.is_over = True  # the leader is slow, and the loop's calls have a time limit
                    self._call_next()  # this thread may have been the one that was called
            if entry.is_done:
                results.append(entry.result)
        except BaseException:
            self._leave(entry)
            raise
        return entry.is_done

    def _lead(self) -> bool:
        """Do what has gathered, if nobody leads; return whether nobody did."""
        try:
            if not self._leading.acquire(blocking=False):
                return False
            waiting = [entry for entry in self._gathered.copy() if not entry.is_over]
            self._taken = [entry for entry in waiting[:BATCH_MAX] if entry.taken.acquire(blocking=False)]
            is_done = self._session.all_at_once([entry.operation for entry in self._taken], self._results)
            self._answers = self._results if is_done else []
            self._answer(self._answers)
            self._resign()
        except BaseException as error:
            while not self._is_mended(error):
                pass
            if not isinstance(error, FilaoError):
                raise
        return True

    def _answer(self, answers: Sequence[Result]) -> None:
        """End what the leader has taken; what has no answer goes to the loop. It may be interrupted and done again."""
        for entry, answer in zip(self._taken, answers, strict=False):
            if not entry.is_over:
                entry.result, entry.is_done = answer, True
        for entry in self._gathered.copy():
            if entry.taken.locked():
                entry.is_over = True
                entry.wake()
                if entry.is_left:
                    self._abandoned(entry.result)
        while self._gathered and self._gathered[0].is_over:
            self._gathered.popleft()

    def _resign(self) -> None:
        """Let another thread lead."""
        self._taken, self._results, self._answers = [], [], None
        self._leading.release()
        if self._gathered:
            self._call_next()

    def _call_next(self) -> None:
        for entry in self._gathered.copy():
            if not entry.is_over:
                entry.wake()
                return

    def _is_mended(self, error: BaseException) -> bool:
        """Answer after an error has met the leader anywhere; False when one more came meanwhile: call it again."""
        try:
            if self._leading.acquire(blocking=False):  # it is ours already, or nobody's
                self._answer(self._after(error) if self._answers is None else self._answers)
                self._taken, self._results, self._answers = [], [], None
                with suppress(RuntimeError):  # all our holds are released
                    while True:
                        self._leading.release()
                self._call_next()
        except BaseException:
            return False
        return True

    def _after(self, error: BaseException) -> list[Result]:
        """Return the answers when an error has met the leader while the engine was at work."""
        if isinstance(error, FilaoError):  # none was done, or all are in doubt alike: the disk failed
            is_for_all = isinstance(error, EngineUnavailable) or len(self._taken) == 1
            return [error] * len(self._taken) if is_for_all else []
        for result in self._results:
            self._abandoned(result)
        return [_in_doubt(entry.operation) for entry, _ in zip(self._taken, self._results, strict=False)]

    def _leave(self, entry: _Entry) -> None:
        """Learn that an entry's thread was interrupted."""
        entry.is_left = True
        if entry.taken.acquire(blocking=False):
            entry.is_over = True
        elif entry.is_over:
            self._abandoned(entry.result)
        self._call_next()


def _find_room(frames: int) -> None:
    """Raise RecursionError before anything has begun: where it ends a call half-way, nothing could be cleared away."""
    if frames:
        _find_room(frames - 1)


def _in_doubt(operation: Operation) -> EngineUnavailable:
    return EngineUnavailable(
        f"queue {operation.queue!r}: another thread of this process did this together with a call of its own, and was "
        f"interrupted at that. {_IN_DOUBT.get(type(operation), _SETTLED_IN_DOUBT)}"
    )


_IN_DOUBT: dict[type, str] = {
    Send: "It is open whether the message was stored: send it again with the same message_id, and it is stored once.",
    Receive: "What it may have received is given back: receive again.",
}
_SETTLED_IN_DOUBT = "It is open whether this was done: call it again, and LeaseLost may then mean that it was."
