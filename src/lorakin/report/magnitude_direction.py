"""DoRA's picture: how the change of a weight's magnitude goes with that of its direction.

"DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, figure 2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import altair as alt
from scipy import stats

from lorakin.report.page import Cell, Column, Figure, Table, Value
from lorakin.report.vega import MUTED, colour, data, tooltip


class Point(NamedTuple):
    """How one module's weight has changed by a step.

    `magnitude` and `direction` are ΔM and ΔD of `lorakin.compare.observe`.
    """

    arm: str
    layer: str
    module: str
    step: int
    magnitude: float
    direction: float


class Correlation(NamedTuple):
    """Pearson's r and the least-squares line of magnitude over direction.

    All are NaN if there are fewer than two points, or one of the two does not vary.
    """

    r: float
    slope: float
    intercept: float


def correlation(points: Sequence[Point]) -> Correlation:
    """Returns how the change of magnitude goes with the change of direction.

    >>> line = correlation([Point("a", "0", "q", 1, 0.1, 0.2), Point("a", "1", "q", 1, 0.3, 0.6)])
    >>> print(f"{line.r:.2f} {line.slope:.2f}")
    1.00 0.50
    """
    x, y = [point.direction for point in points], [point.magnitude for point in points]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return Correlation(math.nan, math.nan, math.nan)
    line = stats.linregress(x, y)
    return Correlation(float(line.rvalue), float(line.slope), float(line.intercept))


def magnitude_direction(points: Sequence[Point]) -> Figure:
    """Returns a picture of ΔM against ΔD, with a panel for each arm."""
    arms: dict[str, list[Point]] = {}
    for point in points:
        arms.setdefault(point.arm, []).append(point)
    lines = {arm: correlation(group) for arm, group in arms.items()}
    steps = sorted({point.step for point in points})
    correlations = "; ".join(f"**{arm}** {_signed(line.r)}" for arm, line in lines.items())
    caption = (
        f"Each point is a module at one of the steps {', '.join(map(str, steps))}. ΔD, the change "
        "of its direction, goes to the right; ΔM, the change of its magnitude, goes up. Each panel "
        "has its own scales. The shape shows the step, the colour the layer, and the line is the "
        f"least-squares fit. Correlation of ΔM and ΔD: {correlations}. DoRA's paper found, for the "
        "query weights of a larger model, −0.62 with full fine-tuning, +0.83 with LoRA and −0.31 "
        "with DoRA."
    )
    charts = {
        f"{arm}: r = {_signed(lines[arm].r)}": _scatter(group, lines[arm], steps)
        for arm, group in arms.items()
    }
    return Figure("Change of magnitude and of direction", caption, charts, _table(arms))


def _scatter(points: Sequence[Point], line: Correlation, steps: Sequence[int]) -> alt.TopLevelMixin:
    x = alt.X("direction:Q", title="ΔD", axis=alt.Axis(tickCount=4, format=".3~g"))
    y = alt.Y("magnitude:Q", title="ΔM", axis=alt.Axis(tickCount=5, format=".3~g"))
    rows = [
        point._asdict() | ({"depth": int(point.layer)} if point.layer.isdigit() else {})
        for point in points
    ]
    shape = alt.Shape("step:N", scale=alt.Scale(domain=list(steps)), legend=alt.Legend(columns=4))
    tips = [tooltip("magnitude", "ΔM", ".3~g"), tooltip("direction", "ΔD", ".3~g")]
    dots = (
        alt.Chart(data(rows))
        .mark_point(filled=True, size=34, opacity=0.9, stroke=MUTED, strokeWidth=0.4)
        .encode(x=x, y=y, shape=shape, tooltip=["layer:N", "module:N", "step:O", *tips])
    )
    if all("depth" in row for row in rows):
        dots = dots.encode(color=colour("depth", "layer", "d"))

    layers = [dots]
    if math.isfinite(line.r):
        ends = (end(point.direction for point in points) for end in (min, max))
        fit = [{"direction": x, "magnitude": line.intercept + line.slope * x} for x in ends]
        drawn = alt.Chart(data(fit)).mark_line(color="var(--series-2)", clip=True)
        layers.append(drawn.encode(x=x, y=y))
    chart: alt.TopLevelMixin = alt.layer(*layers).properties(width="container", height=240)
    return chart


def _table(arms: Mapping[str, Sequence[Point]]) -> Table:
    """Returns means over the layers, because nobody reads thousands of points."""
    rows: list[list[Value]] = []
    for arm, points in arms.items():
        groups: dict[tuple[int, str], list[Point]] = {}
        for point in points:
            groups.setdefault((point.step, point.module), []).append(point)
        for (step, module), group in groups.items():
            magnitude = statistics.fmean(point.magnitude for point in group)
            direction = statistics.fmean(point.direction for point in group)
            r = correlation(group).r
            rows.append([arm, step, module, len(group), magnitude, direction, Cell(_signed(r), r)])
    columns = [
        Column("arm", numeric=False),
        Column("step"),
        Column("module", numeric=False),
        Column("points"),
        Column("mean ΔM"),
        Column("mean ΔD"),
        Column("correlation"),
    ]
    return Table("Means over the layers, by step and module", columns, rows)


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−") if math.isfinite(number) else "not defined"
