"""The tasks that a run can learn, and which one rows are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.base_class import is_seq2seq
from lorakin.training.formats import REGRESSION, SEQ2SEQ
from lorakin.training.reading import DataRows
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.seq2seq import Seq2Seq
from lorakin.training.tasks.sequence import Classification, MultiLabel, Regression
from lorakin.training.tasks.task import Evaluation, RowAnswers, Task
from lorakin.training.tasks.tokens import TokenClassification

__all__ = ["Evaluation", "RowAnswers", "Task", "kind_of_task", "task_for", "task_of_model"]

WITH_LABELS: dict[str, Any] = {
    task.word: task for task in (Classification, MultiLabel, Regression, TokenClassification)
}
"""Tasks that are made of their labels, by word."""
HEADS = {task.auto.removeprefix("AutoModel") for task in WITH_LABELS.values()}
"""How the names of classes end whose models have the heads of these tasks."""


def task_for(rows: DataRows, labels: Sequence[str] | None = None, config: Any = None) -> Task:
    """Returns the task that rows are for.

    Args:
        rows: the rows; `rows.task` is the user's word or the one that was detected.
        labels: the classes, if they are known; by default those of the rows.
        config: the model's, if it is known: one with an encoder and a decoder learns answers in
            its own way.

    Raises:
        DataError: the rows' labels do not make classes, or the model is not one for the task.
    """
    kind: Any = kind_of_task(rows.task, config)
    if rows.task in WITH_LABELS:
        task: Task = kind(list(rows.labels() if labels is None else labels))
        return task
    if config is not None and rows.task == SEQ2SEQ and not is_seq2seq(config):
        raise DataError(
            f"--task {SEQ2SEQ} needs a model with an encoder and a decoder, such as T5 or BART, "
            f"and a {type(config).__name__} describes none; leave --task out"
        )
    without_labels: Task = kind()
    return without_labels


def kind_of_task(word: str, config: Any = None) -> type[Task]:
    """Returns the class of the task that `--task` calls `word`.

    >>> kind_of_task("classification").metrics, kind_of_task("language").metrics
    (('accuracy', 'f1', 'matthews'), ())

    Args:
        word: one of `formats.TASKS`.
        config: the model's, as for `task_for`.
    """
    if word in WITH_LABELS:
        kind: type[Task] = WITH_LABELS[word]
        return kind
    return Seq2Seq if word == SEQ2SEQ or is_seq2seq(config) else Language


def task_of_model(rows: DataRows, model: Any, word: str | None = None) -> Task:
    """Returns the task that rows are for with a model that has its head.

    Args:
        rows: the rows.
        model: a transformers model; its config names the classes. One class means a number.
        word: what the user called the task.

    Raises:
        DataError: the model has another head than the rows need.
    """
    kind = type(model).__name__
    if word is None and rows.is_classification and model.config.num_labels == 1:
        word = REGRESSION
    rows = dataclasses.replace(rows, chosen_task=word or rows.task)
    wanted = getattr(WITH_LABELS.get(rows.task), "auto", "").removeprefix("AutoModel")
    if wanted != next((head for head in HEADS if kind.endswith(head)), ""):
        raise DataError(f"{rows.name} has format {rows.formats[0]}, which does not suit a {kind}")
    if not wanted:
        return task_for(rows, config=model.config)
    names = model.config.id2label
    return task_for(rows, [names[number] for number in sorted(names)])
