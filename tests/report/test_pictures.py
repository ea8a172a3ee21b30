"""The pictures say what the data says: marks, tables and captions against NumPy and values made by hand."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakin.report import page, pictures
from lorakin.report.page import Cell, Figure, Section, TableRow
from lorakin.report.pictures import Point
from report.browser import Browser, browser

__all__ = ["browser"]
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


def test_changes_stand_by_layer_and_module() -> None:
    values = {path: float(number) for number, path in enumerate(reversed(PATHS))}
    figure = pictures.change_by_layer(values, note="And so on.")
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
    assert "/ ‖W‖" in pictures.change_by_layer(values, relative=True).title


def test_what_is_not_finite_is_missing_from_the_caption() -> None:
    assert (
        "largest is 2, in `b.1.x`"
        in pictures.change_by_layer({"a.0.x": math.nan, "b.1.x": 2.0, "b.2.x": 1.0}).caption
    )
    assert "None is known" in pictures.change_by_layer({"a.0.x": math.nan}).caption


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
    assert list(pictures.places_of(paths).values()) == places


def test_ranks_are_counted() -> None:
    figure = pictures.ranks({path: 4 if "q_proj" in path else 8 for path in PATHS})
    assert "Of 210 modules: rank 4 in 30, rank 8 in 180; 1,560 ranks in all." in figure.caption


def test_importance_marks_those_with_a_pair_of_their_own() -> None:
    found = {path: (number + 1) / 22155 for number, path in enumerate(PATHS)}
    own = PATHS[-50:]
    figure = pictures.importance(found, own)
    assert {row["path"] for row in rows_of(figure) if row["dot"]} == set(own)
    texts = [cell.text for row in cells_of(figure) for cell in row[1:] if isinstance(cell, Cell)]
    assert sum("•" in text for text in texts) == 50
    assert f"{sum(found[path] for path in own):.1%}" in figure.caption


def test_ranks_over_time_are_sums_and_means() -> None:
    history = [
        (0, {"l.0.q": 8, "l.0.k": 8, "l.1.q": 8, "l.1.k": 8}),
        (10, {"l.0.q": 8, "l.0.k": 2, "l.1.q": 6, "l.1.k": 0}),
    ]
    total, by_module, by_layer = pictures.ranks_over_time(history)
    assert [list(row) for row in total.data.rows] == [[0, 32], [10, 16]]
    assert cells_of(by_module) == [[0, 8.0, 8.0], [10, 7.0, 1.0]]
    assert cells_of(by_layer) == [[0, 8.0, 8.0], [10, 5.0, 3.0]]
    assert "`k` lost most: 8 became 1. `q` kept most: 8 became 7." in by_module.caption
    assert len(pictures.ranks_over_time([(0, {"head": 3})])) == 1


def cloud(arm: str, sign: float, seed: int = 0) -> list[Point]:
    """Points like those of a run: 210 modules at 4 steps."""
    rng = np.random.default_rng(seed)
    points = []
    for path in PATHS:
        for step in (50, 100, 150, 200):
            turned = float(abs(rng.normal())) * step / 4000
            points.append(
                Point(
                    arm,
                    path.split(".")[2],
                    path.split(".")[-1],
                    step,
                    0.1 + sign * turned + 0.01 * rng.random(),
                    turned,
                )
            )
    return points


def test_correlation_is_pearsons_and_the_line_the_least_squares_one() -> None:
    points = cloud("a", -0.5)
    x, y = (
        np.array([getattr(point, name) for point in points]) for name in ("direction", "magnitude")
    )
    found = pictures.correlation(points)
    assert found.r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert (found.slope, found.intercept) == pytest.approx(tuple(np.polyfit(x, y, 1)))
    assert found.r < -0.9
    assert math.isnan(pictures.correlation(points[:1]).r)
    assert math.isnan(pictures.correlation([point._replace(direction=0.5) for point in points]).r)


def test_magnitude_and_direction_have_a_panel_for_each_arm() -> None:
    points = cloud("up", 1.0) + cloud("down", -0.5, 1)
    still = [
        point._replace(arm="still", magnitude=0.0, direction=0.0) for point in cloud("", 1.0)[:8]
    ]
    figure = pictures.magnitude_direction(points + still)
    assert isinstance(figure.chart, dict)
    r = {
        arm: pictures.correlation([point for point in points if point.arm == arm]).r
        for arm in ("up", "down")
    }
    assert list(figure.chart) == [
        f"up: r = +{r['up']:.2f}",
        f"down: r = −{-r['down']:.2f}",
        "still: r = not defined",
    ]
    assert f"**down** −{-r['down']:.2f}; **still** not defined" in figure.caption
    rows = cells_of(figure)
    assert len(rows) == 2 * 4 * 7 + 2 * 4
    first = [
        point for point in points if (point.arm, point.step, point.module) == ("up", 50, "q_proj")
    ]
    assert rows[0][:4] == ["up", 50, "q_proj", 30]
    assert rows[0][4:6] == pytest.approx(
        [np.mean([p.magnitude for p in first]), np.mean([p.direction for p in first])]
    )


def test_all_are_drawn_at_the_size_of_a_real_run(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    norms = {path: float(rng.gamma(4)) for path in PATHS}
    history = [
        (step, {path: int(rng.integers(0, 12)) for path in PATHS}) for step in range(0, 500, 100)
    ]
    arms = [f"arm {number}" for number in range(6)]
    figures = [
        pictures.change_by_layer(norms),
        pictures.ranks(history[0][1]),
        pictures.effective_ranks(norms),
        pictures.importance(norms, PATHS[::3]),
        *pictures.ranks_over_time(history),
        pictures.magnitude_direction(
            [point for n, arm in enumerate(arms) for point in cloud(arm, n - 3, n)]
        ),
    ]
    path = tmp_path / "page.html"
    page.write(path, page.render("Pictures", "", [Section("All", figures)]))
    expected = [
        210,
        420,
        210,
        280,
        6,
        35,
        150,
        *[841] * 6,
    ]  # cells, numbers and dots; line and points; bands; points and line
    assert browser.open(path).marks() == expected
    assert browser.errors() == []
    assert browser.open(path, width=360, dark=True).marks() == expected
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert browser.errors() == []
    seen = """return [...document.querySelectorAll('.plot')[0].querySelectorAll('.role-axis-label text')]
        .filter(text => /^\\d+$/.test(text.textContent) && getComputedStyle(text).opacity > 0)
        .map(text => text.getBoundingClientRect()).map(box => [box.left, box.right])"""
    layers = sorted(browser.run(seen))
    assert len(layers) >= 8
    assert all(one[1] < other[0] for one, other in itertools.pairwise(layers))
    assert not re.search("NaN|undefined", browser.run("return document.body.innerText"))
