"""The tasks that a run can learn, and which one rows are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorakin.training.formats import REGRESSION
from lorakin.training.reading import DataRows
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.sequence import Classification, MultiLabel, Regression, SequenceTask
from lorakin.training.tasks.task import Evaluation, RowAnswers, Task

__all__ = [
    "Evaluation",
    "Language",
    "RowAnswers",
    "SequenceTask",
    "Task",
    "task_for",
    "task_of_model",
]

SEQUENCE_TASKS: dict[str, type[SequenceTask]] = {
    task.word: task for task in (Classification, MultiLabel, Regression)
}


def task_of_model(rows: DataRows, model: Any, word: str | None = None) -> Task:
    """Returns the task that rows are for with a model that has its head.

    Args:
        rows: the rows.
        model: a transformers model; its config names the classes. One class means a number.
        word: what the user called the task.
    """
    if not rows.is_classification:
        return task_for(rows)
    names = model.config.id2label
    labels = [names[number] for number in sorted(names)]
    if word is None and len(labels) == 1:
        word = REGRESSION
    return task_for(dataclasses.replace(rows, chosen_task=word or rows.task), labels)


def task_for(rows: DataRows, labels: Sequence[str] | None = None) -> Task:
    """Returns the task that rows are for.

    Args:
        rows: the rows; `rows.task` is the user's word or the one that was detected.
        labels: a classifier's classes, if they are known; by default those of the rows.

    Raises:
        DataError: the rows' labels do not make classes.
    """
    kind = SEQUENCE_TASKS.get(rows.task)
    if kind is None:
        return Language()
    return kind(list(rows.labels() if labels is None else labels))
