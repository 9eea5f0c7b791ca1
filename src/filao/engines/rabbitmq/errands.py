"""Calls that take dead letters out and put them back, in order, whatever becomes of their callers.

The client library ends a channel on which a call is cancelled, and the server then puts back in any order what was
taken over it. So each such call is a task of its own, which is not cancelled with its caller while it has taken
anything: it is asked to stop at the next message instead, and puts back what it has.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from filao.errors import EngineUnavailable

ENDED_WITHIN = 10.0  # seconds that closing waits for errands: enough to put back some thousand dead letters

R = TypeVar("R")


@dataclass(eq=False, slots=True)
class Errand:
    """The state of one call, shared with the task that does it."""

    has_taken: bool = False
    """Whether it has taken something, or is about to, so that it must not be cancelled."""
    is_left: bool = False
    """Whether nobody waits for its result any more, so that it should put back what it has."""


class Errands:
    """The errands of one process that are under way."""

    def __init__(self) -> None:
        self._under_way: dict[asyncio.Task[Any], Errand] = {}

    async def run(self, work: Callable[[Errand], Coroutine[Any, Any, R]]) -> R:
        """Do an errand; if the caller is cancelled, it goes on until it has put back what it has."""
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
        """Let all errands put back what they have, and cancel those that take too long."""
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
            task.exception()  # raised by the caller, if it still waits


def _leave(task: "asyncio.Task[Any]", errand: Errand) -> None:
    errand.is_left = True
    if not errand.has_taken:
        task.cancel()
