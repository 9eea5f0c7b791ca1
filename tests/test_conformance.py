"""The contract of `filao.conformance`, on every engine, through both faces."""

import asyncio
import inspect
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

import filao
import filao.sync
from filao import conformance
from filao.conformance import Check, Stage, checks

pytestmark = pytest.mark.anyio
_stages = count()  # so that each test has queues of its own on a server


class Awaited:
    """A blocking object as an async one: each of its methods runs in a thread of its own."""

    def __init__(self, blocking: Any) -> None:
        self._blocking = blocking

    def __getitem__(self, key: Any) -> Any:
        return self._blocking[key]

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._blocking, name)
        if name in ("transaction", "consume"):
            return lambda *args, **kwargs: (
                _opened(value(*args, **kwargs)) if name == "transaction" else Stream(value(*args, **kwargs))
            )
        if not inspect.ismethod(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            return _awaited(await asyncio.to_thread(value, *map(_blocking, args), **kwargs))

        return call


class Stream:
    """A blocking generator as an async one."""

    def __init__(self, blocking: Any) -> None:
        self._blocking = blocking

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        message = await asyncio.to_thread(next, self._blocking, None)  # a StopIteration would never leave its future
        if message is None:
            raise StopAsyncIteration
        return _awaited(message)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._blocking.close)


@asynccontextmanager
async def _opened(blocking: Any):
    """Enter and leave in the thread of the event loop, as a program without one would in its main thread."""
    with blocking as entered:
        yield Awaited(entered)


def _awaited(value: Any) -> Any:
    if isinstance(value, list):
        return [_awaited(item) for item in value]
    return Awaited(value) if isinstance(value, filao.sync.Message) else value


def _blocking(value: Any) -> Any:
    return value._blocking if isinstance(value, Awaited) else value


@pytest.fixture(params=["async", "sync"])
def face(request):
    return request.param


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return tmp_path / "claims.db"
    return request.getfixturevalue("postgres").url("filao")


@pytest.fixture
async def stage(face, url, clock):
    @asynccontextmanager
    async def connect():
        if face == "async":
            async with filao.connect(url, clock=clock) as broker:
                yield broker
        else:
            blocking = filao.sync.connect(url, clock=clock)
            await asyncio.to_thread(blocking.open)
            try:
                yield Awaited(blocking)
            finally:
                await asyncio.to_thread(blocking.close)

    async def advance(seconds: float) -> None:
        clock.advance(seconds)

    async with connect() as broker:
        yield Stage(broker, advance, connect, prefix=f"q{next(_stages)}")


CANCELS = {"check_cancelling_a_receive_loses_nothing", "check_cancelling_one_of_many_waiting_leaves_the_others"}


@pytest.mark.parametrize("check", checks(filao.Feature), ids=lambda check: check.__name__.removeprefix("check_"))
async def test_the_contract(check: Check, stage: Stage, face: str) -> None:
    if face == "sync" and check.__name__ in CANCELS:
        pytest.skip("a thread that waits cannot be cancelled")
    async with asyncio.timeout(60):
        await check(stage)


def test_every_check_is_entered_into_the_contract() -> None:
    modules = [value for value in vars(conformance).values() if inspect.ismodule(value)]
    written = {name for module in modules for name in vars(module) if name.startswith("check_")}
    assert written == {check.__name__ for check in checks(filao.Feature)}
