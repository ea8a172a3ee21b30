"""Every kind of layer, forward and merged, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import ConvNet, randomise, tiny_gpt2, tiny_llama
from references import lora as reference


def arrays(adapter: lk.Adapter, path: str) -> tuple[np.ndarray, np.ndarray]:
    site = adapter.tensors.branch(path)
    return site.A.detach().double().numpy(), site.B.detach().double().numpy()


def test_linear() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    W, b = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3, alpha=6), "0"))
    expected = reference.forward(x.numpy(), W, b, *arrays(adapter, "0"), s=2.0)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-12)


def test_conv1d_of_gpt2() -> None:
    model = tiny_gpt2().double()
    layer, path = model.transformer.h[0].mlp.c_fc, "transformer.h.0.mlp.c_fc"
    x = torch.randn(4, 32, dtype=torch.float64)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3, alpha=6), path))
    W, b = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    expected = reference.forward(x.numpy(), W, b, *arrays(adapter, path), s=2.0)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10)
    adapter.merge()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-10)


def test_embedding(ids: Tensor) -> None:
    model = nn.Sequential(nn.Embedding(64, 6)).double()
    table = model[0].weight.detach().clone().numpy()
    adapter = lk.adapt(model, lk.LoRA(rank=3, alpha=6, dropout=0.5), "0")
    A, B = arrays(adapter, "0")
    assert A.shape == (3, 64)
    assert not A.any(), "the vocabulary factor starts at zero"
    assert B.shape == (6, 3)
    assert B.any()
    randomise(adapter)
    expected = reference.embedding_forward(ids.numpy(), table, *arrays(adapter, "0"), s=2.0)
    model.train()
    np.testing.assert_allclose(model(ids).detach().numpy(), expected, rtol=1e-10)
    adapter.merge()
    np.testing.assert_allclose(model(ids).detach().numpy(), expected, rtol=1e-10)


def test_conv2d() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=1)).double()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    W, b = model[0].weight.detach().clone().numpy(), model[0].bias.detach().numpy()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=3, alpha=6), "0"))
    expected = reference.conv2d_forward(
        x.numpy(), W, b, *arrays(adapter, "0"), s=2.0, stride=(2, 1), padding=(1, 1)
    )
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    adapter.merge()
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_convolutions_of_every_dimension_and_padding_merge_to_their_forward() -> None:
    model = ConvNet().double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    before = model(x)
    adapter = lk.adapt(model, lk.LoRA(rank=1), ["one", "two", "three"])
    assert torch.equal(model(x), before)
    randomise(adapter)
    changed = model(x)
    assert (changed - before).abs().max() > 1e-3
    assert torch.equal(model.one(x[0]), model.one(x[:1])[0]), "an input without a batch axis"
    adapter.merge()
    torch.testing.assert_close(model(x), changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_low_precision_forward_is_as_near_to_float64_as_its_arithmetic_allows(
    dtype: torch.dtype, ids: Tensor
) -> None:
    """Law 6: the adapter adds no error of its own beyond the base model's in the same precision."""
    exact = tiny_llama().double()
    low = tiny_llama(dtype=dtype)
    exact.load_state_dict({key: t.double() for key, t in low.state_dict().items()})
    base_error = (low(ids).logits.double() - exact(ids).logits).abs().max()
    for model in (exact, low):
        randomise(lk.adapt(model, lk.LoRA(rank=4)), 0.02)
    assert lk.adapters(low)["default"].parameters()[0].dtype == torch.float32, (
        "masters stay float32"
    )
    assert low(ids).logits.dtype == dtype
    error = (low(ids).logits.double() - exact(ids).logits).abs().max()
    assert error < 2.5 * base_error + 1e-7


def test_an_adapter_in_low_precision_is_scaled_in_float32() -> None:
    adapter = randomise(
        lk.adapt(
            nn.Sequential(nn.Linear(8, 8)), lk.LoRA(rank=3, alpha=7), "0", dtype=torch.bfloat16
        )
    )
    pair = adapter.tensors.pair_now("0")
    assert torch.equal(pair.up, adapter.tensors.branch("0").B.float() * (7 / 3)), (
        "rounded to bfloat16 once, when it was stored"
    )


def test_the_branch_keeps_the_inputs_dtype() -> None:
    """An adapter that widens its input to float32 keeps a float32 copy of it until backward."""
    linear = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    adapter = lk.adapt(linear, lk.LoRA(rank=2), "0")
    parameters = {p.data_ptr() for p in adapter.parameters()}
    kept = []
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    large = [t for t in kept if t.data_ptr() not in parameters and t.numel() >= x.numel()]
    assert all(t.dtype == torch.bfloat16 for t in large)
    assert len({t.data_ptr() for t in large}) == 1, "x is kept once, and nothing else of its size"
