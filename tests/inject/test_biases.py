"""Biases that an adapter trains: its own, and the base's as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import lorakin as lk
from conftest import ConvNet, randomise, tiny_bert, tiny_gpt2, tiny_gpt_oss, tiny_llama
from lorakin.inject.biases import base_bias
from lorakin.storage import directory


def moved(adapter: lk.Adapter, seed: int = 3) -> lk.Adapter:
    """Every tensor away from where it starts, biases too."""
    return randomise(adapter, 0.2, seed)


def reference(make: Any, adapter: lk.Adapter) -> nn.Module:
    """A plain model with the adapter's biases and merged weights written into it."""
    plain = make()
    with torch.no_grad():
        for path in adapter.placement.methods:
            module, pair = plain.get_submodule(path), adapter.tensors.pair_now(path)
            weight = adapter.tensors.base_weight(path)
            change = pair.applied_to(weight) - weight
            kind = adapter.tensors.branch(path).kind
            module.weight += kind.layout(change, module)
        for path, bias in adapter.tensors.biases().items():
            plain.get_submodule(path).bias.copy_(bias)
    return plain


MODELS: dict[str, tuple[Any, Any, Tensor]] = {
    "bert": (lambda: tiny_bert().double(), ["query", "dense"], torch.arange(18).view(2, 9)),
    "gpt2": (lambda: tiny_gpt2().double(), "c_attn", torch.arange(18).view(2, 9)),
    "convolutions": (
        lambda: ConvNet("zeros").double(),
        ["one", "head"],
        torch.randn(2, 3, 7, dtype=torch.float64),
    ),
}


def out(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "member", [lk.LoRA(rank=2), lk.DoRA(rank=2), lk.VeRA(rank=2), lk.LoRAFA(rank=2)], ids=str
)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_with_its_own_and_leaves_the_bases(kind: str, bias: str, member: Any) -> None:
    make, targets, x = MODELS[kind]
    model = make()
    before, names = (
        {key: t.clone() for key, t in model.state_dict().items()},
        dict(model.named_parameters()),
    )
    base = out(model, x)
    adapter = lk.adapt(model, member, targets, bias=bias, seed=0)
    close(out(model, x), base)
    wanted = {
        path
        for path, m in model.named_modules()
        if "lorakin" not in path and m._parameters.get("bias") is not None
    }
    wanted = wanted & set(adapter.placement.methods) if bias == "lora_only" else wanted
    assert set(adapter.tensors.biases()) == wanted
    moved(adapter)
    close(out(model, x), out(reference(make, adapter), x))
    with adapter.disabled():
        assert torch.equal(out(model, x), base)
    y = out(model, x).detach()
    adapter.merge()
    close(out(model, x), y)
    with adapter.disabled():
        assert torch.equal(out(model, x), base)
    adapter.unmerge()
    assert torch.equal(out(model, x), y)
    now = model.state_dict()
    assert all(torch.equal(now[key], t) for key, t in before.items())
    assert all(
        parameter is dict(model.named_parameters())[name] for name, parameter in names.items()
    )
    adapter.remove()
    assert torch.equal(out(model, x), base)
    assert {type(m) for m in model.modules()} == {type(m) for m in make().modules()}
    assert [*model.state_dict()] == [*before]


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_plain_model(kind: str) -> None:
    make, targets, x = MODELS[kind]
    model = make()
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), targets, bias="all"))
    plain = reference(make, adapter)
    out(model, x).square().sum().backward()
    out(plain, x).square().sum().backward()
    assert len(adapter.tensors.biases()) > 2
    for path, bias in adapter.tensors.biases().items():
        close(bias.grad, plain.get_submodule(path).bias.grad, 1e-8)
        assert base_bias(model.get_submodule(path)).grad is None


def test_training_moves_them_and_no_decay_acts_on_them(ids: Tensor) -> None:
    model = tiny_bert()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    adapter = lk.adapt(model, lk.LoRAPlus(rank=2, ratio=4), "query", bias="all")
    groups = adapter.parameter_groups(0.1, weight_decay=0.5)
    held = {id(p): group for group in groups for p in group["params"]}
    assert {held[id(bias)]["weight_decay"] for bias in adapter.tensors.biases().values()} == {0.0}
    assert {held[id(bias)]["lr"] for bias in adapter.tensors.biases().values()} == {0.1}
    numbers = sum(
        m.bias.numel() for m in tiny_bert().modules() if getattr(m, "bias", None) is not None
    )
    assert adapter.trainable_parameters == 2 * 2 * (32 + 32) + numbers
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.01)
    starts = {path: bias.clone() for path, bias in adapter.tensors.biases().items()}
    for _ in range(2):
        model(ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [
        path for path, bias in adapter.tensors.biases().items() if torch.equal(bias, starts[path])
    ]
    assert still == [] or all(path.endswith("key") for path in still), (
        "softmax does not see the keys' biases"
    )
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())
    assert all(
        not p.requires_grad for name, p in model.named_parameters() if ".lorakin." not in name
    )


def test_several_adapters_have_each_their_own(ids: Tensor) -> None:
    model = tiny_bert().double()
    base = out(model, ids)
    adapters, outs = {}, {}
    for n, (name, bias) in enumerate([("a", "lora_only"), ("b", "all"), ("c", "none")]):
        adapters[name] = moved(
            lk.adapt(
                model, lk.LoRA(rank=2), "query" if name != "c" else "value", name=name, bias=bias
            ),
            n,
        )
        outs[name] = out(model, ids).detach()
    assert len({float(y.sum()) for y in outs.values()}) == 3
    for name, y in outs.items():
        lk.activate(model, name)
        assert torch.equal(out(model, ids), y)
    with pytest.raises(lk.SettingError):
        lk.activate(model, ["a", "b"])
    assert torch.equal(out(model, ids), outs["c"]), "nothing was switched"
    lk.activate(model, ["a", "c"])
    both = out(model, ids).detach()
    adapters["a"].merge()
    close(out(model, ids), both)
    with pytest.raises(lk.StateError):
        adapters["b"].merge()
    close(out(model, ids), both)
    adapters["c"].merge()
    close(out(model, ids), both)
    for name in "ac":
        adapters[name].unmerge()
    with pytest.raises(lk.SettingError, match="biases"):
        lk.mixed_batch(model, ["a", "c"])
    with torch.no_grad(), lk.mixed_batch(model, ["c", None]):
        rows = out(model, ids)
    close(rows[0], outs["c"][0])
    close(rows[1], base[1])
    adapters["b"].remove()
    lk.activate(model, [])
    assert torch.equal(out(model, ids), base)
    lk.activate(model, "a")
    adapters["c"].remove()
    assert torch.equal(out(model, ids), outs["a"])


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_saving_restoring_and_converting(bias: str, tmp_path: Path, ids: Tensor) -> None:
    model = tiny_bert()
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), ["query", "dense"], bias=bias))
    y = out(model, ids).detach()
    adapter.save(tmp_path / "a")
    model.save_pretrained(tmp_path / "base")
    fresh = tiny_bert()
    loaded = lk.load(fresh, tmp_path / "a")
    assert torch.equal(out(fresh, ids), y)
    assert not any(p.requires_grad for p in loaded.parameters())
    base = type(fresh).from_pretrained(tmp_path / "base")
    assert torch.equal(out(base, ids), out(tiny_bert(), ids)), "save_pretrained writes the base's"
    trained = lk.load(base, tmp_path / "a", trainable=True)
    assert torch.equal(out(base, ids), y) and all(
        p.requires_grad for p in trained.tensors.biases().values()
    )
    moved(trained, 8)
    held = trained.tensors.biases()
    trained.restore(tmp_path / "a")
    assert torch.equal(out(base, ids), y) and all(
        held[path] is p for path, p in trained.tensors.biases().items()
    )
    other = lk.adapt(tiny_bert(), lk.LoRA(rank=2), ["query", "dense"])
    with pytest.raises(lk.AdapterError):
        other.restore(tmp_path / "a")
    lk.as_lora(loaded)
    close(out(fresh, ids), y, 1e-5)
    with pytest.raises(lk.SettingError, match="biases"):
        lk.as_lora(loaded, "portable", portable=True)
    lk.activate(fresh, "default")
    loaded.merge(permanent=True)
    lk.adapters(fresh)["plain"].remove()
    fresh.save_pretrained(tmp_path / "merged")
    merged = type(fresh).from_pretrained(tmp_path / "merged")
    close(out(merged, ids), y, 1e-5)


def test_sums_of_adapters_have_the_sum_of_changes(ids: Tensor) -> None:
    model = tiny_bert()
    starts = {
        path: base_bias(m).clone() for path, m in model.named_modules() if base_bias(m) is not None
    }
    a = moved(lk.adapt(model, lk.LoRA(rank=2), "query", name="a", bias="lora_only"))
    b = moved(lk.adapt(model, lk.LoRA(rank=2), "key", name="b", bias="all"), 4)
    c = lk.combine(model, {"a": 2.0, "b": -0.5}).adapter
    for path, bias in c.tensors.biases().items():
        wanted = starts[path] - 0.5 * (b.tensors.biases()[path] - starts[path])
        if path in a.tensors.biases():
            wanted = wanted + 2 * (a.tensors.biases()[path] - starts[path])
        close(bias, wanted, 1e-6)
    assert set(c.tensors.biases()) == set(starts)
    lk.activate(model, "a")
    d = lk.adapt(model, lk.LoRA(rank=2), "key", name="d")
    e = lk.combine(model, {"a": 1.0, "d": 1.0}, "e").adapter
    assert set(e.tensors.biases()) == {*a.placement.methods, *d.placement.methods}, (
        "lora_only, the others are the base's"
    )


def test_the_base_in_a_narrow_dtype_keeps_masters_wide(ids: Tensor) -> None:
    model = tiny_bert().bfloat16()
    adapter = lk.adapt(model, lk.LoRA(rank=2), "query", bias="all")
    assert {bias.dtype for bias in adapter.tensors.biases().values()} == {torch.float32}
    moved(adapter)
    y = out(model, ids)
    assert y.dtype == torch.bfloat16
    plain = reference(lambda: tiny_bert().bfloat16().float(), adapter)
    assert (y.float() - out(plain, ids)).abs().max() < 0.05
    y.float().sum().backward()
    assert all(bias.grad.dtype == torch.float32 for bias in adapter.tensors.biases().values())
    narrow = lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="all", dtype=torch.bfloat16)
    assert {bias.dtype for bias in narrow.tensors.biases().values()} == {torch.bfloat16}


def test_what_shares_a_bias_in_the_base_shares_it_here(tmp_path: Path, ids: Tensor) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        model[2].bias = model[0].bias
        return model.double()

    model, x = make(), torch.randn(3, 4, dtype=torch.float64)
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), "0", bias="all"))
    assert adapter.tensors.biases()["0"] is adapter.tensors.biases()["2"]
    close(model(x), reference(make, adapter)(x))
    adapter.save(tmp_path / "a")
    again = make()
    loaded = lk.load(again, tmp_path / "a", trainable=True)
    assert loaded.tensors.biases()["0"] is loaded.tensors.biases()["2"]
    close(again(x), model(x), 1e-6)


class Reader(nn.Module):
    """Reads the bias of its parts without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias) + self.norm.bias


READERS = {
    "reader": Reader,
    "attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
@pytest.mark.parametrize("training", [False, True])
def test_who_reads_a_bias_in_a_forward_gets_the_adapters(make: Any, training: bool) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make()).double().train(training)

    def call(module: nn.Module) -> Tensor:
        return module[0](x, x, x)[0] if isinstance(module[0], nn.MultiheadAttention) else module(x)

    x, adapted = torch.randn(2, 3, 4, dtype=torch.float64), model()
    target = next(path for path, m in adapted.named_modules() if isinstance(m, nn.Linear))
    adapter = moved(lk.adapt(adapted, lk.LoRA(rank=2), target, bias="all"))
    plain = reference(model, adapter)
    close(call(adapted), call(plain))
    with torch.no_grad():
        close(call(adapted), call(plain))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_compiled_checkpointed_and_copied(bias: str, ids: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    base = model(x)
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), "0", bias=bias))
    y = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), y)
    with adapter.disabled():
        close(compiled(x), base)
    close(compiled(x), y)
    moved(adapter, 5)
    close(compiled(x), model(x))
    assert not torch.equal(model(x), y)
    close(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), model(x))
    twin = copy.deepcopy(model)
    close(twin(x), model(x))
    moved(lk.adapters(twin)["default"], 6)
    close(compiled(x), model(x))
    assert not torch.equal(twin(x), model(x))


def test_experts_and_their_router() -> None:
    model = tiny_gpt_oss().double()
    mlp = model.model.layers[0].mlp
    own, classes = mlp.router.bias.clone(), [type(m) for m in model.modules()]
    ids = torch.arange(3, 12)[None]
    base = model(ids).logits
    targets = ["router.weight", "gate_up_proj"]
    adapter = lk.adapt(model, lk.LoRA(rank=2), targets, bias="all")
    assert "model.layers.0.mlp.router" in adapter.tensors.biases()
    with torch.no_grad():
        adapter.tensors.biases()["model.layers.0.mlp.router"][0] += 5
    y = model(ids).logits
    assert (y - base).abs().max() > 1e-3
    adapter.merge()
    close(model(ids).logits, y)
    adapter.unmerge()
    adapter.remove()
    assert torch.equal(mlp.router.bias, own) and torch.equal(model(ids).logits, base)
    assert [type(m) for m in model.modules()] == classes


def test_modules_trained_whole_keep_theirs_to_themselves(tmp_path: Path, ids: Tensor) -> None:
    model = tiny_bert()
    adapter = moved(
        lk.adapt(
            model, lk.LoRA(rank=2), "query", modules_to_save=["classifier", "pooler"], bias="all"
        )
    )
    assert not {"classifier", "bert.pooler.dense"} & set(adapter.tensors.biases())
    y = out(model, ids)
    adapter.save(tmp_path / "a")
    fresh = tiny_bert()
    lk.load(fresh, tmp_path / "a")
    assert torch.equal(out(fresh, ids), y)
    other = tiny_bert()
    lk.adapt(other, lk.LoRA(rank=2), "query", modules_to_save=["pooler"], name="whole")
    lk.adapt(other, lk.LoRA(rank=2), "query", name="biases", bias="all")
    with pytest.raises(lk.SettingError, match=r"inside bert\.pooler"):
        lk.activate(other, ["whole", "biases"])
    with pytest.raises(lk.StateError):
        lk.adapt(other, lk.LoRA(rank=2), "query", modules_to_save=["classifier"], name="more")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lk.SettingError, match="bias"):
        lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="some")
    with pytest.raises(lk.SettingError):
        lk.adapt(tiny_llama(), lk.LoRA(rank=2), bias="all")
    adapter = lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query", bias="all")
    assert "biases" in str(adapter)
    lk.adapt(tiny_llama(), lk.LoRA(rank=2), bias="none")


def test_a_scale_is_for_the_pairs_and_not_for_biases(ids: Tensor) -> None:
    model = tiny_bert().double()
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), "query", bias="lora_only"))
    adapter.scale = 0
    plain = tiny_bert().double()
    for path, bias in adapter.tensors.biases().items():
        plain.get_submodule(path).bias.data = bias.detach()
    close(out(model, ids), out(plain, ids))


def test_offloaded_since(ids: Tensor) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_bert()
    base = out(model, ids)
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), "query", bias="all"))
    y = out(model, ids)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(out(model, ids), y)
        with adapter.disabled():
            assert torch.equal(out(model, ids), base)


def test_four_bits_leave_the_masters_wide() -> None:
    """bitsandbytes casts the data of a bias that it gets, for good."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64), torch.randn(3, 64).bfloat16()
    packed = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.bfloat16)
    packed.load_state_dict(linear.state_dict())
    packed.bias.data = packed.bias.data.bfloat16()
    model = nn.Sequential(packed.to("cpu"))
    adapter = lk.adapt(model, lk.LoRA(rank=2), "0", bias="all")
    y = model(x).detach()
    bias = adapter.tensors.biases()["0"]
    with torch.no_grad():
        bias += 1
    changed = model(x)
    assert (changed - y - 1).abs().max() < 0.02 and bias.dtype == torch.float32
    changed.float().sum().backward()
    assert torch.equal(bias.grad, torch.full((64,), 3.0))
    with pytest.warns(lk.LorakinWarning, match="quantised"):
        adapter.merge()
    assert (model(x) - changed).abs().max() < 0.03
    adapter.unmerge()
    assert torch.equal(model(x), changed)
    with adapter.disabled():
        assert torch.equal(model(x), y)


def test_a_module_that_lost_its_ranks_keeps_its_bias(tmp_path: Path, ids: Tensor) -> None:
    model = tiny_bert()
    adapter = moved(
        lk.adapt(
            model, lk.AdaLoRA(initial_rank=2, target_rank=1), ["query", "key"], bias="lora_only"
        )
    )
    freed = adapter.tensors.branch(next(iter(adapter.placement.methods)))
    with torch.no_grad():
        freed.overwrite(
            {slot: t[:, :0] if slot == "P" else t[:0] for slot, t in freed.tensors().items()}
        )
    y = out(model, ids).detach()
    plain = lk.as_lora(adapter).adapter
    close(out(model, ids), y, 1e-5)
    plain.save(tmp_path / "plain")
    directory.save(adapter, tmp_path / "adalora")
    for name in ("plain", "adalora"):
        fresh = tiny_bert()
        loaded = lk.load(fresh, tmp_path / name)
        close(out(fresh, ids), y, 1e-5)
        assert set(loaded.tensors.biases()) == set(adapter.placement.methods)


def test_biases_that_training_never_reached_are_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    adapter = lk.adapt(model, lk.LoRA(rank=2), "0", bias="all")
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.1)
    for bias in adapter.tensors.biases().values():
        bias.register_hook(torch.zeros_like)
    for _ in range(2):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    with pytest.warns(lk.LorakinWarning, match="the bias of 0"):
        adapter.save(tmp_path)


def test_what_shares_a_bias_still_does_when_merged(tmp_path: Path, ids: Tensor) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = transformers.BertForMaskedLM(config).eval()
    adapter = moved(lk.adapt(model, lk.LoRA(rank=2), "query", bias="all"))
    y, heads = out(model, ids).detach(), model.cls.predictions
    base = heads.bias
    adapter.merge()
    assert heads.decoder.bias is heads.bias is not base
    adapter.unmerge()
    assert heads.decoder.bias is heads.bias is base
    adapter.merge(permanent=True)
    model.save_pretrained(tmp_path)
    close(out(type(model).from_pretrained(tmp_path), ids), y, 1e-5)
