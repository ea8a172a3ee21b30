"""Our Triton kernels against float64 and NumPy: in Triton's interpreter, or on a GPU if there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakin.family import Pair
from lorakin.family.pair import ScaledPair
from lorakin.kernels import triton_operators
from lorakin.kernels.adapted_linear import adapted_linear
from lorakin.kernels.dropout import DropoutDraw, DropoutInKernels
from references.philox import kept

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)
SEED = (1 << 61) + 12345
THRESHOLD = 20_000
NARROW = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
SHAPES = pytest.mark.parametrize(
    ("rows", "inputs", "rank"),
    [(37, 600, 5), (64, 128, 16), (1, 8, 33), (130, 24, 128), (1100, 40, 3)],
)
"""Beside blocks of full size: ends of blocks in each direction, one row, the largest rank."""
run: Any = triton_operators.IMPLEMENTATIONS


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(GPU, dtype)


def assert_rounded(got: Tensor, exact: Tensor, terms: int = 1) -> None:
    """Checks that `got` is `exact` rounded to its dtype, from sums in float32 of so many terms."""
    wide = torch.finfo(torch.float32).eps * terms * (1 + exact.abs().max())
    allowed = torch.finfo(got.dtype).eps * exact.abs() * 0.51 + wide
    assert ((got.double() - exact).abs() <= allowed).all()


def summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sum of a kernel's parts, as the layers take it."""
    assert parts.dtype == (dtype if len(parts) == 1 else torch.float32)
    return parts[0] if len(parts) == 1 else run["summed"](parts, dtype)


def mask_of(x: Tensor) -> Tensor:
    return torch.from_numpy(kept(SEED, THRESHOLD, *x.shape)).to(GPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(37, 70), (4, 256), (5, 8), (3, 4, 300)])
def test_zeroed_drops_as_philox_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype) + 10
    flat = x.view(-1, shape[-1])
    got = run["zeroed"](x, SEED, THRESHOLD)
    assert torch.equal(got.view(flat.shape), flat * mask_of(flat))


def test_what_is_dropped_does_not_depend_on_the_seed_of_others() -> None:
    ones = torch.ones(64, 512, device=GPU)
    first, second = (run["zeroed"](ones, seed, THRESHOLD) for seed in (1, 2))
    share = 1 - THRESHOLD / 65536
    for one in (first, second):
        assert abs(one.mean().item() - share) < 4 * (share * (1 - share) / one.numel()) ** 0.5
    both = (first * second).mean().item()
    assert abs(both - share**2) < 4 * (share**2 * (1 - share**2) / first.numel()) ** 0.5


@NARROW
@SHAPES
def test_dropped_product(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    x, down = random(rows, inputs, dtype=dtype), random(rank, inputs, dtype=dtype, seed=1)
    exact = (x.double() * mask_of(x)) @ down.double().T
    assert_rounded(summed(run["dropped_product"](x, down, SEED, THRESHOLD), dtype), exact, inputs)


@NARROW
@SHAPES
def test_dropped_down_gradient(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    x, back = random(rows, inputs, dtype=dtype), random(rows, rank, dtype=dtype, seed=1)
    exact = 0.5 * back.double().T @ (x.double() * mask_of(x))
    got = summed(run["dropped_down_gradient"](back, x, 0.5, SEED, THRESHOLD), dtype)
    assert_rounded(got, exact, rows)


@NARROW
@SHAPES
def test_dropped_input_product(rows: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    back = random(rows, rank, dtype=dtype, seed=1)
    down = random(rank, inputs, dtype=dtype, seed=2)
    got = run["dropped_input_product"](back, down, 0.5, SEED, THRESHOLD)
    exact = 0.5 * (back.double() @ down.double()) * mask_of(got)
    assert_rounded(got, exact, rank)


@NARROW
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(50, 70, 5), (16, 64, 16), (3, 8, 128)])
def test_changed_row_norms(outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    weight = random(outputs, inputs, dtype=dtype)
    up, down = random(outputs, rank, dtype=dtype, seed=1), random(rank, inputs, dtype=dtype, seed=2)
    weight[0], up[0] = 0, 0
    norms = run["changed_row_norms"](weight, up, down, 0.25)
    exact = (weight.double() + 0.25 * up.double() @ down.double()).norm(dim=1)
    assert norms.dtype == torch.float32
    assert norms[0] == 0
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


@NARROW
@pytest.mark.parametrize(("rows", "outputs"), [(137, 50), (32, 64), (1, 3)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("with_less", [False, True])
def test_gain_gradient(
    rows: int, outputs: int, has_bias: bool, with_less: bool, dtype: torch.dtype
) -> None:
    delta, multiplied = (random(rows, outputs, dtype=dtype, seed=n) for n in (0, 1))
    bias = random(outputs, dtype=dtype, seed=2) if has_bias else None
    gain_minus_one = 0.1 * random(outputs, dtype=dtype, seed=3)
    parts, gained, less = run["gain_gradient"](delta, multiplied, bias, gain_minus_one, with_less)

    assert parts.shape == (triton_operators.parts_of(rows, outputs)[1], outputs)
    offset = 0 if bias is None else bias.double()
    exact = (delta.double() * (multiplied.double() - offset)).sum(0)
    assert_rounded(parts.sum(0), exact, rows)
    assert_rounded(gained, delta.double() * (1 + gain_minus_one.double()))
    if with_less:
        assert_rounded(less, delta.double() * gain_minus_one.double())


def test_operators_take_what_is_not_contiguous() -> None:
    x = random(70, 37, dtype=torch.bfloat16).T
    down = random(70, 5, dtype=torch.bfloat16, seed=1).T
    got = run["dropped_product"](x, down, SEED, THRESHOLD)
    assert torch.equal(
        got, run["dropped_product"](x.contiguous(), down.contiguous(), SEED, THRESHOLD)
    )


def test_other_tensors_take_plain_operations() -> None:
    narrow = torch.ones(2, 2, device=GPU, dtype=torch.bfloat16)
    assert triton_operators.fit(narrow, narrow, rank=128)
    assert not triton_operators.fit(narrow, narrow, rank=129)
    assert not triton_operators.fit(narrow, narrow.float())
    assert not triton_operators.fit(narrow.float())
    assert not triton_operators.fit(narrow.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_gain", [False, True])
def test_a_layer_with_dropout(has_gain: bool, dtype: torch.dtype) -> None:
    """Forward and backward drop the same entries, those of the draw's seed."""
    tokens, inputs, outputs, rank, scale = 40, 24, 16, 5, 0.5
    x, weight, bias, up, down, gain, delta = (
        random(*shape, dtype=dtype, seed=n)
        for n, shape in enumerate(
            [
                (tokens, inputs), (outputs, inputs), (outputs,), (outputs, rank), (rank, inputs),
                (outputs,), (tokens, outputs),
            ]
        )
    )  # fmt: skip
    gain = (1 + 0.1 * gain.float()) if has_gain else None
    trained = [t for t in (x, up, down, gain) if t is not None]
    for tensor in trained:
        tensor.requires_grad_()
    torch.manual_seed(3)
    change = ScaledPair(Pair(up, down, gain), scale)
    y = adapted_linear(x, weight, bias, change, dropout=0.25)
    got = torch.autograd.grad(y, trained, delta)

    torch.manual_seed(3)
    draw = DropoutDraw.drawn(0.25, GPU)
    assert isinstance(draw, DropoutInKernels)
    keeps = torch.from_numpy(kept(draw.seed, draw.threshold, tokens, inputs)).to(GPU)
    wide = [t.detach().double().requires_grad_() for t in trained]
    x_, up_, down_, *rest = wide
    dropped = x_ * keeps * draw.scale
    change_of_y = scale * (dropped @ down_.T) @ up_.T
    if rest:
        change_of_y = rest[0] * change_of_y + (rest[0] - 1) * (dropped @ weight.double().T)
    exact_y = x_ @ weight.double().T + bias.double() + change_of_y
    exact = torch.autograd.grad(exact_y, wide, delta.double())

    allowed = 8 * torch.finfo(dtype).eps
    for one, truth in zip((y, *got), (exact_y, *exact), strict=True):
        assert (one.double() - truth).norm() <= allowed * truth.norm()
