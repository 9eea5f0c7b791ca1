"""Fuzz what reads foreign bytes with atheris, guided by the coverage of our own code; by hand, for as long as it takes.

    pip install --constraint constraints.txt atheris
    python -m tests.fuzz --minutes 60            # all targets, one after the other, an equal share each
    python -m tests.fuzz --minutes 10 envelope

Each target runs in a process of its own. What breaks it is kept in a folder, and the way to run it again is printed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

LENGTH_MAX = 4_096  # bytes of an input: what is longer takes longer, and finds nothing new
HANGS_AFTER = 20  # seconds for one input
MEMORY_MAX = 1_024  # megabytes


def run(name: str, arguments: Sequence[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["filao"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name]())
    atheris.Fuzz()


def fuzz(name: str, seconds: float, folder: Path) -> bool:
    """Fuzz one target in another process; return whether nothing was found, and print a line of figures."""
    from tests.fuzz.targets import SEEDS, WORDS

    corpus = folder / name
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    options = [f"-dict={words}", f"-max_total_time={seconds:.0f}", f"-max_len={LENGTH_MAX}", f"-timeout={HANGS_AFTER}"]
    options += [f"-rss_limit_mb={MEMORY_MAX}", f"-artifact_prefix={folder}/{name}-", "-print_final_stats=1"]
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, *options, str(corpus)]
    began = time.monotonic()
    with (folder / f"{name}.log").open("wb") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    said = (folder / f"{name}.log").read_text(errors="replace")
    tried = re.findall(r"stat::number_of_executed_units: *(\d+)", said) or ["0"]
    reached = re.findall(r"cov: (\d+)", said) or ["0"]
    kept = len(list(corpus.iterdir()))
    verdict = "nothing" if code == 0 else f"a finding: see {folder}/{name}.log"
    took = (time.monotonic() - began) / 60
    print(f"| {name} | {took:.1f} | {int(tried[-1]):,} | {int(reached[-1]):,} | {kept:,} | {verdict} |", flush=True)
    return code == 0


def main() -> int:
    if sys.argv[1:2] == ["--target"]:
        run(sys.argv[2], sys.argv[3:])
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], default=[])
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    chosen = arguments.targets or list(TARGETS)
    folder = Path(tempfile.mkdtemp(prefix="filao-fuzz-"))
    print(f"{arguments.minutes:g} minutes, in {folder}, at nice {os.nice(0)}")
    print(
        "| target | minutes | inputs | edges of our code | kept inputs | found |\n|---|---|---|---|---|---|", flush=True
    )
    found = [name for name in chosen if not fuzz(name, 60 * arguments.minutes / len(chosen), folder)]
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
