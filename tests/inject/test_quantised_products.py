"""Quantised layers through the kernels: as plain operations beside the library's own forward, as
close to float64, and with less kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakin as lk
from conftest import randomise
from family.problem import saved_bytes
from kernels.test_adapted_linear import METHODS, Gradients, assert_close, fused, kinds_of_nodes
from lorakin.inject import quantised_products

bnb = pytest.importorskip("bitsandbytes")

INPUTS, HIDDEN = 128, 64
KINDS = ["nf4", "nf4-nested", "fp4-nested", "int8"]
UNLIKE = ["nf4-nested", "int8"]
KERNELS = {"LinearWithPairBackward", "LinearWithChainBackward", "LinearWithDroppedGainBackward"}
DROPPED: dict[str, Any] = {
    "lora": lk.LoRA(rank=3, dropout=0.3),
    "vera": lk.VeRA(rank=5, dropout=0.3),
    "dora": lk.DoRA(rank=3, dropout=0.3),
}


def plain_net(dtype: torch.dtype, bias: bool) -> nn.Sequential:
    """Two layers, and an activation between them that overwrites what the first returns."""
    torch.manual_seed(0)
    first, last = nn.Linear(INPUTS, HIDDEN, bias), nn.Linear(HIDDEN, HIDDEN, bias)
    return nn.Sequential(first, nn.ReLU(inplace=True), last).to(dtype).requires_grad_(False)


def net(
    kind: str = "nf4-nested",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    computes: torch.dtype | None = None,
) -> Any:
    """The same with its weights in few bits, and the rest in `dtype`."""
    model = plain_net(dtype, bias)
    name, _, nested = kind.partition("-")
    for n in (0, 2):
        plain = model[n]
        sizes = plain.in_features, plain.out_features, bias
        if kind == "int8":
            packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        else:
            packed = bnb.nn.Linear4bit(*sizes, computes or dtype, bool(nested), name)
        packed.load_state_dict(plain.state_dict())
        packed.bias = plain.bias
        model[n] = packed.to("cpu").requires_grad_(False)
    return model


def twin_of(model: Any, dtype: torch.dtype) -> nn.Sequential:
    """A plain model with the numbers that the quantised one stands for."""
    twin = plain_net(dtype, model[0].bias is not None)
    for n in (0, 2):
        twin[n].weight.data = dequantised(model[n]).to(dtype)
        if twin[n].bias is not None:
            twin[n].bias.data = model[n].bias.data.to(dtype)
    return twin


def dequantised(module: Any) -> Tensor:
    """The layer's weight by its own library, whole."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).data
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return weight.data.float() * scales[:, None] / 127


def adapted(model: Any, members: Any, near_start: bool = False) -> Any:
    adapter = lk.adapt(model, members, ["0", "2"], seed=0)
    norms = {
        path: tensors["m"].detach().clone()
        for path in adapter.placement.methods
        if "m" in (tensors := adapter.tensors.branch(path).tensors())
    }
    randomise(adapter, 0.05)
    for path, norm in norms.items() if near_start else ():
        generator = torch.Generator().manual_seed(3)
        adapter.tensors.branch(path).m.data = norm * (
            1 + 0.1 * torch.randn(norm.shape, generator=generator)
        )
    return model.train()


def plain(call: Callable[..., Any], *args: Any) -> Any:
    """Calls it with the library's own forward, and plain operations beside it."""
    with mock.patch.object(quantised_products, "weight_source", return_value=None):
        return call(*args)


def is_fused(out: Tensor) -> bool:
    kinds = kinds_of_nodes(out)
    return bool(kinds & KERNELS) and not any(kind.startswith("MatMul") for kind in kinds)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_plain_operations(
    method: str, kind: str, bias: bool
) -> None:
    model = adapted(net(kind, bias=bias), METHODS[method])
    for rows in (3, 90):  # few, for which VeRA goes through its rank, and many, for which it merges
        x = torch.randn(2, rows, INPUTS)
        out = model(x.clone().requires_grad_())
        assert is_fused(out)
        torch.testing.assert_close(out, plain(model, x), rtol=1e-4, atol=1e-5)
        assert_close(fused(model, x), plain(fused, model, x), 2e-4)
        with torch.no_grad():
            torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("method", METHODS)
def test_in_a_narrow_dtype_it_is_as_close_to_float64_as_plain_operations(
    method: str, kind: str, dtype: torch.dtype
) -> None:
    model = adapted(net(kind, dtype), METHODS[method], near_start=True)
    exact_model = adapted(twin_of(model, torch.float64), METHODS[method], near_start=True)
    parameters = dict(model.named_parameters())
    for name, parameter in exact_model.named_parameters():
        if "lorakin" in name:
            parameter.data = parameters[name].detach().double()
    model[1] = exact_model[1] = nn.Identity()  # rounding would switch some activations
    x = torch.randn(200, INPUTS).to(dtype)
    exact = fused(exact_model, x.double())
    errors = []
    for got in (fused(model, x), plain(fused, model, x)):
        assert got.keys() == exact.keys()
        errors.append(
            {
                name: float((got[name].double() - exact[name]).norm() / exact[name].norm())
                for name in exact
            }
        )
    for name in exact:
        least = max(torch.finfo(dtype).eps, 1e-6)
        assert errors[0][name] <= 1.3 * errors[1][name] + least, (name, errors)


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize("method", DROPPED)
def test_dropout_is_that_of_a_plain_base(method: str, kind: str) -> None:
    model = adapted(net(kind), DROPPED[method], near_start=True)
    twin = adapted(twin_of(model, torch.float32), DROPPED[method], near_start=True)
    x = torch.randn(40, INPUTS)
    gradients: list[Gradients] = []
    for one in (model, twin):
        torch.manual_seed(7)
        assert is_fused(one(x.clone().requires_grad_()))
        torch.manual_seed(7)
        gradients.append(fused(one, x))
    assert_close(*gradients, 2e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computes", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_autocast(method: str, computes: torch.dtype, x_dtype: torch.dtype) -> None:
    model = adapted(net(dtype=x_dtype, computes=computes), METHODS[method], near_start=True)
    model[1] = nn.Identity()  # rounding would switch some activations
    x = torch.randn(2, 30, INPUTS).to(x_dtype)

    def run() -> tuple[Tensor, Gradients]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x.clone().requires_grad_())
            return out, fused(model, x)

    out, gradients = run()
    # In float16 the library computes, where autocast says bfloat16: it is left to that.
    assert is_fused(out) == (computes is not torch.float16)
    want, want_gradients = plain(run)
    assert out.dtype == want.dtype == x_dtype
    torch.testing.assert_close(out, want, rtol=0.03, atol=0.03)
    for name, gradient in gradients.items():
        difference = (gradient.float() - want_gradients[name].float()).norm()
        assert difference <= 0.03 * want_gradients[name].float().norm(), name
        assert gradient.dtype == want_gradients[name].dtype


@pytest.mark.parametrize("method", METHODS)
def test_products_in_a_wider_dtype_than_the_inputs(method: str) -> None:
    """The base computes in float32 then, and the adapter with it."""
    model = adapted(net(dtype=torch.bfloat16, computes=torch.float32), METHODS[method], True)
    model[1] = nn.Identity()
    x = torch.randn(300, INPUTS).bfloat16()
    out = model(x.clone().requires_grad_())
    assert out.dtype == torch.bfloat16
    assert is_fused(out)
    torch.testing.assert_close(out, plain(model, x), rtol=0.03, atol=0.03)
    got, want = fused(model, x), plain(fused, model, x)
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() <= 0.03 * want[name].norm(), name


def test_inputs_that_are_wider_than_the_products_get_plain_operations() -> None:
    """The adapter's product would lose digits that plain operations keep."""
    model = adapted(net(computes=torch.bfloat16), lk.LoRA(rank=3))
    out = model(torch.randn(5, INPUTS, requires_grad=True))
    assert "MatMul4BitBackward" in kinds_of_nodes(out)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("members", [METHODS["vera"], METHODS["dora"], *DROPPED.values()], ids=str)
def test_checkpointing_gives_the_same_gradients(members: Any, use_reentrant: bool) -> None:
    model = adapted(net(), members)
    x = torch.randn(9, INPUTS)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        inner = x.clone().requires_grad_()
        torch.manual_seed(5)
        call(inner).square().sum().backward()
        gradients.append([inner.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_how_often_a_step_unpacks_the_weight() -> None:
    """Of two layers: the library unpacks both where it multiplies, which is not counted here."""
    times = {"lora": (0, 2), "lora-fa": (0, 2), "vera": (2, 2), "dora": (2, 2)}
    for method, (forward, backward) in times.items():
        model = adapted(net(), METHODS[method], near_start=True)
        model[1] = nn.Identity()  # an output that was overwritten would be computed again
        model(torch.randn(2, INPUTS))  # DoRA reads ‖w_j‖² once, in blocks
        unpack = bnb.functional.dequantize_4bit
        with mock.patch.object(bnb.functional, "dequantize_4bit", side_effect=unpack) as spy:
            out = model(torch.randn(200, INPUTS, requires_grad=True))
            assert spy.call_count == forward, method
            out.sum().backward()
            assert spy.call_count - forward == backward, method
            model(torch.randn(200, INPUTS)).sum().backward()
            assert spy.call_count - forward - backward == forward + backward - 1, method


@pytest.mark.parametrize("kind", UNLIKE)
def test_backward_keeps_what_it_keeps_of_a_plain_base(kind: str) -> None:
    """`lorakin plan --quantize` rehearses the plain one."""
    for members in (*METHODS.values(), *DROPPED.values()):
        model = net(kind, torch.bfloat16)
        kept = []
        for one in (model, twin_of(model, torch.bfloat16)):
            x = torch.randn(300, INPUTS, requires_grad=True, dtype=torch.bfloat16)
            kept.append(saved_bytes(adapted(one, members), x))
        assert kept[0] == kept[1], members


def test_wider_products_keep_the_inputs_as_they_are() -> None:
    rows, rank = 1000, 4
    base = net(dtype=torch.bfloat16, computes=torch.float32, bias=False)
    model = adapted(base, lk.LoRA(rank=rank))
    model[1] = nn.Identity()
    x = torch.randn(rows, INPUTS, requires_grad=True, dtype=torch.bfloat16)
    kept = saved_bytes(model, x)
    assert kept <= rows * (2 * (INPUTS + HIDDEN) + 4 * 2 * rank)


def test_a_frozen_adapter_keeps_its_pair_over_the_same_bits() -> None:
    model = adapted(net(), lk.DoRA(rank=3), near_start=True).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(5, INPUTS)
    with torch.no_grad():
        before = model(x)
        unpack = bnb.functional.dequantize_4bit
        with mock.patch.object(bnb.functional, "dequantize_4bit", side_effect=unpack) as spy:
            again = model(x)
        assert spy.call_count == 0
        torch.testing.assert_close(again, before)
        model[0].weight.copy_(model[0].weight.flip(0))
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_inference_is_what_training_computes(method: str) -> None:
    model = adapted(net(), METHODS[method], near_start=True).eval()
    x = torch.randn(7, INPUTS)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(model, x), rtol=1e-4, atol=1e-5)
        inference = model(x)
    torch.testing.assert_close(inference, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_in_evaluation_int8_rounds_the_inputs_as_its_library_does(method: str) -> None:
    model = adapted(net("int8"), METHODS[method], near_start=True).eval()
    model[1] = nn.Identity()  # an output that was overwritten is computed again, unrounded
    x = torch.randn(200, INPUTS)
    x[:, 5] *= 20  # an outlier, which is not rounded
    out = model(x.clone().requires_grad_())
    assert is_fused(out)
    torch.testing.assert_close(out, plain(model, x), rtol=1e-4, atol=1e-4)
    assert_close(fused(model, x), plain(fused, model, x), 2e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, INPUTS), (2, 0, INPUTS), (INPUTS,), (2, 1, 3, INPUTS)])
@pytest.mark.parametrize("kind", UNLIKE)
def test_inputs_of_every_shape_go_forward_and_backward(kind: str, shape: tuple[int, ...]) -> None:
    for members in (*METHODS.values(), *DROPPED.values()):
        model = adapted(net(kind), members)
        x = torch.randn(shape, requires_grad=True)
        out = model(x)
        assert out.shape == (*shape[:-1], HIDDEN)
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


def test_a_class_with_its_own_forward_is_left_to_it() -> None:
    class Scaled(bnb.nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    model = net()
    model[2].__class__ = Scaled
    x = torch.randn(3, INPUTS)
    base = model(x)
    lk.adapt(model, lk.LoRA(rank=3), ["2"])
    torch.testing.assert_close(model(x), base)
