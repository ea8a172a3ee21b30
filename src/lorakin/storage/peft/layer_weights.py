"""PEFT's `target_parameters` where they name the weights of layers.

Such a file adapts the layers, under the same keys. PEFT's pair changes the parameter as it is
stored, so for an embedding or a Conv1D it is lorakin's pair transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.inject import layer_kinds
from lorakin.inject.experts import ExpertMatrix
from lorakin.inject.layer_kinds import ConvolutionLayer, EmbeddingLayer, TransposedLayer
from lorakin.inject.patterns import PatternValues
from lorakin.storage.peft.formats import (
    DOWN,
    LORA,
    LORA_TENSOR_NAMES,
    PREFIX,
    TARGET_PARAMETERS,
    UP,
    names,
)
from lorakin.storage.peft.scales import PATTERNS


def as_layers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, where: str
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Returns the config and tensors with layers in `target_modules` instead of their weights.

    Raises:
        AdapterError: a convolution's weight, which PEFT takes for a stack of matrices.
    """
    targets = config.get(TARGET_PARAMETERS)
    if not targets:
        return config, tensors
    changed_tensors, layers, others = dict(tensors), list[str](), set[str]()
    for path, module in model.named_modules():
        hits = {t for name in module._parameters for t in targets if _names(t, path, name)}
        kind = layer_kinds.kind_of(module)
        is_layer = kind is not None and not isinstance(module, ExpertMatrix)
        if kind is None or not is_layer or not any(_names(t, path, "weight") for t in hits):
            others |= hits
            continue
        if kind is ConvolutionLayer:
            raise AdapterError(
                f"{where}: it adapts the weight of {path} as a stack of matrices, but that is a "
                "convolution"
            )
        layers.append(path)
        A, B = (
            changed_tensors.pop(f"{PREFIX}{path}.{LORA_TENSOR_NAMES[slot]}", None)
            for slot in (DOWN, UP)
        )
        if A is None or B is None:
            raise AdapterError(
                f"{where}: {path} lacks {LORA_TENSOR_NAMES[DOWN]} or {LORA_TENSOR_NAMES[UP]}"
            )
        pair = (B.T, A.T) if kind in (EmbeddingLayer, TransposedLayer) else (A, B)
        for slot, tensor in zip((DOWN, UP), pair, strict=True):
            changed_tensors[f"{PREFIX}{path}.{names(LORA, kind)[slot]}"] = tensor.contiguous()
    if not layers:
        return config, tensors
    modules = config.get("target_modules") or []
    pattern = "|".join([f"(?:{modules})", *map(re.escape, layers)])
    modules = pattern if isinstance(modules, str) else [*modules, *layers]
    replaced = {t for t in targets if any(_names(t, path, "weight") for path in layers)} - others
    rest = [target for target in targets if target not in replaced]
    changed = {"target_modules": modules, TARGET_PARAMETERS: rest}
    return {**config, **_patterns(config, layers), **changed}, changed_tensors


def _names(target: str, path: str, name: str) -> bool:
    """Returns whether an entry of `target_parameters` means the parameter `name` of a module."""
    return f".{path}.{name}".endswith(f".{target}")


def _patterns(config: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Returns the config's patterns for the paths of layers; PEFT matched those of parameters."""
    patterns = {}
    for field, default in PATTERNS:
        patterns_of_field, default_value = dict(config.get(field) or {}), config.get(default, 8)
        values = PatternValues(patterns_of_field)
        value_of = {path: values.of(f"{path}.weight", default_value) for path in paths}
        changed = {
            f"^{re.escape(path)}": value
            for path, value in value_of.items()
            if values.of(path, default_value) != value
        }
        patterns[field] = changed | patterns_of_field
    return patterns
