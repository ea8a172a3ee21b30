"""VeRA against NumPy, its shared pair, and what draws it again."""

from __future__ import annotations

import copy

import pytest
import torch

import lorakin as lk
from conftest import tiny_llama
from family.problem import BOTH_PRECISIONS, array, close, data, fit, linear, mask, randomised
from references import vera as reference


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_gradients(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    """On the narrow layer of two, which uses the leading columns and rows of the shared pair."""
    model = linear(dtype, 11, 7, 13).train()
    adapter = randomised(lk.adapt(model, lk.VeRA(rank=5, dropout=dropout)))
    site, x, delta = adapter.tensors.branch("0"), data(dtype)[0].requires_grad_(), data(dtype)[1]
    torch.manual_seed(4)
    y = model[0](x)
    torch.manual_seed(4)
    dropped = mask(x, dropout)
    y.backward(delta)
    numbers = [array(t) for t in (x, model[0].weight, site.A, site.B, site.d, site.b)]
    assert site.A.shape == (5, 11)
    assert site.B.shape == (13, 5)
    close(
        y,
        reference.forward(*numbers[:2], array(model[0].bias), *numbers[2:], mask=dropped),
        tolerance,
    )
    dd, db, dx = reference.gradients(*numbers, delta=array(delta), mask=dropped)
    for got, want in ((site.d.grad, dd), (site.b.grad, db), (x.grad, dx)):
        close(got, want, 10 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
def test_twenty_five_steps_of_training(dtype: torch.dtype, tolerance: float) -> None:
    """With a decay that must reach neither vector."""
    model, (x, target) = linear(dtype), data(dtype)
    adapter = lk.adapt(model, lk.VeRA(rank=5), "0")
    site = adapter.tensors.branch("0")
    tensors = (x, target, model[0].weight, model[0].bias, site.A, site.B, site.d, site.b)
    d, b, losses = reference.train(*map(array, tensors), steps=25, lr=0.05)
    seen = fit(
        model, adapter.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.1), x, target, 25
    )
    assert losses[-1] < 0.9 * losses[0], "it learns"
    close(seen, losses, tolerance)
    close(site.d, d, 10 * tolerance)
    close(site.b, b, 10 * tolerance)


def test_the_start() -> None:
    adapter = lk.adapt(linear(torch.float32, 40, 30, 50), lk.VeRA(rank=20, d_init=0.2))
    one, two = adapter.tensors.branch("0"), adapter.tensors.branch("1")
    a, c = reference.uniform_bounds(40, 20)
    assert one.A is two.A, "one object, not a copy"
    assert one.B is two.B
    assert one.A.shape == (20, 40)
    assert one.B.shape == (50, 20)
    for matrix, bound in ((one.A, a), (one.B, c)):
        assert 0.95 * bound < matrix.abs().max() <= bound
        assert matrix.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
    assert torch.equal(one.d.detach(), torch.full((20,), 0.2))
    assert not one.b.any()
    assert not one.A.requires_grad
    assert not one.B.requires_grad


def test_the_draw_is_pefts() -> None:
    """One generator for both, A first; bounds evaluated in double in PEFT's order."""
    generator = torch.Generator().manual_seed(7)
    A = torch.empty(6, 11).uniform_(
        -(3**0.5) * (2**0.5 / 11**0.5), 3**0.5 * (2**0.5 / 11**0.5), generator=generator
    )
    B = torch.empty(7, 6).uniform_(
        -(3**0.5) * (2**0.5 / 6**0.5), 3**0.5 * (2**0.5 / 6**0.5), generator=generator
    )
    site = lk.adapt(linear(torch.float32), lk.VeRA(rank=6, seed=7)).tensors.branch("0")
    assert torch.equal(site.A, A)
    assert torch.equal(site.B, B)
    low = lk.adapt(linear(torch.bfloat16), lk.VeRA(rank=6, seed=7)).tensors.branch("0")
    assert low.A.dtype == torch.float32
    assert torch.equal(low.A, A.bfloat16().float()), (
        "rounded through the base's dtype, as PEFT does"
    )


def test_the_shared_pair_is_counted_and_kept_once() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.VeRA(rank=4))
    assert adapter.trainable_parameters == sum(
        4 + m.out_features for m in (model.get_submodule(p) for p in adapter.placement.methods)
    )
    assert sum(p.numel() for p in adapter.parameters()) == adapter.trainable_parameters + 4 * (
        48 + 48
    )
    twin = lk.adapters(copy.deepcopy(model))["default"]
    assert len({id(twin.tensors.branch(path).A) for path in twin.placement.methods}) == 1, (
        "a copy of the model shares its own"
    )
    moved = lk.adapters(model.double())["default"]
    assert len({id(moved.tensors.branch(path).A) for path in moved.placement.methods}) == 1


def test_the_projections_are_stored_or_drawn_again(tmp_path, ids) -> None:  # type: ignore[no-untyped-def]
    for stored in (True, False):
        model = tiny_llama(dtype=torch.bfloat16)
        randomised(lk.adapt(model, lk.VeRA(rank=4, seed=3, save_projection=stored))).save(
            tmp_path / str(stored)
        )
        other = tiny_llama(dtype=torch.bfloat16)
        lk.load(other, tmp_path / str(stored))
        assert torch.equal(model(ids).logits, other(ids).logits)
    sizes = [
        (tmp_path / str(stored) / "adapter_model.safetensors").stat().st_size
        for stored in (True, False)
    ]
    assert sizes[0] - sizes[1] >= 4 * 4 * (48 + 48)
    with pytest.raises(lk.AdapterError, match="seed 3"):
        lk.load(tiny_llama(), tmp_path / "False")


def test_settings_outside_their_range() -> None:
    for settings in (
        {"rank": 0},
        {"seed": -1},
        {"d_init": 0},
        {"dropout": 1},
        {"save_projection": "no"},
    ):
        with pytest.raises(lk.SettingError, match=next(iter(settings))):
            lk.VeRA(**settings)  # type: ignore[arg-type]
    with pytest.raises(lk.SettingError, match="embed_tokens"):
        lk.adapt(tiny_llama(), lk.VeRA(rank=2), targets=["embed_tokens"])
    with pytest.raises(lk.SettingError, match="alpha=8.0"):
        lk.adapt(tiny_llama(), [lk.VeRA(rank=2), lk.DoRA(alpha=8)])
    lk.adapt(tiny_llama(), lk.VeRA(rank=300))  # the rank may exceed the layers' widths
    for member in (lk.VeRA(rank=4), lk.AdaLoRA(), [lk.VeRA(rank=4), lk.DoRA()]):
        with pytest.raises(lk.SettingError, match="rank_pattern"):
            lk.adapt(tiny_llama(), member, rank_pattern={"q_proj": 3})
