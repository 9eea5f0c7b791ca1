"""The callers of this process that wait for one queue. One look serves them all, so waking many costs no more than one.

Take a place before the first look, so that a call in between is not lost, and join the line if the look found nothing.
If the line has been called more often than when the place was taken, it looks again at once.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from filao.engine import Abandoned, Delivery, Receive, Received, Result, Submit
from filao.guarded import failure_of


class Line:
    """The line of those that wait for one queue."""

    def __init__(self, submit: Submit, abandoned: Abandoned, *, left: Callable[[], None] | None = None) -> None:
        self.is_pushed_to: bool = left is not None
        """A look asks the engine to push messages to those that wait: it must hear of every one, and may be slow."""
        self._left = left
        """Called when the last of those that wait has gone, so that nothing more is pushed for it."""
        self._submit = submit
        self._abandoned = abandoned
        self._waiting: dict[asyncio.Future[Received], Place] = {}
        self._wanted = 0
        self._calls = 0
        self._looking: dict[asyncio.Future[Received], Receive] = {}
        """The callers for whom a look is under way."""
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = 0.0
        """When the timer ends, on the loop's clock: one of uvloop's that ends at once cannot tell."""

    def place(self, receive: Receive) -> "Place":
        """Take a place; it costs nothing until it is waited in."""
        return Place(self, receive, self._calls)

    def is_quiet(self) -> bool:
        """Return whether somebody waits and nothing has come since they looked."""
        return not self._looking and any(not future.done() for future in self._waiting)

    def wanted(self) -> int:
        """Return how many messages the line would take."""
        return self._wanted

    def join(self, place: "Place", due_in: float | None, timeout: float | None) -> "asyncio.Future[Received]":
        """Wait in a place; to leave, cancel the future."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Received] = loop.create_future()
        self._waiting[future] = place
        self._wanted += place.receive.limit
        future.add_done_callback(self._leave)
        if timeout is not None:
            timer = loop.call_later(timeout, self._time_out, future)
            future.add_done_callback(lambda _: timer.cancel())
        self.look_in(due_in)
        if place.calls != self._calls:
            self._look()
        return future

    def call(self) -> bool:
        """Let the line look, because the queue may have something; return whether anybody waits."""
        self._calls += 1
        self._look()
        return bool(self._waiting)

    def close(self) -> None:
        """Send everybody away with nothing."""
        if self._timer is not None:
            self._timer.cancel()
        for future in self._waiting:
            if not future.done():
                future.set_result(Received([]))

    def _leave(self, future: "asyncio.Future[Received]") -> None:
        place = self._waiting.pop(future, None)
        if place is not None:
            self._wanted -= place.receive.limit
            if self._left is not None and not self._wanted and future.cancelled():
                self._left()

    def _time_out(self, future: "asyncio.Future[Received]") -> None:
        """Send one away with nothing, but not before the end of a look that is under way and may bring something."""
        if future in self._looking:
            self._leave(future)
        elif self.is_pushed_to and not future.done():  # what is there may not have been pushed yet
            receive = self._waiting[future].receive
            self._leave(future)
            looked = self._submit(Receive(receive.queue, receive.limit, receive.lease))
            looked.add_done_callback(partial(self._last_look, future))
        elif not future.done():
            future.set_result(Received([]))

    def _last_look(self, future: "asyncio.Future[Received]", done: "asyncio.Future[Result]") -> None:
        error = failure_of(done)
        if future.done():
            if error is None:
                self._abandoned(cast("Received", done.result()))
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("Received", done.result()))

    def _look(self) -> None:
        """Look once for the caller whose last look is the longest ago, and for all that want the same lease."""
        if self._looking:
            return
        live = {future: place for future, place in self._waiting.items() if not future.done()}
        places = [place for place in live.values() if place.calls != self._calls]
        if not places:
            return
        called = min(places, key=lambda place: place.calls).receive
        for future, place in live.items():
            if place.receive.lease == called.lease:
                place.calls = self._calls
                self._looking[future] = place.receive
        limit = sum(receive.limit for receive in self._looking.values())
        looked = self._submit(Receive(called.queue, limit, called.lease, waiting=len(self._looking)))
        looked.add_done_callback(self._served)

    def _served(self, done: "asyncio.Future[Result]") -> None:
        """Hand out what the look found; then look for those that were called meanwhile, or want another lease."""
        looking = {future: receive for future, receive in self._looking.items() if not future.done()}
        self._looking = {}
        error = failure_of(done)
        if error is not None:
            for future in looking:
                future.set_exception(error)
        else:
            self._hand_out(looking, cast("Received", done.result()))
        self._look()

    def _hand_out(self, looking: dict["asyncio.Future[Received]", Receive], received: Received) -> None:
        hands = deal(received.deliveries, [receive.limit for receive in looking.values()])
        for future, hand in zip(looking, hands, strict=True):
            if hand or future not in self._waiting:
                future.set_result(Received(hand, took=received.took))
        self._abandoned(Received(received.deliveries[sum(map(len, hands)) :]))
        self.look_in(received.due_in)

    def look_in(self, seconds: float | None) -> None:
        """Let the line look in so many seconds, when the next message is due, unless it will look before."""
        if seconds is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._timer is not None and not self._timer.cancelled() and now < self._looks_at:
            if self._looks_at <= now + seconds:
                return
            self._timer.cancel()
        self._looks_at = now + seconds
        self._timer = loop.call_later(seconds, self.call)


class Place:
    """See `filao.engine.Waiter`."""

    def __init__(self, line: Line, receive: Receive, calls: int) -> None:
        self.receive = receive
        self.calls = calls
        """How often the line had been called when this place was taken, or at its last look."""
        self._line = line

    def is_behind(self) -> bool:
        """See `filao.engine.Waiter.is_behind`."""
        return not self._line.is_pushed_to and self._line.is_quiet()

    def wait(self, due_in: float | None, timeout: float | None) -> "asyncio.Future[Received]":
        """See `filao.engine.Waiter.wait`."""
        return self._line.join(self, due_in, timeout)


class Lines(dict[str, Line]):
    """The lines of an engine, by queue; one begins with its first place."""

    def __init__(self, *, left: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self._left = left
        """As that of each `Line`, with its queue: given where messages are pushed to lines."""

    def place(self, receive: Receive, submit: Submit, abandoned: Abandoned) -> Place:
        """Take a place in the line of a queue."""
        line = self.get(receive.queue)
        if line is None:
            left = self._left and partial(self._left, receive.queue)
            line = self[receive.queue] = Line(submit, abandoned, left=left)
        return line.place(receive)

    def call(self) -> None:
        """Let all lines look."""
        for line in self.values():
            line.call()

    def close(self) -> None:
        """Send everybody away with nothing."""
        for line in self.values():
            line.close()


def deal(deliveries: Sequence[Delivery], limits: Sequence[int]) -> list[list[Delivery]]:
    """Deal the deliveries, one after the other, to hands that take at most `limits` each."""
    if len(limits) == 1:
        return [list(deliveries[: limits[0]])]
    hands: list[list[Delivery]] = [[] for _ in limits]
    rest = iter(deliveries)
    for card in range(max(limits, default=0)):
        for hand, limit in zip(hands, limits, strict=True):
            if card < limit:
                delivery = next(rest, None)
                if delivery is None:
                    return hands
                hand.append(delivery)
    return hands
