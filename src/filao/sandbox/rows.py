"""The row of a message on the disk, read past the queue by a separate connection, to show it to the learner."""

import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from filao.engines.sqlite.books import LEASED, NO_TOKEN, READY, STATES

SHOWN = ("id", "state", "attempts", "token", "at", "grp", "reason", "content")  # columns, in this order
CONTENT_MAX = 120  # characters
NUMBER_MAX = 15  # digits
NONE = "\u2013"  # shown in place of a number that means "none"
WAIT = 0.2  # seconds for a lock that another holds


class Rows:
    """The rows of one queue file, which is opened when the first is read."""

    def __init__(self, file: Path | str) -> None:
        self._url = f"{Path(file).absolute().as_uri()}?mode=ro"
        self._connection: sqlite3.Connection | None = None

    def row(self, message: str, *, as_sent: bool = False) -> str:
        """Return a message's row as JSON; empty when it is not there, or cannot be read now.

        `as_sent`: as the send left it, even if a quick consumer has it by now; a lease changes only four columns.
        """
        number = message.rpartition("-")[2]
        if not number.isdecimal() or len(number) > NUMBER_MAX:
            return ""
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._url, uri=True, timeout=WAIT)
                self._connection.row_factory = sqlite3.Row
            found = self._connection.execute("SELECT * FROM filao_message WHERE id = ?", (int(number),)).fetchone()
        except sqlite3.Error:
            return ""
        if found is None:
            return ""
        row = dict(found)
        if as_sent and row["state"] == LEASED:
            row |= {"state": READY, "attempts": 0, "token": NO_TOKEN, "at": row["sent_at"]}
        return msgspec.json.encode(_shown(row)).decode()

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    content = row.get("content", b"")
    text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
    row |= {"state": STATES.get(row.get("state", 0), row.get("state")), "content": text[:CONTENT_MAX]}
    if row.get("token") == NO_TOKEN:
        row["token"] = NONE
    return {column: str(row[column]) for column in SHOWN if row.get(column) is not None}
