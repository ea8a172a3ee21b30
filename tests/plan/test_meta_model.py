"""A model without weights: its size, its ties, and what methods would train in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorakin as lk
from lorakin.errors import ModelError
from lorakin.family import Method, method_named
from lorakin.plan.meta_model import meta_model, meta_model_of, trainable_parameters
from lorakin.training.models import config_of
from plan.small import small

LLAMA_3B = transformers.LlamaConfig(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("member", "count"),
    [
        (lk.LoRA(rank=32), 9_175_040),
        (lk.LoRAFA(rank=32), 3_670_016),
        (lk.VeRA(rank=256), 129_024),
        (lk.DoRA(rank=32), 9_289_728),
    ],
)
def test_a_skeleton_counts_as_the_papers_do(member: Any, count: int) -> None:
    model = meta_model(LLAMA_3B, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 3_212_749_824
    assert trainable_parameters(model, Method.of(member), ["q_proj", "v_proj"]) == count
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_method_with_a_probe_is_counted_from_above() -> None:
    model = meta_model(small(8))
    bound = trainable_parameters(model, method_named("lora-drop", {"rank": 4}))
    plain = trainable_parameters(model, method_named("lora", {"rank": 4}))
    paths = [
        path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"
    ]
    importance = {path: 2.0**-number for number, path in enumerate(paths)}
    total = sum(importance.values())
    known = lk.LoRADrop(
        rank=4, importance={path: share / total for path, share in importance.items()}
    )
    assert trainable_parameters(model, Method.of(known)) < bound < plain


def test_a_skeleton_takes_no_memory_and_ties_what_is_tied() -> None:
    model = meta_model_of("smollm2", "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_gguf_file_is_not_converted_for_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIN_CACHE", str(tmp_path / "cache"))
    config = config_of("smollm2")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49_152)
    assert not (tmp_path / "cache").exists()


def test_a_model_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="./nowhere"):
        meta_model_of("./nowhere")
