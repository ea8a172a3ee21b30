"""Makes a comparison ready to run: checks everything before a model is loaded, splits the data."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from rich.console import Console

from lorakin.adapting import adapt
from lorakin.compare import directory, next_trials, split
from lorakin.compare.arms import FULL, PLAIN, REFERENCE, Arm, arms_of, limits_of
from lorakin.compare.comparison import Comparison
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.prior import prior
from lorakin.compare.results import Results
from lorakin.errors import LorakinError, LorakinWarning, SettingError
from lorakin.family import Method
from lorakin.inject.heads import head_of
from lorakin.inject.layer_numbers import parse_layers
from lorakin.plan.meta_model import meta_model_of, trainable_parameters, with_assumed_importance
from lorakin.storage import paths
from lorakin.terminal import labelled
from lorakin.training import packing
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import with_answers
from lorakin.training.limits import position_count_of_config, row_length
from lorakin.training.metrics import check_metric
from lorakin.training.models import config_of, load_tokenizer
from lorakin.training.precision import quantisation, resolve_dtype
from lorakin.training.prepare import check_meant
from lorakin.training.reading import DataRows
from lorakin.training.tasks import OF_ANSWERS, kind_of_task, task_for

ENDLESS = 10**6
"""The number of steps of a run whose budget is in minutes, before anything is timed."""


def prepare(comparison: Comparison, console: Console) -> PreparedComparison:
    """Checks all that can be checked before a model is loaded; makes or reads the directory.

    Raises:
        LorakinError: something is wrong, or plain LoRA cannot run.
    """
    out = paths.user_path(comparison.out, "--out")
    resumed = directory.check_out(comparison, out)
    options, comparison = comparison, within_positions(comparison)
    if comparison.base_recipe.quantize is not None:
        quantisation(comparison.base_recipe.quantize)
    if resumed:
        saved = directory.saved_in(out)
        parts, dtype = saved.parts, str(saved.dtype)
        _check_metric(comparison, parts.task_word)
    else:
        recipe = comparison.base_recipe
        parts = split.split_into(
            out / directory.DATA,
            comparison.data,
            comparison.eval_data,
            recipe.batch_size * recipe.accumulate,
            _keep_learnable(comparison),
            recipe.columns,
            recipe.format,
            recipe.task,
            recipe.max_rows,
        )
        dtype = resolve_dtype(recipe.dtype, classification=parts.labels is not None)
    arms = _arms(comparison, parts, dtype)
    if not resumed:
        directory.save(out, options, parts, dtype)

    results = Results(out / directory.RESULTS)
    if count := results.set_failed_aside():
        console.print(labelled("again    ", f"trials that failed earlier: {count}"))
    comparison_run = PreparedComparison(comparison, out, arms, parts, results, dtype)
    _print_summary(comparison_run, console)
    return comparison_run


def _check_metric(comparison: Comparison, task: str) -> None:
    check_metric(comparison.metric, kind_of_task(task).metrics, task)


def within_positions(comparison: Comparison) -> Comparison:
    """Returns the comparison with max_length cut to the model's positions.

    Warns once if the user asked for more; otherwise every trial would warn.
    """
    wanted = comparison.base_recipe.max_length
    length = row_length(position_count_of_config(config_of(comparison.model)), wanted)
    if length == wanted:
        return comparison
    if "max_length" in comparison.recipe:
        warnings.warn(
            f"rows are cut at {length} tokens instead of {wanted}: {comparison.model} has no "
            "more positions",
            LorakinWarning,
            stacklevel=2,
        )
    return dataclasses.replace(comparison, recipe={**comparison.recipe, "max_length": length})


def _print_summary(comparison_run: PreparedComparison, console: Console) -> None:
    """Prints how the data was split and which arms are left out."""
    parts = comparison_run.parts
    left_out = f"; left out: {parts.left_out}" if parts.left_out else ""
    held_out = f"{parts.tune} to choose learning rates by, {parts.report} to report on{left_out}"
    console.print(labelled("data     ", f"{parts.train:,} rows to train on, {held_out}"))
    methods = comparison_run.comparison.methods
    if known := prior().said_of([words for words in methods if words != PLAIN]):
        console.print(labelled("prior    ", f"{known} (docs/which-method.md)"))
    for arm in comparison_run.arms:
        if reason := next_trials.refusal(arm, comparison_run.results.rows):
            console.print(labelled("left out ", f"{arm.title}: {reason}", "bold yellow"))


def _keep_learnable(comparison: Comparison) -> Callable[[DataRows], DataRows]:
    """Returns a function that keeps the rows that a model can learn from."""
    recipe, tokenizer = comparison.base_recipe, load_tokenizer(comparison.model)

    def keep_learnable(rows: DataRows) -> DataRows:
        _check_metric(comparison, rows.task)
        if recipe.packing:
            packing.check_task(kind_of_task(rows.task, config_of(comparison.model)))
        task = task_for(rows, None, config_of(comparison.model), recipe.task_args)
        task.check(recipe.batch_size)
        if rows.has_labels:
            check_meant(recipe, rows)
            return rows
        use_template(tokenizer, recipe.chat_template, rows, recipe.template_args)
        if rows.task in OF_ANSWERS:
            encoded = task.encode(rows, tokenizer, recipe.max_length, loss_on=recipe.loss_on)
            task.check_examples(encoded.examples, rows.name)
            learned = set(encoded.where)
            kept = [record for record in rows.records if record.where in learned]
            return dataclasses.replace(rows, records=kept)
        return with_answers(rows, tokenizer, recipe.max_length, recipe.loss_on)

    return keep_learnable


def _arms(comparison: Comparison, parts: split.Parts, dtype: str) -> list[Arm]:
    """Returns all arms at the size of the budget, with reasons for those that cannot run."""
    steps, recipe = comparison.parsed_budget.steps or ENDLESS, comparison.base_recipe
    kind = kind_of_task(parts.task_word, config_of(comparison.model))
    model = meta_model_of(comparison.model, dtype, parts.labels, kind.auto)
    selection: dict[str, Any] = {
        "targets": recipe.targets[0] if len(recipe.targets) == 1 else recipe.targets,
        "exclude": recipe.exclude,
        "layers": parse_layers(recipe.layers) if recipe.layers else None,
        "rank_above": recipe.rank_above,
        "modules_to_save": head_of(model) if parts.labels is not None else [],
    }

    arms, adapted = [], list[str]()
    for arm in arms_of(
        comparison.methods, comparison.size, steps, comparison.settings, comparison.dropout
    ):
        arm, paths = _sized_and_checked(
            arm, model, selection, comparison.parsed_budget.params, steps
        )
        arms.append(arm)
        adapted = adapted or paths
    reference = arms[0]
    if reference.refused:
        raise SettingError(
            f"{reference.title}, against which all others are measured, cannot run: "
            f"{reference.refused}"
        )
    limits = limits_of(reference, adapted, parts.labels is not None)
    return arms + [_refuse_if_untrainable(arm, model, adapted, comparison) for arm in limits]


def _sized_and_checked(
    arm: Arm, model: Any, selection: dict[str, Any], most: int | None, steps: int
) -> tuple[Arm, list[str]]:
    """Sizes an arm for the budget and adapts the meta model with it.

    Returns:
        the arm, refused if it does not fit the model, and the paths of its modules.
    """

    def count(method: Method) -> int:
        return trainable_parameters(model, method, **selection)

    try:
        if most is not None and not arm.refused:
            arm = arm.sized(count, most, steps)
        if arm.refused:
            return arm, []
        method = with_assumed_importance(model, arm.method(steps), **selection)
        adapter = adapt(model, method, **selection)
        paths = list(adapter.placement.methods)
        adapter.remove()
    except LorakinError as error:
        if arm.kind == REFERENCE:
            raise
        return dataclasses.replace(arm, refused=str(error)), []
    return arm, paths


def _refuse_if_untrainable(
    arm: Arm, model: Any, paths: Sequence[str], comparison: Comparison
) -> Arm:
    """Refuses full fine-tuning of a quantised base, and where memory or budget are too small."""
    if arm.name != FULL:
        return arm
    if (quantize := comparison.base_recipe.quantize) is not None:
        return dataclasses.replace(
            arm,
            refused=f"weights in few bits (--quantize {quantize}) cannot be trained whole; a "
            "comparison without --quantize has this limit",
        )
    if comparison.parsed_budget.params is not None:
        return dataclasses.replace(
            arm,
            refused=f"it trains more than the {comparison.parsed_budget.params:,} parameters of "
            "the budget",
        )
    # In float32: the model, and for each trained weight a copy, its gradient and Adam's moments.
    trained = sum(model.get_submodule(path).weight.numel() for path in paths)
    needed = 4 * (sum(p.numel() for p in model.parameters()) + 5 * trained)
    available = (
        torch.cuda.mem_get_info()[1]
        if torch.cuda.is_available()
        else psutil.virtual_memory().available
    )
    if needed <= 0.8 * available:
        return arm
    why = (
        f"it does not fit: it needs about {needed / 2**30:.1f} GiB besides activations, and "
        f"there are {available / 2**30:.1f} GiB"
    )
    return dataclasses.replace(arm, refused=why)
