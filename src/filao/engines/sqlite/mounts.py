"""What is mounted where, as Linux tells; elsewhere nothing is known of it.

A file's `st_dev` is not always the device of the file system that holds it: btrfs has one for each subvolume, and an
overlay of several file systems one for each layer. The kernel lists mounts, and locks, by the latter.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that holds `path`; empty where the system does not tell."""
    return _holding(path, mounts).kind


def device(path: Path, mounts: Path = _MOUNTS) -> int:
    """Return the device of the file system that holds `path`, by which its locks are listed. Raises `OSError`."""
    own = path.stat().st_dev
    return _holding(path, mounts).device or own


def is_mounted(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether `path` itself is the point of a mount."""
    return any(mount.point == path for mount in _mounted(mounts))


class _Mount(NamedTuple):
    """One line of mountinfo."""

    device: int
    point: Path
    kind: str


def _holding(path: Path, mounts: Path) -> _Mount:
    found = list(_mounted(mounts))
    with suppress(OSError):
        there = path if path.exists() else path.parent
        device = there.stat().st_dev
        found = [mount for mount in found if mount.device == device] or found
    best = _Mount(0, Path(), "")
    for mount in found:
        if path.is_relative_to(mount.point) and len(mount.point.parts) >= len(best.point.parts):
            best = mount
    return best


def _mounted(mounts: Path) -> Iterator[_Mount]:
    """Yield the mounts that this process sees. (https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html)"""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        major, _, minor = fields[2].partition(b":")
        point = _ESCAPED.sub(lambda octal: bytes([int(octal[1], 8)]), fields[4])
        yield _Mount(os.makedev(int(major), int(minor)), Path(os.fsdecode(point)), after.split(b" ")[0].decode())
