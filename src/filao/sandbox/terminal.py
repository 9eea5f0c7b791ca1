"""`filao sandbox --terminal`: the same room and the same steps, in a terminal or line by line from a pipe.

On a terminal each key is a command, and the screen always shows the room, shortened where it has few lines. From a
pipe each line is a command, and is answered by the room as it is then; `w` waits until the step is done or nothing
more can happen.
"""

import asyncio
import os
import signal
import sys
import termios
import textwrap
import time
import tty
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from filao.errors import FilaoError
from filao.languages import Language, fill
from filao.sandbox import scene
from filao.sandbox.customers import POLICIES
from filao.sandbox.exercise import CHECKS
from filao.sandbox.room import Room, RoomError
from filao.sandbox.steps import STEPS
from filao.sandbox.visits import Visit, own_folder
from filao.sandbox.words import lesson, program, translated, words

DRAW_EVERY = 0.2  # seconds
WAITED = 120.0  # seconds that `w` waits at most
PLAIN_WIDTH = 100  # columns where there is no terminal
DIGITS_MAX = 9  # of a consumer's number
CHIPS = 14  # claims that are shown of each place
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODE = "my_consumer.py"
LETTERS = "ABCDEF"  # of the policies, as on the page
LOCK = "\N{LOCK}"  # of a claim that waits for another of its policy


class Face:
    """Shows a visit on a terminal, and does what the learner types."""

    def __init__(self, visit: Visit, language: Language) -> None:
        self._visit = visit
        self._language: Language = language
        self._words = words(language)
        self.note: str = ""
        self.is_room_first: bool = False
        """Whether a terminal with few lines cuts off the lesson instead of the room."""

    def say(self, key: str, **values: object) -> str:
        """Return a text of the page."""
        return fill(self._language, str(self._words[key]), values)

    # --- what is seen ------------------------------------------------------------------------------------------------

    def drawn(self) -> RenderableType:
        """Return the room and the step as they stand."""
        shown = self._visit.shown(known=0, claim=0)
        parts: list[RenderableType] = [
            self._lesson(shown["lesson"]),
            self._stage(shown["stage"]),
            self._life(shown["life"]),
            self._timeline(shown["timeline"]),
            Wrapped(self.say("terminal_keys"), style="dim"),
        ]
        if shown["exercise"] is not None:
            parts.insert(1, self._checks(shown["exercise"]))
        if self.note:
            parts.append(Wrapped(self.note, style="bold red"))
        return Group(*parts)

    def fitted(self, console: Console) -> RenderableType:
        """Return all of it where the terminal has the lines for it, else what is needed now and the keys."""
        lines = console.render_lines(self.drawn(), pad=False)
        if len(lines) > console.height:
            shown = self._visit.shown(known=0, claim=0)
            told = [self._lesson(shown["lesson"], brief=True)]
            told += [] if shown["exercise"] is None else [self._checks(shown["exercise"])]
            room = [self._stage(shown["stage"], brief=True), self._timeline(shown["timeline"])]
            foot = Group(Wrapped(self.note, style="bold red"), Wrapped(self.say("terminal_brief"), style="dim"))
            keys = console.render_lines(foot, pad=False)[0 if self.note else 1 :]
            body = console.render_lines(Group(*(room + told if self.is_room_first else told + room)), pad=False)
            lines = [*body[: max(0, console.height - len(keys))], *keys]
        return SegmentLines(lines, new_lines=True)

    def _lesson(self, told: scene.Json, *, brief: bool = False) -> RenderableType:
        step = self._visit.step
        lines = self._briefly(told) if brief else self._wholly(told)
        text = lesson(self._language)[step.key]
        title = f"{told['current'] + 1}/{len(STEPS)} · {text['title']} · {len(told['done'])} ✓"
        return Panel(Wrapped("\n".join(lines)), title=escape(title), title_align="left")

    def _wholly(self, told: scene.Json) -> list[str]:
        predicting = [*self._predicting(told, lambda _: True)]
        return [self._text(told, "claim"), *predicting, self._doing(told), *self._seeing(told, lambda _: True)]

    def _briefly(self, told: scene.Json) -> list[str]:
        """Return of the step's text what is needed now."""
        step, is_done = self._visit.step, told["is_done"]
        chosen = told["chosen"].get(step.key)
        wanted = {chosen, step.answer} if is_done else {chosen} if chosen is not None else {0, 1, 2}
        lines = [] if told["ran"] else [self._text(told, "claim")]
        lines += [] if told["ran"] and chosen is None else self._predicting(told, lambda place: place in wanted)
        lines += [] if is_done or told["hint"] else [self._doing(told)]
        return lines + self._seeing(told, lambda key: not is_done or key in told["ready"])

    def _text(self, told: scene.Json, key: str) -> str:
        return self._filled(told, str(lesson(self._language)[self._visit.step.key][key]))

    def _filled(self, told: scene.Json, template: str) -> str:
        return fill(self._language, template, told["values"]).replace("`", "")

    def _predicting(self, told: scene.Json, shows: Callable[[int], bool]) -> list[str]:
        options = enumerate(lesson(self._language)[self._visit.step.key]["options"])
        shown = [f"   {'xyz'[place]}) {self._filled(told, option)}" for place, option in options if shows(place)]
        return [f"{self.say('predict')} · {self._text(told, 'question')}", *shown]

    def _doing(self, told: scene.Json) -> str:
        return f"{self.say('do')} · {self._text(told, 'do')}"

    def _seeing(self, told: scene.Json, offers: Callable[[str], bool]) -> list[str]:
        """Return what can be done, what is to be seen, what to do now, and why."""
        step, text, lines = self._visit.step, lesson(self._language)[self._visit.step.key], list[str]()
        for number, key in enumerate(step.acts, 1):
            if offers(key):
                ready = "" if key in told["ready"] else "  ·"
                lines.append(f"   [{number}] {self._filled(told, text['acts'][key])}{ready}")
        for key in () if step.key == "implement" else step.conditions:  # whose checks stand below it, with reasons
            lines.append(f"   {'✓' if key in told['met'] else '○'} {self._filled(told, text['conditions'][key])}")
        if told["trials"]:
            lines += self._trials(told["trials"])
        if told["hint"]:
            told_now = {"missed": text["missed"], "stranded": self.say("stranded")} | text.get("hints", {})
            lines.append(f"→ {self._filled(told, told_now[told['hint']])}")
        if told["is_done"]:
            lines.append(f"{self.say('why')} · {self._filled(told, text['why'])}")
        return lines

    def _trials(self, rows: list[scene.Json]) -> list[str]:
        """Return the trials as a table: a row for each guarantee, a column for each moment of the kill."""
        cells = [["", self.say("trial_before"), self.say("trial_after")]]
        cells += [[self.say(row["guarantee"]), *(self.say(f"trial_{times}") for times in row["times"])] for row in rows]
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        return ["   " + "".join(map(str.ljust, line, widths)).rstrip() for line in cells]

    def _named(self, key: str, value: object) -> str:
        return self.say("terminal_named", what=self.say(key), told=value)

    def _stage(self, stage: scene.Json, *, brief: bool = False) -> RenderableType:
        queue = stage["queue"]
        if queue is None:
            return Text(self.say("no_queue"))
        grouped = self._visit.room.setting.grouped
        grid = Table.grid(padding=(0, 2))
        grid.add_row(self.say("producer"), f"{stage['producer']['sent']}")
        grid.add_row(f"queue {queue['name']}", _chips(queue["waiting"], grouped=grouped) or "·")
        for key, claims in (("delayed", queue["late"]), ("dead_letters", queue["letters"])):
            if claims or not brief:
                grid.add_row(self.say(key), _chips(claims) or self.say("none"))
        for one in stage["consumers"]:
            name = self.say("guest") if one["guest"] else self.say("consumer_n", n=one["number"])
            held = "" if one["holds"] is None else f"[{_label(one['holds'], grouped=grouped)}] "
            grid.add_row(name, held + (self.say("over") if one["over"] else self.say(f"state_{one['state']}")))
        if stage["documents"] is not None:
            second = stage["documents"]
            letters = self._named("letters", second["count"])
            grid.add_row("queue documents", f"{_chips(second['waiting']) or '·'}   {letters}")
        grid.add_row(self.say("processed"), f"{stage['processed']}   {_chips(stage['done'], grouped=grouped)}")
        return Group(grid, Wrapped(self._sums(queue, brief=brief), style="green" if queue["holds"] else "red"))

    def _sums(self, queue: scene.Json, *, brief: bool) -> str:
        states = ("ready", "delayed", "leased", "acked", "dead", "removed")
        shown = [state for state in states if queue[state] or not brief] or ["ready"]
        terms = " + ".join(self.say(f"{state}_n", n=queue[state]) for state in shown)
        found = scene.books(self._visit.room)
        verdict = f"{self.say('lost_n', n=found['lost'])}, {self.say('doubled_n', n=found['doubled'])}"
        return f"{self.say('all_sent', n=queue['sent'])} = {terms} · {verdict}"

    def _life(self, life: scene.Json | None) -> RenderableType:
        now = -1 if life is None else life["stage"]
        line = Text()
        for place in range(6):
            style = "bold reverse" if place == now else "green" if place < now else "dim"
            line.append(f" {self.say(f'stage_{place}')} ", style=style).append(">")
        return line

    def _timeline(self, told: scene.Json) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for lane in [lane for lane in told["lanes"] if lane["bars"]][-6:]:
            bars = " ".join(self._bar(bar) for bar in lane["bars"][-CHIPS:])
            grid.add_row(self.say("consumer_n", n=lane["number"]), escape(bars))
        return grid

    def _bar(self, bar: scene.Json) -> str:
        marks = {
            "acked": "✓",
            "killed": "✖",
            "nacked": "↩",
            "dead": "†",
            "refused": "⊘",
            "failed": "✖",
            "released": "↩",
        }
        again = f"·{bar['attempt']}" if bar["attempt"] > 1 else ""
        return f"[{bar['claim']}{again}{marks.get(bar['how'], '…')}]"

    def _checks(self, told: scene.Json) -> RenderableType:
        conditions = lesson(self._language)["implement"]["conditions"]
        grid = Table.grid(padding=(0, 1))
        for check in told["checks"]:
            mark = {"open": "○", "running": "…", "green": "✓", "red": "✖"}[check["state"]]
            grid.add_row(mark, escape(conditions[check["key"]]), Wrapped(self._reason(check)))
        return Group(Wrapped(self.say("terminal_code")), grid)

    def _reason(self, check: scene.Json) -> str:
        """Return why a check is red or green; what Python said stands behind, where it was translated."""
        values = {name: value for name, value in check["values"].items() if name != "key"}
        error = str(values.get("error", ""))
        meaning = translated(self._language, error)
        told = self.say(f"told_{check['told']}", **(values | {"error": meaning or error})) if check["told"] else ""
        return f"{told} ({error})" if meaning else told

    # --- commands ----------------------------------------------------------------------------------------------------

    async def hear(self, command: str) -> bool:
        """Do what a line or a key asks for, or note why it cannot be done. Return False when the learner leaves."""
        self.note = ""
        try:
            return await self._do(command.strip())
        except RoomError as error:
            self.note = self.say(f"error_{error.key}", **error.values)
        except (FilaoError, OSError) as error:
            self.note = self.say("error_failed", why=str(error))
        return True

    def is_whole(self, command: str) -> bool:
        """Return whether keys are a whole command; a consumer's number may have more digits than were typed."""
        verb, typed = command[:1], command[1:]
        if verb not in ("k", "p", "r") or typed[-1:].isspace():
            return True
        numbers = [str(lane.number) for lane in self._visit.room.lanes.living()]
        return bool(typed) and not any(number.startswith(typed) and number != typed for number in numbers)

    async def _do(self, command: str) -> bool:
        visit, room = self._visit, self._visit.room
        verb, digits = command[:1], command[1:].strip()[:DIGITS_MAX]
        number = int(digits) if digits.isdecimal() else 0
        match verb:
            case "q":
                return False
            case "":
                await self._act(next((place for place in range(len(visit.step.acts)) if self._is_ready(place)), 0))
            case "n" | "b":
                visit.go(visit.progress.current + (1 if verb == "n" else -1))
            case "x" | "y" | "z":
                visit.progress.chosen[visit.step.key] = "xyz".index(verb)
                self.note = self.say("noted")
            case "k":
                room.kill(number)
            case "p":
                await room.pause(number)
            case "r":
                room.go_on(number)
            case "+":
                room.add_consumer()
            case "-" | "−":  # noqa: RUF001  # the sign that the page shows
                room.remove_consumer()
            case "v":
                self.is_room_first = not self.is_room_first
            case "s":
                await room.submit(room.customers.cases(1))
            case "c":
                await self._check()
            case "w":
                await self._wait()
            case _ if verb.isdecimal():
                await self._act(int(verb) - 1)
            case _:
                self.note = self.say("terminal_keys")
        return True

    def _is_ready(self, place: int) -> bool:
        return list(self._visit.step.acts.values())[place].ready(self._visit.facts())

    async def _act(self, place: int) -> None:
        keys = list(self._visit.step.acts)
        if 0 <= place < len(keys):
            await self._visit.act(keys[place])

    async def _check(self) -> None:
        """Check the learner's file; where there is none yet, write the skeleton there."""
        path = Path(CODE)
        if not path.exists():
            path.write_text(program("my_consumer", self._language), encoding="utf-8")
        self._visit.begin()
        await self._visit.room.exercise.start(path.read_text(encoding="utf-8", errors="replace"))

    async def _wait(self) -> None:
        """Wait until the step is done, waits for the learner, or cannot be done any more."""
        until = time.monotonic() + WAITED
        while time.monotonic() < until:
            await self._visit.seen()
            told = self._visit.shown(known=0, claim=0)["lesson"]
            exercise = self._visit.room.exercise
            states = {exercise.results[check].state for check in CHECKS}
            checked = self._visit.step.key == "implement" and not exercise.is_running and "open" not in states
            waits = told["hint"] and told["hint"] != "wait"
            if not told["busy"] and (told["is_done"] or waits or checked):
                return


def _chips(claims: list[scene.Json], *, grouped: bool = False) -> str:
    shown = " ".join(f"({_label(one, grouped=grouped)})" for one in claims[:CHIPS])
    return shown + (" …" if len(claims) > CHIPS else "")


def _label(one: scene.Json, *, grouped: bool) -> str:
    """Return a claim's number; with groups also its policy's letter, and a lock while it waits for another claim."""
    letter = LETTERS[POLICIES.index(one["policy"])] if grouped and one.get("policy") in POLICIES else ""
    return f"{one['claim']}{letter}{LOCK if one.get('locked') else ''}"


class Wrapped:
    """Text that is broken at ordinary spaces only, so that the « : » of French stays with the word before it."""

    def __init__(self, text: str, style: str = "") -> None:
        self._text = text
        self._style = style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._text.split("\n"):
            indent = " " * (len(line) - len(line.lstrip(" ")))
            folded = textwrap.wrap(
                line.strip(" "),
                options.max_width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
            yield Text("\n".join(folded), style=self._style)


# --- the terminal ----------------------------------------------------------------------------------------------------


def play(language: Language, speed: float) -> int:
    """Play the lesson until the learner leaves; return the exit code. No file and no process is left."""
    with own_folder() as folder:
        return asyncio.run(_play(folder, language, speed))


async def _play(folder: Path, language: Language, speed: float) -> int:
    signalled = _end_on_signals()
    room = folder / "room-1"
    room.mkdir(mode=0o700)
    visit = Visit(await Room(room, speed).__aenter__())
    visit.enter()
    try:
        await _converse(Face(visit, language))
    except asyncio.CancelledError:
        if not signalled:
            raise
    finally:
        await visit.close()
    sys.stderr.write(f"filao: {words(language)['terminal_ended']}\n")
    return 128 + signalled[0] if signalled else 0


async def _converse(face: Face) -> None:
    is_live = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    if not is_live:
        console.print(face.drawn())
        async for line in _typed(b"\n"):
            if not await face.hear(line):
                return
            console.print(face.drawn())
        return
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        drawing = asyncio.create_task(_redraw(console, live, face))
        try:
            command = ""
            async for key in _typed(b""):
                command += key
                if face.is_whole(command):
                    if not await face.hear(command):
                        return
                    command = ""
        finally:
            drawing.cancel()
            await asyncio.wait((drawing,))


async def _redraw(console: Console, live: Live, face: Face) -> None:
    while True:
        live.update(face.fitted(console), refresh=True)
        await asyncio.sleep(DRAW_EVERY)


async def _typed(end: bytes) -> AsyncGenerator[str]:
    """Yield what is typed: lines that end with `end`, or single keys."""
    read = bytearray()
    while True:
        await _readable()
        piece = os.read(0, 1 if not end else 4096)
        if not piece:
            return
        if not end:
            yield piece.decode(errors="replace")
            continue
        read += piece
        while end in read:
            line, _, rest = bytes(read).partition(end)
            read = bytearray(rest)
            yield line.decode(errors="replace")


async def _readable() -> None:
    """Wait until standard input can be read; a plain file always can."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(0, ready.set)
    except PermissionError:
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(0)


@contextmanager
def _keys() -> Generator[None]:
    """Let keys arrive one by one, and unseen."""
    before = termios.tcgetattr(0)
    tty.setcbreak(0)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def _end_on_signals() -> list[int]:
    """Let the first signal cancel this task; return the list that it is written into."""
    signalled: list[int] = []
    task = asyncio.current_task()
    assert task is not None

    def end(number: int) -> None:
        if not signalled:
            signalled.append(number)
            task.cancel()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    return signalled
