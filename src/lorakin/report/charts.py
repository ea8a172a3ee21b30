"""The charts of a comparison, each a `page.Figure`: quality against cost, losses over the steps, learning-rate sweeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import altair as alt

from lorakin.compare import arms as arms_
from lorakin.compare.standings import Standing, sign_of
from lorakin.report.page import Cell, Column, Figure, Table
from lorakin.training.progress import running_mean

SMOOTHING = 0.8
WIDTH, HEIGHT, LETTER, LINE = 900, 320, 6.5, 13
"""Of a plot and of a letter in it, in pixels, as far as labels must know to keep out of each other's way."""
MUTED = "var(--muted)"
Curves = Mapping[str, list[dict[str, Any]]]


Box = tuple[float, float, float, float]


class Side(NamedTuple):
    """Where a label stands by its point, in pixels."""

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


class Cost(NamedTuple):
    """What an arm takes: the axis's title, its scale, and arm → cost."""

    title: str
    scale: Literal["log", "linear"]
    of: dict[str, float]


def pareto(shown: Sequence[Standing], cost: Cost, measure: str) -> Figure:
    """Quality with its interval against cost; a line along those that nothing cheaper matches."""
    sign = sign_of(measure)
    points = sorted(_priced(shown, cost), key=lambda point: (point["cost"], -sign * point["mean"]))
    front: list[dict[str, Any]] = []
    for point in points:
        if not front or sign * point["mean"] > sign * front[-1]["mean"]:
            front.append(point)
    first = [
        *front,
        *(p for p in points if p["kind"] == arms_.REFERENCE),
        *(p for p in points if p["kind"] == arms_.MEMBER),
    ]
    chart = alt.layer(
        *_pareto_layers(points, front, cost, measure),
        *_labels([*first, *points], points, cost.scale),
    )
    columns = [
        Column("arm", numeric=False),
        Column(cost.title),
        Column(measure),
        Column("low"),
        Column("high"),
    ]
    cells = [[point[key] for key in ("arm", "cost", "mean", "low", "high")] for point in points]
    return Figure(
        f"Quality against {cost.title.partition(',')[0]}",
        "Each arm's mean with its 95 % interval over the seeds. On the dashed line, from cheap to dear, lie those that no "
        f"cheaper one matches: {', '.join(point['arm'] for point in front)}.",
        chart.properties(width="container", height=HEIGHT),
        Table(f"Held-out {measure} and {cost.title}", columns, cells),
    )


def _priced(shown: Sequence[Standing], cost: Cost) -> Iterator[dict[str, Any]]:
    for s in shown:
        if s.quality is not None and cost.of.get(s.arm.name):
            half, mean = s.quality.half if math.isfinite(s.quality.half) else 0.0, s.quality.mean
            ends = {"low": mean - half, "high": mean + half}
            yield {
                "arm": s.arm.title,
                "kind": s.kind,
                "cost": cost.of[s.arm.name],
                "mean": mean,
                **ends,
            }


def _pareto_layers(
    points: list[dict[str, Any]], front: list[dict[str, Any]], cost: Cost, measure: str
) -> list[alt.Chart]:
    data, title = alt.InlineData(values=points), f"held-out {measure}"
    x, y = _axes(cost, title, ".0%" if measure == "accuracy" else ".3~f")
    tips = [
        "arm:N",
        "kind:N",
        alt.Tooltip("cost:Q", title=cost.title, format=",.4~g"),
        _tip("mean", measure, ".4~f"),
    ]
    kind = {"color": alt.Color("kind:N", title=None), "shape": alt.Shape("kind:N", title=None)}
    line = alt.Chart(alt.InlineData(values=front)).mark_line(
        interpolate="step-after", strokeDash=[4, 3], color=MUTED
    )
    bars = (
        alt.Chart(data)
        .mark_rule(opacity=0.45)
        .encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q")
    )
    dots = (
        alt.Chart(data)
        .mark_point(filled=True, size=75, opacity=1)
        .encode(x=x, y=y, tooltip=tips, **kind)
    )
    return [line.encode(x=x, y=y), bars, dots]


def _axes(cost: Cost, title: str, form: str) -> tuple[alt.X, alt.Y]:
    axis = alt.Axis(format="~s" if cost.scale == "log" else ".2~f", tickCount=5, grid=False)
    scale = (
        alt.Scale(type="log", nice=False, padding=40)
        if cost.scale == "log"
        else alt.Scale(zero=False, padding=40)
    )
    x = alt.X("cost:Q", title=cost.title, scale=scale, axis=axis)
    return x, alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(format=form))


def _labels(
    wanted: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]], scale: str
) -> list[alt.Chart]:
    """Names beside their points where there is room, those that are `wanted` first; a layer for each side of a point."""
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
        alt.Chart(alt.InlineData(values=rows))
        .mark_text(align=side.align, dx=side.dx, dy=side.dy, fontSize=11)
        .encode(x="cost:Q", y="mean:Q", text="arm:N")
        for side, rows in sides.items()
    ]


def _pixels(
    points: Sequence[dict[str, Any]], place: Callable[[float], float]
) -> dict[str, tuple[float, float]]:
    """About where each arm's point is in a plot as wide as on a laptop."""
    left, right = (place(end(point["cost"] for point in points)) for end in (min, max))
    low, high = min(point["low"] for point in points), max(point["high"] for point in points)
    across, up = WIDTH / ((right - left) or 1.0), HEIGHT / ((high - low) or 1.0)
    return {
        point["arm"]: (across * (place(point["cost"]) - left), up * (high - point["mean"]))
        for point in points
    }


def _box(x: float, y: float, name: str, side: Side) -> Box:
    wide = LETTER * len(name)
    start = x + side.dx - (wide if side.align == "right" else 0)
    return start, y + side.dy - LINE / 2, start + wide, y + side.dy + LINE / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def loss_curves(title: str, group: Sequence[Standing]) -> Figure:
    """The running mean of the training loss, and its range over the seeds: a panel for each arm, the first's line in all."""
    curves = {s.arm.title: _curve(s) for s in group}
    plain = group[0].arm.title
    span = (
        min(row["low"] for rows in curves.values() for row in rows),
        max(row["high"] for rows in curves.values() for row in rows),
    )
    panels = {
        name: _loss_panel(rows, curves[plain], span)
        for name, rows in curves.items()
        if name != plain
    }
    last = sorted(((rows[-1]["mean"], name) for name, rows in curves.items()))
    order = ", ".join(f"{name} {value:.3f}" for value, name in last)
    longest = max(map(len, curves.values()))
    steps = sorted({*range(1, longest + 1, max(1, math.ceil(longest / 20))), longest})
    cells = [
        [step, *(rows[step - 1]["mean"] if step <= len(rows) else None for rows in curves.values())]
        for step in steps
    ]
    return Figure(
        title,
        "Each arm at its best learning rate: the running mean of the training loss, its range over the seeds shaded. The "
        f"dashed line is tuned {plain}. At the last step, lowest first: {order}.",
        panels,
        Table(
            "Running mean of the training loss, mean over the seeds",
            [Column("step"), *map(Column, curves)],
            cells,
        ),
    )


def _curve(s: Standing) -> list[dict[str, Any]]:
    lines = [running_mean(row.losses, SMOOTHING) for row in s.done]
    rows = []
    for step in range(max(map(len, lines))):
        there = [line[step] for line in lines if step < len(line)]
        ends = {"low": min(there), "high": max(there)}
        rows.append({"step": step + 1, "arm": s.arm.title, "mean": statistics.fmean(there), **ends})
    return rows


def _loss_panel(
    rows: list[dict[str, Any]], plain: list[dict[str, Any]], span: tuple[float, float]
) -> alt.TopLevelMixin:
    data, scale = alt.InlineData(values=rows), alt.Scale(domain=list(span), nice=True)
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=4, tickMinStep=1))
    y = alt.Y("mean:Q", title="loss", scale=scale, axis=alt.Axis(tickCount=4))
    band = (
        alt.Chart(data)
        .mark_area(opacity=0.2)
        .encode(x=x, y=alt.Y("low:Q", title="loss", scale=scale), y2="high:Q")
    )
    line = (
        alt.Chart(data)
        .mark_line()
        .encode(x=x, y=y, tooltip=["arm:N", "step:Q", _tip("mean", "loss", ".3f")])
    )
    other = (
        alt.Chart(alt.InlineData(values=plain))
        .mark_line(strokeDash=[4, 3], color=MUTED)
        .encode(x=x, y=y)
    )
    chart: alt.TopLevelMixin = alt.layer(band, other, line).properties(
        width="container", height=170
    )
    return chart


def rate_curves(swept: Mapping[str, Mapping[float, float]], best: Mapping[str, float]) -> Figure:
    """The loss on the tuning rows against the learning rate, arm → rate → loss, a panel for each arm, the best rates named."""
    known = [loss for losses in swept.values() for loss in losses.values() if math.isfinite(loss)]
    low, most = min(known, default=0.0), max(known, default=1.0)
    top = min(most, low + 4 * (statistics.median(known) - low) + 0.2) if known else most
    panels = {name: _rate_panel(losses, (low, top)) for name, losses in swept.items()}
    cells = [
        [name, rate, loss if math.isfinite(loss) else Cell("did not end well")]
        for name, losses in swept.items()
        for rate, loss in sorted(losses.items())
    ]
    columns = [
        Column("arm", numeric=False),
        Column("learning rate"),
        Column("loss on the tuning rows"),
    ]
    return Figure(
        "Learning-rate sweeps",
        "The loss on the tuning rows after a run with the first seed at each learning rate. A triangle at the top is a run "
        "that ended worse than the picture shows, or not at all. The best: "
        + ", ".join(f"{name} {rate:g}" for name, rate in best.items())
        + ".",
        panels,
        Table("Learning-rate sweeps", columns, cells),
    )


def _rate_panel(losses: Mapping[float, float], span: tuple[float, float]) -> alt.TopLevelMixin:
    low, top = span
    rows = [
        {
            "lr": lr,
            "loss": min(loss, top),
            "said": f"{loss:.3f}" if math.isfinite(loss) else "none",
            "seen": loss <= top,
        }
        for lr, loss in sorted(losses.items())
    ]
    data = alt.InlineData(values=rows)
    axis = alt.Axis(format=".0e", tickCount=3, grid=False)
    x = alt.X("lr:Q", title="learning rate", scale=alt.Scale(type="log", padding=12), axis=axis)
    y = alt.Y(
        "loss:Q",
        title="loss",
        scale=alt.Scale(domain=[low, top], nice=True),
        axis=alt.Axis(tickCount=4),
    )
    shape = alt.Shape(
        "seen:N",
        scale=alt.Scale(domain=[True, False], range=["circle", "triangle-up"]),
        legend=None,
    )
    tips = [_tip("lr", "learning rate", ".2~g"), alt.Tooltip("said:N", title="loss")]
    dots = (
        alt.Chart(data)
        .mark_point(filled=True, size=45, opacity=1)
        .encode(x=x, y=y, shape=shape, tooltip=tips)
    )
    line = alt.Chart(data).mark_line(strokeWidth=1.5).encode(x=x, y=y)
    chart: alt.TopLevelMixin = alt.layer(line, dots).properties(width="container", height=150)
    return chart


def _tip(field: str, title: str, form: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=form)
