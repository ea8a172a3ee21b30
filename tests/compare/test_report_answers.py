"""What runs keep of their answers, against scikit-learn and numpy on the drawn rows themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from lorakin.compare.report_answers import (
    DRAWS,
    MOST_NUMBERS,
    ReportAnswers,
    is_share,
    sign_of,
)
from lorakin.compare.results import DONE, SEED, ResultRow, Trial
from lorakin.training.metrics import draws_of
from lorakin.training.tasks import Evaluation, RowAnswers

RIGHT = [0.0, 1, 1, 0, 1, 1, 0, 1]
GIVEN = [0.0, 1, 0, 0, 1, 1, 1, 1]


def evaluation(losses: Any, counts: Any, *numbers: Any) -> Evaluation:
    pair = tuple(np.asarray(x) for x in numbers) if numbers else None
    answers = RowAnswers(np.asarray(losses), np.asarray(counts), numbers=pair)  # type: ignore[arg-type]
    return Evaluation(0.5, len(losses), answers=answers)


def test_a_draw_is_the_metric_of_the_rows_that_were_drawn() -> None:
    kept = ReportAnswers([0.1] * 8, [], RIGHT, GIVEN)
    for measure, of in (
        ("accuracy", sklearn.metrics.accuracy_score),
        ("f1", sklearn.metrics.f1_score),
        ("matthews", sklearn.metrics.matthews_corrcoef),
    ):
        found = kept.drawn(measure)
        assert found is not None
        assert found.shape == (DRAWS,)
        for n, times in enumerate(draws_of(8, DRAWS)[:20]):
            right, given = (np.repeat(x, times) for x in (RIGHT, GIVEN))
            assert found[n] == pytest.approx(of(right, given), abs=1e-9)


def test_a_language_model_s_draw_is_a_mean_over_tokens() -> None:
    found = ReportAnswers([2.0, 9.0, 1.0], [1, 3, 2]).drawn("loss")
    assert found is not None
    for n, times in enumerate(draws_of(3, DRAWS)[:20]):
        assert found[n] == pytest.approx(times @ [2, 9, 1] / (times @ [1, 3, 2]))
    assert ReportAnswers([2.0, 9.0], [1, 3]).drawn("accuracy") is None


def test_rows_of_one_prompt_are_drawn_together() -> None:
    kept = ReportAnswers([2.0, 9.0, 1.0], [1, 3, 2], groups=[0, 1, 0])
    found = kept.drawn("loss")
    assert found is not None and kept.prompts == 2
    for n, times in enumerate(draws_of(2, DRAWS)[:20]):
        losses, counts = times @ [3, 9], times @ [3, 3]
        assert found[n] == pytest.approx(losses / counts)
    for edited in ([0, 1], [0, 1, 3]):
        assert ReportAnswers([2.0, 9.0, 1.0], [1, 3, 2], groups=edited).drawn("loss") is None


@pytest.mark.parametrize(
    ("right", "given"),
    [
        ([1, 0, 2], [1, 1, 2]),
        ([0.25, -3.5, 2.0], [0.5, 1.125, 7.0]),
        ([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]),
    ],
)
def test_answers_come_back_from_their_line(right: Any, given: Any) -> None:
    kept = ReportAnswers.of(evaluation([0.5, 0.25, 1.0], [1, 1, 1], right, given))
    row = ResultRow(Trial("lora", SEED, 1e-3, 0), DONE, answers=kept)
    read = ResultRow.from_json(row.as_json()).answers
    assert read == kept
    assert read is not None
    assert np.array_equal(read.numbers[0], right)
    assert np.array_equal(read.numbers[1], given)


def test_too_many_and_infinite_answers_are_not_kept() -> None:
    many = np.ones(MOST_NUMBERS + 1)
    assert ReportAnswers.of(evaluation(many, many)) is None
    assert ReportAnswers.of(evaluation([1.0, math.inf], [1, 1])) is None
    assert ReportAnswers.of(Evaluation(0.5, 2)) is None
    few = ReportAnswers.of(evaluation([1.23456789, 2.0], [5, 6]))
    assert few == ReportAnswers([1.2346, 2.0], [5, 6])


def test_edited_answers_are_no_draws() -> None:
    assert ReportAnswers([1.0, 2.0], [1]).drawn("loss") is None
    assert ReportAnswers([1.0, 2.0], [], [1, 0], [1]).drawn("accuracy") is None
    assert ReportAnswers([1.0, 2.0], [], [0.5, 1.5], [0.5, 2.5]).drawn("matthews") is None


def test_a_constant_answers_all_rows_alike() -> None:
    assert ReportAnswers([1.0] * 3, [], [0, 1, 1], [1, 1, 1]).is_constant
    assert not ReportAnswers([1.0] * 3, [], [0, 1, 1], [1, 0, 1]).is_constant
    assert not ReportAnswers([1.0] * 3, [], [1, 1, 1], [1, 1, 1]).is_constant  # it is right
    assert not ReportAnswers([1.0] * 3).is_constant
    two_classes = [0, 1, 0, 1]
    assert ReportAnswers([1.0] * 2, [], [0, 1, 1, 1], two_classes).is_constant


def test_directions_and_units() -> None:
    assert sign_of("pearson") == sign_of("micro_f1") == 1
    assert sign_of("loss") == sign_of("mean_absolute_error") == -1
    shares = [n for n in ("accuracy", "f1", "macro_f1", "matthews", "loss") if is_share(n)]
    assert shares == ["accuracy", "f1", "macro_f1"]


def test_words_are_drawn_with_their_rows() -> None:
    right, given = [0, 1, 1, 2, 0, 1], [0, 1, 0, 2, 0, 0]
    counts = [3, 1, 2]
    kept = ReportAnswers([1.0, 2.0, 3.0], counts, right, given)
    found = kept.drawn("macro_f1")
    assert found is not None
    for n, times in enumerate(draws_of(3, DRAWS)[:20]):
        words = np.repeat(np.arange(6), np.repeat(times, counts))
        expected = sklearn.metrics.f1_score(
            np.array(right)[words], np.array(given)[words], average="macro", zero_division=0.0,
            labels=[0, 1, 2],
        )  # fmt: skip
        assert found[n] == pytest.approx(expected)
    same = ReportAnswers([1.0, 2.0, 3.0], counts, right, [0] * 6)
    assert same.is_constant
    assert not kept.is_constant
