"""What an open connection stands on: the file, its WAL and its shared memory, and whether their names still lead there.

SQLite keeps on writing into a file that was deleted, moved or replaced, and replays a WAL onto whatever file has the
name beside it. So before anything is confirmed, we check that the names still lead to what was opened.

A file that was overwritten in place, as `cp` does, is still the same file. (For the WAL see `wal.py`.) Only checkpoints
write to a database in WAL mode, and each first announces in the shared memory that it begins, and how far it comes. So
a file that changed without a checkpoint was overwritten. (https://www.sqlite.org/walformat.html, "The WAL-Index File
Format"; https://www.sqlite.org/fileformat.html) All this is read through SQLite's own descriptors, because closing one
of ours would drop this process's locks.
"""

import ctypes
import os
import sqlite3
import sys
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from filao.engines.sqlite.folder import TURNSTILE
from filao.engines.sqlite.wal import End, end_of

LOOKED_WITHIN = 0.02  # seconds after a look within which a transaction need not look again
_DESCRIPTORS = Path("/dev/fd")
HEADER = 100  # bytes
_WAL_MODE = b"\2\2"
_INDEX = 132  # bytes: two copies of the WAL-index header, and how far a checkpoint has come
_SALTS = slice(32, 40)  # of the header: what tells one WAL from the next
_MAGIC = b"SQLite format 3\0"

_Identity = tuple[int, int]

_ABANDONED: set[_Identity] = set()
"""Files that this process holds open for ever, because closing them would write into what was put in their place."""


class Loss(NamedTuple):
    """How the ground was lost: what happened (a text that goes after the file's name), and what to do."""

    what: str
    remedy: str


_REPLACED = Loss("was replaced by another file while it was open", "open it again to work with what lies there now")
_LINKED = Loss("was given a second name (a hard link) while it was open", "remove the other name")
_BARRED = Loss(
    "cannot be looked at any more: this user may not enter a folder on the way to it",
    "let the user through again (chmod +x on the folder), and open it again",
)
_OVERWRITTEN = Loss(
    "was overwritten in place while it was open, as cp and rsync do it, or touched, which looks alike",
    "if it was touched, start its processes again; else put a backup in its place with filao restore, because what "
    "lies there now does not fit its WAL",
)
_CUT = Loss(
    "had its WAL overwritten or cut off in place while it was open, as cp and truncate do it",
    "put a backup in its place with filao restore, because some of what was confirmed before is missing from what lies "
    "there now",
)
RESTORED = Loss(
    "was restored from a backup through SQLite while it was open, as .restore of its shell does it: this process is no "
    "longer entered there",
    "start them again: they work with what lies there now",
)
_IN_PLACE = (_OVERWRITTEN, _CUT)


class _Sight(Struct, frozen=True):
    """What one look has found. A later look compares with all of one sight, whatever other threads see meanwhile."""

    base: tuple[int, int]
    """When the file itself was last written, and its size."""
    wal_index: bytes | None
    """The beginning of the shared memory, read before the file; only needed once the file has changed."""
    cookie: int
    """The count of changes of the schema in the file itself: it never goes back, and begins anew in a copy."""
    end: End
    """The end of the WAL."""


class Ground:
    """What one connection stands on; made right after the connection first read the file, within a turn."""

    def __init__(self, path: Path, given: Path, folder: Path | None) -> None:
        """Look at what was opened; `given` is the user's path, which may lead here through links."""
        self._main = path
        self._wal, self._shm = (path.with_name(path.name + end) for end in ("-wal", "-shm"))
        about = self._main.stat()
        self._identity = _identity(about)
        self._name = str(path)
        self._journal = {str(name): _identity(name.stat()) for name in (self._wal, self._shm)}
        self._index = self._journal[str(self._shm)]
        self._wal_identity = self._journal[str(self._wal)]
        others = [given] * (given != path) + ([folder / TURNSTILE] if folder is not None else [])
        self._others = {str(name): _identity(name.stat()) for name in others}
        self._fds: dict[_Identity, int] = {}
        index, header = self._read(self._index, _INDEX), self._read(self._identity, HEADER)
        end = self._end_of_wal(index, End(), others_wrote=False) or End()
        self._seen = _Sight((about.st_mtime_ns, about.st_size), index, schema_cookie(header), end)

    @property
    def inode(self) -> int:
        """The file's inode, which no other file on its disk has now."""
        return self._identity[1]

    @property
    def cookie(self) -> int:
        """See `_Sight`."""
        return self._seen.cookie

    def look(self) -> Loss | None:
        """Return what happened to the file, if anything did.

        It costs three `stat`s and reads of memory. Any thread may look: a send in a user's transaction looks in theirs.
        """
        seen = self._seen
        index = self._index_now(seen.end)  # before the file, so that it is never newer than what it explains
        try:
            about = os.stat(self._name)  # noqa: PTH116 - for each commit: a Path costs as much as the call
        except OSError as error:
            return self._without_file(error)
        loss = self._missing(about, self._journal)
        base, cookie = (about.st_mtime_ns, about.st_size), seen.cookie
        if loss is None and base != seen.base:
            header = self._read(self._identity, HEADER)
            if self._was_overwritten(header, seen):
                return _OVERWRITTEN
            cookie = max(cookie, schema_cookie(header))
        if loss is None:
            end = self._end_of_wal(index, seen.end, others_wrote=False)
            if end is None:
                return _CUT
            self._seen = _Sight(base, index, cookie, end)
        return loss

    def look_at_wal(self) -> Loss | None:
        """Return what happened to the WAL, if anything did. Called before we write behind what others wrote."""
        seen = self._seen
        end = self._end_of_wal(self._index_now(seen.end), seen.end, others_wrote=True)
        if end is None:
            return _CUT
        self._seen = replace(seen, end=end)
        return None

    def _end_of_wal(self, index: bytes | None, seen: End, *, others_wrote: bool) -> End | None:
        return end_of(index, self._index_again, self._frame, seen, others_wrote=others_wrote)

    def _index_now(self, seen: End) -> bytes | None:
        """Read the index. One of the WAL that was `seen`, whose salts are random, was read where it should be."""
        index = self._glance(self._index, _INDEX, 0)
        return index if index is not None and index[_SALTS] == seen.salts else self._index_again()

    def _index_again(self) -> bytes | None:
        return self._read(self._index, _INDEX)

    def _frame(self, size: int, at: int, is_sure: bool) -> bytes | None:  # noqa: FBT001 - for each commit
        """Read a part of the WAL; `is_sure`: check first that the descriptor still leads to it."""
        return (self._read if is_sure else self._glance)(self._wal_identity, size, at)

    def has_changed(self) -> bool:
        """Return whether the file itself was written since the last look, so that another one is due."""
        try:
            about = self._main.stat()
        except OSError:
            return True
        return (about.st_mtime_ns, about.st_size) != self._seen.base

    def watch(self, name: Path) -> None:
        """Check one more name from now on."""
        self._others = {**self._others, str(name): _identity(name.stat())}  # another thread may be reading the old one

    def missing(self) -> Loss | None:
        """Return the loss of a name that leads elsewhere by now, if any does; at any time, in any thread."""
        try:
            about = self._main.stat()
        except OSError as error:
            return self._without_file(error)
        return self._missing(about, self._journal) or self._missing(about, self._others)

    def is_file_there(self) -> bool:
        """Return whether the file itself is where it was. Its WAL may be another one, if we had closed the file."""
        try:
            return _identity(self._main.stat()) == self._identity
        except OSError:
            return False

    def _is_wal_anothers(self) -> bool:
        """Return whether a WAL that is not the one which was opened has its name."""
        try:
            return _identity(self._wal.stat()) != self._wal_identity
        except OSError:
            return False

    def may_be_opened_again(self, loss: Loss) -> bool:
        """Return whether what lies there now is sound: another file, or this one, back with its own WAL."""
        try:
            about = self._main.stat()
        except OSError:
            return False
        is_another = _identity(about) != self._identity
        return is_another or (loss not in _IN_PLACE and self._missing(about, self._journal) is None)

    def _missing(self, about: os.stat_result, names: dict[str, _Identity]) -> Loss | None:
        if _identity(about) != self._identity:
            return _REPLACED
        if about.st_nlink > 1:
            return _LINKED
        for name, known in names.items():
            try:
                there = os.stat(name)  # noqa: PTH116 - as above
                same = (there.st_dev, there.st_ino) == known
            except OSError:
                same = False
            if not same:
                return Loss(
                    f"lost {name}, which was deleted or replaced while it was open",
                    "look at it with filao doctor, and put a backup in its place with filao restore if messages are "
                    "missing",
                )
        return None

    def _without_file(self, error: OSError) -> Loss:
        """Return the loss of a file that is gone, and say where it is now, as far as the system tells."""
        if isinstance(error, PermissionError):
            return _BARRED
        fd = self._fds.get(self._identity, -1)
        try:
            about = os.fstat(fd)
            if _identity(about) == self._identity and about.st_nlink:
                where = Path(f"/proc/self/fd/{fd}").readlink()
                return Loss(f"was moved to {where} while it was open", f"move it back, beside {self._wal}")
        except OSError:
            pass
        return Loss(
            "was deleted or moved while it was open", "move it back, or put a backup in its place: filao restore"
        )

    # --- overwritten? ------------------------------------------------------------------------------------------------

    def _was_overwritten(self, header: bytes | None, seen: _Sight) -> bool:
        """Return whether a file that has changed was written by anything but a checkpoint."""
        if header is None:
            return False  # the system does not let us look
        if not header.startswith(_MAGIC) or header[18:20] != _WAL_MODE or schema_cookie(header) < seen.cookie:
            return True
        checkpoint = _checkpoint(self._read(self._index, _INDEX))
        return checkpoint is not None and checkpoint == _checkpoint(seen.wal_index) and not checkpoint.is_under_way()

    def _glance(self, file: _Identity, size: int, at: int) -> bytes | None:
        """Read as `_read` does, but by a descriptor that may lead elsewhere by now: what was read must tell."""
        fd = self._fds.get(file, -1)
        try:
            return os.pread(fd, size, at) if fd >= 0 else None
        except OSError:
            return None

    def _read(self, file: _Identity, size: int, at: int = 0) -> bytes | None:
        """Read a part of a file through the descriptor by which SQLite has it open."""
        fd = self._fds.get(file, -1)
        try:
            if fd < 0 or _identity(os.fstat(fd)) != file:
                fd = self._fds[file] = _find(file)
            return os.pread(fd, size, at) if fd >= 0 else None
        except OSError:
            self._fds.pop(file, None)
            return None

    # --- letting go --------------------------------------------------------------------------------------------------

    def let_go(self, db: sqlite3.Connection, loss: Loss) -> None:
        """Close a connection that has lost its ground, without writing its WAL into what lies there now.

        SQLite itself leaves a file alone that was replaced. Before Python 3.12 it cannot be told to leave alone one
        that was overwritten, or that has another WAL by now, so such a connection stays open until the process ends. A
        WAL without a successor belongs to the file, even if its name is gone: writing it back saves what it holds.
        So does one that is where it was, once the file is back there.
        """
        keeps = loss not in _IN_PLACE and not self._is_wal_anothers()
        if keeps or not self.is_file_there() or loss is _LINKED:
            db.close()
        elif sys.version_info >= (3, 12):
            db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
            db.close()
        else:
            _ABANDONED.add(self._identity)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(db))


class _Checkpoint(NamedTuple):
    """How many pages were written back and how many were to be, and the salts of their WAL, all as they are stored."""

    done: bytes
    begun: bytes
    salts: bytes

    def is_under_way(self) -> bool:
        """Return whether a process is writing back, or died while it did."""
        return self.done != self.begun


def _checkpoint(index: bytes | None) -> _Checkpoint | None:
    """Return how far the last checkpoint has come; None where we cannot look."""
    if index is None or len(index) < _INDEX:
        return None
    return _Checkpoint(index[96:100], index[128:132], index[_SALTS])


def left_over(path: Path, *, cookie: int, inode: int) -> Loss | None:
    """Return why a file does not fit the WAL that lies beside it; None if it fits.

    The file's header is compared with what was noted of the file: the count of changes of its schema and, if not 0, its
    inode. Call this after opening a connection and before its first statement, which would replay the WAL.
    """
    wal = Path(f"{path}-wal")
    if not wal.exists() or wal.stat().st_size == 0:
        return None
    fd = _find(_identity(path.stat()))
    header = os.pread(fd, HEADER, 0) if fd >= 0 else b""
    if fd >= 0 and not header:
        return Loss(
            f"is empty, while {wal} is not, so the file itself was lost", "put a backup in its place with filao restore"
        )
    away = f"to keep the file as it is, move {wal} and {path}-shm away"
    if not header.startswith(_MAGIC):
        return None
    if header[18:20] != _WAL_MODE or schema_cookie(header) < cookie:
        return Loss(
            f"is not the file to which {wal} belongs: it was overwritten or replaced",
            f"{away}; to put a backup in its place, use filao restore",
        )
    if inode not in (0, path.stat().st_ino):
        return Loss(
            f"is not the file that was here before, to which {wal} may belong",
            f"{away}; if they were put here together, move {path}-filao away instead",
        )
    return None


def schema_cookie(header: bytes | None) -> int:
    """Return the count of changes of the schema in a file's header."""
    return int.from_bytes(header[40:44], "big") if header else 0


def is_abandoned(path: Path) -> bool:
    """Return whether this process had to abandon this file, so that only another process can open it."""
    return bool(_ABANDONED) and _at(path) in _ABANDONED


def is_open(path: Path) -> bool:
    """Return whether any connection of this process has a file open; False where the system does not tell."""
    file = _at(path)
    return file is not None and _find(file) >= 0


def _at(path: Path) -> _Identity | None:
    """Return which file lies there; None: none, as SQLite removes its own whenever a last connection is closed."""
    try:
        return _identity(path.stat())
    except FileNotFoundError:
        return None


def _find(file: _Identity) -> int:
    """Return a descriptor by which this process has a file open; -1 when there is none, or the system does not tell."""
    try:
        names = [int(name.name) for name in _DESCRIPTORS.iterdir()]
    except OSError:
        return -1
    for name in names:
        try:
            if _identity(os.fstat(name)) == file:
                return name
        except OSError:
            continue  # the descriptor by which we listed them
    return -1


def _identity(about: os.stat_result) -> _Identity:
    return about.st_dev, about.st_ino
