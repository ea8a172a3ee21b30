"""The table of `lorakin plan`: a row for each method that can run."""

from __future__ import annotations

from collections.abc import Iterator

from lorakin.plan.advice import Advice
from lorakin.plan.memory import size
from lorakin.plan.prediction import Plan

TITLES = (
    "method", "rank", "trained", "adapter", "optimizer", "activ.", "peak", "step ×", "fits",
)  # fmt: skip


def cells_of(advice: Advice) -> Iterator[list[str]]:
    """Yields the cells of each method that can run, under `TITLES`."""
    for row in advice.rows:
        if row.plan is not None:
            yield _cells(row.plan, row.fits)


def _cells(plan: Plan, fits: bool | None) -> list[str]:
    return [
        plan.method + ("*" if plan.supposed else ""),
        "" if plan.rank is None else str(plan.rank),
        f"{plan.trainable_parameters:,}",
        size(plan.adapter_bytes),
        size(plan.optimizer_bytes),
        size(plan.activation_bytes),
        size(plan.peak),
        f"{plan.step:.2f}",
        {True: "✔", False: "✗", None: "?"}[fits],
    ]
