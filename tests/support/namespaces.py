"""Programs in namespaces of their own, as in a container: other mounts, or another time."""

import os
import shutil
import subprocess
from subprocess import PIPE

import pytest


def apart(*how: str) -> list[str]:
    """Return the command in front of a program that has namespaces of its own; where none can be made, skip."""
    command = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), *how]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False, stderr=PIPE).returncode != 0:
        pytest.skip(f"this system lets us make no namespace: {' '.join(command)}")
    return command
