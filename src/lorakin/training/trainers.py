"""transformers' Trainer, and TRL's, made to train adapters: rates, run length, checkpoints."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate.optimizer
import transformers

from lorakin.adapter import Adapter
from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.inject import quantised
from lorakin.loop import float16_base
from lorakin.loop.deepspeed_zero import act_at_zero_steps, gather
from lorakin.loop.parameter_groups import regroup
from lorakin.storage import directory
from lorakin.switching import adapters
from lorakin.training import checkpoint_manifest, checkpoints, processes
from lorakin.training.checkpoints import STATE, last_checkpoint

DEFAULT = "default"
PERSISTENT = "stage3_param_persistence_threshold"


class FollowDeepSpeedSteps(transformers.TrainerCallback):
    """Lets the adapters see the steps of DeepSpeed's optimizer, once it is made."""

    def __init__(self, trained: list[Adapter]) -> None:
        self.trained = trained

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to follow the optimizer, before its first step."""
        self.restore_freed = act_at_zero_steps(kwargs["optimizer"].optimizer, self.trained)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the adapters as their rules made them."""
        self.restore_freed()


class AdapterTraining:
    """Mixed in before a Trainer class: optimizes, saves and loads adapters instead of the model.

    The adapter "default" lies in the checkpoint itself, any other in a directory of its name, as
    PEFT does it. `run_identity` goes into the checkpoints' manifests; see
    `checkpoint_manifest.Manifest.check_run`.
    """

    run_identity: Mapping[str, Any] = {}
    model: Any
    args: Any
    state: Any
    optimizer: Any
    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    model_wrapped: Any
    callback_handler: Any
    add_callback: Any
    _get_output_dir: Any

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does, and resumes from a checkpoint that is whole and of this run.

        With several processes, each keeps the adapters whole: FSDP does not shard them.

        Raises:
            AdapterError: the checkpoint is damaged; see `checkpoint_manifest.verified`.
            OutputError: checkpoints would be written through a link, or into something else; see
                `checkpoints.check_place`.
            SettingError: FSDP 1, or a checkpoint of another run.
        """
        sharding = getattr(self.accelerator.state, "fsdp_plugin", None)
        if sharding is not None and sharding.fsdp_version != 2:
            raise SettingError("FSDP 1 flattens the adapters' tensors; use FSDP2 (fsdp_version: 2)")
        if sharding is not None:
            parts = [part for adapter in self._adapters().values() for part in adapter.modules()]
            sharding.ignored_modules = parts + quantised.not_to_shard(self.model)
        checkpoint = processes.by_first(lambda: self._checked_checkpoint(resume_from_checkpoint))
        if self.args.save_strategy != "no":
            after = checkpoints.step_of(checkpoint)
            processes.by_first(lambda: checkpoints.check_place(Path(self.args.output_dir), after))
        if self.is_deepspeed_enabled:
            self._prepare_zero(checkpoint)
        else:
            self._scale_losses()
        if output := self._finished_output(checkpoint):
            return output
        return super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _scale_losses(self) -> None:
        """Lets Accelerate scale losses on a float16 base, as it does for `fp16=True`."""
        if self.accelerator.scaler is not None:
            float16_base.check_no_float16_training(self.model)
            return
        scaler = float16_base.loss_scaler(self.model)
        if scaler.is_enabled():
            self.accelerator.scaler = scaler
            self.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(
                _innermost(self.optimizer)
            )

    def _checked_checkpoint(self, resume_from_checkpoint: Any) -> str | None:
        """Returns the checkpoint to resume from, which is whole and of this run."""
        if not resume_from_checkpoint:
            return None
        folder = resume_from_checkpoint
        if (
            resume_from_checkpoint is True
            and (folder := last_checkpoint(Path(self.args.output_dir))) is None
        ):
            raise SettingError(
                f"resume_from_checkpoint=True, but {self.args.output_dir} has no checkpoint that "
                "is whole"
            )
        manifest = checkpoint_manifest.verified(Path(folder))
        manifest.check_run(self.run_identity)
        manifest.check_versions()
        if self.args.load_best_model_at_end and (best := checkpoints.best_of(Path(folder))):
            checkpoint_manifest.verified(best)
        if manifest.processes != self.args.world_size:
            warnings.warn(
                f"{folder} was saved by {manifest.processes} processes, and there are "
                f"{self.args.world_size} now: what is drawn at random from here on is other than "
                "it would have been",
                LorakinWarning,
                stacklevel=4,
            )
        return str(folder)

    def _prepare_zero(self, checkpoint: str | None) -> None:
        """Keeps ZeRO-3 from sharding the adapters' tensors, and lets them see its steps."""
        # DeepSpeed's files hold the tensors; the adapter's files hold what the rules remember.
        if checkpoint is not None:
            self._load_from_checkpoint(checkpoint)
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        # Without ZeRO, torch's own optimizer steps over the adapters' tensors.
        if not zero.get("stage"):
            return
        largest = max(p.numel() for a in self._trained() for p in a.parameters())
        threshold = zero.get(PERSISTENT, "auto")
        # 100,000 is DeepSpeed's own default.
        zero[PERSISTENT] = max(largest, threshold if isinstance(threshold, int) else 100_000)
        self.callback_handler.pop_callback(FollowDeepSpeedSteps)
        self.add_callback(FollowDeepSpeedSteps(self._trained()))

    def _finished_output(self, checkpoint: str | None) -> Any:
        """Returns the output of a run that resumes from its last step, else None.

        The Trainer would take one step more.
        """
        if checkpoint is None or self.args.max_steps <= 0:
            return None
        state_file = Path(checkpoint) / STATE
        if not state_file.is_file():
            return None
        state = transformers.TrainerState.load_from_json(str(state_file))
        if state.global_step < self.args.max_steps and not self._was_stopped(state):
            return None
        self.state = state
        for adapter in self._trained():
            adapter.run.begin(self.args.max_steps)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return transformers.trainer_utils.TrainOutput(state.global_step, 0.0, {})

    def _was_stopped(self, state: Any) -> bool:
        """Returns whether a callback, such as early stopping, had ended the run by then."""
        if not self.args.restore_callback_states_from_checkpoint:
            return False
        control = state.stateful_callbacks.get("TrainerControl", {})
        return bool(control.get("args", {}).get("should_training_stop"))

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as the Trainer does, with a manifest; deletes older ones by their steps."""
        run = Path(self._get_output_dir(trial=trial))
        folder, limit = run / f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        if self.args.should_save:
            checkpoints.begin(folder)
        # Before a process writes its own part there.
        self.accelerator.wait_for_everyone()
        # The Trainer would delete checkpoints by the files' times.
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit
        self._seal(folder)
        if self.args.should_save:
            checkpoints.rotate(run, self.state.global_step, limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The hub's copy is to be whole, too.
        self._seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _seal(self, folder: Path) -> None:
        """Writes a checkpoint's manifest, once every process has written its parts."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint_manifest.seal(
                folder, self.state.global_step, self.args.world_size, self.run_identity
            )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Saves the adapters, in the process that saves."""
        gather(list(self._adapters().values()))
        with self._flags_off("is_fsdp_enabled", "is_deepspeed_enabled"):
            super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # DeepSpeed's engine knows the tensors that there were when it was made.
        if self.is_deepspeed_enabled:
            self.model_wrapped.param_names = {p: name for name, p in self.model.named_parameters()}
        with self._flags_off("is_fsdp_enabled"):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._flags_off("is_fsdp_enabled"):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    @contextlib.contextmanager
    def _flags_off(self, *flags: str) -> Iterator[None]:
        """Sets these flags to False inside a `with` block.

        It is for files that hold nothing of the base, so that nothing in them is sharded.
        """
        before = {flag: getattr(self, flag) for flag in flags}
        vars(self).update(dict.fromkeys(flags, False))
        try:
            yield
        finally:
            vars(self).update(before)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the Trainer's optimizer, with the groups of the adapters' methods.

        An optimizer that the user gave is left as it is.
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        for adapter in self._trained():
            regroup(
                adapter,
                optimizer,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Makes the Trainer's schedule, and tells the adapters how long the run is."""
        gather(list(self._adapters().values()))
        for adapter in self._trained():
            adapter.run.begin(num_training_steps)
        if self.accelerator.scaler is not None:
            float16_base.leave_unscaling_to_the_scaler([_innermost(self.optimizer)])
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            for name, adapter in self._adapters().items():
                directory.save(
                    adapter, _adapter_directory(output_dir or self.args.output_dir, name)
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for name, adapter in self._adapters().items():
            adapter.restore(_adapter_directory(resume_from_checkpoint, name))

    def _load_best_model(self) -> None:
        recorded = Path(self.state.best_model_checkpoint)
        # The run's directory may have been moved.
        here = Path(self.args.output_dir) / recorded.name
        self._load_from_checkpoint(str(here if here.is_dir() else recorded))

    def _trained(self) -> list[Adapter]:
        return [
            adapter
            for adapter in self._adapters().values()
            if any(p.requires_grad for p in adapter.parameters())
        ]

    def _adapters(self) -> dict[str, Adapter]:
        by_name = adapters(self.model)
        if not by_name:
            raise StateError(
                "the trainer's model has no adapters to save; call lorakin.adapt(model, …) first"
            )
        return by_name


def prepare_trainer(trainer: Any) -> Any:
    """Makes a Trainer train adapters as their methods say, and returns it.

    Its optimizer gets the methods' learning rates and decays. Members that plan over the run are
    told its length. Checkpoints hold the adapters, and what training remembers, instead of the
    base.

    Args:
        trainer: of transformers' Trainer or any subclass, such as TRL's; its model has adapters.

    Raises:
        SettingError: it is not a trainer.
        StateError: its model has no adapters.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise SettingError(
            f"expected a Trainer of transformers or TRL, not a {type(trainer).__name__}"
        )
    if not adapters(trainer.model):
        raise StateError("the trainer's model has no adapters; call lorakin.adapt(model, …) first")
    cls = type(trainer)
    if not isinstance(trainer, AdapterTraining):
        trainer.__class__ = type(
            cls.__name__, (AdapterTraining, cls), {"__module__": cls.__module__}
        )
    return trainer


def _innermost(optimizer: Any) -> Any:
    """Returns torch's optimizer within Accelerate's."""
    while isinstance(optimizer, accelerate.optimizer.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _adapter_directory(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) if name == DEFAULT else Path(folder) / name
