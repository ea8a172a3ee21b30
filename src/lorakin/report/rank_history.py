"""Pictures of how a method moves its budget of ranks while it trains."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import altair as alt

from lorakin.report.heatmaps import distinct_names
from lorakin.report.page import Column, Figure, Table
from lorakin.report.vega import BARE, ROW_HEIGHT, colour, data, tooltip

STEP = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1))

History = Sequence[tuple[int, Mapping[str, int]]]
"""(step, path → rank), in the order of the steps."""


def ranks_over_time(history: History) -> list[Figure]:
    """Returns pictures of the ranks over the steps: their sum, and means by module and by layer.

    A picture of means is left out if there is only one module or one layer.
    """
    names = distinct_names(history[-1][1])
    by_module = {path: module for path, (_, module) in names.items()}
    by_layer = {path: layer for path, (layer, _) in names.items()}
    means = [
        _mean_ranks(what, history, group)
        for what, group in (("module", by_module), ("layer", by_layer))
        if len(set(group.values())) > 1
    ]
    return [_sum_of_ranks(history), *means]


def _sum_of_ranks(history: History) -> Figure:
    totals = [(step, sum(at.values())) for step, at in history]
    (first, before), (last, after) = totals[0], totals[-1]
    chart = (
        alt.Chart(data([{"step": step, "total": total} for step, total in totals]))
        .mark_line(interpolate="step-after", point=True)
        .encode(x=STEP, y=alt.Y("total:Q", title="ranks in all"), tooltip=["step:Q", "total:Q"])
        .properties(width="container", height=220)
    )
    return Figure(
        "Ranks in all over the steps",
        f"The sum of all modules' ranks: {before:,} at step {first:,}, {after:,} at step {last:,}.",
        chart,
        Table("Ranks in all", [Column("step"), Column("ranks in all")], totals),
    )


def _mean_ranks(what: str, history: History, group: Mapping[str, str]) -> Figure:
    """Returns a picture with a band for each group of modules; `group` is path → its group."""
    names = list(dict.fromkeys(group.values()))
    means = [(step, _means(at, group)) for step, at in history]
    table = Table(
        f"Mean rank by {what}",
        [Column("step"), *map(Column, names)],
        [[step, *(mean[name] for name in names)] for step, mean in means],
    )

    (start, first), (end, last) = means[0], means[-1]
    grown = sorted(names, key=lambda name: last[name] - first[name])
    least, most = grown[0], grown[-1]
    caption = (
        f"The mean rank by {what}, from step {start:,} to {end:,}. {what.capitalize()} `{least}` "
        f"lost most: {first[least]:.3g} became {last[least]:.3g}. `{most}` kept most: "
        f"{first[most]:.3g} became {last[most]:.3g}."
    )
    return Figure(f"Mean rank by {what} over the steps", caption, _bands(what, means), table)


def _means(ranks: Mapping[str, int], group: Mapping[str, str]) -> dict[str, float]:
    """Returns group → mean rank of its modules."""
    members: dict[str, list[int]] = {}
    for path, name in group.items():
        members.setdefault(name, []).append(ranks[path])
    return {name: statistics.fmean(group_ranks) for name, group_ranks in members.items()}


def _bands(what: str, means: Sequence[tuple[int, Mapping[str, float]]]) -> alt.Chart:
    """Draws a row for each group, coloured by its mean rank from each step to the next."""
    names, steps = list(means[0][1]), [step for step, _ in means]
    # The last step has no next one; its piece is as wide as the one before.
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    ends = [*steps[1:], steps[-1] + width]
    rows = [
        {"step": step, "end": end, what: name, "mean": mean}
        for (step, at), end in zip(means, ends, strict=True)
        for name, mean in at.items()
    ]
    title = None if what == "module" else what
    encoded = (
        alt.Chart(data(rows))
        .mark_rect(strokeWidth=0)
        .encode(
            x=STEP,
            x2="end:Q",
            y=alt.Y(f"{what}:N", sort=names, title=title, axis=BARE),
            color=colour("mean", "mean rank", ".3~g", from_zero=True),
            tooltip=[f"{what}:N", "step:Q", tooltip("mean", "mean rank", ".3~g")],
        )
    )
    height = len(names) * (ROW_HEIGHT if len(names) < 12 else 15)
    chart: alt.Chart = encoded.properties(width="container", height=height)
    return chart
