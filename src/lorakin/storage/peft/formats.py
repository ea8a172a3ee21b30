"""PEFT's file formats in one table: `peft_type`, config fields and their defaults.

The names of tensors come from the slots that the members declare (`Slot.peft`). This is the one
file outside `family/` that knows members by name, since PEFT's files do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakin.family import (
    WEIGHT,
    AdaLoRA,
    DoRA,
    LoRA,
    Member,
    Method,
    Modifier,
    Parametrisation,
    VeRA,
    members,
)
from lorakin.family.adalora import Triplets
from lorakin.family.slots import Slot, Slots, factors_of
from lorakin.family.start import Start
from lorakin.inject.layer_kinds import (
    ConvolutionLayer,
    EmbeddingLayer,
    ExpertLayer,
    LayerKind,
    LinearLayer,
    QuantisedLayer,
    TransposedLayer,
)

PREFIX = "base_model.model."
"""What every key in a file begins with."""
TARGET_PARAMETERS = "target_parameters"
"""The field that names parameters without a layer of their own, such as experts."""
MATRICES: tuple[type[LayerKind], ...] = (LinearLayer, QuantisedLayer, TransposedLayer)


@dataclasses.dataclass(frozen=True)
class PeftFormat:
    """One of PEFT's file formats: how it writes one `peft_type` of adapter."""

    peft_type: str
    pair: type[Parametrisation] | None
    """The parametrisation whose tensors such a file holds; its slots have PEFT's names."""
    member: type[Member]
    """The member as which such a file is read, if lorakin's part does not name the members."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Setting of a member → field of the config."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Field → PEFT's default."""
    always_written: tuple[str, ...] = ()
    """Fields that are written even if they have PEFT's default."""
    ignored: tuple[str, ...] = ()
    """Fields that PEFT writes and does not read."""
    layers: tuple[type[LayerKind], ...] = MATRICES
    """The kinds of layer that PEFT can adapt with it."""
    has_patterns: bool = False
    """Whether `rank_pattern` and `alpha_pattern` give single modules another rank and alpha."""
    alpha_fallback: str | None = None
    """The setting that is used for alpha if alpha is 0 or less."""
    bias: str = "lora_only"
    """The value of `bias` for "the biases of adapted modules"."""
    takes_tokens: bool = True
    """Whether PEFT can train token rows in the same adapter."""
    flags: Mapping[str, type[Modifier]] = dataclasses.field(default_factory=dict)
    """Field of the config → the member that it adds if it is true."""

    @cached_property
    def pair_slots(self) -> Slots:
        """The slots of the parametrisation."""
        return {} if self.pair is None else self.pair.slots

    @cached_property
    def slots(self) -> dict[str, str]:
        """Slot → name of the tensor, after the module's path."""
        return _names(self._declared(self.pair_slots), shared=False)

    @cached_property
    def lookup_slots(self) -> dict[str, str]:
        """`slots` for an embedding."""
        slots = None if self.pair is None else self.pair.lookup_slots
        return _names(self._declared(slots or {}), shared=False)

    @cached_property
    def shared(self) -> dict[str, str]:
        """Slot that all modules share → the tensor's whole key."""
        return _names(self.pair_slots, shared=True)

    def _declared(self, pair_slots: Slots) -> dict[str, Slot]:
        """Returns the slots of the pair and of the members that flags add."""
        of_flags = (member.slots for member in self.flags.values())
        return {name: slot for slots in (pair_slots, *of_flags) for name, slot in slots.items()}


def _names(slots: Slots, *, shared: bool) -> dict[str, str]:
    return {name: slot.peft for name, slot in slots.items() if slot.peft and slot.shared == shared}


LORA = PeftFormat(
    peft_type="LORA",
    pair=LoRA,
    member=LoRA,
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    always_written=("r", "lora_alpha", "lora_dropout"),
    layers=(*MATRICES, EmbeddingLayer, ConvolutionLayer, ExpertLayer),
    has_patterns=True,
    flags={"use_dora": DoRA},
)
VERA = PeftFormat(
    peft_type="VERA",
    pair=VeRA,
    member=VeRA,
    fields={
        "rank": "r",
        "dropout": "vera_dropout",
        "seed": "projection_prng_key",
        "d_init": "d_initial",
        "save_projection": "save_projection",
    },
    defaults={
        "r": 256,
        "vera_dropout": 0.0,
        "projection_prng_key": 0,
        "d_initial": 0.1,
        "save_projection": True,
    },
    always_written=("r", "projection_prng_key", "save_projection"),
    bias="vera_only",
    takes_tokens=False,
)
ADALORA = PeftFormat(
    peft_type="ADALORA",
    pair=Triplets,
    member=AdaLoRA,
    fields={
        "initial_rank": "init_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "target_rank": "target_r",
        "total_steps": "total_step",
        "start": "tinit",
        "finish": "tfinal",
        "interval": "deltaT",
        "beta1": "beta1",
        "beta2": "beta2",
        "orthogonality": "orth_reg_weight",
    },
    defaults={
        "init_r": 12,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_r": 8,
        "total_step": None,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
    },
    always_written=(
        "init_r",
        "lora_alpha",
        "lora_dropout",
        "target_r",
        "total_step",
        "tinit",
        "tfinal",
        "orth_reg_weight",
    ),
    ignored=("r",),
    alpha_fallback="initial_rank",
)
TOKENS_ONLY = PeftFormat(
    peft_type="TRAINABLE_TOKENS", pair=None, member=LoRA, ignored=("token_indices",)
)
"""Token rows and nothing else."""

FORMATS_BY_TYPE = {
    peft_format.peft_type: peft_format for peft_format in (LORA, VERA, ADALORA, TOKENS_ONLY)
}
FORMAT_OF = {
    peft_format.pair.word: peft_format
    for peft_format in FORMATS_BY_TYPE.values()
    if peft_format.pair is not None
}
"""Word of a parametrisation → its form."""
FLAGS = LORA.flags

PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica", "lora_fa")
"""PatternValues of `init_lora_weights` with which the file is a plain pair for the plain base."""

SCHEDULE = ("total_steps", "start", "finish", "interval")
"""Settings that belong to one run, which is over when a file is read."""
NO_SCHEDULE = {"total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
"""PatternValues for an adapter without a run's schedule: PEFT cannot read a config without them."""

_FACTORS = factors_of(LoRA.slots)
assert _FACTORS is not None
UP, DOWN = _FACTORS
(MAGNITUDE,) = DoRA.slots
"""The slots of plain LoRA's B and A and of DoRA's m, by the names that the members declare."""
LORA_TENSOR_NAMES = LORA.slots
"""Slot of plain LoRA or DoRA → the name of its tensor in PEFT's files, after the module's path."""


def names(peft_format: PeftFormat, layer: type[LayerKind]) -> Mapping[str, str]:
    """Returns the name of each slot's tensor, for a layer of this kind.

    >>> names(LORA, EmbeddingLayer)[DOWN]
    'lora_embedding_A'
    """
    return peft_format.lookup_slots if layer is EmbeddingLayer else peft_format.slots


def plain_method(rank: int, alpha: float, dropout: float = 0.0, *, with_gain: bool) -> Method:
    """Returns the method of plain LoRA, with DoRA's magnitudes or without."""
    pair = LoRA(rank=rank, alpha=alpha, dropout=dropout)
    return Method.of([pair, *(kind() for kind in FLAGS.values())] if with_gain else [pair])


def members_of(peft_format: PeftFormat, config: Mapping[str, Any]) -> Sequence[type[Member]]:
    """Returns the members that a config of PEFT's names."""
    flags = [kind for flag, kind in peft_format.flags.items() if config.get(flag)]
    start = starts_repeated_at_load().get(start_word(config)) if peft_format is LORA else None
    return (peft_format.member, *flags, *([start] if start else []))


def starts_repeated_at_load() -> dict[str, type[Start]]:
    """Returns the starts that loading computes again from the base weight.

    By the value of `init_lora_weights`; the members that choose these starts.
    """
    starts = [m for m in members() if issubclass(m, Start) and m.peft_start]
    return {start.peft_start: start for start in starts if start.needs == {WEIGHT}}


def start_word(config: Mapping[str, Any]) -> str:
    """Returns `init_lora_weights` in lower case; "" if it is true, false or null."""
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else ""
