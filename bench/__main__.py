"""`python -m bench [--only MEASURE …] [--quick] [--output FOLDER]`: measure, print, and keep what was found."""

import argparse
import importlib
import os
import platform
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.servers import rabbitmq_server, redis_server

from bench import report
from bench.idle import idle
from bench.lone import lone
from bench.measures import MEASURES as QUEUES
from bench.measures import Ground, to_json
from bench.old_transactions import old_transactions
from bench.peers import PACKAGES, PEERS
from bench.postgresql import postgresql
from bench.rabbitmq import rabbitmq
from bench.sandbox import sandbox
from bench.views import views
from bench.working import working

MEASURES = QUEUES | {
    "lone": lone,
    "working": working,
    "views": views,
    "postgresql": postgresql,
    "old-transactions": old_transactions,
    "idle": idle,
    "rabbitmq": rabbitmq,
    "sandbox": sandbox,
}
SERVED = {"postgresql", "old-transactions", "idle", "lone", "sandbox"}  # they need no server, or start their own
QUICK = 0.02  # the part of a full run's numbers that shows that everything works; it measures nothing
PROGRAMS = {"Redis": "redis-server", "RabbitMQ": "rabbitmq-server"}


@contextmanager
def _rabbitmq(folder: Path) -> Generator[str]:
    with rabbitmq_server(folder) as node:
        yield str(node.port)


STARTERS = {"Redis": redis_server, "RabbitMQ": _rabbitmq}


def main() -> int:
    """Run the measures; exit with 1 when a bar was missed and --strict was given."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers; `filao.sync` minds another one
    output = Path(options.output).absolute()  # servers are started in folders of their own
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=output, prefix="run-")))
        peers = [peer for peer in PEERS if peer == "Filao" or _is_there(peer)]
        ports: dict[str, str] = {}
        if set(options.only or MEASURES) - SERVED:
            ports = {peer: stack.enter_context(STARTERS[peer](folder / peer)) for peer in peers if peer in STARTERS}
        ground = Ground(folder, ports, tuple(peers), QUICK if options.quick else 1.0)
        found: dict[str, Any] = {"machine": _machine()}
        for name in options.only or MEASURES:
            began = time.monotonic()
            found[name] = MEASURES[name](ground)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
            (output / "figures.json").write_text(to_json(found) + "\n", encoding="utf-8")
    judged = report.bars(found)
    print(*report.tables(found), "", *judged, sep="\n")
    found["bars"] = [str(bar) for bar in judged]
    (output / "figures.json").write_text(to_json(found) + "\n", encoding="utf-8")
    report.plot(found, output / "figures.png")
    return int(options.strict and not all(bar.holds for bar in judged))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="these measures, not all")
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything works")
    parser.add_argument("--strict", action="store_true", help="fail when a bar is missed")
    parser.add_argument("--output", default="build/bench", help="where figures.json, figures.png and the databases go")
    return parser.parse_args()


def _is_there(peer: str) -> bool:
    """Return whether a peer can be measured; if not, print why."""
    program = PROGRAMS.get(peer)
    if program and not shutil.which(program, path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin"):
        print(f"{peer}: skipped, because {program} is not installed")
        return False
    try:
        importlib.import_module(PACKAGES[peer])
    except ImportError as error:
        print(f"{peer}: skipped, because {error}")
        return False
    return True


def _machine() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
