"""PEFT's words for what members decide, in one table: types, config fields and their defaults.

The names of tensors stand with the slots that the members declare.

This is the one file outside `family/` that knows members by name, since PEFT's files do.
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
from lorakin.family.slots import Slot, Slots
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
class Form:
    """How PEFT writes one type of adapter."""

    peft_type: str
    pair: type[Parametrisation] | None
    """The parametrisation whose tensors such a file holds; its slots have PEFT's names."""
    member: type[Member]
    """What such a file is read as, where nothing else says more."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Setting of a member → field of the config."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Field → what PEFT takes where the file does not say it."""
    always: tuple[str, ...] = ()
    """Fields that are written even where they have PEFT's default."""
    ignored: tuple[str, ...] = ()
    """Fields that PEFT writes and does not read."""
    layers: tuple[type[LayerKind], ...] = MATRICES
    """The kinds of layer that PEFT adapts so."""
    has_patterns: bool = False
    """`rank_pattern` and `alpha_pattern` give modules a rank and an alpha of their own."""
    alpha_without: str | None = None
    """The setting that stands for alpha where alpha is 0 or less."""
    bias: str = "lora_only"
    """The word for "the biases of adapted modules"."""
    takes_tokens: bool = True
    """PEFT trains rows of tokens beside it."""
    flags: Mapping[str, type[Modifier]] = dataclasses.field(default_factory=dict)
    """Field of the config → the member that it adds where it is true."""

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
        """The same for an embedding."""
        own = None if self.pair is None else self.pair.lookup_slots
        return _names(self._declared(own or {}), shared=False)

    @cached_property
    def shared(self) -> dict[str, str]:
        """Slot that all modules share → the tensor's whole key."""
        return _names(self.pair_slots, shared=True)

    def _declared(self, own: Slots) -> dict[str, Slot]:
        more = (member.slots for member in self.flags.values())
        return {name: slot for slots in (own, *more) for name, slot in slots.items()}


def _names(slots: Slots, *, shared: bool) -> dict[str, str]:
    return {name: slot.peft for name, slot in slots.items() if slot.peft and slot.shared == shared}


LORA = Form(
    peft_type="LORA",
    pair=LoRA,
    member=LoRA,
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    always=("r", "lora_alpha", "lora_dropout"),
    layers=(*MATRICES, EmbeddingLayer, ConvolutionLayer, ExpertLayer),
    has_patterns=True,
    flags={"use_dora": DoRA},
)
VERA = Form(
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
    always=("r", "projection_prng_key", "save_projection"),
    bias="vera_only",
    takes_tokens=False,
)
ADALORA = Form(
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
    always=(
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
    alpha_without="initial_rank",
)
TOKENS = Form(peft_type="TRAINABLE_TOKENS", pair=None, member=LoRA, ignored=("token_indices",))
"""Rows of tokens and nothing else."""

FORMS = {form.peft_type: form for form in (LORA, VERA, ADALORA, TOKENS)}
FORM_OF = {form.pair.word: form for form in FORMS.values() if form.pair is not None}
"""Word of a parametrisation → its form."""
FLAGS = LORA.flags

PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica", "lora_fa")
"""Words of `init_lora_weights` whose file is a plain pair for the plain base."""

SCHEDULE = ("total_steps", "start", "finish", "interval")
"""Settings that belong to one run, which is over when a file is read."""
NO_SCHEDULE = {"total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
"""What is written for an adapter that no run has decided for: PEFT reads no config without them."""

NAMES = LORA.slots


def names(form: Form, layer: type[LayerKind]) -> Mapping[str, str]:
    """Slot → name of the tensor, for a layer of this kind.

    >>> names(LORA, EmbeddingLayer)["A"]
    'lora_embedding_A'
    """
    return form.lookup_slots if layer is EmbeddingLayer else form.slots


def plain_method(rank: int, alpha: float, dropout: float = 0.0, *, with_gain: bool) -> Method:
    """The method of plain LoRA, with DoRA's magnitudes or without."""
    pair = LoRA(rank=rank, alpha=alpha, dropout=dropout)
    return Method.of([pair, *(kind() for kind in FLAGS.values())] if with_gain else [pair])


def members_of(form: Form, config: Mapping[str, Any]) -> Sequence[type[Member]]:
    """The members that a config of PEFT's stands for."""
    flags = [kind for flag, kind in form.flags.items() if config.get(flag)]
    start = made_again().get(start_word(config)) if form is LORA else None
    return (form.member, *flags, *([start] if start else []))


def made_again() -> dict[str, type[Start]]:
    """Word of `init_lora_weights` → the member that makes its start of the base weight again."""
    starts = [m for m in members() if issubclass(m, Start) and m.peft_start]
    return {start.peft_start: start for start in starts if start.needs == {WEIGHT}}


def start_word(config: Mapping[str, Any]) -> str:
    """The word of `init_lora_weights`, in small letters; "" where it is true, false or null."""
    start = config.get("init_lora_weights")
    return start.lower() if isinstance(start, str) else ""
