"""Intervals that cover seeds and rows: their widths by hand, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lorakin.compare.estimates import Estimate


def test_widths_of_seeds_and_rows_are_added_in_squares() -> None:
    draws = np.array([1.0, 2.0, 3.0])
    both = Estimate.of([1.0, 2.0, 3.0], draws, rows=101)
    of_seeds = Estimate.of([1.0, 2.0, 3.0]).half_width
    of_rows = float(stats.t.isf(0.025, 100))  # the draws' deviation is 1
    assert both.half_width == pytest.approx(math.hypot(of_seeds, of_rows))
    assert (both.rows, Estimate.of([1.0, 2.0]).rows) == (101, 0)


def test_p_is_5_percent_where_the_interval_ends_at_zero() -> None:
    draws = np.array([-0.3, 0.1, 0.2])
    half = Estimate.of([-1.0, 0.0, 1.0], draws, rows=50).half_width
    moved = Estimate.of([half - 1, half, half + 1], draws, rows=50)
    assert moved.p == pytest.approx(0.05, abs=1e-6)
    assert Estimate.of([1.0, 1.0], np.ones(3), rows=50).p == 0
    assert Estimate.of([0.0, 0.0], np.zeros(3), rows=50).p == 1


def test_it_holds_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(0)
    held, alone = 0, 0
    for _ in range(400):
        rows, seeds = chance.normal(0, 1.0), chance.normal(0, 1.0, 3)
        values = [float(x) for x in seeds + rows]
        draws = chance.normal(0, 1.0, 100)
        found = Estimate.of(values, draws, rows=200)
        held += abs(found.mean) < found.half_width
        by_seeds = Estimate.of(values)
        alone += abs(by_seeds.mean) < by_seeds.half_width
    assert held / 400 > 0.94
    assert alone / 400 < 0.9
