"""Whether a file that another user may have made holds exactly our tables, and nothing that is attached to them.

A view in place of a table may never end, and a trigger may do anything with what we write. So before anything is read
from the tables, they and their indexes are compared with those that this version makes in an empty database.
"""

import re
import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path

from filao.engines.sqlite import files
from filao.errors import EngineError

DOUBTED_FOR = 5.0  # seconds that all statements on a file may take until it is known to be ours
_STEPS_AT_ONCE = 10_000  # of SQLite's virtual machine, between looks at the clock: some 0.1 ms
_FILE = re.compile(r"[0-9a-f]{16}")
_COMMENT = re.compile(r"--[^\n]*")
_OURS = r"""
    SELECT type, lower(name), lower(tbl_name), sql
    FROM sqlite_schema
    WHERE lower(tbl_name) LIKE 'filao\_%' ESCAPE '\'
"""

_Made = dict[str, tuple[str, str]]


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raise `EngineError` when the tables are not ours, or their version and names are unreadable."""
    with bounded(db, path):
        wrong = "; ".join(differences(db))
    if wrong:
        raise EngineError(
            f"{path} is damaged, or was not made by Filao: {wrong}. Nothing was changed. Look who made it; to go on "
            f"from a backup: filao restore {path} FILE --replace"
        )


def differences(db: sqlite3.Connection) -> list[str]:
    """Return in which ways the tables differ from those that Filao makes."""
    found = db.execute(_OURS).fetchall()
    made = {name: (kind, _normal(sql)) for kind, name, _, sql in found if sql is not None}
    version = _version(db, made)
    if isinstance(version, str):
        return [version]
    if version > len(files.MIGRATIONS):
        return []  # a newer Filao made them; `migrate` refuses that
    expected = _expected(version)
    if not expected:
        expected_later = _expected(len(files.MIGRATIONS))
        return [f"{name} is there, and filao_meta is not" for name in made if name in expected_later]
    return [
        *(_difference(name, made.get(name), shape) for name, shape in expected.items() if made.get(name) != shape),
        *(
            f"the trigger {name!r} hangs on {table}"
            for kind, name, table, _ in found
            if kind == "trigger" and table in expected
        ),
        *_unreadable(db),
    ]


def _version(db: sqlite3.Connection, made: _Made) -> int | str:
    """Return the version of the tables, 0 if there are none, or a text that says what is wrong with it."""
    meta = made.get("filao_meta")
    if meta is None:
        return 0
    shape = _expected(len(files.MIGRATIONS))["filao_meta"]
    if meta != shape:
        return _difference("filao_meta", meta, shape)
    found = db.execute("SELECT value FROM filao_meta WHERE name = 'version'").fetchone()
    if found is None or not isinstance(found[0], int) or found[0] < 1:
        return f"filao_meta says that its version is {found and _short(found[0])}"
    return found[0]


def _difference(name: str, made: tuple[str, str] | None, shape: tuple[str, str]) -> str:
    if made is None:
        return f"the {shape[0]} {name} is missing"
    if made[0] != shape[0]:
        return f"{name} is a {made[0]}, not a {shape[0]}"
    return f"the {shape[0]} {name} is made otherwise"


def _unreadable(db: sqlite3.Connection) -> list[str]:
    """Return what filao_meta holds but cannot hold."""
    meta = dict(db.execute("SELECT name, value FROM filao_meta WHERE name IN ('file', 'last')").fetchall())
    file, last = meta.get("file"), meta.get("last")
    wrong: list[str] = []
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        wrong.append(f"filao_meta says that the file's name is {_short(file)}")
    if not isinstance(last, int) or not 0 <= last < 2**62:
        wrong.append(f"filao_meta says that the last number is {_short(last)}")
    return wrong


def _short(value: object) -> str:
    return repr(value)[:60]


@lru_cache
def _expected(version: int) -> _Made:
    """Return the tables and indexes of a version as SQLite stores them."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for step in files.MIGRATIONS[:version]:
            step(db)
        return {name: (kind, _normal(sql)) for kind, name, _, sql in db.execute(_OURS) if sql is not None}


def _normal(sql: str) -> str:
    """Return a statement without comments and needless spaces."""
    return re.sub(r"\s*([(),])\s*", r"\1", " ".join(_COMMENT.sub("", str(sql)).split()))


@contextmanager
def bounded(db: sqlite3.Connection, path: Path, seconds: float = DOUBTED_FOR) -> Generator[None]:
    """Let all statements on this connection together take so many seconds, and no longer."""
    until = time.monotonic() + seconds
    db.set_progress_handler(lambda: time.monotonic() > until, _STEPS_AT_ONCE)
    try:
        yield
    except sqlite3.OperationalError as error:
        if files.was_interrupted(error):
            raise EngineError(
                f"{path} did not answer within {seconds:g} seconds, so that it is damaged, or was made to hold up "
                "those who open it. Nothing was changed"
            ) from error
        raise
    finally:
        db.set_progress_handler(None, 0)
