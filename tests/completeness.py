"""How much of what `filao` exports has types that every checker reads alike: a ratchet. Run by `make lint`."""

import json
import os
import subprocess
import sys
from pathlib import Path

LEAST = 0.99  # of all public names; raise it when more have them, never lower it
SHOWN_MAX = 20


def main() -> int:
    """Return 0 when it is enough, and tell what lacks a type when it is not."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    command += ["--verifytypes", "filao", "--ignoreexternal", "--outputjson"]
    # With --verifytypes pyright asks the `python` of the PATH, and follows no link of an editable installation.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    told = json.loads(ran.stdout)["typeCompleteness"]
    score = told["completenessScore"]
    print(f"types: {score:.1%} of the public names; at least {LEAST:.0%}")
    if score >= LEAST:
        return 0
    wanting = [name for name in told["symbols"] if name["isTypeAmbiguous"] or not name["isTypeKnown"]]
    for symbol in [symbol for symbol in wanting if symbol["diagnostics"]][:SHOWN_MAX]:
        print(f"{symbol['name']}: {symbol['diagnostics'][0]['message']}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
