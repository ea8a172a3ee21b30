"""The chart of a comparison that sets quality against cost, with names beside the points."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import altair as alt

from lorakin.compare.arms import MEMBER, REFERENCE
from lorakin.compare.report_answers import is_share, sign_of, words_of
from lorakin.compare.standings import Standing
from lorakin.report.page import Column, Figure, Table
from lorakin.report.vega import MUTED, data, tooltip

WIDTH, HEIGHT, LETTER, LINE = 900, 320, 6.5, 13
"""Pixels of the plot on a laptop, of a letter and of a line of text, to place the names."""

Points = Sequence[dict[str, Any]]
"""One for each arm: arm, kind, cost, mean, and the ends of its interval, low and high."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


class Side(NamedTuple):
    """Where a name stands beside its point, in pixels."""

    align: Literal["left", "right"]
    dx: int
    dy: int


SIDES = (
    Side("left", 9, -6),
    Side("left", 9, 8),
    Side("right", -9, -6),
    Side("right", -9, 8),
    Side("left", 9, -19),
    Side("left", 9, 21),
)
"""The places of a name, in the order in which they are tried."""


class Cost(NamedTuple):
    """What an arm takes: the title of the axis, its scale, and arm → cost."""

    title: str
    scale: Literal["log", "linear"]
    of: Mapping[str, float]


def pareto(shown: Sequence[Standing], cost: Cost, measure: str) -> Figure:
    """Returns a chart of quality, with its interval, over cost.

    A dashed line joins the arms that are better than all cheaper ones.
    """
    sign = sign_of(measure)
    points = sorted(_points(shown, cost), key=lambda point: (point["cost"], -sign * point["mean"]))
    front: list[dict[str, Any]] = []
    for point in points:
        if not front or sign * point["mean"] > sign * front[-1]["mean"]:
            front.append(point)

    important = [p for kind in (REFERENCE, MEMBER) for p in points if p["kind"] == kind]
    names = _names([*front, *important, *points], points, cost.scale)
    chart = alt.layer(*_layers(points, front, cost, measure), *names)
    columns = [
        Column("arm", numeric=False),
        *map(Column, (cost.title, words_of(measure), "low", "high")),
    ]
    cells = [[point[key] for key in ("arm", "cost", "mean", "low", "high")] for point in points]
    return Figure(
        f"Quality against {cost.title.partition(',')[0]}",
        "Each arm's mean with its 95 % interval. The arms on the dashed line are "
        f"better than all cheaper ones: {', '.join(point['arm'] for point in front)}.",
        chart.properties(width="container", height=HEIGHT),
        Table(f"Held-out {words_of(measure)} and {cost.title}", columns, cells),
    )


def _points(shown: Sequence[Standing], cost: Cost) -> Iterator[dict[str, Any]]:
    for s in shown:
        if s.quality is not None and cost.of.get(s.arm.name):
            mean, half = s.quality.mean, s.quality.half_width
            half = half if math.isfinite(half) else 0.0
            yield {
                "arm": s.arm.title,
                "kind": s.kind,
                "cost": cost.of[s.arm.name],
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
            }


def _layers(points: Points, front: Points, cost: Cost, measure: str) -> list[alt.Chart]:
    """Draws the dashed line, the intervals and the points."""
    title = f"held-out {words_of(measure)}"
    x, y = _axes(cost, title, ".0%" if is_share(measure) else ".3~f")
    low = alt.Y("low:Q", title=title)
    tips = ["arm:N", "kind:N", tooltip("cost", cost.title, ",.4~g")]
    tips.append(tooltip("mean", words_of(measure), ".4~f"))
    kind = {"color": alt.Color("kind:N", title=None), "shape": alt.Shape("kind:N", title=None)}

    dashes = alt.Chart(data(front)).mark_line(
        interpolate="step-after", strokeDash=[4, 3], color=MUTED
    )
    all_points = alt.Chart(data(points))
    bars = all_points.mark_rule(opacity=0.45)
    dots = all_points.mark_point(filled=True, size=75, opacity=1)
    return [
        dashes.encode(x=x, y=y),
        bars.encode(x=x, y=low, y2="high:Q"),
        dots.encode(x=x, y=y, tooltip=tips, **kind),
    ]


def _axes(cost: Cost, title: str, form: str) -> tuple[alt.X, alt.Y]:
    if cost.scale == "log":
        scale, ticks = alt.Scale(type="log", nice=False, padding=40), "~s"
    else:
        scale, ticks = alt.Scale(zero=False, padding=40), ".2~f"
    axis = alt.Axis(format=ticks, tickCount=5, grid=False)
    x = alt.X("cost:Q", title=cost.title, scale=scale, axis=axis)
    return x, alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format=form))


def _names(wanted: Points, points: Points, scale: str) -> list[alt.Chart]:
    """Draws names beside their points where there is room; those that come first in `wanted` win.

    Vega-Lite cannot keep labels apart, so each side of the points is a layer of its own.
    """
    where = _pixels(points, math.log10 if scale == "log" else float)
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in where.values()]
    sides: dict[Side, list[dict[str, Any]]] = {}
    for name, point in {point["arm"]: point for point in wanted}.items():
        for side in SIDES:
            box = _box(*where[name], name, side)
            inside = box[0] >= -30 and box[2] <= WIDTH + 30
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                sides.setdefault(side, []).append(point)
                break
    return [
        alt.Chart(data(rows))
        .mark_text(align=side.align, dx=side.dx, dy=side.dy, fontSize=11)
        .encode(x="cost:Q", y="mean:Q", text="arm:N")
        for side, rows in sides.items()
    ]


def _pixels(points: Points, scaled: Callable[[float], float]) -> dict[str, tuple[float, float]]:
    """Returns arm → about where its point is, in a plot as wide as on a laptop."""
    left, right = (scaled(end(point["cost"] for point in points)) for end in (min, max))
    low, high = min(point["low"] for point in points), max(point["high"] for point in points)
    across, up = WIDTH / ((right - left) or 1.0), HEIGHT / ((high - low) or 1.0)
    return {
        point["arm"]: (across * (scaled(point["cost"]) - left), up * (high - point["mean"]))
        for point in points
    }


def _box(x: float, y: float, name: str, side: Side) -> Box:
    """Returns the room that a name takes beside the point at (x, y)."""
    wide = LETTER * len(name)
    start = x + side.dx - (wide if side.align == "right" else 0)
    return start, y + side.dy - LINE / 2, start + wide, y + side.dy + LINE / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
