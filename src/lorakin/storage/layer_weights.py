"""PEFT's `target_parameters` where they name the weights of layers: the layers are adapted, then, under the same keys.

PEFT's pair is over the parameter as it is held, so that of an embedding or a Conv1D is lorakin's, turned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.inject import layers
from lorakin.inject.experts import ExpertMatrix
from lorakin.inject.layers import ConvolutionLayer, EmbeddingLayer, TransposedLayer
from lorakin.inject.patterns import Values
from lorakin.storage.expert_layout import NAMES
from lorakin.storage.expert_stacks import FIELD

EMBEDDING = {"A": "lora_embedding_A", "B": "lora_embedding_B"}


def as_layers(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    where: str,
    prefix: str,
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The files with these layers among `target_modules`.

    Raises:
        AdapterError: a convolution's weight, which PEFT takes for a stack of matrices.
    """
    targets = config.get(FIELD)
    if not targets:
        return config, tensors
    out, found, others = dict(tensors), list[str](), set[str]()
    for path, module in model.named_modules():
        kind = layers.kind_of(module)
        hits = {
            t for name in module._parameters for t in targets if f".{path}.{name}".endswith(f".{t}")
        }
        if (
            kind is None
            or isinstance(module, ExpertMatrix)
            or not any(f".{path}.weight".endswith(f".{t}") for t in hits)
        ):
            others |= hits
            continue
        if kind is ConvolutionLayer:
            raise AdapterError(
                f"{where}: it adapts the weight of {path} as a stack of matrices, but that is a convolution"
            )
        found.append(path)
        A, B = (out.pop(f"{prefix}{path}.{NAMES[slot]}", None) for slot in ("A", "B"))
        if A is None or B is None:
            raise AdapterError(f"{where}: {path} lacks {NAMES['A']} or {NAMES['B']}")
        names = EMBEDDING if kind is EmbeddingLayer else NAMES
        pair = (B.T, A.T) if kind in (EmbeddingLayer, TransposedLayer) else (A, B)
        out |= {
            f"{prefix}{path}.{names[slot]}": t.contiguous()
            for slot, t in zip(("A", "B"), pair, strict=True)
        }
    if not found:
        return config, tensors
    patterns = {}
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        known, usual = dict(config.get(field) or {}), config.get(default, 8)
        values = Values(known)
        said = {
            path: values.of(f"{path}.weight", usual) for path in found
        }  # PEFT's path is the parameter's
        own = {
            f"^{re.escape(path)}": value
            for path, value in said.items()
            if values.of(path, usual) != value
        }
        patterns[field] = own | known
    modules = config.get("target_modules") or []
    pattern = "|".join([f"(?:{modules})", *map(re.escape, found)])
    modules = pattern if isinstance(modules, str) else [*modules, *found]
    layers_alone = {
        t for t in targets if any(f".{path}.weight".endswith(f".{t}") for path in found)
    } - others
    rest = [target for target in targets if target not in layers_alone]
    return {**config, **patterns, "target_modules": modules, FIELD: rest}, out
