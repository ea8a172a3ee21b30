"""Writing experts that a model keeps in one parameter: PEFT has one pair for the whole stack.

lorakin has a pair for each expert, at `<parameter>.<number>`. PEFT has one for all of them, on the
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
from lorakin.storage.peft.expert_keys import NESTED, experts_in, keyed, take, turned, wrapped
from lorakin.storage.peft.expert_layout import VERSION, WRITTEN, is_turned, takes_last
from lorakin.storage.peft.forms import PREFIX, TARGET_PARAMETERS
from lorakin.storage.peft.scales import PairScale, set_scale, without


def are_whole(model: nn.Module, methods: Mapping[str, Method]) -> bool:
    """Whether each adapted stack has all of its experts adapted alike, as PEFT's form needs it."""
    stacks: dict[str, list[Method]] = {}
    for path, method in methods.items():
        if isinstance(module_at(model, path), ExpertMatrix):
            stacks.setdefault(path.rpartition(".")[0], []).append(method)
    return all(
        len(each) == experts_in(model, stack) and all(method == each[0] for method in each)
        for stack, each in stacks.items()
    )


def stacked(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    scales: Mapping[str, PairScale],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors with the pairs of experts put together as PEFT has them.

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
        path for stacks in owners.values() for there in stacks.values() for path in there.values()
    }
    config, left = without(config, paths), dict(tensors)
    done: dict[str, Tensor] = {}
    adapted: list[str] = []
    depths: dict[str, int] = {}
    for owner, stacks in owners.items():
        module = module_at(model, owner)
        names = [name for name in module._parameters if name in stacks]
        for depth, name in enumerate(reversed(names)):
            there = {n: take(left, f"{PREFIX}{path}.") for n, path in stacks[name].items()}
            if is_turned(module, name, takes_last(module, WRITTEN)):
                there = {number: turned(slots) for number, slots in there.items()}
            own = {number: scales[path] for number, path in stacks[name].items()}
            stack = f"{owner}.{name}"
            matrices = [module_at(model, f"{stack}.{n}") for n in range(experts_in(model, stack))]
            scale, together = _together(there, own, matrices)
            done |= keyed(f"{PREFIX}{owner}.{NESTED * depth}", together)
            set_scale(config, stack, scale)
        depths[owner] = len(names)
        adapted += [f"{owner}.{name}" for name in names]

    # PEFT insists on dropout 0 for parameters; lorakin.json remembers the adapter's own.
    config |= {TARGET_PARAMETERS: adapted, VERSION: WRITTEN, "lora_dropout": 0.0}
    return config, {wrapped(key, depths): tensor for key, tensor in (left | done).items()}


def _owners(model: nn.Module, paths: Mapping[str, Any]) -> dict[str, dict[str, dict[int, str]]]:
    """Module that owns stacks → name of the parameter → number of the expert → its path."""
    owners: dict[str, dict[str, dict[int, str]]] = {}
    for path in paths:
        if isinstance(module_at(model, path), ExpertMatrix):
            owner, name, number = path.rsplit(".", 2)
            owners.setdefault(owner, {}).setdefault(name, {})[int(number)] = path
    return owners


def _together(
    there: Mapping[int, Mapping[str, Tensor]],
    scales: Mapping[int, PairScale],
    matrices: Sequence[nn.Module],
) -> tuple[PairScale, dict[str, Tensor]]:
    """The tensors of one stack, with the highest rank of its experts, and their scale."""
    scale = max(scales.values(), key=lambda one: one.rank)
    one_A, one_B = next((slots["A"], slots["B"]) for slots in there.values())
    up = one_B.new_zeros(len(one_B), scale.rank, len(matrices))
    down = one_A.new_zeros(len(matrices), scale.rank, one_A.shape[1])
    for number, slots in there.items():
        factor, rank = scales[number].value / scale.value, len(slots["A"])
        up[:, :rank, number] = slots["B"] if factor == 1 else factor * slots["B"]
        down[number, :rank] = slots["A"]

    parts = {"A": down.flatten(0, 1), "B": up.flatten(1)}
    if any("m" in slots for slots in there.values()):
        nothing = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[2])
        lengths = [
            there[n]["m"] if n in there else row_norms(base_weight_of(matrix), *nothing)
            for n, matrix in enumerate(matrices)
        ]
        parts["m"] = torch.stack([length.to(up) for length in lengths])
    return scale, parts
