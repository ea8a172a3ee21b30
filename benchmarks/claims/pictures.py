"""The study's pictures: quality against size, memory and time; ranks over tasks; curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.claims.analysis import Evidence, critical_difference, ranks
from benchmarks.claims.judges import ratio

AXES = {"trained": "trained parameters", "memory": "memory", "time": "time of a step"}
REFERENCE = "lora"
LINES = [(color, dash) for dash in ("-", "--") for color in range(10)]
"""A colour of matplotlib's cycle and a dash for each curve."""


def pareto(evidence: Sequence[Evidence], names: Sequence[str], path: Path) -> None:
    """Draws quality against trained parameters, memory and time, each × plain LoRA's.

    Quality is the part of LoRA's improvement over the base or a constant answer, from the difference
    by seed; the mean over tasks.
    An arm on the line is beaten by none in both.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for place, (name, title) in zip(axes, AXES.items(), strict=True):
        points = {arm: point for arm in names if (point := _point(evidence, arm, name)) is not None}
        for arm, (x, y) in points.items():
            place.plot(x, y, "o", color="tab:orange" if arm == REFERENCE else "tab:blue")
            place.annotate(arm, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        best = front(list(points.values()))
        place.plot(*zip(*best, strict=True), color="grey", linewidth=1)
        place.set_xlabel(f"{title}, × LoRA's")
        if name == "trained":
            place.set_xscale("log")
    axes[0].set_ylabel("part of LoRA's improvement")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other beats in both: less of x, more of y; from left to right.

    >>> front([(1.0, 1.0), (2.0, 0.5), (3.0, 2.0)])
    [(1.0, 1.0), (3.0, 2.0)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def _point(evidence: Sequence[Evidence], arm: str, figure: str) -> tuple[float, float] | None:
    shares, ratios = [], []
    for e in evidence:
        standing, x = e.standings.get(arm), ratio(e, arm, figure)
        if standing is not None and standing.share is not None and x:
            shares.append(standing.share)
            ratios.append(math.log(x))
    return (math.exp(statistics.fmean(ratios)), statistics.fmean(shares)) if shares else None


def critical_differences(evidence: Sequence[Evidence], names: Sequence[str], path: Path) -> None:
    """Draws the mean ranks of the arms over the tasks, with the difference that would be seen."""
    plt = _pyplot()
    found = sorted(ranks(evidence, names).items(), key=lambda item: item[1])
    width = critical_difference(len(names), len(evidence))
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1.2), layout="constrained")
    for row, (name, rank) in enumerate(found):
        color = "tab:orange" if name == REFERENCE else "tab:blue"
        axes.plot([rank - width / 2, rank + width / 2], [row, row], color=color, alpha=0.4)
        axes.plot(rank, row, "o", color=color)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"mean rank over {len(evidence)} tasks; bars that do not meet differ (Nemenyi, 5 %)"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(evidence: Sequence[Evidence], names: Sequence[str], path: Path) -> None:
    """Draws each task's loss on the tuning rows during the runs, the mean over seeds."""
    plt = _pyplot()
    columns = min(3, len(evidence))
    rows = math.ceil(len(evidence) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for place, e in zip(axes.flat, evidence, strict=False):
        for name, (color, dash) in zip(names, LINES, strict=False):
            runs = [row.curve for row in e.standings[name].done] if name in e.standings else []
            runs = [curve for curve in runs if curve]
            if runs:
                steps = [step for step, _ in runs[0]]
                losses = [
                    statistics.fmean(at)
                    for at in zip(*([v for _, v in c] for c in runs), strict=True)
                ]
                wide = 2.5 if name == REFERENCE else 1
                place.plot(steps, losses, f"C{color}", linestyle=dash, linewidth=wide, label=name)
        place.set_title(e.task.title, fontsize=9)
        place.set_xlabel("step")
    axes[0][0].set_ylabel("loss on the tuning rows")
    for place in list(axes.flat)[len(evidence) :]:
        place.axis("off")
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
