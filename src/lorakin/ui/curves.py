"""The curves of several runs over their steps."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from lorakin.errors import DataError
from lorakin.ui import runs

MOST_POINTS = 500
"""Points of a curve that are drawn; a longer one is thinned out."""
CURVES: dict[str, dict[str, tuple[str, float]]] = {
    "loss": {"loss": ("training", 1.0), "eval_loss": ("held out", 1.0)},
    "learning rate": {"learning_rate": ("", 1.0)},
    "gradient norm": {"grad_norm": ("", 1.0)},
    "memory in GiB": {"memory_bytes": ("", 2.0**-30)},
}
"""A plot's title → the metric's name → what the curve is, and a factor."""
HEIGHT = 180


def charts_of(folders: Sequence[Path]) -> list[Any]:
    """Returns a chart for each of `CURVES`, with a colour for each run.

    >>> len(charts_of([]))
    4
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        with contextlib.suppress(DataError):  # the list of runs says it
            rows[folder.name] = runs.metrics_rows(folder)
    return [_chart(title, metrics, rows) for title, metrics in CURVES.items()]


def _chart(
    title: str,
    metrics: dict[str, tuple[str, float]],
    runs_rows: dict[str, list[dict[str, Any]]],
) -> Any:
    points = [
        (row["step"], row[name] * factor, run, of)
        for run, rows in runs_rows.items()
        for name, (of, factor) in metrics.items()
        for row in _thinned([one for one in rows if name in one])
    ]
    whole = alt.Axis(format="d", tickMinStep=1)
    lines: dict[str, Any] = {
        "orient": "bottom",
        "title": None,
        "symbolType": "stroke",
        "symbolSize": 400,
    }
    kinds = alt.Legend(**lines, symbolStrokeColor="grey") if len(metrics) > 1 else None
    # Filled points would take the strokes from the legend of dashes.
    chart = alt.Chart(_data(points)).mark_line(point={"size": 8, "filled": False})
    return chart.encode(
        x=alt.X("step:Q", axis=whole),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("run:N", legend=alt.Legend(**lines), sort=None),
        strokeDash=alt.StrokeDash("of:N", legend=kinds, sort=None),
        tooltip=["run:N", "step:Q", "value:Q"],
    ).properties(**shape(f"{title}, by step"))


def _data(points: Sequence[tuple[Any, ...]]) -> Any:
    """Returns points as CSV: Altair would check each value of a list, which is slow."""
    text = io.StringIO()
    csv.writer(text).writerows([("step", "value", "run", "of"), *points])
    numbers = {"step": "number", "value": "number"}
    return alt.InlineData(
        values=text.getvalue(), format=alt.CsvDataFormat(type="csv", parse=numbers)
    )


def shape(description: str) -> dict[str, Any]:
    """Returns the properties of a chart that fills its place on the page.

    >>> shape("loss, by step")["width"]
    'container'
    """
    options = {"embedOptions": {"actions": False}}
    return {
        "width": "container", "height": HEIGHT, "usermeta": options, "description": description,
        "background": "transparent", "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 5, "right": 15, "top": 5, "bottom": 5},
    }  # fmt: skip


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    every = -(-len(rows) // MOST_POINTS) or 1
    return [*rows[:-1:every], *rows[-1:]]
