"""torchtune: `<path>.lora_a.weight` (r, in), `.lora_b.weight` (out, r), `.magnitude` (out).

Its alpha is `lora_alpha` in `adapter_config.json`. It has its own names for Llama's modules. In
most of its models the halves of a head alternate: row 2i of a head's queries and keys is
transformers' row i, row 2i + 1 is row i + head/2.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from lorakin.storage.foreign.foreign_file import ForeignAdapter, ForeignFile
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP

KEY = r".*\.(lora_[ab]\.weight|magnitude)"
MODULE_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""Module in torchtune → module in transformers, inside a layer."""
ALTERNATES = {
    "llama": True,
    "mistral": True,
    "gemma": True,
    "gemma2": True,
    "qwen2": False,
}
"""model_type → whether the halves of a head alternate in torchtune's queries and keys."""


def read(source: ForeignFile) -> ForeignAdapter:
    """Returns the adapter in a file of torchtune's."""
    config: Any = getattr(source.model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in ALTERNATES:
        raise source.error(
            f"torchtune's file for a model of type {model_type!r}; known are "
            f"{', '.join(ALTERNATES)}"
        )
    adapter = ForeignAdapter("torchtune", {}, {}, [])
    names = {"lora_a.weight": DOWN, "lora_b.weight": UP, "magnitude": MAGNITUDE}
    for name, slots in source.split(names).items():
        path = _path(name)
        if path is None:
            raise source.error(
                f"unknown tensors: {name} is not a module that torchtune adapts in {model_type}"
            )
        slots = source.checked(path, slots)
        if ALTERNATES[model_type] and path.endswith((".q_proj", ".k_proj")):
            usual = config.hidden_size // config.num_attention_heads
            head = getattr(config, "head_dim", None) or usual
            slots |= {slot: _halves_together(t, head) for slot, t in slots.items() if slot != DOWN}
        rank = len(slots[DOWN])
        if "r" in source.config and source.number(source.config, "r") != rank:
            raise source.error(
                f"{name} has rank {rank}, but its config says r={source.config['r']}"
            )
        said = "lora_alpha" in source.config
        scales = [source.number(source.config, "lora_alpha") / rank] if said else []
        adapter.slots[path], adapter.scales[path] = slots, source.scale(path, rank, scales)
    return adapter


def _path(name: str) -> str | None:
    """Returns the path in transformers' model; None if torchtune adapts no such module."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in MODULE_NAMES:
        return f"model.layers.{layer[1]}.{MODULE_NAMES[layer[2]]}"
    return "lm_head" if name == "output" else None


def _halves_together(rows: Tensor, head: int) -> Tensor:
    """Returns `rows` (heads · head, …) with each head's even rows before its odd ones."""
    return rows.view(-1, head // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
