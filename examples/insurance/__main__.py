"""`python -m examples.insurance`: run the insurer in a folder, give it some work, and say what became of it.

With --serve it stays, for you to try: curl -d '{"policy": 12, "type": "storm", "amount": 12000}' localhost:PORT/claims
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for everything to start, and for the work to be done


def main() -> int:
    """Run it, and exit with 0 when every claim was settled and every policy printed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that all that was started ends too
    with tempfile.TemporaryDirectory(prefix="insurance-") as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        port = options.port or _free_port()
        with insurer(folder, port, options.workers):
            _wait_for(port)
            print(f"The portal is at http://127.0.0.1:{port}/claims, its files in {folder}")
            if options.serve:
                with suppress(KeyboardInterrupt):
                    signal.pause()
                return 0
            return _work(port, folder, options.claims, options.policies)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.insurance", description=__doc__)
    parser.add_argument("--folder", help="where its files go; default: a folder that is removed at the end")
    parser.add_argument("--port", type=int, help="of the portal; default: a free one")
    parser.add_argument("--workers", type=int, default=3, help="how many compete for the claims")
    parser.add_argument("--claims", type=int, default=30, help="how many to submit")
    parser.add_argument("--policies", type=int, default=3, help="how many to subscribe")
    parser.add_argument("--serve", action="store_true", help="submit nothing; run until Ctrl-C")
    return parser.parse_args()


@contextmanager
def insurer(folder: Path, port: int, workers: int) -> Generator[list["subprocess.Popen[bytes]"]]:
    """Run the portal, the relay, the claims workers and the document generator."""
    environment = os.environ | {"INSURANCE_FOLDER": str(folder)}
    root = Path(__file__).parents[2]
    commands = [
        ["uvicorn", "examples.insurance.portal:app", "--port", str(port), "--log-level", "warning"],
        ["examples.insurance.relay"],
        ["filao", "work", "examples.insurance.claims:worker", "--processes", str(workers)],
        ["filao", "work", "examples.insurance.documents:worker"],
    ]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(
            subprocess.Popen([sys.executable, "-m", *command], cwd=root, env=environment) for command in commands
        )
        yield processes
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(PATIENCE)


def _work(port: int, folder: Path, claims: int, policies: int) -> int:
    kinds = ["storm", "hail", "fire", "war"]
    numbers = []
    for number in range(claims):
        data = {"policy": number % 7, "type": kinds[number % len(kinds)], "amount": 10_000 + 100 * number}
        numbers.append(_post(port, "/claims", data)["claim_id"])
    orders = [_post(port, "/policies/", {"holder": f"Customer {number}"})["policy"] for number in range(policies)]
    printed = [folder / "documents" / f"policy-{order}.pdf" for order in orders]
    states: list[str] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        states = [_get(port, f"/claims/{number}")["status"] for number in numbers]
        if "submitted" not in states and all(map(Path.exists, printed)):
            break
        time.sleep(0.1)
    print(
        f"{states.count('paid')} claims paid, {states.count('refused')} refused, "
        f"{states.count('submitted')} not settled"
    )
    print(f"{sum(map(Path.exists, printed))} of {policies} policies printed")
    return int("submitted" in states or not all(map(Path.exists, printed)))


def _post(port: int, path: str, data: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(data).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def _get(port: int, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
        return json.load(answer)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("the portal did not start")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
