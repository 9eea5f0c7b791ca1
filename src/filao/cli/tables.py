"""Tables, ages and whole messages on a terminal; text from others is never read as markup."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import click
import msgspec

from filao.engine import State, StoredMessage
from filao.overview import raised_line
from filao.printable import printable

SHOWN_MAX = 200  # characters of a body or an error in a table
FOLDED_LEAST = 8  # columns of a text that may be broken, on a narrow terminal
_EDGES, _GAP = 2, 2  # columns left and right of a table, and between two of its own


def draw(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    figures: bool,
    keeps: int = 0,
    styles: Mapping[str, str] | None = None,
) -> None:
    """Draw a table on the terminal.

    `figures`: all columns but the first hold numbers, which are aligned to the right and never broken. Nor are the
    first `keeps` columns. Where they do not fit, the terminal breaks the lines: half a figure would be another figure.

    `styles` are those of words in the first column. Text from others is never read as markup.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, least = Table(box=SIMPLE, pad_edge=False, collapse_padding=True), _EDGES
    console = Console()
    texts = [[Text(_written(cell, console.encoding)) for cell in row] for row in (head, *rows)]
    for number, column in enumerate(zip(*texts, strict=True)):
        figure = figures and number > 0
        whole = figure or number < keeps
        table.add_column(column[0], justify="right" if figure else "left", no_wrap=whole, overflow="fold")
        width = max(text.cell_len for text in column)
        least += _GAP + (width if whole else min(width, FOLDED_LEAST))
    for cells in texts[1:]:
        cells[0].stylize((styles or {}).get(cells[0].plain, "none"))
        table.add_row(*cells)
    console.width = max(console.width, least)
    console.print(table)


def _written(text: str, encoding: str) -> str:
    """Return a text as the terminal shows it, whose signs may be fewer: what is escaped has its width beforehand."""
    return printable(text).encode(encoding, errors="backslashreplace").decode(encoding)


def draw_stored(messages: Sequence[StoredMessage], state: State, now: datetime) -> None:
    """Draw messages of one state, one to a row; `now` is the store's time."""
    if state is State.DEAD:
        draw(
            ("id", "dead for", "attempts", "reason", "last error"),
            [
                (one.id, _since(one.at, now), str(one.attempts), one.reason or "", raised_line(one.error)[:SHOWN_MAX])
                for one in messages
            ],
            figures=False,
            keeps=1,
        )
        return
    held = state is State.LEASED
    draw(
        ("id", "sent", "attempts", "group", "held by" if held else "body"),
        [
            (
                *(one.id, _since(one.sent_at, now), str(one.attempts), one.group or ""),
                one.consumer if held else _body(one)[:SHOWN_MAX],
            )
            for one in messages
        ],
        figures=False,
        keeps=1,
    )


def tell(message: StoredMessage, now: datetime) -> None:
    """Print everything that is known of one message; `now` is the store's time."""
    for line in _story(message, now):
        click.echo(line)


def _story(message: StoredMessage, now: datetime) -> Iterator[str]:
    facts = {
        "id": message.id,
        "queue": f"{message.queue} ({message.state.value})",
        "reason": message.reason,
        "sent": f"{message.sent_at:%Y-%m-%d %H:%M:%S %Z}, {_since(message.sent_at, now)} ago",
        _AT[message.state]: f"{message.at:%Y-%m-%d %H:%M:%S %Z}",
        "expires": message.expires_at and f"{message.expires_at:%Y-%m-%d %H:%M:%S %Z}",
        "held by": message.consumer,
        "attempts": str(message.attempts),
        "priority": str(message.priority),
        "group": message.group,
        "dedup_key": message.dedup_key,
    }
    facts |= {f"header {name}": value for name, value in message.headers.items()}
    for name, value in facts.items():
        if value:
            yield f"{printable(name):<12} {printable(value)}"
    yield f"{'body':<12} {_body(message)}"
    for failure in message.history:
        yield ""
        yield printable(
            f"attempt {failure.attempt}, {failure.at:%Y-%m-%d %H:%M:%S %Z}: {failure.outcome}, by "
            f"{failure.consumer or 'nobody known'}"
        )
        for line in failure.error.splitlines():
            yield f"  {printable(line)}"


_AT = {
    State.READY: "ready since",
    State.DELAYED: "due",
    State.BLOCKED: "blocked since",
    State.LEASED: "lease ends",
    State.DEAD: "died",
}


def _body(message: StoredMessage) -> str:
    body = message.body
    return printable(
        f"{len(body):,} bytes: {body!r}" if isinstance(body, bytes) else msgspec.json.encode(body).decode()
    )


def _since(at: datetime, now: datetime) -> str:
    return age_text(max((now - at).total_seconds(), 0.0))


def age_text(seconds: float | None, *, digits: int = 1) -> str:
    """Return an age in the largest unit it fills; `digits` behind the point, of seconds always one."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.1f} s"
