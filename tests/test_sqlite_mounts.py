"""A file on a file system whose device is not that of its files, as btrfs and an overlay of two others have it."""

import subprocess
import sys
import textwrap

from tests.support.namespaces import apart

MOUNT = """
cd "$0" && mkdir -p low up there && mount -t tmpfs tmpfs up && mkdir up/upper up/work &&
mount -t overlay overlay -o "lowerdir=$0/low,upperdir=$0/up/upper,workdir=$0/up/work" there && exec "$@"
"""


def run(folder, program: str) -> list[str]:
    """Run a program with a `path` on such a file system, and return what it says."""
    program = "import os, sqlite3, sys\nimport filao.sync\npath = sys.argv[1]\n" + textwrap.dedent(program)
    command = [
        *apart("--mount", "sh", "-c", MOUNT, str(folder)),
        sys.executable,
        "-c",
        program,
        str(folder / "there" / "claims.db"),
    ]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_program_is_told_that_its_own_transaction_is_in_the_way(tmp_path) -> None:
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
    assert run(tmp_path, program) == ["True"]


def test_a_child_must_close_what_the_program_itself_had_open_before_it_opens_the_queue(tmp_path) -> None:
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
    assert run(tmp_path, program) == ["True"]
