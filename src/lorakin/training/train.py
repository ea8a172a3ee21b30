"""A training run from `prepare` to its result: figures before, training, figures after, files."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from lorakin.errors import DataError, DivergedError, LorakinError, ModelError, OutputError
from lorakin.inject.llama_fusions import unfuse
from lorakin.storage import directory
from lorakin.terminal import command, labelled
from lorakin.training import checkpoint_manifest, checkpoints, processes, run_directory, watching
from lorakin.training.alarms import Alarms, warn
from lorakin.training.evaluate import described
from lorakin.training.metrics_file import Metrics
from lorakin.training.preference_trainer import left_as_it_was
from lorakin.training.prepare import prepare
from lorakin.training.progress import Watch
from lorakin.training.run import PreparedRun, Result
from lorakin.training.run_report import notes
from lorakin.training.run_trainer import RunTraining, trainer_of
from lorakin.training.tasks import Evaluation

__all__ = ["PreparedRun", "Result", "prepare", "train"]

DISK_FULL_MESSAGES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Words in the RuntimeErrors that torch.save raises when the disk is full."""


def train(
    run: PreparedRun,
    *,
    before: Evaluation | None = None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> Result:
    """Trains, evaluates before and after, and writes the adapter, its metrics and a picture.

    Args:
        run: what `prepare` made.
        before: the held-out figures of the untrained model, if they are known.
        callbacks: more callbacks for the Trainer.

    Raises:
        DivergedError: the loss is no longer finite. The adapter of the last step with a finite
            loss is saved.
        OutputError: something cannot be written.
        KeyboardInterrupt: the run was interrupted, or asked to pause.
    """
    try:
        return _trained(run, before, callbacks)
    finally:
        run.directory_lock.release()


def _trained(
    run: PreparedRun, before: Evaluation | None, callbacks: Sequence[transformers.TrainerCallback]
) -> Result:
    started = time.perf_counter()
    resumed = checkpoints.step_of(run.checkpoint)
    metrics = Metrics(run.out / run_directory.METRICS, resumed, writes=processes.is_first())
    before = before or _first_evaluation(run, metrics)
    run.console.print(labelled("held out before  ", described(before)))

    taken: dict[int, Evaluation] = {}

    def held_out(step: int) -> dict[str, Any]:
        evaluation = run.evaluate()
        taken.clear()
        taken[step] = evaluation
        figures = _as_metrics(evaluation)
        metrics.add(step, **figures)
        return figures | watching.score_of(run, figures)

    seen = [Watch(run.console, metrics), Alarms(run.console)] if processes.is_first() else []
    requests = watching.Requests(run.out, evaluates=watching.evaluation_interval(run) is not None)
    with left_as_it_was(run.loaded.model):
        trainer = trainer_of(run, held_out, [*seen, *callbacks, requests])
        after = _run_trainer(run, trainer, requests, taken)
    ending = watching.ending(run, trainer.state)
    if ending.words:
        run.console.print(labelled("ended  ", ending.words))

    processes.first_writes(
        lambda: run.adapter.save(run.out, notes=notes(run, before, after, ending))
    )
    if (answer := after.only_answer) is not None:
        warn(
            run.console,
            f"every held-out row is answered {answer!r}, so the figures are those of a constant "
            "and nothing was learned yet. Try more --steps, another --lr, or more rows",
        )
    elif after.loss >= before.loss:
        warn(
            run.console,
            "the adapter learned nothing that helps on the held-out rows: "
            f"loss {before.loss:.3f} before, {after.loss:.3f} after. "
            "Try another --lr, more --steps, or more rows",
        )
    if not any(row["step"] == ending.steps and "eval_loss" in row for row in metrics.rows()):
        metrics.add(ending.steps, **_as_metrics(after))
    processes.first_writes(lambda: metrics.plot(run.out / run_directory.PICTURE))
    run.loaded.model.eval()
    unfuse(run.loaded.model)
    return Result(
        run.out,
        ending,
        before,
        after,
        run.adapter.trainable_parameters,
        sum(file.stat().st_size for file in run.out.glob("adapter_*")),
        time.perf_counter() - started,
    )


def _run_trainer(
    run: PreparedRun,
    trainer: RunTraining,
    requests: watching.Requests,
    taken: Mapping[int, Evaluation],
) -> Evaluation:
    """Trains, and returns the held-out figures after it.

    Args:
        run: what `prepare` made.
        trainer: its Trainer.
        requests: the callback that pauses it.
        taken: the last evaluation while training, by its step.

    Raises:
        DivergedError: a loss or a trained number is not finite; the last good adapter is saved.
        OutputError: a checkpoint cannot be written.
        KeyboardInterrupt: the run was asked to pause.
    """
    trainer.run_identity = {
        checkpoint_manifest.RECIPE: run_directory.described(run.recipe),
        checkpoint_manifest.ROWS: run.rows_digest,
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        if requests.is_paused:
            raise KeyboardInterrupt
        steps = trainer.state.global_step
        kept = watching.ending(run, trainer.state).best_step or steps
        after = taken.get(kept) or run.evaluate()
        finite = all(bool(torch.isfinite(p).all()) for p in trainer.trained)
        if not math.isfinite(after.loss) or not finite:
            raise DivergedError(
                f"the held-out loss became {after.loss} with the last step, {steps}", steps
            )
    except DivergedError as error:
        raise _saved_and_error(run, trainer, error) from None
    except DataError as error:  # a row of a stream
        resume = command("lorakin", "train", "--resume", "--out", run.out)
        raise DataError(
            f"{error}; {_resumable(run)}. When the row is mended, in its place, resume with: "
            f"{resume}"
        ) from None
    except (OSError, RuntimeError) as error:
        message = str(error)
        is_disk_full = any(words in message for words in DISK_FULL_MESSAGES)
        if isinstance(error, RuntimeError) and not is_disk_full:
            raise
        resume = command("lorakin", "train", "--resume", "--out", run.out)
        raise OutputError(
            f"cannot write to {run.out}: {message.strip().splitlines()[0]}; {_resumable(run)}. "
            f"When there is room, resume with: {resume}"
        ) from error
    return after


def _as_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Returns an evaluation's figures under the names that they have in the metrics."""
    return {f"eval_{name}": value for name, value in evaluation.as_dict().items()}


def _resumable(run: PreparedRun) -> str:
    """Says what a run that could not write can resume from."""
    with contextlib.suppress(LorakinError):
        if last := checkpoints.last_checkpoint(run.out / run_directory.CHECKPOINTS):
            return f"{last.name} is whole"
    return "no checkpoint is whole yet, so it will begin again"


def _first_evaluation(run: PreparedRun, metrics: Metrics) -> Evaluation:
    """Returns the held-out figures without a new adapter, or with the one that is trained further.

    A resumed run has them in its metrics.

    Raises:
        DataError: a resumed run has other rows than when it began.
        ModelError: the base's own loss is not finite.
    """
    figures = {"eval_loss", "eval_count"}
    earlier = [row for row in metrics.rows() if row["step"] == 0 and figures <= row.keys()]
    for row in processes.agreed(earlier):
        if row.get("rows", run.rows_digest) != run.rows_digest:
            raise DataError(
                f"--resume: the rows of {', '.join(run.recipe.data)}, or how they are tokenised, "
                f"have changed since {run.out} was begun, so it would train on others; put them "
                "back, or start over in another --out"
            )
        return Evaluation.of_dict(
            {name.removeprefix("eval_"): value for name, value in row.items()}
        )
    with run.adapter.disabled() if run.recipe.adapter is None else contextlib.nullcontext():
        before = run.evaluate()
    if not math.isfinite(before.loss):
        raise ModelError(
            f"the base's own held-out loss is {before.loss}: weights that are not finite, or too "
            f"large for {run.recipe.dtype}; try --dtype float32, or another model"
        )
    metrics.add(0, rows=run.rows_digest, **_as_metrics(before))
    return before


def _saved_and_error(run: PreparedRun, trainer: RunTraining, error: DivergedError) -> DivergedError:
    """Saves the last good adapter, and returns the error that says so."""
    advice = "try a lower --lr, or --dtype float32"
    if not trainer.last_finite:
        return DivergedError(
            f"{error}, the first step of this run, so there is nothing to keep; {advice}",
            error.step,
        )
    with torch.no_grad():
        for parameter, value in zip(trainer.trained, trainer.last_finite, strict=True):
            # It is not copied, since the method may have freed ranks.
            parameter.data = value
    kept = f"after step {trainer.last_finite_step}, the last with a finite loss"
    stopped = {"Training": f"stopped {kept}"}
    processes.first_writes(lambda: directory.save(run.adapter, run.out, stopped))
    return DivergedError(
        f"{error}; stopped, and the adapter {kept}, is in {run.out}; {advice}", error.step
    )
