"""`filao stats` and `filao doctor`: tables on a terminal, JSON lines for everything else."""

import sys

import click
import msgspec

from filao.cli.shell import addressed, as_json, broker_at, declaring, file_of, is_terminal, note, print_lines, untold
from filao.cli.tables import age_text, draw
from filao.cli.top import watch
from filao.engine import Feature, Finding, QueueStats, State
from filao.errors import ConfigurationError, EngineError, EngineUnavailable

_json_option = click.option("--json", "wants_json", is_flag=True, help="JSON lines, also on a terminal.")
_COLUMNS = ("ready", "delayed", "blocked", "leased", "dead", "sent", "acked")
_WITHOUT_COUNTERS = {"ready": "ready", "held by this process": "leased", "dead": "dead"}
_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] [QUEUE]")
@_json_option
@click.option("--watch", "is_watched", is_flag=True, help="Again and again: see filao top.")
def stats(*, arguments: tuple[str, ...], wants_json: bool, is_watched: bool) -> int:
    """Count the messages of every queue, or of one.

    It costs the same at any depth.
    """
    url, names = addressed(arguments, least=0, most=1)
    if is_watched:
        return watch(url, names[0] if names else None, every=1.0)
    with broker_at(url, *names) as broker:
        found = [broker.stats(name) for name in names] or broker.stats()
        counts, not_told = Feature.COUNTERS in broker.features, untold(broker, "0 or empty")
    if not_told:
        note(not_told)
    if wants_json or not is_terminal(sys.stdout):
        print_lines(as_json(queue) for queue in found)
    elif names:
        draw(("queue", names[0]), _every_counter(found[0]) if counts else _known(found[0]), figures=True)
    elif counts:
        draw(("queue", *_COLUMNS, "oldest"), [_row(queue) for queue in found], figures=True)
    else:
        rows = [(queue.name, *(count for _, count in _known(queue))) for queue in found]
        draw(("queue", *_WITHOUT_COUNTERS), rows, figures=True)
    if not found:
        note(f"no queue is declared here. In a shell: {declaring(url)}")
    return 0 if found else 1


def _row(queue: QueueStats) -> tuple[str, ...]:
    name = f"{queue.name} (paused)" if queue.paused else queue.name
    return (name, *(f"{getattr(queue, column):,}" for column in _COLUMNS), age_text(queue.oldest_ready_age))


def _known(queue: QueueStats) -> list[tuple[str, str]]:
    return [(told, f"{getattr(queue, name):,}") for told, name in _WITHOUT_COUNTERS.items()]


def _every_counter(queue: QueueStats) -> list[tuple[str, str]]:
    counters = {name: n for name, n in msgspec.structs.asdict(queue).items() if type(n) is int}
    return [
        ("paused", "yes" if queue.paused else "no"),
        *((f"oldest {state}", age_text(queue.oldest_age(state))) for state in State),
        *((name, f"{n:,}") for name, n in counters.items()),
        *((f"dead: {reason}", f"{n:,}") for reason, n in queue.dead_by_reason.items()),
        *((f"{one.name} holds", f"{one.held:,}") for one in queue.receivers),
    ]


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL]")
@_json_option
def doctor(*, arguments: tuple[str, ...], wants_json: bool) -> int:
    """Examine the storage and say what an operator should know.

    Of a SQLite file it reads all. The exit code is 1 when there is an error; with notes and warnings it is 0.
    """
    url, _ = addressed(arguments, least=0, most=0)
    findings = _examined(url)
    if wants_json or not is_terminal(sys.stdout):
        print_lines(as_json(finding) for finding in findings)
    else:
        draw(
            ("level", "subject", "finding"),
            [(one.level, one.subject, one.text) for one in findings],
            figures=False,
            styles=_STYLES,
        )
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _examined(url: str) -> list[Finding]:
    """Examine the storage; if it cannot even be opened, that is the finding."""
    file = file_of(url)
    was_there = file is not None and file.exists()
    try:
        with broker_at(url) as broker:
            return broker.doctor()
    except (EngineError, ConfigurationError) as error:
        if file is not None and (not was_there or isinstance(error, EngineUnavailable)):
            raise
        return [Finding("opening", "error", str(error))]
