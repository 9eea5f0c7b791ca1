"""Tasks that a handler started and did not wait for."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

import filao
from tests.support.working import CLAIMS, broker, running, until_stats

pytestmark = pytest.mark.anyio

__all__ = ["broker"]


async def test_a_task_that_a_handler_leaves_behind_is_reported_once(url, broker, caplog) -> None:
    worker, leaked = filao.Worker(url), []

    async def forgotten() -> None:
        await asyncio.Event().wait()

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        leaked.append(asyncio.create_task(forgotten()))

    await broker.send_many("claims", [1, 2])
    assert [handled.how for handled in await worker.drain()] == ["acked", "acked"]
    reports = [record for record in caplog.records if "left a task running" in record.message]
    assert len(reports) == 1
    assert "forgotten" in reports[0].message
    for task in leaked:
        task.cancel()


async def test_workers_of_one_loop_see_tasks_until_the_last_has_gone(url, broker) -> None:
    first, last = filao.Worker(broker), filao.Worker(broker)
    await broker.declare(filao.Queue("letters"))

    @first.consumer("letters")
    async def write(message: filao.Message) -> None: ...

    @last.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None:
        async def end() -> None:
            raise SystemExit(3)

        await asyncio.create_task(end())  # it would end the loop

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    async with AsyncExitStack() as stack:
        async with running(first):
            await stack.enter_async_context(running(last))
        await broker.send_to_queue("claims", 1)
        await until_stats(broker, nacked=1)
    assert loop.get_task_factory() is before


async def test_a_task_factory_that_the_program_sets_meanwhile_stays(url, broker) -> None:
    worker = filao.Worker(broker)

    @worker.consumer(CLAIMS)
    async def handle(message: filao.Message) -> None: ...

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> "asyncio.Task[Any]":
        return asyncio.Task(coroutine, loop=loop, **options)

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    try:
        async with running(worker):
            loop.set_task_factory(factory)
        assert loop.get_task_factory() is factory
    finally:
        loop.set_task_factory(before)
