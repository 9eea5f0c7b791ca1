"""Background tasks: what they are given cannot end them."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

import pytest

import filao
from filao.guarded import cancellable, for_ever

pytestmark = pytest.mark.anyio


async def _run(errors: Sequence[Exception]) -> None:
    """Let turns end with these errors, and return once one has ended without."""
    left, done = iter(errors), asyncio.Event()

    async def turn() -> None:
        for error in left:
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


async def test_a_cancellation_that_a_call_takes_for_an_error_ends_its_caller() -> None:
    begun = asyncio.Event()

    async def call() -> None:
        with cancellable():
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                raise filao.EngineUnavailable("the channel was closed") from error

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_who_was_cancelled_may_still_tidy_up() -> None:
    begun, tidied = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            with cancellable():
                await asyncio.sleep(0)
            tidied.set()

    task = asyncio.create_task(call())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert tidied.is_set()


async def test_an_error_that_repeats_itself_is_logged_once(caplog) -> None:
    await _run([ValueError("the same")] * 5 + [ValueError("another")])
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


async def test_what_the_storage_says_to_its_callers_is_not_said_again_by_a_background_task(caplog) -> None:
    await _run([filao.EngineUnavailable("away")])
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
