"""Writes experts that a model keeps in one parameter: PEFT has one pair for the whole stack.

lorakin has a pair for each expert, at `<parameter>.<index>`. PEFT has one for all of them, on the
module that owns the parameter:

    lora_A.weight (experts·r, inputs)    row e·r + k is row k of expert e's A
    lora_B.weight (outputs, r·experts)   column k·experts + e is column k of expert e's B

If a module owns several stacks, the last one has the plain names. Each one before it has one more
`base_layer.` in its keys. PEFT refuses `use_dora` there; lorakin's magnitudes are
`lora_magnitude_vector` (experts, outputs), an extension of the form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family import Method
from lorakin.family.dora import row_norms
from lorakin.inject.adapted import module_at
from lorakin.inject.experts import ExpertMatrix
from lorakin.inject.placement import base_weight_of
from lorakin.storage.peft.expert_keys import (
    BASE_LAYER_PREFIX,
    experts_in,
    keyed,
    take,
    transposed,
    wrapped,
)
from lorakin.storage.peft.expert_layout import (
    VERSION,
    WRITTEN_AS_PEFT,
    is_transposed_in_file,
    takes_last_by_version,
)
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, PREFIX, TARGET_PARAMETERS, UP
from lorakin.storage.peft.scales import PairScale, set_scale, without_modules


def are_whole(model: nn.Module, methods: Mapping[str, Method]) -> bool:
    """Returns whether all experts of each stack are adapted alike, which PEFT's format needs."""
    stacks: dict[str, list[Method]] = {}
    for path, method in methods.items():
        if isinstance(module_at(model, path), ExpertMatrix):
            stacks.setdefault(path.rpartition(".")[0], []).append(method)
    return all(
        len(of_stack) == experts_in(model, stack) and all(m == of_stack[0] for m in of_stack)
        for stack, of_stack in stacks.items()
    )


def to_peft(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config and tensors with the pairs of experts joined as PEFT has them.

    Args:
        model: the base.
        config: the config, with a target for each expert.
        tensors: tensors by PEFT's key, with a pair for each expert.
        scales: path → rank and alpha of each pair.
    """
    owners = _owners(model, scales)
    if not owners:
        return dict(config), dict(tensors)
    paths = {
        path
        for stacks in owners.values()
        for experts in stacks.values()
        for path in experts.values()
    }
    config, left = without_modules(config, paths), dict(tensors)
    joined: dict[str, Tensor] = {}
    adapted: list[str] = []
    depths: dict[str, int] = {}
    for owner, stacks in owners.items():
        module = module_at(model, owner)
        names = [name for name in module._parameters if name in stacks]
        for depth, name in enumerate(reversed(names)):
            stack = f"{owner}.{name}"
            slots_of = {n: take(left, f"{PREFIX}{path}.") for n, path in stacks[name].items()}
            if is_transposed_in_file(module, name, takes_last_by_version(module, WRITTEN_AS_PEFT)):
                slots_of = {n: transposed(slots) for n, slots in slots_of.items()}
            scale_of = {n: scales[path] for n, path in stacks[name].items()}
            matrices = [module_at(model, f"{stack}.{n}") for n in range(experts_in(model, stack))]
            scale, slots = _join_experts(slots_of, scale_of, matrices)
            joined |= keyed(f"{PREFIX}{owner}.{BASE_LAYER_PREFIX * depth}", slots)
            set_scale(config, stack, scale)
        depths[owner] = len(names)
        adapted += [f"{owner}.{name}" for name in names]

    # PEFT insists on dropout 0 for parameters; lorakin.json has the adapter's dropout.
    config |= {TARGET_PARAMETERS: adapted, VERSION: WRITTEN_AS_PEFT, "lora_dropout": 0.0}
    return config, {wrapped(key, depths): tensor for key, tensor in (left | joined).items()}


def _owners(model: nn.Module, paths: Mapping[str, Any]) -> dict[str, dict[str, dict[int, str]]]:
    """Returns module that owns stacks → name of the parameter → index of the expert → its path."""
    owners: dict[str, dict[str, dict[int, str]]] = {}
    for path in paths:
        if isinstance(module_at(model, path), ExpertMatrix):
            owner, name, index = path.rsplit(".", 2)
            owners.setdefault(owner, {}).setdefault(name, {})[int(index)] = path
    return owners


def _join_experts(
    slots_of: Mapping[int, Mapping[str, Tensor]],
    scale_of: Mapping[int, PairScale],
    matrices: Sequence[nn.Module],
) -> tuple[PairScale, dict[str, Tensor]]:
    """Returns one pair for a stack, with the highest rank of its experts, and its scale.

    `slots_of`, `scale_of`: index of the adapted experts → slots, scale. `matrices`: all experts.
    """
    scale = max(scale_of.values(), key=lambda one: one.rank)
    A, B = next((slots[DOWN], slots[UP]) for slots in slots_of.values())
    up = B.new_zeros(len(B), scale.rank, len(matrices))
    down = A.new_zeros(len(matrices), scale.rank, A.shape[1])
    for index, slots in slots_of.items():
        factor, rank = scale_of[index].value / scale.value, len(slots[DOWN])
        up[:, :rank, index] = slots[UP] if factor == 1 else factor * slots[UP]
        down[index, :rank] = slots[DOWN]

    joined = {DOWN: down.flatten(0, 1), UP: up.flatten(1)}
    if any(MAGNITUDE in slots for slots in slots_of.values()):
        zero_pair = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[2])
        magnitudes = [
            slots_of[index][MAGNITUDE]
            if index in slots_of
            else row_norms(base_weight_of(matrix), *zero_pair)
            for index, matrix in enumerate(matrices)
        ]
        joined[MAGNITUDE] = torch.stack([magnitude.to(up) for magnitude in magnitudes])
    return scale, joined
