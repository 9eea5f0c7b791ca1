"""Processes that play roles: they are started, begin at the same moment, and report."""

import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

ENDED_WITHIN = 600.0  # seconds

Process = subprocess.Popen[str]


def start(role: str, peer: str, place: str, number: int = 0) -> Process:
    """Start a process; it waits until it is let go."""
    command = [sys.executable, "-m", "bench.roles", role, peer, place, str(number)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: Process) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with {process.wait()}")  # type: ignore[arg-type]
    return line.strip()


def let_go(processes: Sequence[Process]) -> None:
    """Let all begin together."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def result(process: Process) -> dict[str, Any]:
    """Return the result of a process."""
    found: dict[str, Any] = json.loads(said(process))
    process.wait(ENDED_WITHIN)
    return found


def play(role: str, peer: str, place: str, number: int = 0) -> dict[str, Any]:
    """Play one role in one process."""
    with crew([(role, peer, place, number)]) as (process,):
        let_go([process])
        return result(process)


@contextmanager
def crew(parts: Sequence[tuple[str, str, str, int]]) -> Generator[list[Process]]:
    """Start processes, and leave none behind."""
    processes: list[Process] = []
    try:
        for part in parts:
            processes.append(start(*part))
            said(processes[-1])  # one after the other: some peers cannot be opened by two processes at once
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
