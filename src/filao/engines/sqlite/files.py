"""Opening a Filao file: which are refused, how the connection is set up, how the tables are created and migrated.

Only SQLite opens the database file: on POSIX, closing any other descriptor of it would drop the locks that this process
holds on it. (https://www.sqlite.org/howtocorrupt.html, section 2.2)
"""

import contextlib
import errno
import os
import secrets
import sqlite3
from collections.abc import Callable, Generator, Iterator
from importlib import resources
from pathlib import Path

from filao.engines.sqlite import ground, own
from filao.engines.sqlite.mounts import file_system, is_mounted
from filao.engines.sqlite.turnstile import NOTHING, Noted
from filao.errors import ConfigurationError, EngineError, EngineUnavailable

MEMORY = Path(":memory:")
SQLITE_MIN = (3, 38, 0)  # STRICT tables, RETURNING, and the JSON operators that operators' queries use
BUSY_TIMEOUT = 30.0  # seconds that a write waits for a foreign writer before it fails
READERS_GO_ON_WITHIN = 1_000  # milliseconds that the check after a disk error waits for readers, while others wait
PAGES_CACHED_MAX = 4 * 1024  # KiB for each process: a queue is read and written at its two ends
PATH_MAX = 504  # bytes of a path that SQLite opens on POSIX: its own limit, less what the longest name beside it adds
WAL_KEPT_MAX = 16 * 1024 * 1024  # bytes that the WAL may keep on disk once it was written back
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "gfs2"}
    | {"ocfs2", "davfs", "coda", "gpfs", "orangefs", "panfs", "pvfs2", "wekafs"}
    | {f"fuse.{name}" for name in ("glusterfs", "ceph", "sshfs", "s3fs", "rclone", "gcsfuse", "davfs2", "juicefs")}
    | {f"fuse.{name}" for name in ("mfs", "lizardfs", "seaweedfs", "goofys", "mount-s3", "smbnetfs", "curlftpfs")}
)

FAILURES = (sqlite3.Error, OverflowError, UnicodeError)
"""What Python's sqlite3 raises: SQLite's errors, and others for a number or a text that it cannot convert."""

Migration = Callable[[sqlite3.Connection], None]


def sidecar(path: Path) -> Path:
    """Return the folder beside a database that holds its turnstile and bells."""
    return path.with_name(path.name + "-filao")


def resolved(path: Path) -> Path:
    """Return the path of a file without links. Raises `ConfigurationError` when they lead in a circle."""
    try:
        found = path.resolve()
        if any(map(os.path.islink, (found, *found.parents))):  # since Python 3.13, where `resolve` raises nothing
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: before Python 3.13; ValueError: NUL
        raise ConfigurationError(f"{str(path)!r} leads nowhere: {error}") from error
    return found


def check_path(path: Path) -> None:
    """Raise `ConfigurationError` when no Filao file can live at this path."""
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise ConfigurationError(
            f"this Python carries SQLite {sqlite3.sqlite_version}; Filao needs "
            f"{'.'.join(map(str, SQLITE_MIN))} or newer"
        )
    _check_reach(path)
    if ground.is_abandoned(path):
        raise EngineError(
            f"{path} was overwritten while this process had it open: only another process can open it now"
        )
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder; give the path of a file in it, such as {path / 'filao.db'}")
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is no file but a device, a pipe or a socket; give the path of a file")
    if path.exists() and not _may(path, os.W_OK):
        raise ConfigurationError(f"{path} is read-only for this user; a queue writes even when it receives")
    check_folder(path)
    if path.exists() and path.stat().st_nlink > 1:
        raise ConfigurationError(
            f"{path} has {path.stat().st_nlink} names (hard links), so it may be open by another one with a WAL of "
            f"its own, and what either writes would be lost. Find the others with: find DIRECTORY -samefile {path}; "
            "and remove them"
        )


def _check_reach(path: Path) -> None:
    """Raise `ConfigurationError` when this user cannot even look whether there is a file, or its path is too long."""
    if os.name == "posix" and len(os.fsencode(path)) > PATH_MAX:
        raise ConfigurationError(
            f"{path} is {len(os.fsencode(path))} bytes long, and SQLite opens paths of at most {PATH_MAX}; give a "
            f"shorter one. Nothing was done"
        )
    for name in (path, sidecar(path)):
        try:
            name.stat(follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise ConfigurationError(
                f"{path}: this user may not enter a folder on the way to it ({error.strerror}). Nothing was done; let "
                f"the user through (chmod +x on the folder), or give another path"
            ) from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ConfigurationError(
                    f"{name}: {error.strerror}. Beside the file lie others, whose names are its own and more. Nothing "
                    f"was done; give a shorter name"
                ) from error
            raise os_error(path, error) from error


def check_folder(path: Path) -> None:
    """Raise `ConfigurationError` when no Filao file may lie at `path`, whatever lies there now."""
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not _may(path.parent, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{path}: this user may not write in {path.parent}, where SQLite keeps its WAL")
    _check_mounts(path)
    kind = file_system(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ConfigurationError(
            f"{path} lies on a network file system ({kind}), whose locks and shared memory SQLite's WAL cannot rely "
            "on. Use a local disk, or a postgresql:// URL for several machines."
        )


def _check_mounts(path: Path) -> None:
    """Raise `ConfigurationError` when the file, or what lies beside it, may also be open under another name."""
    for name in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-filao"))):
        if is_mounted(name):
            raise ConfigurationError(
                f"{name} is mounted by itself, so the file may be open elsewhere with a WAL of its own, and what "
                f"either writes would be lost. Mount the folder that holds it instead: -v ./data:{path.parent}"
            )


def _may(path: Path, mode: int) -> bool:
    """Return whether this process's effective user may access a path in this mode."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def check_is_database(path: Path) -> None:
    """Raise SQLite's error for a file of another kind, or one that is locked, before anything is made beside it."""
    if path.exists():
        db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0.0)
        try:
            db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError as error:
            is_to_be_recovered = _primary(error) == sqlite3.SQLITE_READONLY  # its last process crashed
            if not is_to_be_recovered:
                raise
        finally:
            db.close()


def create(path: Path) -> None:
    """Make an empty file for a new database that only its owner may read: claims are personal data.

    No connection has the file open yet, so closing it drops no locks.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))


def connect(path: Path, *, full: bool, noted: Noted = NOTHING) -> sqlite3.Connection:
    """Open the database with the settings on which the promises rest. Call this in a turn; it waits for no lock.

    `noted` is what was known of the file when it was last opened: its WAL belongs neither to another file nor to one
    whose schema has gone back.
    """
    db = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False, cached_statements=256)
    try:
        loss = None if path == MEMORY else ground.left_over(path, cookie=noted.cookie, inode=noted.inode)
        if loss is not None:
            raise EngineError(f"{path} {loss.what}. Nothing was changed. What to do: {loss.remedy}.")
        _set_up(db, full=full)
    except BaseException:
        db.close()
        raise
    return db


def moved(db: sqlite3.Connection, *, full: bool) -> sqlite3.Connection:
    """Return another connection in memory, with the tables of this one."""
    other = connect(MEMORY, full=full)
    try:
        db.backup(other)
    except BaseException:
        other.close()
        raise
    return other


def _set_up(db: sqlite3.Connection, *, full: bool) -> None:
    """Set a connection's modes; never `mmap_size`, which turns an I/O error into a crash."""
    # Another user may have made the file: call no functions in its schema, and accept no overlapping cells.
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    if db.execute("PRAGMA page_count").fetchone()[0] == 0:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # gives back a backlog's pages; must precede the first table
    db.execute("PRAGMA journal_mode = WAL")
    set_durable(db, durable=full)
    db.execute(f"PRAGMA cache_size = -{PAGES_CACHED_MAX}")
    db.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_MAX}")


def set_durable(db: sqlite3.Connection, *, durable: bool) -> None:
    """Choose whether the next commits are flushed to the disk before they return."""
    db.execute("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")


def check_whole(db: sqlite3.Connection, path: Path) -> None:
    """Raise `EngineError` unless the file is whole after the disk failed.

    What the WAL holds may never have reached the disk, although it can be read. Writing it back makes sure, and fails
    at once if the disk still does.
    """
    db.execute(f"PRAGMA busy_timeout = {READERS_GO_ON_WITHIN}")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.execute("PRAGMA busy_timeout = 0")
    verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise EngineError(f"{path} is damaged: {verdict}. Stop the writers; run: filao doctor {path}")


def _create(db: sqlite3.Connection) -> None:
    schema = resources.files("filao.engines.sqlite").joinpath("schema.sql").read_text(encoding="utf-8")
    for statement in _statements(schema):
        db.execute(statement)
    db.execute("INSERT INTO filao_meta VALUES ('file', ?), ('last', 0), ('version', 0)", (secrets.token_hex(8),))


def _add_reports(db: sqlite3.Connection) -> None:
    """Let processes report how they are doing."""
    db.execute("ALTER TABLE filao_process ADD COLUMN state TEXT NOT NULL DEFAULT ''")  # in a worker's words
    db.execute("ALTER TABLE filao_process ADD COLUMN reported_at INTEGER NOT NULL DEFAULT 0")


def _salt_ids(db: sqlite3.Connection) -> None:
    """Let each transaction begin its ids with 64 random bits; NULL: the sender's id, or the file's name as before."""
    db.execute("ALTER TABLE filao_message ADD COLUMN salt INTEGER")


def _count_reasons(db: sqlite3.Connection) -> None:
    """Count dead letters by reason, and let the oldest blocked message be found."""
    db.execute(
        """
        CREATE TABLE filao_reason (
          queue  INTEGER NOT NULL,
          reason TEXT    NOT NULL,
          dead   INTEGER NOT NULL,  -- that lie there
          died   INTEGER NOT NULL,  -- ever; of those before this was counted, the ones that still lay there
          PRIMARY KEY (queue, reason)
        ) STRICT, WITHOUT ROWID
        """
    )
    db.execute(
        """
        INSERT INTO filao_reason (queue, reason, dead, died)
        SELECT queue, coalesce(reason, ''), count(*), count(*) FROM filao_message WHERE state = 6 GROUP BY 1, 2
        """
    )
    db.execute("CREATE INDEX filao_blocked ON filao_message (queue, id) WHERE state = 5")


def _keep_a_log(db: sqlite3.Connection) -> None:
    """Keep a log of what operators do on the dashboard."""
    db.execute(
        """
        CREATE TABLE filao_audit (
          id       INTEGER PRIMARY KEY AUTOINCREMENT,
          at       INTEGER NOT NULL,
          who      TEXT    NOT NULL,
          what     TEXT    NOT NULL,             -- see filao.overview.Deed, as for what follows
          queue    TEXT    NOT NULL,             -- its name: a queue that was deleted stays in the log
          about    TEXT    NOT NULL,
          wanted   INTEGER NOT NULL,
          done     INTEGER NOT NULL DEFAULT 0,
          ended_at INTEGER,
          outcome  TEXT    NOT NULL DEFAULT ''
        ) STRICT
        """
    )


def _remember_events(db: sqlite3.Connection) -> None:
    """Remember what happens to the messages of queues whose rule says so."""
    db.execute(
        """
        CREATE TABLE filao_event (
          id      INTEGER PRIMARY KEY,
          queue   TEXT    NOT NULL,  -- its name: the events outlive it
          message TEXT    NOT NULL,  -- the public id: they outlive the message too
          at      INTEGER NOT NULL,
          until   INTEGER NOT NULL,  -- kept so long
          what    TEXT    NOT NULL,  -- see filao.engine.Event
          attempt INTEGER NOT NULL,
          by      TEXT    NOT NULL,
          detail  TEXT    NOT NULL
        ) STRICT
        """
    )
    db.execute("CREATE INDEX filao_events ON filao_event (message, id)")
    db.execute("CREATE INDEX filao_event_until ON filao_event (until)")


MIGRATIONS: tuple[Migration, ...] = (_create, _add_reports, _salt_ids, _count_reasons, _keep_a_log, _remember_events)
"""Step n brings a file from version n to n + 1.

A released step is never edited; a change of the tables is a new step.
"""


def migrate(db: sqlite3.Connection, path: Path, steps: tuple[Migration, ...] = MIGRATIONS) -> bool:
    """Bring the tables up to this version, in one transaction; return False when there was nothing to do."""
    version = schema_version(db)
    if version == len(steps):
        return False
    db.execute("BEGIN IMMEDIATE")
    try:
        version = schema_version(db)
        if version > len(steps):
            raise ConfigurationError(
                f"{path} was written by a newer Filao (its tables have version {version}, this one knows up to "
                f"{len(steps)}). Upgrade Filao here; the file was not touched."
            )
        for step in steps[version:]:
            step(db)
        db.execute("UPDATE filao_meta SET value = ? WHERE name = 'version'", (len(steps),))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return True


def schema_version(db: sqlite3.Connection) -> int:
    """Return the version of Filao's tables in this file; 0 when there are none."""
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'filao_meta'").fetchone():
        return 0
    return int(db.execute("SELECT value FROM filao_meta WHERE name = 'version'").fetchone()[0])


def _statements(script: str) -> Iterator[str]:
    """Split a script where SQLite says that a statement is complete; `executescript` would commit by itself."""
    statement = ""
    for line in script.splitlines():
        code = line.partition("--")[0].rstrip()
        statement += code + "\n"
        if sqlite3.complete_statement(statement):
            if statement.strip():
                yield statement
            statement = ""


@contextlib.contextmanager
def mapped(path: Path) -> Generator[None]:
    """Turn SQLite's errors into ours, which name the file and say what to do."""
    try:
        yield
    except FAILURES as error:
        raise engine_error(path, error) from error
    except OSError as error:
        raise os_error(path, error) from error


def os_error(path: Path, error: OSError) -> EngineError:
    """Return our error for one of the operating system."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return EngineUnavailable(_no_descriptors(path))
    return EngineError(f"{path}: {error}. Check the disk and the permissions of the folder.")


def _no_descriptors(path: Path) -> str:
    return (
        f"{path} cannot be opened: this process has no file descriptor left. Nothing was done; close what is not "
        "needed, or raise the limit (ulimit -n)."
    )


def _has_descriptors() -> bool:
    """Return whether this process can open any file; SQLite does not say why it could not."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def _refuses_alone(path: Path, error: Exception) -> bool:
    """Return whether it is a connection that refuses to write, where the file and its folder would let it."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY and (path == MEMORY or _may(path, os.W_OK))


def was_interrupted(error: Exception) -> bool:
    """Return whether a statement was interrupted: it took too long, or a close or a fork would not wait for it."""
    return _primary(error) == sqlite3.SQLITE_INTERRUPT


def is_broken(error: Exception) -> bool:
    """Return whether a connection must no longer be used after this error.

    After a failed flush the kernel may have dropped the pages, and the next flush would succeed without them
    (https://www.sqlite.org/atomiccommit.html, "fsyncgate"): only reopening the file shows what is there.
    """
    return _primary(error) in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_busy(error: BaseException) -> bool:
    """Return whether only a lock was in the way: the same statement may succeed later."""
    return isinstance(error, sqlite3.Error) and _primary(error) == sqlite3.SQLITE_BUSY


def _primary(error: BaseException) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def engine_error(path: Path, error: Exception) -> EngineError:
    """Return our error for one of `FAILURES`: which file, what happened, what to do."""
    if not isinstance(error, sqlite3.Error):
        return EngineError(
            f"{path} holds, or was given, what cannot be right ({type(error).__name__}: {error}). Nothing was done; "
            f"run: filao doctor {path}"
        )
    said = f"{getattr(error, 'sqlite_errorname', type(error).__name__)}: {error}"
    match _primary(error):
        case sqlite3.SQLITE_BUSY if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY_SNAPSHOT:
            return EngineError(
                f"{path}: this transaction began with a read, and others have written since, so it can write no more "
                f"({said}). Nothing was sent: roll it back and begin anew, with BEGIN IMMEDIATE"
            )
        case sqlite3.SQLITE_LOCKED if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_LOCKED_SHAREDCACHE:
            return EngineError(
                f"{path}: this statement needs what its own connection is using ({said}), as a checkpoint does inside "
                f"a transaction. It did nothing; run it on a connection of its own, when the transaction has ended"
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR if not _has_descriptors():
            return EngineUnavailable(_no_descriptors(path))
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED if own.holds_lock(path):
            return EngineUnavailable(own.refusal(path))
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return EngineUnavailable(
                f"{path} is locked by a transaction of {own.in_the_way(path)} ({said}). Nothing was done; try again "
                f"when it ends."
            )
        case sqlite3.SQLITE_FULL:
            return EngineError(f"the disk of {path} is full ({said}). Nothing was done; free space and try again.")
        case sqlite3.SQLITE_IOERR:
            return EngineUnavailable(
                f"the disk of {path} failed, or a quota on it is used up ({said}). What was confirmed before is kept; "
                f"this call may or may not have been. The file is opened afresh for the next call; look at the disk "
                f"and the quota, and run: filao doctor {path}"
            )
        case sqlite3.SQLITE_NOTADB:
            return EngineError(f"{path} is not a SQLite database ({said}). Nothing was changed; give another path.")
        case sqlite3.SQLITE_CORRUPT:
            return EngineError(f"{path} is damaged ({said}). Stop the writers, copy it, and run: filao doctor {path}")
        case sqlite3.SQLITE_READONLY if _refuses_alone(path, error):
            return EngineError(
                f"{path} could be written, but this connection refuses to ({said}): PRAGMA query_only is on there, or "
                f"it was opened to read only. Nothing was done; use one that may write."
            )
        case sqlite3.SQLITE_CANTOPEN:
            return EngineError(f"{path} cannot be opened ({said}). Check the file's and its folder's permissions.")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return EngineError(f"{path} cannot be written ({said}). Check the file's and its folder's permissions.")
        case _:
            return EngineError(f"{path}: {said}")
