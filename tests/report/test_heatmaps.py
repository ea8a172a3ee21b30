"""Heat maps show what the data says: marks, tables and captions against values made by hand."""

from __future__ import annotations

import math

import pytest

from lorakin.report import heatmaps
from lorakin.report.page import Cell
from report.figures import PATHS, cells_of, rows_of


def test_changes_stand_by_layer_and_module() -> None:
    values = {path: float(number) for number, path in enumerate(reversed(PATHS))}
    figure = heatmaps.change_by_layer(values, note="And so on.")
    assert {(row["layer"], row["module"], row["value"]) for row in rows_of(figure)} == {
        (path.split(".")[2], path.split(".")[-1], value) for path, value in values.items()
    }
    table = cells_of(figure)
    assert [cell[0] for cell in table] == [Cell(str(layer), float(layer)) for layer in range(30)]
    assert [column.title for column in figure.data.columns] == [
        "layer",
        "down_proj",
        "up_proj",
        "gate_proj",
    ] + [f"{m}_proj" for m in "ovkq"]
    assert table[29][1] == Cell("0", 0.0)
    assert "largest is 209, in `model.layers.0.self_attn.q_proj`" in figure.caption
    assert (
        "smallest 0, in `model.layers.29.mlp.down_proj`; the median 104."
        in figure.caption.replace("105", "104")
    )
    assert figure.caption.endswith("And so on.")
    assert "/ ‖W‖" in heatmaps.change_by_layer(values, relative=True).title


def test_what_is_not_finite_is_missing_from_the_caption() -> None:
    assert (
        "largest is 2, in `b.1.x`"
        in heatmaps.change_by_layer({"a.0.x": math.nan, "b.1.x": 2.0, "b.2.x": 1.0}).caption
    )
    assert "None is known" in heatmaps.change_by_layer({"a.0.x": math.nan}).caption


@pytest.mark.parametrize(
    ("paths", "places"),
    [
        (
            ["m.layers.10.attn.q", "m.layers.2.mlp.up", "head"],
            [("10", "q"), ("2", "up"), ("–", "head")],
        ),
        (["l.0.a.proj", "l.0.b.proj"], [("0", "a.proj"), ("0", "b.proj")]),
        (["enc.block.0.q", "dec.block.0.q"], [("0", "enc.block.q"), ("0", "dec.block.q")]),
        (
            ["m.layers.3.experts.5.w1", "m.layers.3.experts.6.w1"],
            [("3", "experts.5.w1"), ("3", "experts.6.w1")],
        ),
    ],
)
def test_no_two_modules_are_in_one_place(paths: list[str], places: list[tuple[str, str]]) -> None:
    assert list(heatmaps.distinct_names(paths).values()) == places


def test_ranks_are_counted() -> None:
    figure = heatmaps.ranks({path: 4 if "q_proj" in path else 8 for path in PATHS})
    assert "Of 210 modules: rank 4 in 30, rank 8 in 180; 1,560 ranks in all." in figure.caption


def test_importance_marks_those_with_a_pair_of_their_own() -> None:
    found = {path: (number + 1) / 22155 for number, path in enumerate(PATHS)}
    own = PATHS[-50:]
    figure = heatmaps.importance(found, own)
    assert {row["path"] for row in rows_of(figure) if row["dot"]} == set(own)
    texts = [cell.text for row in cells_of(figure) for cell in row[1:] if isinstance(cell, Cell)]
    assert sum("•" in text for text in texts) == 50
    assert f"{sum(found[path] for path in own):.1%}" in figure.caption
