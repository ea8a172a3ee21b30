"""The charts of a comparison: training losses and learning-rate sweeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from lorakin.compare.report_answers import sign_of, words_of
from lorakin.compare.standings import Standing
from lorakin.report.page import Cell, Column, Figure, Table
from lorakin.report.vega import MUTED, data, tooltip
from lorakin.training.metrics_file import running_mean

SMOOTHING = 0.8
"""The smoothing of the running mean of a training loss."""
MOST_ROWS = 20
"""About how many steps a table of losses has."""

Rows = list[dict[str, Any]]


def loss_curves(title: str, group: Sequence[Standing]) -> Figure:
    """Returns a chart of the training losses, with a panel for each arm but the first.

    A panel shows the running mean of the loss, its range over the seeds, and the first arm's line.
    """
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
    caption = (
        "The running mean of the training loss of each arm at its best learning rate; its range "
        f"over the seeds is shaded. The dashed line is tuned {plain}. At the last step, lowest "
        f"first: {order}."
    )
    return Figure(title, caption, panels, _loss_table(curves))


def _curve(s: Standing) -> Rows:
    """Returns mean, lowest and highest running mean over the seeds at each step."""
    lines = [running_mean(row.losses, SMOOTHING) for row in s.done]
    rows = []
    for step in range(max(map(len, lines))):
        at = [line[step] for line in lines if step < len(line)]
        mean, low, high = statistics.fmean(at), min(at), max(at)
        rows.append({"step": step + 1, "arm": s.arm.title, "mean": mean, "low": low, "high": high})
    return rows


def _loss_table(curves: Mapping[str, Rows]) -> Table:
    longest = max(map(len, curves.values()))
    every = max(1, math.ceil(longest / MOST_ROWS))
    steps = sorted({*range(1, longest + 1, every), longest})
    cells = [
        [step, *(rows[step - 1]["mean"] if step <= len(rows) else None for rows in curves.values())]
        for step in steps
    ]
    columns = [Column("step"), *map(Column, curves)]
    return Table("Running mean of the training loss, mean over the seeds", columns, cells)


def _loss_panel(rows: Rows, plain: Rows, span: tuple[float, float]) -> alt.TopLevelMixin:
    scale = alt.Scale(domain=list(span), nice=True)
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickCount=4, tickMinStep=1))
    y = alt.Y("mean:Q", title="loss", scale=scale, axis=alt.Axis(tickCount=4))
    low = alt.Y("low:Q", title="loss", scale=scale)
    tips = ["arm:N", "step:Q", tooltip("mean", "loss", ".3f")]

    shown = alt.Chart(data(rows))
    band = shown.mark_area(opacity=0.2).encode(x=x, y=low, y2="high:Q")
    line = shown.mark_line().encode(x=x, y=y, tooltip=tips)
    dashes = alt.Chart(data(plain)).mark_line(strokeDash=[4, 3], color=MUTED).encode(x=x, y=y)
    chart: alt.TopLevelMixin = alt.layer(band, dashes, line).properties(
        width="container", height=170
    )
    return chart


def rate_curves(
    figures_by_arm: Mapping[str, Mapping[float, float]],
    best: Mapping[str, float],
    measure: str,
) -> Figure:
    """Returns a chart of the figure on the tuning rows over the learning rate, one for each arm.

    Args:
        figures_by_arm: arm → rate → figure; infinite if the trial did not end well.
        best: arm → its best rate.
        measure: what the figure is: "loss", or the metric that decides.
    """
    words, higher = words_of(measure), sign_of(measure) > 0
    finite = [
        figure
        for figures in figures_by_arm.values()
        for figure in figures.values()
        if math.isfinite(figure)
    ]
    low, top = min(finite, default=0.0), max(finite, default=1.0)
    if finite and not higher:  # one very bad rate must not flatten all curves
        top = min(top, low + 4 * (statistics.median(finite) - low) + 0.2)
    panels = {name: _rate_panel(f, (low, top), words) for name, f in figures_by_arm.items()}
    rates = ", ".join(f"{name} {rate:g}" for name, rate in best.items())
    outside = "did not end well" if higher else "ended above the chart or did not end well"
    caption = (
        f"The {words} on the tuning rows after a run with the first seed at each learning rate. A "
        f"triangle at the top is a run that {outside}. The best: {rates}."
    )
    return Figure("Learning-rate sweeps", caption, panels, _rate_table(figures_by_arm, words))


def _rate_table(figures_by_arm: Mapping[str, Mapping[float, float]], words: str) -> Table:
    cells = [
        [name, rate, figure if math.isfinite(figure) else Cell("did not end well")]
        for name, figures in figures_by_arm.items()
        for rate, figure in sorted(figures.items())
    ]
    columns = [
        Column("arm", numeric=False),
        Column("learning rate"),
        Column(f"{words} on the tuning rows"),
    ]
    return Table("Learning-rate sweeps", columns, cells)


def _rate_panel(
    figures: Mapping[float, float], span: tuple[float, float], words: str
) -> alt.TopLevelMixin:
    low, top = span
    rows = [
        {
            "lr": lr,
            "figure": min(figure, top),
            "shown": f"{figure:.3f}" if math.isfinite(figure) else "none",
            "seen": figure <= top,
        }
        for lr, figure in sorted(figures.items())
    ]
    axis = alt.Axis(format=".0e", tickCount=3, grid=False)
    padded = alt.Scale(type="log", padding=12)
    x = alt.X("lr:Q", title="learning rate", scale=padded, axis=axis)
    scale = alt.Scale(domain=[low, top], nice=True)
    y = alt.Y("figure:Q", title=words, scale=scale, axis=alt.Axis(tickCount=4))
    shapes = alt.Scale(domain=[True, False], range=["circle", "triangle-up"])
    shape = alt.Shape("seen:N", scale=shapes, legend=None)
    tips = [tooltip("lr", "learning rate", ".2~g"), tooltip("shown", words, kind="N")]

    shown = alt.Chart(data(rows))
    dots = shown.mark_point(filled=True, size=45, opacity=1)
    line = shown.mark_line(strokeWidth=1.5).encode(x=x, y=y)
    chart: alt.TopLevelMixin = alt.layer(
        line, dots.encode(x=x, y=y, shape=shape, tooltip=tips)
    ).properties(width="container", height=150)
    return chart
