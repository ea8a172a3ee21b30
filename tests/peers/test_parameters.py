"""PEFT's `target_parameters` and its adapters of torch's attention: real PEFT, both ways."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama, tiny_mixtral
from inject.test_parameters import Attention, Own, encoder
from lorakin.family import Member
from lorakin.storage.summary import summarise

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.own(x)
        return out


def untied() -> Any:
    return tiny_llama(tied=False)


# model, PEFT's settings
THEIRS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "of two and three dimensions": (
        Net,
        {"target_modules": [], "target_parameters": ["own.wide", "stack"]},
    ),
    "beside a layer inside": (
        Net,
        {"target_modules": ["inner"], "target_parameters": ["wide", "stack"]},
    ),
    "ranks": (
        Net,
        {
            "target_modules": [],
            "target_parameters": ["own.wide", "stack"],
            "rank_pattern": {"stack": 3},
        },
    ),
    "attention's": (
        Attention,
        {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]},
    ),
    "of layers": (
        untied,
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["q_proj.weight", "embed_tokens.weight"],
            "rank_pattern": {"q_proj.weight": 3},
            "alpha_pattern": {"q_proj": 9, "v_proj": 5},
        },
    ),
    "of a Conv1D": (
        tiny_gpt2,
        {"target_modules": [], "target_parameters": ["c_fc.weight"], "use_rslora": True},
    ),
    "of layers and experts": (
        tiny_mixtral,
        {"target_modules": [], "target_parameters": ["gate.weight", "down_proj", "q_proj.weight"]},
    ),
}


def output(model: Any) -> Tensor:
    if any(isinstance(part, nn.Embedding) for part in model.modules()):
        return model(torch.arange(6)[None]).logits
    return model(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)))


def peft_model(make: Callable[[], nn.Module], settings: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    model = peft.get_peft_model(
        make(), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_pefts_target_parameters(case: str, tmp_path: Path) -> None:
    make, settings = THEIRS[case]
    theirs = peft_model(make, settings)
    theirs.save_pretrained(tmp_path)
    adapter = lk.load(model := make(), tmp_path)
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-5, atol=1e-5)
    back = peft.PeftModel.from_pretrained(make(), adapter.save(tmp_path / "again")).eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=1e-5, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "member",
    [lk.LoRA(rank=2, alpha=3), lk.LoRA(rank=3, rslora=True), lk.LoRAFA(rank=2), lk.VeRA(rank=3)],
)
@pytest.mark.parametrize("case", ["own", "attention", "encoder"])
def test_peft_loads_our_files(case: str, member: Member, tmp_path: Path) -> None:
    make, targets = {
        "own": (Net, ["own.wide", "stack", "inner"]),
        "attention": (Attention, ["attn.in_proj_weight"]),
        "encoder": (encoder, ["in_proj_weight", "linear1"]),
    }[case]
    model = (
        make().train()
    )  # in eval mode PEFT's adapters are not there: torch's fast path passes them by
    randomise(lk.adapt(model, member, targets), 0.2).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*model_config|.*tie_word|.*enable_nested")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).train()
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)
    for name in ("lorakin.json", "lorakin.safetensors"):
        (tmp_path / name).unlink(missing_ok=True)
    read = lk.load(again := make().train(), tmp_path)
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)
    norms = {
        path: norm for path, norm in summarise(tmp_path).norms.items() if norm
    }  # without a model
    assert norms == pytest.approx(
        {
            path: norm
            for path in read.placement.methods
            if (norm := read.tensors.pair_now(path).norm())
        },
        rel=1e-4,
    )


def test_pefts_attention(tmp_path: Path) -> None:
    """PEFT adds out_proj's change twice: with it once more in the weight, ours is PEFT's."""
    settings = {
        "target_modules": ["attn"],
        "rank_pattern": {"attn": 3},
        "alpha_pattern": {"out_proj": 50},
    }
    theirs = peft_model(Attention, settings)
    theirs.save_pretrained(tmp_path)
    model = Attention()
    with pytest.warns(lk.LorakinWarning, match=r"attn.out_proj"):
        adapter = lk.load(model, tmp_path)
    assert list(adapter.placement.methods) == ["attn.in_proj_weight.0", "attn.out_proj"]
    pair = adapter.tensors.pair_now("attn.out_proj")
    with torch.no_grad():
        model.attn.out_proj.weight += pair.up @ pair.down
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-5, atol=1e-5)
    again = adapter.save(tmp_path / "again")
    back = peft.PeftModel.from_pretrained(Attention(), again).eval()
    torch.testing.assert_close(output(back), output(theirs), rtol=1e-5, atol=1e-5)
    lk.load(Attention(), again, other_base=True)  # which says nothing: our files mean what they say


@pytest.mark.parametrize("ranks", [{}, {"attn": 3}, {"out_proj": 3}])
def test_the_files_of_an_attention_are_pefts(ranks: dict[str, int], tmp_path: Path) -> None:
    adapter = randomise(
        lk.adapt(model := Attention(), lk.LoRA(rank=2), "attn", rank_pattern=ranks), 0.2
    )
    adapter.save(tmp_path)
    lk.load(again := Attention(), tmp_path)
    assert torch.equal(output(again), output(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*model_config|.*tie_word")
        theirs = peft.PeftModel.from_pretrained(Attention(), tmp_path).eval()
    inner = theirs.base_model.model.attn
    for path, layer in (
        ("attn.in_proj_weight.0", inner),
        ("attn.out_proj", inner.base_layer.out_proj),
    ):
        pair = adapter.tensors.pair_now(path)
        torch.testing.assert_close(layer.get_delta_weight("default"), pair.up @ pair.down)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["attn"]


def test_gradients_are_pefts(tmp_path: Path) -> None:
    theirs = peft_model(Net, {"target_modules": [], "target_parameters": ["own.wide"]})
    theirs.save_pretrained(tmp_path)
    adapter = lk.load(model := Net(), tmp_path, trainable=True)
    for one in (theirs, model):
        output(one).square().mean().backward()
    wrapped, own = theirs.base_model.model.own, adapter.tensors.branch("own.wide.0").tensors()
    torch.testing.assert_close(own["A"].grad, wrapped.lora_A.default.weight.grad)
    torch.testing.assert_close(own["B"].grad, wrapped.lora_B.default.weight.grad)
