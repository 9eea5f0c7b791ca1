"""Tables, ages and whole messages on a terminal; text from others is never read as markup."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import click
import msgspec

from filao.engine import State, StoredMessage
from filao.printable import printable

SHOWN_MAX = 200  # characters of a body or an error in a table


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
    first `keeps` columns.

    `styles` are those of words in the first column. Text from others is never read as markup.
    """
    import rich
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(head):
        figure = figures and number > 0
        table.add_column(
            Text(printable(name)),
            justify="right" if figure else "left",
            no_wrap=figure or number < keeps,
            overflow="fold",
        )
    for row in rows:
        cells = [Text(printable(cell)) for cell in row]
        cells[0].stylize((styles or {}).get(row[0], "none"))
        table.add_row(*cells)
    rich.print(table)


def draw_stored(messages: Sequence[StoredMessage], state: State) -> None:
    """Draw messages of one state, one to a row."""
    now = datetime.now(UTC)
    if state is State.DEAD:
        draw(
            ("id", "dead for", "attempts", "reason", "last error"),
            [
                (one.id, _since(one.at, now), str(one.attempts), one.reason or "", _last_line(one.error))
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


def tell(message: StoredMessage) -> None:
    """Print everything that is known of one message."""
    for line in _story(message):
        click.echo(line)


def _story(message: StoredMessage) -> Iterator[str]:
    now = datetime.now(UTC)
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


def _last_line(error: str) -> str:
    return error.strip().rpartition("\n")[2][:SHOWN_MAX]


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
