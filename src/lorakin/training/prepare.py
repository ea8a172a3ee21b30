"""Getting a run ready: its data, its model and its adapter, all checked before anything is
written.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakin.adapting import adapt
from lorakin.errors import DataError
from lorakin.family import Method
from lorakin.family.settings import require
from lorakin.inject.heads import head_of
from lorakin.inject.layer_numbers import parse_layers
from lorakin.inject.llama_fusions import fuse
from lorakin.inject.measuring import check_called
from lorakin.inject.whole_modules import find_whole_modules
from lorakin.loop import float16_base
from lorakin.storage import atomic, paths, tokenizer_fingerprint
from lorakin.training import (
    limits,
    packing,
    processes,
    reading,
    run_directory,
    schedules,
    stream,
    watching,
)
from lorakin.training.chat_templates import TEMPLATE, template_named, use_template
from lorakin.training.encoding import Encoded
from lorakin.training.models import Loaded, config_of, load_model
from lorakin.training.probe import measure_importance, measured_by
from lorakin.training.reading import DataRows
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import write_recipe
from lorakin.training.run import PreparedRun
from lorakin.training.run_directory import RunDirectoryLock
from lorakin.training.run_report import show_rows, show_run
from lorakin.training.run_trainer import loss_of
from lorakin.training.starting import StartingAdapter, read_start
from lorakin.training.stream import TrainingStream
from lorakin.training.tasks import OF_ANSWERS, Task, task_for
from lorakin.training.templates import Template
from lorakin.training.tokens import rows_of

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of transformers' classes end whose models write text."""


def prepare(recipe: Recipe, console: Console, resume: bool = False) -> PreparedRun:
    """Checks a recipe, reads the data, loads the model and places the adapter.

    From now on, and until `train` ends, the output directory belongs to this run alone.

    Args:
        recipe: the settings.
        console: where the user is told about the run.
        resume: whether to resume from the last checkpoint in the output directory.

    Raises:
        LorakinError: whatever is wrong, before anything is trained or written.
    """
    directory_lock = run_directory.lock_run_directory(
        recipe, paths.user_path(recipe.out, "--out"), resume
    )
    try:
        return _prepared(recipe, console, directory_lock)
    except BaseException:
        directory_lock.release()
        raise


def _prepared(recipe: Recipe, console: Console, directory_lock: RunDirectoryLock) -> PreparedRun:
    start = read_start(recipe.adapter)
    recipe = recipe if start is None else start.decide(recipe)
    method = recipe.build() if start is None else start.method
    watching.check_reporters(recipe.report_to)
    recipe = dataclasses.replace(recipe, lr=recipe.lr or method.learning_rate)
    _check_schedule(recipe, recipe.steps)
    if recipe.layers is not None:
        parse_layers(recipe.layers)
    if isinstance(recipe.chat_template, str):
        template_named(recipe.chat_template)

    rows = read_data(recipe)
    if recipe.streaming:
        stream.check_labels(recipe, rows)
    train_rows, held_rows = held_out_rows(recipe, rows)
    task = task_for(rows, recipe.labels, config_of(recipe.model), recipe.task_args)
    task.check(recipe.batch_size)
    require(
        not recipe.group_by_length or task.trainer.order is None,
        f"--group-by-length: --task {task.word} takes rows in one order; leave it out",
    )
    if recipe.packing:
        packing.check_task(task)
    # An evaluation of the adapter reads it.
    if task.word in OF_ANSWERS:
        recipe = dataclasses.replace(recipe, task=task.word)
    show_rows(console, rows, held_rows, recipe.streaming)

    torch.manual_seed(recipe.seed)  # a classifier's new head is drawn while loading
    loaded = load_model(recipe.model, recipe.dtype, task.labels, recipe.quantize, auto=task.auto)
    if recipe.fuse:
        fuse(loaded.model)
    if recipe.packing:
        packing.check(loaded.model, task.collator(loaded.model, loaded.tokenizer), recipe.model)
    wanted = recipe.max_length
    length = limits.row_length(limits.position_count(loaded.model), wanted)
    recipe = dataclasses.replace(recipe, dtype=loaded.dtype, labels=task.labels, max_length=length)
    recipe, template = _with_template(recipe, loaded, rows, task)
    train = by_source(recipe, train_rows, lambda part: encoded(recipe, part, loaded, task))
    held_out = encoded(recipe, held_rows, loaded, task)
    task.check_examples(train.examples, rows.name)
    if train.cut or held_out.cut or not recipe.packing:
        limits.warn_cut(length, wanted, recipe.model, train.examples, held_out.examples)

    out = Path(recipe.out).expanduser()
    run = PreparedRun(recipe, out, loaded, train, held_out, task, directory_lock, console)
    if recipe.streaming:
        encode = functools.partial(tokenised, recipe, loaded=loaded, task=task)
        run.stream = TrainingStream(recipe, rows, encode)
    method.resolved(run.total_steps)
    _check_schedule(recipe, run.total_steps)
    watching.check(run)
    loss_of(run)
    _place_adapter(run, method, template, start)
    show_run(run)
    return run


def _check_schedule(recipe: Recipe, steps: int | None) -> None:
    assert recipe.lr is not None
    schedules.check(recipe.schedule, recipe.schedule_args, recipe.lr, steps, recipe.warmup)


def _with_template(
    recipe: Recipe, loaded: Loaded, rows: DataRows, task: Task
) -> tuple[Recipe, str | None]:
    """Gives the tokenizer its chat template; returns the template if it is not the model's own.

    The recipe that is returned has the day that the template prints, so that a resumed run prints
    the same.
    """
    if not task.takes_template:
        return recipe, None
    tokenizer = loaded.tokenizer
    template = use_template(tokenizer, recipe.chat_template, rows, recipe.template_args)
    if template is not None:
        tokenizer_fingerprint.remember(loaded.model, tokenizer)
    day = None
    if tokenizer.chat_template and Template(tokenizer).prints_the_day:
        day = recipe.date or processes.agreed(datetime.date.today().isoformat())
    return dataclasses.replace(recipe, date=day), template


def _place_adapter(
    run: PreparedRun, method: Method, template: str | None, start: StartingAdapter | None
) -> None:
    """Places the adapter and writes the recipe; a method with a probe measures importance first."""
    recipe, model = run.recipe, run.loaded.model

    def settings() -> None:
        write_recipe(recipe, run.out / run_directory.RECIPE)
        if template is not None:
            atomic.write(run.out, {TEMPLATE: template.encode()})

    if start is not None:
        if run.task.needs_reference:
            start.place_reference(run.loaded)
        run.adapter = start.place(run.loaded)
        float16_base.check_no_float16_training(model)
        processes.first_writes(settings)
        return
    where = _where(run)
    if method.needed_probe is None:
        run.adapter = adapt(model, method, **where, **measured_by(run, method))
        float16_base.check_no_float16_training(model)
        processes.first_writes(settings)
        return

    # placed once before anything is written, so that whatever is wrong is said now
    pilot = adapt(model, method.for_probe(), **where)
    float16_base.check_no_float16_training(model)
    pilot.remove()
    check_called(model, pilot.placement.methods)
    processes.first_writes(settings)
    shares = measure_importance(run, method, where)
    run.adapter = adapt(model, method.with_importance(shares), **where)


def _where(run: PreparedRun) -> dict[str, Any]:
    """Returns the arguments of `adapt` that say what is adapted and what is trained whole."""
    recipe, model = run.recipe, run.loaded.model
    whole = list(recipe.modules_to_save or (head_of(model) if run.task.labels is not None else []))
    heads = tuple(f"{path}." for path in find_whole_modules(model, whole)) if whole else ()
    # What the base's files lack, such as a pooler, is random, so it is trained too.
    whole += [path for path in run.loaded.fresh if not f"{path}.".startswith(heads)]
    return {
        "targets": recipe.targets[0] if len(recipe.targets) == 1 else recipe.targets,
        "exclude": recipe.exclude,
        "layers": None if recipe.layers is None else parse_layers(recipe.layers),
        "modules_to_save": whole,
        "rank_pattern": recipe.rank_pattern,
        "alpha_pattern": recipe.alpha_pattern,
        "rank_above": recipe.rank_above,
        "trainable_tokens": rows_of(recipe.trainable_tokens, run.loaded.tokenizer, model),
        "bias": recipe.bias,
        "seed": recipe.seed,
    }


def check_meant(recipe: Recipe, rows: DataRows) -> None:
    """Refuses rows with a text and a label for a language model, unless the recipe is explicit.

    Raises:
        DataError: the recipe says neither a format nor labels.
    """
    explicit = recipe.format, recipe.labels, recipe.task
    if not rows.has_labels or any(setting is not None for setting in explicit):
        return
    kinds = getattr(config_of(recipe.model), "architectures", None) or ()
    if any(str(kind).endswith(LANGUAGE_MODELS) for kind in kinds):
        *texts, label = rows.records[0].source.format.columns
        raise DataError(
            f"{rows.name} has the columns {', '.join(texts)} and {label}, and {recipe.model} is a "
            f"language model: say which is meant, --task {rows.task} to learn {label}, or --format "
            f"text or prompt/completion to learn to write {texts[-1]}"
        )


def read_data(recipe: Recipe) -> DataRows:
    """Reads a recipe's data: of each source all rows, or as many as are trained on and held out.

    Of data that is streamed, only the first rows are read.

    Raises:
        DataError: see `reading.read_rows` and `check_meant`.
    """
    most = recipe.max_rows
    if most is not None and recipe.eval_data is None:
        # Held-out rows come on top, and one more in case the share is rounded up.
        held_out = round(most * recipe.holdout / (1 - recipe.holdout)) + 1
        most += min(held_out, reading.HOLDOUT_LIMIT)
    if recipe.streaming:
        most = min(stream.SAMPLE, most or stream.SAMPLE)
    rows = reading.read_rows(recipe.data, recipe.columns, recipe.format, recipe.task, most)
    check_meant(recipe, rows)
    return rows


def held_out_rows(recipe: Recipe, rows: DataRows) -> tuple[DataRows, DataRows]:
    """Returns the rows to train on and the rows to evaluate on.

    Args:
        recipe: says how many there are, or which.
        rows: what `read_data` returned.
    """
    if recipe.eval_data is None:
        train, held_out = reading.split(rows, recipe.holdout, recipe.seed)
        return train if recipe.max_rows is None else train.first(recipe.max_rows), held_out
    task = None if rows.task in reading.ANSWERS else rows.task
    held_out = reading.read_rows(recipe.eval_data, recipe.columns, recipe.format, task)
    if held_out.task != rows.task:
        raise DataError(
            f"{recipe.eval_data} has format {held_out.formats[0]}, "
            f"but {rows.name} has {rows.formats[0]}"
        )
    return rows, held_out


def by_source(recipe: Recipe, rows: DataRows, encode: Callable[[DataRows], Encoded]) -> Encoded:
    """Tokenises the rows to train on; where sources have weights, each for itself.

    Args:
        recipe: has the weights.
        rows: the rows.
        encode: tokenises some of them.

    Raises:
        DataError: a source has no row left to weigh; or see `encode`.
    """
    if not recipe.data_weights:
        return encode(rows)
    parts = rows.by_source()
    if len(parts) < len(recipe.data):
        names = [part.name for part in parts]
        empty = next((name for name in recipe.data if name not in names), recipe.data[-1])
        raise DataError(
            f"{empty}: all of its rows are held out, so --data-weights has nothing to repeat; "
            "give more rows, or held-out rows with --eval-data"
        )
    return Encoded.joined([encode(part) for part in parts])


def encoded(recipe: Recipe, rows: DataRows, loaded: Loaded, task: Task) -> Encoded:
    """Tokenises rows as the recipe says; warns if they are longer than the model was made for.

    Args:
        recipe: its row length, what the loss is on, and the day that the template prints.
        rows: the rows.
        loaded: the model and its tokenizer.
        task: what is learned.

    Raises:
        DataError: a row that cannot be learned from or that the model cannot read.
    """
    result = tokenised(recipe, rows, loaded, task)
    limits.check_rows(result.examples, loaded, result.where, rows.name)
    return result


def tokenised(recipe: Recipe, rows: DataRows, loaded: Loaded, task: Task) -> Encoded:
    """Tokenises rows as `encoded` does, without its warning."""
    day = None if recipe.date is None else datetime.date.fromisoformat(recipe.date)
    options = {"loss_on": recipe.loss_on, "day": day, "split": recipe.packing}
    result = task.encode(rows, loaded.tokenizer, recipe.max_length, **options)
    limits.check_ids(result.examples, loaded, result.where)
    return result
