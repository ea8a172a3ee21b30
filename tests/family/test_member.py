"""The common form, and that a new member is one class: here with a gain and a frozen tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import ConvNet, randomise, tiny_gpt2, tiny_llama
from family.problem import mask
from lorakin.family import (
    LowRank,
    Pair,
    Parametrisation,
    Slot,
    Slots,
    UnadaptedModule,
    member_named,
)
from lorakin.family.pair import ScaledPair


@dataclass(frozen=True)
class Gained(Parametrisation):
    """y = g ⊙ (W0 x + B A x): LoRA of rank 2 with a trained gain and a frozen A."""

    word: ClassVar[str] = "gained"
    paper: ClassVar[str] = "none, arXiv none"
    learning_rate: ClassVar[float] = 1e-3
    slots: ClassVar[Slots] = {
        "A": Slot((2, "inputs"), trained=False),
        "B": Slot(("outputs", 2), starts_at_zero=True),
        "g": Slot(("outputs",)),
    }
    dropout: float = 0.0

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> dict[str, Tensor]:
        shape = module.shape
        A = torch.randn(2, shape.inputs, generator=generator, device=device) * 0.1
        return {
            "A": A,
            "B": torch.zeros(shape.outputs, 2, device=device),
            "g": torch.ones(shape.outputs, device=device),
        }

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(tensors["B"], tensors["A"])

    def gain(self, change: ScaledPair, tensors: Mapping[str, Tensor], weight: object) -> Tensor:
        return tensors["g"]


def test_the_pair_is_the_common_form() -> None:
    rng = np.random.default_rng(0)
    W, up, down, gain = (rng.standard_normal(s) for s in ((5, 7), (5, 3), (3, 7), 5))
    pair = Pair(torch.tensor(up), torch.tensor(down), torch.tensor(gain))
    np.testing.assert_allclose(
        pair.applied_to(torch.tensor(W)).numpy(), gain[:, None] * (W + up @ down), rtol=1e-12
    )
    np.testing.assert_allclose(
        pair._replace(gain=None).applied_to(torch.tensor(W)).numpy(), W + up @ down, rtol=1e-12
    )
    assert pair.norm() == pytest.approx(np.linalg.norm(up @ down), rel=1e-12)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_new_member_needs_no_other_code(make, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    model = make().double()
    before = model(ids).logits
    adapter = lk.adapt(model, Gained())
    assert torch.equal(model(ids).logits, before), "a gain of one and B = 0 is the base to the bit"
    assert {n.rsplit(".", 1)[1] for n, p in adapter.named_parameters() if p.requires_grad} == {
        "B",
        "g",
    }
    randomise(adapter, 0.3)
    changed = model(ids).logits
    assert (changed - before).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, changed, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    with adapter.disabled():
        assert torch.equal(model(ids).logits, before)


def test_the_gain_meets_convolutions_on_their_channels() -> None:
    model = ConvNet().double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    adapter = randomise(lk.adapt(model, Gained(), targets=["one", "two", "three"]), 0.3)
    changed = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), changed, rtol=1e-9, atol=1e-9)


def test_the_gain_reaches_the_dropped_base_product_too() -> None:
    """§2 of the specification: y = W0 x + (g−1) ⊙ W0 x̃ + g ⊙ up(down x̃) + b."""
    torch.manual_seed(0)
    linear = torch.nn.Sequential(torch.nn.Linear(6, 4, dtype=torch.float64))
    adapter = randomise(lk.adapt(linear, Gained(dropout=0.5), targets="0"))
    x = torch.randn(3, 6, dtype=torch.float64)
    linear.train()
    torch.manual_seed(7)
    y = linear(x)
    torch.manual_seed(7)
    dropped = x * torch.from_numpy(mask(x, 0.5))
    site = adapter.tensors.branch("0")
    W, b, (A, B, g) = linear[0].weight, linear[0].bias, (site.A, site.B, site.g)
    torch.testing.assert_close(
        y, x @ W.T + (g - 1) * (dropped @ W.T) + g * (dropped @ A.T @ B.T) + b
    )


def test_a_new_member_meets_the_others(ids: Tensor, tmp_path: Path) -> None:
    """It combines where it has what they need, and is refused by name where it has not."""
    model = tiny_gpt2().double()
    before = model(ids).logits
    adapter = lk.adapt(model, [Gained(), lk.DeltaLoRA(start_step=1)])
    assert torch.equal(model(ids).logits, before)
    optimizer = adapter.optimizer(lr=0.05)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    site = next(adapter.tensors.branch(path) for path in adapter.placement.methods)
    pair = adapter.tensors.pair_now(site.path)
    assert torch.equal(pair.gain, site.g), "its gain is over the moved base too"
    assert pair.up.shape[1] == 2
    peft = pytest.importorskip("peft")
    with pytest.warns(lk.LorakinWarning, match="Gained is not registered"):
        adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        tiny_gpt2().double(), tmp_path, autocast_adapter_dtype=False
    ).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-7, atol=1e-7)
    adapter.remove()
    for other, message in (
        (lk.LoRAFA(), "lora-fa|gained"),
        (lk.AdaLoRA(), "adalora"),
        (lk.LoRA(), "gained and lora|lora and gained"),
    ):
        with pytest.raises(lk.SettingError, match=message):
            lk.adapt(model, [Gained(), other])


def test_the_registry() -> None:
    assert member_named("lora") is lk.LoRA
    with pytest.raises(lk.SettingError, match="'lorra'.*'lora'"):
        member_named("lorra")
