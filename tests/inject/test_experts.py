"""Experts in parameters of three dimensions: what members do to them, against the base with changed
weights.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorakin as lk
from conftest import MEMBERS, tiny_gpt_oss, tiny_llama4, tiny_mixtral
from lorakin.inject import experts
from lorakin.kernels import factored_weight
from references import dora as dora_truth
from references import lora as lora_truth

BOTH = ["gate_up_proj", "down_proj"]
KERNELS = ["eager", "batched_mm", "grouped_mm"]
MODELS = [tiny_mixtral, tiny_gpt_oss]
LAYER = "model.layers.1.mlp.experts"


def experts_of(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer].mlp.experts


def exact(kernel: str) -> tuple[torch.dtype, dict[str, float]]:
    """The widest dtype that a kernel takes, and how near to the truth it should come in it."""
    if kernel == "grouped_mm":
        return torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    return torch.float64, {"rtol": 1e-9, "atol": 1e-11}


def changed_by_hand(make: Callable[..., Any], adapter: lk.Adapter) -> Any:
    """The base in float64 with the weights that the references give, each written into its place in
    the parameter.
    """
    model = make("eager", torch.float64)
    for path, method in adapter.placement.methods.items():
        owner, name, number = path.rsplit(".", 2)
        whole = model.get_parameter(f"{owner}.{name}").detach()
        place = whole[int(number)] if whole.dim() == 3 else whole
        matrix = place.T if getattr(model.get_submodule(owner), "is_transposed", False) else place
        own = {
            slot: tensor.detach().double().numpy()
            for slot, tensor in adapter.tensors.branch(path).tensors().items()
        }
        scale = method.parametrisation.scaling
        if "m" in own:
            new = dora_truth.merged(matrix.numpy(), own["A"], own["B"], scale, own["m"])
        else:
            new = lora_truth.merged(matrix.numpy(), own["A"], own["B"], scale)
        matrix.copy_(torch.from_numpy(new))
    return model


def near(adapter: lk.Adapter, scale: float = 0.3) -> lk.Adapter:
    """Other values for all tensors, a magnitude near its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            noise = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.copy_(p * (1 + noise) if name.endswith(".m") else noise)
    return adapter


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("member", ["lora", "lora-fa", "dora"])
def test_the_changed_weights_are_the_references(
    member: str, make: Any, kernel: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, tolerance = exact(kernel)
    model = make(kernel, dtype)
    adapter = near(
        lk.adapt(
            model,
            MEMBERS[member](),
            targets=[*BOTH, *(["gate.weight"] if make is tiny_mixtral else [])],
        )
    )
    truth = changed_by_hand(make, adapter)
    monkeypatch.setattr(factored_weight, "formed", None)  # no kernel may need a weight as a whole
    torch.testing.assert_close(model(ids).logits.double(), truth(ids).logits, **tolerance)
    assert (model(ids).logits - make(kernel, dtype)(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("member", ["lora", "lora-fa", "dora"])
def test_the_gradients_are_those_of_the_formed_weights(
    member: str, make: Any, kernel: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, tolerance = exact(kernel)
    model = make(kernel, dtype)
    adapter = near(lk.adapt(model, MEMBERS[member](), targets=BOTH))
    model(ids, labels=ids).loss.backward()
    ours = {name: p.grad.clone() for name, p in adapter.tensors.trained()}
    model.zero_grad()
    monkeypatch.setattr(
        factored_weight.ChangedWeight, "compute_from_parts", lambda *_: None
    )  # every use forms the weight
    model(ids, labels=ids).loss.backward()
    assert ours.keys() == {name for name, p in adapter.named_parameters() if p.requires_grad}
    assert all(".B" in name or member != "lora-fa" for name in ours)
    for name, p in adapter.tensors.trained():
        torch.testing.assert_close(ours[name], p.grad, **tolerance)


@pytest.mark.parametrize("member", [name for name in MEMBERS if name != "lora-drop"])
def test_every_member_merges_and_comes_back(member: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_mixtral("grouped_mm")
    base, keys, parameters = model(ids).logits, list(model.state_dict()), list(model.parameters())
    router = [] if member == "adalora" else ["gate.weight"]  # too narrow for its ranks
    adapter = lk.adapt(model, MEMBERS[member](), targets=[*BOTH, *router, "q_proj"])
    torch.testing.assert_close(model(ids).logits, base, rtol=1e-5, atol=1e-5)
    near(adapter)
    want = model(ids).logits.detach()
    # Logits of ±4 from weights of ±9 in float32; processors round differently.
    close = {"rtol": 1e-4, "atol": 5e-5}
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, want, **close)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, want, **close)
    adapter.unmerge()
    assert torch.equal(model(ids).logits, want)
    adapter.remove()
    assert torch.equal(model(ids).logits, base)
    assert list(model.state_dict()) == keys and all(
        map(torch.equal, model.parameters(), parameters)
    )
    assert all(
        one is other
        for one, other in zip(model.parameters(), parameters, strict=True)
        if one.dim() == 3
    )
    assert type(experts_of(model)).__name__ == "MixtralExperts" and not any(
        "proj" in key for key in experts_of(model)._modules
    )


def test_for_good(ids: Tensor) -> None:
    model = tiny_mixtral()
    adapter = near(lk.adapt(model, lk.DoRA(rank=4), targets=BOTH))
    want = model(ids).logits.detach()
    adapter.merge(permanent=True)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)
    assert (
        not any("lorakin" in key for key in model.state_dict())
        and type(experts_of(model)).__name__ == "MixtralExperts"
    )


def test_moved_cast_and_copied_while_merged(ids: Tensor) -> None:
    model = tiny_mixtral()
    adapter = near(lk.adapt(model, lk.LoRA(rank=4), targets=BOTH))
    want = model(ids).logits.detach()
    adapter.merge()
    twin = copy.deepcopy(model.double().float())
    adapter.unmerge()
    assert torch.equal(model(ids).logits, want)
    lk.adapters(twin)["default"].unmerge()
    assert torch.equal(twin(ids).logits, want)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_adapters_add_up_merged_or_not(kernel: str, ids: Tensor) -> None:
    dtype, tolerance = exact(kernel)
    model = tiny_mixtral(kernel, dtype)
    one = near(lk.adapt(model, lk.DoRA(rank=4), targets=BOTH, name="one"))
    two = near(
        lk.adapt(model, lk.DoRA(rank=2), targets=["down_proj", "gate_up_proj.2"], name="two"), 0.2
    )
    lk.activate(model, ["one", "two"])
    want = model(ids).logits.detach()
    weights = tiny_mixtral(kernel, dtype)
    for path in one.placement.methods:
        owner, name, number = path.rsplit(".", 2)
        whole = weights.get_parameter(f"{owner}.{name}").detach()
        base = whole[int(number)].clone()
        changes = [
            a.tensors.pair_now(path).applied_to(base) - base
            for a in (one, two)
            if path in a.placement.methods
        ]
        whole[int(number)] += sum(changes)
    torch.testing.assert_close(want, weights(ids).logits, **tolerance)
    for adapter in (one, two):  # then only one of them is in use, over the base's own weights
        adapter.merge()
        torch.testing.assert_close(model(ids).logits, want, **tolerance)
    one.unmerge()
    torch.testing.assert_close(model(ids).logits, want, **tolerance)
    two.unmerge()
    assert torch.equal(model(ids).logits, want)
    with one.disabled(), two.disabled():
        assert torch.equal(model(ids).logits, tiny_mixtral(kernel, dtype)(ids).logits)


def test_what_is_kept_for_the_backward(ids: Tensor) -> None:
    """No weight of the size of a stack, and with LoRA-FA not even the inputs of A."""

    def kept(member: Any) -> list[tuple[int, ...]]:
        model, shapes = tiny_mixtral("grouped_mm"), list[tuple[int, ...]]()
        lk.adapt(model, member, targets=BOTH, seed=1)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, labels=ids)
        return shapes

    stacks = {(4, 96, 32), (4, 32, 96), (4, 32, 48), (4, 48, 32)}
    inputs = (2 * ids.numel(), 32)
    lora, lora_fa, dora = kept(lk.LoRA(rank=4)), kept(lk.LoRAFA(rank=4)), kept(lk.DoRA(rank=4))
    assert not stacks & {*lora, *lora_fa, *dora}
    assert lora.count(inputs) > lora_fa.count(inputs)


PRODUCTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "linear": lambda x, w: torch.nn.functional.linear(x, w[1]),
    "matmul": lambda x, w: x @ w[1].T,
    "bmm": lambda x, w: torch.bmm(w[torch.ones(len(x), dtype=torch.long)], x.unsqueeze(-1)).squeeze(
        -1
    ),
    "grouped": lambda x, w: torch.nn.functional.grouped_mm(
        x, w.mT, offs=torch.tensor([0, len(x), len(x)], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("gained", [False, True])
def test_dropout_is_of_the_branchs_input_alone(
    gained: bool, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        factored_weight.F, "dropout", lambda x, p: 2 * x * (x > 0) if p == 0.5 else None
    )
    torch.manual_seed(0)
    x, weight, B, A = (
        torch.randn(6, 8),
        torch.randn(3, 4, 8),
        torch.randn(3, 4, 8),
        torch.randn(3, 8, 8),
    )
    m = torch.rand(3, 4) + 0.5
    gain = m / torch.linalg.vector_norm(weight + B @ A, dim=2)
    stack = factored_weight.ChangedWeight(
        weight, (factored_weight.WeightChange(B, A, gain if gained else None, None, 0.5),)
    )
    mask = 2 * (x > 0)
    one = weight[1], None, A[1], B[1], 1.0
    want = dora_truth.forward(x, *one, m[1], mask) if gained else lora_truth.forward(x, *one, mask)
    torch.testing.assert_close(
        PRODUCTS[product](x, stack).double(), torch.from_numpy(want), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_inference_sees_every_change(ids: Tensor, tmp_path: Path) -> None:
    near(lk.adapt(tiny_mixtral(), lk.DoRA(rank=4), targets=BOTH)).save(tmp_path)
    model = tiny_mixtral()
    adapter = lk.load(model, tmp_path)
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    for change in (lambda: near(adapter, 0.2), lambda: experts_of(model).down_proj.mul_(1.1)):
        change()
        twin = copy.deepcopy(model)  # which remembers nothing
        torch.testing.assert_close(model(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-6)
        assert (model(ids).logits - first).abs().max() > 1e-3
        first = model(ids).logits


@torch.no_grad()
def test_dropout_in_training_alone(ids: Tensor, tmp_path: Path) -> None:
    near(lk.adapt(tiny_mixtral(), lk.DoRA(rank=4, dropout=0.5), targets=BOTH)).save(tmp_path)
    model = tiny_mixtral()
    lk.load(model, tmp_path)
    whole = model(ids).logits
    for _ in range(2):
        assert torch.equal(model.eval()(ids).logits, whole)
        assert not torch.equal(model.train()(ids).logits, whole)


@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_whose_ranks_are_all_gone(kernel: str, ids: Tensor) -> None:
    model = tiny_mixtral(kernel)
    adapter = lk.adapt(model, lk.AdaLoRA(initial_rank=4, target_rank=2), ["q_proj", "down_proj.0"])
    for path in adapter.placement.methods:
        if "experts" in path:
            site = adapter.tensors.branch(path)
            with torch.no_grad():
                site.overwrite(
                    {"P": torch.zeros(32, 0), "E": torch.zeros(0, 1), "Q": torch.zeros(0, 48)}
                )
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)


def test_gradient_checkpointing(ids: Tensor) -> None:
    model = tiny_mixtral("grouped_mm").train()
    adapter = near(lk.adapt(model, lk.DoRA(rank=4), targets=BOTH))
    model(ids, labels=ids).loss.backward()
    want = {name: p.grad.clone() for name, p in adapter.tensors.trained()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.equal(want[name], p.grad) for name, p in adapter.tensors.trained())


@torch.no_grad()  # transformers 5.17 cannot compile the backward of its own fallback in float32
def test_compiled(ids: Tensor) -> None:
    model = tiny_mixtral("grouped_mm")
    near(lk.adapt(model, lk.LoRA(rank=4), targets=BOTH))
    want = model(ids).logits
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits,
        want,
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(kernel: str) -> None:
    model = tiny_mixtral(kernel)
    near(lk.adapt(model, lk.DoRA(rank=4), targets=BOTH))
    call = (
        torch.randn(6, 32),
        torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]]),
        torch.rand(6, 2),
    )
    want = experts_of(model)(*call)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(experts_of(model)(*call).float(), want, rtol=0.05, atol=0.05)


def test_which_are_meant() -> None:
    def sites(targets: Any, **places: Any) -> list[str]:
        return list(lk.adapt(tiny_mixtral(), lk.LoRA(rank=2), targets, **places).placement.methods)

    every = [
        f"model.layers.{layer}.mlp.experts.{name}.{n}"
        for layer in range(2)
        for name in BOTH
        for n in range(4)
    ]
    assert sites(BOTH) == sites("*.experts.*") == every
    assert sites("experts.down_proj", layers=[1]) == every[12:]
    assert sites("down_proj.3") == [every[7], every[15]]
    assert sites(f"{LAYER}.gate_up_proj.0") == [every[8]]
    assert sites(BOTH, exclude="gate_up_proj") == every[4:8] + every[12:]
    assert sites(BOTH, exclude=r".*\.[123]") == every[::4]
    assert not any("expert" in path or "gate" in path for path in sites("all-linear"))
    assert sites("gate.weight") == [
        "model.layers.0.mlp.gate.weight.0",
        "model.layers.1.mlp.gate.weight.0",
    ]
    with pytest.raises(
        lk.TargetError,
        match="'experts'.*gate_up_proj, down_proj",
    ):
        sites("experts")
    with pytest.raises(lk.TargetError, match=r"'down_proj.4'"):
        sites("down_proj.4")


def test_a_pattern_that_names_the_parameter() -> None:
    adapter = lk.adapt(
        tiny_mixtral(),
        lk.LoRA(rank=4),
        BOTH,
        rank_pattern={"experts.down_proj": 2, r"gate_up_proj\.3": 8},
        alpha_pattern={"down_proj": 1},
    )
    at = {path: method.parametrisation for path, method in adapter.placement.methods.items()}
    assert (
        {at[f"{LAYER}.down_proj.{n}"].rank for n in range(4)}
        == {2}
        == {2 * at[f"{LAYER}.down_proj.0"].alpha}
    )
    assert [at[f"{LAYER}.gate_up_proj.{n}"].rank for n in range(4)] == [4, 4, 4, 8]
    with pytest.raises(lk.TargetError):
        lk.adapt(tiny_mixtral(), lk.LoRA(rank=4), "down_proj", rank_pattern={"gate_up_proj": 2})


@pytest.mark.parametrize(
    "targets", [BOTH, ["gate_up_proj.1", r".*down_proj\.[02]", "gate.weight", "q_proj"]]
)
@pytest.mark.parametrize("member", ["lora", "lora+", "lora-fa", "vera", "dora", "delta-lora"])
def test_files(member: str, targets: list[str], tmp_path: Path, ids: Tensor) -> None:
    model = tiny_mixtral()
    adapter = near(lk.adapt(model, MEMBERS[member](), targets))
    optimizer = adapter.optimizer(
        torch.optim.SGD, lr=0.1, total_steps=10
    )  # or Delta-LoRA would be saved without a step
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want, method = model(ids).logits.detach(), adapter.placement.method
    adapter.save(tmp_path)
    other = tiny_mixtral()
    loaded = lk.load(other, tmp_path)
    torch.testing.assert_close(other(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert loaded.placement.method.agrees_with(method) and list(loaded.placement.methods) == list(
        adapter.placement.methods
    )
    adapter.restore(tmp_path)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_a_fingerprint_is_the_bases_own(tmp_path: Path, ids: Tensor) -> None:
    model = tiny_mixtral()
    adapter = near(lk.adapt(model, lk.LoRA(rank=4), targets=BOTH))
    adapter.merge()
    adapter.save(tmp_path)
    lk.load(tiny_mixtral(), tmp_path)
    changed = tiny_mixtral()
    with torch.no_grad():
        experts_of(changed).down_proj.mul_(1.5)
    with pytest.raises(lk.AdapterError, match="model.layers.1.mlp.experts"):
        lk.load(changed, tmp_path)


def test_what_is_refused(ids: Tensor) -> None:
    model = tiny_mixtral()
    batches = [{"input_ids": ids, "labels": ids}]
    with pytest.raises(lk.SettingError, match="down_proj.0"):
        lk.adapt(model, lk.LoRADrop(rank=2, keep=2), targets="down_proj", probe=batches)
    assert not lk.adapters(model)
    lk.adapt(model, lk.LoRA(rank=2), targets="down_proj", name="of experts")
    with pytest.raises(lk.SettingError, match="'of experts'"):
        lk.mixed_batch(model, ["of experts", None])
    experts_of(replaced := tiny_mixtral()).forward = lambda *_: None
    with pytest.raises(lk.StateError):
        lk.adapt(replaced, lk.LoRA(rank=2), targets="down_proj")


def test_other_adapters_go_in_a_mixed_batch(ids: Tensor) -> None:
    model = tiny_mixtral()
    near(lk.adapt(model, lk.LoRA(rank=2), targets="q_proj", name="attention"))
    want = model(ids).logits[:1].detach()
    near(lk.adapt(model, lk.LoRA(rank=2), targets="down_proj", name="of experts"))
    with lk.mixed_batch(model, ["attention", None]):
        mixed = model(ids).logits
    torch.testing.assert_close(mixed[:1], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:], tiny_mixtral()(ids).logits[1:], rtol=1e-4, atol=1e-5)


def test_a_kernel_that_takes_addresses_is_refused(ids: Tensor) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def by_address(self: Any, hidden_states: Tensor, *_: Any) -> Tensor:
        return hidden_states * self.gate_up_proj.data_ptr()

    ALL_EXPERTS_FUNCTIONS.register("by address", by_address)
    model = tiny_mixtral("by address")
    lk.adapt(model, lk.LoRA(rank=2), targets=BOTH)
    with pytest.raises(lk.StateError, match="set_experts_implementation"):
        model(ids)


@pytest.mark.parametrize("member", ["lora", "dora"])
def test_experts_of_another_kind(member: str, ids: Tensor) -> None:
    model = tiny_llama4()
    adapter = near(
        lk.adapt(model, MEMBERS[member](), targets=["experts.gate_up_proj", "experts.down_proj"])
    )
    want = model(ids).logits.detach()
    assert (want - tiny_llama4()(ids).logits).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_which_way_round_experts_are_held(ids: Tensor) -> None:
    """Where transformers does not say it, as of Llama 4, the two parameters do."""
    adapter = lk.adapt(
        tiny_llama4(), lk.DoRA(rank=4), targets=["experts.gate_up_proj", "experts.down_proj"]
    )
    sites = {
        path.split(".")[-2]: adapter.tensors.branch(path) for path in adapter.placement.methods
    }
    shapes = {
        name: {slot: tuple(t.shape) for slot, t in site.tensors().items()}
        for name, site in sites.items()
    }
    assert shapes["gate_up_proj"] == {"A": (4, 32), "B": (96, 4), "m": (96,)}
    assert shapes["down_proj"] == {"A": (4, 48), "B": (32, 4), "m": (32,)}
    adapter.remove()
    model = tiny_llama4().train()
    lk.adapt(model, lk.LoRA(rank=4, dropout=0.5), targets=["experts.down_proj"])
    model(ids)
    odd = torch.nn.Module()
    odd.gate_up_proj, odd.down_proj = (
        torch.nn.Parameter(torch.ones(2, *shape)) for shape in ((8, 8), (4, 8))
    )
    assert experts.is_transposed(odd), "square, but down_proj tells"
    odd.down_proj = torch.nn.Parameter(torch.ones(2, 8, 4))
    assert not experts.is_transposed(odd)


def test_dropout_where_the_inputs_are_not_seen() -> None:
    x, change = (
        torch.ones(2, 5),
        factored_weight.WeightChange(torch.ones(3, 5, 2), torch.ones(3, 2, 4), None, None, 0.5),
    )
    stack = factored_weight.ChangedWeight(torch.ones(3, 5, 4), (change,))
    with pytest.raises(lk.StateError, match="dropout=0"):
        x @ stack[0]


def test_what_torch_does_with_names(ids: Tensor) -> None:
    model = tiny_mixtral()
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = near(lk.adapt(model, lk.LoRA(rank=4), targets=BOTH))
    want = model(ids).logits.detach()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(torch.func.functional_call(model, trained, (ids,)).logits, want)
    with pytest.warns(lk.LorakinWarning):
        model.load_state_dict(own, assign=True, strict=False)
    assert torch.equal(model(ids).logits, want)
    model.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(model(ids).logits, want)
    experts_of(model).down_proj = torch.nn.Parameter(own[f"{LAYER}.down_proj"])
    assert torch.equal(model(ids).logits, want)
    adapter.merge()
    adapter.unmerge()
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("used", ["vector", "sum", "slice", "mask", "out", "iterated"])
def test_whatever_is_done_with_a_stack(used: str) -> None:
    """Uses that are no product with matrices form the weight, and are right."""
    torch.manual_seed(0)
    weight, left, right = torch.randn(3, 5, 4), torch.randn(3, 5, 2), torch.randn(3, 2, 4)
    stack = factored_weight.ChangedWeight(
        weight, (factored_weight.WeightChange(left, right, None, None),)
    )
    whole, x = weight + left @ right, torch.randn(4)
    uses: dict[str, Callable[[Any], Tensor]] = {
        "vector": lambda w: w[1] @ x,
        "sum": lambda w: w.sum(0),
        "slice": lambda w: w[1:, 2],
        "mask": lambda w: w[torch.tensor([True, False, True])],
        "out": lambda w: torch.bmm(w, torch.ones(3, 4, 2), out=torch.empty(3, 5, 2)),
        "iterated": lambda w: sum(w),  # type: ignore[return-value]
    }
    torch.testing.assert_close(uses[used](stack), uses[used](whole))
    assert stack.shape == whole.shape and stack.dtype == whole.dtype and len(stack) == 3


@pytest.mark.parametrize("order", [("whole", "inner"), ("inner", "whole")])
@pytest.mark.parametrize("first", [0, 1])
def test_trained_whole_and_adapted_go_in_any_order(
    order: tuple[str, str], first: int, ids: Tensor
) -> None:
    model = tiny_mixtral()
    own = type(experts_of(model))
    adapters = {}
    for name in order:
        targets, whole = (["q_proj"], ["mlp.experts"]) if name == "whole" else (["down_proj"], [])
        adapters[name] = lk.adapt(model, lk.LoRA(rank=2), targets, modules_to_save=whole, name=name)
    adapters[order[first]].remove()
    model(ids)
    adapters[order[1 - first]].remove()
    assert type(experts_of(model)) is own
    assert torch.equal(model(ids).logits, tiny_mixtral()(ids).logits)
