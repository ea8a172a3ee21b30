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
        by: what is better, in words.
        what: what is counted: rows, or prompts with all their answers.
    """

    better: int
    differ: int
    p: float
    by: str = "the loss"
    what: str = "rows"

    def __str__(self) -> str:
        if not self.differ:
            return f"no {self.what.removesuffix('s')} differs by {self.by}"
        return (
            f"better by {self.by} on {self.better} of {self.differ} {self.what} that differ, "
            f"p = {self.p:.2g}"
        )


def paired(first: Evaluation, second: Evaluation) -> Paired:
    """Compares two models on the same rows, the second with the first.

    Where answers are right or wrong, that counts, and of two answers whether the better one won;
    else the mean loss of each row. Rows that belong to one prompt count as one.

    >>> def evaluation(*losses):
    ...     return Evaluation(0.0, 3, answers=RowAnswers(np.array(losses), np.ones(3)))
    >>> str(paired(evaluation(1, 2, 3), evaluation(0.5, 2, 3.5)))
    'better by the loss on 1 of 2 rows that differ, p = 1'

    Args:
        first, second: the figures, with the answers that they come from.
    """
    import scipy.stats

    (scores, by), (others, _) = _scores(second), _scores(first)
    gain, what = scores - others, "rows"
    groups = second.answers.groups if second.answers is not None else []
    if groups:
        gain, what = np.bincount(groups, weights=gain), "prompts"
    better, differ = int((gain > 0).sum()), int((gain != 0).sum())
    p = float(scipy.stats.binomtest(better, differ).pvalue) if differ else 1.0
    return Paired(better, differ, p, by, what)


def _scores(evaluation: Evaluation) -> tuple[npt.NDArray[Any], str]:
    """Returns how good each row's answer is, and by what that is judged."""
    answers = evaluation.answers
    assert isinstance(answers, RowAnswers)
    if evaluation.has_winners and answers.numbers is not None:
        other, better = answers.numbers
        wins: npt.NDArray[Any] = np.sign(better - other)
        return wins, "which answer won"
    if evaluation.accuracy is None:
        means: npt.NDArray[Any] = -answers.losses / np.maximum(answers.counts, 1)
        return means, "the loss"
    right = [a == b for a, b in zip(answers.right, answers.given, strict=True)]
    return np.array(right, float), "right answers"
