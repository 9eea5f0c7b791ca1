"""What it costs a PostgreSQL server that sessions listen: the price of one NOTIFY that concerns one of them.

`python -m bench.listening [--sessions 8 200]`: nothing else runs. It prints the server's CPU for each NOTIFY, and how
long the one took to hear of it.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psycopg
from tests.support.servers import postgres_server

from bench.idle import cpu

CALLS = 500
HEARD_WITHIN = 10.0  # seconds


def measure(count: int) -> dict[str, float]:
    """Let so many sessions listen, each on a channel of its own, and call one after the other."""
    folder = Path("/tmp") / f"filao-bench-{os.getpid()}-{time.monotonic_ns()}"
    with postgres_server(folder) as server, ExitStack() as stack:
        with psycopg.connect(server.url(), autocommit=True) as operator:
            operator.execute("ALTER SYSTEM SET max_connections = 1000")
        server.stop()
        server.start()
        postmaster = int((folder / "data" / "postmaster.pid").read_text().split()[0])
        url = server.create("listening")
        sender = stack.enter_context(psycopg.connect(url, autocommit=True))
        sessions = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(count)]
        for number, session in enumerate(sessions):
            session.execute(f"LISTEN filao_{number}".encode())
        return _called(sender, sessions, postmaster)


def _called(
    sender: "psycopg.Connection[tuple[object, ...]]",
    sessions: "list[psycopg.Connection[tuple[object, ...]]]",
    postmaster: int,
) -> dict[str, float]:
    waits: list[float] = []
    used = cpu(postmaster)
    for call in range(CALLS):
        number = call * 7 % len(sessions)
        began = time.monotonic()
        sender.execute("SELECT pg_notify(%s, '1')", (f"filao_{number}",))
        if not list(sessions[number].notifies(timeout=HEARD_WITHIN, stop_after=1)):
            raise TimeoutError(f"session {number} has heard nothing")
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    return {
        "server's CPU for a call, ms": (cpu(postmaster) - used) / CALLS * 1000,
        "heard after, median ms": statistics.median(waits) * 1000,
        "heard after, least ms": min(waits) * 1000,
    }


def main() -> None:
    """Run it, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.listening", description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[8, 200])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    print(json.dumps({count: measure(count) for count in options.sessions}, indent=1))


if __name__ == "__main__":
    main()
