"""Intervals that cover seeds and rows: their widths by hand, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lorakin.compare.estimates import Estimate
from lorakin.training.metrics import draws_of


def test_what_rows_do_to_all_runs_is_added_in_squares() -> None:
    alike = np.array([1.0, 2.0, 3.0])
    values = [1.0, 2.0, 3.0]
    both = Estimate.of(values, np.stack([alike, alike + 5, alike]), rows=101)
    of_seeds = Estimate.of(values).half_width
    of_rows = float(stats.t.isf(0.025, 100))  # the draws' deviation is 1
    assert both.half_width == pytest.approx(math.hypot(of_seeds, of_rows))
    assert both.half_of_rows == pytest.approx(of_rows)
    assert (both.rows, Estimate.of([1.0, 2.0]).rows) == (101, 0)
    by_prompt = Estimate.of(values, np.stack([alike, alike + 5, alike]), rows=101, prompts=21)
    assert by_prompt.half_of_rows == pytest.approx(float(stats.t.isf(0.025, 20)))
    assert by_prompt.as_dict()["prompts"] == 21
    alone = np.array([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])  # each row moves one run
    apart = Estimate.of(values, alone, rows=101)
    assert apart.half_width == pytest.approx(of_seeds)


def test_p_is_5_percent_where_the_interval_ends_at_zero() -> None:
    draws = np.tile([-0.3, 0.1, 0.2], (3, 1))
    half = Estimate.of([-1.0, 0.0, 1.0], draws, rows=50).half_width
    moved = Estimate.of([half - 1, half, half + 1], draws, rows=50)
    assert moved.p == pytest.approx(0.05, abs=1e-6)
    assert Estimate.of([1.0, 1.0], np.ones((2, 3)), rows=50).p == 0
    assert Estimate.of([0.0, 0.0], np.zeros((2, 3)), rows=50).p == 1


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seeds", "of_rows", "of_both"),
    [(0.1, 0.3, 3.0), (0.1, 2.0, 1.0), (0.5, 1.0, 1.0), (0, 0, 3)],
)
def test_it_holds_the_truth_as_often_as_it_says(
    seeds: int, of_seeds: float, of_rows: float, of_both: float
) -> None:
    """Other seeds and other rows are drawn each time: 100 rows, of which each run makes its own."""
    chance = np.random.default_rng(0)
    weights, held, alone = draws_of(100, 200) / 100, 0, 0
    for _ in range(400):
        table = (
            chance.normal(0, of_seeds, (seeds, 1))
            + chance.normal(0, of_rows, (1, 100))
            + chance.normal(0, of_both, (seeds, 100))
        )
        values = [float(x) for x in table.mean(axis=1)]
        found = Estimate.of(values, table @ weights.T, rows=100)
        held += abs(found.mean) < found.half_width
        by_seeds = Estimate.of(values)
        alone += abs(by_seeds.mean) < by_seeds.half_width
    assert 0.93 <= held / 400 < 0.995
    assert alone <= held
    if of_rows > of_both:
        assert alone / 400 < 0.9
