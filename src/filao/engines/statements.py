"""A user's own SQL inside a transaction: what it may not do, and how its parameters are marked on every engine."""

import re
from collections.abc import Mapping
from typing import Any

from filao.errors import ConfigurationError

_NOT_IN_TRANSACTIONS = frozenset(
    {"ABORT", "ATTACH", "BEGIN", "COMMIT", "DETACH", "END", "RELEASE", "ROLLBACK", "SAVEPOINT", "START", "VACUUM"}
)
_PARTS = re.compile(
    r"""
    (?P<other> '(?:[^']|'')*' | "[^"]*" | --[^\n]* | /\*.*?\*/ | \$(\w*)\$.*?\$\2\$ | :: )
    | (?P<mark> \? )
    | :(?P<name> [A-Za-z_]\w* )
    | (?P<percent> % )
    """,
    re.DOTALL | re.VERBOSE,
)


def check_statement(sql: str) -> None:
    """Raise `ConfigurationError` for a statement that would end the transaction which it is in."""
    words = sql.split(None, 1)
    if words and words[0].upper().rstrip(";") in _NOT_IN_TRANSACTIONS:
        raise ConfigurationError(
            f"{words[0].upper()} inside a transaction: leaving the block commits it, an exception rolls it back"
        )


def for_psycopg(sql: str, parameters: Any) -> tuple[str, Any]:
    """Write `?` and `:name`, which SQLite knows, as psycopg wants them, so that a statement runs on both.

    A statement that marks its parameters as psycopg does is left as it is.
    """
    if not parameters:
        return sql, None
    named = isinstance(parameters, Mapping)
    marks = [found for found in _PARTS.finditer(sql) if found["name" if named else "mark"]]
    if not marks:
        return sql, parameters

    def written(found: re.Match[str]) -> str:
        if found["mark"] and not named:
            return "%s"
        if found["name"] and named:
            return f"%({found['name']})s"
        return found[0].replace("%", "%%")

    return _PARTS.sub(written, sql), parameters
