"""Rehearses a run of `lorakin train` on tensors without data.

A few steps of the real model, adapter, loss and optimizer run, and every tensor is counted
(`traced`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lorakin.adapter import Adapter
from lorakin.adapting import adapt
from lorakin.errors import LorakinError, ModelError
from lorakin.family import Method
from lorakin.inject.llama_fusions import fuse
from lorakin.plan.conditions import Conditions
from lorakin.plan.machine import Machine
from lorakin.plan.meta_model import give_tensors, with_assumed_importance
from lorakin.plan.traced import Peak, Traced
from lorakin.training.run_trainer import checkpoint_activations
from lorakin.training.tasks import Task

SETUP, FORWARD, STEP, EVALUATION = (
    "setting up",
    "forward and backward",
    "optimizer step",
    "evaluation",
)
FIRST_LAYER = "backward of the first layer"
PHASES = (SETUP, FORWARD, FIRST_LAYER, STEP, EVALUATION)
"""The phases of a run, in order."""
LAST_FINITE = "last finite copy"
KINDS = ("weights", "adapter", LAST_FINITE, "gradients", "optimizer", "activations", "temporary")
"""What a tensor can be. The last finite copy is what a run returns to if it diverges."""


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        trainable_parameters: the number of trainable parameters.
        adapter_bytes: the bytes of all the adapter's tensors.
        modules: the number of adapted modules.
        peaks: phase → the moment when most bytes are alive.
        seconds: the seconds of one step on the `Machine`.
    """

    trainable_parameters: int
    adapter_bytes: int
    modules: int
    peaks: dict[str, Peak]
    seconds: float


def rehearse_whole(conditions: Conditions, method: Method, machine: Machine) -> Rehearsed:
    """Rehearses the steps at which most is alive.

    Raises:
        ModelError: what the model does depends on the values of its tensors.
        LorakinError: the method cannot run on this model with these settings.
    """
    task, model = conditions.learned, conditions.model()
    rows = _full_batch(conditions)
    with (
        _rehearsable(conditions),
        FakeMode() as fake,
        Traced(machine) as traced,
        warnings.catch_warnings(),
    ):
        # Optimizers compare pointers, and all of them are 0 here.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        _prepare_model(model, conditions, traced)
        arguments = conditions.adapt_arguments(model)
        with traced.phase(SETUP, makes="adapter"):
            assumed = with_assumed_importance(model, method, **arguments)
            adapter = adapt(model, assumed, **arguments, seed=0)
        with traced.phase(SETUP, makes="optimizer"):
            steps = conditions.steps
            optimizer: torch.optim.Optimizer = adapter.optimizer(lr=1e-3, total_steps=steps)

        batch = _as_given(rows, conditions, model, fake)
        accumulates = conditions.accumulate > 1
        run = RehearsedRun(model, adapter, optimizer, task, batch, traced, accumulates)
        seconds = run.steps()
        run.evaluate()

        return Rehearsed(
            trainable_parameters=adapter.trainable_parameters,
            adapter_bytes=sum(p.numel() * p.element_size() for p in adapter.parameters()),
            modules=len(adapter.placement.methods),
            peaks=traced.peaks,
            seconds=seconds,
        )


def frozen_seconds_whole(conditions: Conditions, machine: Machine) -> float:
    """Returns the seconds of forward and backward of the frozen base alone.

    The embeddings want gradients, so that there is a backward.
    """
    task, model = conditions.learned, conditions.model()
    rows = _full_batch(conditions)
    with _rehearsable(conditions), FakeMode() as fake, Traced(machine) as traced:
        _prepare_model(model, conditions, traced)
        model.requires_grad_(False)
        model.enable_input_require_grads()
        with traced.phase(FORWARD, makes="activations"):
            torch.autograd.backward(task.step_loss(model, _as_given(rows, conditions, model, fake)))
        return float(traced.seconds[FORWARD])


@contextlib.contextmanager
def _rehearsable(conditions: Conditions) -> Iterator[None]:
    """Turns torch's errors about tensors without data into a ModelError that names the model."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, LorakinError):
            raise
        kind = type(conditions.config).__name__.removesuffix("Config")
        raise ModelError(
            f"{kind} cannot be planned with {conditions.batch_size} rows of "
            f"{conditions.max_length} tokens: its forward or backward fails on tensors without "
            f"data: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        log.disabled = False


class FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Makes tensors without data. A deep copy of such tensors stays in the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeMode:
        return self


@dataclasses.dataclass
class RehearsedRun:
    """Trains as transformers' Trainer and `lorakin.training.run_trainer.RunTraining` do.

    Attributes:
        model, adapter, optimizer: those of the run.
        task: what is learned.
        batch: the model's inputs.
        traced: counts the tensors.
        accumulates: whether gradients stay for the next batch.
        last_finite: the copy of the trained tensors that a run returns to if it diverges.
    """

    model: Any
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    task: Task
    batch: dict[str, Tensor]
    traced: Traced
    accumulates: bool = False
    last_finite: list[Tensor] = dataclasses.field(default_factory=list)
    _missing_gradients: int = 0
    """How many gradients are still to come in this backward."""
    _first_layer_gradients: int = 0
    """About how many of them are the first layer's, which come last."""

    def __post_init__(self) -> None:
        for parameter in self.trained():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.traced.become("gradients", [parameter.grad])
        self._missing_gradients -= 1
        # The first layer is a separate phase, because then both grow along a line with depth.
        if self._missing_gradients == self._first_layer_gradients:
            self.traced.continue_as(FIRST_LAYER)

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def steps(self) -> float:
        """Runs the steps at which most is alive, and returns the seconds of the last.

        They begin when the optimizer and the members already hold all that they ever will: the
        second step, and the step after each turn of a member's rule.
        """
        turns = {turn for rule in self.adapter.run.rules or () for turn in rule.grows_after if turn}
        seconds = 0.0
        for number in (1, *sorted(turns)):
            self.optimize(number)
            seconds = self.step(number + 1)
        return seconds

    def step(self, number: int) -> float:
        """Runs step `number` and returns its seconds."""
        self.traced.seconds.clear()
        layers = getattr(self.model.config, "num_hidden_layers", 2)
        self._missing_gradients = len(self.trained())
        self._first_layer_gradients = self._missing_gradients // max(2, layers)
        if self.accumulates:
            self._begin_gradients(FORWARD)
        with self.traced.phase(FORWARD, makes="activations"):
            loss = self.task.step_loss(self.model, self.batch)
            torch.autograd.backward(loss)
            del loss
        self.optimize(number)
        return float(self.traced.seconds.total())

    def optimize(self, number: int) -> None:
        """Runs the optimizer's part of step `number`; missing gradients are zero."""
        trained = self.trained()
        self.adapter.run.steps = number - 1
        with self.traced.phase(STEP, makes=LAST_FINITE):
            self.last_finite = [parameter.detach().clone() for parameter in trained]
        self._begin_gradients(STEP)
        with self.traced.phase(STEP, makes="temporary"):
            nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        # What is still alive after a step is state of the optimizer, or of a member.
        self.traced.all_become("optimizer", "temporary")
        self.traced.become("adapter", self.adapter.parameters())

    def _begin_gradients(self, phase: str) -> None:
        """Gives parameters without a gradient one of zeros."""
        with self.traced.phase(phase, makes="gradients"):
            for parameter in self.trained():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Runs the model on a batch of held-out rows."""
        self.model.eval()
        with self.traced.phase(EVALUATION, makes="activations"):
            self.task.evaluation_loss(self.model, self.batch)


def _prepare_model(model: Any, conditions: Conditions, traced: Traced) -> None:
    """Gives a meta model its tensors, and prepares it as a run does before it adapts."""
    model.train()
    if conditions.packing:
        model.config.use_cache = False  # with a cache, transformers makes no mask of packed rows
    with traced.phase("", makes="weights"):
        give_tensors(model)
    traced.small_tensor_bytes = 0  # weights come once and stay, so they fragment nothing
    if conditions.fuse:
        fuse(model)
    if conditions.gradient_checkpointing:
        checkpoint_activations(model)


def _full_batch(conditions: Conditions) -> dict[str, Tensor]:
    """Returns a real batch of full rows, or of packed ones."""
    batch = conditions.learned.full_batch(conditions.batch_size, conditions.max_length)
    if conditions.packing:
        # On tensors without data transformers makes the mask of packed rows whatever these say.
        del batch["attention_mask"]
        positions = torch.arange(conditions.max_length)
        batch["position_ids"] = positions.expand(conditions.batch_size, -1).clone()
    return batch


def _as_given(
    rows: dict[str, Tensor], conditions: Conditions, model: Any, fake: FakeMode
) -> dict[str, Tensor]:
    """Returns the rows as the model takes them, as tensors without data."""
    batch: dict[str, Tensor] = {key: fake.from_tensor(tensor) for key, tensor in rows.items()}
    takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
    # A collator gives the positions of answers only to a forward that takes them.
    if not takes_positions and batch.pop("logits_to_keep", None) is not None:
        batch["labels"] = batch["input_ids"]
    if not conditions.padded:
        # Where tensors have data, transformers sees that nothing is padded and drops the mask.
        batch.pop("attention_mask", None)
    return batch
