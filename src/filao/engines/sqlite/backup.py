"""Copies of a live queue that are whole, and putting one back.

A copy is made by SQLite's own backup, of one moment, while others send and receive: with the file alone, as `cp` copies
it, would go what its WAL holds, and what is written meanwhile would be half in it. A copy is a single file without a
WAL, which keeps all: messages, leases, dead letters, counters, deduplication keys, and the user's own tables.
"""

import os
import sqlite3
import stat
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filao.engines.sqlite import files, own, scrutiny
from filao.engines.sqlite.database import Database
from filao.engines.sqlite.folder import TURNSTILE, Folder
from filao.engines.sqlite.turnstile import Turnstile
from filao.errors import ConfigurationError, EngineError, EngineUnavailable

_PARTS = ("", "-wal", "-shm")
_KEPT_MAX = 1_000  # files that were replaced and still lie beside the one that replaced them


def back_up(path: Path, copy: Path) -> int:
    """Copy a queue's file, which others may be using, to a new file; return its size in bytes."""
    if not path.exists():
        raise ConfigurationError(f"no such file: {path}")
    if os.path.lexists(copy):  # a link that leads nowhere too
        raise ConfigurationError(
            f"{copy} exists, and a backup overwrites nothing: give another name, or remove it first"
        )
    database = Database(path, durable=True, clock=time.time, wake=lambda _: None)
    try:
        database.open()
        with files.mapped(copy), _partial(copy, ".partial", None) as partial:
            _copy(database.read().db, partial)
            database.hold.look()  # what was copied is still the queue's file
            partial.rename(copy)
            _flush(copy.parent)
    finally:
        database.close()
    return copy.stat().st_size


def restore(copy: Path, path: Path) -> Path | None:
    """Put a backup in a queue's place; return where the file that it replaced is kept, with its WAL.

    Processes that have the replaced file open notice it, and confirm nothing any more. What was leased when the backup
    was made is leased until its lease ends, or until somebody who waits finds its holder dead.
    """
    path = files.resolved(path)
    if not copy.is_file():
        raise ConfigurationError(f"there is no backup {copy}")
    if path.exists() and path.samefile(copy):
        raise ConfigurationError(f"{copy} is the queue's own file; give the file that filao backup made")
    files.check_folder(path)
    before = path.stat() if path.exists() else None
    with files.mapped(path), _partial(path, ".restoring", before) as partial:
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
def _partial(path: Path, end: str, like: os.stat_result | None) -> Generator[Path]:
    """Make an empty file beside another one, for the same user, and remove what is left of it."""
    partial = path.with_name(path.name + end)
    try:
        fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ConfigurationError(
            f"{partial} is there already: another backup is being made, or one was "
            "interrupted. Remove it if nobody is at it"
        ) from error
    try:
        if like is not None:
            with suppress(PermissionError):  # the group's file becomes ours; it can be given back
                os.fchown(fd, like.st_uid, like.st_gid)
                os.fchmod(fd, stat.S_IMODE(like.st_mode))
        os.close(fd)
        yield partial
    finally:
        for part in (*_PARTS, "-journal"):
            _beside(partial, part).unlink(missing_ok=True)


def _copy(source: sqlite3.Connection, partial: Path, *, cookie: int = 0) -> None:
    """Copy what a connection sees in one transaction, and look whether the copy is whole."""
    with closing(sqlite3.connect(partial, isolation_level=None)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")  # a single file, until it is opened as a queue
        target.execute("PRAGMA synchronous = EXTRA")
        if cookie:  # the file must not be taken for an older one, see `ground.py`
            seen = target.execute("PRAGMA schema_version").fetchone()[0]
            target.execute(f"PRAGMA schema_version = {max(seen, cookie) + 1}")
        verdict = target.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise EngineError(f"the copy of the file is damaged, as the file itself is: {verdict}. Run: filao doctor")


def _check_backup(copy: Path) -> None:
    """Raise unless a file is a Filao file that this version can open."""
    with files.mapped(copy), closing(sqlite3.connect(f"{copy.absolute().as_uri()}?mode=ro", uri=True)) as db:
        with scrutiny.bounded(db, copy):
            wrong = "; ".join(scrutiny.differences(db))
        if wrong:  # told now: once it lies in the queue's place it is too late
            raise EngineError(f"{copy} is no backup that Filao made, or is damaged: {wrong}. Nothing was changed")
        version = files.schema_version(db)
        if not 0 < version <= len(files.MIGRATIONS):
            raise ConfigurationError(
                f"{copy} is no backup of a queue that this version of Filao knows (version {version})"
            )


def _replace(path: Path, partial: Path) -> Path | None:
    """Put a file in another's place, in a turn, and return where that is kept; see `_keep` for interruptions."""
    kept = _keep(path)
    partial.rename(path)
    for part in ("-wal", "-shm"):
        _beside(path, part).unlink(missing_ok=True)
    _flush(path.parent)
    return kept


def _keep(path: Path) -> Path | None:
    """Give a file and its WAL second names, by which together they are still what they were.

    Whatever interrupts a restore, nothing is lost, and who opens the file is told: it has two names, or a WAL that
    is not its own. The next restore goes on with the same names.
    """
    wal = _beside(path, "-wal")
    there = [""] if path.exists() else []
    if (
        wal.exists() and wal.stat().st_nlink == 1
    ):  # else an interrupted restore has kept it, with the file that it belongs to
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
    """Open the file as a queue once, so that whatever is wrong with it shows now."""
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
