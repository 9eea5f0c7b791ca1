"""`filao peek`, `dead`, `redrive` and `purge`: look at stored messages, send them back, or delete them."""

import os
import sys
from collections.abc import Sequence

import click
import msgspec

from filao.cli.lines import json_text
from filao.cli.shell import addressed, as_json, broker_at, is_terminal, note, print_lines, shown_body, usage
from filao.draft import PEEK_MAX
from filao.engine import QueueStats, State, StoredMessage

_state = click.Choice([state.value for state in State])
_page = click.IntRange(1, PEEK_MAX)


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--state", type=_state, default="ready", help="Default ready.")
@click.option("--limit", type=_page, default=10, metavar="N", help="At most so many, up to 10000. Default 10.")
@click.option("--after", metavar="ID", help="Go on behind this message, the last one of the page before.")
def peek(*, arguments: tuple[str, ...], state: str, limit: int, after: str | None) -> int:
    """Print messages in their order and change nothing.

    The exit code is 1 when there is none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url) as broker:
        return _print_stored(broker.peek(name, state=state, limit=limit, after=after))


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--limit", type=_page, default=100, metavar="N", help="At most so many, up to 10000. Default 100.")
@click.option("--after", metavar="ID", help="Go on behind this message, the last one of the page before.")
def dead(*, arguments: tuple[str, ...], limit: int, after: str | None) -> int:
    """Print dead letters with their reason, last error and history.

    The exit code is 1 when there is none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url) as broker:
        return _print_stored(broker.dead_letters(name, limit=limit, after=after))


def _print_stored(messages: Sequence[StoredMessage]) -> int:
    print_lines(
        as_json({**msgspec.structs.asdict(message), **shown_body(message.body), "error": message.error})
        for message in messages
    )
    return 0 if messages else 1


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Only this one. May be repeated.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only so many, the oldest first.")
@click.option("--body", metavar="JSON", help="Replace the body of the one --id.")
def redrive(*, arguments: tuple[str, ...], ids: tuple[str, ...], limit: int | None, body: str | None) -> int:
    """Send dead letters back to their old places, with fresh attempts.

    All of them, unless --id or --limit chooses. Prints {"redriven": N}. The exit code is 1 when there was none, or when
    an --id names none.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url) as broker:
        count = broker.redrive(
            name,
            ids=ids or None,
            limit=limit,
            body=msgspec.UNSET if body is None else json_text(os.fsencode(body)),
        )
    print_lines([as_json({"redriven": count})])
    wanted = min(len(set(ids)), limit or len(ids)) if ids else 1
    if count < wanted:
        note(f"{wanted - count} of {wanted} ids are of no dead letter of queue {name!r}" if ids else "no dead letters")
    return 0 if count >= wanted else 1


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] QUEUE")
@click.option(
    "--state", type=_state, help="Only what is in this state. Default: all that waits (ready, delayed, blocked)."
)
@click.option("--yes", is_flag=True, help="Do not ask. A must where there is no terminal to ask on.")
def purge(*, arguments: tuple[str, ...], state: str | None, yes: bool) -> int:
    """Delete the messages that wait, or those in one state.

    Prints {"purged": N}. It asks first; when the answer is no, the exit code is 1.
    """
    url, (name,) = addressed(arguments, least=1, most=1)
    with broker_at(url) as broker:
        stats = broker.stats(name)
        if not yes and not _confirmed(f"Delete {_counted(stats, state)} of queue {name!r}?"):
            note("nothing was deleted")
            return 1
        print_lines([as_json({"purged": broker.purge(name, state=state)})])
    return 0


def _counted(stats: QueueStats, state: str | None) -> str:
    if state is not None:
        return f"{getattr(stats, state):,} {state} messages"
    return f"{stats.ready + stats.delayed + stats.blocked:,} waiting messages"


def _confirmed(question: str) -> bool:
    if not is_terminal(sys.stdin):
        raise usage("purge deletes for good, and there is no terminal to ask on: give --yes")
    return click.confirm(question, err=True)
