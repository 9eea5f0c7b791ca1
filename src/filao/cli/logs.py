"""How `filao work` writes its log: lines for people, or an object of JSON for each record."""

import json
import logging
import sys
from datetime import UTC, datetime

from filao.printable import printable

_LINE = "%(asctime)s %(process)d %(levelname)s %(message)s"
FIELDS = ("queue", "message_id", "attempt")
"""The fields of a worker's records besides their text."""


class TextFormatter(logging.Formatter):
    """Writes a record for people, so that no id or error acts on their terminal or passes for a record of its own."""

    def __init__(self) -> None:
        super().__init__(_LINE)

    def format(self, record: logging.LogRecord) -> str:
        """Return its line, and what follows it, set in."""
        return "\n    ".join(printable(line) for line in super().format(record).split("\n"))


class JsonFormatter(logging.Formatter):
    """Writes a record as JSON on one line, with those of the `FIELDS` that it has."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        written: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "text": record.getMessage(),
        }
        written |= {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        if record.exc_info:
            written["error"] = self.formatException(record.exc_info)
        return json.dumps(written, default=str)  # in ASCII, so that it stays on one line whatever it holds


def begin(level: str, form: str) -> None:
    """Log from now on to stderr, in a form: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
