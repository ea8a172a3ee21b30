"""Grouped convolutions: against float64 weights formed by hand, and with real PEFT both ways."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, small
from lorakin.storage.summary import summarise

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning:peft")]

NAMES = ["one", "two", "three"]
MEMBERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: small("lora", rank=2, alpha=3),
    "rslora": lambda: small("lora", rank=3, rslora=True),
    "lora-fa": lambda: small("lora-fa", rank=2),
    "vera": lambda: small("vera"),
    "dora": lambda: small("dora", rank=2),
}
"""With ranks so small that the pair is applied group by group."""


class Grouped(nn.Module):
    """Convolutions of all dimensions in 2, 8 (depthwise) and 4 groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.two = nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=1, groups=8, bias=False)
        self.three = nn.Conv3d(8, 16, (2, 1, 1), groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).unsqueeze(-1).expand(-1, -1, -1, 4))
        return self.three(x.unsqueeze(2).expand(-1, -1, 3, -1, -1)).mean((2, 3, 4))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("member", MEMBERS)
def test_forward_and_gradients_are_those_of_the_changed_weights(member: str, x: Tensor) -> None:
    model, x = Grouped().double(), x.double()
    base = copy.deepcopy(model)
    adapter = lk.adapt(model, MEMBERS[member](), NAMES)
    torch.testing.assert_close(model(x), base(x))
    randomise(adapter, 0.3)
    pairs = {path: adapter.tensors.pair_now(path) for path in NAMES}
    for path, pair in pairs.items():
        layer = base.get_submodule(path)
        weight = layer.weight.detach().flatten(1) + pair.up @ pair.down
        weight = weight if pair.gain is None else pair.gain[:, None] * weight
        del layer.weight
        layer.weight = weight.view(len(weight), -1, *layer.kernel_size)
    out, wanted = model(x), base(x)
    torch.testing.assert_close(out, wanted)
    tensors = [t for t in adapter.parameters() if t.requires_grad]
    wanted_grads = torch.autograd.grad(wanted.square().sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), tensors), wanted_grads)
    own = {path: model.get_submodule(path).weight for path in NAMES}
    adapter.merge()
    torch.testing.assert_close(model(x), wanted)
    adapter.remove()
    assert all(model.get_submodule(path).weight is weight for path, weight in own.items())


@pytest.mark.parametrize("member", MEMBERS)
def test_files(member: str, tmp_path: Path, x: Tensor) -> None:
    model = Grouped()
    adapter = randomise(lk.adapt(model, MEMBERS[member](), NAMES), 0.3)
    adapter.save(tmp_path)
    lk.load(again := Grouped(), tmp_path)
    assert torch.equal(again(x), model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*model_config|.*groups > 1|.*tie_word")
        theirs = peft.PeftModel.from_pretrained(Grouped(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = lk.load(back := Grouped(), tmp_path / "theirs")
    torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-5)
    read.merge()
    torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-5)
    assert summarise(tmp_path / "theirs").norms == pytest.approx(
        {p: adapter.tensors.pair_now(p).norm() for p in NAMES}, rel=1e-4
    )


def test_a_file_edited_beside_ours_is_refused(tmp_path: Path) -> None:
    randomise(lk.adapt(Grouped(), lk.LoRA(rank=2), NAMES)).save(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "lora_alpha": 3, "alpha_pattern": {}})
    )
    with pytest.raises(lk.AdapterError, match="lorakin.json"):
        lk.load(Grouped(), tmp_path)


def test_ranks_above_a_groups_own(tmp_path: Path) -> None:
    """No group's change has more ranks than the group has outputs, and PEFT's file needs no more."""
    randomise(lk.adapt(nn.Sequential(nn.Conv1d(6, 6, 5, groups=6)), lk.LoRA(rank=4), "0")).save(
        tmp_path
    )
    shapes = {
        key: tuple(t.shape)
        for key, t in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes == {
        "base_model.model.0.lora_A.weight": (6, 6, 5),
        "base_model.model.0.lora_B.weight": (6, 1, 1),
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trains_across_groups(rslora: bool, tmp_path: Path, x: Tensor) -> None:
    """It is no change of the weight: read as what it is, trained on, written; merging is refused."""
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=8, lora_alpha=3, target_modules=NAMES, init_lora_weights=False, use_rslora=rslora
    )
    theirs = peft.get_peft_model(Grouped(), config).eval()
    theirs.save_pretrained(tmp_path)
    adapter = lk.load(model := Grouped(), tmp_path, trainable=True)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    back = peft.PeftModel.from_pretrained(Grouped(), adapter.save(tmp_path / "again")).eval()
    torch.testing.assert_close(back(x), theirs(x), rtol=1e-5, atol=1e-5)
    shapes = [
        {
            key: t.shape
            for key, t in safetensors.torch.load_file(at / "adapter_model.safetensors").items()
        }
        for at in (tmp_path, tmp_path / "again")
    ]
    assert shapes[0] == shapes[1], "as PEFT had it"
    with pytest.raises(lk.StateError, match="one is a convolution in groups"):
        adapter.merge()
    assert not adapter.is_merged
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.01)
    model(x).mean().backward()
    optimizer.step()
    adapter.save(tmp_path / "trained")
    back = peft.PeftModel.from_pretrained(Grouped(), tmp_path / "trained").eval()
    torch.testing.assert_close(back(x), model(x), rtol=1e-5, atol=1e-5)
    lk.load(again := Grouped(), tmp_path / "trained")
    torch.testing.assert_close(again(x), model(x))
    signal, base, one = torch.randn(2, 4, 9), Grouped().one, model.one
    change = one(signal) - base(signal)
    lk.combine(model, {"default": 0.5})
    torch.testing.assert_close(one(signal) - base(signal), change / 2, rtol=1e-4, atol=1e-5)


def test_dora_across_groups_is_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=8, target_modules=["one"], init_lora_weights=False, use_dora=True)
    peft.get_peft_model(Grouped(), config).save_pretrained(tmp_path)
    with pytest.raises(
        lk.AdapterError, match="one, a convolution with groups=2, reads inputs across groups"
    ):
        lk.load(Grouped(), tmp_path)


def test_mixed_batches(x: Tensor) -> None:
    model = Grouped()
    base = model(x)
    randomise(lk.adapt(model, lk.DoRA(rank=2), NAMES), 0.3)
    with lk.mixed_batch(model, ["default", None]):
        mixed = model(x)
    torch.testing.assert_close(mixed, torch.cat([model(x)[:1], base[1:]]))
