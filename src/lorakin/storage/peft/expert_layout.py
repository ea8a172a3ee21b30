"""Which side of an expert parameter (experts, first side, last side) PEFT takes for its inputs.

PEFT changed that twice:

    PEFT              inputs if transformers' `is_transposed` is set    inputs otherwise
    up to 0.18        first side                                        first side
    0.19.0            last side                                         first side
    from 0.19.1 on    first side                                        last side

With the first side the change of a matrix is (B·A)ᵀ, with the last side it is B·A. The shapes in a
file show which it was, unless every parameter is square; then `peft_version` shows it, which PEFT
writes since 0.18. A router's weight has two dimensions and is treated like a linear layer's by all
versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.family.sharding import whole_shape
from lorakin.inject.adapted import module_at
from lorakin.inject.experts import declared_transposed, is_transposed
from lorakin.storage.peft.expert_keys import BASE_LAYER_PREFIX
from lorakin.storage.peft.formats import DOWN, LORA_TENSOR_NAMES, PREFIX

VERSION = "peft_version"
WRITTEN_AS_PEFT = "0.19.1"
"""The first version of PEFT that takes the same side as the files that lorakin writes."""


def is_transposed_in_file(owner: nn.Module, name: str, last: bool | None) -> bool:
    """Returns whether a stack's pairs are those of the transposed matrices.

    `last`: whether PEFT took the last side of the stack for the inputs.
    """
    parameter = owner._parameters[name]
    if parameter is None or len(whole_shape(parameter)) != 3:
        return False
    return last == is_transposed(owner)


def takes_last_by_version(owner: nn.Module, version: Any) -> bool | None:
    """Returns whether a version of PEFT takes the last side of `owner`'s stacks for the inputs.

    None if the version does not tell. PEFT uses transformers' flag alone (`declared_transposed`),
    not the shapes, which `is_transposed` uses too.
    """
    number = re.match(r"(\d+)\.(\d+)\.(\d+)(?P<rest>.*)", str(version))
    if number is None:
        return None
    release, has_flag = tuple(map(int, number.groups()[:3])), bool(declared_transposed(owner))
    # A development version between two releases may be on either side of a change.
    if number["rest"] and (0, 18) <= release < (0, 20):
        return None
    if release < (0, 19):
        return False
    return has_flag if release == (0, 19, 0) else not has_flag


def takes_last_by_owner(
    model: nn.Module,
    owners: Mapping[str, Sequence[str]],
    tensors: Mapping[str, Tensor],
    version: Any,
) -> dict[str, bool | None]:
    """Returns, by owner, whether the file takes the last side of its stacks for the inputs.

    The shapes tell, or else the version of PEFT; None if neither does.
    """
    seen: dict[bool, set[bool]] = {True: set(), False: set()}
    modules = {owner: module_at(model, owner) for owner in owners}
    for owner, names in owners.items():
        parameters: Mapping[str, Any] = modules[owner]._parameters
        for depth, name in enumerate(reversed(names)):
            A = tensors.get(f"{PREFIX}{owner}.{BASE_LAYER_PREFIX * depth}{LORA_TENSOR_NAMES[DOWN]}")
            _, *sides = whole_shape(parameters[name])
            if A is None or not A.dim() == len(sides) == 2:
                continue
            if sides[0] != sides[1] and A.shape[1] in sides:
                seen[bool(declared_transposed(modules[owner]))].add(A.shape[1] == sides[1])

    by_owner: dict[str, bool | None] = {}
    for owner, module in modules.items():
        by_shapes = seen[bool(declared_transposed(module))]
        by_owner[owner] = (
            next(iter(by_shapes)) if len(by_shapes) == 1 else takes_last_by_version(module, version)
        )
    return by_owner


def read_transposed_in_file(
    model: nn.Module, owner: str, name: str, last: bool | None, version: Any, where: str
) -> bool:
    """Returns `is_transposed_in_file` of a stack; an `AdapterError` if the file does not tell."""
    module = module_at(model, owner)
    parameters: Mapping[str, Any] = module._parameters
    if last is None and len(whole_shape(parameters[name])) == 3:
        raise AdapterError(
            f"{where}: PEFT before 0.19.1 exchanged the inputs and outputs of {owner}.{name}. The "
            f"file does not tell whether it did here: the parameter is square, and {VERSION} is "
            f"{version!r}. Say in adapter_config.json with which release of PEFT the adapter was "
            f'trained, such as "{VERSION}": "0.17.1"'
        )
    return is_transposed_in_file(module, name, last)
