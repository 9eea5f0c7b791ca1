"""Run the suite on each Python found of those that Filao supports, and once on the lowest versions of what it needs.

    make matrix                              # the whole suite, each time
    make matrix ARGS="tests/test_codec.py"   # what is passed on to pytest
    python -m tests.matrix --only 3.13 --only lowest -- -n 2 -k groups

Each has an environment of its own in .matrix/, which is made once. A Python is found on the PATH or among pyenv's.

On a free-threaded one (3.14t) the suite fails where a library would turn the global lock on again. There psycopg is
installed without its binary part, which has no wheel for it: it needs the system's libpq.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".matrix"
SUPPORTED = ("3.11", "3.12", "3.13", "3.14", "3.14t")  # t: free-threaded
NO_WHEEL = {"psycopg[binary]": "psycopg"}
"""What cannot be installed on a free-threaded Python, and what takes its place."""
NO_LOCK = {"PYTHONWARNINGS": "error:The global interpreter lock:RuntimeWarning"}
"""Makes importing what would turn the global lock on again an error, in all processes."""
LOOK = """
import sqlite3, ssl, venv, sys, sysconfig
free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(f"{sys.version_info.major}.{sys.version_info.minor}{free}")
"""
LOWEST = "lowest"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def interpreters() -> Iterator[tuple[str, str]]:
    """Yield each supported Python that is found and can be used, with its path."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in SUPPORTED:
        known = sorted(pyenv.glob(f"{version.rstrip('t')}.*/bin/python"), key=_numbers, reverse=True)
        usual = shutil.which(f"python{version}")
        for path in [*([usual] if usual else []), *map(str, known)]:
            said = subprocess.run([path, "-c", LOOK], capture_output=True, text=True, check=False)
            if said.stdout.strip() == version:
                yield version, path
                break


def _numbers(python: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", python.parts[-3])]


def needs(name: str) -> list[str]:
    """Return what Filao with all extras and its tests need on a Python."""
    all_of_them = [*(need for extra in EXTRAS.values() for need in extra), *PROJECT["dependency-groups"]["test"]]
    if name.endswith("t"):
        for missing, instead in NO_WHEEL.items():
            all_of_them = [need.replace(missing, instead) for need in all_of_them]
    return list(dict.fromkeys(all_of_them))


def lowest() -> list[str]:
    """Return what Filao needs, each in the lowest version that it asks for."""
    asked = [*PROJECT["project"]["dependencies"], *(need for extra in EXTRAS.values() for need in extra)]
    pins = {re.split(r"[>\[]", need)[0]: need.replace(">=", "==") for need in asked}
    for need in asked:  # an extra may ask for more than another
        name, least = re.split(r"[>\[]", need)[0], need.rpartition(">=")[2]
        if tuple(map(int, least.split("."))) > tuple(map(int, pins[name].rpartition("==")[2].split("."))):
            pins[name] = need.replace(">=", "==")
    return list(pins.values())


def environment(name: str, python: str) -> Path:
    """Make an environment with Filao, what it needs and what its tests need, and return its Python."""
    made = PLACE / name / "bin" / "python"
    subprocess.run([python, "-m", "venv", PLACE / name], check=True)
    pip: list[str | Path] = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if name == LOWEST:
        tests = PROJECT["dependency-groups"]["test"]
        mine = {re.split(r"[=\[]", pin)[0] for pin in lowest()}
        tests = [need for need in tests if re.split(r"[>\[]", need)[0] not in mine]
        tests = [re.sub(r"^(pytest)>=", r"\1==", need) for need in tests]  # as old as the plugins that fit the others
        subprocess.run([*pip, *lowest(), *tests], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    else:
        pinned: list[str | Path] = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, *pinned, "--editable", ROOT, *needs(name)], check=True)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--only", action="append", choices=[*SUPPORTED, LOWEST], help="may be given several times")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    given = parser.parse_args()
    found = list(interpreters())
    chosen = {**dict(found), LOWEST: found[0][1]}
    ended: dict[str, str] = {}
    for name, python in chosen.items():
        if given.only and name not in given.only:
            continue
        print(f"--- {name}: {python}", flush=True)
        try:
            made = environment(name, python)
        except subprocess.CalledProcessError as error:
            ended[name] = f"could not be set up ({error.returncode})"
            continue
        command: list[str | Path] = [
            made,
            "-m",
            "pytest",
            "-q",
            *(given.arguments or ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]),
        ]
        environ = {**os.environ, **(NO_LOCK if name.endswith("t") else {})}
        passed = subprocess.run(command, cwd=ROOT, check=False, env=environ).returncode == 0
        ended[name] = "passed" if passed else "FAILED"
    for name in [*SUPPORTED, LOWEST]:
        print(f"{name:7} {ended.get(name, 'not found' if name not in chosen else 'not asked for')}")
    return 0 if set(ended.values()) <= {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
