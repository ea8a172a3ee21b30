"""Biases that an adapter trains, in PEFT's files: the field `bias` and the keys.

A bias of an adapted module is `<path>.base_layer.bias`, any other `<path>.bias`. `bias` is
"lora_only" ("vera_only" in VeRA's config) for the adapted modules' biases, "all" for the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.inject.biases import ALL, NO_BIASES, adapted_modules, base_bias
from lorakin.inject.experts import ExpertMatrix
from lorakin.storage.peft.formats import FORMATS_BY_TYPE, PREFIX, PeftFormat

TENSOR_NAMES = {
    name
    for peft_format in FORMATS_BY_TYPE.values()
    for name in (*peft_format.slots.values(), *peft_format.lookup_slots.values())
}
WRAPPED = re.compile(
    rf"(.+?)\.((?:base_layer\.)*)(?:{'|'.join(map(re.escape, sorted(TENSOR_NAMES)))})"
)
TWICE = re.compile(r"\.(?:original_module|modules_to_save)\..*\bbias$")
"""Keys of the two more copies that PEFT writes of a whole module's biases, if `bias` is "all"."""


def bias_setting(
    model: nn.Module, biases: Collection[str], adapted: Iterable[str], peft_format: PeftFormat
) -> str:
    """Returns the config's `bias` for biases at the paths `biases` and pairs at `adapted`."""
    if not biases:
        return NO_BIASES
    return ALL if set(biases) - adapted_modules(model, adapted) else peft_format.bias


def to_peft(biases: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Returns the biases by PEFT's key, for a file whose other tensors have these names.

    PEFT wraps a module once for itself and once for each of its parameters that are adapted. An
    attention's `out_proj` is inside the attention's wrapper.
    """
    depths: dict[str, int] = {}
    for name in names:
        if match := WRAPPED.fullmatch(name.removeprefix(PREFIX)):
            depths[match[1]] = max(depths.get(match[1], 0), 1 + match[2].count("."))
    by_key = {}
    for path, bias in biases.items():
        parent, _, leaf = path.rpartition(".")
        inner = f"{parent}.base_layer.{leaf}"
        path = inner if inner in depths else path
        by_key[f"{PREFIX}{path}.{'base_layer.' * depths.get(path, 0)}bias"] = bias
    return by_key


def without_doubles(config: Mapping[str, Any], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors by key without prefix, without the biases that PEFT writes twice."""
    if config.get("bias") != ALL:
        return dict(rest)
    return {name: tensor for name, tensor in rest.items() if not TWICE.search(name)}


def from_peft(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: Iterable[str],
    whole_modules: Collection[str],
    rest: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the biases in an adapter's file, by path in the model's order, and the other tensors.

    Biases that are one parameter in the model are one object if they are equal.

    Args:
        model: the base.
        modules: its modules by path.
        config: PEFT's config.
        slots: paths of the modules with pairs.
        whole_modules: paths of the modules that are trained whole.
        rest: tensors by key without prefix.
        where: the file, for messages.

    Raises:
        AdapterError: one is missing, or does not fit the model's.
    """
    which = config.get("bias") or NO_BIASES
    if which == NO_BIASES:
        return {}, dict(rest)
    of_modules, left = _biases_among(modules, rest)
    inside_whole_modules = tuple(f"{path}." for path in whole_modules)
    biases = _with_tied(modules, of_modules, inside_whole_modules, where)
    in_file = {id(base_bias(modules[path])) for path in biases}
    adapted = adapted_modules(model, slots)
    lacking = [
        path
        for path, module in modules.items()
        if path in adapted or (which == ALL and not f"{path}.".startswith(inside_whole_modules))
        if (bias := base_bias(module)) is not None and id(bias) not in in_file
    ]
    if lacking:
        raise AdapterError(
            f"{where}: its config says bias={which!r}, but it lacks the biases of {some(lacking)}"
        )
    return biases, left


def _biases_among(
    modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors that are biases of modules, by path, and the others, by key."""
    of_modules, left = {}, {}
    for name, tensor in rest.items():
        path = name.removesuffix(".bias")
        path = path if path in modules else path.replace(".base_layer", "")
        module = modules.get(path) if name.endswith(".bias") else None
        if module is not None and base_bias(module) is not None:
            of_modules[path] = tensor
        elif module is None or "bias" not in module._buffers:
            # PEFT's "all" writes buffers of the name "bias" too; they are the base's.
            left[name] = tensor
    return of_modules, left


def _with_tied(
    modules: Mapping[str, nn.Module],
    of_modules: Mapping[str, Tensor],
    inside_whole_modules: tuple[str, ...],
    where: str,
) -> dict[str, Tensor]:
    """Returns the biases by path, also of modules that share a bias with one in the file."""
    biases: dict[str, Tensor] = {}
    first: dict[int, Tensor] = {}
    for path, module in modules.items():
        base = base_bias(module)
        is_inside = isinstance(module, ExpertMatrix) or f"{path}.".startswith(inside_whole_modules)
        if base is None or is_inside:
            continue
        if path in of_modules:
            bias = of_modules[path]
            _check(bias, base, path, where)
            shared = first.setdefault(id(base), bias)
            biases[path] = shared if shared is bias or shared.equal(bias) else bias
        elif id(base) in first:
            biases[path] = first[id(base)]
    return biases


def _check(bias: Tensor, base: Tensor, path: str, where: str) -> None:
    if bias.shape != base.shape or not bias.is_floating_point():
        raise AdapterError(
            f"{where}: the bias of {path} is {bias.dtype}, {tuple(bias.shape)}; this model's "
            f"is {tuple(base.shape)}"
        )
