"""How `filao work` writes its log: lines for people, or an object of JSON for each record."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime

from filao.cli.shell import note, safe
from filao.codec import said, shown
from filao.printable import printable

log: logging.Logger = logging.getLogger("filao.worker")

CLIENTS = ("aiormq", "aio_pika")  # RabbitMQ's, which tell of each lost connection with tracebacks: we say it in a line

_LINE = "%(asctime)s %(process)d %(levelname)s %(message)s"
FIELDS = ("queue", "message_id", "attempt")
"""The fields of a worker's records besides their text."""


class TextFormatter(logging.Formatter):
    """Writes a record for people, so that no id or error acts on their terminal or passes for a record of its own."""

    def __init__(self, level: str) -> None:
        super().__init__(_LINE)
        self.level: int = getattr(logging, level.upper())
        """What its reader wants to hear of, at least."""

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
        written |= {field: _plain(getattr(record, field)) for field in FIELDS if hasattr(record, field)}
        if record.exc_info:
            written["error"] = self.formatException(record.exc_info)
        if record.stack_info:
            written["stack"] = self.formatStack(record.stack_info)
        return json.dumps(written)  # in ASCII, so that it stays on one line whatever it holds


def _plain(value: object) -> str | int:
    """Return a field as JSON holds it, whatever a program's own record has there: `nan` would be no JSON."""
    return value if isinstance(value, str | int) else shown(value)


def _text(record: logging.LogRecord) -> str:
    """Return what a record says, also where its arguments do not fit: a traceback of `logging` would be no JSON."""
    try:
        return record.getMessage()
    except Exception as error:  # whatever the text of an argument raises
        text = record.msg if isinstance(record.msg, str) else shown(record.msg)
        return f"{text} {shown(record.args)} ({type(error).__name__}: {said(error)})"


def say(text: str, level: int = logging.INFO) -> None:
    """Say something to the person who runs this, or to the program that reads the log, if they want to hear of it."""
    forms = [handler.formatter for handler in logging.getLogger().handlers]
    if any(isinstance(form, JsonFormatter) for form in forms):
        log.log(level, "%s", safe(text))
    elif level >= min((form.level for form in forms if isinstance(form, TextFormatter)), default=level):
        note(text)


def begin(level: str, form: str) -> None:
    """Log from now on to stderr, in a form: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(level))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for client in CLIENTS:
        logging.getLogger(client).setLevel("DEBUG" if level.upper() == "DEBUG" else "CRITICAL")
    if form == "json":
        _log_what_python_prints()


def _log_what_python_prints() -> None:
    """Have warnings and errors that nobody caught logged, which Python prints by itself in lines that are no JSON."""
    logging.captureWarnings(True)

    def of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            error = failed.exc_value or failed.exc_type()
            log.error("a thread failed that nobody waits for", exc_info=error.with_traceback(failed.exc_traceback))

    def of_nobody(failed: "sys.UnraisableHookArgs") -> None:
        error = failed.exc_value or failed.exc_type()
        said = failed.err_msg or "an error was ignored, as nobody could get it, in"
        log.error("%s: %s", said, shown(failed.object), exc_info=error.with_traceback(failed.exc_traceback))

    def of_program(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
        log.critical("the program failed", exc_info=error)

    threading.excepthook, sys.unraisablehook, sys.excepthook = of_thread, of_nobody, of_program
