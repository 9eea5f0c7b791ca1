"""The processes of a room, and how they end: they are sent home through a closed pipe, or killed.

Each is a separate Python with a pipe as its standard input. When the pipe closes, because this process closes it or
dies, it ends. Its standard error is kept, in case it ends otherwise.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from filao.sandbox.journal import PORTAL, PRINTER

HOME_WITHIN = 5.0  # seconds for the processes to finish what they have in hand, before they are killed
LAST_WORDS_MAX = 2_000  # characters of a traceback that are shown


class Crew:
    """All processes that were started; `end_all` ends them in any case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._meant: set[int] = set()  # those that we told to end, or killed

    def start(self, number: int, module: str, orders: msgspec.Struct) -> int:
        """Start a process and return its pid."""
        command = [sys.executable, "-P", "-m", module, msgspec.json.encode(orders).decode()]
        with self._last_words(number).open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                cwd=self._folder,
                env=own_environment(),
                start_new_session=True,  # so that Ctrl-C reaches only us, who then send them home
            )
        self._processes[number] = process
        return process.pid

    def tell(self, number: int, order: msgspec.Struct) -> bool:
        """Write an order into a process's pipe, and return whether it is there to read it."""
        pipe = self._processes[number].stdin
        assert pipe is not None
        with suppress(BrokenPipeError, ValueError):
            pipe.write(msgspec.json.encode(order) + b"\n")
            pipe.flush()
            return True
        return False

    def has_ended(self, number: int) -> bool:
        """Return whether a process has ended."""
        return self._processes[number].poll() is not None

    def failure(self, number: int) -> str:
        """Return how a process ended that was not told to, with its last words; empty for any other."""
        code = self._processes[number].poll()
        return "" if code is None or number in self._meant else self._failure(number, code)

    def stop_if(self, number: int, wanted: Callable[[], bool]) -> bool:
        """Stop a process (SIGSTOP), and leave it stopped if it is `wanted`; return whether it is stopped now.

        A stopped process cannot finish its claim between our look and what we do next.
        """
        process = self._processes[number]
        if process.poll() is not None:
            return False
        os.kill(process.pid, signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            return False
        if wanted():
            return True
        self.go_on(number)
        return False

    def go_on(self, number: int) -> None:
        """Let a stopped process go on."""
        self._signal(number, signal.SIGCONT)

    def kill(self, number: int) -> float:
        """Kill a process, stopped or not; return when (monotonic)."""
        self._meant.add(number)
        at = time.monotonic()
        self._signal(number, signal.SIGKILL)
        self._processes[number].wait()
        return at

    def dismiss(self, number: int) -> None:
        """Let a process finish what it has in hand and end, without waiting for it."""
        self._meant.add(number)
        pipe = self._processes[number].stdin
        assert pipe is not None
        pipe.close()

    def _signal(self, number: int, what: signal.Signals) -> None:
        if self._processes[number].poll() is None:
            os.kill(self._processes[number].pid, what)

    def end_all(self) -> None:
        """Send all home; those that do not go are killed."""
        self._close_pipes()
        until = time.monotonic() + HOME_WITHIN
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _close_pipes(self) -> None:
        for process in self._processes.values():
            if process.stdin is not None:
                process.stdin.close()

    def _failure(self, number: int, code: int) -> str:
        words = self._last_words(number).read_text(encoding="utf-8", errors="replace").strip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self._name(number)} {how}\n{words[-LAST_WORDS_MAX:]}".strip()

    def _last_words(self, number: int) -> Path:
        return self._folder / f"{self._name(number).replace(' ', '-')}.err"

    @staticmethod
    def _name(number: int) -> str:
        return {PORTAL: "the portal", PRINTER: "the printer"}.get(number, f"consumer {number}")


def is_there(pid: int) -> bool:
    """Return whether a process of this machine lives; for 0, which stands for an unknown process, True."""
    try:
        os.kill(pid, 0) if pid else None
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def own_environment() -> dict[str, str]:
    """Return an environment in which Python imports no file that happens to be in the current folder.

    `-P` keeps that folder off `sys.path`; an empty or a relative entry of PYTHONPATH would put it back.
    """
    paths = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
