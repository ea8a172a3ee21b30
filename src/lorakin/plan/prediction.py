"""Predicts memory and time of a training run, before anything is downloaded or trained.

The model is made from its config alone, on tensors without data, and the run is rehearsed on it. So
bytes of tensors are counted, not estimated. What a process takes besides tensors is measured:
`PROCESS_OVERHEAD`, `FRAGMENTATION` and a machine's speed. docs/howto/memory.md compares predictions
with measured peaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from lorakin.errors import LorakinError, SettingError
from lorakin.family import Method
from lorakin.inject.heads import head_of
from lorakin.inject.layer_kinds import is_linear
from lorakin.plan.conditions import Conditions
from lorakin.plan.few_layers import frozen_seconds, rehearse
from lorakin.plan.machine import machine
from lorakin.plan.rehearsal import FORWARD, PHASES, Rehearsed

LOADING = "loading"
PROCESS_OVERHEAD = 85 * 2**20
"""The bytes that `lorakin train` holds on a CPU besides tensors and imports: tokenizer, rows,
Trainer, code that runs for the first time."""
FRAGMENTATION = 0.3
"""The bytes that malloc keeps unused, for each byte of tensors below 32 MiB that is alive at the
peak: gaps between them that no other tensor fits into."""
QUANTISED = {"nf4": 4.127 / 8, "int8": 1.0, "torchao-int8": 1.0}
"""The bytes for each element of a weight. Eight-bit weights also have a float32 for each output."""
RESTORED_FOR_BACKWARD = frozenset({"torchao-int8"})
"""Those whose layers keep their restored weight for the backward; others restore it again."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one method will take.

    Memory is in bytes. On a CPU it is what the process adds to its imports.

    Attributes:
        method: the method's words.
        trainable_parameters: the number of trainable parameters.
        adapter_bytes: the bytes of all the adapter's tensors, each counted once, with frozen ones.
        rank: the rank of the pairs when training begins; None if they have no common rank.
        modules: the number of adapted modules.
        weight_bytes: the bytes of the base model.
        optimizer_bytes: the bytes of the optimizer's state and of what members keep between steps.
        activation_bytes: the bytes of activations and temporary tensors at the peak of forward and
            backward.
        peaks: phase → its peak.
        step: the time of a step over that of forward and backward of the frozen base.
        supposed: whether the method chooses its modules by a probe; then this is its worst case.
    """

    method: str
    trainable_parameters: int
    adapter_bytes: int
    rank: int | None
    modules: int
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    peaks: dict[str, int]
    step: float
    supposed: bool

    @property
    def peak(self) -> int:
        """The highest of all phases."""
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan for `--json`."""
        return {**dataclasses.asdict(self), "peak": self.peak, "phase": self.phase}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A method that cannot run under the conditions, and why."""

    method: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the refusal for `--json`."""
        return dataclasses.asdict(self)


def plan_methods(
    conditions: Conditions, methods: Iterable[Method], quantize: str | None = None
) -> list[Plan | Refusal]:
    """Plans each of `methods`; those that cannot run are refused with a reason.

    >>> import torch, transformers, lorakin
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    ...     num_attention_heads=2)
    >>> conditions = Conditions(config, torch.float32, batch_size=1, max_length=4)
    >>> [plan] = plan_methods(conditions, [lorakin.family.method_named("lora", {"rank": 2})])
    >>> plan.trainable_parameters
    496

    Args:
        conditions: the model's config, dtype, batch and so on.
        methods: see `lorakin.family.method_named`.
        quantize: a key of `QUANTISED`: the linear layers but the head are kept in fewer bits. This
            is computed, not rehearsed.

    Raises:
        SettingError: an unknown quantisation.
        LorakinError: the base model itself cannot be planned.
    """
    frozen = frozen_step(conditions)
    plans: list[Plan | Refusal] = []
    for method in methods:
        try:
            plans.append(plan_method(conditions, method, frozen, quantize))
        except LorakinError as error:
            plans.append(Refusal(method.words, str(error)))
    return plans


def plan_method(
    conditions: Conditions, method: Method, frozen: float, quantize: str | None = None
) -> Plan:
    """Plans one method; `frozen` is `frozen_step(conditions)`.

    Raises:
        LorakinError: the method cannot run under these conditions.
    """
    rehearsed = rehearse(conditions, method, machine(conditions.device, conditions.dtype))
    kinds = rehearsed.peaks[FORWARD].kinds
    saved, transient = quantised(conditions, quantize) if quantize else (0, 0)
    peaks = process_peaks(conditions, rehearsed)
    return Plan(
        method=method.words,
        trainable_parameters=rehearsed.trainable_parameters,
        adapter_bytes=rehearsed.adapter_bytes,
        rank=getattr(method.parametrisation, "rank", None),
        modules=rehearsed.modules,
        weight_bytes=kinds["weights"] - saved,
        optimizer_bytes=kinds.get("optimizer", 0),
        activation_bytes=kinds.get("activations", 0) + transient,
        peaks={phase: peak - saved + transient for phase, peak in peaks.items()},
        step=rehearsed.seconds / frozen,
        supposed=method.needed_probe is not None,
    )


def frozen_step(conditions: Conditions) -> float:
    """Returns the seconds of forward and backward of the frozen base.

    Only ratios of such seconds are meaningful.
    """
    return frozen_seconds(conditions, machine(conditions.device, conditions.dtype))


def process_peaks(conditions: Conditions, rehearsed: Rehearsed) -> dict[str, int]:
    """Returns the bytes that the process holds at the peak of each phase.

    On a GPU these are its tensors. On a CPU, malloc returns tensors of 32 MiB and more to the
    system; the memory of smaller ones, with its gaps, stays with the process from the phase that
    needs most of it. Weights in another dtype than their files are converted from the files, which
    are mapped until that is done.
    """
    peaks = {phase: rehearsed.peaks[phase] for phase in PHASES}
    if conditions.device != "cpu":
        return {phase: peak.total for phase, peak in peaks.items()}

    small, process_bytes = 0, {}
    for phase, peak in peaks.items():
        small = max(small, round((1 + FRAGMENTATION) * peak.small_tensor_bytes))
        process_bytes[phase] = peak.total - peak.small_tensor_bytes + small + PROCESS_OVERHEAD

    weights, file_bytes = peaks[FORWARD].kinds["weights"], 0
    stored = conditions.config.dtype or torch.float32
    if stored != conditions.dtype:
        file_bytes = weights * stored.itemsize // conditions.dtype.itemsize
    return {LOADING: weights + file_bytes, **process_bytes}


def quantised(conditions: Conditions, quantize: str) -> tuple[int, int]:
    """Returns the bytes that quantising saves, and those of the weights that are restored at once.

    That is the largest, for a moment; or all, of one block with checkpointing, if the backward
    needs them.

    Raises:
        SettingError: `quantize` is not a key of `QUANTISED`.
    """
    if quantize not in QUANTISED:
        raise SettingError(f"quantize must be one of {', '.join(QUANTISED)}, not {quantize!r}")
    model = conditions.model()
    heads = tuple(head_of(model))
    saved = largest = restored = 0.0
    for path, module in model.named_modules():
        if is_linear(module) and not path.startswith(heads or (" ",)):
            weight = module.weight
            scales = 4 * len(weight) if QUANTISED[quantize] == 1 else 0
            saved += weight.numel() * (weight.element_size() - QUANTISED[quantize]) - scales
            largest = max(largest, weight.numel() * weight.element_size())
            restored += weight.numel() * weight.element_size()
    if quantize in RESTORED_FOR_BACKWARD:
        blocks = getattr(conditions.config, "num_hidden_layers", None) or 1
        largest = restored / (blocks if conditions.gradient_checkpointing else 1)
    return round(saved), round(largest)
