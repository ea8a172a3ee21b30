"""Biases that an adapter trains: the config's `bias` and the keys, both ways.

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
from lorakin.storage.peft.forms import FORMS, PREFIX, Form

NAMES = {
    name for form in FORMS.values() for name in (*form.slots.values(), *form.lookup_slots.values())
}
WRAPPED = re.compile(rf"(.+?)\.((?:base_layer\.)*)(?:{'|'.join(map(re.escape, sorted(NAMES)))})")
TWICE = re.compile(r"\.(?:original_module|modules_to_save)\..*\bbias$")
"""With "all", PEFT writes the biases of a module that is trained whole twice more."""


def word(model: nn.Module, biases: Collection[str], adapted: Iterable[str], form: Form) -> str:
    """The config's `bias` of an adapter with biases at these paths and pairs at those."""
    if not biases:
        return NO_BIASES
    return ALL if set(biases) - adapted_modules(model, adapted) else form.bias


def keyed(biases: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The biases under PEFT's keys, in a file whose other tensors have these names.

    PEFT wraps a module once for itself and once for each of its parameters that are adapted. An
    attention's `out_proj` lies inside the attention's wrapper.
    """
    wraps: dict[str, int] = {}
    for name in names:
        if match := WRAPPED.fullmatch(name.removeprefix(PREFIX)):
            wraps[match[1]] = max(wraps.get(match[1], 0), 1 + match[2].count("."))
    written = {}
    for path, bias in biases.items():
        parent, _, leaf = path.rpartition(".")
        inner = f"{parent}.base_layer.{leaf}"
        place = inner if inner in wraps else path
        written[f"{PREFIX}{place}.{'base_layer.' * wraps.get(place, 0)}bias"] = bias
    return written


def without_doubles(config: Mapping[str, Any], rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `rest`, by key without prefix, without the biases that PEFT writes twice."""
    if config.get("bias") != ALL:
        return dict(rest)
    return {name: tensor for name, tensor in rest.items() if not TWICE.search(name)}


def split(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: Iterable[str],
    copies: Collection[str],
    rest: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The biases in an adapter's file, by path in the model's order, and the tensors that are left.

    Biases that are one parameter in the model are one object, if they are equal.

    Args:
        model: the base.
        modules: its modules by path.
        config: PEFT's config.
        slots: paths of the modules with pairs.
        copies: paths of the modules that are trained whole.
        rest: tensors by key without prefix.
        where: the file, for messages.

    Raises:
        AdapterError: one is missing, or does not fit the model's.
    """
    which = config.get("bias") or NO_BIASES
    if which == NO_BIASES:
        return {}, dict(rest)
    found, left = _found(modules, rest)
    whole = tuple(f"{path}." for path in copies)
    biases = _tied(modules, found, whole, where)
    owners = {id(base_bias(modules[path])) for path in biases}
    adapted = adapted_modules(model, slots)
    lacking = [
        path
        for path, module in modules.items()
        if path in adapted or (which == ALL and not f"{path}.".startswith(whole))
        if (own := base_bias(module)) is not None and id(own) not in owners
    ]
    if lacking:
        raise AdapterError(
            f"{where}: its config says bias={which!r}, but it lacks the biases of {some(lacking)}"
        )
    return biases, left


def _found(
    modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are biases of modules, by path, and those that are none."""
    found, left = {}, {}
    for name, tensor in rest.items():
        path = name.removesuffix(".bias")
        path = path if path in modules else path.replace(".base_layer", "")
        module = modules.get(path) if name.endswith(".bias") else None
        if module is not None and base_bias(module) is not None:
            found[path] = tensor
        elif module is None or "bias" not in module._buffers:
            # PEFT's "all" writes buffers of the name "bias" too; they are the base's.
            left[name] = tensor
    return found, left


def _tied(
    modules: Mapping[str, nn.Module],
    found: Mapping[str, Tensor],
    whole: tuple[str, ...],
    where: str,
) -> dict[str, Tensor]:
    """Path → bias, also of modules that share a parameter with one that has a bias in the file."""
    biases: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for path, module in modules.items():
        own = base_bias(module)
        is_apart = isinstance(module, ExpertMatrix) or f"{path}.".startswith(whole)
        if own is None or is_apart:
            continue
        if path in found:
            _check(found[path], own, path, where)
            one = made.setdefault(id(own), found[path])
            biases[path] = one if one is found[path] or one.equal(found[path]) else found[path]
        elif id(own) in made:
            biases[path] = made[id(own)]
    return biases


def _check(tensor: Tensor, own: Tensor, path: str, where: str) -> None:
    if tensor.shape != own.shape or not tensor.is_floating_point():
        raise AdapterError(
            f"{where}: the bias of {path} is {tensor.dtype}, {tuple(tensor.shape)}; this model's "
            f"is {tuple(own.shape)}"
        )
