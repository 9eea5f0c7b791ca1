"""Stop a call at any instruction of ours, to do there what may happen between any two."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import filao

SOURCES = str(Path(filao.__file__).parent)


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Raise KeyboardInterrupt at the instruction of ours that comes as number `at`; return whether there was one."""

    def interrupt() -> None:
        sys.settrace(None)
        raise KeyboardInterrupt

    try:
        return stopped_at(call, at, interrupt)
    except KeyboardInterrupt:
        return True


def stopped_at(call: Callable[[], object], at: int, do: Callable[[], object]) -> bool:
    """Do something at the instruction of ours that comes as number `at`; return whether there was one."""
    left = at

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                do()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return left <= 0


def instructions(call: Callable[[], object]) -> int:
    """Return how many instructions of ours a call takes."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count
