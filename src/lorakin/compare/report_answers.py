"""What a run answered to each row to report on, and its measure if other rows had been drawn.

A comparison is decided by a measure: the loss, or one of the task's metrics (`METRICS`). Figures
come from a few hundred rows, and other rows would have given other figures. A bootstrap tells how
far they scatter: the rows are drawn again, the same draws for every run, so that what two runs have
in common does not blur the difference between them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from lorakin.storage.schema import Check, Count
from lorakin.training.metrics import METRICS, draws_of
from lorakin.training.tasks import Evaluation

LOSS = "loss"
CORRELATIONS = ("matthews", "pearson", "spearman")
DRAWS = 200
"""How often the rows are drawn again: enough for a standard error to within about 5 %."""
MOST_NUMBERS = 200_000
"""The most numbers that a trial keeps of its answers; with more rows, none."""

Array = npt.NDArray[Any]
Figure = Annotated[float, Check("a number below 1e15", lambda x: abs(x) < 1e15)]


def sign_of(measure: str) -> float:
    """Returns 1 if more of the measure is better, −1 if less is.

    >>> sign_of("accuracy"), sign_of("loss"), sign_of("mean_absolute_error")
    (1.0, -1.0, -1.0)
    """
    return 1.0 if measure in METRICS and METRICS[measure].higher_is_better else -1.0


def is_share(measure: str) -> bool:
    """Returns whether the measure is written in per cent, and its differences in points."""
    return measure in METRICS and METRICS[measure].is_share


def words_of(measure: str) -> str:
    """Returns the measure's name as people see it.

    >>> words_of("micro_f1"), words_of("matthews")
    ('micro F1', 'Matthews correlation')
    """
    if measure in CORRELATIONS:
        return f"{measure.capitalize()} correlation"
    return measure.replace("_", " ").replace("f1", "F1")


@dataclasses.dataclass(frozen=True)
class ReportAnswers:
    """A run's answers to the rows to report on, in the order of the rows.

    Attributes:
        losses: the loss of each row, summed over its items.
        counts: each row's number of items, such as answer tokens; empty if each row is one.
        right, given: the right and the given answers as numbers, row after row: one for each row,
            each item or, with several classes, each class. Empty for a language model.
        groups: the number of each row's prompt, from 0, where rows share them (`prompt_groups`):
            they are drawn together. Empty where each row stands alone.
    """

    losses: list[Figure]
    counts: list[Count] = dataclasses.field(default_factory=list)
    right: list[Figure] = dataclasses.field(default_factory=list)
    given: list[Figure] = dataclasses.field(default_factory=list)
    groups: list[Count] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, evaluation: Evaluation) -> ReportAnswers | None:
        """Returns an evaluation's answers; None if they are too many or not finite."""
        answers = evaluation.answers
        if answers is None:
            return None
        right, given = answers.numbers or (np.zeros(0), np.zeros(0))
        if len(answers.losses) + right.size > MOST_NUMBERS:
            return None
        if not all(np.all(np.abs(x) < 1e15) for x in (answers.losses, right, given)):
            return None
        ones = bool(np.all(answers.counts == 1))
        return cls(
            [float(f"{loss:.5g}") for loss in answers.losses],
            [] if ones else [int(count) for count in answers.counts],
            [_short(x) for x in right.ravel()],
            [_short(x) for x in given.ravel()],
            answers.groups,
        )

    @property
    def is_whole(self) -> bool:
        """Whether the lists fit each other: a file may have been edited."""
        rows, numbers = len(self.losses), len(self.right)
        return (
            rows > 1
            and len(self.counts) in (0, rows)
            and len(self.given) == numbers
            and (numbers % rows == 0 or self.is_by_item)
            and (not self.groups or len(self.groups) == rows > max(self.groups))
        )

    @property
    def is_by_item(self) -> bool:
        """Whether each item of a row, such as a word, has an answer of its own."""
        return bool(self.counts) and len(self.right) == sum(self.counts)

    @property
    def prompts(self) -> int:
        """How many prompts the rows share; 0 where each row stands alone."""
        return len({*self.groups})

    @functools.cached_property
    def numbers(self) -> tuple[Array, Array]:
        """The right and the given answers as the metrics take them."""
        classes = len(self.right) // len(self.losses)
        shape = (len(self.losses), classes) if classes > 1 and not self.is_by_item else (-1,)
        right, given = (np.asarray(x, float).reshape(shape) for x in (self.right, self.given))
        return right, given

    @property
    def is_constant(self) -> bool:
        """Whether every row got one answer, where several are right."""
        if not self.right:
            return False
        right, given = (x.reshape(len(x), -1) for x in self.numbers)
        return bool((given == given[0]).all() and (right != right[0]).any())

    def drawn(self, measure: str) -> Array | None:
        """Returns the measure of each draw of the rows, (draws,); None if it cannot be had."""
        if measure not in self._drawn:
            self._drawn[measure] = self._draw(measure) if self.is_whole else None
        return self._drawn[measure]

    @functools.cached_property
    def _drawn(self) -> dict[str, Array | None]:
        return {}

    def _draw(self, measure: str) -> Array | None:
        draws = draws_of(len(self.losses), DRAWS, tuple(self.groups))
        if measure == LOSS:
            counts = np.asarray(self.counts or np.ones(len(self.losses)), float)
            found: Array = draws @ np.asarray(self.losses) / np.maximum(draws @ counts, 1)
            return found
        if measure not in METRICS or not self.right:
            return None
        import sklearn  # which takes half a second

        right, given = self.numbers
        if self.is_by_item:
            draws = np.repeat(draws, self.counts, axis=1)
        try:
            with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
                return np.array([METRICS[measure].of(right, given, weights) for weights in draws])
        except ValueError:  # the answers of a file that was edited, which are no classes
            return None


def _short(value: float) -> float:
    return int(value) if value == int(value) else float(f"{value:.5g}")
