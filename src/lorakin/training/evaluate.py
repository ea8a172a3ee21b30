"""How well a model predicts held-out rows: loss and perplexity, or loss and accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.family.settings import require
from lorakin.training.answers import ANSWERS, LOSS_ON
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import Encoded
from lorakin.training.formats import FEEDBACK, PREFERENCE, REWARD
from lorakin.training.generation_settings import nan_error
from lorakin.training.glue import task_and_metric
from lorakin.training.limits import check_rows, position_count, row_length, warn_cut
from lorakin.training.metrics import MetricValue
from lorakin.training.models import Loaded, stored_labels
from lorakin.training.reading import ANSWERS as ANSWERS_TO_IMITATE
from lorakin.training.reading import KINDS, DataRows, read_rows
from lorakin.training.sampling import Sampling
from lorakin.training.tasks import Evaluation, RowAnswers, Task, task_of_model
from lorakin.training.with_adapter import load_with_adapter, recipe_beside
from lorakin.training.written import write_answers


def described(evaluation: Evaluation) -> str:
    """Returns an evaluation in words.

    >>> described(Evaluation(loss=0.5, count=1200, perplexity=1.65))
    'loss 0.500, perplexity 1.65 over 1,200 answer tokens'
    >>> described(Evaluation(loss=0.5, count=40, metrics={"accuracy": MetricValue(0.75)}))
    'accuracy 0.750, loss 0.500 over 40 rows'
    """
    loss = f"loss {MetricValue(evaluation.loss, *(evaluation.loss_interval or ()))}"
    count = f"{evaluation.count:,}"
    named = [f"{name.replace('_', ' ')} {value}" for name, value in evaluation.metrics.items()]
    if evaluation.perplexity is None:
        return f"{', '.join([*named, loss])} over {count} rows"
    line = f"{loss}, perplexity {evaluation.perplexity:.2f} over {count} answer tokens"
    return "; ".join([line, ", ".join(named)] if named else [line])


def evaluate_rows(
    model: str,
    adapter: str | None,
    name: str | Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    loss_on: str = ANSWERS,
    chat_template: bool | str = True,
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
    dtype: str = "auto",
    other_base: bool = False,
    quantize: str | None = None,
    task: str | None = None,
    task_args: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Evaluates a model, with an adapter or without, on all rows of a data set.

    Args:
        model: a base model, as for `load_model`.
        adapter: a directory or hub id; None for the base alone.
        name: files or hub data sets.
        batch_size: rows at a time.
        max_length: tokens at which rows are cut.
        loss_on: "answers", "last" or "all".
        chat_template: as for `use_template`.
        columns, layout: as for `read_rows`.
        dtype, quantize: as for `load_model`.
        other_base: as for `load_with_adapter`.
        task: the word of the task, or a task of GLUE; by default it is detected. The metric that
            decided in training, or GLUE's own, comes first.
        task_args: arguments of the task's own trainer, which its loss and its rewards depend on;
            by default those with which the adapter was trained.
        sampling: how to write answers to the prompts and compare them; None leaves that out.

    Raises:
        ModelError: the model computes NaN or infinity.
        LorakinError: the data, the model or the adapter cannot be used.
    """
    require(loss_on in LOSS_ON, f"loss_on must be {', '.join(LOSS_ON)}, not {loss_on!r}")
    task, first = task_and_metric(task, None, [name] if isinstance(name, str) else name)
    rows = read_rows(name, columns, layout, task)
    if sampling is not None and rows.task not in ANSWERS_TO_IMITATE:
        raise DataError(
            f"--generate compares answers in words with the right ones, and {rows.name} has format "
            f"{rows.formats[0]}"
        )
    recipe = recipe_beside(adapter)
    first = first or str(recipe.get("metric"))
    task, task_args = as_trained(recipe, rows.formats[0], task, task_args)
    loaded = _loaded_for(rows, model, adapter, dtype, other_base, quantize)
    tokenizer = loaded.tokenizer
    length = row_length(position_count(loaded.model), max_length)
    learned = task_of_model(rows, loaded.model, task, task_args)
    learned.check(2)
    if learned.takes_template:
        use_template(tokenizer, chat_template, rows)
    encoded = learned.encode(rows, tokenizer, length, loss_on=loss_on)
    check_rows(encoded.examples, loaded, encoded.where, rows.name)
    warn_cut(length, max_length, model, encoded.examples)
    collate = learned.collator(loaded.model, tokenizer)
    evaluation = learned.evaluate(
        loaded.model, collate, encoded.examples, batch_size, intervals=True
    )
    if not math.isfinite(evaluation.loss):
        raise nan_error(loaded.name)
    answers = _named(evaluation, encoded, learned, tokenizer)
    if sampling is None:
        metrics = dict(evaluation.metrics)
        own = {first: metrics[first]} if first in metrics else {}
        note = learned.line("the base")
        return dataclasses.replace(evaluation, answers=answers, metrics=own | metrics, note=note)
    written = write_answers(loaded, rows, sampling, batch_size, chat_template is not False)
    if len(written.right) == len(answers.where):  # no row was dropped
        answers = dataclasses.replace(
            answers, right=written.right, given=written.given, groups=written.prompts
        )
    return dataclasses.replace(evaluation, answers=answers, metrics=written.metrics)


def _named(evaluation: Evaluation, encoded: Encoded, learned: Task, tokenizer: Any) -> RowAnswers:
    """Returns the answers of an evaluation with each row's place and, of two answers, the texts."""
    answers = evaluation.answers
    assert answers is not None
    answers = dataclasses.replace(answers, where=encoded.where)
    if not answers.details:
        return answers
    texts = [learned.texts(example, tokenizer) for example in encoded.examples]
    pairs = zip(texts, answers.details, strict=True)
    return dataclasses.replace(answers, details=[text | more for text, more in pairs])


def as_trained(
    recipe: Mapping[str, Any],
    layout: str,
    task: str | None,
    arguments: Mapping[str, Any] | None,
) -> tuple[str | None, Mapping[str, Any] | None]:
    """Returns the task of rows that compare answers, and its arguments, as an adapter learned it.

    They stand in the recipe beside it; what the user gives comes first.
    """
    learned = recipe.get("task") if layout in (PREFERENCE, FEEDBACK) else None
    if learned not in KINDS.get(layout, ()) or task not in (None, learned):
        return task, arguments
    return str(learned), {**(recipe.get("task_args") or {}), **(arguments or {})}


def _loaded_for(
    rows: DataRows,
    model: str,
    adapter: str | None,
    dtype: str,
    other_base: bool,
    quantize: str | None,
) -> Loaded:
    """Loads the model, a classifier if the rows have classes.

    Raises:
        DataError: the rows do not suit the model.
    """
    of_a_head = rows.has_labels or rows.formats[0] == PREFERENCE
    labels = stored_labels(model) if of_a_head and adapter is None else None
    if rows.task == REWARD and adapter is None and labels is None:
        raise DataError(
            f"--task {REWARD}: {model} is no reward model, and without --adapter its head would be "
            "random"
        )
    if rows.has_labels and adapter is None and labels is None:
        raise DataError(
            f"{rows.name} has labels, but without --adapter the classifier would have a random head"
        )
    return load_with_adapter(model, adapter, dtype, labels, other_base, quantize)
