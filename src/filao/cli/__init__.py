"""The command line: `filao`, for operators and for shell scripts.

All commands but `work` rely on the blocking twin alone, so that Ctrl-C interrupts any wait: for a disk, a queue or a
pipe. Data go to stdout as JSON lines, past every buffer; what is for people goes to stderr. A command returns its exit
code, and an error that it raises becomes one here. click reads the arguments and rich draws, both from the extra `cli`;
rich is imported where it draws, because most commands draw nothing.
"""

import logging
import sys
from importlib import import_module
from io import TextIOWrapper

from filao.extras import Extra, ExtraMissing

try:
    with Extra("filao[cli]", of="the command line"):
        import click

        import_module("rich")  # of many commands
except ExtraMissing as error:
    sys.stderr.write(f"filao: {error}\n")
    sys.exit(2)

from filao import __version__
from filao.cli.backup import backup, restore
from filao.cli.control import cancel, delete, pause, resume
from filao.cli.dashboard import dashboard
from filao.cli.declare import declare
from filao.cli.log import log
from filao.cli.logs import say
from filao.cli.metrics import metrics
from filao.cli.move import move_command
from filao.cli.receive import receive
from filao.cli.sandbox import sandbox_command
from filao.cli.send import send
from filao.cli.shell import OutputClosedError, safe
from filao.cli.stats import doctor, stats
from filao.cli.stored import dead, discard, peek, purge, redrive
from filao.cli.top import top
from filao.cli.trace import trace
from filao.cli.verify import verify_command
from filao.cli.work import work
from filao.errors import EngineError, FilaoError
from filao.worker.signals import end_by_exception

REFUSED, UNAVAILABLE, OUTPUT_CLOSED, INTERRUPTED = 3, 4, 141, 130


def main() -> None:
    """Run the command line and exit with one of the codes that `filao --help` lists."""
    end_by_exception()
    stdout: object = sys.stdout
    if isinstance(stdout, TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # as stderr's: a terminal may lack a sign of a table's texts
    sys.exit(_run())


def _run() -> int:
    """Run the command, and return its exit code, or that of the error that it raised."""
    try:
        code = commands.main(prog_name="filao", standalone_mode=False)
    except click.Abort:
        return INTERRUPTED
    except OutputClosedError:
        return OUTPUT_CLOSED
    except click.ClickException as error:
        click.UsageError(safe(error.format_message()), getattr(error, "ctx", None)).show()
        return error.exit_code
    except FilaoError as error:
        say(str(error), logging.ERROR)
        return UNAVAILABLE if isinstance(error, EngineError) else REFUSED
    except OSError as error:
        if (ended := _ended_by(error)) is not None:
            return ended
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error), logging.ERROR)
        return UNAVAILABLE
    return code if isinstance(code, int) else 0


def _ended_by(error: BaseException) -> int | None:
    """Return the code of a signal that ended the command, where its terminal was gone before it could be given back."""
    before = error.__context__
    while before is not None and not isinstance(before, SystemExit):
        before = before.__context__
    return before.code if before is not None and isinstance(before.code, int) else None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def commands() -> None:
    """Durable point-to-point queues: send, receive and look after them.

    Every command but work and sandbox takes the URL first: a path such as claims.db, or sqlite:///claims.db. It may be
    left out when the environment variable FILAO_URL holds it. Where the arguments could then be read both ways, the
    first is taken for a URL only if it holds a "/" or a ":", as in ./claims.db.

    Data are JSON lines on stdout, and all else is on stderr. stats, peek, dead, trace and doctor draw a table on a
    terminal. Durations are seconds; sizes are bytes.

    \b
    Exit codes:
      0    done
      1    nothing found (receive, peek, dead, redrive, discard, cancel,
           stats, trace, log), not confirmed (purge, discard, delete), an
           error found (doctor), a promise not kept (verify), or messages
           left behind (move)
      2    wrong usage
      3    Filao refused, and says why: no such queue, a body that is
           too large, a queue that is full ...
      4    the storage or the output is not available
      129  ended by SIGHUP, as when its terminal is closed
      130  interrupted by Ctrl-C
      141  the reader of the output went away
      143  ended by SIGTERM
    """  # noqa: D301  # click's mark for a paragraph that is not wrapped is a real backspace


for _command in (
    *(declare, send, receive, peek, dead, redrive, discard, purge, stats, doctor, verify_command, move_command, work),
    *(pause, resume, cancel, delete, top, trace, dashboard, log, metrics, backup, restore, sandbox_command),
):
    commands.add_command(_command)
