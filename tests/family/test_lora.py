"""LoRA against its NumPy reference and the papers' counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lorakin as lk
from family.problem import mask
from lorakin.family import Shape, UnadaptedModule
from references import lora as reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank.* 0"),
        ({"rank": -4}, "rank.*-4"),
        ({"rank": 2.5}, "rank.*2.5"),
        ({"alpha": 0}, "alpha.* 0"),
        ({"alpha": math.nan}, "alpha.*nan"),
        ({"alpha": math.inf}, "alpha.*inf"),
        ({"dropout": 1.0}, "dropout.* 1.0"),
        ({"dropout": -0.1}, "dropout.*-0.1"),
        ({"rank": True}, "rank.*True"),
        ({"alpha": 1e39}, r"alpha.*1e\+39"),
        ({"alpha": "8"}, "alpha.*'8'"),
        ({"alpha": None}, "alpha.*None"),
        ({"rslora": "yes"}, "rslora.*'yes'"),
        ({"init": "zeros"}, "init.*'orthonormal'.*'zeros'"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(lk.SettingError, match=message):
        lk.LoRA(**settings)  # type: ignore[arg-type]


def test_numbers_of_other_libraries_become_plain() -> None:
    member = lk.LoRA(rank=np.int64(4), alpha=np.float32(8), dropout=torch.tensor(0.5))  # type: ignore[arg-type]
    assert [type(value) for value in (member.rank, member.alpha, member.dropout)] == [
        int,
        float,
        float,
    ]


def test_defaults_and_scales() -> None:
    assert lk.LoRA() == lk.LoRA(16, 32.0, 0.0, False)
    assert lk.LoRA().scaling == 2
    for rank, alpha in ((8, 16.0), (6, 9.0)):
        assert lk.LoRA(rank, alpha).scaling == pytest.approx(reference.scaling(rank, alpha))
        assert lk.LoRA(rank, alpha, rslora=True).scaling == pytest.approx(
            reference.scaling(rank, alpha, rslora=True)
        )


def at(shape: Shape) -> UnadaptedModule:
    return UnadaptedModule(shape, torch.empty(shape[:2], device="meta"))


def test_the_start() -> None:
    generator = torch.Generator().manual_seed(0)
    start = lk.LoRA(rank=64).start(at(Shape(8, 300)), generator, torch.device("cpu"))
    assert not start["B"].any()
    assert start["A"].abs().max() <= 300**-0.5
    assert start["A"].var().item() == pytest.approx(1 / 900, rel=0.05)
    gaussian = lk.LoRA(rank=64, init="gaussian").start(
        at(Shape(8, 300)), generator, torch.device("cpu")
    )
    assert gaussian["A"].std().item() == pytest.approx(1 / 64, rel=0.05)
    lookup = lk.LoRA(rank=64).start(
        at(Shape(300, 1000, lookup=True)), generator, torch.device("cpu")
    )
    assert not lookup["A"].any()
    assert lookup["B"].std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_gradients(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 7)).to(dtype).train()
    member = lk.LoRA(rank=3, alpha=5, dropout=dropout)
    adapter = lk.adapt(model, member, "0")
    with torch.no_grad():
        adapter.tensors.branch("0").B.normal_()
    x = torch.randn(6, 11, dtype=dtype, requires_grad=True)
    delta = torch.randn(6, 7, dtype=dtype)
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    dropped = mask(x, dropout)
    y.backward(delta)
    site, linear = adapter.tensors.branch("0"), model[0]
    numbers = [t.detach().numpy() for t in (x, linear.weight, linear.bias, site.A, site.B)]
    expected = reference.forward(*numbers, s=member.scaling, mask=dropped)
    dA, dB, dx = reference.gradients(
        numbers[0], numbers[1], *numbers[3:], s=member.scaling, delta=delta.numpy(), mask=dropped
    )
    for got, want in ((y, expected), (site.A.grad, dA), (site.B.grad, dB), (x.grad, dx)):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_twenty_five_steps_of_training(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 7)).to(dtype)
    member = lk.LoRA(rank=3, alpha=5)
    adapter = lk.adapt(model, member, "0")
    site, linear = adapter.tensors.branch("0"), model[0]
    x, target = torch.randn(20, 11, dtype=dtype), torch.randn(20, 7, dtype=dtype)
    A, B, losses = reference.train(
        x.numpy(), target.numpy(), linear.weight.detach().numpy(), linear.bias.detach().numpy(),
        site.A.detach().numpy(), site.B.detach().numpy(),
        s=member.scaling, steps=25, lr=0.02, weight_decay=0.1,
    )  # fmt: skip
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
    seen = []
    for _ in range(25):
        loss = ((model(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], "it learns"
    np.testing.assert_allclose(
        seen[: len(losses)], losses[: len(seen)], rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(site.A.detach().numpy(), A, rtol=tolerance, atol=10 * tolerance)
    np.testing.assert_allclose(site.B.detach().numpy(), B, rtol=tolerance, atol=10 * tolerance)


def test_at_the_first_step_only_B_moves() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    adapter = lk.adapt(model, lk.LoRA(rank=2), "0")
    model(torch.randn(3, 5)).square().sum().backward()
    assert not adapter.tensors.branch("0").A.grad.any()
    assert adapter.tensors.branch("0").B.grad.any()
