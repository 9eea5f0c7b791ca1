"""How `filao work` writes its log: lines for people, or an object of JSON for each record."""

import json
import logging
import sys
from datetime import UTC, datetime

_LINE = "%(asctime)s %(process)d %(levelname)s %(message)s"
FIELDS = ("queue", "message_id", "attempt")
"""What records of a worker carry beside their text."""


class JsonFormatter(logging.Formatter):
    """Writes a record as JSON on one line, with the fields that it carries."""

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
        return json.dumps(written, default=str)  # in ASCII: whatever stands in it stays on its line


def begin(level: str, form: str) -> None:
    """Log from now on to stderr, in a form: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
