"""The tasks that a run can learn, and which one rows are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.family.settings import require
from lorakin.training.base_class import is_seq2seq
from lorakin.training.formats import (
    CLASSIFICATION,
    LANGUAGE,
    PREFERENCE,
    REGRESSION,
    REWARD,
    SEQ2SEQ,
)
from lorakin.training.reading import DataRows
from lorakin.training.tasks.feedback import Kto
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.preference import Dpo, Orpo
from lorakin.training.tasks.reward import Reward
from lorakin.training.tasks.seq2seq import Seq2Seq
from lorakin.training.tasks.sequence import Classification, MultiLabel, Regression
from lorakin.training.tasks.task import Evaluation, RowAnswers, Task
from lorakin.training.tasks.tokens import TokenClassification
from lorakin.training.tasks.trainer_kind import checked_arguments

__all__ = [
    "Evaluation",
    "RowAnswers",
    "Task",
    "kind_of_task",
    "planned_task",
    "task_for",
    "task_of_model",
]

WITH_LABELS: dict[str, Any] = {
    task.word: task for task in (Classification, MultiLabel, Regression, TokenClassification)
}
"""Tasks that are made of their labels, by word."""
OF_ANSWERS: dict[str, Any] = {task.word: task for task in (Dpo, Orpo, Kto, Reward)}
"""Tasks that compare answers, by word; they are made of the arguments of a trainer."""
BY_WORD = WITH_LABELS | OF_ANSWERS
HEADS = {task.auto.removeprefix("AutoModel") for task in WITH_LABELS.values()}
"""How the names of classes end whose models have the heads of these tasks."""


def task_for(
    rows: DataRows,
    labels: Sequence[str] | None = None,
    config: Any = None,
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """Returns the task that rows are for.

    Args:
        rows: the rows; `rows.task` is the user's word or the one that was detected.
        labels: the classes, if they are known; by default those of the rows.
        config: the model's, if it is known: one with an encoder and a decoder learns answers in
            its own way.
        arguments: those of the task's own trainer, by name.

    Raises:
        DataError: the rows' labels do not make classes, or the model is not one for the task.
        SettingError: an argument that the trainer does not take.
    """
    kind: Any = kind_of_task(rows.task, config)
    if rows.task in OF_ANSWERS:
        if config is not None and is_seq2seq(config):
            raise DataError(
                f"--task {rows.task} needs a model that only decodes, and a "
                f"{type(config).__name__} describes an encoder and a decoder"
            )
        of_answers: Task = kind(arguments=arguments or {})
        return of_answers
    checked_arguments(arguments or {}, {}, rows.task)
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


def planned_task(word: str | None, labels: int | None, config: Any) -> Task:
    """Returns a task of which only the number of classes is known.

    >>> planned_task(None, 3, None)
    Classification(labels=['0', '1', '2'])

    Args:
        word: what `--task` calls it; None is what the number of labels tells.
        labels: how many classes; 1 is a number; None is a language model.
        config: the model's.

    Raises:
        SettingError: the task has classes, and their number is not given, or it has none.
    """
    told = LANGUAGE if labels is None else REGRESSION if labels == 1 else CLASSIFICATION
    kind: Any = kind_of_task(word or told, config)
    names = [str(number) for number in range(labels or 0)]
    if kind.word not in WITH_LABELS:
        require(labels is None, f"--task {kind.word} has no classes, so leave --labels out")
        task: Task = kind()
        return task
    wanted = "1" if kind is Regression else "the number of classes"
    require(bool(names), f"--task {kind.word} has a head for its labels: give --labels, {wanted}")
    require(
        kind is not Regression or labels == 1, f"--task {REGRESSION} is one number: give --labels 1"
    )
    with_labels: Task = kind(names)
    return with_labels


def kind_of_task(word: str, config: Any = None) -> type[Task]:
    """Returns the class of the task that `--task` calls `word`.

    >>> kind_of_task("classification").metrics, kind_of_task("language").metrics
    (('accuracy', 'f1', 'matthews'), ())

    Args:
        word: one of `formats.TASKS`.
        config: the model's, as for `task_for`.
    """
    if word in BY_WORD:
        kind: type[Task] = BY_WORD[word]
        return kind
    return Seq2Seq if word == SEQ2SEQ or is_seq2seq(config) else Language


def task_of_model(
    rows: DataRows,
    model: Any,
    word: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """Returns the task that rows are for with a model that has its head.

    Args:
        rows: the rows.
        model: a transformers model; its config names the classes. One class means a number.
        word: what the user called the task.
        arguments: those of the task's own trainer, by name.

    Raises:
        DataError: the model has another head than the rows need.
    """
    kind = type(model).__name__
    if word is None and getattr(model.config, "num_labels", None) == 1:
        if rows.is_classification:
            word = REGRESSION
        elif rows.formats == [PREFERENCE] and kind.endswith(Reward.auto.removeprefix("AutoModel")):
            word = REWARD
    rows = dataclasses.replace(rows, chosen_task=word or rows.task)
    of_task: Any = BY_WORD.get(rows.task, Language)
    head = of_task.auto.removeprefix("AutoModel")
    wanted = head if head in HEADS else ""
    if wanted != next((head for head in HEADS if kind.endswith(head)), ""):
        raise DataError(f"{rows.name} has format {rows.formats[0]}, which does not suit a {kind}")
    if not wanted or rows.task == REWARD:
        return task_for(rows, config=model.config, arguments=arguments)
    names = model.config.id2label
    return task_for(rows, [names[number] for number in sorted(names)])
