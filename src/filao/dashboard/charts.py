"""Charts as SVG, drawn on the server: they need no script, and a strict content security policy allows them.

Their classes get their colours from the style sheet. Each chart has a text for people who cannot see it.
"""

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 120, 24  # of a sparkline, in its own units
WIDE, HIGH = 600, 120  # of a chart, in its own units


def sparkline(points: Sequence[float], says: str) -> Markup:
    """Return a line without axes, as high as its highest point."""
    line = _line(points, WIDTH, HEIGHT - 2, max(points, default=0.0))
    return Markup(
        '<svg class="spark" role="img" viewBox="0 0 {} {}" width="{}" height="{}" preserveAspectRatio="none">'
        "<title>{}</title>{}</svg>"
    ).format(WIDTH, HEIGHT, WIDTH, HEIGHT, says, _drawn(line, "depth"))


def chart(lines: Sequence[tuple[str, Sequence[float]]], says: str, top: str) -> Markup:
    """Return several lines, each with its class, on one scale, whose highest value `top` is written beside it."""
    highest = max((value for _, points in lines for value in points), default=0.0)
    drawn = Markup("").join(_drawn(_line(points, WIDE, HIGH - 4, highest), name) for name, points in lines)
    return Markup(
        '<svg class="chart" role="img" viewBox="0 0 {} {}" preserveAspectRatio="none"><title>{}</title>'
        '<line class="axis" x1="0" y1="{}" x2="{}" y2="{}"/>{}</svg><span class="top" aria-hidden="true">{}</span>'
    ).format(WIDE, HIGH, says, HIGH - 1, WIDE, HIGH - 1, drawn, top)


def _drawn(line: str, name: str) -> Markup:
    return Markup('<polyline class="line {}" points="{}"/>').format(name, line)


def _line(points: Sequence[float], width: int, height: int, highest: float) -> str:
    """Return the points of a line; the last one is at the right edge."""
    if len(points) < 2:  # one point is no line
        points = [*points, *points] or [0.0, 0.0]
    step = width / (len(points) - 1)
    scale = height / highest if highest > 0 else 0.0
    return " ".join(f"{place * step:.1f},{height - value * scale + 1:.1f}" for place, value in enumerate(points))
