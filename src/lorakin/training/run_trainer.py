"""transformers' Trainer for one run: its arguments from the recipe, and the end at a bad loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.trainer_pt_utils import LengthGroupedSampler

from lorakin.adapter import Adapter
from lorakin.errors import DivergedError
from lorakin.training import processes, run_directory, watching
from lorakin.training.batches import smoothed
from lorakin.training.epoch import EpochLengthGroups
from lorakin.training.run import PreparedRun
from lorakin.training.tasks.trainer_kind import quiet_config
from lorakin.training.trainers import AdapterTraining


class RunTraining(AdapterTraining):
    """Mixed in before a Trainer class: checkpoints the adapter, stops at a loss that is not finite.

    `last_finite` holds a copy of the trained tensors at the last finite loss, and
    `last_finite_step` the step after which they were so (-1 before the first).
    """

    control: Any
    log: Any
    remove_callback: Any

    def __init__(
        self, adapter: Adapter, held_out: Callable[[int], Mapping[str, float]], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.held_out = held_out
        self.trained = [p for p in adapter.parameters() if p.requires_grad]
        self.last_finite: list[torch.Tensor] = []
        self.last_finite_step = -1

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Returns the held-out figures, and tells the callbacks."""
        # All processes have to decide alike.
        figures = processes.agreed(dict(self.held_out(self.state.global_step)))
        self.log({name: value for name, value in figures.items() if name != watching.SCORE})
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, figures
        )
        return figures

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        # transformers' own begins each epoch where the global generator is, which a run that is
        # resumed in a later epoch does not know.
        is_grouped = isinstance(sampler, LengthGroupedSampler)
        return EpochLengthGroups.of(sampler, self.args.data_seed) if is_grouped else sampler

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Returns the Trainer's step.

        Raises:
            DivergedError: the loss is not finite in some process, or the float16 scaler gave up.
        """
        loss: torch.Tensor = super().training_step(  # type: ignore[misc]
            model, inputs, num_items_in_batch
        )
        step = self.state.global_step
        if not processes.everywhere(bool(torch.isfinite(loss))):
            raise DivergedError(f"the loss became {float(loss)} at step {step + 1}", step + 1)
        if (scaler := self.accelerator.scaler) is not None and scaler.get_scale() < 1:
            raise DivergedError(
                f"gradients are too large for float16 at step {step + 1}, "
                "however small the loss is made",
                step + 1,
            )
        if step != self.last_finite_step:
            self.last_finite = [p.detach().clone() for p in self.trained]
            self.last_finite_step = step
        return loss


def loss_of(run: PreparedRun) -> Callable[..., torch.Tensor]:
    """Returns the loss of a batch.

    Raises:
        SettingError: label smoothing for a loss that cannot have it.
    """
    return smoothed(run.task.loss, run.recipe.label_smoothing)


def trainer_of(
    run: PreparedRun,
    held_out: Callable[[int], Mapping[str, float]],
    callbacks: list[transformers.TrainerCallback],
    mixin: type[RunTraining] = RunTraining,
    **options: Any,
) -> RunTraining:
    """Returns the Trainer of a run: the task's own, with lorakin's behaviour mixed in before it.

    Args:
        run: what `prepare` made.
        held_out: returns the held-out figures at a step, named as in the metrics.
        callbacks: callbacks that watch the run.
        mixin: what is mixed in.
        options: more arguments of the mixin.

    Raises:
        SettingError: the Trainer refuses its arguments.
    """
    model, kind = run.loaded.model, run.task.trainer
    if run.recipe.gradient_checkpointing:
        checkpoint_activations(model)
    rows: Any = run.epoch.dataset() if run.stream is None else run.stream
    if kind.order is not None and run.stream is None:  # rows of one kind may stand together
        rows = rows.shuffle(seed=run.recipe.seed)
    own = {"compute_loss_func": loss_of(run)} if kind.options is None else kind.options(model)
    bases = (mixin, *kind.mixins, kind.trainer)
    trainer: RunTraining = type(f"Adapter{kind.trainer.__name__}", bases, {})(
        run.adapter,
        held_out,
        model=model,
        args=on_one_device(quiet_config(kind.config, **arguments(run), **kind.arguments)),
        train_dataset=rows,
        eval_dataset=run.held_out.examples,
        data_collator=run.collator(),
        callbacks=[*watching.callbacks(run), *callbacks],
        processing_class=run.loaded.tokenizer,
        **own,
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def on_one_device(arguments: transformers.TrainingArguments) -> transformers.TrainingArguments:
    """Keeps a Trainer from wrapping its model in nn.DataParallel, and returns its arguments.

    It does so where it sees several GPUs and was started as one process. That is slower than DDP,
    needs outputs of one shape on all GPUs, and multiplies the batch size.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def arguments(run: PreparedRun) -> dict[str, Any]:
    """Returns the arguments of transformers' `TrainingArguments` for a run."""
    recipe, on_cpu = run.recipe, run.loaded.model.device.type == "cpu"
    order = "group_by_length" if recipe.group_by_length else "random"
    return {
        "output_dir": str(run.out / run_directory.CHECKPOINTS),
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulate,
        "max_steps": run.total_steps,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": recipe.schedule,
        "lr_scheduler_kwargs": recipe.schedule_args,
        **watching.arguments(run),
        # Rounded down, since the first step of a warm-up has learning rate 0.
        "warmup_steps": int(recipe.warmup * run.total_steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "train_sampling_strategy": run.task.trainer.order or order,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no" if recipe.save_every == 0 else "steps",
        "save_steps": run.checkpoint_interval,
        "report_to": recipe.report_to or "none",
        "run_name": run.out.name,
        "neftune_noise_alpha": recipe.neftune_alpha or None,
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu,
        # Else the first process would cut a stream's batches for the others, which do not divide.
        "accelerator_config": {"dispatch_batches": False} if recipe.streaming else None,
    }


def checkpoint_activations(model: Any) -> None:
    """Lets a transformers model recompute each layer's activations in backward, to save memory."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    model.config.use_cache = False
