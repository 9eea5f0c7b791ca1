"""The command line prints what was done on a dashboard."""

import asyncio

import filao
from filao.overview import Deed
from tests.conftest import engine_of
from tests.support.shell import compiled, db, run

__all__ = ["compiled", "db"]


def test_the_log_of_the_dashboard_is_printed(db):
    async def note() -> None:
        async with filao.connect(db) as broker:
            kept = engine_of(broker).overview.log
            number = await kept.begin(Deed("ada", "purge", "claims", wanted=2))
            await kept.record(number, 2, "done")

    assert run("log", db).code == 1
    asyncio.run(note())
    (told,) = run("log", db).lines
    assert (told["who"], told["what"], told["wanted"], told["done"], told["outcome"]) == ("ada", "purge", 2, 2, "done")
    assert told["at"] <= told["ended_at"]
