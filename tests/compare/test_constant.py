"""The best constant answer, against scikit-learn's dummy models and scipy's entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.dummy
import sklearn.metrics

from lorakin.compare.constant import constant_row
from lorakin.compare.report_answers import ReportAnswers
from lorakin.compare.results import DONE, SEED, ResultRow, Trial

CLASSES = [1, 1, 0, 1, 2, 1, 0, 1, 1, 2]
NUMBERS = [0.5, 1.5, 1.0, 9.0, 2.25]
SETS = [[0, 1, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]]


def row(right: Any, **report: float) -> ResultRow:
    numbers = [float(x) for x in np.ravel(right)]
    answers = ReportAnswers([1.0] * len(right), [], numbers, [0.0] * len(numbers))
    return ResultRow(Trial("lora", SEED, 1e-3, 0), DONE, report=report, answers=answers)


def reached(right: Any, measure: str, **report: float) -> float:
    found = constant_row([row(right, loss=1.0, count=len(right), **report)], measure)
    assert found is not None
    assert found.report is not None
    return found.report[measure]


def test_of_classes_it_is_the_most_frequent() -> None:
    dummy = sklearn.dummy.DummyClassifier(strategy="prior").fit(np.zeros((10, 1)), CLASSES)
    assert reached(CLASSES, "accuracy", accuracy=0.5) == dummy.score(np.zeros((10, 1)), CLASSES)
    assert reached(CLASSES, "matthews", accuracy=0.5) == 0
    entropy = scipy.stats.entropy(np.bincount(CLASSES))
    assert reached(CLASSES, "loss", accuracy=0.5) == pytest.approx(entropy)


def test_f1_s_constant_answers_the_second_class_even_if_it_is_rare() -> None:
    right = [0, 0, 0, 1]
    f1 = sklearn.metrics.f1_score(right, [1] * 4)
    assert reached(right, "f1", accuracy=0.5) == pytest.approx(f1)


def test_of_numbers_it_is_the_mean_or_the_median() -> None:
    right = np.array(NUMBERS)
    assert reached(NUMBERS, "pearson", pearson=0.1) == 0
    assert reached(NUMBERS, "loss", pearson=0.1) == pytest.approx(right.var())
    least = np.abs(right - np.median(right)).mean()
    assert reached(NUMBERS, "mean_absolute_error", pearson=0.1) == pytest.approx(least)


def test_of_several_classes_it_is_the_best_set() -> None:
    every = [[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    best = max(
        sklearn.metrics.f1_score(SETS, [one] * 4, average="micro", zero_division=0.0)
        for one in every
    )
    assert reached(SETS, "micro_f1", micro_f1=0.1) == pytest.approx(best)
    shares = np.mean(SETS, axis=0)
    entropy = np.mean([scipy.stats.entropy([p, 1 - p]) for p in shares])
    assert reached(SETS, "loss", micro_f1=0.1) == pytest.approx(entropy)


def test_a_language_model_has_none() -> None:
    kept = ReportAnswers([1.0, 2.0], [3, 4])
    language = ResultRow(
        Trial("lora", SEED, 1e-3, 0), DONE, report={"loss": 0.4, "count": 7}, answers=kept
    )
    assert constant_row([language], "loss") is None
    assert constant_row([], "accuracy") is None
