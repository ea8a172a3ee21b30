"""Tiny models under tiny conditions, for the tests of plans."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from lorakin.plan.conditions import Conditions
from lorakin.plan.machine import Machine

MACHINE = Machine(flops=5e10, bandwidth=2e10, dispatch=3e-6)


def small(layers: int = 2, **changes: Any) -> Any:
    """The config of a tiny Llama."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


def conditions(layers: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Conditions:
    """Conditions for a tiny Llama: two rows of 16 tokens."""
    few = {"batch_size": 2, "max_length": 16, "padded": False}
    return Conditions(small(layers), dtype, **{**few, **changes})
