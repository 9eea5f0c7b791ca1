"""How the board is shown: live on a terminal, ten times in a second; as plain lines everywhere else."""

from types import TracebackType
from typing import Self

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from filao.sandbox.board import Board, Event, WorkerView
from filao.sandbox.texts import Voice

LINES_EVERY = 2.0  # seconds between two lines of progress where there is no terminal
EVENTS_LEAST = 3  # that are shown on however small a terminal
WIDE = 92  # columns from which on there is room for longer bars
SPARK_FROM, SPARK_MAX = 88, 40  # columns that all else may need, and of the queue's course at most
SHARE_WIDE, SHARE_NARROW = 20, 14  # columns of a share and its figure

_SPARKS = "▁▂▃▄▅▆▇█"
COUNTS = ("sent", "count")  # what events tell as numbers; other numbers are names, such as a claim's
STATE_STYLES = {
    "starting": "dim",
    "waiting": "dim",
    "evaluating": "green",
    "killed": "bold red",
    "ended": "dim",
}
EVENT_STYLES = {
    "killed_one": "bold red",
    "killed_many": "bold red",
    "took_over": "bold green",
    "all_taken_over": "bold green",
    "died": "yellow",
    "refused": "yellow",
    "handled_again": "yellow",
}


def event_text(say: Voice, event: Event) -> str:
    """Return the line that tells of an event."""
    shown: dict[str, str | int] = {}
    for name, value in event.values.items():
        if isinstance(value, float):
            shown[name] = say.span(value)
        else:
            shown[name] = say.number(value) if name in COUNTS and isinstance(value, int) else value
    return say(event.key, **shown)


# --- on a terminal ---------------------------------------------------------------------------------------------------


class LiveDisplay:
    """A board that is drawn over itself, and leaves the terminal as it was."""

    def __init__(self, console: Console, say: Voice, told: str) -> None:
        self._console = console
        self._say = say
        self._told = told
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, board: Board) -> None:
        """Draw it."""
        self._live.update(self.draw(board), refresh=True)

    def draw(self, board: Board) -> RenderableType:
        """Return the whole picture, as high as the terminal."""
        rows = 11 + len(board.workers)  # all but the events
        room = max(EVENTS_LEAST, self._console.height - rows - 1)
        parts = (
            self._head(board),
            Text(self._told, style="dim", no_wrap=True, overflow="ellipsis"),
            Text(),
            self._flow(board),
            Text(),
            self._workers(board),
            Rule(Text(self._say("events"), style="dim"), align="left", style="dim"),
            *self._events(board, room),
        )
        return Padding(Group(*parts), (0, 1))

    def _head(self, board: Board) -> RenderableType:
        say = self._say
        head = Table.grid(expand=True)
        head.add_column(no_wrap=True)
        head.add_column(justify="right", no_wrap=True)
        seconds = say.number(max(0.0, board.now - board.began), 1)
        head.add_row(Text(say("title"), style="bold"), Text(say("clock", seconds=seconds), style="bold"))
        return head

    def _flow(self, board: Board) -> RenderableType:
        """Draw the way of the claims: sent, waiting, handled."""
        say = self._say
        total = max(1, len(board.claims))
        sent_rate, handled_rate = board.rates()
        flow = Table.grid(expand=True, padding=(0, 2, 0, 0))
        flow.add_column(no_wrap=True, min_width=8)
        flow.add_column(ratio=1, no_wrap=True)
        flow.add_column(justify="right", no_wrap=True, min_width=17)
        flow.add_column(justify="right", no_wrap=True, min_width=7)
        flow.add_row(
            Text(say("portal"), style="cyan"),
            ProgressBar(total, board.sent, complete_style="cyan", finished_style="cyan"),
            say("of", some=say.number(board.sent), all=say.number(total)),
            self._rate(sent_rate),
        )
        flow.add_row(Text(say("queue"), style="yellow"), self._depth(board), Text(self._oldest(board), style="dim"), "")
        flow.add_row(
            Text(say("done"), style="green"),
            ProgressBar(total, board.handled, complete_style="green", finished_style="green"),
            say("of", some=say.number(board.handled), all=say.number(total)),
            self._rate(handled_rate),
        )
        return flow

    def _rate(self, rate: float) -> Text:
        return Text(self._say("rate", rate=self._say.number(rate, 0 if rate >= 100 else 1)), style="dim")

    def _depth(self, board: Board) -> Text:
        """Draw what is in the queue, and how deep it has been."""
        stats = board.stats
        shown = Text(no_wrap=True, overflow="crop")
        if stats is None:
            return shown
        parts = (("ready", stats.ready), ("leased", stats.leased), ("delayed", stats.delayed), ("dead", stats.dead))
        for key, count in parts:
            style = "red" if key == "dead" and count else "bold" if count else "dim"
            shown.append(f"{self._say(key)} ", style="dim").append(f"{self._say.number(count):<4} ", style=style)
        room = min(SPARK_MAX, self._console.width - SPARK_FROM)
        return shown.append(_spark(list(board.depths), room) if room > 0 else "", style="yellow")

    def _oldest(self, board: Board) -> str:
        age = board.stats.oldest_ready_age if board.stats else None
        return f"{self._say('oldest')} {'-' if age is None else self._say.span(age)}"

    def _workers(self, board: Board) -> RenderableType:
        say = self._say
        table = Table(
            box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", collapse_padding=True
        )
        table.add_column(say("col_worker"), no_wrap=True)
        table.add_column(say("col_pid"), no_wrap=True)
        table.add_column(say("col_state"), no_wrap=True, min_width=10)
        table.add_column(say("col_claim"), no_wrap=True, ratio=1, overflow="ellipsis")
        table.add_column(say("col_attempt"), justify="right", no_wrap=True)
        table.add_column(say("col_handled"), justify="right", no_wrap=True)
        table.add_column(say("col_share"), no_wrap=True, width=self._share_width())
        total = max(1, sum(worker.handled for worker in board.workers.values()))
        for worker in board.workers.values():
            table.add_row(*self._worker(board, worker, worker.handled / total))
        return Padding(table, (0, 0, 1, 0))

    def _worker(self, board: Board, worker: WorkerView, share: float) -> tuple[RenderableType, ...]:
        say = self._say
        newest = next(reversed(worker.in_hand.values()), None)
        style = STATE_STYLES[worker.state]
        return (
            Text(str(worker.number), style="bold"),
            Text(str(worker.pid), style="dim"),
            Text(("✖ " if worker.state == "killed" else "● ") + say(worker.state), style=style),
            Text() if newest is None else self._claim(board, newest.claim, len(worker.in_hand) - 1),
            Text(
                "" if newest is None else str(newest.attempt),
                style="bold yellow" if newest and newest.attempt > 1 else "",
            ),
            say.number(worker.handled),
            share_bar(say, share, self._share_width(), killed=worker.state == "killed"),
        )

    def _claim(self, board: Board, number: int, more: int) -> Text:
        say = self._say
        claim = board.claims[number]
        what = say(claim.kind) if claim.kind else say("policy", policy=claim.policy)
        shown = Text(no_wrap=True, overflow="ellipsis").append(f"{number} ", style="bold")
        if more:
            shown.append(f"{say('and_more', count=more)} ", style="dim")
        return shown.append(" · ".join(filter(None, (what, say.euros(claim.amount), claim.town))))

    def _share_width(self) -> int:
        return SHARE_WIDE if self._console.width >= WIDE else SHARE_NARROW

    def _events(self, board: Board, room: int) -> list[Text]:
        lines: list[Text] = []
        for event in list(board.events)[-room:]:
            at = self._say.number(max(0.0, event.at - board.began), 1)
            line = Text(no_wrap=True, overflow="ellipsis").append(f"{at:>5}  ", style="dim")
            lines.append(line.append(event_text(self._say, event), style=EVENT_STYLES.get(event.key, "")))
        return lines


def share_bar(say: Voice, share: float, width: int, *, killed: bool) -> RenderableType:
    """Draw a share of all, with its figure."""
    drawn = Table.grid(padding=(0, 1, 0, 0))
    drawn.add_column(width=width - 9)
    drawn.add_column(justify="right", width=7)
    drawn.add_row(Bar(1, 0, min(1.0, share), color="red" if killed else "green"), say.percent(share))
    return drawn


def _spark(depths: list[int], width: int) -> str:
    """Draw a number's course in one line, each mark the highest of its time."""
    if not depths:
        return ""
    size = -(-len(depths) // width)
    peaks = [max(depths[start : start + size]) for start in range(0, len(depths), size)]
    highest = max(*peaks, 8)
    return "".join(_SPARKS[peak * (len(_SPARKS) - 1) // highest] for peak in peaks)


# --- anywhere else ---------------------------------------------------------------------------------------------------


class PlainDisplay:
    """Lines that can be kept: every event, and the state of things now and then."""

    def __init__(self, console: Console, say: Voice, told: str) -> None:
        self._console = console
        self._say = say
        self._told = told
        self._shown = 0
        self._next = 0.0

    def __enter__(self) -> Self:
        self._print(f"{self._say('title')}\n{self._told}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, board: Board) -> None:
        """Print what is new."""
        new = min(board.told - self._shown, len(board.events))
        for event in list(board.events)[len(board.events) - new :]:
            self._line(event.at - board.began, event_text(self._say, event))
        self._shown = board.told
        if board.now >= self._next and board.stats is not None:
            self._next = board.now + LINES_EVERY
            self._line(board.now - board.began, self._progress(board))

    def _progress(self, board: Board) -> str:
        say = self._say
        assert board.stats is not None
        return say(
            "progress",
            sent=say.number(board.sent),
            all=say.number(len(board.claims)),
            ready=say.number(board.stats.ready),
            leased=say.number(board.stats.leased),
            delayed=say.number(board.stats.delayed),
            dead=say.number(board.stats.dead),
            handled=say.number(board.handled),
            rate=say.number(board.rates()[1], 1),
        )

    def _line(self, at: float, text: str) -> None:
        self._print(f"{self._say.number(max(0.0, at), 1):>5}  {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()
