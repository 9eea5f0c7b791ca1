"""How the ledger is shown: what became of the claims, beside the engine's counters, and whether it balances."""

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from filao.sandbox.display import share_bar
from filao.sandbox.ledger import Double, Fault, Ledger, Share
from filao.sandbox.texts import Voice

SHOWN_MAX = 4  # of each kind of thing; the others are counted
BAR = 40  # columns of a share and its figure


def print_ledger(console: Console, say: Voice, ledger: Ledger, *, hunted: bool) -> None:
    """Print the ledger; `hunted` tells whether a worker was to be killed."""
    parts: list[RenderableType] = [
        Rule(Text(say("ledger"), style="bold"), align="left", style="dim"),
        Text(say("ledger_of", processes=len(ledger.shares) + 1), style="dim"),
        Text(),
        _sums(say, ledger),
        Text(),
        _shares(say, ledger.shares),
        Text(),
        *_notes(say, ledger, hunted=hunted),
        *_verdict(say, ledger),
    ]
    console.print(Padding(Group(*parts), (0, 1)))


def _sums(say: Voice, ledger: Ledger) -> RenderableType:
    """Set what became of the claims beside what the journals and the engine have counted."""
    ours = (
        ("row_sent", ledger.sent, ""),
        ("row_handled", ledger.handled, "green"),
        ("row_dead", len(ledger.dead), "yellow" if ledger.dead else ""),
        ("row_lost", len(ledger.lost), "bold red" if ledger.lost else "bold green"),
        ("row_doubles", len(ledger.doubles), "yellow" if ledger.doubles else ""),
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "left", "left", "right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_row("", "", " ", "", *(Text(say(head), style="dim") for head in ("journals", "engine")), "")
    for place, count in enumerate(ledger.counts):
        name, number, style = ours[place] if place < len(ours) else ("", 0, "")
        left = (say(name), Text(say.number(number), style=f"{style} bold")) if name else ("", "")
        mark = Text("=", style="green") if count.agrees else Text("≠", style="bold red")
        right = (say(f"count_{count.name}"), say.number(count.journals), say.number(count.engine))
        grid.add_row(*left, " ", *right, mark)
    return grid


def _shares(say: Voice, shares: Sequence[Share]) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "left", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for share in shares:
        killed = share.killed_at is not None
        grid.add_row(
            f"{say('col_worker')} {share.worker}",
            Text(say("pid", pid=share.pid), style="dim"),
            say.number(share.handled),
            share_bar(say, share.of_all, BAR, killed=killed),
            Text(f"✖ {say('killed_at')}" if killed else "", style="red"),
        )
    return grid


def _notes(say: Voice, ledger: Ledger, *, hunted: bool) -> Iterator[Text]:
    """Yield what happened on the way, each in a line."""
    lines = [*_takeovers(say, ledger, hunted=hunted)]
    lines += _some(say, [_double(say, double) for double in ledger.doubles])
    if ledger.doubles:
        lines.append(say("exactly_once"))
    letters = [
        say("dead_letter", claim=dead.claim, error=dead.error, reason=dead.reason, attempts=dead.attempts)
        for dead in ledger.dead
    ]
    lines += _some(say, letters)
    for line in lines:
        yield Text("· ", style="dim").append(line, style="none")
    if lines:
        yield Text()


def _takeovers(say: Voice, ledger: Ledger, *, hunted: bool) -> Iterator[str]:
    for killed in ledger.shares:
        if killed.killed_at is None:
            continue
        taken = sorted((one for one in ledger.takeovers if one.killed == killed.worker), key=lambda one: one.after)
        if len(taken) == 1:
            (one,) = taken
            about = {"killed": one.killed, "claim": one.claim, "worker": one.worker, "attempt": one.attempt}
            yield say("takeover", after=say.span(one.after), **about)
        elif taken:
            about = {"killed": killed.worker, "count": len(taken), "claim": taken[0].claim}
            yield say("takeovers", after=say.span(taken[-1].after), **about)
    if hunted and all(share.killed_at is None for share in ledger.shares):
        yield say("nobody_killed")


def _double(say: Voice, double: Double) -> str:
    return say(f"double_{double.cause}", claim=double.claim, first=double.first, second=double.second)


def _verdict(say: Voice, ledger: Ledger) -> Iterator[Text]:
    if ledger.balances:
        plain = ledger.handled + len(ledger.dead) == ledger.sent
        sums = {"sent": ledger.sent, "handled": ledger.handled, "dead": len(ledger.dead)}
        shown = {name: say.number(value) for name, value in sums.items()}
        yield Text("✔ " + say("balances" if plain else "balances_overlap", **shown), style="bold green")
        return
    yield Text("✖ " + say("does_not_balance"), style="bold red")
    for line in _some(say, [_fault(say, fault) for fault in ledger.faults]):
        yield Text(f"  · {line}", style="red")


def _fault(say: Voice, fault: Fault) -> str:
    values = dict(fault.values)
    if "count" in values:
        values["name"] = say(f"count_{values.pop('count')}")
    return say(fault.key, **values)


def _some(say: Voice, lines: list[str]) -> list[str]:
    """Return the first few lines, and how many more there are."""
    if len(lines) <= SHOWN_MAX + 1:
        return lines
    return [*lines[:SHOWN_MAX], say("more", count=say.number(len(lines) - SHOWN_MAX))]
