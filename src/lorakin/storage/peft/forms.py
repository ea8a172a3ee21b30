"""PEFT's words for what members decide, in one table: types, config fields, names of tensors.

This is the one file outside `family/` that knows members by name, since PEFT's files do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.family import AdaLoRA, DoRA, LoRA, Member, Method, Modifier, VeRA
from lorakin.family.adalora import Triplets
from lorakin.inject.layers import (
    ConvolutionLayer,
    EmbeddingLayer,
    ExpertLayer,
    Layer,
    LinearLayer,
    QuantisedLayer,
    TransposedLayer,
)

PREFIX = "base_model.model."
"""What every key in a file begins with."""
TARGET_PARAMETERS = "target_parameters"
"""The field that names parameters without a layer of their own, such as experts."""
MATRICES: tuple[type[Layer], ...] = (LinearLayer, QuantisedLayer, TransposedLayer)


@dataclasses.dataclass(frozen=True)
class Form:
    """How PEFT writes one type of adapter."""

    peft_type: str
    members: tuple[type[Member], ...]
    """What such a file is read as, where nothing else says more."""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Setting of a member → field of the config."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Field → what PEFT takes where the file does not say it."""
    always: tuple[str, ...] = ()
    """Fields that are written even where they have PEFT's default."""
    ignored: tuple[str, ...] = ()
    """Fields that PEFT writes and does not read."""
    slots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Slot → name of the tensor, after the module's path."""
    lookup_slots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The same for an embedding."""
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Slot that all modules share → the tensor's whole key."""
    layers: tuple[type[Layer], ...] = MATRICES
    """The kinds of layer that PEFT adapts so."""
    has_patterns: bool = False
    """`rank_pattern` and `alpha_pattern` give modules a rank and an alpha of their own."""
    per_rank: str | None = None
    """The slot with one number per rank, for which `rank_pattern` lists the ranks that are left."""
    alpha_without: str | None = None
    """The setting that stands for alpha where alpha is 0 or less."""
    bias: str = "lora_only"
    """The word for "the biases of adapted modules"."""
    takes_tokens: bool = True
    """PEFT trains rows of tokens beside it."""


LORA = Form(
    peft_type="LORA",
    members=(LoRA,),
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    always=("r", "lora_alpha", "lora_dropout"),
    slots={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    lookup_slots={"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
    layers=(*MATRICES, EmbeddingLayer, ConvolutionLayer, ExpertLayer),
    has_patterns=True,
)
VERA = Form(
    peft_type="VERA",
    members=(VeRA,),
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
    slots={"d": "vera_lambda_d", "b": "vera_lambda_b"},
    shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
    bias="vera_only",
    takes_tokens=False,
)
ADALORA = Form(
    peft_type="ADALORA",
    members=(AdaLoRA,),
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
    slots={"P": "lora_B", "E": "lora_E", "Q": "lora_A"},
    per_rank="E",
    alpha_without="initial_rank",
)
TOKENS = Form(peft_type="TRAINABLE_TOKENS", members=(LoRA,), ignored=("token_indices",))
"""Rows of tokens and nothing else."""

FORMS = {form.peft_type: form for form in (LORA, VERA, ADALORA, TOKENS)}
FORM_OF = {LoRA.word: LORA, VeRA.word: VERA, Triplets.word: ADALORA}
"""Word of a parametrisation → its form."""
FLAGS: Mapping[str, type[Modifier]] = {"use_dora": DoRA}
"""Field of a LORA config → the member that it adds where it is true."""
FLAG_OF = {"m": "use_dora"}
"""Slot that only a modifier has → the field that says so."""

SCHEDULE = ("total_steps", "start", "finish", "interval")
"""Settings that belong to one run, which is over when a file is read."""
NO_SCHEDULE = {"total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
"""What is written for an adapter that no run has decided for: PEFT reads no config without them."""

NAMES = LORA.slots


def names(form: Form, layer: type[Layer]) -> Mapping[str, str]:
    """Slot → name of the tensor, for a layer of this kind."""
    return form.lookup_slots if layer is EmbeddingLayer else form.slots


def plain_method(rank: int, alpha: float, dropout: float = 0.0, *, with_gain: bool) -> Method:
    """The method of plain LoRA, with DoRA's magnitudes or without."""
    pair = LoRA(rank=rank, alpha=alpha, dropout=dropout)
    return Method.of([pair, *(kind() for kind in FLAGS.values())] if with_gain else [pair])


def members_of(form: Form, config: Mapping[str, Any]) -> Sequence[type[Member]]:
    """The members that a config of PEFT's stands for."""
    return (*form.members, *(kind for flag, kind in FLAGS.items() if config.get(flag)))
