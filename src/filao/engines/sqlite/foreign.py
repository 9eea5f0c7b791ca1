"""The user's own transaction on our file: which connections a send can join, and how they are recognised.

A `sqlite3` connection is taken as it is. One that is wrapped, as by SQLAlchemy and Django, is unwrapped through the
attributes that these libraries document, so that neither has to be installed.
"""

import sqlite3
from pathlib import Path
from typing import Any

from filao.connections import begin_on_sqlalchemy, driver_error, holds_transaction, refuse_asynchronous, refused
from filao.engines.sqlite.files import engine_error
from filao.errors import ConfigurationError, FilaoError

_WRAPPERS = ("driver_connection", "dbapi_connection", "connection")
_DEPTH_MAX = 5  # wrappers around wrappers: SQLAlchemy has a session, a connection, a pooled one, the driver's


def open_transaction(connection: object, path: Path) -> sqlite3.Connection:
    """Return the `sqlite3` connection inside `connection`, its transaction begun, or say why it cannot be joined."""
    try:
        db = _unwrap(connection)
    except FilaoError:
        raise
    except Exception as error:  # raised by the library that wraps it
        drivers = driver_error(error, sqlite3.Error)
        raise (refused(error) if drivers is None else engine_error(path, drivers)) from error
    _check_file(db, path)
    if not db.in_transaction:
        if not holds_transaction(db):
            raise ConfigurationError(
                "within=: this connection is in autocommit mode and holds no transaction, so there is nothing to join. "
                'Execute "BEGIN IMMEDIATE" on it first.'
            )
        db.execute("BEGIN IMMEDIATE")  # as Python's sqlite3 itself would begin one before the first write
    return db


def _unwrap(connection: object) -> sqlite3.Connection:
    refuse_asynchronous(connection)
    inner: Any = connection
    for _ in range(_DEPTH_MAX):
        if isinstance(inner, sqlite3.Connection):
            return inner
        if hasattr(inner, "exec_driver_sql"):  # SQLAlchemy's Connection
            begin_on_sqlalchemy(inner)
        elif hasattr(inner, "validate_no_broken_transaction"):  # Django's: it is asked, as by a statement of Django's
            inner.validate_no_broken_transaction()
        for name in _WRAPPERS:
            value = getattr(inner, name, None)
            if value is not None:
                inner = value() if callable(value) and not isinstance(value, sqlite3.Connection) else value
                break
        else:
            break
    if type(inner).__module__.partition(".")[0] == "aiosqlite":
        raise ConfigurationError(
            "within=: aiosqlite keeps its sqlite3 connection to a thread of its own, so no send can join its "
            "transaction. Nothing was sent; use a filao.Outbox, or a sqlite3 connection."
        )
    raise ConfigurationError(
        f"within=: a {type(connection).__qualname__} holds no sqlite3 connection. Give the sqlite3 connection, a "
        f"SQLAlchemy connection or session, or a Django connection on the queue's file."
    )


def _check_file(db: sqlite3.Connection, path: Path) -> None:
    main = next((file for _, name, file in db.execute("PRAGMA database_list") if name == "main"), "")
    if not main or not path.exists() or not path.samefile(main):
        raise ConfigurationError(
            f"within=: this connection is on {main or 'a database in memory'}, the queue on {path}. A transaction can "
            f"span them only in one file: open the broker on {main or 'a file'}, or use an outbox."
        )
