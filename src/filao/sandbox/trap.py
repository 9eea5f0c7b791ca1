"""Runs a learner's consumer unchanged, in a process of its own, and writes down what it does to messages.

The process hears no orders, and the code has no input. When the sandbox ends or says so, a guard ends the process and
all that the code has started, even if the code is in an endless loop. What the code may write and how much memory it
may take are bounded. The process may be told to die by SIGKILL just before it acknowledges a claim, as one does that
loses its power after the work; or to be at work on a claim until it is killed, so that the kill finds it there on
every machine.
"""

import json
import os
import resource
import runpy
import signal
import sqlite3
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

import filao
from filao.sandbox.guard import go_behind_a_guard
from filao.sandbox.journal import Journal, What, journal_of
from filao.sandbox.orders import number_in

ENDLESS = 3_600.0  # seconds of work on a claim whose holder is to be killed
WRITTEN_MAX = 16 * 1024 * 1024  # bytes of a file that a learner's code may write, its output included
MEMORY_MAX = 2 * 1024**3  # bytes of addresses: a list that grows for ever ends in a MemoryError of its own process


class Trial(msgspec.Struct, frozen=True):
    """What is run, where, and what happens to it."""

    program: str
    file: str
    journals: str
    number: int
    kill_at_ack: int = 0
    """The claim before whose first acknowledgement the process dies."""
    endless: int = 0
    """The claim whose first holder is at work until it is killed."""


class _Endless(dict[str, Any]):
    """The body of a claim whose work does not end; whoever reads its effort has begun the work."""

    def __init__(self, body: dict[str, Any], begun: Callable[[], None]) -> None:
        super().__init__(body)
        self._begun = begun

    def __getitem__(self, key: str) -> Any:
        if key != "effort":
            return super().__getitem__(key)
        self._begun()
        return ENDLESS

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == "effort" else super().get(key, default)


class Trap:
    """Writes down which verbs of a message the learner's code uses, and kills the process where it was told to."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._journal = Journal(journal_of(Path(trial.journals), trial.number), trial.number)
        self._business = sqlite3.connect(trial.file, timeout=5)

    def set(self) -> None:
        """Wrap the verbs of `filao.Message` and `filao.Broker`."""
        message: Any = filao.Message
        message.ack = self._around(message.ack, "acked")
        message.nack = self._around(message.nack, "nacked")
        message.reject = self._around(message.reject, "failed")
        message.transaction = self._around_transaction(message.transaction)
        broker: Any = filao.Broker
        broker.receive_from_queue = self._around_receive(broker.receive_from_queue)

    def note(self, what: What, message: "filao.Message[Any] | None" = None, note: str = "") -> None:
        """Write down what the learner's code did."""
        if message is None:
            self._journal.write(what, note=note)
        else:
            claim = number_in(message.body, "claim_id")
            self._journal.write(what, message=message.id, claim=claim, attempt=message.attempt, note=note)

    def _around(self, verb: Callable[..., Awaitable[None]], what: What) -> Callable[..., Awaitable[None]]:
        async def settle(message: "filao.Message[Any]", *arguments: Any, **named: Any) -> None:
            note = ""
            if what == "acked":
                self._die_if_meant(message)
                note = "" if self._is_paid(message) else "unpaid"
            await verb(message, *arguments, **named)
            self.note(what, message, note)

        return settle

    def _around_transaction(self, verb: Callable[..., Any]) -> Callable[..., AbstractAsyncContextManager[Any]]:
        @asynccontextmanager
        async def transaction(message: "filao.Message[Any]", *arguments: Any, **named: Any) -> AsyncGenerator[Any]:
            async with verb(message, *arguments, **named) as tx:
                yield tx
                self._die_if_meant(message)
            self.note("acked", message, "" if self._is_paid(message) else "unpaid")

        return transaction

    def _around_receive(self, verb: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def receive(*arguments: Any, **named: Any) -> Any:
            message = await verb(*arguments, **named)
            if message is not None:
                self.note("received", message, "once" if message.settled else "")
                if message.attempt == 1 and number_in(message.body, "claim_id") == self._trial.endless:
                    message.body = _Endless(message.body, lambda: self.note("halted", message))
            return message

        return receive

    def _die_if_meant(self, message: "filao.Message[Any]") -> None:
        if message.attempt == 1 and number_in(message.body, "claim_id") == self._trial.kill_at_ack:
            self.note("halted", message)
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_paid(self, message: "filao.Message[Any]") -> bool:
        claim = number_in(message.body, "claim_id")
        found = self._business.execute("SELECT count(*) FROM payment WHERE claim = ?", (claim,)).fetchone()
        return bool(found[0])


def _bound() -> None:
    for what, most in ((resource.RLIMIT_FSIZE, WRITTEN_MAX), (resource.RLIMIT_AS, MEMORY_MAX)):
        _, hard = resource.getrlimit(what)
        if hard == resource.RLIM_INFINITY or hard > most:
            resource.setrlimit(what, (most, most))


def _line_of(error: BaseException, program: str) -> int:
    """Return the line of the learner's code in which an error arose; 0 when it arose elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == program]
    return frames[-1].lineno or 0 if frames else 0


def main() -> None:
    """Run the learner's code, and write down how it ended."""
    trial = msgspec.json.decode(sys.argv[1], type=Trial)
    go_behind_a_guard()
    _bound()
    trap = Trap(trial)
    trap.set()
    sys.argv = [trial.program, trial.file]
    try:
        runpy.run_path(trial.program, run_name="__main__")
    except SystemExit as end:
        trap.note("troubled", note=json.dumps({"how": "exited", "code": str(end.code)[:200], "line": 0}))
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"[:300]
        line = _line_of(_root(error), trial.program)
        trap.note("troubled", note=json.dumps({"how": "raised", "error": text, "line": line}))
    else:
        trap.note("troubled", note=json.dumps({"how": "ended", "line": 0}))


def _root(error: BaseException) -> BaseException:
    """Return the first error inside groups."""
    inner: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    return _root(inner[0]) if inner else error


if __name__ == "__main__":
    main()
