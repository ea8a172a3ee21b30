"""Buffers that a forward in train mode moves belong to the adapter: saved, restored, and the base's
kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk

MOVED = "ignore:training changed buffers:lorakin.errors.LorakinWarning"


class Average(nn.Module):
    """A moving average, of the kind that codebooks keep."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.calls += 1
        return self.lin(x - self.mean)


class History(nn.Module):
    """Makes its buffer in the first forward in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        if self.training:
            now = y.detach().mean(0)
            self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return y if self.mean is None else y - self.mean


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), ["0"]),
    "moving average": (Average, ["lin"]),
    "made in the forward": (History, ["lin"]),
    "spectral norm": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
        ),
        ["1"],
    ),
}


def inputs() -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(3)) * 3 + 2


def trained(
    base: nn.Module, targets: list[str], name: str = "default", steps: int = 3
) -> tuple[nn.Module, lk.Adapter]:
    model = copy.deepcopy(base)
    adapter = lk.adapt(model, lk.LoRA(rank=2), targets, seed=0, name=name)
    train(model, adapter, steps)
    return model, adapter


def train(model: nn.Module, adapter: lk.Adapter, steps: int = 3) -> None:
    optimizer = adapter.optimizer(lr=1e-1)
    model.train()
    for _ in range(steps):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.filterwarnings(MOVED)
@pytest.mark.parametrize("kind", BASES)
def test_what_training_moved_is_saved_and_the_base_kept(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, targets = BASES[kind]
    base = make().eval()
    model, adapter = trained(base, targets)
    want, x = model(inputs()), inputs()
    assert not torch.allclose(want, base(x))
    adapter.save(tmp_path)

    loaded = copy.deepcopy(base)
    one = lk.load(loaded, tmp_path)
    torch.testing.assert_close(loaded(x), want)
    one.remove()
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in loaded.state_dict().items())

    with adapter.disabled():
        assert torch.equal(model(x), base(x))
    torch.testing.assert_close(model(x), want)
    lk.activate(model, [])
    assert torch.equal(model(x), base(x))
    lk.activate(model, "default")
    torch.testing.assert_close(model(x), want)
    adapter.merge()
    torch.testing.assert_close(model(x), want)
    adapter.unmerge()
    adapter.remove()
    assert all(torch.equal(t, base.state_dict()[key]) for key, t in model.state_dict().items())


@pytest.mark.filterwarnings(MOVED)
def test_they_are_resumed_and_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Average().eval()
    model, adapter = trained(base, ["lin"], steps=2)
    adapter.save(tmp_path)
    train(model, adapter, steps=2)
    assert model.calls == 4
    adapter.restore(tmp_path)
    assert model.calls == 2
    again = copy.deepcopy(base)
    lk.load(again, tmp_path, trainable=True)
    assert again.calls == 2
    assert torch.equal(again.mean, model.mean)


@pytest.mark.filterwarnings(MOVED)
def test_merged_for_good_they_are_the_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, adapter = trained(BASES["batch norm"][0]().eval(), ["0"])
    want = model(inputs())
    adapter.merge(permanent=True)
    torch.testing.assert_close(model(inputs()), want)
    assert not any("lorakin" in key for key in model.state_dict())


def test_saving_says_that_peft_does_not_read_them(tmp_path: Path) -> None:
    _, adapter = trained(Average(), ["lin"])
    with pytest.warns(lk.LorakinWarning, match="mean"):
        adapter.save(tmp_path)


def test_two_adapters_each_have_their_own() -> None:
    torch.manual_seed(0)
    model = Average()
    first = lk.adapt(model, lk.LoRA(rank=2), ["lin"], name="first")
    train(model, first, 1)
    second = lk.adapt(model, lk.LoRA(rank=2), ["lin"], name="second")
    assert model.calls == 0
    train(model, second, 2)
    assert model.calls == 2
    lk.activate(model, "first")
    assert model.calls == 1
    with pytest.raises(lk.SettingError):
        lk.activate(model, ["first", "second"])
    assert (lk.status(model).active, model.calls) == (("first",), 1), (
        "what is refused changes nothing"
    )
    copied = copy.deepcopy(model)
    lk.activate(copied, "second")
    assert (model.calls, copied.calls) == (1, 2)
    model.double()
    lk.activate(model, "second")
    assert (model.calls, model.mean.dtype) == (2, torch.float64)


def test_a_module_trained_whole_keeps_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = BASES["batch norm"][0]().eval()
    model = copy.deepcopy(base)
    adapter = lk.adapt(model, lk.LoRA(rank=2), ["0"], modules_to_save=["1"])
    train(model, adapter)
    want = model(inputs())
    adapter.save(tmp_path)  # in PEFT's form: nothing to warn of
    other = copy.deepcopy(base)
    lk.load(other, tmp_path)
    torch.testing.assert_close(other(inputs()), want)


@pytest.mark.filterwarnings(MOVED)
def test_plain_lora_from_it_has_them_too() -> None:
    torch.manual_seed(0)
    model, adapter = trained(BASES["batch norm"][0]().eval(), ["0"])
    want = model(inputs())
    lk.as_lora(adapter, "plain")
    torch.testing.assert_close(model(inputs()), want)
    lk.combine(model, {"default": 1.0}, "same")
    torch.testing.assert_close(model(inputs()), want)
