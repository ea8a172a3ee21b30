"""The curves of several runs over their steps, as tables for plots."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorakin.errors import DataError
from lorakin.ui import runs

MOST_POINTS = 1000
"""Points of a curve that are drawn; a longer one is thinned out."""
CURVES: dict[str, dict[str, tuple[str, float]]] = {
    "loss": {"loss": ("", 1.0), "eval_loss": (", held out", 1.0)},
    "learning rate": {"learning_rate": ("", 1.0)},
    "gradient norm": {"grad_norm": ("", 1.0)},
    "memory in GiB": {"memory_bytes": ("", 2.0**-30)},
}
"""A plot's title → the metric's name → what is put after the run's name, and a factor."""


def tables_of(folders: Sequence[Path]) -> list[pd.DataFrame]:
    """Returns a table for each of `CURVES`, with the columns step, value and run.

    >>> [list(table.columns) for table in tables_of([])][0]
    ['step', 'value', 'run']
    """
    rows: dict[Path, list[dict[str, Any]]] = {}
    for folder in folders:
        with contextlib.suppress(DataError):  # the list of runs says it
            rows[folder] = runs.metrics_rows(folder)
    return [
        pd.DataFrame(
            [
                [row["step"], row[name] * factor, folder.name + after]
                for folder, of in rows.items()
                for name, (after, factor) in metrics.items()
                for row in _thinned([one for one in of if name in one])
            ],
            columns=["step", "value", "run"],
        )
        for metrics in CURVES.values()
    ]


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    every = -(-len(rows) // MOST_POINTS) or 1
    return [*rows[:-1:every], *rows[-1:]]
