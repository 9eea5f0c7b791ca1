"""`filao trace`: what happened to one message, of a queue that keeps a history."""

import sys
from datetime import datetime

import click

from filao.cli.shell import addressed, as_json, broker_at, is_terminal, note, print_lines
from filao.cli.tables import draw
from filao.engine import Event
from filao.overview import raised_line

SHOWN_MAX = 120  # characters of an error in a table


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] ID")
@click.option("--json", "wants_json", is_flag=True, help="JSON lines, also on a terminal.")
def trace(*, arguments: tuple[str, ...], wants_json: bool) -> int:
    """Print what happened to a message, the oldest event first.

    Queues remember it that were declared with --history, for their --history-window. A table on a terminal, and JSON
    lines elsewhere. The exit code is 1 when nothing is known.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url) as broker:
        found = broker.trace(name)
    if wants_json or not is_terminal(sys.stdout):
        print_lines(as_json(event) for event in found)
    elif found:
        head = ("at", "queue", "what", "attempt", "by", "detail")
        draw(head, [_row(event) for event in found], figures=False, keeps=1)
    if not found:
        note(f"nothing is known of {name!r}: only queues declared with --history remember, for their --history-window")
    return 0 if found else 1


def _row(event: Event) -> tuple[str, ...]:
    line = raised_line(event.detail)
    detail = line if len(line) <= SHOWN_MAX else f"{line[:SHOWN_MAX]}…"
    return (_moment(event.at), event.queue, event.what, str(event.attempt), event.by, detail)


def _moment(at: datetime) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
