"""Calls that take dead letters out and put them back, in order, whatever becomes of their callers.

The server's client ends a channel on which a call is cancelled, and the server then puts back in any order what was
taken over it. So each such call is a task of its own, which no cancellation of its caller meets while it has anything:
it is asked to stop at the next message instead, and puts back what it has.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from filao.errors import EngineUnavailable

ENDED_WITHIN = 10.0  # seconds that closing leaves them: some thousand dead letters are back by then

R = TypeVar("R")


@dataclass(eq=False, slots=True)
class Errand:
    """One call, as the task sees it that does it."""

    has_taken: bool = False
    """It has taken something, or is about to, and must not be cut off."""
    is_left: bool = False
    """Nobody waits for its result: it is to put back what it has."""


class Errands:
    """Those of one process that are under way."""

    def __init__(self) -> None:
        self._under_way: dict[asyncio.Task[Any], Errand] = {}

    async def run(self, work: Callable[[Errand], Coroutine[Any, Any, R]]) -> R:
        """Do it to its end; it goes on to put back what it has when the caller is cancelled."""
        errand = Errand()
        task = asyncio.get_running_loop().create_task(work(errand))
        self._under_way[task] = errand
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise EngineUnavailable("the broker was closed meanwhile") from None
            _leave(task, errand)
            raise

    async def close(self) -> None:
        """Let all put back what they have, and cut off those that take too long."""
        for task, errand in self._under_way.items():
            _leave(task, errand)
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=ENDED_WITHIN)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        del self._under_way[task]
        if not task.cancelled():
            task.exception()  # which the caller has raised, if it is still there


def _leave(task: "asyncio.Task[Any]", errand: Errand) -> None:
    errand.is_left = True
    if not errand.has_taken:
        task.cancel()
