"""Whose locks are known where /proc tells of them in other words.

A file's device is not that of its file system on btrfs and on an overlay of two others; a process's number is another
in a namespace of processes that sees the /proc of another one.
"""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests.support.namespaces import apart

MOUNT = """
cd "$0" && mkdir -p low up there && mount -t tmpfs tmpfs up && mkdir up/upper up/work &&
mount -t overlay overlay -o "lowerdir=$0/low,upperdir=$0/up/upper,workdir=$0/up/work" there && exec "$@"
"""


@pytest.fixture(params=["overlay", "processes"])
def run(request, tmp_path) -> Callable[[str], list[str]]:
    """Return what runs a program with a `path`, there, and returns what it says."""
    folder = tmp_path
    if request.param == "overlay":
        command, folder = apart("--mount", "sh", "-c", MOUNT, str(tmp_path)), tmp_path / "there"
    else:
        command = apart("--pid", "--fork")

    def say(program: str) -> list[str]:
        program = "import os, sqlite3, sys\nimport filao.sync\npath = sys.argv[1]\n" + textwrap.dedent(program)
        begun = [*command, sys.executable, "-c", program, str(folder / "claims.db")]
        ran = subprocess.run(begun, check=False, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.splitlines()

    return say


def test_a_program_is_told_that_its_own_transaction_is_in_the_way(run) -> None:
    program = """
        with filao.sync.connect(path) as broker:
            broker.declare(filao.Queue("claims"))
            mine = sqlite3.connect(path, isolation_level=None)
            mine.execute("BEGIN IMMEDIATE")
            try:
                broker.send_to_queue("claims", 1)
            except filao.EngineUnavailable as error:
                print("of this very process" in str(error))
    """
    assert run(program) == ["True"]


def test_a_child_must_close_what_the_program_itself_had_open_before_it_opens_the_queue(run) -> None:
    program = """
        with filao.sync.connect(path) as broker:
            broker.declare(filao.Queue("claims"))
        mine = sqlite3.connect(path)
        mine.execute("SELECT * FROM filao_queue").fetchall()
        if os.fork() == 0:
            try:
                with filao.sync.connect(path):
                    print("opened", flush=True)
            except filao.ConfigurationError as error:
                print("that it has not" in str(error), flush=True)
            os._exit(0)
        os.wait()
    """
    assert run(program) == ["True"]
