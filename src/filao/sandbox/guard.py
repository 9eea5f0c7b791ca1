"""Guards a learner's code, and ends it together with all that it has started.

On Linux, a process that has lost its parent becomes a child of the nearest ancestor that asked for that. The guard
asks, so that nothing can leave its tree, neither by a new session nor by an empty environment. Elsewhere only the
code's process group is known.
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
    """Fork, and return in the child, which has no input; the parent guards it until its own input or the child ends.

    Call this before anything is open and while there is only one thread, because it forks.
    """
    _ask_linux(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child:
        _guard(child)
    os.setsid()
    _ask_linux(PR_SET_PDEATHSIG, signal.SIGKILL)  # in case the guard is killed
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
    for pid in found:  # it grows meanwhile
        found += children.get(pid, ())
    return found


def kill_below(pid: int) -> None:
    """Kill all processes that are now below one."""
    for below in descendants([pid]):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(below, signal.SIGKILL)


def _guard(child: int) -> NoReturn:
    """Wait for the child, end what is left of it, and exit as it did, without any cleanup, which is the child's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the code may send any to its parent
    threading.Thread(target=_kill_when_input_ends, args=(child,), daemon=True).start()
    ended, status = os.waitpid(-1, 0)
    while ended != child:  # an orphan below has ended
        ended, status = os.waitpid(-1, 0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):  # none is left
        while True:
            kill_below(os.getpid())
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass  # the children of those that are gone are now ours: look again
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)  # a shell's code for a signal


def _kill_when_input_ends(child: int) -> None:
    while os.read(0, 1024):
        pass
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _ask_linux(*request: int) -> None:
    """Call prctl on Linux; elsewhere less is known of what the code starts."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(*(ctypes.c_ulong(part) for part in request), *(ctypes.c_ulong(0),) * 3)
