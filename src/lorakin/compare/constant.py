"""What a model reaches that answers every row alike: less than that, and nothing was learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorakin.compare.arms import LIMIT, PLAIN, Arm
from lorakin.compare.report_answers import LOSS, ReportAnswers, sign_of
from lorakin.compare.results import DONE, UNTRAINED, ResultRow, Trial
from lorakin.training.metrics import METRICS
from lorakin.training.tasks.sequence import MultiLabel, Regression

CONSTANT = Arm(
    name="constant",
    title="constant answer",
    kind=LIMIT,
    words=PLAIN,
    rank=1,
    scaling=1.0,
    about="the best answer that is the same for all rows",
)
"""Not a run: computed from the right answers."""
MOST_SETS = 50
"""The most sets of classes that are tried as the constant answer of several classes."""

REWARDS = "reward_accuracy"
"""What the tasks report that compare answers: their numbers are rewards, of which none is right."""

Array = npt.NDArray[Any]


def constant_row(rows: Sequence[ResultRow], measure: str) -> ResultRow | None:
    """Returns the best constant answer to the report rows, as the row of a trial.

    None: the task has no answers to give, as a language model's or where two answers are compared,
    or no run kept its answers.

    Args:
        rows: the results of a comparison.
        measure: "loss", or a key of `METRICS`.
    """
    known = (row for row in rows if row.answers and row.answers.is_whole and row.answers.right)
    row = next(known, None)
    if row is None or row.answers is None or row.report is None:
        return None
    if REWARDS in row.report:
        return None
    name = measure if measure in METRICS else _first_metric(row.report)
    if name is None:
        return None
    right, _ = row.answers.numbers
    items, counts = _losses(right, row.report), np.asarray(row.answers.counts, int)
    rows_of = np.repeat(np.arange(len(counts)), counts) if row.answers.is_by_item else None
    losses = items if rows_of is None else np.bincount(rows_of, items, minlength=len(counts))
    ones = np.ones(len(right))
    metric = METRICS[name]
    try:
        answers = list(_answers(right, row.report))
        values = [metric.of(right, answer, ones) for answer in answers]
    except ValueError:  # the answers of a file that was edited, which are no classes
        return None
    best = int(np.argmax(sign_of(name) * np.asarray(values)))
    figures = {name: values[best], LOSS: float(items.mean()), "count": float(len(right))}
    given = answers[best].ravel()
    kept = ReportAnswers(
        [float(x) for x in losses],
        row.answers.counts if rows_of is not None else [],
        row.answers.right,
        [float(x) for x in given],
    )
    trial = Trial(CONSTANT.name, UNTRAINED, None, 0)
    return ResultRow(trial, DONE, report=figures, answers=kept)


def _first_metric(report: dict[str, float]) -> str | None:
    return next((name for name in METRICS if name in report), None)


def _is_regression(report: dict[str, float]) -> bool:
    return Regression.metrics[0] in report


def _answers(right: Array, report: dict[str, float]) -> Iterator[Array]:
    """Yields constant answers that may be the best, the most usual first."""
    if _is_regression(report):
        for centre in (right.mean(), np.median(right)):
            yield np.full(len(right), centre)
        return
    if right.ndim == 1:
        classes, counts = np.unique(right, return_counts=True)
        for number in classes[np.argsort(-counts, kind="stable")]:
            yield np.full(len(right), number)
        return
    order = np.argsort(-right.mean(0), kind="stable")
    for size in range(1, min(len(order), MOST_SETS) + 1):
        answer = np.zeros(right.shape[1])
        answer[order[:size]] = 1
        yield np.tile(answer, (len(right), 1))


def _losses(right: Array, report: dict[str, float]) -> Array:
    """Returns each answer's loss of the best constant: the shares of classes, or the mean."""
    if _is_regression(report):
        squares: Array = (right - right.mean()) ** 2
        return squares
    if MultiLabel.metrics[0] in report:
        shares = np.clip(right.reshape(len(right), -1).mean(0), 1e-12, 1 - 1e-12)
        losses = -(right * np.log(shares) + (1 - right) * np.log(1 - shares))
        means: Array = losses.reshape(len(right), -1).mean(1)
        return means
    _, where, counts = np.unique(right, return_inverse=True, return_counts=True)
    surprise: Array = -np.log(counts / len(right))[where]
    return surprise
