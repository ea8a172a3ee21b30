"""Pictures of an adapter's modules by layer: how much they change, at which rank, how important.

The functions take values by module path, such as "model.layers.12.self_attn.q_proj", and return
a `page.Figure`. Layers go across and modules down.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import altair as alt

from lorakin.report.page import Cell, Column, Figure, Table
from lorakin.report.vega import BARE, ROW_HEIGHT, colour, data, tooltip
from lorakin.storage.summary import layer_and_name

ACROSS = alt.Axis(labelAngle=0, labelOverlap="parity", labelSeparation=6, ticks=False, domain=False)


class ColourScale(NamedTuple):
    """What a colour means: a title, and the format of a value for d3 and for Python."""

    title: str
    format: str
    python: str

    def shown(self, value: float) -> str:
        """Writes a value."""
        return self.python.format(value)


def change_by_layer(
    values: Mapping[str, float], *, of: str = "ΔW", relative: bool = False, note: str = ""
) -> Figure:
    """Returns a picture of how much each module changes.

    Args:
        values: path → ‖ΔW‖ (Frobenius), or ‖ΔW‖ / ‖W‖ if `relative`.
        of: the name of the change.
        relative: whether the values are relative to the weights.
        note: ends the caption.
    """
    scale = ColourScale(f"‖{of}‖ / ‖W‖" if relative else f"‖{of}‖", ".3~g", "{:.3g}")
    to_weight = ", relative to that of its weight" if relative else ""
    caption = (
        f"The Frobenius norm of each module's change{to_weight}. {_extremes(values, scale)} {note}"
    )
    return _heatmap(f"{scale.title} by layer and module", caption.strip(), values, scale)


def effective_ranks(values: Mapping[str, float]) -> Figure:
    """Returns a picture of how many directions each module's change spreads over.

    Args:
        values: path → `spectrum.effective_rank`.
    """
    scale = ColourScale("effective rank", ".2~f", "{:.2f}")
    caption = (
        "The exponential of the entropy of each change's singular values: 1 if the change has one "
        "direction, the pair's rank if it is spread evenly over all. "
        f"{_extremes(values, scale)}"
    )
    return _heatmap("Effective rank by layer and module", caption, values, scale)


def ranks(
    values: Mapping[str, int], *, title: str = "Rank by layer and module", note: str = ""
) -> Figure:
    """Returns a picture of the rank of each module's pair; `note` ends the caption.

    >>> ranks({"layers.0.q_proj": 8, "layers.1.q_proj": 4}).caption
    'Of 2 modules: rank 4 in 1, rank 8 in 1; 12 ranks in all.'

    Args:
        values: path → rank.
        title: of the picture.
        note: ends the caption.
    """
    counts = sorted(Counter(values.values()).items())
    common = ", ".join(f"rank {rank} in {number}" for rank, number in counts[:8])
    others = " and others" if len(counts) > 8 else ""
    caption = (
        f"Of {len(values)} modules: {common}{others}; {sum(values.values()):,} ranks in all. {note}"
    )
    scale = ColourScale("rank", "d", "{:d}")
    return _heatmap(title, caption.strip(), values, scale, numbers=True)


def importance(shares: Mapping[str, float], private: Collection[str]) -> Figure:
    """Returns a picture of the importance that a probe found.

    Args:
        shares: path → share of the importance.
        private: paths of the modules that keep their own pair; a dot marks them.
    """
    kept = sum(shares[path] for path in private if path in shares)
    caption = (
        f"Each module's share of the importance that a short probe found. The {len(private)} of "
        f"{len(shares)} modules with a dot keep their own pair; together they have {kept:.1%} of "
        "the importance."
    )
    scale = ColourScale("share", ".2~%", "{:.2%}")
    title = "Importance by layer and module"
    return _heatmap(title, caption, shares, scale, dots=frozenset(private))


def _extremes(values: Mapping[str, float], scale: ColourScale) -> str:
    finite = {path: value for path, value in values.items() if math.isfinite(value)}
    if not finite:
        return "None is known."
    most, least = max(finite, key=finite.__getitem__), min(finite, key=finite.__getitem__)
    return (
        f"The largest is {scale.shown(finite[most])}, in `{most}`; the smallest "
        f"{scale.shown(finite[least])}, in `{least}`; the median "
        f"{scale.shown(statistics.median(finite.values()))}."
    )


def _heatmap(
    title: str,
    caption: str,
    values: Mapping[str, float],
    scale: ColourScale,
    *,
    numbers: bool = False,
    dots: Collection[str] = (),
) -> Figure:
    """Returns a heat map; with `numbers` in the cells where they fit, with `dots` on some."""
    names = distinct_names(values)
    layers, modules = _layers(names), list(dict.fromkeys(name for _, name in names.values()))
    rows = [
        {"layer": layer, "module": name, "value": values[path], "path": path, "dot": path in dots}
        for path, (layer, name) in names.items()
    ]
    base = alt.Chart(data(rows)).encode(
        x=alt.X("layer:O", sort=layers, title="layer", axis=ACROSS),
        y=alt.Y("module:N", sort=modules, title=None, axis=BARE),
        tooltip=[
            tooltip("path", "module", kind="N"),
            tooltip("value", scale.title, scale.format),
        ],
    )
    tint = colour("value", scale.title, scale.format, from_zero=True)
    charts = [base.mark_rect().encode(color=tint)]

    # Light marks on dark cells, dark marks on light ones.
    half = 0.55 * max((value for value in values.values() if math.isfinite(value)), default=0.0)
    ink = alt.condition(f"datum.value > {half}", alt.value("var(--paper)"), alt.value("var(--ink)"))
    if numbers:
        fits = alt.ExprRef("bandwidth('x') < 20 ? 0 : 1")
        text = alt.Text("value:Q", format=scale.format)
        charts.append(base.mark_text(fontSize=11, opacity=fits).encode(text=text, color=ink))
    if dots:
        size = alt.ExprRef("min(60, pow(bandwidth('x') / 2, 2))")
        marked = base.transform_filter("datum.dot")
        point = marked.mark_point(filled=True, shape="circle", opacity=1, size=size)
        charts.append(point.encode(color=ink))

    cells = {
        path: Cell(scale.shown(value) + (" •" if path in dots else ""), value)
        for path, value in values.items()
    }
    drawn = alt.layer(*charts).properties(width="container", height=ROW_HEIGHT * len(modules))
    table = _table(f"{scale.title} by layer", cells, names, layers, modules)
    return Figure(title, caption, drawn, table)


def _table(
    caption: str,
    cells: Mapping[str, Cell],
    names: Mapping[str, tuple[str, str]],
    layers: Sequence[str],
    modules: Sequence[str],
) -> Table:
    cell_at = {names[path]: cell for path, cell in cells.items()}
    rows = [
        [
            Cell(layer, float(layer) if layer.isdigit() else None),
            *(cell_at.get((layer, name), Cell("")) for name in modules),
        ]
        for layer in layers
    ]
    return Table(caption, [Column("layer"), *map(Column, modules)], rows)


def distinct_names(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns path → (layer, module), all different.

    The module is named by its last word if that is enough.

    >>> distinct_names(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    {'model.layers.0.mlp.up_proj': ('0', 'up_proj'), 'model.layers.1.mlp.up_proj': ('1', 'up_proj')}
    """
    names = {path: layer_and_name(path) for path in paths}
    if len(set(names.values())) < len(names):
        # Two towers, such as an encoder and a decoder: their layers have the same numbers.
        names = {
            path: (layer, path.replace(f".{layer}.", ".", 1)) for path, (layer, _) in names.items()
        }
    short = {name: name.rpartition(".")[2] for _, name in names.values()}
    if len(set(short.values())) < len(short):
        return names
    return {path: (layer, short[name]) for path, (layer, name) in names.items()}


def _layers(names: Mapping[str, tuple[str, str]]) -> list[str]:
    """Returns the layers in order; those without a number come last."""
    layers = dict.fromkeys(layer for layer, _ in names.values())
    return sorted(layers, key=lambda one: (not one.isdigit(), int(one) if one.isdigit() else 0))
