"""Somebody who visits a dashboard with a browser that runs nothing."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from html import unescape
from typing import Any

import httpx

import filao
from filao.dashboard import Dashboard, app
from filao.dashboard.acts import Act

HOST = "http://127.0.0.1:8748"


class Visitor:
    """Somebody with a browser that runs nothing."""

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
        async with asyncio.timeout(30):
            while 'name="stop"' in (page := await self.sees(answer.headers["location"])):
                await asyncio.sleep(0.05)
        return page


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
        try:
            yield Visitor(visitor, dashboard)
        finally:
            await dashboard.close()


def rows(page: str) -> list[tuple[int, str]]:
    """Return how many of each kind a page tells."""
    return [
        (int(count), kind)
        for count, kind in re.findall(r'num dead">(\d+)</td>.*?<th scope="row">(.*?)</th>', page, re.DOTALL)
    ]
