"""An adapter's scale: base + c·(adapted − base) on every path, as told by float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakin as lk
from conftest import randomise, small, tiny_mixtral

FACTORS = [0.0, 0.5, 1.0, 1.7, -0.6]
MEMBERS: dict[str, Any] = {
    "rslora": small("lora", rslora=True),
    "adalora": small("adalora", initial_rank=4),
    **{
        word: small(word)
        for word in ("lora", "lora+", "lora-fa", "vera", "dora", "dora,vera", "delta-lora")
    },
}


class ReadLinear(nn.Module):
    """A layer whose owner multiplies by its weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.inner.bias)


class ScaledEmbedding(nn.Embedding):
    """A class with a forward of its own, which sees the changed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(nn.Linear):
    """A linear layer that keeps its weight as whole numbers, as a quantised one does."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        numbers = torch.randint(-9, 10, (5, 6), dtype=torch.int8)
        del self.weight
        self.register_buffer("numbers", numbers)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers.to(x.dtype) / 10, self.bias.to(x.dtype))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


VECTORS, TOKENS = (
    (lambda: torch.randn(2, 3, 6, dtype=torch.float64)),
    (lambda: torch.randint(0, 6, (2, 3))),
)
PLACES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 5), "0", VECTORS),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), "0", VECTORS),
    "Conv1D": (conv1d, "0", VECTORS),
    "embedding": (lambda: nn.Embedding(6, 5), "0", TOKENS),
    "own forward": (lambda: ScaledEmbedding(6, 5), "0", TOKENS),
    "convolution": (
        lambda: nn.Conv1d(6, 5, 2),
        "0",
        lambda: torch.randn(2, 6, 4, dtype=torch.float64),
    ),
    "groups": (
        lambda: nn.Conv1d(6, 6, 2, groups=2),
        "0",
        lambda: torch.randn(2, 6, 4, dtype=torch.float64),
    ),
    "read": (ReadLinear, "0.inner", VECTORS),
    "quantised": (Packed, "0", VECTORS),
}


def adapted(place: str, member: Any) -> tuple[nn.Module, lk.Adapter, Tensor]:
    torch.manual_seed(0)
    make, target, inputs = PLACES[place]
    model = nn.Sequential(make()).double().eval()
    x = inputs()
    return model, randomise(lk.adapt(model, member, target, seed=0, dtype=torch.float64), 0.4), x


def outputs(model: nn.Module, adapter: lk.Adapter, x: Any) -> tuple[Tensor, Tensor]:
    """Those of the base and of the adapter at the scale it has."""
    with adapter.disabled():
        base = model(x)
    return base.detach(), model(x)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:the base is quantised")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_in_every_kind_of_layer(member: str, place: str) -> None:
    if {"vera", "adalora"} & set(member.split(",")) and PLACES[place][2] is TOKENS:
        pytest.skip("no embeddings")
    model, adapter, x = adapted(place, MEMBERS[member])
    base, whole = outputs(model, adapter, x)
    weights = torch.randn_like(whole)
    named = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((weights * whole).sum(), list(named.values()), retain_graph=True)
    tolerance = 1e-5 if place == "quantised" else 1e-9  # whose merged weight is float32 at most
    for factor in FACTORS:
        wanted = base + factor * (whole.detach() - base)
        adapter.scale = factor
        out = model(x)
        close(out, wanted)
        for got, once in zip(
            torch.autograd.grad((weights * out).sum(), list(named.values())), grads, strict=True
        ):
            close(got, factor * once)
        with torch.no_grad():
            close(model(x), wanted)
            close(model(x), wanted)  # from what was kept
            adapter.merge()
            close(model(x), wanted, tolerance)
            adapter.unmerge()
    adapter.scale = 1
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize("member", ["lora", "dora", "adalora"])
def test_experts(member: str, kernel: str, ids: Tensor) -> None:
    torch.manual_seed(0)
    dtype, tolerance = (torch.float64, 1e-8) if kernel == "eager" else (torch.float32, 2e-4)
    model = tiny_mixtral(kernel).to(dtype)
    layer = model.model.layers[1].mlp.experts
    adapter = randomise(
        lk.adapt(model, MEMBERS[member], ["gate_up_proj", "down_proj"], layers=[1], seed=0), 0.3
    )
    hidden, chosen = torch.randn(7, 32, dtype=dtype), torch.randint(0, 4, (7, 2))
    shares = torch.rand(7, 2, dtype=dtype)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        _ = layer(hidden, chosen, shares)
        for factor in FACTORS:
            adapter.scale = factor
            scaled, once = layer(hidden, chosen, shares), layer(hidden, chosen, shares)
            adapter.merge()
            close(scaled, layer(hidden, chosen, shares), tolerance)
            adapter.unmerge()
            assert torch.equal(scaled, once)
        with adapter.disabled():
            base = layer(hidden, chosen, shares)
        adapter.scale = 0
        close(layer(hidden, chosen, shares), base)
        weight = layer.gate_up_proj.detach().clone()
        changes = []
        for factor in (1.0, 0.4):
            adapter.scale = factor
            adapter.merge()
            changes.append(layer.gate_up_proj.detach() - weight)
            adapter.unmerge()
        assert changes[0].abs().max() > 0.01
        close(changes[1], 0.4 * changes[0], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("member", ["lora", "vera", "dora"])
def test_narrow_dtypes_are_as_near_as_at_scale_1(member: str, dtype: torch.dtype) -> None:
    model, adapter, x = adapted("linear", MEMBERS[member])
    narrow = copy.deepcopy(model)
    narrow[0].weight.data, narrow[0].bias.data = model[0].weight.to(dtype), model[0].bias.to(dtype)
    model[0].weight.data, model[0].bias.data = narrow[0].weight.double(), narrow[0].bias.double()
    for parameter in lk.adapters(narrow)["default"].parameters():
        parameter.data = parameter.data.float()
    errors = []
    x = x.to(dtype)
    for factor in (1.0, 0.5):
        adapter.scale = lk.adapters(narrow)["default"].scale = factor
        errors.append((narrow(x).double() - model(x.double())).abs().max().item())
    assert errors[1] < 2 * errors[0] + torch.finfo(dtype).eps


def test_several_adapters_have_each_their_own(ids: Tensor) -> None:
    model, a, x = adapted("linear", lk.LoRA(rank=2))
    base, with_a = outputs(model, a, x)
    b = randomise(lk.adapt(model, lk.DoRA(rank=2), "0", name="b"), 0.3)
    with_b = model(x).detach()
    a.scale, b.scale = 0.25, -2
    lk.activate(model, ["default", "b"])
    wanted = base + 0.25 * (with_a - base) - 2 * (with_b - base)
    close(model(x), wanted)
    a.merge()
    b.merge()
    close(model(x), wanted)
    b.unmerge()
    a.unmerge()
    with torch.no_grad(), lk.mixed_batch(model, ["b", "default"]):
        rows = model(x)
        for change in ("scale", "scaled"):
            with pytest.raises(lk.StateError, match="mixed_batch"):
                setattr(a, "scale", 1) if change == "scale" else a.scaled(1).__enter__()
    close(rows[0], (base - 2 * (with_b - base))[0])
    close(rows[1], (base + 0.25 * (with_a - base))[1])
    with torch.enable_grad(), lk.mixed_batch(model, ["b", "default"]):
        close(model(x), rows)


def test_setting_it_while_merged_merges_anew_and_the_context_puts_it_back() -> None:
    model, adapter, x = adapted("linear", lk.DoRA(rank=2))
    base, whole = outputs(model, adapter, x)
    weight = model[0].weight
    adapter.merge()
    with adapter.scaled(0.5):
        assert (adapter.scale, adapter.is_merged) == (0.5, True)
        close(model(x), base + 0.5 * (whole - base))
        with adapter.scaled(2):
            close(model(x), base + 2 * (whole - base))
        with adapter.disabled():
            assert torch.equal(model(x), base)
            adapter.scale = 0.25
        close(model(x), base + 0.25 * (whole - base))
    assert adapter.scale == 1
    close(model(x), whole)
    adapter.unmerge()
    assert model[0].weight is weight
    with pytest.raises(KeyError), adapter.scaled(3):
        raise KeyError
    assert adapter.scale == 1


def test_what_it_refuses_leaves_it_as_it_was() -> None:
    model, adapter, x = adapted("linear", lk.LoRA(rank=2))
    adapter.scale = 0.5
    y = model(x)
    for wrong in (float("nan"), float("inf"), "1", None, True, torch.tensor(1.0)):
        with pytest.raises(lk.SettingError):
            adapter.scale = wrong  # type: ignore[assignment]
    adapter.merge()
    weight = model[0].weight.clone()
    with pytest.raises(lk.StateError):
        adapter.scale = 1e308
    assert adapter.scale == 0.5 and torch.equal(model[0].weight, weight)
    adapter.unmerge()
    assert torch.equal(model(x), y)
    adapter.remove()
    with pytest.raises(lk.StateError):
        adapter.scale = 1


def test_a_backward_behind_the_context_is_of_its_scale() -> None:
    model, adapter, x = adapted("read", lk.DoRA(rank=2))
    parameters = adapter.parameters()

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
            return None, grad.T @ ctx.saved_tensors[0]

    type(model[0]).forward, own = (
        lambda self, x: Product.apply(x, self.inner.weight),
        type(model[0]).forward,
    )
    try:
        with adapter.scaled(0.5):
            y = model(x[0])
        half = torch.autograd.grad(y.square().sum(), parameters)
        with adapter.scaled(0.5):
            inside = torch.autograd.grad(model(x[0]).square().sum(), parameters)
    finally:
        type(model[0]).forward = own
    for one, other in zip(half, inside, strict=True):
        close(one, other)


def test_a_gain_that_it_takes_to_zero_stays_finite() -> None:
    model, adapter, x = adapted("linear", lk.DoRA(rank=2))
    site = adapter.tensors.branch("0")
    with torch.no_grad():
        gain = adapter.tensors.pair_now("0").gain
        site.m.mul_(2 / gain)  # now every gain is 2
    base, whole = outputs(model, adapter, x)
    adapter.scale = -1
    close(model(x), 2 * base - whole, 1e-5)
    grads = torch.autograd.grad(model(x).sum(), adapter.parameters())
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_conversions_and_sums_are_of_the_adapter_as_it_is_scaled(tmp_path: Path) -> None:
    model, adapter, x = adapted("linear", lk.LoRA(rank=2))
    base, whole = outputs(model, adapter, x)
    adapter.scale = 0.5
    plain = lk.as_lora(adapter).adapter
    close(model(x), base + 0.5 * (whole - base), 1e-6)
    assert plain.scale == 1
    summed = lk.combine(model, {"default": 3.0})
    close(model(x), base + 1.5 * (whole - base), 1e-6)
    with pytest.warns(lk.LorakinWarning, match="scale"):
        adapter.save(tmp_path / "a")
    for name in ("plain", summed.adapter.name, "default"):
        lk.adapters(model)[name].remove()
    again = lk.load(model, tmp_path / "a")
    assert again.scale == 1
    close(model(x), whole)


def test_modules_trained_whole_count_fully() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "0", modules_to_save=["1"]))
    x = torch.randn(3, 4)
    adapter.scale = 0
    copy_ = adapter.tensors.copy_of("1")
    close(model(x), copy_(nn.functional.linear(x, model[0].weight, model[0].bias)), 1e-6)


def test_the_base_that_moves_in_place_has_no_scale() -> None:
    model, adapter, x = adapted("linear", lk.DeltaLoRA(rank=2, start_step=1, update="in_place"))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.1, total_steps=9)

    def train() -> None:
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    adapter.scale = 0.5
    with pytest.raises(lk.StateError, match="scale"):
        train()
    adapter.scale = 1
    train()
    with pytest.raises(lk.StateError, match="moved"):
        adapter.scale = 0.5


def test_compiled_and_checkpointed(ids: Tensor) -> None:
    model, adapter, x = adapted("linear", lk.DoRA(rank=2))
    base, whole = outputs(model, adapter, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for factor in (1.0, 0.5, 0.5, 0.0, -1.5):
        adapter.scale = factor
        wanted = base + factor * (whole.detach() - base)
        close(compiled(x), wanted)
        close(checkpoint(model, x, use_reentrant=False), wanted)


def test_copies_of_the_model_keep_it() -> None:
    model, adapter, x = adapted("linear", lk.LoRA(rank=2))
    adapter.scale = 0.5
    assert "active at scale 0.5" in str(adapter)
    twin = copy.deepcopy(model)
    assert lk.adapters(twin)["default"].scale == 0.5
    lk.adapters(twin)["default"].scale = 2
    assert adapter.scale == 0.5
    base, half = outputs(model, adapter, x)
    close(twin(x), base + 4 * (half - base))
