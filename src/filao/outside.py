"""A session for threads other than its loop's: each operation is done in the thread that asks for it, or on the loop.

An operation that need wait for nobody else is done in the thread, or in another one that asks for something at the same
time (`company.py`). All others go to the loop, where they share a commit with whatever else is there. Coroutines that
use such a session never suspend in a thread; on the loop they behave as with the session itself.
"""

import threading
from contextlib import suppress
from typing import Any

from filao.calls import Caller
from filao.company import Company
from filao.engine import Operation, Result
from filao.errors import FilaoError
from filao.queue import Queue
from filao.session import Session


def outside(session: Session, caller: Caller) -> Session:
    """Return a session for all threads from an open one. Called on its loop, to which `caller` passes calls."""
    loop_thread = threading.get_ident()

    async def submit(operation: Operation, since: float | None = None) -> Result:
        session.check_open()
        if threading.get_ident() == loop_thread:
            return await session.submit(operation, since)
        caller.check()
        results: list[Result] = []
        if not company.at_once(operation, results):
            return caller.call(submit, operation, since)
        (result,) = results
        if isinstance(result, FilaoError):
            raise result
        return result

    async def find(queue: str) -> Queue[Any]:
        return caller.call(session.engine.find, queue)

    def give_back_unread(result: Result) -> None:
        with suppress(RuntimeError):  # the loop has ended, and gave back what was held
            caller.loop.call_soon_threadsafe(session.give_back_unread, result)

    company = Company(session, give_back_unread)
    return session.anywhere(submit, find, give_back_unread, company.at_once)
