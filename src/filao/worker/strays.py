"""Tasks that a handler started and did not wait for: they outlive its message, and a crash loses what they do.

A worker reports each kind once. It neither waits for them nor cancels them, because some libraries start their
housekeeping in their first call, which may be a handler's.
"""

import asyncio
import logging
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from typing import Any

Children = dict["asyncio.Task[Any]", Any]
"""Tasks that a handler started, each with its coroutine."""
_children: "ContextVar[Children | None]" = ContextVar("filao_handler_tasks", default=None)
_OURS = str(Path(__file__).parent.parent)


class Strays:
    """Sees the tasks that handlers start, and reports those that outlive them."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()
        self._left: set[asyncio.Task[Any]] = set()
        """Held here, because the event loop may drop a task that nobody holds."""

    @contextmanager
    def seen(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """See the tasks that are started on this loop in the block, in which other workers may come there and go."""
        outer = loop.get_task_factory()
        factory = outer if isinstance(outer, _Seeing) else _Seeing(outer)
        loop.set_task_factory(factory)
        factory.workers += 1
        try:
            yield
        finally:
            factory.workers -= 1
            if not factory.workers and loop.get_task_factory() is factory:  # otherwise the program has set another one
                loop.set_task_factory(factory.outer)

    def context(self, children: "Children") -> Context:
        """Return a context for a handler, in which all tasks that it starts become its children."""
        context = copy_context()
        context.run(_children.set, children)
        return context

    def report(self, handler: str, children: "Children", log: "logging.LoggerAdapter[logging.Logger]") -> None:
        """Log which tasks a handler that has ended left behind."""
        for task, coroutine in list(children.items()):
            if task.done() or _is_ours(coroutine):
                continue
            self._left.add(task)
            task.add_done_callback(self._left.discard)
            name = getattr(coroutine, "__qualname__", repr(task))
            if (handler, name) not in self._reported:
                self._reported.add((handler, name))
                log.warning(
                    "the handler %s left a task running, %s. Its message is settled without it, and a crash would lose "
                    "what it does: await it, or use asyncio.TaskGroup",
                    *(handler, name),
                )


class _Seeing:
    """A task factory, for all workers of a loop, that notes which tasks their handlers start."""

    def __init__(self, outer: Any) -> None:
        self.outer = outer
        """The factory that makes the tasks; None: asyncio does."""
        self.workers = 0
        """How many need it."""

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        children = _children.get()
        inner = coroutine if children is None or _is_ours(coroutine) else _contained(coroutine)
        task: asyncio.Future[Any] = (
            asyncio.Task(inner, loop=loop, **options) if self.outer is None else self.outer(loop, inner, **options)
        )
        if children is not None and isinstance(task, asyncio.Task):
            children[task] = coroutine
            task.add_done_callback(lambda task: children.pop(task, None))
        return task


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Let a task fail that would end the loop: asyncio passes these two errors on to the code that runs the loop."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"a task of the handler raised {error!r}") from error


def _is_ours(coroutine: object) -> bool:
    code = getattr(coroutine, "cr_code", None)
    return code is not None and code.co_filename.startswith(_OURS)
