"""Figures as plain data, and paths of modules, for the tests of pictures."""

from __future__ import annotations

from typing import Any

from lorakin.report import page
from lorakin.report.page import Figure, TableRow

MODULES = [f"self_attn.{m}_proj" for m in "qkvo"] + [
    f"mlp.{m}_proj" for m in ("gate", "up", "down")
]
PATHS = [f"model.layers.{layer}.{module}" for layer in range(30) for module in MODULES]


def rows_of(figure: Figure) -> list[dict[str, Any]]:
    """The data that a figure's only chart draws."""
    assert not isinstance(figure.chart, dict)
    (rows,) = figure.chart.to_dict()["datasets"].values()  # type: ignore[union-attr]
    return list(rows)


def cells_of(figure: Figure) -> list[list[page.Value]]:
    return [list(row.cells if isinstance(row, TableRow) else row) for row in figure.data.rows]
