"""Short forms of Vega-Lite that several charts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

ROW_HEIGHT = 28
"""Pixels of a module's row."""
LEGEND_LENGTH = alt.ExprRef("min(180, width / 2)")
BARE = alt.Axis(ticks=False, domain=False, labelLimit=140)
"""An axis of names, without lines."""
MUTED = "var(--muted)"
"""The page's grey, light or dark."""


def data(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    """Returns rows as a chart's data, inside the chart."""
    return alt.InlineData(values=list(rows))


def tooltip(
    field: str, title: str, form: str | None = None, kind: Literal["Q", "N"] = "Q"
) -> alt.Tooltip:
    """Returns a line of a tooltip.

    Args:
        field: a key of the rows.
        title: what the reader sees.
        form: a number format of d3, such as ".3f".
        kind: "Q" for numbers, "N" for names.
    """
    return alt.Tooltip(f"{field}:{kind}", title=title, format=form or alt.Undefined)


def colour(field: str, title: str, form: str, *, from_zero: bool = False) -> alt.Color:
    """Returns a colour scale for numbers, with its legend; `from_zero` begins it at 0."""
    legend = alt.Legend(
        format=form, gradientLength=LEGEND_LENGTH, gradientThickness=12, tickCount=4
    )
    scale = alt.Scale(domainMin=0) if from_zero else alt.Undefined
    return alt.Color(f"{field}:Q", title=title, scale=scale, legend=legend)
