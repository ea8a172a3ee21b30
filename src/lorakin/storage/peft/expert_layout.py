"""Which side of an expert parameter (experts, first, last) is its inputs; PEFT changed it twice.

    PEFT              inputs, where transformers says `is_transposed`    inputs elsewhere
    up to 0.18        first side                                         first side
    0.19.0            last side                                          first side
    from 0.19.1 on    first side                                         last side

If the inputs are the first side, the change of a matrix is (B·A)ᵀ; if the last, it is B·A. The
shapes in a file show which it was, unless every parameter is square. Then `peft_version` shows it,
which PEFT writes since 0.18. A router's weight has two dimensions and is a linear layer's in all
of them.
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
from lorakin.storage.peft.expert_keys import NESTED
from lorakin.storage.peft.forms import NAMES, PREFIX

VERSION = "peft_version"
WRITTEN = "0.19.1"
"""The first PEFT with the layout that lorakin writes."""


def is_turned(owner: nn.Module, name: str, last: bool | None) -> bool:
    """Whether a stack's pairs are those of the transposed matrices.

    `last`: PEFT took the last side of the stack for the inputs.
    """
    parameter = owner._parameters[name]
    if parameter is None or len(whole_shape(parameter)) != 3:
        return False
    return last == is_transposed(owner)


def takes_last(owner: nn.Module, version: Any) -> bool | None:
    """Whether this PEFT takes the last side of `owner`'s stacks for the inputs; None if unknown."""
    number = re.match(r"(\d+)\.(\d+)\.(\d+)(?P<rest>.*)", str(version))
    if number is None:
        return None
    release, says = tuple(map(int, number.groups()[:3])), bool(declared_transposed(owner))
    # A development version between two releases may be on either side of a change.
    if number["rest"] and (0, 18) <= release < (0, 20):
        return None
    if release < (0, 19):
        return False
    return says if release == (0, 19, 0) else not says


def layout(
    model: nn.Module,
    owners: Mapping[str, Sequence[str]],
    tensors: Mapping[str, Tensor],
    version: Any,
) -> dict[str, bool | None]:
    """Owner → whether the file takes the last side of its stacks for the inputs.

    The shapes tell, or else the version of PEFT.
    """
    told: dict[bool, set[bool]] = {True: set(), False: set()}
    modules = {owner: module_at(model, owner) for owner in owners}
    for owner, names in owners.items():
        parameters: Mapping[str, Any] = modules[owner]._parameters
        for depth, name in enumerate(reversed(names)):
            A = tensors.get(f"{PREFIX}{owner}.{NESTED * depth}{NAMES['A']}")
            _, *sides = whole_shape(parameters[name])
            if A is None or not A.dim() == len(sides) == 2:
                continue
            if sides[0] != sides[1] and A.shape[1] in sides:
                told[bool(declared_transposed(modules[owner]))].add(A.shape[1] == sides[1])

    found = {}
    for owner, module in modules.items():
        seen = told[bool(declared_transposed(module))]
        found[owner] = next(iter(seen)) if len(seen) == 1 else takes_last(module, version)
    return found


def turns(
    model: nn.Module, owner: str, name: str, last: bool | None, version: Any, where: str
) -> bool:
    """`is_turned` for a stack that is read; raises `AdapterError` if nothing in the file tells."""
    module = module_at(model, owner)
    parameters: Mapping[str, Any] = module._parameters
    if last is None and len(whole_shape(parameters[name])) == 3:
        raise AdapterError(
            f"{where}: PEFT before 0.19.1 exchanged the inputs and outputs of {owner}.{name}. The "
            f"file does not tell whether it did here: the parameter is square, and {VERSION} is "
            f"{version!r}. Say in adapter_config.json with which release of PEFT the adapter was "
            f'trained, such as "{VERSION}": "0.17.1"'
        )
    return is_turned(module, name, last)
