"""Which side of a parameter (experts, a, b) is its inputs, PEFT has decided in three ways. The change of the parameter is

    PEFT                   where transformers says `is_transposed`    elsewhere
    up to 0.18             (B·A)ᵀ: a is taken for the inputs          (B·A)ᵀ
    0.19.0                 B·A: b is                                  (B·A)ᵀ
    from 0.19.1 on         (B·A)ᵀ                                     B·A

The shapes in a file tell which it was, unless every parameter is square; then its `peft_version` does, which PEFT writes since
0.18. A router's weight has two dimensions and is a linear layer's in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.family.pair import whole_shape
from lorakin.inject.adapted import module_at
from lorakin.inject.experts import is_transposed, says_transposed

VERSION = "peft_version"
WRITTEN = "0.19.1"
"""The PEFT since which the form is the one that is written here."""
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}
NESTED = "base_layer."


def is_turned(owner: nn.Module, name: str, last: bool | None) -> bool:
    """Whether a stack's pairs are those of the transposed matrices, PEFT having taken its inputs for outputs."""
    parameter = owner._parameters[name]
    return (
        parameter is not None and len(whole_shape(parameter)) == 3 and last == is_transposed(owner)
    )


def takes_last(owner: nn.Module, version: Any) -> bool | None:
    """Whether that PEFT takes the last side of this module's stacks for the inputs; None if the version does not tell."""
    number = re.match(r"(\d+)\.(\d+)\.(\d+)(?P<rest>.*)", str(version))
    if number is None:
        return None
    release, says = tuple(map(int, number.groups()[:3])), bool(says_transposed(owner))
    if number["rest"] and (0, 18) <= release < (
        0,
        20,
    ):  # between two releases, on either side of a change
        return None
    return False if release < (0, 19) else says if release == (0, 19, 0) else not says


def layout(
    model: nn.Module,
    owners: Iterable[tuple[str, list[str]]],
    tensors: Mapping[str, Tensor],
    version: Any,
    prefix: str,
) -> dict[str, bool | None]:
    """Owner → whether the file takes the last side of its stacks for the inputs: by shapes, else by the version of PEFT."""
    told: dict[bool, set[bool]] = {True: set(), False: set()}
    modules = {owner: module_at(model, owner) for owner, _ in owners}
    for owner, names in owners:
        for depth, name in enumerate(reversed(names)):
            A = tensors.get(f"{prefix}{owner}.{NESTED * depth}{NAMES['A']}")
            _, *sides = whole_shape(modules[owner]._parameters[name])  # type: ignore[arg-type]
            if (
                A is not None
                and A.dim() == len(sides) == 2
                and sides[0] != sides[1]
                and A.shape[1] in sides
            ):
                told[bool(says_transposed(modules[owner]))].add(A.shape[1] == sides[1])
    found = {}
    for owner, module in modules.items():
        seen = told[bool(says_transposed(module))]
        found[owner] = next(iter(seen)) if len(seen) == 1 else takes_last(module, version)
    return found


def turns(
    model: nn.Module, owner: str, name: str, last: bool | None, version: Any, where: str
) -> bool:
    """`is_turned` of a stack that is read; raises `AdapterError` if nothing tells."""
    module = module_at(model, owner)
    if last is None and len(whole_shape(module._parameters[name])) == 3:  # type: ignore[arg-type]
        raise AdapterError(
            f"{where}: PEFT before 0.19.1 exchanged the inputs and outputs of {owner}.{name}, and the file leaves open whether "
            f"it does: the parameter is square, and {VERSION} is {version!r}. Say in adapter_config.json with which release of "
            f'PEFT the adapter was trained, such as "{VERSION}": "0.17.1"'
        )
    return is_turned(module, name, last)
