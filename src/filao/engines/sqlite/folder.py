"""The folder beside a database, with its turnstile and its bells: who owns it, and what may be opened in it.

Another user may have made the folder or what lies in it, and may have written the file from which the names of bells
are read. So everything is opened relative to a descriptor of the folder, without following links, and is checked before
it is written, locked or removed. What we make belongs to the file's owner, and to its group if the file is shared with
its group, whatever user we are: a look by root must not lock a service out of its own queue.
"""

import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from filao.errors import ConfigurationError, EngineError

if sys.platform != "win32":
    from fcntl import F_DUPFD_CLOEXEC, fcntl

BELL = re.compile(r"[0-9a-f]{16}")
"""The name of a bell; nothing with another name is opened."""
TURNSTILE = "turnstile"
STANDARD = 3  # descriptors: those of stdin, stdout and stderr, which a daemon may have closed
_ENDS = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC if os.name == "posix" else 0


def is_shared(about: os.stat_result) -> bool:
    """Return whether a file's group may write it."""
    return bool(about.st_mode & stat.S_IWGRP)


def share(path: Path, file: os.stat_result) -> None:
    """Give what SQLite has made beside a file that is shared with its group to that group, as far as we may."""
    about = path.stat(follow_symlinks=False)
    if is_shared(file) and about.st_uid == _me() and about.st_gid != file.st_gid:
        with suppress(PermissionError):  # a group that we are not in
            os.chown(path, -1, file.st_gid, follow_symlinks=False)


class Folder:
    """A folder that this process holds open; it is made if it is missing and this user may make it."""

    def __init__(self, path: Path, file: os.stat_result) -> None:
        """Open the folder of the database that `file` describes. Raises `ConfigurationError` when it is not safe."""
        self.path = path
        self._file = file
        made = self._make()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise self._refusal("is a link or no folder at all", "remove it") from error
            raise
        try:
            self._check(os.fstat(self._fd), made=made)
            self._entrust(self._fd, 0o700)
        except BaseException:
            self.close()
            raise

    def _make(self) -> bool:
        if self.path.is_symlink() or self.path.exists():
            return False
        if _me() not in (0, self._file.st_uid):
            raise ConfigurationError(
                f"{self.path} does not exist, and only the file's owner (user {self._file.st_uid}) may make it: open "
                "the queue as that user first, for instance with filao stats"
            )
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        return True

    def _check(self, about: os.stat_result, *, made: bool) -> None:
        if about.st_uid not in (_me(), self._file.st_uid):
            raise self._refusal(
                f"belongs to user {about.st_uid}, who is neither this user nor the file's owner ({self._file.st_uid})",
                f"stop the processes that use the file and remove it, or chown it to user {self._file.st_uid}",
            )
        others = about.st_mode & (stat.S_IWOTH if is_shared(self._file) else stat.S_IWOTH | stat.S_IWGRP)
        if others and not made:
            raise self._refusal(f"may be written by others (mode {stat.S_IMODE(about.st_mode):04o})", "chmod go-w it")

    def _refusal(self, what: str, remedy: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self.path} {what}, so another user could stop this queue or make it write elsewhere. "
            f"Look who made it; then {remedy}."
        )

    def _entrust(self, fd: int, mode: int) -> None:
        """Give a file or the folder to the database's owner, and to its group if it is shared, as far as we may."""
        about, file = os.fstat(fd), self._file
        if is_shared(file):
            mode |= mode >> 3 & 0o070
        if _me() == 0 and (about.st_uid, about.st_gid) != (file.st_uid, file.st_gid):
            os.fchown(fd, file.st_uid, file.st_gid)
        elif _me() == about.st_uid and is_shared(file) and about.st_gid != file.st_gid:
            with suppress(PermissionError):  # a group that we are not in
                os.fchown(fd, -1, file.st_gid)
        if _me() in (0, about.st_uid) and stat.S_IMODE(about.st_mode) & 0o777 != mode:
            os.fchmod(fd, mode)

    def trusts(self, about: os.stat_result) -> bool:
        """Return whether we, root, the database's owner or, if it is shared, its group have made something here."""
        known = about.st_uid in (_me(), 0, self._file.st_uid)
        return known or (is_shared(self._file) and about.st_gid == self._file.st_gid)

    # --- what lies in it ---------------------------------------------------------------------------------------------

    def open_turnstile(self) -> int:
        """Return a descriptor of the turnstile, which is made if it is missing."""
        try:
            fd = _apart(os.open(TURNSTILE, os.O_RDWR | os.O_CREAT | _ENDS, 0o600, dir_fd=self._fd))
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise EngineError(
                    f"{self.path / TURNSTILE} is no regular file: look who made it, then remove it"
                ) from error
            raise
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1 or not self.trusts(about):
                raise EngineError(
                    f"{self.path / TURNSTILE} is no file of this queue's own (user {about.st_uid}, {about.st_nlink} "
                    "names): look who made it, then remove it"
                )
            self._entrust(fd, 0o600)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def make_bell(self, name: str) -> int:
        """Make a FIFO and return its reading end."""
        os.mkfifo(name, 0o600, dir_fd=self._fd)
        fd = -1
        try:
            fd = self._open_bell(name, os.O_RDONLY)
            self._entrust(fd, 0o600)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            self.remove_bell(name)
            raise
        return fd

    def open_bell(self, name: str) -> int:
        """Return the writing end of a bell. Raises `OSError`: ENXIO if nobody reads it, EINVAL if it is no bell."""
        return self._open_bell(name, os.O_WRONLY)

    def _open_bell(self, name: str, end: int) -> int:
        if not BELL.fullmatch(name):
            raise OSError(errno.EINVAL, "is not how a bell is called", name)
        fd = _apart(os.open(name, end | _ENDS, dir_fd=self._fd))
        about = os.fstat(fd)
        if not stat.S_ISFIFO(about.st_mode) or not self.trusts(about):
            os.close(fd)
            raise OSError(errno.EINVAL, "is no bell", name)
        return fd

    def remove_bell(self, name: str) -> None:
        """Remove a bell; anything else stays, and so does one that we may not remove: it does no harm."""
        with suppress(OSError):
            if self._bell_status(name) is not None:
                os.unlink(name, dir_fd=self._fd)

    def bells(self) -> Iterator[tuple[str, float]]:
        """Yield the names of the bells, and when each was made."""
        for name in os.listdir(self._fd):  # noqa: PTH208 - of a descriptor
            about = self._bell_status(name)
            if about is not None:
                yield name, about.st_mtime

    def _bell_status(self, name: str) -> os.stat_result | None:
        """Return the status of a bell; None when it is none, or is gone: other processes come and go."""
        if not BELL.fullmatch(name):
            return None
        try:
            about = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return about if stat.S_ISFIFO(about.st_mode) and self.trusts(about) else None

    def close(self) -> None:
        """Close the folder; it stays where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _apart(fd: int) -> int:
    """Return a descriptor other than those of the standard streams, so that nothing is printed into the file."""
    if fd >= STANDARD or sys.platform == "win32":
        return fd
    try:
        return fcntl(fd, F_DUPFD_CLOEXEC, STANDARD)
    finally:
        os.close(fd)


def _me() -> int:
    return os.geteuid() if os.name == "posix" else 0
