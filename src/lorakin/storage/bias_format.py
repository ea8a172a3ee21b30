"""PEFT's words for biases that an adapter trains: the config's `bias`, and their keys, both ways.

A bias of an adapted module is `<path>.base_layer.bias`, any other `<path>.bias`. `bias` is "lora_only"
("vera_only" in VeRA's config) for the adapted modules', "all" for the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.inject.biases import ADAPTED, ALL, NONE, adapted_modules, bias_of
from lorakin.inject.experts import ExpertMatrix

ONLY = "_only"
WRAPPED = re.compile(r"(.+?)\.((?:base_layer\.)*)(?:lora|vera)_")
TWICE = re.compile(r"\.(?:original_module|modules_to_save)\..*\bbias$")
"""Of a module trained whole PEFT's "all" writes the biases again, the base's and the trained."""


def word(model: nn.Module, biases: Collection[str], sites: Iterable[str], peft_type: str) -> str:
    """The config's `bias` of an adapter with biases at these paths that adapts the modules at those."""
    if not biases:
        return NONE
    if set(biases) - adapted_modules(model, sites):
        return ALL
    return "vera_only" if peft_type == "VERA" else ADAPTED


def keyed(biases: Mapping[str, Tensor], names: Collection[str], prefix: str) -> dict[str, Tensor]:
    """The biases under PEFT's keys, in a file whose other tensors have these names.

    PEFT wraps a module once for itself and once for each of its parameters that are adapted; an
    attention's `out_proj` is inside the attention's wrapper.
    """
    wraps: dict[str, int] = {}
    for name in names:
        if match := WRAPPED.match(name.removeprefix(prefix)):
            wraps[match[1]] = max(wraps.get(match[1], 0), 1 + match[2].count("."))
    written = {}
    for path, bias in biases.items():
        parent, _, leaf = path.rpartition(".")
        inner = f"{parent}.base_layer.{leaf}"
        place = inner if inner in wraps else path
        written[f"{prefix}{place}.{'base_layer.' * wraps.get(place, 0)}bias"] = bias
    return written


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise `AdapterError` if the config's `bias` is no word of PEFT's."""
    which = config.get("bias") or NONE
    if which not in (NONE, ALL) and not (isinstance(which, str) and which.endswith(ONLY)):
        raise AdapterError(
            f"{where}: its config says bias={which!r}; expected none, all or {ADAPTED}"
        )


def without_doubles(config: Mapping[str, Any], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`rest`, by key without prefix, without what PEFT writes twice."""
    twice = config.get("bias") == ALL
    return {name: tensor for name, tensor in rest.items() if not (twice and TWICE.search(name))}


def split(
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    adapted: Collection[str],
    copies: Collection[str],
    rest: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The biases in an adapter's file, by the path of the module in the model's order, and what is left.

    Those that are one parameter in the model are one object, if they are equal.

    Raises:
        AdapterError: one is missing, or does not fit the model's.
    """
    which = config.get("bias") or NONE
    if which == NONE:
        return {}, dict(rest)
    found, left = {}, {}
    for name, tensor in rest.items():
        path = name.removesuffix(".bias")
        path = path if path in modules else path.replace(".base_layer", "")
        module = modules.get(path) if name.endswith(".bias") else None
        if module is not None and bias_of(module) is not None:
            found[path] = tensor
        elif (
            module is None or "bias" not in module._buffers
        ):  # "all" writes buffers of that name too
            left[name] = tensor
    whole = tuple(f"{path}." for path in copies)
    biases: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for path, module in modules.items():
        own = (
            None
            if isinstance(module, ExpertMatrix) or f"{path}.".startswith(whole)
            else bias_of(module)
        )
        if own is None:
            continue
        if path in found:
            _check(found[path], own, path, where)
            one = made.setdefault(id(own), found[path])
            biases[path] = one if one is found[path] or one.equal(found[path]) else found[path]
        elif id(own) in made:
            biases[path] = made[id(own)]
    owners = {id(bias_of(modules[path])) for path in biases}
    wanted = {
        path: bias_of(m)
        for path, m in modules.items()
        if path in adapted or (which == ALL and not _in(path, whole))
    }
    lacking = [p for p, own in wanted.items() if own is not None and id(own) not in owners]
    if lacking:
        raise AdapterError(
            f"{where}: its config says bias={which!r}, but it lacks the biases of {some(lacking)}"
        )
    return biases, left


def _in(path: str, whole: tuple[str, ...]) -> bool:
    return f"{path}.".startswith(whole)


def _check(tensor: Tensor, own: Tensor, path: str, where: str) -> None:
    if tensor.shape != own.shape or not tensor.is_floating_point():
        raise AdapterError(
            f"{where}: the bias of {path} is {tensor.dtype}, {tuple(tensor.shape)}; this model's is {tuple(own.shape)}"
        )
