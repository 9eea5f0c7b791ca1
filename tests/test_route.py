"""How far a call travels: the files that a send opens on its way to SQLite, and that a settle only goes down.

`python -m tests.test_route` prints both routes, from `sys.setprofile`.
"""

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import filao
from tests.test_tidy import ORDER

SOURCE = Path(filao.__file__).parent
FILES_MAX = 7  # that a send opens until its batch is handed to the database's thread


async def route(call: Callable[[], Awaitable[Any]]) -> list[str]:
    """Return the modules of ours that a call walks through on the loop, in order, until its batch is under way."""
    found: list[str] = []

    def see(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE) and not (found and found[-1] == "engines.sqlite.thread"):
            name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
            if not found or found[-1] != name:
                found.append(name)

    sys.setprofile(see)
    try:
        await call()
    finally:
        sys.setprofile(None)
    return found


async def routes(folder: Path) -> dict[str, list[str]]:
    """Return the routes of a send and of a settle, the second of each: the first learns what the others know."""
    async with filao.connect(folder / "claims.db") as broker:
        await broker.declare(filao.Queue("claims"))
        await broker.send_many("claims", range(2))
        first, second = await broker.receive_many("claims", 2)
        await first.ack()
        return {"send": await route(lambda: broker.send_to_queue("claims", 1)), "settle": await route(second.ack)}


@pytest.mark.anyio
async def test_a_send_opens_few_files_on_its_way(tmp_path: Path) -> None:
    walked = (await routes(tmp_path))["send"]
    assert walked[-1] == "engines.sqlite.thread"
    assert len(set(walked)) <= FILES_MAX, walked


@pytest.mark.anyio
async def test_a_settle_goes_down_and_never_climbs(tmp_path: Path) -> None:
    walked = (await routes(tmp_path))["settle"]
    ranks = [ORDER.index(name) for name in walked if not name.startswith("engines.")]
    assert walked[0] == "message"
    assert ranks == sorted(ranks, reverse=True), walked


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for verb, walked in asyncio.run(routes(Path(folder))).items():
            print(f"{verb}: {len(set(walked))} files: {' > '.join(walked)}")
