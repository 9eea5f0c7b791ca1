"""Calls from threads into an event loop, when the loop ends."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

import filao
import filao.sync
from filao.calls import ENDED, Call, Caller
from tests.support.instructions import stopped_at


def test_a_call_that_comes_while_the_loop_ends_is_refused(tmp_path) -> None:
    """What begins after the loop has ended its tasks would not be ended by anyone."""
    broker = filao.sync.connect(tmp_path / "claims.db")
    broker.open()
    caller = broker._caller
    answers: list[str] = []

    def come_late() -> None:
        try:
            caller.call(asyncio.sleep, 0)
        except filao.ConfigurationError as error:
            answers.append(str(error))

    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:  # the loop has ended its tasks, and now ends its generators
            late = threading.Thread(target=come_late)
            late.start()
            late.join(5)
            answers.append("the loop goes on ending")

    opened = generator()

    async def enter() -> None:
        await anext(opened)

    caller.call(enter)
    broker.close()
    assert answers == [ENDED, "the loop goes on ending"]


def test_an_end_that_meets_the_beginning_of_a_call_leaves_no_task() -> None:
    loop = asyncio.new_event_loop()
    at, is_met = 0, True
    while is_met:
        at, caller = at + 1, Caller(loop)
        is_met = stopped_at(partial(begin, caller), at, caller.end)
        loop.run_until_complete(asyncio.sleep(0))
        assert not is_met or not asyncio.all_tasks(loop), at
    assert at > 10
    for task in asyncio.all_tasks(loop):  # of the call that met no end
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def begin(caller: Caller) -> None:
    with suppress(filao.ConfigurationError):
        caller.begin(Call(caller.loop, asyncio.sleep, (3600,), None, caller.forget_call))
