"""Correlations against NumPy, and all pictures in a browser."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lorakin.report import heatmaps, page
from lorakin.report.magnitude_direction import Point, correlation, magnitude_direction
from lorakin.report.page import Section
from lorakin.report.rank_history import ranks_over_time
from report.browser import Browser, browser
from report.figures import PATHS, cells_of

__all__ = ["browser"]


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
    found = correlation(points)
    assert found.r == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert (found.slope, found.intercept) == pytest.approx(tuple(np.polyfit(x, y, 1)))
    assert found.r < -0.9
    assert math.isnan(correlation(points[:1]).r)
    assert math.isnan(correlation([point._replace(direction=0.5) for point in points]).r)


def test_magnitude_and_direction_have_a_panel_for_each_arm() -> None:
    points = cloud("up", 1.0) + cloud("down", -0.5, 1)
    still = [
        point._replace(arm="still", magnitude=0.0, direction=0.0) for point in cloud("", 1.0)[:8]
    ]
    figure = magnitude_direction(points + still)
    assert isinstance(figure.chart, dict)
    r = {
        arm: correlation([point for point in points if point.arm == arm]).r
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
    arms = [f"arm {number}" for number in range(3)]
    figures = [
        heatmaps.change_by_layer(norms),
        heatmaps.ranks(history[0][1]),
        heatmaps.effective_ranks(norms),
        heatmaps.importance(norms, PATHS[::3]),
        *ranks_over_time(history),
        magnitude_direction(
            [point for n, arm in enumerate(arms) for point in cloud(arm, n - 1, n)]
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
        *[841] * 3,
    ]  # cells, numbers and dots; line and points; bands; points and line
    assert browser.open(path).marks() == expected
    assert browser.errors() == []
    assert browser.open(path, width=360, dark=True).marks() == expected
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert browser.errors() == []
    seen = """const plot = document.querySelector('.plot');
        return [...plot.querySelectorAll('.role-axis-label text')]
        .filter(text => /^\\d+$/.test(text.textContent) && getComputedStyle(text).opacity > 0)
        .map(text => text.getBoundingClientRect()).map(box => [box.left, box.right])"""
    layers = sorted(browser.run(seen))
    assert len(layers) >= 8
    assert all(one[1] < other[0] for one, other in itertools.pairwise(layers))
    assert not re.search("NaN|undefined", browser.run("return document.body.innerText"))
