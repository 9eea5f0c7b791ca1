"""Tasks that a handler started and did not wait for."""

import asyncio

import pytest

import filao
from tests.support.working import CLAIMS, broker

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
