"""Intervals of metrics, and the paired test."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import lorakin as lk
from lorakin.training.metrics import METRICS, check_metric, draws_of, figures, mean_interval
from lorakin.training.paired import paired
from lorakin.training.tasks import Evaluation, RowAnswers


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 draws of 150 rows with 70 % right, about 95 % of the intervals hold 70 %."""
    chance, covered = np.random.default_rng(0), 0
    for _ in range(200):
        right = np.zeros(150, int)
        given = (chance.random(150) > 0.7).astype(int)
        wrong = (right != given).astype(float)
        low, high = mean_interval(1 - wrong, np.ones(150))
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Of 40 prompts with 8 answers each, drawn anew each time; the truth is 0."""
    chance, groups = np.random.default_rng(0), np.repeat(np.arange(40), 8)
    covered, alone = 0, 0
    for _ in range(200):
        losses = chance.normal(size=40)[groups] + chance.normal(size=320)
        low, high = mean_interval(losses, np.ones(320), groups)
        covered += low <= 0 <= high
        low, high = mean_interval(losses, np.ones(320))
        alone += low <= 0 <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert alone / 200 < 0.75
    drawn = draws_of(320, 5, tuple(groups))
    assert (drawn.reshape(5, 40, 8) == draws_of(40, 5)[:, :, None]).all()


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_the_interval_is_the_bootstraps(name: str) -> None:
    chance = np.random.default_rng(1)
    right = chance.integers(0, 2, 80)
    given = np.where(chance.random(80) < 0.8, right, 1 - right)
    figure = figures([name], right, given, intervals=True)[name]
    found = scipy.stats.bootstrap(
        (right, given), lambda r, g: METRICS[name].of(r, g, np.ones(len(r))), paired=True,
        vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert figure.low == pytest.approx(found.low, abs=0.03)
    assert figure.high == pytest.approx(found.high, abs=0.03)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_weight_is_a_row_that_stands_there_so_often(name: str) -> None:
    chance = np.random.default_rng(3)
    right, given = chance.normal(size=(2, 12))
    weights = chance.integers(0, 4, 12)
    repeated = METRICS[name].of(
        *(np.repeat(v, weights) for v in (right, given)), np.ones(weights.sum())
    )
    assert METRICS[name].of(right, given, weights) == pytest.approx(repeated, abs=1e-12)


def test_a_constant_correlates_with_nothing() -> None:
    assert METRICS["pearson"].of(np.arange(5.0), np.ones(5), np.ones(5)) == 0.0


def test_more_than_two_classes_have_the_mean_f1() -> None:
    right, given = np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2])
    assert figures(["f1"], right, given)["f1"].value == pytest.approx((1 + 0 + 0.8) / 3)


def test_metrics_of_other_tasks_are_refused() -> None:
    check_metric(None, ["accuracy"], "classification")
    check_metric("loss", [], "language")
    with pytest.raises(lk.SettingError):
        check_metric("pearson", ["accuracy"], "classification")


def test_the_paired_test_is_mcnemars_exact_one() -> None:
    right = ["a"] * 20
    first = ["a"] * 10 + ["b"] * 10
    second = ["a"] * 8 + ["b"] * 2 + ["a"] * 9 + ["b"]
    one, two = (
        Evaluation(0.0, 20, figures(["accuracy"], *_numbers(right, given)),
                   answers=RowAnswers(np.ones(20), np.ones(20), right, given))
        for given in (first, second)
    )  # fmt: skip
    found = paired(one, two)
    assert (found.better, found.differ) == (9, 11)
    # 2 · Σ_{k ≤ 2} C(11, k) / 2¹¹
    assert found.p == pytest.approx(2 * (1 + 11 + 55) / 2048)


def test_the_answers_to_one_prompt_are_one_case() -> None:
    """Of two prompts with three answers each, the second model is better at one."""
    groups = [0, 0, 0, 1, 1, 1]
    losses = ([1.0] * 6, [0.5, 0.7, 1.1, 1.2, 0.9, 1.3])
    one, two = (
        Evaluation(0.0, 6, answers=RowAnswers(np.array(each), np.ones(6), groups=groups))
        for each in losses
    )
    assert (paired(one, two).better, paired(one, two).differ) == (1, 2)


def _numbers(right: list[str], given: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([word == "a" for word in right]), np.array([word == "a" for word in given])
