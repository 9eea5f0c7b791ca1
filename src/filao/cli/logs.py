"""How `filao work` writes its log: lines for people, or an object of JSON for each record."""

import json
import logging
import sys
from datetime import UTC, datetime

from filao.cli.shell import note
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
            "text": _text(record),
        }
        written |= {field: getattr(record, field) for field in FIELDS if hasattr(record, field)}
        if record.exc_info:
            written["error"] = self.formatException(record.exc_info)
        return json.dumps(written, default=str)  # in ASCII, so that it stays on one line whatever it holds


def _text(record: logging.LogRecord) -> str:
    """Return what a record says, also where its arguments do not fit: a traceback of `logging` would be no JSON."""
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError) as error:
        return f"{record.msg} {record.args!r} ({error})"


def say(text: str) -> None:
    """Say something to the person who runs this, or to the program that reads the log."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger("filao.worker").info("%s", text)
    else:
        note(text)


def begin(level: str, form: str) -> None:
    """Log from now on to stderr, in a form: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
