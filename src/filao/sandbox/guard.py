"""Stands over a learner's code, and ends it with all that it has started, wherever that hides.

On Linux, what has lost its parent becomes a child of the nearest ancestor that asked for it. The guard asks: so nothing
leaves its tree, neither with a session of its own nor with an empty environment. Elsewhere only the code's process
group is known.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>


def go_behind_a_guard() -> None:
    """Return in a child without input, over which this process stands guard until its own input or the child ends.

    Call it before anything is open and while there is one thread, as `os.fork` wants it.
    """
    _ask_linux(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child:
        _guard(child)
    os.setsid()
    _ask_linux(PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard be killed
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)


def descendants(pids: Iterable[int]) -> list[int]:
    """Return all processes below some; none where /proc cannot be read."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [child for pid in pids for child in children.get(pid, ())]
    for pid in found:  # which grows
        found += children.get(pid, ())
    return found


def kill_below(pid: int) -> None:
    """Kill all processes below one that are there now."""
    for below in descendants([pid]):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(below, signal.SIGKILL)


def _guard(child: int) -> NoReturn:
    """Wait for the child, end what is left of it, and end as it did, without tidying up what is the child's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # whatever the code sends to its parent
    threading.Thread(target=_kill_when_input_ends, args=(child,), daemon=True).start()
    ended, status = os.waitpid(-1, 0)
    while ended != child:  # what has lost its parent ends, too
        ended, status = os.waitpid(-1, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):  # there is none any more
        while True:
            kill_below(os.getpid())
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass  # what was below those that are gone is ours now: look again
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)  # as a shell tells it


def _kill_when_input_ends(child: int) -> None:
    while os.read(0, 1024):
        pass
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _ask_linux(*request: int) -> None:
    """Ask the kernel for something; where it cannot be asked, less is known of what the code starts."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(*(ctypes.c_ulong(part) for part in request), *(ctypes.c_ulong(0),) * 3)
