"""Whole copies of a live queue, and how to put one back.

SQLite's own backup makes a copy of one moment, while others send and receive. `cp` would copy the file without its WAL,
and only half of what is written meanwhile. A copy is a single file without a WAL, and holds everything: messages,
leases, dead letters, counters, deduplication keys, and the user's own tables.
"""

import os
import sqlite3
import stat
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filao.engines.sqlite import files, own, scrutiny
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.folder import TURNSTILE, Folder
from filao.engines.sqlite.turnstile import Turnstile
from filao.errors import ConfigurationError, EngineError, EngineUnavailable

if sys.platform != "win32":
    from fcntl import LOCK_EX, LOCK_NB, flock

_PARTS = ("", "-wal", "-shm")
_BESIDE = ("-wal", "-shm", "-journal")
_AT_ONCE = 1_000  # pages that are copied at once: some 10 ms, for which Ctrl-C waits
PARTIAL, RESTORING = ".filao-partial", ".filao-restoring"
"""What a file is called beside its copy until it is whole: names of ours alone, as what was left of one is removed."""
_MAGIC = b"SQLite format 3"
_KEPT_MAX = 1_000  # replaced files that are kept beside a file


def back_up(path: Path, copy: Path) -> int:
    """Copy a queue's file, which others may be using, to a new file; return its size in bytes."""
    if not path.exists():
        raise ConfigurationError(f"no such file: {path}")
    _check_is_free(copy)
    if not copy.parent.is_dir():
        raise ConfigurationError(f"{copy}: the folder {copy.parent} does not exist; create it first")
    partial = _beside(copy, PARTIAL)
    _check_is_other(path, partial)
    database = Database(path, durable=True, clock=time.time, wake=lambda _: None)
    try:
        database.open()
        with files.mapped(copy), _partial(partial, None):
            _copy(database.read().db, partial)
            database.hold.look()  # what was copied is still the queue's file
            _check_is_free(copy)  # a copy takes its time; no other backup to this name ends before us
            partial.rename(copy)
            _flush(copy.parent)
    finally:
        database.close()
    return copy.stat().st_size


def restore(copy: Path, path: Path) -> Path | None:
    """Put a backup in a queue's place; return where the replaced file is kept, with its WAL.

    Processes that have the replaced file open notice it, and confirm nothing more. A message that was leased when the
    backup was made stays leased until its lease ends, or until a waiting process finds its holder dead.
    """
    path = files.resolved(path)
    if not copy.is_file():
        raise ConfigurationError(f"there is no backup {copy}")
    if path.exists() and path.samefile(copy):
        raise ConfigurationError(f"{copy} is the queue's own file; give the file that filao backup made")
    partial = _beside(path, RESTORING)
    _check_is_other(copy, partial)
    files.check_folder(path)
    before = path.stat() if path.exists() else None
    with files.mapped(path), _partial(partial, before):
        _check_backup(copy)
        folder = Folder(files.sidecar(path), before or partial.stat())
        turnstile = Turnstile(folder)
        try:
            with closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as source:
                _copy(source, partial, cookie=turnstile.noted().cookie + 1)
            with _turn(turnstile, path, folder.path):
                kept = _replace(path, partial)
        finally:
            turnstile.close()
            folder.close()
    _try(path)
    return kept


def _check_is_free(copy: Path) -> None:
    if os.path.lexists(copy):  # even a link that leads nowhere
        raise ConfigurationError(
            f"{copy} exists, and a backup overwrites nothing: give another name, or remove it first"
        )
    for part in _BESIDE:
        if copy.name.endswith(part) and (whole := copy.with_name(copy.name.removesuffix(part))).exists():
            raise ConfigurationError(f"SQLite takes what is called {copy} for a part of {whole}: give another name")


def _check_is_other(source: Path, partial: Path) -> None:
    """Raise if what is to be copied would be taken for what an earlier copy to the same name has left."""
    if partial.exists() and partial.samefile(source):
        raise ConfigurationError(
            f"{source} has the name of what a backup or a restore that was killed has left, and would be removed: "
            "give it another name first"
        )


@contextmanager
def _turn(turnstile: Turnstile, path: Path, folder: Path) -> Generator[None]:
    """Wait for a turn, in which a file can be replaced, and end it on leaving."""
    until = time.monotonic() + files.BUSY_TIMEOUT
    if not turnstile.enter_by(lambda: time.monotonic() > until):
        raise EngineUnavailable(
            f"{path} has been locked for {files.BUSY_TIMEOUT:g} seconds by "
            f"{own.in_the_way(path, folder / TURNSTILE)}. Nothing was changed: stop the processes that use it, and try "
            f"again"
        )
    try:
        yield
    finally:
        turnstile.leave()


@contextmanager
def _partial(partial: Path, like: os.stat_result | None) -> Generator[None]:
    """Make an empty file, for the user of another one; on leaving, remove it if it is still there.

    It stays locked as long as this process is at it, so that the next one knows what was left by one that was killed.
    """
    _clear(partial)
    try:
        fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _taken(partial) from error
    try:
        if not _locked(fd, partial):
            raise _taken(partial)
        try:
            if like is not None:
                with suppress(PermissionError):  # if the file is only shared with our group, the new one is ours
                    os.fchown(fd, like.st_uid, like.st_gid)
                    os.fchmod(fd, stat.S_IMODE(like.st_mode))
            yield
        finally:
            if _has_name(fd, partial):  # else it was renamed, and the next one may have begun
                _remove(partial)
    finally:
        os.close(fd)


def _taken(partial: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{partial} is there already: another process is at it, or it is not what a backup or a restore that was "
        "killed has left, or another user's. Wait for that process, or give this file another name"
    )


def _clear(partial: Path) -> None:
    """Remove what a process that was killed has left of a file that it was copying to; nothing else."""
    with suppress(OSError):  # whatever else is there stays, and is in the way
        if partial.is_file() and not partial.is_symlink():
            fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            try:
                head = os.pread(fd, len(_MAGIC), 0).rstrip(b"\0")  # SQLite writes the first page last
                if _locked(fd, partial) and head in (b"", _MAGIC):
                    _remove(partial)
            finally:
                os.close(fd)


def _locked(fd: int, partial: Path) -> bool:
    """Lock a file, and return whether that was possible and the file still has its name."""
    with suppress(BlockingIOError):
        if sys.platform != "win32":  # there nothing tells
            flock(fd, LOCK_EX | LOCK_NB)
        return _has_name(fd, partial)
    return False


def _has_name(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _remove(partial: Path) -> None:
    for part in ("", *_BESIDE):
        _beside(partial, part).unlink(missing_ok=True)


def _copy(source: sqlite3.Connection, partial: Path, *, cookie: int = 0) -> None:
    """Copy what a connection sees in one transaction, and check the copy."""
    with closing(sqlite3.connect(partial, isolation_level=None)) as target:
        with _of_one_moment(source):
            source.backup(target, pages=_AT_ONCE, progress=_pass)
        target.execute("PRAGMA journal_mode = DELETE")  # a single file, until it is opened as a queue
        target.execute("PRAGMA synchronous = EXTRA")
        if cookie:  # the file must not be taken for an older one, see `ground.py`
            seen = target.execute("PRAGMA schema_version").fetchone()[0]
            target.execute(f"PRAGMA schema_version = {max(seen, cookie) + 1}")
        verdict = target.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise EngineError(f"the copy of the file is damaged, as the file itself is: {verdict}. Run: filao doctor")


def _pass(_status: int, _remaining: int, _total: int) -> None:
    """Run between two steps of a copy, so that a signal can end it there."""


@contextmanager
def _of_one_moment(source: sqlite3.Connection) -> Generator[None]:
    """Let a connection see the same until the end of the block, whatever others write."""
    source.execute("BEGIN")
    try:
        source.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # from here on
        yield
    finally:
        source.execute("ROLLBACK")


def _check_backup(copy: Path) -> None:
    """Raise unless a file is a Filao file that this version can open."""
    with files.mapped(copy), closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as db:
        with scrutiny.bounded(db, copy):
            wrong = "; ".join(scrutiny.differences(db))
        if wrong:  # in the queue's place, it would be found too late
            raise EngineError(f"{copy} is no backup that Filao made, or is damaged: {wrong}. Nothing was changed")
        version = files.schema_version(db)
        if not 0 < version <= len(files.MIGRATIONS):
            raise ConfigurationError(
                f"{copy} is no backup of a queue that this version of Filao knows (version {version})"
            )


def _replace(path: Path, partial: Path) -> Path | None:
    """Put a file in another's place, in a turn, and return where the other is kept; see `_keep` for interruptions."""
    kept = _keep(path)
    partial.rename(path)
    for part in ("-wal", "-shm"):
        _beside(path, part).unlink(missing_ok=True)
    _flush(path.parent)
    return kept


def _keep(path: Path) -> Path | None:
    """Give a file and its WAL second names, under which they still belong together.

    Whatever interrupts a restore, nothing is lost, and opening the file fails with an error that says why: it has two
    names, or a WAL that is not its own. The next restore goes on with the same names.
    """
    wal = _beside(path, "-wal")
    there = [""] if path.exists() else []
    was_kept = wal.exists() and wal.stat().st_nlink > 1  # by an interrupted restore, with the file that it belongs to
    if wal.exists() and not was_kept:
        there.append("-wal")
    if not there:
        return None
    for number in range(1, _KEPT_MAX):
        kept = path.with_name(f"{path.name}.replaced-{number}")
        if not any(_beside(kept, part).exists() for part in _PARTS) or _is_same(kept, path):
            for part in there:
                if not _is_same(_beside(kept, part), _beside(path, part)):
                    _beside(kept, part).hardlink_to(_beside(path, part))
            return kept
    raise ConfigurationError(f"{path} was replaced {_KEPT_MAX:,} times: remove {path}.replaced-1 and the others first")


def _beside(path: Path, part: str) -> Path:
    return path.with_name(path.name + part)


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _try(path: Path) -> None:
    """Open the file as a queue once, so that an error in it shows now."""
    database = Database(path, durable=True, clock=time.time, wake=lambda _: None)
    try:
        database.open()
    finally:
        database.close()


def _flush(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
