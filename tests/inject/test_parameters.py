"""Parameters that no layer holds, and torch's attention: against the same weights formed by hand in
float64.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=2),
    "lora-fa": lambda: lk.LoRAFA(rank=2),
    "vera": lambda: lk.VeRA(rank=3),
    "dora": lambda: lk.DoRA(rank=2),
    "adalora": lambda: lk.AdaLoRA(initial_rank=3, target_rank=2, total_steps=10),
    "delta-lora": lambda: lk.DeltaLoRA(rank=2, start_step=2),
}


class Own(nn.Module):
    """Parameters of one, two and three dimensions, used by products and otherwise; it counts its
    calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(6, 8) * 0.3)
        self.stack = nn.Parameter(torch.randn(3, 5, 6) * 0.3)
        self.bias = nn.Parameter(torch.zeros(5))
        self.calls = 0
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        out = torch.tanh(self.inner(x)) @ self.wide.T
        return torch.einsum("...i,eoi->...o", out, self.stack) + self.bias


class Net(nn.Module):
    """One parameter is read by the parent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + (x @ self.own.wide.mT).mean()


class Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        keys, values = x[..., : self.sizes.get("kdim", 8)], x[..., : self.sizes.get("vdim", 8)]
        out: Tensor = self.attn(x, keys, values, need_weights=False)[0]
        return out


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "own": (
        Net,
        ["own.wide", "stack"],
        ["own.wide.0", "own.stack.0", "own.stack.1", "own.stack.2"],
    ),
    "attention": (Attention, ["attn"], ["attn.in_proj_weight.0", "attn.out_proj"]),
    "attention of other sizes": (
        lambda: Attention(kdim=6, vdim=4),
        ["attn"],
        [*(f"attn.{name}_proj_weight.0" for name in "qkv"), "attn.out_proj"],
    ),
    "encoder": (
        encoder,
        ["self_attn"],
        [
            f"layers.{n}.self_attn.{part}"
            for n in range(2)
            for part in ("in_proj_weight.0", "out_proj")
        ],
    ),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def formed(base: nn.Module, adapter: lk.Adapter) -> dict[str, Tensor]:
    """The parameters of `base` that the adapter changes, with its change in them, differentiable in
    its tensors.
    """
    own = dict(base.named_parameters())
    changed: dict[str, Any] = {}
    for path in adapter.placement.methods:
        pair = adapter.tensors.pair_now(path)
        name, _, number = path.rpartition(".")
        name, number = (name, number) if name in own else (f"{path}.weight", "")
        matrix = own[name][int(number)] if own[name].dim() == 3 else own[name]
        matrix = matrix.detach() + pair.up @ pair.down
        matrix = matrix if pair.gain is None else pair.gain[:, None] * matrix
        if own[name].dim() == 3:
            changed.setdefault(name, []).append(matrix)
        else:
            changed[name] = matrix
    return {
        name: torch.stack(weight) if isinstance(weight, list) else weight
        for name, weight in changed.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_changed_weights_are_used(name: str, method: str, x: Tensor) -> None:
    make, targets, sites = MODELS[name]
    model, base = make().double(), make().double()
    adapter = lk.adapt(model, METHODS[method](), targets)
    assert list(adapter.placement.methods) == sites
    torch.testing.assert_close(model(x), base(x))
    randomise(adapter, 0.2)
    weights = formed(base, adapter)
    out, wanted = model(x), torch.func.functional_call(base, weights, (x,))
    torch.testing.assert_close(out, wanted)
    tensors = [t for t in adapter.parameters() if t.requires_grad]
    theirs = torch.autograd.grad(wanted.square().sum(), tensors)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), tensors), theirs)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x), wanted.detach(), msg="where torch has a fast path"
        )
        adapter.merge()
        torch.testing.assert_close(model(x), wanted.detach())


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_out_to_the_bit(name: str, x: Tensor) -> None:
    make, targets, _ = MODELS[name]
    model = make().double()
    own, values = (
        dict(model.named_parameters()),
        {key: t.clone() for key, t in model.state_dict().items()},
    )
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), targets))
    assert {key for key in model.state_dict() if "lorakin" not in key} == set(values)
    adapter.merge()
    adapter.unmerge()
    with adapter.disabled():
        torch.testing.assert_close(model(x), make().double()(x))
    adapter.remove()
    assert all(parameter is own[key] for key, parameter in model.named_parameters())
    assert all(torch.equal(t, values[key]) for key, t in model.state_dict().items())
    assert all(type(a) is type(b) for a, b in zip(model.modules(), make().modules(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_files(method: str, tmp_path: Path, x: Tensor) -> None:
    model = nn.Sequential(Net(), nn.Linear(5, 8), Attention()).double()
    adapter = randomise(lk.adapt(model, METHODS[method](), ["own.wide", "stack", "attn", "1"]), 0.2)
    optimizer = adapter.optimizer(torch.optim.SGD, lr=1e-4, total_steps=10)
    for _ in range(10):
        torch.tanh(model(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(tmp_path)
    lk.load(again := nn.Sequential(Net(), nn.Linear(5, 8), Attention()).double(), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    other = nn.Sequential(Net(), nn.Linear(5, 8), Attention()).double()
    with torch.no_grad():
        other[2].attn.in_proj_weight.mul_(1.5)
    with pytest.raises(lk.AdapterError, match="in_proj_weight of 2.attn"):
        lk.load(other, tmp_path)


def test_a_tied_parameter_keeps_its_partner(x: Tensor) -> None:
    model = nn.Sequential(Net()).double()
    model.partner = model[0].own.wide
    before = model.partner.clone()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["own.wide"]))
    adapter.merge()
    assert torch.equal(model.partner, before) and not torch.equal(model[0].own.wide, before)
    adapter.unmerge()
    assert model[0].own.wide is model.partner


def test_what_a_forward_notes_on_its_module_stays_there(x: Tensor) -> None:
    model = Net().double()
    lk.adapt(model, lk.LoRA(rank=2), ["own.wide"])
    for _ in range(3):
        model(x)
    assert model.own.calls == 3 and "wide" not in vars(model.own)


def test_outside_of_a_forward_it_is_the_bases_own(x: Tensor) -> None:
    model = Net().double()
    own = model.own.wide
    randomise(lk.adapt(model, lk.LoRA(rank=2), ["own.wide"]))
    assert model.own.wide is own
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_checkpointed(name: str, x: Tensor) -> None:
    make, targets, _ = MODELS[name]
    model = make().double()
    adapter = randomise(lk.adapt(model, lk.DoRA(rank=2), targets), 0.2)
    tensors = [t for t in adapter.parameters() if t.requires_grad]
    wanted = torch.autograd.grad(model(x).square().sum(), tensors)
    for again in (
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
        torch.compile(model, backend="eager", fullgraph=name != "own")(x),
    ):
        torch.testing.assert_close(torch.autograd.grad(again.square().sum(), tensors), wanted)


def test_which_are_meant() -> None:
    def sites(model: nn.Module, targets: Any, **places: Any) -> list[str]:
        return list(lk.adapt(model, lk.LoRA(rank=2), targets, **places).placement.methods)

    every = MODELS["encoder"][2]
    assert sites(encoder(), "self_attn") == every
    assert (
        sites(encoder(), "self_attn", exclude="out_proj")
        == sites(encoder(), "in_proj_weight")
        == every[::2]
    )
    assert sites(encoder(), "layers.*.self_attn.in_proj_weight") == every[::2]
    assert sites(encoder(), r".*\.in_proj_\w+ht", layers=[1]) == every[2:3]
    assert sites(encoder(), ["linear1", "self_attn"], exclude="self_attn") == [
        "layers.0.linear1",
        "layers.1.linear1",
    ]
    assert not any("in_proj" in path for path in sites(encoder(), "all-linear")), (
        "a parameter is named, or left alone"
    )
    assert sites(encoder(), lambda path, module: True) == sites(encoder(), "all-linear")
    assert sites(tiny_llama(), "q_proj.weight") == sites(tiny_llama(), "q_proj"), (
        "a layer's weight is the layer"
    )
    assert sites(tiny_gpt2(), "c_fc.weight") == sites(tiny_gpt2(), "c_fc")
    assert sites(Net(), "own.stack.1") == ["own.stack.1"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("norm1.weight", "layers.0.norm1.weight.* 1 "),
        ("in_proj_bias", "layers.0.self_attn.in_proj_bias.* 1 "),
        ("linear1.bias", "linear1.bias"),
        ("in_proj_weights", "'in_proj_weights'"),
    ],
)
def test_what_is_refused_by_name(target: str, message: str) -> None:
    with pytest.raises(lk.TargetError, match=message):
        lk.adapt(encoder(), lk.LoRA(rank=2), target)
    with pytest.raises(lk.TargetError, match="'in_proj_weight'"):
        lk.adapt(nn.MultiheadAttention(8, 2), lk.LoRA(rank=2), "in_proj_weight")


def test_ranks_of_an_attention() -> None:
    plan = lk.adapt(
        encoder(),
        lk.LoRA(rank=4),
        "self_attn",
        rank_pattern={"layers.0.self_attn": 2, "out_proj": 3},
    ).placement
    ranks = [method.parametrisation.rank for method in plan.methods.values()]
    assert ranks == [2, 2, 4, 3]
    with pytest.raises(lk.TargetError):
        lk.adapt(encoder(), lk.LoRA(rank=4), "self_attn", rank_pattern={"linear1": 2})


def test_dropout_mixed_batches_and_probes(x: Tensor) -> None:
    model = Attention().double().train()
    lk.adapt(model, lk.LoRA(rank=2, dropout=0.5), "attn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(x)
    assert any(
        "does not act in attn.in_proj_weight.0: it is a parameter of a MultiheadAttention"
        in str(w.message)
        for w in said
    )
    with pytest.raises(lk.SettingError):
        lk.mixed_batch(model, ["default", None])
    with pytest.raises(lk.SettingError, match="in_proj_weight.0"):
        lk.adapt(
            Attention(), lk.LoRADrop(rank=2, keep=1), "attn", probe=[{"x": x.float(), "labels": x}]
        )


def test_two_adapters_add_up(x: Tensor) -> None:
    model = Attention().double()
    first = randomise(lk.adapt(model, lk.LoRA(rank=2), "attn", name="first"), 0.2)
    second = randomise(
        lk.adapt(model, lk.LoRA(rank=1), "in_proj_weight", name="second"), 0.2, seed=2
    )
    lk.activate(model, ["first", "second"])
    change = sum(
        a.tensors.pair_now("attn.in_proj_weight.0").up
        @ a.tensors.pair_now("attn.in_proj_weight.0").down
        for a in (first, second)
    )
    base = Attention().double()
    weights = {
        **formed(base, first),
        "attn.in_proj_weight": base.attn.in_proj_weight.detach() + change,
    }
    wanted = torch.func.functional_call(base, weights, (x,))
    torch.testing.assert_close(model(x), wanted)
    first.merge()
    second.merge()
    torch.testing.assert_close(model(x), wanted)


def test_autocast_computes_as_the_base_does(x: Tensor) -> None:
    model = Attention()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "attn"), 0.1)
    exact = torch.func.functional_call(base := Attention(), formed(base, adapter), (x.float(),))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        low = model(x.float())
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)
