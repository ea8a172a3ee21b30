"""Tiny models under tiny conditions, for the tests of plans."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import lorakin as lk
from lorakin.family import Method
from lorakin.plan.conditions import Conditions
from lorakin.plan.machine import Machine
from lorakin.plan.rehearsal import SETUP, RehearsedRun
from lorakin.plan.traced import Traced

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


def real_steps(where: Conditions, method: Method) -> tuple[lk.Adapter, Traced]:
    """Runs the steps that are planned on real tensors, without padding, and counts them."""
    learned = where.learned
    model = getattr(transformers, learned.auto).from_config(where.config).train()
    rows = learned.full_batch(where.batch_size, where.max_length)
    batch = {key: tensor for key, tensor in rows.items() if key != "attention_mask"}
    with Traced(MACHINE, real=True) as traced:
        traced.see(model.parameters(), "weights")
        traced.see(model.buffers(), "weights")
        with traced.phase(SETUP, makes="adapter"):
            adapter = lk.adapt(model, method, **where.adapt_arguments(model))
        optimizer: torch.optim.Optimizer = adapter.optimizer(lr=1e-3, total_steps=9)
        RehearsedRun(model, adapter, optimizer, learned, batch, traced).steps()
    return adapter, traced
