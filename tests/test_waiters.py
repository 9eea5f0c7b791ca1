"""The line: each that waits is served, once, and what comes for those who left goes back."""

import asyncio
from typing import Any, cast

import pytest

from filao.engine import Operation, Receive, Received, Result
from filao.engines.waiters import Line
from filao.errors import EngineUnavailable

pytestmark = pytest.mark.anyio


class Looks:
    """Remembers the looks, and lets the test answer them."""

    def __init__(self, *, is_pushed_to: bool = False) -> None:
        self.asked: list[Receive] = []
        self.answers: list[asyncio.Future[Result]] = []
        self.returned: list[Any] = []
        self.looked = asyncio.Event()
        self.left = 0
        self.line = Line(self.submit, self.give_back, left=self.leave if is_pushed_to else None)

    def submit(self, operation: Operation) -> "asyncio.Future[Result]":
        self.asked.append(cast("Receive", operation))
        self.looked.set()
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def leave(self) -> None:
        self.left += 1

    async def begun(self) -> None:
        """Wait until a look has begun."""
        async with asyncio.timeout(20):
            await self.looked.wait()

    def give_back(self, result: Result) -> None:
        self.returned += cast("Received", result).deliveries

    async def answer(self, *deliveries: Any, due_in: float | None = None) -> None:
        self.answers[-1].set_result(Received(list(deliveries), due_in))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def wait(self, limit: int = 1, lease: float | None = None, timeout: float | None = None) -> Any:
        return self.line.place(Receive("claims", limit, lease, waiting=1)).wait(None, timeout)


async def test_one_look_serves_all_who_wait() -> None:
    looks = Looks()
    waiting = [looks.wait() for _ in range(3)]
    assert looks.asked == []
    looks.line.call()
    assert [(look.limit, look.waiting) for look in looks.asked] == [(3, 3)]
    await looks.answer("a", "b")
    assert [future.done() and future.result().deliveries for future in waiting] == [["a"], ["b"], False]


async def test_a_call_between_the_first_look_and_the_wait_is_not_lost() -> None:
    looks = Looks()
    place = looks.line.place(Receive("claims", 1, waiting=1))
    looks.line.call()
    waiting: Any = place.wait(None, None)
    await looks.answer("a")
    assert waiting.result().deliveries == ["a"]


async def test_a_call_during_a_look_is_followed_by_another() -> None:
    looks = Looks()
    waiting = looks.wait()
    looks.line.call()
    looks.line.call()
    assert len(looks.asked) == 1
    await looks.answer()
    assert len(looks.asked) == 2
    await looks.answer("a")
    assert waiting.result().deliveries == ["a"]


async def test_one_that_joins_during_a_look_and_has_missed_a_call_is_looked_for_next() -> None:
    looks = Looks()
    looks.wait()
    place = looks.line.place(Receive("claims", 1, waiting=1))
    looks.line.call()
    late: Any = place.wait(None, None)
    assert len(looks.asked) == 1
    await looks.answer("a")
    assert len(looks.asked) == 2
    await looks.answer("b")
    assert late.result().deliveries == ["b"]


async def test_after_a_look_that_failed_those_who_called_meanwhile_are_looked_for() -> None:
    looks = Looks()
    first = looks.wait()
    place = looks.line.place(Receive("claims", 1, waiting=1))
    looks.line.call()
    late: Any = place.wait(None, None)
    looks.answers[0].set_exception(EngineUnavailable("away"))
    with pytest.raises(EngineUnavailable):
        await first
    await looks.answer("b")
    assert late.result().deliveries == ["b"]


async def test_those_who_were_served_are_not_looked_for_again() -> None:
    looks = Looks()
    first, second = looks.wait(), looks.wait()
    looks.line.call()
    looks.line.call()
    await looks.answer("a")
    assert (first.done(), second.done()) == (True, False)
    assert [look.limit for look in looks.asked] == [2, 1]
    second.cancel()


async def test_what_comes_for_one_who_left_goes_back() -> None:
    looks = Looks()
    staying, leaving = looks.wait(), looks.wait()
    looks.line.call()
    leaving.cancel()
    await looks.answer("a", "b")
    assert staying.result().deliveries == ["a"]
    assert looks.returned == ["b"]


async def test_one_whose_time_is_over_during_a_look_gets_what_it_brings() -> None:
    looks = Looks()
    lucky, unlucky = looks.wait(timeout=0), looks.wait(timeout=0)
    looks.line.call()
    await asyncio.sleep(0.001)  # both have run out of time
    assert not lucky.done()
    await looks.answer("a")
    assert (lucky.result().deliveries, unlucky.result().deliveries) == (["a"], [])


async def test_one_whose_time_is_over_goes_home_with_nothing() -> None:
    assert (await Looks().wait(timeout=0)).deliveries == []


async def test_other_leases_are_looked_for_next() -> None:
    looks = Looks()
    short, long = looks.wait(lease=1), looks.wait(lease=2)
    looks.line.call()
    await looks.answer("a")
    await looks.answer("b")
    assert [look.lease for look in looks.asked] == [1, 2]
    assert (short.result().deliveries, long.result().deliveries) == (["a"], ["b"])


async def test_other_leases_are_looked_for_once_though_nothing_was_found() -> None:
    looks = Looks()
    short, long = looks.wait(lease=1), looks.wait(lease=2)
    looks.line.call()
    for _ in range(3):
        if not looks.answers[-1].done():
            await looks.answer()
    assert [look.lease for look in looks.asked] == [1, 2]
    looks.line.call()
    await looks.answer("a")
    await looks.answer("b")
    assert (short.result().deliveries, long.result().deliveries) == (["a"], ["b"])


async def test_leases_take_turns_while_calls_do_not_cease() -> None:
    looks = Looks()
    waiting = [looks.wait(lease=1), looks.wait(lease=2), looks.wait(lease=2)]
    looks.line.call()
    for _ in range(3):
        looks.line.call()
        await looks.answer()
    assert [look.lease for look in looks.asked] == [1, 2, 1, 2]
    assert not any(future.done() for future in waiting)


async def test_they_look_when_the_next_message_is_due() -> None:
    looks = Looks()
    waiting = looks.wait()
    looks.line.call()
    looks.looked.clear()
    await looks.answer(due_in=0.0)
    await looks.begun()
    assert len(looks.asked) == 2
    await looks.answer("a")
    assert waiting.result().deliveries == ["a"]


async def test_a_look_that_fails_is_told_to_all() -> None:
    looks = Looks()
    waiting = [looks.wait(), looks.wait()]
    looks.line.call()
    looks.answers[-1].set_exception(EngineUnavailable("away"))
    for future in waiting:
        with pytest.raises(EngineUnavailable, match="away"):
            await future


async def test_closing_sends_all_home() -> None:
    looks = Looks()
    waiting = looks.wait()
    looks.line.close()
    assert (await waiting).deliveries == []


async def test_one_that_comes_while_others_wait_in_quiet_need_not_look() -> None:
    looks = Looks()
    place = looks.line.place(Receive("claims", 1, waiting=1))
    assert not place.is_behind()
    first = looks.wait()
    assert place.is_behind()
    looks.line.call()
    assert not place.is_behind()
    await looks.answer("a")
    assert first.done()
    assert not place.is_behind()


async def test_a_call_says_whether_it_found_anybody() -> None:
    looks = Looks()
    assert not looks.line.call()
    looks.wait()
    assert looks.line.call()


async def test_what_was_not_pushed_in_time_is_looked_for_before_somebody_leaves() -> None:
    looks = Looks(is_pushed_to=True)
    waiting = looks.wait(limit=2, timeout=0)
    await looks.begun()
    assert looks.asked == [Receive("claims", 2)]
    await looks.answer("a")
    assert waiting.result().deliveries == ["a"]


async def test_what_a_last_look_brings_for_nobody_goes_back() -> None:
    looks = Looks(is_pushed_to=True)
    waiting = looks.wait(timeout=0)
    await looks.begun()
    waiting.cancel()
    await looks.answer("a")
    assert looks.returned == ["a"]


async def test_an_engine_that_pushes_is_told_when_the_last_has_gone() -> None:
    looks = Looks(is_pushed_to=True)
    first, second, third = looks.wait(), looks.wait(), looks.wait()
    first.cancel()
    looks.line.call()
    await looks.answer("a")
    assert (await second).deliveries == ["a"]
    assert looks.left == 0
    third.cancel()
    await asyncio.wait([third])
    assert looks.left == 1


async def test_a_last_look_that_fails_is_told() -> None:
    looks = Looks(is_pushed_to=True)
    waiting = looks.wait(timeout=0)
    await looks.begun()
    looks.answers[-1].set_exception(EngineUnavailable("away"))
    with pytest.raises(EngineUnavailable, match="away"):
        await waiting


async def test_what_is_due_at_once_is_looked_for_on_a_loop_that_times_no_such_call(monkeypatch) -> None:
    loop = asyncio.get_running_loop()
    timed = loop.call_later

    def call_later(seconds: float, *call: Any) -> asyncio.Handle:  # as uvloop's
        return timed(seconds, *call) if seconds >= 0.0005 else loop.call_soon(*call)

    monkeypatch.setattr(loop, "call_later", call_later)
    looks = Looks()
    waiting = looks.wait()
    looks.line.look_in(0.0001)
    looks.line.look_in(0.0001)
    await looks.begun()
    await looks.answer("a", due_in=0.0)
    assert waiting.result().deliveries == ["a"]
