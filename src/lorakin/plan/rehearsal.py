"""A run of `lorakin train`, rehearsed on tensors without numbers: its model, adapter, loss and optimizer, a few steps."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lorakin.adapter import Adapter, adapt
from lorakin.errors import LorakinError, ModelError
from lorakin.family import Method
from lorakin.inject.llama_fusions import fuse
from lorakin.inject.targets import ALL_LINEAR, Targets, head_of
from lorakin.plan.skeleton import built, give_tensors, supposed
from lorakin.plan.traced import Machine, Peak, Traced
from lorakin.training.batches import AnswerCollator, answer_loss
from lorakin.training.run_trainer import checkpoint_activations

SETUP, FORWARD, FIRST, STEP, EVALUATION = (
    "setting up", "forward and backward", "backward of the first layer", "optimizer step", "evaluation",
)  # fmt: skip
PHASES = (SETUP, FORWARD, FIRST, STEP, EVALUATION)
"""Of a run, in their order."""
KINDS = ("weights", "adapter", "a good copy", "gradients", "optimizer", "activations", "temporary")
"""What tensors are."""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a run is beside its method. Field by field what `lorakin train` takes."""

    config: Any
    """The model's transformers config."""
    dtype: torch.dtype
    device: str = "cpu"
    """Or "cuda". Rehearsed are the CPU's operations either way, which torch knows everywhere."""
    labels: int | None = None
    """Classes of a classifier, None for a causal language model."""
    batch_size: int = 8
    max_length: int = 1024
    accumulate: int = 1
    padded: bool = True
    """Whether rows are of unequal length, so that attention gets a mask."""
    gradient_checkpointing: bool = False
    fuse: bool = False
    targets: Targets = ALL_LINEAR
    exclude: Sequence[str] = ()
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] = ()
    rank_above: str = "refuse"
    steps: int = 1000


@dataclasses.dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal came to, in bytes and seconds."""

    trainable_parameters: int
    adapter_bytes: int
    modules: int
    peaks: dict[str, Peak]
    seconds: float
    """Of one step on `Machine`."""


def rehearse(conditions: Conditions, method: Method, machine: Machine) -> Rehearsed:
    """Rehearse a run; a deep model by three shallow ones, if every figure of theirs lies on a line.

    Raises:
        LorakinError: whatever `adapt` or the method says against this model or these settings.
    """
    depths = shallow_depths(conditions)
    if (
        depths is not None and method.probe is None
    ):  # with one, the number of modules that are chosen is rounded up
        real = _counted(conditions, method)
        try:
            found = [
                rehearse_whole(shallow(conditions, depth), method, machine) for depth in depths
            ]
        except (
            LorakinError
        ) as error:  # a pattern selects nothing in so few layers; of the whole it is said again
            logging.getLogger(__name__).info("not planned by few layers: %s", error)
        else:
            whole = extended(
                found, (conditions.config.num_hidden_layers - depths[0]) // (depths[1] - depths[0])
            )
            if whole is not None and (whole.trainable_parameters, whole.modules) == real:
                return whole
    return rehearse_whole(conditions, method, machine)


def shallow_depths(conditions: Conditions) -> tuple[int, int, int] | None:
    """Three depths that differ by one period of the model's kinds of layers, from two layers on; None if it is not deeper."""
    count = getattr(conditions.config, "num_hidden_layers", None)
    if not isinstance(count, int) or conditions.layers is not None:
        return None
    lists = list(_per_layer(conditions.config).values())
    period = next(p for p in range(1, count + 1) if all(kinds[p:] == kinds[:-p] for kinds in lists))
    first = next(depth for depth in range(2, period + 2) if (count - depth) % period == 0)
    depths = first, first + period, first + 2 * period
    return depths if sum(depths) < count else None


def shallow(conditions: Conditions, depth: int) -> Conditions:
    """The same with so many layers."""
    config = copy.deepcopy(conditions.config)
    for name, kinds in _per_layer(config).items():
        setattr(config, name, kinds[:depth])
    config.num_hidden_layers = depth
    return dataclasses.replace(conditions, config=config)


def _per_layer(config: Any) -> dict[str, list[Any]]:
    """The config's lists of something for each layer."""
    return {
        k: v
        for k, v in vars(config).items()
        if isinstance(v, list) and len(v) == config.num_hidden_layers
    }


def extended(found: Sequence[Rehearsed], periods: int) -> Rehearsed | None:
    """What comes `periods` after the first of three equally spaced, if they lie on a line exactly, seconds aside."""
    one, two, three = (_figures(rehearsed) for rehearsed in found)
    keys = one.keys() | two.keys() | three.keys()
    if any(three[key] - two[key] != two[key] - one[key] for key in keys):
        return None
    line = {key: one[key] + periods * (two[key] - one[key]) for key in keys}
    return Rehearsed(
        trainable_parameters=line["trainable"],
        adapter_bytes=line["adapter"],
        modules=line["modules"],
        peaks={
            phase: Peak(
                line[f"{phase}:total"],
                {kind: line[f"{phase}:kind:{kind}"] for kind in KINDS},
                line[f"{phase}:pieces"],
            )
            for phase in PHASES
        },
        seconds=found[0].seconds + periods * (found[1].seconds - found[0].seconds),
    )


def _figures(rehearsed: Rehearsed) -> collections.Counter[str]:
    figures = collections.Counter(
        trainable=rehearsed.trainable_parameters,
        adapter=rehearsed.adapter_bytes,
        modules=rehearsed.modules,
    )
    for phase in PHASES:
        peak = rehearsed.peaks[phase]
        figures.update({f"{phase}:total": peak.total, f"{phase}:pieces": peak.pieces})
        for kind in KINDS:
            figures[f"{phase}:kind:{kind}"] = peak.kinds.get(kind, 0)
    return figures


def _counted(conditions: Conditions, method: Method) -> tuple[int, int]:
    """Trainable parameters and adapted modules of the whole model."""
    model = built(conditions.config, conditions.dtype, conditions.labels is not None)
    where = _where(conditions, model)
    adapter = adapt(model, supposed(model, method, **where), **where)
    return adapter.trainable_parameters, len(adapter.placement.methods)


def rehearse_whole(conditions: Conditions, method: Method, machine: Machine) -> Rehearsed:
    """Rehearse the steps at which most is alive: those that begin with all that optimizer and members will ever hold.

    Raises:
        ModelError: the model's way depends on numbers.
        LorakinError: whatever `adapt` or the method says against this model or these settings.
    """
    rows, model = (
        _rows(conditions),
        built(conditions.config, conditions.dtype, conditions.labels is not None),
    )
    with (
        _rehearsable(conditions),
        Fakes() as fake,
        Traced(machine) as traced,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", "Accessing the data pointer of FakeTensor"
        )  # they are all 0
        _get_ready(model, conditions, traced)
        where = _where(conditions, model)
        with traced.phase(SETUP, makes="adapter"):
            adapter = adapt(model, supposed(model, method, **where), **where, seed=0)
        with traced.phase(SETUP, makes="optimizer"):
            optimizer: torch.optim.Optimizer = adapter.optimizer(
                lr=1e-3, total_steps=conditions.steps
            )
        run = _Run(
            model,
            adapter,
            optimizer,
            _given(rows, conditions, model, fake),
            traced,
            conditions.accumulate > 1,
        )
        run.optimize(1)
        seconds = run.step(2)
        for turn in sorted({turn for rule in adapter.rules or () for turn in rule.turns if turn}):
            run.optimize(turn)
            seconds = run.step(turn + 1)
        run.evaluate()
        held = sum(p.numel() * p.element_size() for p in adapter.parameters())
        return Rehearsed(
            adapter.trainable_parameters,
            held,
            len(adapter.placement.methods),
            traced.peaks,
            seconds,
        )


def frozen_seconds(conditions: Conditions, machine: Machine) -> float:
    """Forward and backward of the frozen base alone, with gradients wanted at the embeddings, so that there is a backward."""
    depths = shallow_depths(conditions)
    if depths is not None:
        one, two = (frozen_seconds(shallow(conditions, depth), machine) for depth in depths[:2])
        return one + int(conditions.config.num_hidden_layers - depths[0]) / (
            depths[1] - depths[0]
        ) * (two - one)
    rows, model = (
        _rows(conditions),
        built(conditions.config, conditions.dtype, conditions.labels is not None),
    )
    with _rehearsable(conditions), Fakes() as fake, Traced(machine) as traced:
        _get_ready(model, conditions, traced)
        model.requires_grad_(False)
        model.enable_input_require_grads()
        with traced.phase(FORWARD, makes="activations"):
            torch.autograd.backward(_loss(model, _given(rows, conditions, model, fake)))
        return float(traced.seconds[FORWARD])


@contextlib.contextmanager
def _rehearsable(conditions: Conditions) -> Iterator[None]:
    """Say of a model that cannot do without numbers that it cannot, instead of torch's log of it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, LorakinError):
            raise
        kind = type(conditions.config).__name__.removesuffix("Config")
        raise ModelError(
            f"{kind} cannot be planned with {conditions.batch_size} rows of {conditions.max_length} tokens: on tensors without "
            f"numbers its forward or backward fails: {str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        log.disabled = False


class Fakes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode that a copy of its tensors shares."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fakes:
        return self


@dataclasses.dataclass
class _Run:
    """As transformers' Trainer and `lorakin.training.run_trainer.AdapterTrainer` do it."""

    model: Any
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]
    traced: Traced
    accumulates: bool = False
    good: list[Tensor] = dataclasses.field(default_factory=list)
    coming: int = 0
    """Gradients that are still to come in this backward."""
    of_first_layer: int = 0

    def __post_init__(self) -> None:
        for parameter in self.trained():
            parameter.register_post_accumulate_grad_hook(self._is_gradient)  # type: ignore[no-untyped-call]

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.traced.become("gradients", [parameter.grad])
        self.coming -= 1
        if (
            self.coming == self.of_first_layer
        ):  # apart, so that both phases grow along lines with the layers
            self.traced.go_on_as(FIRST)

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def step(self, number: int) -> float:
        """Step `number` of the run; returns its seconds."""
        self.traced.seconds.clear()
        self.coming = len(self.trained())
        self.of_first_layer = self.coming // max(
            2, getattr(self.model.config, "num_hidden_layers", 2)
        )
        if self.accumulates:
            self._begin_gradients(FORWARD)
        with self.traced.phase(FORWARD, makes="activations"):
            loss = _loss(self.model, self.batch)
            torch.autograd.backward(loss)
            del loss
        self.optimize(number)
        return float(self.traced.seconds.total())

    def optimize(self, number: int) -> None:
        """The optimizer's part of it, of gradients that are there or else zero."""
        trained = self.trained()
        self.adapter.steps = number - 1
        with self.traced.phase(STEP, makes="a good copy"):
            self.good = [parameter.detach().clone() for parameter in trained]
        self._begin_gradients(STEP)
        with self.traced.phase(STEP, makes="temporary"):
            nn.utils.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.traced.all_become("optimizer", "temporary")
        self.traced.become("adapter", self.adapter.parameters())

    def _begin_gradients(self, phase: str) -> None:
        """Gradients that are zero, where there are none."""
        with self.traced.phase(phase, makes="gradients"):
            for parameter in self.trained():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def evaluate(self) -> None:
        """A batch of held-out rows."""
        self.model.eval()
        with self.traced.phase(EVALUATION, makes="activations"):
            _loss(self.model, self.batch)


def _get_ready(model: Any, conditions: Conditions, traced: Traced) -> None:
    """Give a skeleton its tensors, and make it what the run makes of it before it is adapted."""
    model.train()
    with traced.phase("", makes="weights"):
        give_tensors(model)
    traced.pieces = 0  # weights come once and stay, so that they leave no holes
    if conditions.fuse:
        fuse(model)
    if conditions.gradient_checkpointing:
        checkpoint_activations(model)


def _where(conditions: Conditions, model: Any) -> dict[str, Any]:
    whole = conditions.modules_to_save or (head_of(model) if conditions.labels is not None else [])
    return {
        "targets": conditions.targets,
        "exclude": conditions.exclude,
        "layers": conditions.layers,
        "modules_to_save": list(whole),
        "rank_above": conditions.rank_above,
    }


def _rows(conditions: Conditions) -> dict[str, Tensor]:
    """A real batch of full rows, all of them answer."""
    row = [1] * conditions.max_length
    return AnswerCollator(0)([{"input_ids": row, "labels": row}] * conditions.batch_size)


def _given(
    rows: dict[str, Tensor], conditions: Conditions, model: Any, fake: Fakes
) -> dict[str, Tensor]:
    """The rows as the model takes them, without numbers."""
    batch: dict[str, Tensor] = {key: fake.from_tensor(tensor) for key, tensor in rows.items()}
    if conditions.labels is not None:
        batch["labels"] = batch["input_ids"][:, 0]
    elif "logits_to_keep" not in inspect.signature(model.forward).parameters:
        batch["labels"] = batch["input_ids"]
    if (
        "logits_to_keep" not in inspect.signature(model.forward).parameters
        or conditions.labels is not None
    ):
        del batch["logits_to_keep"]
    if (
        not conditions.padded
    ):  # transformers looks at a real mask, sees no padding and leaves it out
        del batch["attention_mask"]
    return batch


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    if batch["labels"].ndim == 1:
        return model(**batch).loss  # type: ignore[no-any-return]
    return answer_loss(
        model(**{key: tensor for key, tensor in batch.items() if key != "labels"}), batch["labels"]
    )
