"""Biases in files: PEFT's read here, ours read by PEFT, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import ConvNet, randomise, tiny_bert, tiny_gpt2, tiny_gpt_oss
from lorakin.storage.summary import summarise

peft = pytest.importorskip("peft")

QUERY: dict[str, Any] = {"target_modules": ["query"]}
THEIRS = {
    "lora": (tiny_bert, lambda bias: peft.LoraConfig(r=2, bias=bias, **QUERY)),
    "dora": (tiny_bert, lambda bias: peft.LoraConfig(r=2, bias=bias, use_dora=True, **QUERY)),
    "head": (tiny_bert, lambda bias: peft.LoraConfig(r=2, bias=bias, task_type="SEQ_CLS", **QUERY)),
    "adalora": (
        tiny_bert,
        lambda bias: peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, bias=bias, **QUERY),
    ),
    "vera": (
        tiny_bert,
        lambda bias: peft.VeraConfig(r=4, bias=bias.replace("lora", "vera"), **QUERY),
    ),
    "conv1d": (tiny_gpt2, lambda bias: peft.LoraConfig(r=2, bias=bias, target_modules=["c_attn"])),
    "convolution": (
        ConvNet,
        lambda bias: peft.LoraConfig(r=2, bias=bias, target_modules=["one", "head"]),
    ),
}


def out(model: nn.Module, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if kind == "convolution":
        return model(torch.randn(2, 3, 7, generator=generator)).detach()
    return model(torch.randint(3, 64, (2, 9), generator=generator)).logits.detach()


def keys(folder: Path) -> set[str]:
    return {
        key
        for key in safetensors.torch.load_file(folder / "adapter_model.safetensors")
        if key.endswith(".bias")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", THEIRS)
def test_there_and_back(kind: str, bias: str, tmp_path: Path) -> None:
    make, config = THEIRS[kind]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make(), config(bias)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, model = out(theirs, kind), make()
    base = out(model, kind)
    adapter = lk.load(model, tmp_path / "theirs")
    torch.testing.assert_close(out(model, kind), wanted, rtol=1e-5, atol=1e-5)
    with adapter.disabled():
        assert torch.equal(out(model, kind), base)
    assert len(adapter.tensors.biases()) >= 2
    adapter.save(tmp_path / "ours")
    written = [
        json.loads((tmp_path / side / "adapter_config.json").read_text())["bias"]
        for side in ("theirs", "ours")
    ]
    assert written[0] == written[1]
    twice = {
        key
        for key in keys(tmp_path / "theirs")
        if "original_module" in key or "modules_to_save" in key
    }
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs") - twice
    back = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(out(back, kind), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_method_without_a_form_of_its_own(bias: str, tmp_path: Path) -> None:
    model = tiny_bert()
    adapter = randomise(
        lk.adapt(model, [lk.DoRA(), lk.VeRA(rank=4)], ["query", "dense"], bias=bias)
    )
    adapter.save(tmp_path)
    fresh = tiny_bert()
    assert lk.load(fresh, tmp_path).placement.biases == adapter.placement.biases
    torch.testing.assert_close(out(fresh, ""), out(model, ""))
    back = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    torch.testing.assert_close(out(back, ""), out(model, ""), rtol=1e-4, atol=1e-5)


def edited(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    (folder / "lorakin.json").unlink(missing_ok=True)


KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "lacks the biases of bert.encoder.layer.0.attention.self.query"),
        (lambda t: t.update({KEY: torch.zeros(3)}), r"query is torch.float32, \(3,\)"),
        (lambda t: t.update({KEY: torch.full((32,), torch.nan)}), "NaN"),
        (lambda t: t.update({KEY: torch.zeros(32, dtype=torch.int64)}), "int64"),
        (
            lambda t: t.update({"base_model.model.bert.nothing.bias": torch.zeros(3)}),
            "belong to nothing",
        ),
    ],
)
def test_damaged_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="all")).save(tmp_path)
    edited(tmp_path, change)
    model = tiny_bert()
    with pytest.raises(lk.AdapterError, match=message):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)


def test_biases_without_a_word_in_the_config_belong_to_nothing(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="all")).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_bert(), tmp_path)


def test_inspecting_says_which(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="all")).save(tmp_path)
    summary = summarise(tmp_path)
    assert summary.headline()["biases"] == "all" and summary.as_dict()["bias"] == "all"


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x, x, x)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", ["attention", "router"])
def test_the_keys_of_wrapped_parameters_are_pefts(kind: str, bias: str, tmp_path: Path) -> None:
    if kind == "attention":
        make, theirs, ours = Attending, {"target_modules": ["attention"]}, "attention"
    else:
        make, ours = tiny_gpt_oss, ["q_proj", "router.weight"]
        theirs = {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]}
    config = peft.LoraConfig(r=2, bias=bias, **theirs)
    peft.get_peft_model(make(), config).save_pretrained(tmp_path / "theirs")
    loaded = lk.load(make(), tmp_path / "theirs")
    adapter = randomise(lk.adapt(make(), lk.LoRA(rank=2), ours, bias=bias))
    assert set(adapter.tensors.biases()) == set(loaded.tensors.biases())
    adapter.save(tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs") != set()
