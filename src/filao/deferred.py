"""A transaction that begins with its first statement, so that what is slow before it makes nobody wait.

A worker gives it to its handlers: on SQLite a transaction holds the one write lock of the file.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self

from filao.engine import EngineTransaction, Operation, Result


class Deferred:
    """See `filao.engine.EngineTransaction`."""

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[EngineTransaction]]) -> None:
        self._opening = opening
        self._opened = AsyncExitStack()
        self._transaction: EngineTransaction | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.__aexit__(kind, error, trace)

    async def execute(self, sql: str, parameters: Any) -> list[Any]:
        """Begin, if nobody has, and run one statement."""
        return await (await self._begun()).execute(sql, parameters)

    async def apply(self, operations: Sequence[Operation]) -> list[Result]:
        """Begin, if nobody has, and do the operations."""
        return await (await self._begun()).apply(operations)

    async def _begun(self) -> EngineTransaction:
        async with self._lock:
            if self._transaction is None:
                self._transaction = await self._opened.enter_async_context(self._opening())
            return self._transaction
