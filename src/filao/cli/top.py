"""`filao top`: the queues as they are now, again and again; into a pipe, plain lines.

On a terminal it draws on the other screen and gives the first one back, whatever ends it. What is drawn is a pure
function of what was read and of the view, which keys change.
"""

import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from shutil import get_terminal_size
from textwrap import wrap

import click

from filao.cli.shell import Number, addressed, broker_at, is_terminal, note, print_lines, read_anew, signals, untold
from filao.cli.tables import age_text
from filao.engine import QueueStats, State
from filao.errors import EngineError
from filao.printable import printable, some
from filao.urls import shown_url

_COLUMNS = 80  # of a line, where no terminal tells its width
_NAME_MOST = 60  # columns of a queue's name: with more, the figures would stand too far from it
_NAME_LEAST = 16  # that a narrow terminal leaves it
_FIGURES = {"ready": 7, "leased": 7, "later": 7, "dead": 7, "oldest": 7, "in/s": 6, "out/s": 5}
_DISPENSABLE = ("out/s", "in/s", "later", "leased", "oldest", "dead")
"""What a narrow terminal leaves out, in this order: half a figure would be another figure."""
_HELP: tuple[str, ...] = ("q quit", "s sort", "Enter look into", "up/down choose")
_ARROWS = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "in",
    b"\x1b[D": "out",
    b"\x1b": "out",
    b"\r": "in",
    b"\n": "in",
}
_LETTERS = {
    b"k": "up",
    b"j": "down",
    b"l": "in",
    b"h": "out",
    b"q": "quit",
    b"s": "sort",
    b"\x03": "quit",
    b"\x04": "quit",
}
_KEYS = _ARROWS | _LETTERS
_SORTS = ("age", "ready", "dead", "name")
_PRESSED = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_READ_MAX = 1_024  # bytes of keys that came at once
_ROWS = 8  # of a terminal: one with fewer shows nothing but the queues
_OTHER_SCREEN, _FIRST_SCREEN = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"


@dataclass(frozen=True, slots=True)
class View:
    """How the queues are shown, as the keys have set it."""

    sort: str = "age"
    chosen: str = ""
    """The queue under the cursor."""
    is_inside: bool = False
    """Whether only that queue is shown."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, and what changed since the last time, per second."""

    at: float
    queues: Sequence[QueueStats] = ()
    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Sent and acked, by queue."""
    trouble: str = ""
    untold: str = ""
    """A note on the figures that the engine does not have, which are shown as a dash; empty if it has all."""


@click.command()
@click.argument("arguments", nargs=-1, metavar="[URL] [QUEUE]")
@click.option("--every", type=Number(0.1, 3600), default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--times", type=click.IntRange(1), help="How many looks; without it until q or Ctrl-C.")
def top(*, arguments: tuple[str, ...], every: float, times: int | None) -> int:
    """Watch the queues: depth, age, rates, and who receives.

    \b
    Keys: up and down (or k, j) choose a queue; Enter looks into it, Esc goes
    back; s sorts by age, ready, dead or name; q ends it.

    Where stdout is no terminal it prints a plain line for each queue and look.
    """  # noqa: D301  # click's mark for a paragraph that is not wrapped is a real backspace
    url, names = addressed(arguments, least=0, most=1)
    return watch(url, names[0] if names else None, every=every, times=times)


def watch(url: str, queue: str | None, *, every: float, times: int | None = None) -> int:
    """Watch all queues, or one, until told to stop."""
    with broker_at(url, *([queue] if queue else [])) as broker:

        def look() -> Sequence[QueueStats]:
            return read_anew(broker, lambda: broker.stats() if queue is None else [broker.stats(queue)])

        first = Reading(time.monotonic(), look(), untold=untold(broker, "-"))
        is_screen = os.environ.get("TERM", "") not in ("", "dumb")  # one whose cursor can be moved
        if is_screen and is_terminal(sys.stdout) and is_terminal(sys.stdin):
            _on_terminal(
                look,
                first,
                View(chosen=queue or "", is_inside=queue is not None),
                shown_url(url),
                every=every,
                times=times,
            )
        else:
            _in_lines(look, first, every, times)
    return 0


def read_again(look: Callable[[], Sequence[QueueStats]], before: Reading) -> Reading:
    """Look again; while the store is away, return the last reading with its error."""
    now = time.monotonic()
    try:
        queues = look()
    except EngineError as error:
        return replace(before, trouble=str(error))
    was, past = {one.name: one for one in before.queues}, max(now - before.at, 0.001)
    rates = {  # totals begin anew where a queue was deleted and declared again: that is no rate
        one.name: (max(0.0, (one.sent - was[one.name].sent) / past), max(0.0, (one.acked - was[one.name].acked) / past))
        for one in queues
        if one.name in was
    }
    return Reading(now, queues, rates, untold=before.untold)


def _in_lines(look: Callable[[], Sequence[QueueStats]], reading: Reading, every: float, times: int | None) -> None:
    print_lines([heading().encode()])
    if reading.untold:
        note(reading.untold)
    done, told = 0, ""
    while True:
        lines = [line(one, reading) for one in sorted_by(reading.queues, "age")]
        if reading.trouble != told:
            told = reading.trouble
            note(printable(told) or "the store can be read again")
        if not reading.trouble:  # older figures are not printed again as if they were new
            print_lines([_encoded(text) for text in lines or ["no queue is declared"]])
        done += 1
        if done == times:
            return
        time.sleep(every)
        reading = read_again(look, reading)


def _on_terminal(
    look: Callable[[], Sequence[QueueStats]], first: Reading, view: View, title: str, *, every: float, times: int | None
) -> None:
    reading, done, until = first, 0, time.monotonic() + every
    with _other_screen(), signals() as signalled:
        while True:
            size = get_terminal_size()
            _draw(screen(reading, view, title, columns=size.columns, rows=size.lines))
            keys = _keys(signalled, max(0.0, until - time.monotonic()))
            for key in keys or ():
                if key == "quit":
                    return
                view = moved(view, key, reading)
            if keys is not None:
                continue
            done += 1
            if done == times:
                return
            reading, until = read_again(look, reading), time.monotonic() + every


def _draw(lines: Sequence[str]) -> None:
    """Overwrite the screen without clearing it first, so that nothing flickers."""
    os.write(1, b"\x1b[H" + b"\r\n".join(_encoded(text) + b"\x1b[K" for text in lines) + b"\x1b[J")


def _encoded(text: str) -> bytes:
    """Return a text in the terminal's encoding, with a sign for each that it lacks, so that columns stay columns."""
    return text.encode(sys.stdout.encoding, errors="replace")


@contextmanager
def _other_screen() -> Generator[None]:
    """Use the other screen, and give the first one back while Ctrl-Z stops this process."""
    before = termios.tcgetattr(0)

    def take() -> None:
        tty.setcbreak(0)
        os.write(1, _OTHER_SCREEN)

    def give_back() -> None:
        os.write(1, _FIRST_SCREEN)
        termios.tcsetattr(0, termios.TCSADRAIN, before)

    def stop(_number: int, _frame: object) -> None:
        give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        take()  # the shell let it go on

    def resized(_number: int, _frame: object) -> None:
        """Do nothing but end the wait for a key, so that the new size is drawn at once."""

    handlers = {signal.SIGTSTP: stop, signal.SIGWINCH: resized}
    were = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        take()
        yield
    finally:
        for number, was in were.items():
            signal.signal(number, was)
        give_back()


def _keys(signalled: int, seconds: float) -> list[str] | None:
    """Return what the next keys mean: an empty list after a signal, None when neither came in time."""
    ready = select.select([0, signalled], [], [], seconds)[0]
    if signalled in ready:
        os.read(signalled, _READ_MAX)
    if 0 not in ready:
        return [] if ready else None
    pressed = os.read(0, _READ_MAX)
    return keys_of(pressed) if pressed else ["quit"]


# --- what is shown, as pure functions --------------------------------------------------------------------------------


def keys_of(pressed: bytes) -> list[str]:
    """Return what each key means; several come at once when one is held down, or over a slow line."""
    return [_KEYS.get(one.replace(b"\x1bO", b"\x1b["), "other") for one in _PRESSED.findall(pressed)]


def moved(view: View, key: str, reading: Reading) -> View:
    """Return the view after a key."""
    names = [one.name for one in sorted_by(reading.queues, view.sort)]
    at = names.index(view.chosen) if view.chosen in names else 0
    match key:
        case "up" | "down" if names and not view.is_inside:
            return replace(view, chosen=names[max(0, min(len(names) - 1, at + (1 if key == "down" else -1)))])
        case "in" if names:
            return replace(view, chosen=names[at], is_inside=True)
        case "out":
            return replace(view, is_inside=False)
        case "sort":
            return replace(view, sort=_SORTS[(_SORTS.index(view.sort) + 1) % len(_SORTS)])
        case _:
            return view


def sorted_by(queues: Sequence[QueueStats], sort: str) -> list[QueueStats]:
    """Return the queues, with those first that need attention."""

    def figure(one: QueueStats) -> float:
        match sort:
            case "age":
                return one.oldest_ready_age or 0.0
            case "ready":
                return one.ready
            case "dead":
                return one.dead
            case _:
                return 0.0

    return sorted(queues, key=lambda one: (-figure(one), one.name))


def heading(columns: int = _COLUMNS) -> str:
    """Return the names of the columns as a line."""
    return _laid_out("queue", {name: name for name in _FIGURES}, columns)


def line(queue: QueueStats, reading: Reading, columns: int = _COLUMNS) -> str:
    """Return a queue as a line; `later` counts delayed and blocked messages."""
    name = printable(f"{queue.name} (paused)" if queue.paused else queue.name)
    rate_in, rate_out = (short(rate) for rate in reading.rates[queue.name]) if queue.name in reading.rates else "--"
    leased, later = short(queue.leased), short(queue.delayed + queue.blocked)
    if reading.untold:
        leased = later = rate_in = rate_out = "-"
    figures = (
        short(queue.ready),
        leased,
        later,
        short(queue.dead),
        age_text(queue.oldest_ready_age, digits=0),
        rate_in,
        rate_out,
    )
    return _laid_out(name, dict(zip(_FIGURES, figures, strict=True)), columns)


def _laid_out(name: str, figures: Mapping[str, str], columns: int) -> str:
    """Return a name and as many whole figures as a line has room for."""
    widths = dict(_FIGURES)
    for dispensable in _DISPENSABLE:
        if columns - sum(widths.values()) - len(widths) >= _NAME_LEAST:
            break
        del widths[dispensable]
    room = max(1, min(_NAME_MOST, columns - sum(widths.values()) - len(widths)))
    name = name if len(name) <= room else name[: room - 1] + "…"
    return " ".join([f"{name:<{room}}", *(f"{figures[one]:>{width}}" for one, width in widths.items())])[:columns]


def screen(reading: Reading, view: View, title: str, *, columns: int, rows: int) -> list[str]:
    """Return the lines that fit on the terminal, with the chosen queue in reverse."""
    queues = sorted_by(reading.queues, view.sort)
    inside = next((one for one in queues if one.name == view.chosen), None) if view.is_inside else None
    trouble, below = printable(reading.trouble), 2 if rows >= _ROWS else 0
    about = inside.name if inside else f"{some(len(queues), 'queue')}, by {view.sort}"
    told = [f"filao top  {printable(title)}", trouble or printable(about), ""]
    if not below:
        told = [trouble] if trouble else []
    elif reading.untold and inside is None:
        told[2:2] = wrap(reading.untold, columns)
    if inside is not None:
        told += [heading(columns), line(inside, reading, columns), "", *_told(inside, reading, columns)]
        keys: tuple[str, ...] = ("q quit", "Esc back")
    else:
        at = next((place for place, one in enumerate(queues) if one.name == view.chosen), 0)
        room = max(1, rows - len(told) - 1 - below)
        first = max(0, min(at - room // 2, len(queues) - room))
        told.append(heading(columns))
        cut = [line(one, reading, columns) for one in queues[first : first + room]]
        told += [f"\x1b[7m{text}\x1b[27m" if first + place == at else text for place, text in enumerate(cut)]
        keys = _HELP
    told = [text if text.startswith("\x1b") else text[:columns] for text in told[: max(1, rows - below)]]
    fitting = [one for place, one in enumerate(keys) if len("  ".join(keys[: place + 1])) <= columns]
    return [*told, "", "  ".join(fitting)] if below else told


def _told(queue: QueueStats, reading: Reading, columns: int) -> list[str]:
    """Return all that is known of one queue."""
    if reading.untold:
        return [f"{'ready':<9}{queue.ready:>12,}", f"{'dead':<9}{queue.dead:>12,}", "", *wrap(reading.untold, columns)]
    lines = [
        f"{state:<9}{getattr(queue, state):>12,}   oldest {age_text(queue.oldest_age(state), digits=0)}"
        for state in State
    ]
    totals = ("sent", "received", "acked", "nacked", "lost")
    lines += ["", "  ".join(f"{name} {getattr(queue, name):,}" for name in totals)]
    lines += ["", *(f"dead: {printable(reason)}  {count:,}" for reason, count in queue.dead_by_reason.items())]
    for one in queue.receivers:
        worker = f"; its worker is {printable(one.worker)}" if one.worker else ""
        lines.append(f"{printable(one.name)} holds {one.held:,}, since {one.since:%Y-%m-%d %H:%M}{worker}")
    return lines if queue.receivers else [*lines, "nobody receives"]


def short(number: float) -> str:
    """Return a number in six characters at most."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.{0 if unit == 'k' else 1}f}{unit}"
    return f"{number:.0f}"
