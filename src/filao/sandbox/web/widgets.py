"""The few elements that the page's forms are made of: plain HTML, which keyboards and screen readers know by themselves."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (NiceGUI leaves some of its types open)

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement
from nicegui.events import GenericEventArguments

COMPONENTS = Path(__file__).parent / "components"
EMIT_VALUE = "(event) => emit(event.target.value)"
EMIT_CHECKED = "(event) => emit(event.target.checked)"


class Text(TextElement):
    """An element with a text in it."""

    def __init__(self, tag: str, text: str) -> None:
        super().__init__(tag=tag, text=text)


class Drawing(ui.element):
    """What one of `components/` draws; it is given whole scenes, and sends those that changed."""

    def __init__(self, words: Mapping[str, str], scene: dict[str, Any], **props: object) -> None:
        super().__init__()
        self._scene = scene
        self.props["initial"] = scene
        self.props["words"] = dict(words)
        self.props.update(props)

    def show(self, scene: dict[str, Any]) -> None:
        """Draw a scene."""
        if scene != self._scene:
            self._scene = scene
            self.run_method("show", scene)


class Stage(Drawing, component=COMPONENTS / "stage.js"):
    """The portal, the queue, the workers, and what is done."""


class Timeline(Drawing, component=COMPONENTS / "timeline.js"):
    """A lane for each worker."""


class Books(Drawing, component=COMPONENTS / "books.js"):
    """The invariants; with `whole`, the ledger of effects."""


class LessonPanel(Drawing, component=COMPONENTS / "lesson.js"):
    """The steps."""


def button(text: str, on_click: Callable[[], Any], *, kind: str = "plain", label: str = "") -> Text:
    """Place a button; `label` is what it is called where its text does not say enough."""
    made = Text("button", text).classes(kind).props("type=button")
    if label:
        made.props["aria-label"] = label
    return made.on("click", lambda _: on_click())


def number(
    label: str, value: float, bounds: tuple[float, float], on_change: Callable[[str], Any] | None = None
) -> ui.element:
    """Place a field for a number and return it; what was typed is passed on as it is."""
    least, most = bounds
    with ui.element("label").classes("field"):
        Text("span", label)
        field = ui.element("input")
        field.props.update({"type": "number", "value": f"{value:g}", "min": least, "max": most, "step": "any"})
    return _heard(field, on_change)


def select(
    label: str, options: Mapping[str, str], value: str, on_change: Callable[[str], Any] | None = None
) -> ui.element:
    """Place a choice, from values to what they are called."""
    with ui.element("label").classes("field"):
        Text("span", label)
        with ui.element("select") as field:
            for key, text in options.items():
                Text("option", text).props["value"] = key
    field.props["value"] = value
    return _heard(field, on_change)


def area(label: str, value: str) -> ui.element:
    """Place a field for some lines of text."""
    with ui.element("label").classes("field").style("width: 100%"):
        Text("span", label)
        field = ui.element("textarea")
        field.props.update({"value": value, "rows": 3, "spellcheck": "false"})
    return _heard(field, None)


def check(label: str, on_change: Callable[[bool], Any], *, checked: bool) -> ui.element:
    """Place a box to tick."""
    with ui.element("label").classes("check"):
        field = ui.element("input")
        field.props.update({"type": "checkbox", "checked": checked})
        Text("span", label)

    def changed(event: GenericEventArguments) -> Any:
        field.props["checked"] = event.args
        return on_change(bool(event.args))

    return field.on("change", changed, js_handler=EMIT_CHECKED)


def value_of(field: ui.element) -> str:
    """Return what stands in a field."""
    return str(field.props["value"])


def _heard(field: ui.element, on_change: Callable[[str], Any] | None) -> ui.element:
    """Let a field remember what was typed into it, and tell it."""

    def changed(event: GenericEventArguments) -> Any:
        field.props["value"] = str(event.args)
        return on_change(str(event.args)) if on_change is not None else None

    return field.on("change", changed, js_handler=EMIT_VALUE)
