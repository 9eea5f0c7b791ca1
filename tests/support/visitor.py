"""A visitor of a dashboard, whose browser runs no scripts."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from html import unescape
from typing import Any

import httpx
import pytest

import filao
from filao.dashboard import Dashboard, app, views, watch
from filao.dashboard.acts import Act
from filao.dashboard.jobs import Jobs

PATIENCE = 60.0  # seconds, for a loaded machine
HOST = "http://127.0.0.1:8748"


class Visitor:
    """A visitor whose browser runs no scripts."""

    def __init__(self, client: httpx.AsyncClient, dashboard: Dashboard) -> None:
        self.client = client
        self.dashboard = dashboard

    async def sees(self, path: str, status: int = 200) -> str:
        answer = await self.client.get(path)
        assert answer.status_code == status, answer.text
        return unescape(answer.text)

    async def proof(self) -> str:
        found = re.search(r'name="proof" value="(\w+)"', await self.sees("/en/queues"))
        assert found
        return found[1]

    async def sends(self, act: Act, **fields: str) -> httpx.Response:
        form = {"proof": await self.proof(), "do": act.packed(), "confirmed": "yes"} | fields
        return await self.client.post("/en/act", data=form)

    async def does(self, act: Act, **fields: str) -> str:
        """Do it, and return the page that it leads to, once it has ended."""
        answer = await self.sends(act, **fields)
        assert answer.status_code == 303, answer.text
        jobs: Jobs = self.dashboard._closing[0]
        async with asyncio.timeout(60):
            while jobs.running():
                await asyncio.sleep(0.01)
        return await self.sees(answer.headers["location"])


@asynccontextmanager
async def visiting(
    broker: filao.Broker,
    host: str = HOST,
    client: str = "127.0.0.1",
    wrap: Callable[[Any], Any] = lambda x: x,
    **how: Any,
) -> AsyncGenerator[Visitor]:
    dashboard = app(broker, **how)
    transport = httpx.ASGITransport(wrap(dashboard), client=(client, 40_000))
    async with httpx.AsyncClient(transport=transport, base_url=host) as visitor:
        with pytest.MonkeyPatch.context() as busy:  # a page tells all, on a busy machine too
            busy.setattr(views, "KINDS_WITHIN", PATIENCE)
            busy.setattr(watch, "FIRST_WITHIN", PATIENCE)
            try:
                yield Visitor(visitor, dashboard)
            finally:
                await dashboard.close()


def rows(page: str) -> list[tuple[int, str]]:
    """Return the counts of each kind that a page shows."""
    return [
        (int(count), kind)
        for count, kind in re.findall(r'num dead">(\d+)</td>.*?<th scope="row">(.*?)</th>', page, re.DOTALL)
    ]
