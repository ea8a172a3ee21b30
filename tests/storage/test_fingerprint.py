"""An adapter knows its base again: in any precision, and not another fine-tune of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return randomise(lk.adapt(tiny_llama(), lk.LoRA(2))).save(tmp_path / "adapter")


def nudged(share: float, dtype: torch.dtype = torch.float32) -> Any:
    """The base with every weight changed by a share of its size, as further training might."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator) if weight.dim() > 1 else 0
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_any_precision(saved: Path, dtype: torch.dtype) -> None:
    lk.load(tiny_llama(dtype=dtype), saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_is_refused_with_the_difference(saved: Path, dtype: torch.dtype) -> None:
    model = nudged(0.02, dtype)
    with pytest.raises(lk.AdapterError, match=r"another base model: it was made on .*LlamaForCausalLM.*\d\.\d%.*--other-base"):
        lk.load(model, saved)
    assert not lk.adapters(model)
    lk.load(model, saved, other_base=True)


def test_one_changed_layer_is_seen(saved: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.1
    with pytest.raises(lk.AdapterError, match=r"layers\.1\.mlp\.down_proj here is another: 10\.0%"):
        lk.load(model, saved)


def test_what_adapters_do_to_the_weight_does_not_count(saved: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    first = randomise(lk.adapt(model, lk.LoRA(2), name="first"), 0.5)
    first.merge()
    first.save(tmp_path / "merged")
    lk.load(tiny_llama(), tmp_path / "merged")
    moving = tiny_llama()
    adapter = lk.adapt(moving, lk.DeltaLoRA(rank=2, start_step=1, update="in_place"))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.5, total_steps=3)
    ids = torch.arange(3, 12).view(1, -1)
    for _ in range(3):
        moving(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.has_moved_base
    adapter.save(tmp_path / "moved")
    lk.load(tiny_llama(), tmp_path / "moved")
    adapter.restore(tmp_path / "moved")


def test_it_is_small_and_stands_in_lorakin_json(saved: Path, tmp_path: Path) -> None:
    base = json.loads((saved / "lorakin.json").read_text())["base"]
    assert base["class"] == "LlamaForCausalLM" and base["model_type"] == "llama"
    assert len(base["weights"]) == 8 and all(len(numbers) == 16 for numbers in base["weights"].values())
    gpt2 = randomise(lk.adapt(tiny_gpt2(), lk.LoRA(2))).save(tmp_path / "gpt2")
    lk.load(tiny_gpt2(), gpt2)


def test_without_it_the_adapter_loads_as_what_peft_says(saved: Path) -> None:
    (saved / "lorakin.json").unlink()
    lk.load(nudged(0.5), saved)
