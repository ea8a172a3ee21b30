"""The fused linear layer against plain operations, which function transforms are given, and against
float64.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakin as lk
from conftest import randomise, tiny_llama
from family.problem import saved_bytes
from lorakin.inject.attachments import base_parameters
from lorakin.kernels.adapted_linear import LinearWithPair
from lorakin.kernels.dropout import DropoutByGaps, DropoutByMask, DropoutDraw

METHODS: dict[str, Any] = {
    "lora": lk.LoRA(rank=3),
    "lora-fa": lk.LoRAFA(rank=3),
    "vera": lk.VeRA(rank=5),
    "dora": lk.DoRA(rank=3),
    "adalora": lk.AdaLoRA(initial_rank=4),
    "delta-lora": lk.DeltaLoRA(rank=3, start_step=0),
    "lora-fa,dora": [lk.LoRAFA(rank=3), lk.DoRA()],
    "vera,dora": [lk.VeRA(rank=5), lk.DoRA()],
    "vera,delta-lora": [lk.VeRA(rank=5), lk.DeltaLoRA(start_step=0)],
    "vera,adalora": [lk.VeRA(rank=5), lk.AdaLoRA()],
    "dora,delta-lora": [lk.DoRA(rank=3), lk.DeltaLoRA(start_step=0)],
}
Gradients = dict[str, Tensor]


def net(
    dtype: torch.dtype = torch.float64, bias: bool = True, inplace: bool = False
) -> nn.Sequential:
    """Two layers with an activation between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 6, bias=bias), nn.ReLU(inplace=inplace), nn.Linear(6, 4, bias=bias)
    ).to(dtype)


def adapted(model: nn.Module, member: Any, targets: Any = ("0", "2")) -> lk.Adapter:
    """Every tensor of the adapter away from its start, the anchors too."""
    adapter = lk.adapt(model, member, list(targets), seed=0)
    return randomise(adapter)


def fused(model: nn.Module, x: Tensor) -> Gradients:
    """What backward gives for everything that trains, and for x."""
    x = x.detach().requires_grad_()
    out = model(x)
    wide = out if out.dtype == torch.float64 else out.float()
    wide.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    assert x.grad is not None
    return {**found, "x": x.grad}


def plain(model: nn.Module, x: Tensor) -> Gradients:
    """The same by torch.func, under which lorakin does plain operations."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(there: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, there, (x,))
        return out.square().sum() if out.dtype == torch.float64 else out.float().square().sum()

    found, for_x = torch.func.grad(loss, argnums=(0, 1))(trained, x.detach())
    return {**found, "x": for_x}


def assert_close(got: Gradients, want: Gradients, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient,
            want[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def kinds_of_nodes(out: Tensor) -> set[str]:
    """The names of all autograd nodes behind `out`."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_are_those_of_plain_operations(
    method: str, base_trains: bool, bias: bool
) -> None:
    model = net(bias=bias)
    adapted(model, METHODS[method])
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(base_trains)
    for rows in (3, 40):  # few, for which VeRA goes through its rank, and many, for which it merges
        x = torch.randn(2, rows, 9, dtype=torch.float64)
        out = model(x)
        assert kinds_of_nodes(out) & {"LinearWithPairBackward", "LinearWithChainBackward"}, (
            "not the fused path"
        )
        torch.testing.assert_close(out, torch.func.vmap(model)(x), rtol=1e-11, atol=1e-11)
        assert_close(fused(model, x), plain(model, x), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_in_a_narrow_dtype_it_is_as_close_to_float64_as_plain_operations(
    method: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 48)).to(dtype)
    adapter = lk.adapt(model, METHODS[method], ["0", "1"], seed=0)
    norms = {
        path: adapter.tensors.branch(path).tensors().get("m", torch.ones(0)).detach().clone()
        for path in adapter.placement.methods
    }
    randomise(adapter, 0.05)
    for path, norm in norms.items():  # gains near 1, as training leaves them
        if len(norm):
            adapter.tensors.branch(path).m.data = norm * (1 + 0.1 * torch.randn_like(norm))
    x = torch.randn(200, 96).to(dtype)
    exact = plain(copy.deepcopy(model).double(), x.double())
    errors = []
    for path in (fused, plain):
        got = path(model, x)
        errors.append(
            {
                name: float((got[name].double() - exact[name]).norm() / exact[name].norm())
                for name in exact
            }
        )
    for name in exact:
        assert errors[0][name] <= 1.3 * errors[1][name] + max(torch.finfo(dtype).eps, 1e-6), (
            name,
            errors,
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_overwrites_the_output_in_place_changes_no_gradient(method: str) -> None:
    gradients = []
    for inplace in (True, False):
        model = net(inplace=inplace)
        adapted(model, METHODS[method])
        gradients.append(fused(model, torch.linspace(-2, 2, 45, dtype=torch.float64).view(5, 9)))
    assert_close(*gradients, 1e-12)


def test_a_gain_of_nothing_still_gets_its_gradient() -> None:
    """The output of such a row is the bias; the gradient of its magnitude is not zero for that."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = net(dtype)
        adapter = adapted(model, lk.DoRA(rank=3))
        with torch.no_grad():
            adapter.tensors.branch("0").m[2] = 0
            adapter.tensors.branch("0").m[1] *= 1e-4
        x = torch.randn(7, 9, dtype=dtype)
        got = fused(model, x)
        assert got["0.lorakin.default.m"][2] != 0
        assert_close(got, plain(model, x), tolerance)


def test_the_norms_follow_a_weight_that_changes() -> None:
    model = net()
    adapter = adapted(model, lk.DoRA(rank=3), ["0"])
    x = torch.randn(5, 9, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    torch.testing.assert_close(model(x), torch.func.vmap(model)(x))
    model[0].weight.data = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), torch.func.vmap(model)(x))
    assert adapter.is_active


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model = net(torch.float32)
    adapted(model, METHODS[method])
    x = torch.randn(2, 30, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1)
    out.float().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == torch.float32, name


def test_what_backward_keeps() -> None:
    """Inputs once, r numbers a token beside them; no input if nothing needs it, no mask, and VeRA's
    product once for all.
    """
    rows, width, numbers = 400, 64, 4
    for member, most in (
        (lk.LoRA(rank=4), width + 3 * 4),
        (lk.LoRA(rank=4, dropout=0.1), width + 3 * 4),
        (lk.LoRAFA(rank=4, dropout=0.1), 3 * 4),
        (lk.VeRA(rank=8), 8),
        (lk.VeRA(rank=8, dropout=0.1), 3 * 8),
        (lk.AdaLoRA(initial_rank=4), width + 3 * 4),
    ):
        block = Siblings(width)
        lk.adapt(block, member)
        x = torch.randn(rows, width, requires_grad=True)
        tensors = (
            3 * 2 * numbers * width * 8 + width * 8 * 2 * numbers
        )  # the small factors that are not parameters themselves
        assert saved_bytes(block, x) <= numbers * rows * most + tensors, member


class Siblings(nn.Module):
    """Three layers that read one input, as the projections of an attention do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.q(x) + self.k(x) + self.v(x)
        return total


def test_siblings_share_a_product_only_while_it_is_right() -> None:
    block = Siblings(12).double()
    randomise(lk.adapt(block, lk.VeRA(rank=5)))
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    truth = torch.func.vmap(block)
    with torch.no_grad():
        block(x)
    assert_close(
        fused(block, x), plain(block, x), 1e-10
    )  # not the product without gradients from just before
    first = block(x)
    with torch.no_grad():
        x.mul_(2)  # the same tensor with other values, while the graph of the first call is alive
    torch.testing.assert_close(block(x), truth(x))
    assert first.grad_fn is not None
    with torch.inference_mode():
        torch.testing.assert_close(block(x.clone()), truth(x.clone()))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "member",
    [lk.LoRA(rank=3, dropout=0.4), lk.VeRA(rank=5), lk.VeRA(rank=5, dropout=0.4), lk.DoRA(rank=3)],
)
def test_checkpointing_gives_the_same_gradients(member: Any, use_reentrant: bool) -> None:
    block = Siblings(12).double().train()
    randomise(lk.adapt(block, member))
    x = torch.randn(6, 12, dtype=torch.float64)
    gradients = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        inner = x.clone().requires_grad_()
        torch.manual_seed(5)
        call(inner).square().sum().backward()
        gradients.append([inner.grad, *(p.grad for p in block.parameters() if p.grad is not None)])
        block.zero_grad()
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", [DropoutByGaps, DropoutByMask])
@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.95])
def test_dropout_is_a_bernoulli_process(p: float, kind: type[DropoutDraw]) -> None:
    count, runs = 20_000, 50
    ones = torch.ones(count)
    kept = torch.stack([kind(p, seed).zeroed(ones) for seed in range(runs)])
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    dropped = 1 - kept
    deviation = (p * (1 - p) / (count * runs)) ** 0.5
    assert abs(dropped.mean().item() - p) < 5 * deviation
    for part in (dropped[:, :1000], dropped[:, -1000:]):  # as often at both ends
        assert abs(part.mean().item() - p) < 5 * (p * (1 - p) / part.numel()) ** 0.5
    together = (
        (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    )  # neighbours know nothing of each other
    assert abs(together - p * p) < 5 * (p * p * (1 - p * p) / (count * runs)) ** 0.5 + 1e-9


def test_each_module_draws_its_own_mask_and_a_seed_draws_it_again() -> None:
    torch.manual_seed(3)
    first, second = (DropoutDraw.drawn(0.5, torch.device("cpu")) for _ in range(2))
    x = torch.randn(40, 10)
    assert not torch.equal(first.zeroed(x), second.zeroed(x))
    assert torch.equal(first.zeroed(x), first.zeroed(x))
    torch.manual_seed(3)
    assert DropoutDraw.drawn(0.5, torch.device("cpu")).seed == first.seed


@pytest.mark.parametrize("kind", [DropoutByGaps, DropoutByMask])
def test_the_inputs_gradient_passes_where_the_input_was_kept(kind: type[DropoutDraw]) -> None:
    torch.manual_seed(3)
    drop = kind(0.3, seed=5)
    shapes = ((7, 6), (6, 9), (6, 2), (2, 9), (7, 9))
    delta, weight, up, down, x = (torch.randn(shape).double() for shape in shapes)
    kept = drop.zeroed(torch.ones(7, 9, dtype=torch.float64))
    want = delta @ weight + 0.5 * (delta @ up @ down) * kept
    x.requires_grad_()
    for down_trains in (False, True):
        down.requires_grad_(down_trains)
        # The kernel's scale leaves out what the kept entries are multiplied by.
        y = LinearWithPair.apply(x, weight, None, up, down, None, 0.5 / drop.scale, drop)
        (got,) = torch.autograd.grad(y, x, delta)
        torch.testing.assert_close(got, want)


def test_function_transforms_and_compilers_get_plain_operations() -> None:
    model = net(torch.float32)
    adapted(model, lk.LoRA(rank=3))
    x = torch.randn(5, 9)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(there: dict[str, Tensor], one: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, there, (one,)).square().sum()
        return out

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        trained, x
    )  # gradients of single examples
    whole = torch.func.grad(loss)(trained, x)
    for name, gradient in whole.items():
        torch.testing.assert_close(each[name].sum(0), gradient)
    torch.func.jvp(lambda one: model(one), (x,), (x,))
    torch.func.hessian(lambda one: model(one).square().sum())(x[0])
    with torch.autograd.forward_ad.dual_level():
        assert (
            torch.autograd.forward_ad.unpack_dual(
                model(torch.autograd.forward_ad.make_dual(x, x))
            ).tangent
            is not None
        )
    with contextlib.suppress(DeprecationWarning):
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_a_model_that_is_not_plain_tensors_is_left_to_its_own_operations() -> None:
    """Mixed dtypes raise what they raise without an adapter."""
    model = net(torch.float32)
    adapted(model, lk.LoRA(rank=3))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 9, dtype=torch.float64))


def test_generation_and_training_agree() -> None:
    """Without gradients the same function computes the same bits."""
    ids = torch.randint(0, 64, (2, 9))
    for member in METHODS.values():
        model = tiny_llama(dtype=torch.bfloat16)
        randomise(lk.adapt(model, member))
        with_gradients = model(ids).logits
        with torch.inference_mode():
            without = model(ids).logits
        assert torch.equal(with_gradients, without)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_inference_between_steps_never_uses_an_older_adapter(method: str, cls: Any) -> None:
    """torch's fused optimizers change tensors without autograd's counting it, and so do writes
    through .data.
    """
    model = net(torch.bfloat16)
    adapter = adapted(model, METHODS[method])
    optimizer = adapter.optimizer(cls, lr=1e-3)
    x = torch.randn(5, 9).bfloat16()

    def right() -> bool:
        with torch.no_grad():
            return torch.equal(model(x), copy.deepcopy(model)(x))

    for _ in range(3):
        model(x).float().square().sum().backward()
        assert right()
        optimizer.step()
        assert right()
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.1)
        assert right()
        optimizer.zero_grad()


def test_a_frozen_adapter_follows_a_base_that_an_optimizer_moves() -> None:
    model = net(torch.bfloat16)
    adapter = adapted(model, lk.DoRA(rank=3))
    for parameter in model.parameters():
        parameter.requires_grad_("lorakin" not in str(parameter))
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.5, fused=True)
    x = torch.randn(5, 9).bfloat16()
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x), copy.deepcopy(model)(x))
        model(x).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,), (2, 1, 3, 9)])
@pytest.mark.parametrize("method", [*METHODS, "dropout"])
def test_inputs_of_every_shape_go_forward_and_backward(method: str, shape: tuple[int, ...]) -> None:
    model = net()
    adapted(model, METHODS.get(method, lk.LoRA(rank=3, dropout=0.3)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = model(x)
    assert out.shape == (*shape[:-1], 4)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_siblings_backward_apart() -> None:
    """As plain layers do: each has a graph of its own."""
    block = Siblings(12).double()
    randomise(lk.adapt(block, lk.VeRA(rank=5)))
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    q, k = block.q(x), block.k(x)
    q.sum().backward()
    k.sum().backward()
    apart = x.grad
    x.grad = None
    (block.q(x) + block.k(x)).sum().backward()
    torch.testing.assert_close(x.grad, apart)


def test_siblings_see_another_dtype_and_other_matrices() -> None:
    block = Siblings(12)
    adapter = randomise(lk.adapt(block, lk.VeRA(rank=5)))
    x = torch.randn(6, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held = block(x)
    torch.testing.assert_close(block(x), torch.func.vmap(block)(x))
    held = block(x)
    with torch.no_grad():
        adapter.tensors.branch("q").A.mul_(2)
    torch.testing.assert_close(block(x), torch.func.vmap(block)(x))
    assert held.requires_grad


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_backward_inside_autocast_keeps_to_its_forward(method: str) -> None:
    model = net(torch.float32)
    adapted(model, METHODS[method])
    x = torch.randn(20, 9)
    expected = fused(model, x)
    inner = x.clone().requires_grad_()
    out = model(inner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.square().sum().backward()
    torch.testing.assert_close(inner.grad, expected["x"])


def test_nothing_holds_an_adapter_or_a_weight_alive() -> None:
    import gc
    import weakref

    held = {}
    for name, member in METHODS.items():
        model = net()
        adapter = adapted(model, member)
        x = torch.randn(5, 9, dtype=torch.float64)
        fused(model, x)
        with torch.no_grad():
            model(x)
        held[name] = [weakref.ref(p) for p in (*adapter.parameters(), model[0].weight)]
        adapter.remove()
        del adapter, model
    gc.collect()
    assert not [name for name, refs in held.items() if any(ref() is not None for ref in refs)]
