"""Programs on a terminal of their own, as for a user."""

import os
import pty
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PATIENCE = 120.0  # seconds, for a loaded machine


@contextmanager
def on_a_terminal(program: Sequence[str], **environment: str) -> Iterator[int]:
    """Yield the terminal of a program, which the block must tell to end, and which must end without an error."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color"} | environment
        os.execv(program[0], [*program])
    try:
        yield terminal
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)


def seen_on(terminal: int, *wanted: str) -> str:
    """Read what a terminal shows until all of these texts have been there."""
    seen, until = "", time.monotonic() + PATIENCE
    while not all(one in seen for one in wanted):
        assert time.monotonic() < until, seen[-3000:]
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 65_536).decode(errors="replace")
    return seen
