"""Background tasks: what they are given cannot end them."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

import pytest

import filao
from filao.guarded import cancellable, for_ever, look_away

pytestmark = pytest.mark.anyio
PATIENCE = 10.0


async def _run(errors: Sequence[Exception | None]) -> None:
    """Let turns end with these errors or without (None), and return once all have ended."""
    left, done = iter(errors), asyncio.Event()

    async def turn() -> None:
        for error in left:
            if error is None:
                return
            raise error
        done.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(for_ever("the listener", turn, pause_max=0.001))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_turn_that_fails_is_followed_by_another_and_logged_with_its_traceback(caplog) -> None:
    await _run([ValueError("what is\nthis?")])
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.getMessage() == r"the listener failed and goes on: 'ValueError: what is\nthis?'"


async def test_a_cancellation_that_is_swallowed_below_ends_it_after_the_turn() -> None:
    begun = asyncio.Event()

    async def turn() -> None:
        is_first = not begun.is_set()
        begun.set()
        with suppress(*[asyncio.CancelledError] * is_first):
            await asyncio.Event().wait()

    task = asyncio.create_task(for_ever("the listener", turn))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_a_cancellation_that_each_turn_takes_for_an_error_ends_it() -> None:
    begun = asyncio.Event()

    async def turn() -> None:
        is_first = not begun.is_set()
        begun.set()
        with suppress(*[asyncio.CancelledError] * is_first):
            await asyncio.sleep(PATIENCE * is_first)
        raise filao.EngineUnavailable("the channel was closed")

    task = asyncio.create_task(for_ever("the listener", turn, pause_max=0.001))
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()


async def test_a_pause_is_ended_by_what_comes_in_it_and_not_by_what_came_before() -> None:
    wake, paused, done, turns = asyncio.Event(), asyncio.Event(), asyncio.Event(), iter(range(14))
    wake.set()

    async def turn() -> None:
        for _ in turns:  # the pause after the last would be longer than this test waits
            raise filao.EngineUnavailable("away")
        done.set()
        await asyncio.Event().wait()

    async def come() -> None:
        while wake.is_set():
            await asyncio.sleep(0)
        paused.set()
        while True:
            wake.set()
            await asyncio.sleep(0)

    async with asyncio.timeout(PATIENCE):
        tasks = [asyncio.create_task(come()), asyncio.create_task(for_ever("it", turn, wake=wake, pause_max=3600))]
        await done.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert paused.is_set()


@pytest.mark.parametrize("becomes", ["an error", "nothing"])
async def test_a_cancellation_that_is_lost_in_a_call_ends_its_caller(becomes) -> None:
    begun = asyncio.Event()

    async def call() -> None:
        with cancellable():
            begun.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            if becomes == "an error":
                raise filao.EngineUnavailable("the channel was closed")

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()


@pytest.mark.parametrize("fails", [False, True])
async def test_who_was_cancelled_may_still_tidy_up_and_hears_how_that_fails(fails) -> None:
    begun, tidied = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            try:
                with cancellable():
                    await asyncio.sleep(0)
                    if fails:
                        raise filao.EngineUnavailable("away")
                tidied.set()
            except filao.EngineUnavailable:
                tidied.set()

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert tidied.is_set()


async def test_a_future_that_was_cancelled_is_looked_away_from_as_any_other() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    look_away(future)


async def test_an_error_that_repeats_itself_is_logged_once(caplog) -> None:
    await _run([ValueError("the same")] * 5 + [ValueError("another")])
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


async def test_an_error_that_comes_again_after_a_turn_that_went_well_is_logged_again(caplog) -> None:
    await _run([ValueError("the same"), None, ValueError("the same")])
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


async def test_what_the_storage_says_to_its_callers_is_not_said_again_by_a_background_task(caplog) -> None:
    await _run([filao.EngineUnavailable("away")])
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
