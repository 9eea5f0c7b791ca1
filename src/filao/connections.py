"""The user's own database connection, of any library: how to run statements on it, and whether it holds a transaction.

A DB-API connection (PEP 249: `sqlite3`, psycopg) is used through its cursors; SQLAlchemy's connections and sessions and
Django's connections through their documented interfaces, so that no library has to be installed.
"""

import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from filao.errors import ConfigurationError, EngineError

Execute = Callable[[str, Any], Any]
E = TypeVar("E", bound=BaseException)


@dataclass(frozen=True, slots=True)
class Connection:
    """Runs statements with `?` for each parameter on the user's connection, in the user's transaction."""

    dialect: str
    """sqlite, postgresql, mysql, or the library's name for another one."""
    paramstyle: str
    """As in PEP 249."""
    run: Execute

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """Run one statement and return what the library does: a cursor or a result, with `rowcount` and `fetchall`."""
        return self.run(*_rewritten(sql, parameters, self.paramstyle))


def connection_of(given: Any, *, needs_transaction: bool) -> Connection:
    """Recognise a connection. Raises `ConfigurationError` for anything else, or if a needed transaction is missing."""
    refuse_asynchronous(given)
    if callable(getattr(given, "connection", None)) and hasattr(given, "get_bind"):  # SQLAlchemy's Session
        given = given.connection()
    if hasattr(given, "exec_driver_sql"):  # SQLAlchemy's Connection
        if needs_transaction:
            begin_on_sqlalchemy(given)
        dialect = given.dialect
        return Connection(dialect.name, dialect.paramstyle, given.exec_driver_sql)
    if hasattr(given, "vendor") and hasattr(given, "in_atomic_block"):  # Django's
        holds = not needs_transaction or bool(given.in_atomic_block)
        _check_transaction(holds=holds, advice="use it inside transaction.atomic()")
        return Connection(given.vendor, "format", _through_cursor(given.cursor))
    return _of_driver(given, needs_transaction=needs_transaction)


def refuse_asynchronous(given: object) -> None:
    """Raise `ConfigurationError` for SQLAlchemy's asynchronous connections and sessions."""
    if hasattr(given, "run_sync"):
        raise ConfigurationError(
            f"a {type(given).__name__} is asynchronous: pass the method to it, as in "
            f"`await connection.run_sync(outbox.send_to_queue, queue, body)`"
        )


def driver_error(error: BaseException, kind: type[E]) -> E | None:
    """Return the driver's error: this one, or the one that SQLAlchemy or Django raised it from; None if neither is.

    The cause of the cause is not looked at: it tells of an earlier failure in the transaction, not of this statement.
    """
    return next((found for found in (error, error.__cause__) if isinstance(found, kind)), None)


def refused(error: Exception) -> EngineError:
    """Return the error for a send that the user's connection refused."""
    kind = type(error)
    said = str(error).strip().partition("\n")[0]
    return EngineError(
        f"within=: the connection refused it, with {kind.__module__}.{kind.__qualname__}: {said}. Nothing was sent; "
        f"give a connection that is open and whose transaction can go on."
    )


def holds_transaction(driver: Any) -> bool:
    """Return whether the next statement of a driver's connection will be part of a transaction, as far as it tells.

    A connection without a transaction begins one with its first statement, unless it commits each statement.
    """
    status = getattr(getattr(driver, "info", None), "transaction_status", 0)  # psycopg's; 0 is idle
    if getattr(driver, "in_transaction", False) is True or status != 0:
        return True
    if hasattr(driver, "in_transaction") and getattr(driver, "isolation_level", "") is None:  # sqlite3's, aiosqlite's
        return False
    return getattr(driver, "autocommit", False) is not True


def begin_on_sqlalchemy(given: Any) -> None:
    """Begin on a connection of SQLAlchemy, as its first statement would, and check that its driver's connection does.

    Otherwise its `commit` would commit nothing. At the isolation level AUTOCOMMIT the driver's does not begin.
    """
    if not given.in_transaction():
        given.begin()
    ends = (getattr(given.connection, name, None) for name in ("dbapi_connection", "driver_connection"))
    advice = 'at the isolation level "AUTOCOMMIT", which engine or connection has, there is none; choose another'
    _check_transaction(holds=all(map(holds_transaction, ends)), advice=advice)


def _of_driver(given: Any, *, needs_transaction: bool) -> Connection:
    """Recognise a DB-API connection by the module that it comes from."""
    if isinstance(given, sqlite3.Connection):
        holds = not needs_transaction or holds_transaction(given)
        _check_transaction(holds=holds, advice='execute "BEGIN IMMEDIATE" on it first')
        return Connection("sqlite", "qmark", given.execute)
    for kind in type(given).__mro__:
        module = sys.modules.get(kind.__module__.partition(".")[0])
        if hasattr(module, "paramstyle") and hasattr(given, "cursor"):
            if "Async" in kind.__name__:
                break
            name = getattr(module, "__name__", "")
            advice = "use it inside `with connection.transaction()`" if name == "psycopg" else "turn autocommit off"
            _check_transaction(holds=not needs_transaction or holds_transaction(given), advice=advice)
            if name == "psycopg":
                return _of_psycopg(given, module)
            dialect = "postgresql" if name.startswith("psycopg") else name
            return Connection(dialect, str(getattr(module, "paramstyle", "")), _through_cursor(given.cursor))
    raise ConfigurationError(
        f"a {type(given).__module__}.{type(given).__qualname__} is no connection that Filao knows: give a DB-API "
        "connection (sqlite3, psycopg), a SQLAlchemy connection or session, or a Django connection"
    )


def _of_psycopg(given: Any, psycopg: Any) -> Connection:
    """Recognise a connection of psycopg 3, whatever its cursor factory and its row factory."""
    cursor = partial(psycopg.Cursor, given, row_factory=psycopg.rows.tuple_row)
    return Connection("postgresql", str(psycopg.paramstyle), _through_cursor(cursor))


def _check_transaction(*, holds: bool, advice: str) -> None:
    if not holds:
        raise ConfigurationError(
            "this connection commits each statement for itself and holds no transaction, so there is nothing to join: "
            f"{advice}"
        )


def _through_cursor(make: Callable[[], Any]) -> Execute:
    def run(sql: str, parameters: Any) -> Any:
        cursor = make()
        cursor.execute(sql, parameters)
        return cursor

    return run


def _rewritten(sql: str, parameters: Sequence[Any], paramstyle: str) -> tuple[str, Any]:
    """Write a statement in its library's style. In our statements, `?` stands for nothing but parameters."""
    if paramstyle == "qmark":
        return sql, tuple(parameters)
    if paramstyle in ("format", "pyformat"):
        return sql.replace("?", "%s"), tuple(parameters)
    mark = {"numeric": ":", "numeric_dollar": "$"}.get(paramstyle, ":p")
    parts = sql.split("?")
    numbered = "".join(f"{part}{mark}{number}" for number, part in enumerate(parts[:-1], 1)) + parts[-1]
    if mark != ":p":
        return numbered, tuple(parameters)
    return numbered, {f"p{number}": value for number, value in enumerate(parameters, 1)}
