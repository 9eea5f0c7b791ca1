"""A disk whose power can be cut: an ext4 file system in a file, mounted through a loop device. It needs root.

`EXT4_IOC_SHUTDOWN` with the flag NOLOGFLUSH stops the file system where it stands: what was not flushed is gone, and
every later write fails. Mounting it again replays the journal, as a machine does that was switched off and on.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
NOLOGFLUSH = 2
SIZE = 64 * 1024 * 1024  # bytes


def hindrance(*tools: str) -> str:
    """Return why no file system can be mounted here; empty when it can be tried with these tools."""
    if os.geteuid() != 0:
        return "needs root, to mount file systems"
    missing = [tool for tool in ("mount", "umount", *tools) if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


class CannotMount(Exception):
    """The system does not let us, although we are root: a container, most often."""


class Mounted:
    """A mounted file system; leaving it unmounts it, whatever happened."""

    def __init__(self, folder: Path, *how: str) -> None:
        self.folder = folder
        self._how = how

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self.mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["umount", "--lazy", self.folder], capture_output=True, check=False)

    def mount(self) -> None:
        """Mount it."""
        done = subprocess.run(["mount", *self._how, self.folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMount(f"mount {' '.join(self._how)}: {done.stderr.strip()}")

    def cut_power(self) -> None:
        """Lose all that was not flushed to the disk; from now on every write fails."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(folder)

    def restore_power(self) -> None:
        """Mount it again, when nobody has a file open there."""
        subprocess.run(["umount", self.folder], capture_output=True, check=True)
        self.mount()


def small_disk(folder: Path, size: int) -> Mounted:
    """Return a file system in memory that is full after `size` bytes."""
    return Mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def fragile_disk(folder: Path) -> Mounted:
    """Return an ext4 file system whose power can be cut."""
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    return Mounted(folder, "-t", "ext4", "-o", "loop", str(image))
