"""The pair cast once a forward: it is never stale, and gradients are added in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise
from lorakin.kernels.cast_together import CastTogether, cast_together


class Net(nn.Module):
    """Two layers; the first may be called several times in a forward."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.calls = calls
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.first(x)
        if self.fails:
            raise RuntimeError("in the middle")
        out: Tensor = self.second(x)
        return out


def adapted(calls: int = 1, members: Any = None) -> tuple[Net, lk.Adapter]:
    model = Net(calls).to(torch.bfloat16).train()
    adapter = randomise(lk.adapt(model, members or lk.LoRA(rank=3), "all-linear"))
    return model, adapter


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call has cast."""
    counts: list[int] = []
    plain = CastTogether.forward

    def counted(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Any:
        counts.append(len(tensors))
        return plain(ctx, dtype, *tensors)

    monkeypatch.setattr(CastTogether, "forward", staticmethod(counted))
    return counts


def test_all_layers_are_cast_at_once(x: Tensor, casts: list[int]) -> None:
    model, _ = adapted()
    model(x).sum().backward()
    assert casts == [4]
    with torch.no_grad():
        model(x)
    assert casts == [4, 4]


@pytest.mark.parametrize("write", ["data", "in place", "replaced"])
def test_what_was_written_is_seen_by_the_next_forward(write: str, x: Tensor) -> None:
    """Also through `.data`, which no version counter notices."""
    model, adapter = adapted()
    model(x)
    parameter = adapter.tensors.branch("second").B
    if write == "data":
        parameter.data.mul_(-3)
    elif write == "in place":
        with torch.no_grad():
            parameter.mul_(-3)
    else:
        parameter.data = -3 * parameter.data
    fresh, other = adapted()
    with torch.no_grad():
        other.tensors.branch("second").B.mul_(-3)
    assert torch.equal(model(x), fresh(x))


def test_each_call_of_a_layer_has_its_own(x: Tensor, casts: list[int]) -> None:
    """Then the gradients of the calls are added in float32."""
    model, adapter = adapted(calls=4)
    model(x).sum().backward()
    assert casts == [4, 2, 2, 2]
    grad = adapter.tensors.branch("first").B.grad
    assert grad is not None
    assert not torch.equal(grad, grad.to(torch.bfloat16).float())


def test_a_layer_called_alone_has_gradients(x: Tensor, casts: list[int]) -> None:
    model, adapter = adapted()
    model(x)
    del casts[:]
    model.first(x).sum().backward()
    assert casts == [2]
    assert adapter.tensors.branch("first").A.grad is not None


def test_a_forward_that_fails_leaves_nothing_behind(x: Tensor) -> None:
    model, adapter = adapted()
    model.fails = True
    with pytest.raises(RuntimeError):
        model(x)
    model.fails = False
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)
    fresh, other = adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    assert torch.equal(model.second(x), fresh.second(x))


def test_without_gradients_first_and_with_them_after(x: Tensor) -> None:
    """Part of a forward under no_grad, as in a re-entrant checkpoint, does not lose gradients."""
    model, adapter = adapted()
    model.first.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None)
    model.first.register_forward_hook(lambda *_: torch.set_grad_enabled(True) and None)
    model(x).sum().backward()
    assert adapter.tensors.branch("second").B.grad is not None


def test_a_copy_of_the_model_casts_its_own(x: Tensor) -> None:
    model, _ = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in lk.adapters(twin)["default"].parameters():
            parameter.zero_()
    assert not torch.equal(twin(x), model(x))
    model(x).sum().backward()
    assert all(p.grad is None for p in twin.parameters())


def test_one_tensor_given_twice_gets_its_gradients_in_its_own_dtype() -> None:
    parameter = torch.ones(1, requires_grad=True)
    one, two = cast_together([parameter, parameter], torch.bfloat16)
    (one * 256 + two).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 257  # which bfloat16 does not have
