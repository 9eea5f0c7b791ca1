"""The page: the lesson beside the stage, the timeline under it, and whatever the learner can set.

It draws scenes and passes on what the learner does. What cannot be done is said in a note, and nothing else happens.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (NiceGUI leaves some of its types open)

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.events import GenericEventArguments

from filao.engine import State, StoredMessage
from filao.errors import FilaoError
from filao.sandbox.claims import BadClaimsError, from_csv
from filao.sandbox.texts import Language
from filao.sandbox.web import scene
from filao.sandbox.web.charts import Charts
from filao.sandbox.web.lanes import GUESTS_FROM, Event, Lease
from filao.sandbox.web.lesson import STEPS
from filao.sandbox.web.orders import GUARANTEES, Claim, number_in
from filao.sandbox.web.room import KINDS, MOMENTS, POLICIES, SUBMITTED_MAX, RoomError
from filao.sandbox.web.visits import Visit
from filao.sandbox.web.widgets import (
    Books,
    Field,
    LessonPanel,
    Stage,
    Text,
    Timeline,
    area,
    button,
    check,
    number,
    select,
)
from filao.sandbox.web.words import lesson, program, words

DRAW_EVERY = 0.13  # seconds
BURST = 100
SLOW = 3.0  # times as long as others needs a worker that is slow
SPEEDS = ("0.5", "1", "2", "4")
FILE_MAX = 500_000  # bytes of a CSV file: what a web socket carries in one message
EVENTS = 60  # that the page lists
TOLD_ALOUD = ("took_over", "refused", "killed", "killed_holding", "crashed", "crashed_holding", "portal_died")
KEPT = "filao-lesson"  # where the browser keeps the progress
LOST = """
  const lost = document.getElementById("popup");
  lost.setAttribute("role", "alert");
  lost.querySelector("span").textContent = {text};
  lost.querySelectorAll("span")[1].textContent = "";
"""
TABS = ("rules", "ledger", "dead_letters", "charts", "events", "own_worker")
BOUNDS: Mapping[str, tuple[float, float]] = {
    "lease": (1, 60),
    "max_attempts": (1, 10),
    "backoff": (0, 30),
    "work": (0.05, 60),
}

READ_FILE = f"""(event) => {{
  const file = event.target.files[0];
  event.target.value = "";
  if (!file) return;
  if (file.size > {FILE_MAX}) return emit({{ name: file.name, size: file.size, content: null }});
  const reader = new FileReader();
  reader.onload = () => emit({{ name: file.name, size: file.size, content: reader.result }});
  reader.readAsDataURL(file);
}}"""


class Page:
    """One open page of a visit."""

    def __init__(self, visit: Visit, language: Language) -> None:
        self._visit = visit
        self._room = visit.room
        self._language: Language = language
        self._say = words(language)
        self._lesson = lesson(language)
        self._focus: Lease | None = None
        self._busy = False
        self._tab = "rules"
        self._sections: dict[str, ui.element] = {}
        self._tabs: dict[str, Text] = {}
        self._fields: dict[str, Field] = {}
        self._dead: tuple[str, ...] | None = None
        self._told = self._spoken = 0
        self._saved = ""

    # --- building ----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Place everything."""
        say = self._say
        Text("a", say["skip"]).classes("skip").props["href"] = "#stage"
        self._build_top()
        with ui.element("div").classes("columns"):
            with ui.element("aside").props(f'aria-label="{say["lesson"]}"'):
                self._steps = LessonPanel(say, self._lesson_scene())
                self._steps.on("predict", lambda event: self._predict(event.args))
                self._steps.on("go", lambda event: self._go(event.args))
                self._steps.on("act", self._act_of_step)
            with ui.element("div").classes("main").props("id=stage tabindex=-1"):
                self._banner = Text("div", "").classes("banner").props("role=alert")
                self._build_portal()
                self._sums = Books(say, self._books_scene(), whole=False)
                self._sums.on("follow", lambda event: self._follow(event.args))
                self._stage = Stage(say, scene.stage(self._room))
                self._stage.on("act", self._act_of_stage)
                self._timeline = Timeline(say, scene.timeline(self._room, None))
                self._timeline.on("live", lambda _: self._unfollow())
                self._build_tabs()
        self._aloud = Text("div", "").classes("sr-only").props("role=status aria-live=polite")
        ui.timer(DRAW_EVERY, self._draw)
        self._draw()

    def _build_top(self) -> None:
        say, other = self._say, "fr" if self._language == "en" else "en"
        with ui.element("header").classes("top"):
            with ui.element("div").classes("grow"):
                Text("h1", say["title"])
                Text("p", say["subtitle"]).classes("quiet")
            speeds = {speed: f"{speed} x" for speed in SPEEDS}
            speed = f"{self._room.setting.speed:g}"
            self._fields["speed"] = select(say["speed"], speeds, speed, lambda value: self._set(speed=float(value)))
            self._freezing = button(say["freeze"], self._freeze)
            dark = ui.dark_mode(None)
            button(say["theme"], partial(_toggle, dark))
            Text("a", say["other_language"]).props(f"href=/{other} hreflang={other} lang={other}")

    def _build_portal(self) -> None:
        """Place what customers can do."""
        say = self._say
        with ui.element("form").classes("row-of box").props(f'aria-label="{say["submit"]}"').on("submit.prevent"):
            policies = {str(policy): str(policy) for policy in POLICIES}
            policy = select(say["policy"], policies, str(POLICIES[0]))
            kind = select(say["kind"], {kind: say[f"kind_{kind}"] for kind in KINDS}, KINDS[0])
            euros = number(say["euros"], 1200, (1, 1_000_000))
            button(say["submit_one"], lambda: self._try(self._submit_one(policy, kind, euros)), kind="plain strong")
            button(say["burst"], lambda: self._try(self._submit(self._room.next_claims, BURST)))
            button(say["poison"], lambda: self._try(self._submit(lambda _: [self._room.next_claim(policy=0)], 1)))
            with ui.element("label").classes("file").props(f'title="{say["csv_hint"]}"'):
                Text("span", say["csv"])
                file = ui.element("input").classes("sr-only").props('type=file accept=".csv,text/csv"')
                file.on("change", lambda event: self._try(self._submit_file(event.args)), js_handler=READ_FILE)

    def _build_tabs(self) -> None:
        say = self._say
        with ui.element("div").classes("box"):
            with ui.element("div").classes("tab-list"):
                for tab in TABS:
                    self._tabs[tab] = button(say[tab], partial(self._open, tab))
            for tab in TABS:
                with ui.element("section").style("padding-top: 8px") as section:
                    section.props["aria-label"] = say[tab]
                    self._sections[tab] = section
                    getattr(self, f"_build_{tab}")()
        self._open(self._tab)

    def _build_rules(self) -> None:
        say, setting = self._say, self._room.setting
        with ui.element("div").classes("row-of"):
            for rule, bounds in BOUNDS.items():
                value = float(getattr(setting, rule))
                self._fields[rule] = number(say[f"rule_{rule}"], value, bounds, partial(self._set_number, rule, bounds))
            names: dict[str, str] = {guarantee: say[guarantee] for guarantee in GUARANTEES}
            self._fields["guarantee"] = select(
                say["rule_guarantee"], names, setting.guarantee, lambda value: self._set(guarantee=value)
            )
            for rule in ("grouped", "documents"):
                changed = partial(self._tick, rule)
                self._fields[rule] = check(say[f"rule_{rule}"], changed, checked=getattr(setting, rule))
            button(say["purge"], lambda: self._try(self._room.purge()))
        self._letters = Text("p", "").classes("quiet")

    def _build_ledger(self) -> None:
        self._ledger = Books(self._say, self._books_scene(), whole=True)
        self._ledger.on("follow", lambda event: self._follow(event.args))

    def _build_dead_letters(self) -> None:
        with ui.element("div").classes("row-of"):
            button(self._say["redrive_all"], lambda: self._try(self._room.redrive()))
            button(self._say["purge_dead"], lambda: self._try(self._room.purge(State.DEAD)))
        self._letters_list = ui.element("ul").classes("letters")

    def _build_charts(self) -> None:
        self._charts = Charts(self._room, self._say)

    def _build_events(self) -> None:
        self._events = ui.element("ol").classes("events").props("tabindex=0")

    def _build_own_worker(self) -> None:
        say = self._say
        code = program("my_worker").replace("{file}", str(self._room.file))
        Text("p", say["own_hint"])
        Text("pre", "filao work my_worker:worker").classes("program").props("tabindex=0")
        Text("pre", code).classes("program").props("tabindex=0")
        with ui.element("div").classes("row-of"):
            button(say["copy"], lambda: ui.clipboard.write(code))
            button(say["download"], lambda: ui.download(code.encode(), "my_worker.py", "text/x-python"))

    # --- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        room = self._room
        self._stage.show(scene.stage(room))
        self._timeline.show(scene.timeline(room, self._focus))
        books = self._books_scene()
        self._sums.show(books)
        self._steps.show(self._lesson_scene())
        self._freezing.set_text(self._say["thaw" if room.is_frozen else "freeze"])
        self._draw_banner()
        self._draw_fields()
        self._speak()
        match self._tab:
            case "ledger":
                self._ledger.show(books)
            case "dead_letters":
                self._draw_dead()
            case "charts":
                self._charts.draw()
            case "events":
                self._draw_events()
            case _:
                pass
        self._save()

    def _books_scene(self) -> scene.Json:
        effects, lanes = self._room.effects, self._room.lanes
        return scene.books(self._room, effects.doubled(lanes), effects.lost(lanes))

    def _draw_banner(self) -> None:
        view = self._room.view
        text = self._say["error_disk_full"] if view.is_full else ""
        if view.error and not text:
            text = self._say["error_storage"].format(why=view.error)
        self._banner.set_text(text)
        self._banner.set_visibility(bool(text))

    def _draw_fields(self) -> None:
        """Show what the lesson has set."""
        setting = self._room.setting
        for rule, field in self._fields.items():
            value = getattr(setting, rule)
            field.show(value if isinstance(value, bool | str) else f"{value:g}")
        documents = self._room.view.documents
        self._letters.set_visibility(documents is not None)
        if documents is not None:
            told = {"ready": documents.ready, "acked": documents.acked, "letters": self._room.letters}
            self._letters.set_text(self._say["documents_queue"].format(**told))

    def _draw_dead(self) -> None:
        dead = self._room.view.dead
        shown = tuple(f"{letter.id} {len(letter.history)}" for letter in dead)
        if shown == self._dead:
            return
        self._dead = shown
        self._letters_list.clear()
        with self._letters_list:
            if not dead:
                Text("li", self._say["no_dead"]).classes("quiet")
            for letter in dead:
                self._letter(letter)

    def _letter(self, letter: StoredMessage) -> None:
        say = self._say
        error = (letter.error.strip().splitlines() or [""])[-1]
        with ui.element("li").classes("box"):
            claim = number_in(letter.body, "claim_id")
            Text("p", f"{say['claim']} {claim}: {letter.reason} ({letter.attempts}), {error}")
            body = area(say["body"], json.dumps(letter.body, ensure_ascii=False, default=str))
            with ui.element("div").classes("row-of"):
                about = f"{say['claim']} {claim}"
                again = partial(self._room.redrive, [letter.id])
                button(say["redrive"], lambda: self._try(again()), label=f"{say['redrive']}: {about}")
                mended = partial(self._redrive_mended, letter.id, body)
                button(say["edit"], lambda: self._try(mended()), label=f"{say['edit']}: {about}")

    def _draw_events(self) -> None:
        if self._told == self._room.lanes.told:
            return
        self._told = self._room.lanes.told
        self._events.clear()
        with self._events:
            for event in list(self._room.lanes.events)[: -EVENTS - 1 : -1]:
                with ui.element("li"):
                    Text("time", f"{event.at - self._room.born:.1f} s")
                    Text("span", self._told_of(event))

    def _speak(self) -> None:
        """Say aloud, to whoever cannot see the stage, what just happened there."""
        fresh = [event for event in self._room.lanes.events if event.number > self._spoken and event.key in TOLD_ALOUD]
        self._spoken = self._room.lanes.told
        if fresh:
            self._aloud.set_text(self._told_of(fresh[-1]))

    def _told_of(self, event: Event) -> str:
        values = dict(event.values)
        for name in ("worker", "of"):
            if isinstance(number := values.get(name), int) and number >= GUESTS_FROM:
                values[name] = f"{number} ({self._say['guest']})"
        return self._say[f"event_{event.key}"].format(**values)

    def _open(self, tab: str) -> None:
        self._tab = tab
        for name, section in self._sections.items():
            section.set_visibility(name == tab)
            self._tabs[name].props["aria-pressed"] = str(name == tab).lower()
        self._dead = None
        self._told = -1

    # --- the lesson --------------------------------------------------------------------------------------------------

    def _lesson_scene(self) -> scene.Json:
        progress = self._visit.progress
        step = STEPS[progress.current]
        told = self._lesson[step.key]
        answer = self._room.answer_ms
        values = {"answer_ms": "?" if answer is None else f"{answer:g}"}
        done = step.key in progress.done
        return {
            "key": step.key,
            "current": progress.current,
            "steps": [
                {"key": one.key, "title": self._lesson[one.key]["title"], "done": one.key in progress.done}
                for one in STEPS
            ],
            **{part: told[part] for part in ("title", "claim", "question", "options", "do")},
            "why": told["why"].format(**values),
            "answer": step.answer,
            "chosen": progress.chosen.get(step.key),
            "revealed": done and step.key in progress.chosen,
            "actions": [{"key": key, "text": told["actions"][key]} for key in step.actions],
            "conditions": [
                {"key": key, "text": told["conditions"][key].format(**values), "met": done or key in progress.met}
                for key in step.conditions
            ],
            "trials": self._trials() if step.key == "guarantees" else None,
            "program": program(step.key),
            "busy": self._busy,
            "done": done,
            "all_done": len(progress.done) == len(STEPS),
        }

    def _trials(self) -> list[scene.Json]:
        found = self._visit.trials()
        rows = [(guarantee, [found.get((guarantee, moment), "none") for moment in MOMENTS]) for guarantee in GUARANTEES]
        return [
            {"guarantee": guarantee, "times": ["open" if times is None else str(times) for times in row]}
            for guarantee, row in rows
        ]

    def _predict(self, place: int) -> None:
        self._visit.progress.chosen[STEPS[self._visit.progress.current].key] = place

    def _go(self, place: int) -> None:
        self._visit.go(place)

    async def _act_of_step(self, event: GenericEventArguments) -> None:
        step = STEPS[self._visit.progress.current]
        self._busy = True
        if step.key not in self._visit.progress.done:
            self._visit.go(self._visit.progress.current)  # what came before does not count
        try:
            await self._try(step.actions[event.args](self._room))
        finally:
            self._busy = False

    async def restore(self) -> None:
        """Take up the progress that the browser has kept, and tell it what to say should we be gone."""
        ui.run_javascript(LOST.replace("{text}", json.dumps(self._say["connection_lost"])))
        kept: Any = await ui.run_javascript(f"localStorage.getItem('{KEPT}')", timeout=5.0)
        progress = self._visit.progress
        if not kept or progress.done or progress.current:
            return
        known = {step.key for step in STEPS}
        try:
            stored = json.loads(kept)
            done, current = set(stored["done"]) & known, int(stored["current"])
            chosen = {key: int(place) for key, place in stored["chosen"].items() if key in known}
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # something else, or another version's
        progress.done, progress.chosen = done, chosen
        self._visit.go(max(0, min(current, len(STEPS) - 1)))

    def _save(self) -> None:
        progress = self._visit.progress
        kept = {"done": sorted(progress.done), "current": progress.current, "chosen": progress.chosen}
        text = json.dumps(kept)
        if self._saved and text != self._saved:
            ui.run_javascript(f"localStorage.setItem('{KEPT}', {json.dumps(text)})")
        self._saved = text

    # --- what the learner does ---------------------------------------------------------------------------------------

    async def _try(self, doing: Awaitable[Any]) -> None:
        """Do it; what cannot be done is told, and changes nothing."""
        try:
            await doing
        except RoomError as error:
            self._tell(self._say[f"error_{error.key}"].format(**error.values))
        except FilaoError as error:
            self._tell(self._say["error_failed"].format(why=error))

    def _tell(self, text: str) -> None:
        ui.notify(text, type="negative", multi_line=True, close_button=True, timeout=12_000)

    async def _act_of_stage(self, event: GenericEventArguments) -> None:
        worker: int = event.args["worker"] or 0
        await self._try(self._do_to_worker(event.args["verb"], worker))

    async def _do_to_worker(self, verb: str, worker: int) -> None:
        room = self._room
        match verb:
            case "add":
                room.add_worker()
            case "remove":
                room.remove_worker()
            case "kill":
                room.kill(worker)
            case "pause":
                await room.pause(worker)
            case "resume":
                room.go_on(worker)
            case "slow":
                room.set_worker(worker, slow=1.0 if room.lane(worker).slow > 1 else SLOW)
            case "fail":
                room.set_worker(worker, fails=not room.lane(worker).fails)
            case _:
                raise RoomError("failed", why=verb)

    async def _submit(self, make: Callable[[int], list[Claim]], count: int) -> None:
        self._room.need_queue()  # before numbers are used up
        await self._room.submit(make(count))

    async def _submit_one(self, policy: Field, kind: Field, euros: Field) -> None:
        cents = round(self._number(self._say["euros"], str(euros.value), (1, 1_000_000)) * 100)
        claim = self._room.next_claim(policy=int(str(policy.value)), amount=cents, kind=str(kind.value))
        await self._room.submit([claim])

    async def _submit_file(self, given: dict[str, Any]) -> None:
        if given["content"] is None:
            raise RoomError("large", size=round(given["size"] / 1000))
        path = self._room.folder / "submitted.csv"
        path.write_bytes(base64.b64decode(given["content"].partition(",")[2]))
        try:
            read = from_csv(path, SUBMITTED_MAX + 1)
        except BadClaimsError as error:
            raise RoomError(
                "file", why=str(error).replace(str(path), given["name"]).replace(path.name, given["name"])
            ) from error
        await self._room.submit([self._room.next_claim(policy=one.policy, amount=one.amount) for one in read])

    async def _redrive_mended(self, message: str, body: Field) -> None:
        try:
            mended = json.loads(str(body.value))
        except ValueError as error:
            raise RoomError("body", why=str(error)) from error
        await self._room.redrive([message], body=mended)

    def _number(self, what: str, text: str, bounds: tuple[float, float]) -> float:
        least, most = bounds
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise RoomError("number", what=what, value=text[:40], least=f"{least:.12g}", most=f"{most:.12g}")
        return value

    async def _set_number(self, rule: str, bounds: tuple[float, float], text: str) -> None:
        async def change() -> None:
            value = self._number(self._say[f"rule_{rule}"], text, bounds)
            await self._room.change(**{rule: int(value) if rule == "max_attempts" else value})

        await self._try(change())
        setting = getattr(self._room.setting, rule)
        self._fields[rule].run_method("show", f"{setting:g}")  # which may not be what was typed

    async def _set(self, **changes: Any) -> None:
        await self._try(self._room.change(**changes))

    async def _tick(self, rule: str, checked: bool) -> None:  # noqa: FBT001  # what a box says
        await self._set(**{rule: checked})

    async def _freeze(self) -> None:
        await self._try(self._room.thaw() if self._room.is_frozen else self._room.freeze())

    def _follow(self, wrong: dict[str, Any]) -> None:
        """Show in the timeline what explains a claim that was lost or paid twice."""
        attempts = self._room.lanes.attempts(wrong["message"])
        self._focus = next((one for one in attempts if one.attempt == wrong["attempt"]), None)
        ui.run_javascript("document.querySelector('.timeline').scrollIntoView({ block: 'nearest' })")

    def _unfollow(self) -> None:
        self._focus = None


def _toggle(dark: ui.dark_mode) -> None:
    """Go from what the system prefers to dark, and from there to light and back."""
    dark.value = not dark.value
