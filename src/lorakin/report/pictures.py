"""Pictures of an adapter from plain data, each a `page.Figure`: how much, at what rank, and how its modules change.

Modules are told by their paths, as in "model.layers.12.self_attn.q_proj", and shown by layer and by what they are in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from lorakin.report.page import Cell, Column, Figure, Table, Value
from lorakin.storage.summary import place_of

ROW = 28
"""The height of a module's row, in pixels."""
LEGEND = alt.ExprRef("min(180, width / 2)")
ACROSS = alt.Axis(labelAngle=0, labelOverlap="parity", labelSeparation=6, ticks=False, domain=False)
BARE = alt.Axis(ticks=False, domain=False, labelLimit=140)
STEP = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1))


class ColourScale(NamedTuple):
    """What a colour tells: its name, and how a value is written, in d3's words and in Python's."""

    title: str
    format: str
    python: str

    def shown(self, value: float) -> str:
        return self.python.format(value)


def change_by_layer(
    values: Mapping[str, float], *, of: str = "ΔW", relative: bool = False, note: str = ""
) -> Figure:
    """How much each module changes: path → ‖ΔW‖ (Frobenius), or, if `relative`, ‖ΔW‖/‖W‖. The `note` ends the caption."""
    scale = ColourScale(f"‖{of}‖ / ‖W‖" if relative else f"‖{of}‖", ".3~g", "{:.3g}")
    said = f"The Frobenius norm of each module's change{', relative to that of its weight' if relative else ''}. "
    return _heatmap(
        f"{scale.title} by layer and module",
        f"{said}{_extremes(values, scale)} {note}".strip(),
        values,
        scale,
    )


def effective_ranks(values: Mapping[str, float]) -> Figure:
    """How many directions each module's change spreads over: path → `spectrum.effective_rank`."""
    scale = ColourScale("effective rank", ".2~f", "{:.2f}")
    caption = (
        "The exponential of the entropy of each change's singular values: 1 if all of it lies in one direction, the pair's "
        f"rank if it is spread evenly. {_extremes(values, scale)}"
    )
    return _heatmap("Effective rank by layer and module", caption, values, scale)


def ranks(
    values: Mapping[str, int], *, title: str = "Rank by layer and module", note: str = ""
) -> Figure:
    """The rank of each module's pair: path → rank. The `note` ends the caption."""
    counts = sorted(Counter(values.values()).items())
    said = ", ".join(f"rank {rank} in {number}" for rank, number in counts[:8]) + (
        " and others" if len(counts) > 8 else ""
    )
    caption = (
        f"Of {len(values)} modules: {said}; {sum(values.values()):,} ranks in all. {note}".strip()
    )
    return _heatmap(title, caption, values, ColourScale("rank", "d", "{:d}"), numbers=True)


def importance(found: Mapping[str, float], own: Collection[str]) -> Figure:
    """What a probe found: path → share of the importance. A dot marks the modules in `own`, which keep a pair of their own."""
    share = sum(found[path] for path in own if path in found)
    caption = (
        f"Each module's share of the importance that a short probe found. The {len(own)} of {len(found)} modules with a dot "
        f"keep a pair of their own; together they have {share:.1%} of the importance."
    )
    return _heatmap(
        "Importance by layer and module",
        caption,
        found,
        ColourScale("share", ".2~%", "{:.2%}"),
        dots=frozenset(own),
    )


def _extremes(values: Mapping[str, float], scale: ColourScale) -> str:
    known = {path: value for path, value in values.items() if math.isfinite(value)}
    if not known:
        return "None is known."
    most, least = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
    middle = float(np.median(list(known.values())))
    return (
        f"The largest is {scale.shown(known[most])}, in `{most}`; the smallest {scale.shown(known[least])}, in `{least}`; "
        f"the median {scale.shown(middle)}."
    )


def ranks_over_time(history: Sequence[tuple[int, Mapping[str, int]]]) -> list[Figure]:
    """How a budget of ranks moves, from (step, path → rank) in the order of the steps: in all, by module, and by layer."""
    steps, totals = [step for step, _ in history], [sum(at.values()) for _, at in history]
    rows = [{"step": step, "total": total} for step, total in zip(steps, totals, strict=True)]
    budget = Figure(
        "Ranks in all over the steps",
        f"The sum of all modules' ranks: {totals[0]:,} at step {steps[0]:,}, {totals[-1]:,} at step {steps[-1]:,}.",
        alt.Chart(_data(rows))
        .mark_line(interpolate="step-after", point=True)
        .encode(x=STEP, y=alt.Y("total:Q", title="ranks in all"), tooltip=["step:Q", "total:Q"])
        .properties(width="container", height=220),
        Table(
            "Ranks in all",
            [Column("step"), Column("ranks in all")],
            list(zip(steps, totals, strict=True)),
        ),
    )
    places = places_of(history[-1][1])
    groups = {
        what: {path: place[n] for path, place in places.items()}
        for n, what in ((1, "module"), (0, "layer"))
    }
    more = [
        _mean_ranks(what, history, group)
        for what, group in groups.items()
        if len(set(group.values())) > 1
    ]
    return [budget, *more]


def _mean_ranks(
    what: str, history: Sequence[tuple[int, Mapping[str, int]]], group: Mapping[str, str]
) -> Figure:
    """The mean rank of each group of modules at each step: a band for each, from a step to the next."""
    names = list(dict.fromkeys(group.values()))
    means = [
        (
            step,
            {
                name: float(np.mean([rank for path, rank in at.items() if group[path] == name]))
                for name in names
            },
        )
        for step, at in history
    ]
    ends = [step for step, _ in means[1:]]
    ends.append(means[-1][0] + (means[-1][0] - means[-2][0] if len(means) > 1 else 1))
    rows = [
        {"step": step, "end": end, what: name, "mean": mean}
        for (step, at), end in zip(means, ends, strict=True)
        for name, mean in at.items()
    ]
    chart = (
        alt.Chart(_data(rows))
        .mark_rect(strokeWidth=0)
        .encode(
            x=STEP,
            x2="end:Q",
            y=alt.Y(f"{what}:N", sort=names, title=None if what == "module" else what, axis=BARE),
            color=_colour("mean", "mean rank", ".3~g", from_zero=True),
            tooltip=[
                f"{what}:N",
                "step:Q",
                alt.Tooltip("mean:Q", format=".3~g", title="mean rank"),
            ],
        )
        .properties(width="container", height=len(names) * (ROW if len(names) < 12 else 15))
    )
    first, last = means[0][1], means[-1][1]
    grown = sorted(names, key=lambda name: last[name] - first[name])
    caption = (
        f"The mean rank by {what}, from step {means[0][0]:,} to {means[-1][0]:,}. {what.capitalize()} `{grown[0]}` lost most: "
        f"{first[grown[0]]:.3g} became {last[grown[0]]:.3g}. `{grown[-1]}` kept most: {first[grown[-1]]:.3g} became "
        f"{last[grown[-1]]:.3g}."
    )
    columns = [Column("step"), *(Column(name) for name in names)]
    table = Table(f"Mean rank by {what}", columns, [[step, *at.values()] for step, at in means])
    return Figure(f"Mean rank by {what} over the steps", caption, chart, table)


class Point(NamedTuple):
    """How a module's weight has changed by a step: the mean change of its magnitudes, and of its directions (1 − cosine)."""

    arm: str
    layer: str
    module: str
    step: int
    magnitude: float
    direction: float


class Correlation(NamedTuple):
    """Pearson's r and the least-squares line; NaN where there are too few points, or one of the two does not vary."""

    r: float
    slope: float
    intercept: float


def correlation(points: Sequence[Point]) -> Correlation:
    """How the change of magnitude goes with that of direction."""
    x, y = (
        np.array([getattr(point, name) for point in points], float)
        for name in ("direction", "magnitude")
    )
    if len(points) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, math.nan)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return Correlation(float(np.corrcoef(x, y)[0, 1]), slope, float(y.mean() - slope * x.mean()))


def magnitude_direction(points: Sequence[Point]) -> Figure:
    """DoRA's picture (arXiv 2402.09353, figure 2): ΔM against ΔD of every module at some steps, a panel for each arm."""
    arms = list(dict.fromkeys(point.arm for point in points))
    of = {arm: [point for point in points if point.arm == arm] for arm in arms}
    found = {arm: correlation(of[arm]) for arm in arms}
    x = alt.X("direction:Q", title="ΔD", axis=alt.Axis(tickCount=4, format=".3~g"))
    y = alt.Y("magnitude:Q", title="ΔM", axis=alt.Axis(tickCount=5, format=".3~g"))
    steps = sorted({point.step for point in points})
    said = "; ".join(f"**{arm}** {_signed(found[arm].r)}" for arm in arms)
    caption = (
        f"Every point is a module at one of the steps {', '.join(map(str, steps))}: to the right the change of its direction, "
        "ΔD, upwards that of its magnitude, ΔM, each panel on its own scales. The shape tells the step, the colour the layer; "
        f"the line is the least-squares fit. Correlation of the two: {said}. DoRA's paper found, for the query weights of a "
        "larger model, −0.62 with full fine-tuning, +0.83 with LoRA and −0.31 with DoRA."
    )
    charts = {
        f"{arm}: r = {_signed(found[arm].r)}": _scatter(of[arm], found[arm], x, y, steps)
        for arm in arms
    }
    return Figure("Change of magnitude and of direction", caption, charts, _points_table(of))


def _scatter(
    points: Sequence[Point], line: Correlation, x: alt.X, y: alt.Y, steps: Sequence[int]
) -> alt.TopLevelMixin:
    rows = [
        point._asdict() | ({"depth": int(point.layer)} if point.layer.isdigit() else {})
        for point in points
    ]
    tips = [
        "layer:N",
        "module:N",
        "step:O",
        _tip("magnitude", "ΔM", ".3~g"),
        _tip("direction", "ΔD", ".3~g"),
    ]
    shape = alt.Shape("step:N", scale=alt.Scale(domain=list(steps)), legend=alt.Legend(columns=4))
    dots = (
        alt.Chart(_data(rows))
        .mark_point(filled=True, size=34, opacity=0.9, stroke="var(--muted)", strokeWidth=0.4)
        .encode(x=x, y=y, shape=shape, tooltip=tips)
    )
    if all("depth" in row for row in rows):
        dots = dots.encode(color=_colour("depth", "layer", "d"))
    ends = [min(p.direction for p in points), max(p.direction for p in points)]
    fitted = [
        {"direction": end, "magnitude": line.intercept + line.slope * end}
        for end in ends
        if math.isfinite(line.r)
    ]
    drawn = alt.Chart(_data(fitted)).mark_line(color="var(--series-2)", clip=True).encode(x=x, y=y)
    chart: alt.TopLevelMixin = alt.layer(dots, drawn).properties(width="container", height=240)
    return chart


def _points_table(of: Mapping[str, Sequence[Point]]) -> Table:
    """Means over the layers: thousands of points are no table to read."""
    rows: list[list[Value]] = []
    for arm, points in of.items():
        groups: dict[tuple[int, str], list[Point]] = {}
        for point in points:
            groups.setdefault((point.step, point.module), []).append(point)
        for (step, module), group in groups.items():
            means = [
                float(np.mean([getattr(p, name) for p in group]))
                for name in ("magnitude", "direction")
            ]
            rows.append(
                [arm, step, module, len(group), *means, Cell(_signed(r := correlation(group).r), r)]
            )
    columns = [Column("arm", numeric=False), Column("step"), Column("module", numeric=False)]
    columns += [Column("points"), Column("mean ΔM"), Column("mean ΔD"), Column("correlation")]
    return Table("Means over the layers, by step and module", columns, rows)


def _heatmap(
    title: str,
    caption: str,
    values: Mapping[str, float],
    what: ColourScale,
    *,
    numbers: bool = False,
    dots: Collection[str] = (),
) -> Figure:
    """Values by layer (across) and module (down), with their `numbers` where there is room, and `dots` on some modules."""
    places = places_of(values)
    rows = [
        {
            "layer": places[path][0],
            "module": places[path][1],
            "value": value,
            "path": path,
            "dot": path in dots,
        }
        for path, value in values.items()
    ]
    layers, kinds = _layers(places), list(dict.fromkeys(kind for _, kind in places.values()))
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("layer:O", sort=layers, title="layer", axis=ACROSS),
        y=alt.Y("module:N", sort=kinds, title=None, axis=BARE),
        tooltip=[_tip("path", "module", kind="N"), _tip("value", what.title, what.format)],
    )
    colour = _colour("value", what.title, what.format, from_zero=True)
    chart = [base.mark_rect().encode(color=colour)]
    half = 0.55 * max((value for value in values.values() if math.isfinite(value)), default=0.0)
    ink = alt.condition(f"datum.value > {half}", alt.value("var(--paper)"), alt.value("var(--ink)"))
    if numbers:
        fits = alt.ExprRef("bandwidth('x') < 20 ? 0 : 1")
        chart.append(
            base.mark_text(fontSize=11, opacity=fits).encode(
                text=alt.Text("value:Q", format=what.format), color=ink
            )
        )
    if dots:
        size = alt.ExprRef("min(60, pow(bandwidth('x') / 2, 2))")
        marked = base.transform_filter("datum.dot").mark_point(
            filled=True, shape="circle", opacity=1, size=size
        )
        chart.append(marked.encode(color=ink))
    cells = {
        path: Cell(what.shown(value) + (" •" if path in dots else ""), value)
        for path, value in values.items()
    }
    drawn = alt.layer(*chart).properties(width="container", height=ROW * len(kinds))
    return Figure(
        title,
        caption,
        drawn,
        _table_by_layer(f"{what.title} by layer", cells, places, layers, kinds),
    )


def _table_by_layer(
    caption: str,
    cells: Mapping[str, Cell],
    places: Mapping[str, tuple[str, str]],
    layers: Sequence[str],
    kinds: Sequence[str],
) -> Table:
    at = {place: cells[path] for path, place in places.items()}
    rows = [
        [_layer(layer), *(at.get((layer, kind), Cell("")) for kind in kinds)] for layer in layers
    ]
    return Table(caption, [Column("layer"), *map(Column, kinds)], rows)


def places_of(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Path → (layer, module), no two alike; the module by its last word where that tells."""
    found = {path: place_of(path) for path in paths}
    if len(set(found.values())) < len(found):  # two towers, whose layers have the same numbers
        found = {
            path: (layer, path.replace(f".{layer}.", ".", 1)) for path, (layer, _) in found.items()
        }
    short = {name: name.rpartition(".")[2] for _, name in found.values()}
    if len(set(short.values())) < len(short):
        return found
    return {path: (layer, short[name]) for path, (layer, name) in found.items()}


def _layers(places: Mapping[str, tuple[str, str]]) -> list[str]:
    names = dict.fromkeys(layer for layer, _ in places.values())
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))


def _layer(name: str) -> Cell:
    return Cell(name, float(name) if name.isdigit() else None)


def _data(rows: list[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _tip(field: str, title: str, form: str | None = None, kind: str = "Q") -> alt.Tooltip:
    return (
        alt.Tooltip(f"{field}:{kind}", title=title, format=form)
        if form
        else alt.Tooltip(f"{field}:{kind}", title=title)
    )


def _colour(field: str, title: str, form: str, *, from_zero: bool = False) -> alt.Color:
    legend = alt.Legend(format=form, gradientLength=LEGEND, gradientThickness=12, tickCount=4)
    return alt.Color(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(domainMin=0) if from_zero else alt.Undefined,
        legend=legend,
    )


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−") if math.isfinite(number) else "not defined"
