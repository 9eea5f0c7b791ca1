"""The charts: depth and age of the queue, how fast claims come and go, and how evenly they are shared."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (NiceGUI leaves some of its types open)

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from nicegui import ui

from filao.sandbox.web.room import Room

FAINT = "#8a94a055"
GREY, BLUE, ORANGE, GREEN = "#8a94a0", "#2b8cc4", "#d5752a", "#2f9e6e"  # readable on light and on dark


class Charts:
    """Three charts, drawn once in a second."""

    def __init__(self, room: Room, say: Mapping[str, str]) -> None:
        self._room = room
        self._drawn = -1.0
        with ui.element("div").classes("charts"):
            self._depth = ui.echart(_lines(say["depth"], say["age"], BLUE, ORANGE))
            self._rates = ui.echart(_lines(say["rate_sent"], say["rate_paid"], BLUE, GREEN))
            self._shares = ui.echart(_bars(say["share"]))
        self._worker = say["worker"]

    def draw(self) -> None:
        """Draw what the room remembers, if there is more of it."""
        taken = list(self._room.history)
        if not taken or taken[-1].at == self._drawn:
            return
        self._drawn = taken[-1].at
        _fill(self._depth, [[one.at, one.depth] for one in taken], [[one.at, round(one.age, 1)] for one in taken])
        _fill(self._rates, _rates([(one.at, one.sent) for one in taken]), _rates([(one.at, one.paid) for one in taken]))
        shares = self._room.lanes.shares()
        names = [f"{self._worker} {number}" for number in shares]
        self._shares.options["xAxis"]["data"] = names
        self._shares.options["series"][0]["data"] = [round(share * 100, 1) for share in shares.values()]
        self._shares.update()


def _rates(samples: list[tuple[float, int]]) -> list[list[float]]:
    pairs = pairwise(samples)
    return [[now, round((count - before) / (now - then), 1)] for (then, before), (now, count) in pairs]


def _fill(chart: ui.echart, *series: list[list[Any]]) -> None:
    for place, points in enumerate(series):
        chart.options["series"][place]["data"] = points
    chart.update()


def _frame(title: str) -> dict[str, Any]:
    return {
        "animation": False,
        "aria": {"enabled": True},
        "textStyle": {"color": GREY},
        "grid": {"left": 40, "right": 12, "top": 34, "bottom": 22},
        "title": {"text": title, "textStyle": {"fontSize": 12, "color": GREY}},
        "yAxis": {
            "type": "value",
            "axisLabel": {"color": GREY},
            "min": 0,
            "splitLine": {"lineStyle": {"color": FAINT}},
        },
    }


def _lines(first: str, second: str, first_colour: str, second_colour: str) -> dict[str, Any]:
    series = [
        {"type": "line", "name": name, "showSymbol": False, "data": [], "color": colour, "lineStyle": {"type": kind}}
        for name, colour, kind in ((first, first_colour, "solid"), (second, second_colour, "dashed"))
    ]
    axis = {
        "type": "value",
        "axisLabel": {"color": GREY, "formatter": "{value} s"},
        "min": "dataMin",
        "max": "dataMax",
        "splitLine": {"show": False},
    }
    return _frame("") | {"legend": {"top": 0, "textStyle": {"color": GREY}}, "xAxis": axis, "series": series}


def _bars(title: str) -> dict[str, Any]:
    axis = {"type": "category", "data": [], "axisLabel": {"color": GREY}}
    return _frame(f"{title}, %") | {"xAxis": axis, "series": [{"type": "bar", "data": [], "color": BLUE}]}
