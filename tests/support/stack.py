"""Calls near the end of the stack, where RecursionError may end them anywhere."""

from collections.abc import Callable


def with_frames_left(frames: int, call: Callable[[], object]) -> object:
    """Make a call that can go so many frames deeper, and about one more."""
    return _deeper(_left() - frames, call)


def _left() -> int:
    try:
        return 1 + _left()
    except RecursionError:
        return 0


def _deeper(frames: int, call: Callable[[], object]) -> object:
    return _deeper(frames - 1, call) if frames > 0 else call()
