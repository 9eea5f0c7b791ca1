"""Tasks that a handler started and did not wait for: they run on after its message is acknowledged, and are lost in a crash.

A worker reports each kind once; it neither waits for them nor cancels them, because some libraries start their
housekeeping within the first call, which may be a handler's.
"""

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

log = logging.getLogger("filao.worker")

_children: "ContextVar[set[asyncio.Task[Any]] | None]" = ContextVar("filao_handler_tasks", default=None)
_OURS = str(Path(__file__).parent.parent)


class Leaks:
    """Sees the tasks that handlers start, and reports those that outlive them."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()
        self._left: set[asyncio.Task[Any]] = set()
        """They are held, or the event loop could drop them half-way."""

    @contextmanager
    def seen(self, loop: asyncio.AbstractEventLoop) -> Generator[None]:
        """See the tasks that are started on this loop."""
        outer = loop.get_task_factory()

        def start(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
            task = asyncio.Task(coroutine, loop=loop, **options) if outer is None else outer(loop, coroutine, **options)
            children = _children.get()
            if children is not None and isinstance(task, asyncio.Task):
                children.add(task)
                task.add_done_callback(children.discard)
            return task

        loop.set_task_factory(start)
        try:
            yield
        finally:
            loop.set_task_factory(outer)

    def begin(self) -> "set[asyncio.Task[Any]]":
        """Let the running task be a handler's, and return the set of those that it starts."""
        children: set[asyncio.Task[Any]] = set()
        _children.set(children)
        return children

    def report(self, handler: str, children: "set[asyncio.Task[Any]]") -> None:
        """Say which tasks a handler that has ended left behind."""
        for task in [task for task in children if not task.done() and not _is_ours(task)]:
            self._left.add(task)
            task.add_done_callback(self._left.discard)
            name = getattr(task.get_coro(), "__qualname__", repr(task))
            if (handler, name) not in self._reported:
                self._reported.add((handler, name))
                log.warning(
                    "the handler %s left a task running, %s. Its message is settled without it, and a crash would lose "
                    "what it does: await it, or use asyncio.TaskGroup",
                    *(handler, name),
                )


def _is_ours(task: "asyncio.Task[Any]") -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename.startswith(_OURS)
