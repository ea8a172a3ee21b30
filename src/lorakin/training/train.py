"""One training run: model, data, adapter, transformers' Trainer, and what is left of it on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText
from torch.utils.data import DataLoader

from lorakin.adapter import Adapter
from lorakin.adapting import adapt, importance
from lorakin.errors import DataError, DivergedError, LorakinError, ModelError, OutputError
from lorakin.family import Method
from lorakin.inject.counts import parameter_counts
from lorakin.inject.description import count, share
from lorakin.inject.llama_fusions import fuse, unfuse
from lorakin.inject.measuring import check_called
from lorakin.inject.targets import find_modules, head_of, parse_layers
from lorakin.loop import float16_base
from lorakin.storage import atomic, directory, paths, texts
from lorakin.storage.summary import IMPORTANCE, by_layer, importance_in
from lorakin.terminal import command, labelled, visible
from lorakin.training import checkpoints, limits, processes, reading, run_directory, schedules
from lorakin.training.alarms import Alarms, repeated, warn
from lorakin.training.answers import IGNORED
from lorakin.training.batches import AnswerCollator, Row, answer_loss, digest, stratified_sample
from lorakin.training.encoding import (
    TEMPLATE,
    Encoded,
    encode,
    encode_labelled,
    template_named,
    use_template,
)
from lorakin.training.evaluate import Evaluation, answer_collator, evaluate
from lorakin.training.models import Loaded, config_of, load_model
from lorakin.training.progress import Metrics, Watch
from lorakin.training.reading import DataRows
from lorakin.training.recipe import Recipe
from lorakin.training.run_directory import Held, resumed_recipe
from lorakin.training.templates import Template
from lorakin.training.tokens import rows_of
from lorakin.training.trainers import AdapterTraining

TORCHS_WRITERS = ("PytorchStreamWriter", "inline_container", "iostream error")
"""In the RuntimeErrors that torch.save makes of a disk that is full."""
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How transformers' classes of models that write text end."""
RECIPE, METRICS, PICTURE, CHECKPOINTS = (
    run_directory.RECIPE,
    "metrics.jsonl",
    "loss.png",
    run_directory.CHECKPOINTS,
)


@dataclasses.dataclass
class Run:
    """A run that is ready to train: everything was read, checked and loaded, nothing trained yet."""

    recipe: Recipe
    out: Path
    loaded: Loaded
    train: Encoded
    held_out: Encoded
    labels: list[str] | None
    place: Held
    console: Console
    adapter: Adapter = dataclasses.field(init=False)

    @property
    def checkpoint(self) -> Path | None:
        """What the run goes on from."""
        return self.place.checkpoint

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        each = self.recipe.batch_size * self.recipe.accumulate * processes.count()
        per_epoch = math.ceil(len(self.train.examples) / each)
        return self.recipe.steps or max(1, math.ceil(per_epoch * (self.recipe.epochs or 1)))

    @functools.cached_property
    def rows(self) -> int:
        """What tells these rows, as they are tokenised, from others."""
        return digest(self.train.examples, self.held_out.examples)

    @property
    def between_checkpoints(self) -> int:
        """Steps between two checkpoints, which are a fifth of the run apart unless the recipe says otherwise."""
        return self.recipe.save_every or max(1, self.total_steps // 5)

    def collator(self) -> Any:
        """What makes batches of this run's examples."""
        if self.labels is not None:
            return transformers.DataCollatorWithPadding(self.loaded.tokenizer)
        return answer_collator(self.loaded.model, self.loaded.tokenizer)

    def evaluate(self) -> Evaluation:
        """The model as it is now, on the held-out rows."""
        return evaluate(
            self.loaded.model, self.collator(), self.held_out.examples, self.recipe.batch_size
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    out: Path
    steps: int
    before: Evaluation
    after: Evaluation
    trainable_parameters: int
    adapter_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "steps": self.steps,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "trainable_parameters": self.trainable_parameters,
            "adapter_bytes": self.adapter_bytes,
            "seconds": round(self.seconds, 1),
        }


class AdapterTrainer(AdapterTraining, transformers.Trainer):
    """transformers' Trainer, checkpointing the adapter, and stopping at the first loss that is not finite.

    It keeps a copy of the trained tensors as they were at the last finite loss, in `good`.
    """

    def __init__(self, adapter: Adapter, held_out: Callable[[int], float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held_out = held_out
        self.trained = [p for p in adapter.parameters() if p.requires_grad]
        self.good: list[torch.Tensor] = []
        self.good_step = -1

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss, for schedules that follow it."""
        return {"eval_loss": self.held_out(self.state.global_step)}

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step
        if not processes.everywhere(bool(torch.isfinite(loss))):
            raise DivergedError(f"the loss became {float(loss)} at step {step + 1}", step + 1)
        if (scaler := self.accelerator.scaler) is not None and scaler.get_scale() < 1:
            raise DivergedError(
                f"gradients are too large for float16 at step {step + 1}, however small the loss is made",
                step + 1,
            )
        if step != self.good_step:
            self.good = [p.detach().clone() for p in self.trained]
            self.good_step = step
        return loss


def prepare(recipe: Recipe, console: Console, resume: bool = False) -> Run:
    """Check the recipe, then read the data, load the model and put the adapter in.

    The output directory is the run's alone from now on, and until `train` is through; it is written to last.

    Raises:
        LorakinError: whatever is wrong, before anything is trained or written.
    """
    place = run_directory.enter(recipe, paths.named(recipe.out, "--out"), resume)
    try:
        return _prepared(recipe, console, place)
    except BaseException:
        place.release()
        raise


def _prepared(recipe: Recipe, console: Console, place: Held) -> Run:
    out = Path(recipe.out).expanduser()
    method = recipe.build()
    schedules.check(
        recipe.schedule,
        recipe.schedule_args,
        recipe.lr or method.learning_rate,
        recipe.steps,
        recipe.warmup,
    )
    indices = parse_layers(recipe.layers) if recipe.layers is not None else None
    if isinstance(recipe.chat_template, str):
        template_named(recipe.chat_template)
    rows = reading.read_rows(recipe.data, recipe.columns, recipe.format)
    check_meant(recipe, rows)
    train_rows, held_rows = _held_out(recipe, rows)
    labels = (recipe.labels or rows.labels()) if rows.is_classification else None
    _describe_rows(console, rows, held_rows)
    torch.manual_seed(recipe.seed)  # before loading: a classifier's new head is drawn there
    loaded = load_model(recipe.model, recipe.dtype, labels, recipe.quantize)
    if recipe.fuse:
        fuse(loaded.model)
    wanted, length = (
        recipe.max_length,
        limits.row_length(limits.places(loaded.model), recipe.max_length),
    )
    recipe = dataclasses.replace(
        recipe,
        dtype=loaded.dtype,
        labels=labels,
        lr=recipe.lr or method.learning_rate,
        max_length=length,
    )
    template = None
    if labels is None:
        template = use_template(loaded.tokenizer, recipe.chat_template, rows, recipe.template_args)
        if template is not None:
            texts.remember(loaded.model, loaded.tokenizer)
        recipe = dataclasses.replace(recipe, date=_printed_day(recipe, loaded.tokenizer))
    train, held_out = (encoded(recipe, part, loaded, labels) for part in (train_rows, held_rows))
    limits.warn_cut(length, wanted, recipe.model, train.examples, held_out.examples)
    whole = list(recipe.modules_to_save or (head_of(loaded.model) if labels is not None else []))
    heads = tuple(f"{path}." for path in find_modules(loaded.model, whole)) if whole else ()
    whole += [
        path for path in loaded.fresh if not f"{path}.".startswith(heads)
    ]  # such as a pooler: random, so trained too
    where: dict[str, Any] = {
        "targets": recipe.targets[0] if len(recipe.targets) == 1 else recipe.targets,
        "exclude": recipe.exclude,
        "layers": indices,
        "modules_to_save": whole,
        "rank_above": recipe.rank_above,
        "trainable_tokens": rows_of(recipe.trainable_tokens, loaded.tokenizer, loaded.model),
        "bias": recipe.bias,
        "seed": recipe.seed,
    }
    run = Run(recipe, out, loaded, train, held_out, labels, place, console)
    method.resolved(run.total_steps)
    schedules.check(
        recipe.schedule,
        recipe.schedule_args,
        recipe.lr or method.learning_rate,
        run.total_steps,
        recipe.warmup,
    )
    schedules.check_evaluations(
        recipe.schedule, recipe.schedule_args, run.total_steps // run.between_checkpoints
    )
    if method.probe is None:
        run.adapter = adapt(loaded.model, method, **where)
        float16_base.check_trained(loaded.model)
        _describe(run)
        _written(lambda: _save_settings(recipe, out, template))
        return run
    pilot = adapt(
        loaded.model, method.for_probe(), **where
    )  # so that what is wrong is said before anything is written
    float16_base.check_trained(loaded.model)
    pilot.remove()
    check_called(loaded.model, pilot.placement.methods)
    _written(lambda: _save_settings(recipe, out, template))
    found = processes.agreed(_importance(run, method, where))
    _written(lambda: atomic.write(out, {IMPORTANCE: (json.dumps(found, indent=1) + "\n").encode()}))
    run.adapter = adapt(loaded.model, method.with_importance(found), **where)
    _describe(run)
    return run


def check_meant(recipe: Recipe, rows: DataRows) -> None:
    """See that rows with a text and a label are meant to train a classifier, where the model is a language model.

    Raises:
        DataError: the recipe does not say so.
    """
    if not rows.is_classification or recipe.format is not None or recipe.labels is not None:
        return
    kinds = getattr(config_of(recipe.model), "architectures", None) or ()
    if any(str(kind).endswith(LANGUAGE_MODELS) for kind in kinds):
        text, label = rows.records[0].source.format.columns
        raise DataError(
            f"{rows.name} has the columns {text} and {label}, and {recipe.model} is a language model: say which is meant, "
            f"--format classification to train a classifier of {label}, or --format text to learn to write {text}"
        )


def _printed_day(recipe: Recipe, tokenizer: Any) -> str | None:
    """The day that the chat template prints, for a resumed run to print the same; None if it prints none."""
    if not tokenizer.chat_template or not Template(tokenizer).prints_the_day:
        return None
    return recipe.date or processes.agreed(datetime.date.today().isoformat())


def _describe_rows(console: Console, rows: DataRows, held_out: DataRows) -> None:
    """Say what was read, and what of it is not used."""
    line = f"{rows.name}: {reading.summary(rows)}; {len(held_out)} held out"
    console.print(labelled("data   ", line))
    if (left := reading.unused(rows)) is not None:
        console.print(RichText(visible("       " + left), style="yellow"))


def _save_settings(recipe: Recipe, out: Path, template: str | None) -> None:
    """Write the recipe, and the chat template beside it where it is not the model's own."""
    recipe.save(out / RECIPE)
    if template is not None:
        atomic.write(out, {TEMPLATE: template.encode()})


def _written(write: Callable[[], Any]) -> None:
    """Let the first process write, and the others wait until it has."""
    if processes.is_first():
        write()
    processes.wait()


def _importance(run: Run, method: Method, where: Mapping[str, Any]) -> dict[str, float]:
    """What the probe found, or, of a resumed run, had found."""
    probe = method.probe
    assert probe is not None
    if known := importance_in(run.out):
        return known
    examples = stratified_sample(run.train.examples, probe.sample, run.recipe.seed)
    loader: Any = DataLoader(examples, batch_size=run.recipe.batch_size, collate_fn=run.collator())  # type: ignore[arg-type]
    device = run.loaded.model.device
    batches = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in loader]
    passes = f"{probe.epochs} passes over {len(examples)} examples ({len(batches)} batches)"
    run.console.print(labelled("probe  ", f"{passes}: which modules matter?"))

    def loss_on_answers(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return answer_loss(
            model(**{key: value for key, value in batch.items() if key != "labels"}),
            batch["labels"],
        )

    loss = None if run.labels is not None else loss_on_answers
    found = importance(run.loaded.model, method, batches, loss=loss, lr=run.recipe.lr, **where)
    run.console.print(importance_table(method.with_importance(found), found))
    return found


def importance_table(method: Method, found: Mapping[str, float]) -> Table:
    """Importances by layer and module; those that keep a pair of their own are marked."""
    own = set(method.own_pairs(list(found)))
    marks = {path: ("●", "bold green") if path in own else (" ", "") for path in found}
    cells = {
        path: RichText(f"{100 * share:.2f}{marks[path][0]}", marks[path][1])
        for path, share in found.items()
    }
    rows = by_layer(cells)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    title = f"importance in %: {len(own)} of {len(found)} modules keep a pair of their own (●)"
    table = Table("layer", title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.rpartition(".")[2], justify="right", no_wrap=True)
    for layer, row in rows.items():
        table.add_row(layer, *(row.get(name, "") for name in columns))
    return table


def train(
    run: Run,
    *,
    before: Evaluation | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Result:
    """Train, evaluate before and after, and write the adapter, `metrics.jsonl` and `loss.png` into the output directory.

    Args:
        run: what `prepare` made.
        before: the held-out figures of the untrained model, where they are known.
        callbacks: more of the Trainer's, to watch the run.

    Raises:
        DivergedError: the loss is no longer finite. The adapter of the last step with a finite loss is saved.
        OutputError: something cannot be written.
    """
    try:
        return _trained(run, before, callbacks)
    finally:
        run.place.release()


def _trained(
    run: Run, before: Evaluation | None, callbacks: Sequence[transformers.TrainerCallback]
) -> Result:
    model, console = run.loaded.model, run.console
    started = time.perf_counter()
    resumed = int(run.checkpoint.name.removeprefix("checkpoint-")) if run.checkpoint else 0
    metrics = Metrics(run.out / METRICS, resumed, writes=processes.is_first())
    before = before or _first_evaluation(run, metrics)
    console.print(labelled("held out before  ", described(before)))
    seen = [Watch(console, metrics), Alarms(console)] if processes.is_first() else []

    def held_out(step: int) -> float:
        found = run.evaluate()
        if step < run.total_steps:  # the last is taken below
            metrics.add(step, **{f"eval_{name}": value for name, value in found.as_dict().items()})
        return found.loss

    trainer = _trainer(run, held_out, [*seen, *callbacks])
    rows = run.rows
    trainer.provenance = {
        checkpoints.RECIPE: run_directory.described(run.recipe),
        checkpoints.ROWS: rows,
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        after = run.evaluate()
        if not math.isfinite(after.loss) or not all(
            bool(torch.isfinite(p).all()) for p in trainer.trained
        ):
            raise DivergedError(
                f"the held-out loss became {after.loss} with the last step, {run.total_steps}",
                run.total_steps,
            )
    except DivergedError as error:
        raise _stopped(run, trainer, error) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            writer in str(error) for writer in TORCHS_WRITERS
        ):
            raise
        raise OutputError(
            f"cannot write to {run.out}: {str(error).strip().splitlines()[0]}; {_left(run)}. When there is room, go on "
            f"with: {command('lorakin', 'train', '--resume', '--out', run.out)}"
        ) from error
    _written(lambda: run.adapter.save(run.out, notes=_notes(run, before, after)))
    if after.loss >= before.loss:
        warn(
            console,
            f"the adapter learned nothing that helps on the held-out rows: loss {before.loss:.3f} before, {after.loss:.3f} "
            "after. Try another --lr, more --steps, or more rows",
        )
    metrics.add(
        run.total_steps, **{f"eval_{name}": value for name, value in after.as_dict().items()}
    )
    _written(lambda: metrics.plot(run.out / PICTURE))
    model.eval()
    unfuse(model)
    return Result(
        run.out,
        run.total_steps,
        before,
        after,
        run.adapter.trainable_parameters,
        sum(file.stat().st_size for file in run.out.glob("adapter_*")),
        time.perf_counter() - started,
    )


def _left(run: Run) -> str:
    """What a run that could not write left to go on from."""
    with contextlib.suppress(LorakinError):
        if last := checkpoints.last_checkpoint(run.out / CHECKPOINTS):
            return f"{last.name} is whole"
    return "no checkpoint is whole yet, so it will begin again"


def _notes(run: Run, before: Evaluation, after: Evaluation) -> dict[str, str]:
    """What the run knows and the adapter does not, for its model card."""
    recipe = run.recipe
    sources = [
        Path(name).name if Path(name).exists() else name for name in recipe.data
    ]  # a path is nobody's business
    each = recipe.batch_size * recipe.accumulate * processes.count()
    notes = {
        "Data": f"{', '.join(sources)}: {len(run.train.examples):,} rows, {len(run.held_out.examples):,} held out",
        "Training": f"{count(run.total_steps, 'step')} of {count(each, 'row')} with AdamW, learning rate {recipe.lr:g}, "
        f"{recipe.schedule} schedule, in {recipe.quantize or recipe.dtype}, seed {recipe.seed}",
        "Held out before": described(before),
        "Held out after": described(after),
    }
    return notes if run.labels is None else {**notes, "Classes": ", ".join(run.labels)}


def described(evaluation: Evaluation) -> str:
    """An evaluation in words."""
    if evaluation.accuracy is not None:
        return f"accuracy {evaluation.accuracy:.1%}, loss {evaluation.loss:.3f} over {evaluation.count:,} rows"
    return f"loss {evaluation.loss:.3f}, perplexity {evaluation.perplexity:.2f} over {evaluation.count:,} answer tokens"


def _held_out(recipe: Recipe, rows: DataRows) -> tuple[DataRows, DataRows]:
    if recipe.eval_data is None:
        return reading.split(rows, recipe.holdout, recipe.seed)
    held = reading.read_rows(recipe.eval_data, recipe.columns, recipe.format)
    if held.is_classification != rows.is_classification:
        raise DataError(
            f"{recipe.eval_data} has format {held.formats[0]}, but {rows.name} has {rows.formats[0]}"
        )
    return rows, held


def encoded(
    recipe: Recipe, rows: DataRows, loaded: Loaded, labels: Sequence[str] | None
) -> Encoded:
    """The rows as the recipe has them tokenised; `labels` are a classifier's classes."""
    if labels is not None:
        found = encode_labelled(rows, loaded.tokenizer, recipe.max_length, labels)
    else:
        day = None if recipe.date is None else datetime.date.fromisoformat(recipe.date)
        found = encode(rows, loaded.tokenizer, recipe.max_length, recipe.loss_on, day)
    limits.check_rows(found.examples, loaded, found.where, rows.name)
    return found


def _describe(run: Run) -> None:
    """Show what will be trained on, with one rendered example and its loss mask, before it is."""
    recipe, console = run.recipe, run.console
    trained, total = parameter_counts(run.loaded.model)
    what = (
        f"{recipe.model} in {recipe.quantize or recipe.dtype} on {run.loaded.model.device}; {recipe.method} on "
        f"{len(run.adapter.placement.methods)} modules"
        + (
            f", {', '.join(run.adapter.placement.copies)} trained whole"
            if run.adapter.placement.copies
            else ""
        )
        + (f", rows of {len(recipe.trainable_tokens)} tokens" if recipe.trainable_tokens else "")
        + (f", {len(run.adapter.placement.biases)} biases" if run.adapter.placement.biases else "")
        + f"; {share(trained, total)} train"
    )
    console.print(labelled("model  ", what))
    if twice := repeated(run.train.examples, run.held_out.examples):
        warn(
            console,
            f"{twice} of {len(run.held_out.examples)} held-out rows are trained on, too: the held-out figures will look better "
            "than they are. Remove rows that stand twice, or give other rows with --eval-data",
        )
    if run.train.dropped:
        why = f": no answer, or none within {recipe.max_length} tokens"
        console.print(labelled(f"{run.train.dropped:,} rows dropped", why, "yellow"))
    if run.train.cut:
        why = f" at {recipe.max_length} tokens (--max-length): their last answers do not end"
        console.print(labelled(f"{run.train.cut:,} rows are cut", why, "yellow"))
    console.print(
        labelled(
            "one example", " as the model will see it; the loss is taken on the green part, in ⟦ ⟧:"
        )
    )
    console.print(rendered(run.train.examples[0], run.loaded.tokenizer, run.labels))


def rendered(example: Row, tokenizer: Any, labels: Sequence[str] | None = None) -> RichText:
    """An example as text: tokens with a loss in green and marked with ⟦ ⟧, the others dim."""
    text = RichText()
    if labels is not None:
        text.append(visible(tokenizer.decode(example["input_ids"])), style="dim")
        return text.append(f" → ⟦{visible(labels[example['labels']])}⟧", style="green")
    ids, learned = example["input_ids"], [label != IGNORED for label in example["labels"]]
    edges = [at for at in range(1, len(ids)) if learned[at] != learned[at - 1]]
    shown = ""
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        before, shown = (
            shown,
            tokenizer.decode(ids[:end]),
        )  # of all tokens so far, so that spaces between parts show
        words = visible(shown[len(before) :])
        text.append(
            f"⟦{words}⟧" if learned[start] else words, style="green" if learned[start] else "dim"
        )
    return text


def _first_evaluation(run: Run, metrics: Metrics) -> Evaluation:
    """The held-out figures of the untrained adapter, from the interrupted run's metrics if it took them."""
    known = [
        row
        for row in metrics.rows()
        if row["step"] == 0 and {"eval_loss", "eval_count"} <= row.keys()
    ]
    rows = run.rows
    for row in processes.agreed(known):
        if row.get("rows", rows) != rows:
            raise DataError(
                f"--resume: the rows of {', '.join(run.recipe.data)}, or how they are tokenised, have changed since {run.out} "
                "was begun, so it would go on with others; put them back, or start anew in another --out"
            )
        return Evaluation(row["eval_loss"], int(row["eval_count"]), row.get("eval_accuracy"))
    with run.adapter.disabled():
        before = run.evaluate()
    if not math.isfinite(before.loss):
        raise ModelError(
            f"the base's own held-out loss is {before.loss}: weights that are not finite, or too large for {run.recipe.dtype}; "
            "try --dtype float32, or another model"
        )
    metrics.add(0, rows=rows, **{f"eval_{name}": value for name, value in before.as_dict().items()})
    return before


def _trainer(
    run: Run, held_out: Callable[[int], float], callbacks: list[transformers.TrainerCallback]
) -> AdapterTrainer:
    recipe, model = run.recipe, run.loaded.model
    assert recipe.lr is not None
    if recipe.gradient_checkpointing:
        checkpointed(model)
    args = transformers.TrainingArguments(
        output_dir=str(run.out / CHECKPOINTS),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        max_steps=run.total_steps,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs=recipe.schedule_args,
        eval_strategy="steps" if recipe.schedule in schedules.WATCHERS else "no",
        eval_steps=run.between_checkpoints,
        metric_for_best_model="eval_loss" if recipe.schedule in schedules.WATCHERS else None,
        warmup_steps=int(
            recipe.warmup * run.total_steps
        ),  # rounded down: a step of warm-up has learning rate 0
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no" if recipe.save_every == 0 else "steps",
        save_steps=run.between_checkpoints,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type != "cpu",
    )
    trainer = AdapterTrainer(
        run.adapter,
        held_out,
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(run.train.examples),
        eval_dataset=run.held_out.examples,
        data_collator=run.collator(),
        compute_loss_func=None if run.labels is not None else answer_loss,
        callbacks=callbacks,
        processing_class=run.loaded.tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def checkpointed(model: Any) -> None:
    """Let a transformers model make the activations of each layer again in backward instead of keeping them."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    model.config.use_cache = False


def _stopped(run: Run, trainer: AdapterTrainer, error: DivergedError) -> DivergedError:
    """Save the last good adapter and say what happened."""
    advice = "try a lower --lr, or --dtype float32"
    if not trainer.good:
        return DivergedError(
            f"{error}, the first step of this run, so there is nothing to keep; {advice}",
            error.step,
        )
    with torch.no_grad():
        for parameter, value in zip(trainer.trained, trainer.good, strict=True):
            parameter.data = value  # not copied: ranks may have been freed since
    stopped = {"Training": f"stopped after step {trainer.good_step}, the last with a finite loss"}
    _written(lambda: directory.save(run.adapter, run.out, stopped))
    return DivergedError(
        f"{error}; stopped, and the adapter after step {trainer.good_step}, the last with a finite loss, is in {run.out}; "
        f"{advice}",
        error.step,
    )


__all__ = [
    "AdapterTrainer",
    "AnswerCollator",
    "Result",
    "Run",
    "described",
    "encoded",
    "prepare",
    "rendered",
    "resumed_recipe",
    "train",
]
