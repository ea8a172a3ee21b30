"""Two models on the same rows: which is better on how many, and could that be chance?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from lorakin.training.tasks import Evaluation, RowAnswers


@dataclasses.dataclass(frozen=True)
class Paired:
    """The rows on which two models differ.

    Attributes:
        better: on how many of them the second model is better.
        differ: how many there are.
        p: the chance of a split at least as uneven if both were as good: the exact sign test, which
            for right and wrong answers is McNemar's.
    """

    better: int
    differ: int
    p: float

    def __str__(self) -> str:
        if not self.differ:
            return "no row differs"
        return f"better on {self.better} of {self.differ} rows that differ, p = {self.p:.2g}"


def paired(first: Evaluation, second: Evaluation) -> Paired:
    """Compares two models on the same rows, the second with the first.

    Where answers are right or wrong, that counts, and of two answers whether the better one won;
    else the mean loss of each row.

    >>> def evaluation(*losses):
    ...     return Evaluation(0.0, 3, answers=RowAnswers(np.array(losses), np.ones(3)))
    >>> str(paired(evaluation(1, 2, 3), evaluation(0.5, 2, 3.5)))
    'better on 1 of 2 rows that differ, p = 1'

    Args:
        first, second: the figures, with the answers that they come from.
    """
    import scipy.stats

    gain = _scores(second) - _scores(first)
    better, differ = int((gain > 0).sum()), int((gain != 0).sum())
    p = float(scipy.stats.binomtest(better, differ).pvalue) if differ else 1.0
    return Paired(better, differ, p)


def _scores(evaluation: Evaluation) -> npt.NDArray[Any]:
    answers = evaluation.answers
    assert isinstance(answers, RowAnswers)
    if evaluation.has_winners and answers.numbers is not None:
        other, better = answers.numbers
        wins: npt.NDArray[Any] = np.sign(better - other)
        return wins
    if evaluation.accuracy is None:
        means: npt.NDArray[Any] = -answers.losses / np.maximum(answers.counts, 1)
        return means
    return np.array([a == b for a, b in zip(answers.right, answers.given, strict=True)], float)
