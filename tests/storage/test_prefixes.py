"""A file of the same model in another wrapping: the error says so, and what it says to do works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral


class Wrapper(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


def test_made_without_the_head(tmp_path: Path, ids: Tensor) -> None:
    whole, model = tiny_llama(), tiny_llama()
    randomise(lk.adapt(whole.model, lk.LoRA(rank=2), "q_proj")).save(tmp_path)
    with pytest.raises(
        lk.AdapterError,
        match=r"layers.0.self_attn.q_proj.*get_submodule\('model'\)",
    ):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)
    lk.load(model.get_submodule("model"), tmp_path)
    assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize(
    ("make", "inner", "targets", "names"),
    [
        (
            tiny_llama,
            "model",
            "q_proj",
            r"model.layers.0.self_attn.q_proj in the file is layers.0.self_attn.q_proj here",
        ),
        (
            tiny_bert,
            "bert",
            "query",
            r"bert.encoder.layer.0.attention.self.query in the file is encoder.layer.0",
        ),
        (
            tiny_gpt2,
            "transformer",
            "c_attn",
            r"transformer.h.0.attn.c_attn in the file is h.0.attn.c_attn here",
        ),
    ],
)
def test_made_with_the_head(
    make: Any, inner: str, targets: str, names: str, tmp_path: Path
) -> None:
    randomise(lk.adapt(make(), lk.LoRA(rank=2), targets)).save(tmp_path)
    with pytest.raises(lk.AdapterError, match=f"{names}.*'{inner}'"):
        lk.load(make().get_submodule(inner), tmp_path)


def test_made_in_a_wrapper(tmp_path: Path, ids: Tensor) -> None:
    wrapper, model = Wrapper(tiny_llama()), tiny_llama()
    randomise(lk.adapt(wrapper, lk.LoRA(rank=2), "q_proj")).save(tmp_path)
    with pytest.raises(lk.AdapterError, match="'inner'"):
        lk.load(model, tmp_path)
    lk.load(Wrapper(model), tmp_path)
    assert torch.equal(model(ids).logits, wrapper.inner(ids).logits)


@pytest.mark.parametrize("targets", ["down_proj", ["gate_up_proj", "down_proj"]])
def test_experts_made_without_the_head(targets: Any, tmp_path: Path, ids: Tensor) -> None:
    whole, model = tiny_mixtral(), tiny_mixtral()
    randomise(lk.adapt(whole.model, lk.LoRA(rank=2), targets)).save(tmp_path)
    with pytest.raises(
        lk.AdapterError,
        match=r"layers.0.mlp.experts.* model.layers.0.mlp.experts",
    ):
        lk.load(model, tmp_path)
    lk.load(model.model, tmp_path)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    randomise(lk.adapt(tiny_mixtral(), lk.LoRA(rank=2), targets)).save(tmp_path)
    with pytest.raises(
        lk.AdapterError,
        match=r"model.layers.0.mlp.experts.* layers.0.mlp.experts",
    ):
        lk.load(tiny_mixtral().model, tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_llama(hidden_size=64).model,  # other sizes
        lambda: tiny_llama(num_hidden_layers=1).model,  # a layer is missing
        tiny_gpt2,
        lambda: nn.Sequential(nn.Linear(4, 4)),
    ],
)
def test_another_model_is_another_model(other: Any, tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), "q_proj")).save(tmp_path)
    with pytest.raises(
        lk.AdapterError,
        match="model.layers.0.self_attn.q_proj",
    ):
        lk.load(other(), tmp_path)


def test_a_module_that_only_ends_alike(tmp_path: Path) -> None:
    """One name is no address."""
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
        )
    )
    randomise(lk.adapt(nn.ModuleDict({"dense": nn.Linear(32, 32)}), lk.LoRA(rank=2), "dense")).save(
        tmp_path
    )
    with pytest.raises(lk.AdapterError):
        lk.load(bert, tmp_path)
