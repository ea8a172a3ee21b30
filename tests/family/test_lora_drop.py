"""LoRA-drop against NumPy: importance, choice, groups, shared gradients, both stages at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_llama
from family.problem import BOTH_PRECISIONS, array, close, data, fit, linear
from lorakin.inject.activation_norms import importance_shares
from references import lora_drop as reference

IMPORTANCE = {"0": 0.1, "1": 0.5, "2": 0.15, "3": 0.25}


def batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids}] * 2


def test_the_importance_is_the_papers(ids: Tensor) -> None:
    """Σ ‖s·B·A·x‖² over unmasked tokens, from the inputs that the modules get in eval mode."""
    model = tiny_bert().double()
    adapter = randomise(
        lk.adapt(model, lk.LoRA(rank=2, alpha=5), targets=["query", "value", "dense"]), 0.3
    )
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    model.train()
    shares = importance_shares(adapter, [{"input_ids": ids, "attention_mask": mask}])
    assert model.training, "the mode is put back"
    seen: dict[str, list[Tensor]] = {path: [] for path in adapter.placement.methods}
    for path in seen:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0])
        )
    model.eval()(ids, attention_mask=mask)
    expected = []
    for path, (x,) in seen.items():
        site = adapter.tensors.branch(path)
        keep = mask.bool().numpy() if x.dim() == 3 else None
        expected.append(reference.energy(array(x), array(site.A), array(site.B), 2.5, keep))
    close(list(shares.values()), reference.importance(expected), 1e-9)
    with adapter.disabled():
        assert sum(shares.values()) == pytest.approx(1)


def test_normalised_importance_is_relative_to_the_modules_own_output() -> None:
    model = linear(torch.float64, 6, 6, 6)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2)), 0.3)
    x = data(inputs=6)[0]
    with torch.no_grad():
        inputs = [x, model[0](x)]
        ratios = []
        for path, given in zip(adapter.placement.methods, inputs, strict=True):
            pair = adapter.tensors.pair_now(path)
            base_energy = (given @ model.get_submodule(path).weight.T).square().sum()
            ratios.append(float((given @ pair.down.T @ pair.up.T).square().sum() / base_energy))

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return model(x)

    called = Called()
    adapter.remove()
    adapter = randomise(lk.adapt(called, lk.LoRA(rank=2)), 0.3)
    shares = importance_shares(adapter, [{"x": x}], normalised=True)
    close(list(shares.values()), np.array(ratios) / sum(ratios), 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.5},
        {"threshold": 0.51},
        {"threshold": 1.0},
        {"keep": 1},
        {"keep": 3},
        {"keep": 9},
    ],
)
def test_the_choice(settings: dict[str, float]) -> None:
    paths, values = list(IMPORTANCE), np.array(list(IMPORTANCE.values()))
    chosen = lk.LoRADrop(**settings, importance=IMPORTANCE).most_important()  # type: ignore[arg-type]
    assert chosen == [paths[n] for n in reference.choose(values, **settings)]  # type: ignore[arg-type]


def test_ties_fall_to_the_first() -> None:
    assert lk.LoRADrop(keep=2, importance=dict.fromkeys("abc", 1 / 3)).most_important() == [
        "a",
        "b",
    ]
    assert lk.LoRADrop(
        threshold=0.9, importance={"a": 0.6, "b": 0.3, "c": 0.1}
    ).most_important() == [
        "a",
        "b",
    ], "0.6 + 0.3 is 0.9"


def test_importance_becomes_shares_of_the_modules_that_are_adapted() -> None:
    """So that a threshold means the same whatever the numbers' sum, or the modules beside."""
    model = linear(torch.float64, 6, 6, 6, 6, 6)
    raw = {"3": 100.0, "0": 10.0, "1": 50.0, "2": 15.0}
    adapter = lk.adapt(model, lk.LoRADrop(threshold=0.6, importance=raw, rank=2))
    shares = np.array([raw[path] for path in adapter.placement.methods]) / sum(raw.values())
    importance = adapter.method.setting("importance")
    assert list(importance) == list(adapter.placement.methods), (
        "in the model's order, by which ties are settled"
    )
    close(list(importance.values()), shares, 1e-15)
    assert adapter.method.with_own_pair(list("0123")) == [
        str(n) for n in sorted(reference.choose(shares, 0.6))
    ]
    adapter.remove()
    with pytest.warns(lk.LorakinWarning, match=r"2 modules .*\(3, …\)"):
        adapter = lk.adapt(
            model,
            lk.LoRADrop(threshold=0.6, importance=raw | {"nowhere": 7.0}, rank=2),
            ["0", "1", "2"],
            seed=0,
        )
    close(list(adapter.method.setting("importance").values()), np.array([10, 50, 15]) / 75, 1e-15)
    assert adapter.method.with_own_pair(list("012")) == ["1"], "50/75 alone is above 0.6"


def test_a_probes_shares_keep_their_bits() -> None:
    importance = {"0": 0.7 + 1e-12, "1": 0.3}
    adapter = lk.adapt(
        linear(torch.float64, 6, 6, 6), lk.LoRADrop(keep=1, importance=importance, rank=2)
    )
    assert adapter.method.setting("importance") == importance


def test_the_others_share_by_name_and_shape() -> None:
    model = tiny_llama()
    paths = list(lk.adapt(model, lk.LoRA(rank=2)).placement.methods)
    kept = [path for path in paths if path.endswith(("0.self_attn.q_proj", "1.mlp.up_proj"))]
    share = {path: (10.0 if path in kept else 1.0) for path in paths}
    adapter = lk.adapt(tiny_llama(), lk.LoRADrop(keep=2, importance=share, rank=2))
    paths_of_tensor: dict[int, list[str]] = {}
    for path in paths:
        paths_of_tensor.setdefault(id(adapter.tensors.branch(path).B), []).append(path)
    keys = [(path.rpartition(".")[2],) for path in paths]
    groups = reference.groups(keys, [paths.index(path) for path in kept])
    expected = sorted(
        [[paths[n] for n in members] for members in groups.values()] + [[path] for path in kept]
    )
    assert sorted(paths_of_tensor.values()) == expected


def test_the_papers_count() -> None:
    """RoBERTa-base, q and v at rank 8: 10 of 24 kept and two shared pairs are one half."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(768, 768), nn.Linear(768, 768)

    with torch.device("meta"):
        model = nn.Sequential(*(Layer() for _ in range(12)))
    paths = list(lk.adapt(model, lk.LoRA(rank=8), name="all").placement.methods)
    share = {path: 1.0 / (n + 1) for n, path in enumerate(paths)}
    adapter = lk.adapt(model, lk.LoRADrop(keep=10, importance=share, rank=8))
    assert adapter.trainable_parameters == 147_456


@pytest.mark.filterwarnings("ignore:the first step of adapter:lorakin.errors.LorakinWarning")
@pytest.mark.parametrize(("dtype", "tolerance"), BOTH_PRECISIONS)
def test_training_a_shared_pair(dtype: torch.dtype, tolerance: float) -> None:
    """Its gradient is the sum over the modules that share it."""
    model, (x, target) = linear(dtype, 8, 8, 8), data(dtype, 8, 8)
    share = {"0": 0.5, "1": 0.5}
    unused = nn.Linear(8, 8, dtype=dtype)
    holder = nn.ModuleDict(
        {"0": nn.ModuleDict({"fc": model[0]}), "1": nn.ModuleDict({"fc": model[1]}), "z": unused}
    )
    member = lk.LoRADrop(
        threshold=1e-9,
        importance={"0.fc": share["0"], "1.fc": share["1"], "z": 9.0},
        rank=3,
        alpha=6,
    )
    adapter = lk.adapt(holder, member)
    one, two = (adapter.tensors.branch(path) for path in ("0.fc", "1.fc"))
    assert one.A is two.A
    layers = [{"W0": array(module.weight), "bias": array(module.bias)} for module in model]
    A, B, losses = reference.train_shared(
        array(x), array(target), layers, array(one.A), array(one.B), 2, 25, 0.01
    )
    seen = fit(model, adapter.optimizer(lr=0.01), x, target, 25)
    assert losses[-1] < 0.9 * losses[0], "it learns"
    close(seen, losses, tolerance)
    close(one.A, A, 10 * tolerance)
    close(two.B, B, 10 * tolerance)


@pytest.mark.parametrize("rest", ["shared", "frozen", "none"])
def test_both_stages_in_one_call(rest: str, ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama().double()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    logits = model(ids).logits
    adapter = lk.adapt(model, lk.LoRADrop(keep=5, rest=rest, rank=2), probe=batches(ids), seed=0)  # type: ignore[arg-type]
    assert all(
        torch.equal(t, before[key]) for key, t in model.state_dict().items() if key in before
    ), "the base is untouched"
    assert torch.equal(model(ids).logits, logits), "everything starts again"
    assert len(adapter.placement.methods) == (5 if rest == "none" else 14)
    groups = {id(t) for t in adapter.parameters() if t.requires_grad}
    unshared = set(adapter.method.with_own_pair(list(adapter.placement.methods)))
    assert len(unshared) == 5
    kinds = {path.rpartition(".")[2] for path in adapter.placement.methods if path not in unshared}
    assert len(groups) == 2 * (5 + (len(kinds) if rest == "shared" else 0))
    optimizer = adapter.optimizer(lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapter.save(tmp_path)
    other = tiny_llama().double()
    loaded = lk.load(other, tmp_path, trainable=True)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert loaded.trainable_parameters == adapter.trainable_parameters, (
        "what was shared is shared again"
    )
    assert loaded.method.setting("importance") == adapter.method.setting("importance")


def test_the_probe_leaves_no_trace(ids: Tensor) -> None:
    model = tiny_llama()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    keys = set(model.state_dict())
    importance = lk.importance(model, lk.LoRADrop(), batches(ids), seed=0, lr=1e-2)
    assert list(importance) == [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    assert sum(importance.values()) == pytest.approx(1)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(model.state_dict()) == keys
    assert not lk.adapters(model)
    again = lk.importance(model, lk.LoRADrop(), batches(ids), seed=0, lr=1e-2)
    assert again == importance


def test_a_shared_pair_that_was_changed_in_one_place_is_shared_no_more(
    ids: Tensor, tmp_path: Path
) -> None:
    import safetensors.torch

    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRADrop(keep=2, rank=2), probe=batches(ids), seed=0)
    randomise(adapter).save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    unshared = adapter.method.with_own_pair(list(adapter.placement.methods))
    path = next(
        p
        for p in adapter.placement.methods
        if "layers.1" in p and not {p, p.replace("layers.1", "layers.0")} & set(unshared)
    )
    tensors[f"base_model.model.{path}.lora_B.weight"] += 1
    safetensors.torch.save_file(
        tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    with pytest.warns(lk.LorakinWarning):
        loaded = lk.load(tiny_llama(), tmp_path)
    assert loaded.method.words == "lora"
    assert torch.equal(loaded.tensors.branch(path).B, adapter.tensors.branch(path).B + 1)
    lorakin_json = json.loads((tmp_path / "lorakin.json").read_text())
    lorakin_json["beside"] = {}
    (tmp_path / "lorakin.json").write_text(json.dumps(lorakin_json))
    with pytest.raises(lk.AdapterError, match="B"):
        lk.load(tiny_llama(), tmp_path)


def test_guards(ids: Tensor) -> None:
    with pytest.raises(lk.SettingError, match="probe=batches"):
        lk.adapt(tiny_llama(), lk.LoRADrop())
    with pytest.raises(lk.SettingError, match="lora"):
        lk.adapt(tiny_llama(), lk.LoRA(), probe=batches(ids))
    with pytest.raises(lk.SettingError):
        lk.adapt(tiny_llama(), lk.LoRADrop(), probe=[])
    with pytest.raises(lk.SettingError, match="model.layers.0.self_attn.q_proj"):
        lk.adapt(tiny_llama(), lk.LoRADrop(importance=IMPORTANCE))
    model = tiny_llama()
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    with pytest.warns(lk.LorakinWarning, match="equally important"):
        lk.adapt(model, lk.LoRADrop(keep=3, importance=dict.fromkeys(paths, 0.1)))
    rising = {path: float(n) for n, path in enumerate(paths)}
    with pytest.warns(lk.LorakinWarning, match="14 modules"):
        lk.adapt(tiny_llama(), lk.LoRADrop(keep=14, importance=rising))
    with pytest.raises(lk.SettingError, match="importance.* 2 "):
        lk.adapt(
            tiny_llama(),
            lk.LoRADrop(importance=dict.fromkeys(paths, 0.0) | {paths[1]: 1.0}),
            "q_proj",
        )
    lk.adapt(model, lk.LoRA(), name="other")
    with pytest.raises(lk.StateError):
        lk.adapt(model, lk.LoRADrop(), probe=batches(ids))


def test_settings_outside_their_range() -> None:
    assert lk.LoRADrop().threshold == 0.9
    for settings, message in (
        ({"threshold": 0.5, "keep": 3}, "keep"),
        ({"threshold": 0}, "threshold"),
        ({"keep": 0}, "keep"),
        ({"rest": "gone"}, "rest.*'gone'"),
        ({"sample": 2}, "sample"),
        ({"probe_epochs": 0}, "probe_epochs"),
        ({"importance": {}}, "importance"),
        ({"importance": {3: 0.5}}, "importance"),
        ({"importance": {"0": float("nan")}}, "importance"),
        ({"importance": {"0": -0.1, "1": 1.0}}, "importance"),
        ({"importance": {"0": 0.0, "1": 0}}, "importance"),
    ):
        with pytest.raises(lk.SettingError, match=message):
            lk.LoRADrop(**settings)  # type: ignore[arg-type]


def test_the_probe_of_an_encoder_decoder(ids: Tensor) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    found = lk.importance(
        transformers.T5ForConditionalGeneration(config),
        lk.LoRADrop(rank=2),
        batches(ids),
        seed=0,
        lr=1e-2,
    )
    assert sum(found.values()) == pytest.approx(1)
