"""Which modules a config of PEFT's means, and the base's own weights in its files.

PEFT itself is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


def tiny_phi() -> Any:
    """A Phi, whose head has a bias."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes)).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


def saved(make: Callable[[], Any], settings: dict[str, Any], path: Path, **how: Any) -> Any:
    """PEFT's model with random pairs, saved."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    ).eval()
    theirs.save_pretrained(path, **how)
    return theirs


@pytest.mark.peer
@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
            [Q.format(0), "lm_head"],
        ),
        (
            {"target_modules": ["q_proj", UP.format(1)], "layers_to_transform": [0]},
            [Q.format(0), UP.format(1)],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, [Q.format(0), Q.format(1)]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
            [Q.format(1)],
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, [Q.format(0)]),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [1],
                "layers_pattern": ["h", "layers"],
            },
            [Q.format(1)],
        ),
        (
            {"target_modules": ["q_proj", Q.format(1)], "exclude_modules": [Q.format(1)]},
            [Q.format(0)],
        ),
    ],
)
def test_layers(settings: dict[str, Any], adapted: list[str], tmp_path: Path, ids: Tensor) -> None:
    theirs = saved(lambda: tiny_llama(tied=False), settings, tmp_path)
    assert sorted(theirs.targeted_module_names) == sorted(adapted)
    model = tiny_llama(tied=False)
    adapter = lk.load(model, tmp_path)
    assert sorted(adapter.placement.methods) == sorted(adapted)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


class Towers(nn.Module):
    """Modules whose paths hold two numbers, and one whose path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2))
            for _ in range(2)
        )
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer:
                x = part["proj"](x)
        return self.proj(x)


@pytest.mark.peer
@pytest.mark.parametrize("settings", [{"layers_to_transform": [1]}, {"layers_to_transform": 0}, {}])
def test_a_name_that_is_a_path_and_the_end_of_others(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = saved(Towers, {"target_modules": ["proj"], **settings}, tmp_path)
    model = Towers()
    lk.load(model, tmp_path)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_the_last_number_was_the_layers_in_older_files(tmp_path: Path) -> None:
    """PEFT up to 0.19 took the last number of a path for its layer's."""
    randomise(lk.adapt(Towers(), lk.LoRA(rank=2), "layers.*.1.proj")).save(tmp_path)
    (tmp_path / "lorakin.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {
        "target_modules": ["1.proj"],
        "layers_to_transform": [1],
        "layers_pattern": [r"layers\.\d+"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert len(lk.load(Towers(), tmp_path).placement.methods) == 2
    config |= {
        "target_modules": ["proj"],
        "layers_pattern": None,
    }  # and no reading takes just those two
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lk.AdapterError, match="proj"):
        lk.load(Towers(), tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)", ["embed_tokens", "lm_head"]]
)
def test_a_head_with_a_bias(targets: Any, tmp_path: Path, ids: Tensor) -> None:
    theirs = saved(tiny_phi, {"target_modules": targets}, tmp_path, save_embedding_layers=True)
    names = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("lm_head.base_layer.bias") for name in names)
    model = tiny_phi()
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    other = tiny_phi()
    nn.init.zeros_(other.lm_head.bias)
    with pytest.raises(lk.AdapterError, match="lm_head"):
        lk.load(other, tmp_path)


def resized(make: Callable[[], Any], seed: int) -> Any:
    model = make()
    torch.manual_seed(seed)
    model.resize_token_embeddings(70)
    return model


@pytest.mark.peer
@pytest.mark.parametrize(
    ("make", "target", "whole"),
    [
        (tiny_llama, "q_proj", ["embed_tokens", "lm_head"]),
        (tiny_llama, "q_proj", ["embed_tokens"]),
        (lambda: tiny_llama(tied=False), "q_proj", ["embed_tokens", "lm_head"]),
        (tiny_phi, "q_proj", ["embed_tokens", "lm_head"]),
        (tiny_gpt2, "c_attn", ["wte", "lm_head"]),
    ],
)
def test_a_resized_vocabulary(
    make: Callable[[], Any], target: str, whole: list[str], tmp_path: Path
) -> None:
    ids = torch.arange(60, 70)[None]
    theirs = saved(
        lambda: resized(make, 1), {"target_modules": [target], "modules_to_save": whole}, tmp_path
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter += (
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1
                )
    theirs.save_pretrained(tmp_path)
    model = resized(make, 2 if len(whole) > 1 else 1)  # else the head's new rows are the base's
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    small = make()
    with pytest.raises(lk.AdapterError, match=r"resize_token_embeddings\(70\)"):
        lk.load(small, tmp_path)
    assert not lk.adapters(small)


def test_another_number_of_classes_is_no_vocabulary(tmp_path: Path) -> None:
    from conftest import tiny_bert

    randomise(
        lk.adapt(tiny_bert(labels=3), lk.LoRA(rank=2), "query", modules_to_save=["classifier"])
    ).save(tmp_path)
    with pytest.raises(lk.AdapterError, match=r"classifier.* has shape \(3") as error:
        lk.load(tiny_bert(labels=2), tmp_path)
    assert "esize" not in str(error.value)
