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


class Field(ui.element, component=COMPONENTS / "field.js"):
    """A field of a form: a number, a choice, some lines of text, or a box to tick."""

    def __init__(
        self, kind: str, label: str, on_change: Callable[[Any], Any] | None = None, *, value: str | bool
    ) -> None:
        super().__init__()
        self.value = value
        """What stands in it."""
        self.props.update({"kind": kind, "label": label, "initial": value})
        self._on_change = on_change
        self.on("typed", self._typed)
        self.on("changed", self._changed)

    def show(self, value: str | bool) -> None:  # noqa: FBT001  # a box holds one
        """Let something stand in it, unless somebody is typing there."""
        if value != self.value:
            self.value = value
            self.run_method("show", value)

    def _typed(self, event: GenericEventArguments) -> None:
        self.value = event.args

    def _changed(self, event: GenericEventArguments) -> Any:
        self.value = event.args
        return self._on_change(event.args) if self._on_change is not None else None


def number(
    label: str, value: float, bounds: tuple[float, float], on_change: Callable[[str], Any] | None = None
) -> Field:
    """Place a field for a number; what was typed is passed on as it is."""
    field = Field("number", label, on_change, value=f"{value:g}")
    field.props["bounds"] = list(bounds)
    return field


def select(label: str, options: Mapping[str, str], value: str, on_change: Callable[[str], Any] | None = None) -> Field:
    """Place a choice, from values to what they are called."""
    field = Field("select", label, on_change, value=value)
    field.props["options"] = dict(options)
    return field


def area(label: str, value: str) -> Field:
    """Place a field for some lines of text."""
    return Field("area", label, value=value)


def check(label: str, on_change: Callable[[bool], Any], *, checked: bool) -> Field:
    """Place a box to tick."""
    return Field("check", label, on_change, value=checked)
