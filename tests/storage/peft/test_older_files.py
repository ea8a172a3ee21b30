"""Files of older releases of PEFT.

Every key that they write is known, and pickled tensors are read.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_llama

FIRST: dict[str, Any] = {
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "merge_weights": False,
}
SINCE_0_4: dict[str, Any] = {
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "revision": None,
}
SINCE_0_8: dict[str, Any] = SINCE_0_4 | {
    "alpha_pattern": {},
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "rank_pattern": {},
    "use_rslora": False,
}
SINCE_0_12: dict[str, Any] = SINCE_0_8 | {
    "layer_replication": None,
    "use_dora": False,
    "runtime_config": {"ephemeral_gpu_offload": True},
}
SINCE_0_16: dict[str, Any] = SINCE_0_12 | {
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "lora_bias": False,
    "qalora_group_size": 16,
    "trainable_token_indices": None,
    "use_qalora": False,
}
RELEASES = {
    "0.2": FIRST,
    "0.4": SINCE_0_4,
    "0.8": SINCE_0_8,
    "0.12": SINCE_0_12,
    "0.16": SINCE_0_16,
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=3, alpha=6), ["q_proj", "v_proj"])).save(tmp_path)
    (tmp_path / "lorakin.json").unlink()
    return tmp_path


@pytest.mark.parametrize("release", RELEASES)
def test_the_keys_of_a_release(release: str, saved: Path, ids: Tensor) -> None:
    model, other = tiny_llama(), tiny_llama()
    lk.load(model, saved)
    said = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    (saved / "adapter_config.json").write_text(json.dumps(said | RELEASES[release]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.load(other, saved)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_parameters_in_a_pickle(saved: Path, ids: Tensor) -> None:
    model, other = tiny_llama(), tiny_llama()
    lk.load(model, saved)
    tensors = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(
        {key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()},
        saved / "adapter_model.bin",
    )
    adapter = lk.load(other, saved)
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    "content", [torch.ones(2), [torch.ones(2)], {"a": 1}, {"a": {"b": torch.ones(2)}}]
)
def test_a_pickle_of_something_else(content: Any, saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    torch.save(content, saved / "adapter_model.bin")
    with pytest.raises(
        lk.AdapterError,
        match="adapter_model.bin",
    ):
        lk.load(tiny_llama(), saved)


@pytest.mark.parametrize("pattern", ["(", ["layers", "("], ["(a)\\1"], 3])
def test_a_pattern_for_layers_that_is_none(pattern: Any, saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    config |= {"layers_to_transform": [0], "layers_pattern": pattern}
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lk.AdapterError, match="layers_pattern"):
        lk.load(tiny_llama(), saved)
