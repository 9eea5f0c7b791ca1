"""A user's own SQL inside a transaction: what it may not do, and how its parameters are marked on every engine."""

import re
from collections.abc import Mapping
from typing import Any

from filao.codec import shown
from filao.errors import ConfigurationError

_NOT_IN_TRANSACTIONS = frozenset(
    {"ABORT", "ATTACH", "BEGIN", "COMMIT", "DETACH", "END", "RELEASE", "ROLLBACK", "SAVEPOINT", "START", "VACUUM"}
    | {"PREPARE TRANSACTION"}
)
# An engine skips spaces, empty statements, a byte order mark and comments before a statement. A comment inside another
# one is not skipped here: see `check_statement`.
_FIRST_WORD = re.compile(r"(?:[\s;\ufeff]|--[^\n]*(?:\n|$)|/\*(?:(?!/\*).)*?\*/)*(/\*|[A-Za-z]*)", re.DOTALL)
_PARTS = re.compile(
    r"""
    (?P<other> '(?:[^']|'')*' | "[^"]*" | --[^\n]* | /\*.*?\*/ | \$(\w*)\$.*?\$\2\$ | :: )
    | (?P<mark> \? )
    | :(?P<name> [A-Za-z_]\w* )
    | (?P<percent> % )
    """,
    re.DOTALL | re.VERBOSE,
)


def check_statement(sql: str) -> str:
    """Return the first word of a statement, in capitals.

    Raises `ConfigurationError` if it is not a text, or would end its transaction.
    """
    if not isinstance(sql, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users are not all typed
        raise ConfigurationError(f"a statement is {shown(sql)}; it must be a text. Nothing was done")
    found = _FIRST_WORD.match(sql)
    word = found[1].upper() if found else ""
    if found and word == "PREPARE" and first_words(sql[found.end(1) :])[:11].upper() == "TRANSACTION":
        word = "PREPARE TRANSACTION"  # it ends the transaction even when it fails
    if word == "/*":  # PostgreSQL and SQLite disagree where it ends, and so on the statement's first word
        raise ConfigurationError(
            "a comment within a comment before a statement: end it, or leave it out. Nothing was done"
        )
    if word in _NOT_IN_TRANSACTIONS:
        raise ConfigurationError(
            f"{word} inside a transaction: leaving the block commits it, an exception rolls it back. Nothing was done"
        )
    return word


def first_words(sql: str) -> str:
    """Return a statement without what an engine skips before it."""
    found = _FIRST_WORD.match(sql)
    return sql[found.start(1) :] if found else sql


def for_psycopg(sql: str, parameters: Any) -> tuple[str, Any]:
    """Write `?` and `:name`, SQLite's marks of parameters, in psycopg's style, so that a statement runs on both.

    A statement in psycopg's style is left as it is.
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
