"""DoRA against NumPy: forward, gradients, training, its norm and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorakin as lk
from conftest import ConvNet, tiny_gpt2, tiny_llama
from family.problem import (
    BOTH_PRECISIONS,
    array,
    close,
    data,
    fit,
    linear,
    mask,
    randomised,
    saved_bytes,
)
from lorakin.family import weight as frozen_weight
from lorakin.family.dora import row_norms
from references import dora as reference


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_forward_and_gradients(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    model = linear(dtype).train()
    with torch.no_grad():
        model[0].weight[3] = 0  # a row of length zero
    adapter = randomised(lk.adapt(model, lk.DoRA(rank=3, alpha=5, dropout=dropout), "0"))
    site, x, delta = adapter.tensors.branch("0"), data(dtype)[0].requires_grad_(), data(dtype)[1]
    torch.manual_seed(4)
    y = model(x)
    torch.manual_seed(4)
    kept = mask(x, dropout)
    y.backward(delta)
    numbers = [array(t) for t in (x, model[0].weight, model[0].bias, site.A, site.B)]
    more = {"s": 5 / 3, "m": array(site.m), "mask": kept}
    close(y, reference.forward(*numbers, **more), tolerance)
    dA, dB, dm, dx = reference.gradients(*numbers, delta=array(delta), **more)
    for got, want in ((site.A.grad, dA), (site.B.grad, dB), (site.m.grad, dm), (x.grad, dx)):
        close(got, want, 10 * tolerance)
    adapter.merge()
    close(
        model[0].weight,
        reference.merged(*(numbers[n] for n in (1, 3, 4)), s=5 / 3, m=more["m"]),
        10 * tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
def test_twenty_five_steps_of_training(dtype: torch.dtype, tolerance: float) -> None:
    """With a decay that must not reach m, and B at its own rate."""
    model, (x, target) = linear(dtype), data(dtype)
    adapter = lk.adapt(model, [lk.DoRA(rank=3, alpha=6), lk.LoRAPlus(ratio=3)], "0")
    site = adapter.tensors.branch("0")
    tensors = (x, target, model[0].weight, model[0].bias, site.A, site.B)
    A, B, m, losses = reference.train(
        *map(array, tensors), s=2, m=array(site.m), steps=25, lr=0.01, weight_decay=0.1, ratio=3
    )
    seen = fit(
        model, adapter.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1), x, target, 25
    )
    assert losses[-1] < 0.8 * losses[0], "it learns"
    close(seen, losses, tolerance)
    for got, want in ((site.A, A), (site.B, B), (site.m, m)):
        close(got, want, 10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_start_is_the_base_to_the_bit(dtype: torch.dtype, dropout: float) -> None:
    model, x = linear(dtype, 600, 300).train(), data(dtype, 600)[0]
    before = model(x)
    adapter = lk.adapt(model, lk.DoRA(rank=8, dropout=dropout))
    assert torch.equal(model(x), before)
    assert adapter.tensors.branch("0").m.dtype == torch.promote_types(dtype, torch.float32)
    gain = adapter.tensors.pair_now("0").gain
    assert gain is not None
    assert torch.equal(gain, torch.ones_like(gain)), "exactly 1"


def test_m_has_one_number_for_each_output() -> None:
    model = tiny_gpt2()  # its Conv1D stores the weight as (in, out)
    adapter = lk.adapt(model, lk.DoRA(rank=2))
    for path in adapter.placement.methods:
        module = model.get_submodule(path)
        close(
            adapter.tensors.branch(path).m,
            np.linalg.norm(module.weight.detach().numpy(), axis=0),
            1e-6,
        )
    net = ConvNet()
    adapter = lk.adapt(net, lk.DoRA(rank=2), targets=["two", "head"])
    close(
        adapter.tensors.branch("two").m,
        np.linalg.norm(net.two.weight.detach().numpy().reshape(6, -1), axis=1),
        1e-6,
    )


def test_the_norm_in_float32_is_as_good_as_forming_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (
        torch.randn(s, generator=generator) for s in ((900, 1700), (900, 16), (16, 1700))
    )
    exact = reference.norms(weight.numpy(), 0.05 * up.double().numpy(), down.numpy())
    factored = row_norms(weight, 0.05 * up, down)
    formed = (weight + 0.05 * up @ down).norm(dim=1)
    errors = [float(np.abs(norm.double().numpy() / exact - 1).max()) for norm in (factored, formed)]
    assert errors[0] < 2 * errors[1] + 1e-7


def test_the_norm_never_forms_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows give what one block gives."""
    weight, up, down = torch.randn(50, 20), torch.randn(50, 3), torch.randn(3, 20)
    whole = row_norms(weight, up, down)
    monkeypatch.setattr(frozen_weight, "BLOCK", 60)
    torch.testing.assert_close(row_norms(weight, up, down), whole, rtol=1e-6, atol=0)


def test_rows_that_the_pair_cancels_are_measured_directly() -> None:
    torch.manual_seed(0)
    down = torch.randn(4, 300)
    up = torch.randn(6, 4)
    weight = torch.randn(6, 300)
    weight[2] = -(up[2] @ down) + 1e-4 * torch.randn(
        300
    )  # what is left is far below float32's noise in the expansion
    weight[4] = -(up[4] @ down)
    exact = reference.norms(weight.numpy(), up.numpy(), down.numpy())
    norms = row_norms(weight, up, down)
    np.testing.assert_allclose(norms[2].item(), exact[2], rtol=1e-2)
    np.testing.assert_allclose(
        np.delete(norms.numpy(), (2, 4)), np.delete(exact, (2, 4)), rtol=1e-5
    )
    assert norms[4] < 1e-4
    assert torch.isfinite(norms).all()


def test_the_norm_under_autocast_is_still_float32() -> None:
    weight, up, down = torch.randn(50, 200), torch.randn(50, 3), torch.randn(3, 200)
    expected = row_norms(weight, up, down)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_norms(weight, up, down), expected)


def test_a_zero_row_keeps_gain_one() -> None:
    model = linear(torch.float32)
    with torch.no_grad():
        model[0].weight[3] = 0
    x = data(torch.float32)[0]
    before = model(x)
    adapter = lk.adapt(model, lk.DoRA(rank=2))
    y = model(x)
    assert torch.equal(y, before)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


def test_the_norm_is_no_part_of_the_graph() -> None:
    """Nothing of the weight's size is kept for backward besides the module's own output."""
    rows, width = 64, 256
    model = linear(torch.float32, width, width)
    x = torch.randn(rows, width, requires_grad=True)
    lk.adapt(model, lk.DoRA(rank=4))
    assert saved_bytes(model, x) < 4 * (4 * rows * width + 8 * width * 4 + 8 * width)
    assert saved_bytes(model, x) < 4 * width * width + 4 * 4 * rows * width


def test_two_adapters_both_measure_the_base_without_the_other(ids: torch.Tensor) -> None:
    model = tiny_llama().double()
    first = randomised(lk.adapt(model, lk.DoRA(rank=2), name="first"), 0.1)
    second = randomised(lk.adapt(model, lk.DoRA(rank=3), name="second"), 0.1)
    lk.activate(model, ["first", "second"])
    together = model(ids).logits
    first.merge()
    torch.testing.assert_close(model(ids).logits, together, rtol=1e-6, atol=1e-6)
    second.merge()
    torch.testing.assert_close(model(ids).logits, together, rtol=1e-6, atol=1e-6)


def test_decay_on_the_magnitude_is_announced() -> None:
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DoRA(rank=2))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=0.1)
    with pytest.warns(lk.LorakinWarning, match="weight_decay=0.1"):
        fit(model, optimizer, x, target, 1)


def test_a_magnitude_that_never_trained_is_announced(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, (x, target) = linear(), data()
    adapter = lk.adapt(model, lk.DoRA(rank=2))
    site = adapter.tensors.branch("0")
    fit(model, torch.optim.SGD([site.A, site.B], lr=0.1), x, target, 3)
    with pytest.warns(lk.LorakinWarning, match=r"1 of 1 modules \(0, …\)"):
        adapter.save(tmp_path)
