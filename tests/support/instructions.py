"""Interrupt a call at any one of our instructions, because a signal may come between any two."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import filao

SOURCES = str(Path(filao.__file__).parent)
ALL = ""
"""The sources of every library, Python's own too."""


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Raise KeyboardInterrupt at our instruction number `at`; return whether there are so many."""

    def interrupt() -> None:
        sys.settrace(None)
        raise KeyboardInterrupt

    try:
        return stopped_at(call, at, interrupt)
    except KeyboardInterrupt:
        return True


def stopped_at(call: Callable[[], object], at: int, do: Callable[[], object], *, of: str = SOURCES) -> bool:
    """Do something at instruction number `at` of these sources; return whether there are so many."""
    return _traced(call, lambda number: do() if number == at else None, of) >= at


def instructions(call: Callable[[], object]) -> int:
    """Return how many of our instructions a call takes."""
    return _traced(call, lambda _: None, SOURCES)


def _traced(call: Callable[[], object], each: Callable[[int], object], of: str) -> int:
    """Make a call, do something before each instruction of these sources, and return how many there were."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(of):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            each(count)
        return trace

    gc.disable()  # what is raised in a callback of the collector's, of which Hypothesis has one, is lost
    sys._getframe().f_trace_opcodes = True  # Python 3.12 counts opcodes only if some frame wanted it at `settrace`
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
