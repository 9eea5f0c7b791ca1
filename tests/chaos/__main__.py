"""Play scenarios, and print a row for each, as docs/reliability.md has them; exit with 1 when a promise was broken."""

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos import postgresql, rabbitmq
from tests.chaos.account import SCENARIOS, Scenario

HEAD = (
    (
        "| scenario | engine | recovery, s | silence, s | confirmed | lost | acknowledged twice | delivered again "
        "| remarks |"
    ),
    "|---|---|---|---|---|---|---|---|---|",
)
MODULES = (postgresql, rabbitmq)  # whose import registers their scenarios
MAY_DOUBLE = ("RabbitMQ",)


def play(scenario: Scenario) -> bool:
    """Play one and print its row; return whether all promises were kept."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="filao-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # for the user that a server runs as
        try:
            chaos = asyncio.run(scenario.play(folder))
        except Exception:
            traceback.print_exc()
            print(f"| {scenario.name} | {scenario.engine} | failed |", flush=True)
            return False
    remarks = "; ".join([*chaos.remarks, f"{time.monotonic() - began:.0f} s in all"])
    recovery = f"{max(chaos.recoveries):.2f}"
    found = (recovery, f"{chaos.silence:.2f}", f"{chaos.confirmed:,}", chaos.lost, chaos.doubled, chaos.again, remarks)
    print("|", " | ".join(map(str, (scenario.name, scenario.engine, *found))), "|", flush=True)
    return not chaos.lost and (not chaos.doubled or scenario.engine in MAY_DOUBLE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenario) - set(SCENARIOS):
        parser.error(f"no scenario is called {', '.join(sorted(unknown))}; there are: {', '.join(SCENARIOS)}")
    if arguments.list:
        for scenario in SCENARIOS.values():
            print(f"{scenario.name:20} {scenario.engine:10} {scenario.story}")
        return 0
    print(*HEAD, sep="\n", flush=True)
    kept = [play(SCENARIOS[name]) for name in arguments.scenario or SCENARIOS]  # all, whatever becomes of one
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
