"""Those of this process who wait for one queue. One look serves them all, so that waking many costs no more than one.

Whoever may have to wait takes a place before he looks for himself, and joins the line when he found nothing. A call
that came in between is not lost: the line then has had more calls than when the place was taken.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from filao.engine import Abandoned, Receive, Received, Result
from filao.errors import EngineUnavailable, FilaoError

Serve = Callable[[Sequence[Receive]], "asyncio.Future[list[Result]]"]
_Waiting = dict["asyncio.Future[Received]", "Place"]


class Line:
    """The line of one queue."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._waiting: _Waiting = {}
        self._calls = 0
        self._looking: _Waiting = {}
        """Those for whom a look is under way."""
        self._timer: asyncio.TimerHandle | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def place(self, receive: Receive, abandoned: Abandoned) -> "Place":
        """Take a place; it costs nothing until it is waited in."""
        return Place(self, receive, abandoned, self._calls)

    def join(self, place: "Place", due_in: float | None, timeout: float | None) -> "asyncio.Future[Received]":
        """Wait in a place; to leave, cancel the future."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Received] = loop.create_future()
        self._waiting[future] = place
        future.add_done_callback(self._leave)
        if timeout is not None:
            timer = loop.call_later(timeout, self._time_out, future)
            future.add_done_callback(lambda _: timer.cancel())
        self._look_in(due_in)
        if place.calls != self._calls:
            self._look()
        return future

    def call(self) -> None:
        """Let those in line look: the queue may have something."""
        self._calls += 1
        self._look()

    def close(self) -> None:
        """Send everybody home with nothing."""
        if self._timer is not None:
            self._timer.cancel()
        for future in self._waiting:
            if not future.done():
                future.set_result(Received([]))

    def _leave(self, future: "asyncio.Future[Received]") -> None:
        self._waiting.pop(future, None)

    def _time_out(self, future: "asyncio.Future[Received]") -> None:
        """Send one home with nothing; but if a look is under way for him, after it, for it may bring something."""
        if future in self._looking:
            del self._waiting[future]
        elif not future.done():
            future.set_result(Received([]))

    def _look(self) -> None:
        if self._looking:
            return
        self._looking = {future: place for future, place in self._waiting.items() if not future.done()}
        if self._looking:
            served = self._serve([place.receive for place in self._looking.values()])
            served.add_done_callback(partial(self._served, self._calls))

    def _served(self, calls: int, done: "asyncio.Future[list[Result]]") -> None:
        looking, self._looking = self._looking, {}
        error = EngineUnavailable("the broker was closed meanwhile") if done.cancelled() else done.exception()
        if error is not None:
            for future in looking:
                if not future.done():
                    future.set_exception(error)
            return
        for (future, place), result in zip(looking.items(), done.result(), strict=True):
            if future in self._waiting and isinstance(result, Received) and not result.deliveries:
                self._look_in(result.due_in)
            elif future.done():
                place.abandoned(result)
            elif isinstance(result, FilaoError):
                future.set_exception(result)
            else:
                future.set_result(cast("Received", result))
        if calls != self._calls:
            self._look()

    def _look_in(self, seconds: float | None) -> None:
        """Let those in line look when the next message is due, unless they will before."""
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        if self._timer is not None and not self._timer.cancelled() and loop.time() < self._timer.when():
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self.call)


class Place:
    """See `filao.engine.Waiter`."""

    def __init__(self, line: Line, receive: Receive, abandoned: Abandoned, calls: int) -> None:
        self.receive = receive
        self.abandoned = abandoned
        self.calls = calls
        """How often the line had been called when this place was taken."""
        self._line = line

    def wait(self, due_in: float | None, timeout: float | None) -> "asyncio.Future[Received]":
        """Wait in line."""
        return self._line.join(self, due_in, timeout)
