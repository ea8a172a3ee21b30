"""Plain LoRA from every member, and several adapters as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import ConvNet, randomise, small, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from lorakin.family.low_rank import nearest
from references import combining as reference

MEMBERS: dict[str, Any] = {
    word: small(word) for word in ("lora+", "lora-fa", "vera", "adalora", "lora-drop", "delta-lora")
} | {"lora": small("lora", rslora=True), "adalora,delta-lora": small("adalora,delta-lora")}
"""Methods without a gain."""


def trained(
    model: Any, member: Any, ids: Tensor, name: str = "default", steps: int = 6, **more: Any
) -> lk.Adapter:
    """A few large steps, so that what acts at steps has acted and the change is large."""
    batch = {"input_ids": ids, "labels": ids}
    if isinstance(member, lk.LoRADrop) and member.importance is None:
        more["probe"] = [batch]
    adapter = lk.adapt(model, member, name=name, seed=3, **more)
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=0.1, total_steps=steps)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.double()


@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_without_a_gain_is_plain_lora_exactly(
    word: str, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama().double()
    base = logits(model, ids)
    adapter = trained(model, MEMBERS[word], ids)
    want = logits(model, ids)
    assert (want - base).abs().max() > 0.05
    plain, fits = lk.as_lora(adapter)
    assert plain.placement.method.words == "lora" and not adapter.is_active and plain.is_active
    torch.testing.assert_close(
        logits(model, ids), want, rtol=0, atol=1e-6
    )  # files hold float32 unless the pair is wider
    assert all(fit.error == 0 and fit.gain is None for fit in fits.values())
    plain.save(tmp_path / "plain")
    fresh = tiny_llama().double()
    lk.load(fresh, tmp_path / "plain")
    torch.testing.assert_close(logits(fresh, ids), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_other_layers(make: Callable[[], Any], ids: Tensor) -> None:
    model = make()
    adapter = randomise(lk.adapt(model, lk.LoRA(4, 8), targets="all-linear"))
    want = logits(model, ids)
    plain, _ = lk.as_lora(adapter)
    torch.testing.assert_close(logits(model, ids), want, rtol=0, atol=1e-5)
    assert plain.placement.methods.keys() == adapter.placement.methods.keys()


def test_convolutions_and_embeddings() -> None:
    x = torch.linspace(-1, 1, 48).view(2, 3, 8)
    model = ConvNet()
    randomise(lk.adapt(model, lk.LoRA(2, 4), targets=["one", "two", "head"]))
    want = model(x)
    lk.as_lora(lk.adapters(model)["default"], "copy")
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_the_portable_form(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = randomise(
        lk.adapt(model, lk.LoRA(4, 8), rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3})
    )
    want = logits(model, ids)
    plain, _ = lk.as_lora(adapter, portable=True)
    plain.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora"} & config.keys()
    assert config["modules_to_save"] is None and config["bias"] == "none"
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert {t.shape[0] if "lora_A" in key else t.shape[1] for key, t in tensors.items()} == {8}
    torch.testing.assert_close(
        logits(reader_of_one_factor(tiny_llama(), config, tensors), ids), want, rtol=0, atol=1e-5
    )


def reader_of_one_factor(model: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """What vLLM reads: r, lora_alpha, target_modules and pairs of tensors; one scale for all."""
    factor = config["lora_alpha"] / config["r"]
    with torch.no_grad():
        for path in config["target_modules"]:
            key = f"base_model.model.{path}.lora_"
            change = factor * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            model.get_submodule(path).weight += change
    return model


def test_what_the_portable_form_cannot_hold() -> None:
    model = tiny_bert()
    adapter = lk.adapt(model, lk.LoRA(2), targets="query", modules_to_save=["classifier"])
    with pytest.raises(lk.SettingError, match="classifier"):
        lk.as_lora(adapter, portable=True)
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(2), targets="embed_tokens")
    with pytest.raises(lk.SettingError, match="embed_tokens"):
        lk.as_lora(adapter, portable=True)


def test_a_rank_beyond_what_vllm_serves() -> None:
    adapter = lk.adapt(tiny_llama(), lk.VeRA(rank=600), targets="q_proj")
    with pytest.warns(lk.LorakinWarning, match="600.*512"):
        lk.as_lora(adapter, portable=True)


DORAS: dict[str, Any] = {
    "dora": lk.DoRA(rank=4),
    "dora,lora+": [lk.DoRA(rank=4), lk.LoRAPlus()],
    "dora,vera": [lk.DoRA(), lk.VeRA(rank=8)],
    "dora,adalora": [lk.DoRA(), lk.AdaLoRA(initial_rank=4, target_rank=2)],
    "dora,delta-lora": [lk.DoRA(rank=4), lk.DeltaLoRA(start_step=1)],
}


@pytest.mark.parametrize("word", DORAS)
def test_a_gain_has_a_nearest_plain_lora(word: str, ids: Tensor) -> None:
    model = tiny_llama()
    base = logits(model, ids)
    adapter = trained(model, DORAS[word], ids)
    want = logits(model, ids)
    with pytest.raises(lk.SettingError, match=r"gain.*--rank"):
        lk.as_lora(adapter)
    errors = []
    for rank in (2, 8, 32):
        plain, fits = lk.as_lora(adapter, rank=rank)
        errors.append(float((logits(model, ids) - want).abs().max()))
        assert all(
            fit.rank <= rank and fit.gain is not None and fit.gain > 0 for fit in fits.values()
        )
        path = next(iter(fits))
        with torch.no_grad():
            change = adapter.tensors.saved_change(path).applied_to(
                adapter.tensors.base_weight(path)
            ) - adapter.tensors.base_weight(path)
            pair = plain.tensors.pair_now(path)
        assert fits[path].error == pytest.approx(
            float((change - pair.up @ pair.down).norm() / change.norm()), abs=1e-5
        )
        plain.remove()
    assert errors[0] > errors[2] and errors[2] < 1e-4, "at full rank it is exact"
    assert errors[0] < float((want - base).abs().max())


def test_by_error_each_module_gets_the_rank_it_needs(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = trained(model, lk.DoRA(rank=4), ids)
    plain, fits = lk.as_lora(adapter, error=0.2)
    assert all(fit.error <= 0.2 for fit in fits.values())
    assert len({fit.rank for fit in fits.values()}) > 1
    smaller = {
        path: nearest(
            adapter.tensors.saved_change(path), adapter.tensors.base_weight(path), rank=f.rank - 1
        )[1]
        for path, f in fits.items()
    }
    assert all(fit.error > 0.2 for fit in smaller.values()), "no rank is spent for nothing"
    assert {path: plain.tensors.pair_now(path).down.shape[0] for path in fits} == {
        path: fit.rank for path, fit in fits.items()
    }


def test_data_makes_the_outputs_better(ids: Tensor) -> None:
    model = tiny_llama(initializer_range=0.3)
    adapter = trained(model, lk.DoRA(rank=4), ids)
    more = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(more)
    mask[0, 12:] = 0
    batches = [{"input_ids": more, "attention_mask": mask}]
    want = logits(model, ids)
    wrong = []
    for given in ([], batches):
        plain, fits = lk.as_lora(adapter, rank=8, batches=given)
        wrong.append(float((logits(model, ids) - want).square().mean()))
        assert all((fit.output_error is None) is not bool(given) for fit in fits.values())
        plain.remove()
        lk.activate(model, "default")
    assert wrong[1] < wrong[0]


def test_truncation_of_a_pair(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.LoRA(8, 16)), 0.3)
    plain, fits = lk.as_lora(adapter, rank=3)
    for path, fit in fits.items():
        pair = adapter.tensors.pair_now(path)
        values = torch.linalg.svdvals((pair.up @ pair.down).double())
        assert fit.rank == 3 and fit.error == pytest.approx(
            float(values[3:].norm() / values.norm()), rel=1e-5
        )
    assert plain.placement.method.setting("rank") == 3


@pytest.mark.parametrize("settings", [{"rank": 0}, {"error": 0.0}, {"error": 1.5}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(4))
    with pytest.raises(lk.SettingError):
        lk.as_lora(adapter, **settings)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in model.state_dict().items() if "lorakin" not in key}


def test_combining_is_the_sum_of_the_changes(ids: Tensor) -> None:
    model = tiny_llama()
    first = trained(model, lk.LoRA(4, 8), ids, "first", targets=["q_proj", "up_proj"])
    second = trained(model, lk.VeRA(rank=8), ids, "second", targets=["q_proj", "v_proj"])
    changes: dict[str, Tensor] = {}
    for adapter, weight in ((first, 0.7), (second, -0.4)):
        for path in adapter.placement.methods:
            pair = adapter.tensors.saved_change(path)
            changes[path] = changes.get(path, 0) + weight * (pair.up @ pair.down)
    twin = tiny_llama()
    with torch.no_grad():
        for path, change in changes.items():
            twin.get_submodule(path).weight += change
    combined, fits = lk.combine(model, {"first": 0.7, "second": -0.4})
    assert combined.is_active and not first.is_active
    torch.testing.assert_close(logits(model, ids), logits(twin, ids), rtol=0, atol=1e-5)
    assert all(fit.error == 0 for fit in fits.values())
    assert combined.tensors.pair_now("model.layers.0.self_attn.q_proj").down.shape[0] == 12
    smaller, fits = lk.combine(model, {"first": 0.7, "second": -0.4}, "smaller", rank=4)
    assert smaller.tensors.pair_now("model.layers.0.self_attn.q_proj").down.shape[0] == 4
    assert fits["model.layers.0.self_attn.q_proj"].error > 0


def test_combining_modules_trained_whole(ids: Tensor) -> None:
    model = tiny_bert()
    base = model.classifier.weight.detach().clone()
    for name, seed in (("a", 1), ("b", 2)):
        randomise(
            lk.adapt(model, lk.LoRA(2), targets="query", modules_to_save=["classifier"], name=name),
            seed=seed,
        )
    own = {
        name: lk.adapters(model)[name].tensors.copy_of("classifier").weight.detach()
        for name in "ab"
    }
    combined, _ = lk.combine(model, {"a": 0.5, "b": 0.25})
    want = base + 0.5 * (own["a"] - base) + 0.25 * (own["b"] - base)
    torch.testing.assert_close(combined.tensors.copy_of("classifier").weight, want)


WAYS: dict[str, dict[str, Any]] = {
    "ties": {"how": "ties", "density": 0.4},
    "ties by frequency": {"how": "ties", "density": 0.4, "elect": "frequency"},
    "magnitude_prune": {"how": "magnitude_prune", "density": 0.4},
    "dare_linear": {"how": "dare_linear", "density": 1.0},
    "dare_ties": {"how": "dare_ties", "density": 1.0},
}


def expected(
    adapters: list[lk.Adapter], weights: list[float], path: str, way: dict[str, Any]
) -> Any:
    there = [(a, w) for a, w in zip(adapters, weights, strict=True) if path in a.placement.methods]
    changes = [
        (a.tensors.saved_change(path).up @ a.tensors.saved_change(path).down).detach().numpy()
        for a, _ in there
    ]
    return reference.combined(changes, [w for _, w in there], **way)


@pytest.mark.parametrize("way", WAYS)
def test_combining_otherwise_is_the_nearest_to_the_papers_formula(way: str, ids: Tensor) -> None:
    """On changes of different members, ranks and targets."""
    model = tiny_llama().double()
    first = trained(model, lk.LoRA(4, 8), ids, "first", targets=["q_proj", "up_proj"])
    second = trained(model, lk.VeRA(rank=8), ids, "second", targets=["q_proj", "v_proj"])
    combined, fits = lk.combine(model, {"first": 0.7, "second": -0.4}, **WAYS[way], rank=6)
    assert (
        combined.is_active
        and combined.placement.methods.keys()
        == first.placement.methods.keys() | second.placement.methods.keys()
    )
    for path in combined.placement.methods:
        want = expected([first, second], [0.7, -0.4], path, WAYS[way])
        near, pair = reference.nearest(want, 6), combined.tensors.saved_change(path)
        np.testing.assert_allclose(
            (pair.up @ pair.down).detach().numpy(), near, rtol=0, atol=1e-5 * abs(want).max()
        )
        assert fits[path].error == pytest.approx(
            np.linalg.norm(want - near) / np.linalg.norm(want), abs=1e-6
        )
    whole, _ = lk.combine(model, {"first": 0.7, "second": -0.4}, "whole", **WAYS[way], error=1e-6)
    pair = whole.tensors.saved_change("model.layers.1.self_attn.q_proj")
    want = expected([first, second], [0.7, -0.4], "model.layers.1.self_attn.q_proj", WAYS[way])
    np.testing.assert_allclose(
        (pair.up @ pair.down).detach().numpy(), want, rtol=0, atol=1e-5 * abs(want).max()
    )


@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_without_a_gain_is_combined(word: str, ids: Tensor) -> None:
    model = tiny_llama().double()
    one = trained(model, MEMBERS[word], ids, "one")
    if isinstance(
        member := MEMBERS[word], lk.LoRADrop
    ):  # a second probe would need the model to itself
        member = dataclasses.replace(member, importance=one.method.setting("importance"))
    two = trained(model, member, ids, "two", steps=5)
    combined, _ = lk.combine(model, {"one": 1, "two": 1}, how="ties", density=0.3, rank=40)
    path = next(iter(combined.placement.methods))
    pair = combined.tensors.saved_change(path)
    want = expected([one, two], [1, 1], path, {"how": "ties", "density": 0.3})
    np.testing.assert_allclose(
        (pair.up @ pair.down).detach().numpy(), want, rtol=0, atol=1e-4 * abs(want).max()
    )
    if any(
        one.tensors.saved_change(p).down.shape != two.tensors.saved_change(p).down.shape
        for p in one.placement.methods
    ):
        assert "adalora" in word, "whose runs keep ranks of their own"
        return
    factors, fits = lk.combine(
        model, {"one": 1, "two": 1}, "factors", how="ties", density=0.3, on="factors"
    )
    assert (
        fits[path].error == 0
        and fits[path].rank == factors.tensors.saved_change(path).down.shape[0]
    )


def test_other_layers_are_combined_otherwise() -> None:
    for make, targets in (
        (ConvNet, ["one", "two", "head"]),
        (tiny_gpt2, ["c_attn", "wte"]),
        (tiny_mixtral, "experts"),
    ):
        model = make()
        paths = [
            p for p in ("model.layers.0.mlp.experts.gate_up_proj",) if targets == "experts"
        ] or targets
        found = [
            randomise(lk.adapt(model, lk.LoRA(2), paths, name=name), seed=n)
            for n, name in enumerate("ab")
        ]
        combined, _ = lk.combine(model, {"a": 1.0, "b": 0.5}, how="ties", density=0.5, rank=64)
        for path in found[0].placement.methods:
            pair = combined.tensors.saved_change(path)
            want = expected(found, [1.0, 0.5], path, {"how": "ties", "density": 0.5})
            np.testing.assert_allclose(
                (pair.up @ pair.down).numpy(), want, rtol=0, atol=1e-5 * abs(want).max()
            )


def test_modules_trained_whole_are_combined_in_the_same_way() -> None:
    model = tiny_bert()
    base = {key: t.detach().clone() for key, t in model.classifier.state_dict().items()}
    for name, seed in (("a", 1), ("b", 2)):
        randomise(
            lk.adapt(model, lk.LoRA(2), targets="query", modules_to_save=["classifier"], name=name),
            seed=seed,
        )
    states = [lk.adapters(model)[name].tensors.copy_of("classifier").state_dict() for name in "ab"]
    combined, _ = lk.combine(model, {"a": 0.5, "b": 0.25}, how="ties", density=0.5, rank=4)
    for key, own in base.items():
        changes = [(state[key] - own).numpy() for state in states]
        want = own.numpy() + reference.combined(changes, [0.5, 0.25], "ties", 0.5)
        np.testing.assert_allclose(
            combined.tensors.copy_of("classifier").state_dict()[key].numpy(),
            want,
            rtol=0,
            atol=1e-6,
        )


def test_combinations_that_are_refused() -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(4), name="a")
    lk.adapt(model, lk.LoRA(4), name="b", rank_pattern={"v_proj": 2})
    before = set(lk.adapters(model))
    for settings, message in (
        ({"how": "ties", "density": 0.5}, "how='ties'"),
        (
            {"on": "factors"},
            r"v_proj.*'a' has rank 4, 'b' has rank 2",
        ),
        ({"how": "dare"}, "'dare'.*'dare_"),
        ({"how": "ties", "rank": 4}, "density"),
    ):
        with pytest.raises(lk.SettingError, match=message):
            lk.combine(model, {"a": 1, "b": 1}, **settings)  # type: ignore[arg-type]
    assert set(lk.adapters(model)) == before
    lk.adapt(model, lk.DoRA(rank=2), name="gained")
    with pytest.raises(lk.SettingError, match=r"'gained' \(dora\).*as_lora"):
        lk.combine(model, {"a": 1, "gained": 1}, how="ties", density=0.5, rank=2)


def test_what_cannot_be_combined(ids: Tensor) -> None:
    model = tiny_llama()
    lk.adapt(model, lk.DoRA(rank=2), name="gained")
    plain = lk.adapt(model, lk.LoRA(2), name="plain")
    with pytest.raises(lk.SettingError, match=r"'gained' \(dora\).*as_lora"):
        lk.combine(model, {"plain": 1, "gained": 1})
    with pytest.raises(lk.SettingError, match="'other'"):
        lk.combine(model, {"other": 1})
    lk.activate(model, "plain")
    plain.merge()
    with pytest.raises(lk.StateError, match="merged"):
        lk.combine(model, {"plain": 1})
    with pytest.raises(lk.StateError, match="merged"):
        lk.as_lora(plain)


def test_the_data_is_seen_by_the_adapter_that_is_converted(ids: Tensor) -> None:
    fits = []
    for active in ("gained", "noise"):
        model = tiny_llama(initializer_range=0.3)
        adapter = trained(model, lk.DoRA(rank=4), ids, "gained")
        randomise(lk.adapt(model, lk.LoRA(4), name="noise"), 2.0)
        lk.activate(model, active)
        _, found = lk.as_lora(adapter, rank=4, batches=[{"input_ids": ids}])
        assert lk.adapters(model)["plain"].is_active
        fits.append(found)
    assert fits[0] == fits[1]


def test_what_is_not_finite_is_not_converted(ids: Tensor) -> None:
    model = tiny_llama()
    adapter = randomise(lk.adapt(model, lk.DoRA(rank=4)))
    with torch.no_grad():
        adapter.tensors.branch("model.layers.1.mlp.up_proj").A[0, 0] = torch.nan
    with pytest.raises(lk.StateError, match=r"model\.layers\.1\.mlp\.up_proj"):
        lk.as_lora(adapter, rank=2)


def test_a_rank_that_leaves_more_than_the_error_is_said() -> None:
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(8)), 0.3)
    with pytest.warns(lk.LorakinWarning, match=r"0\.1 in 14 of 14 modules"):
        lk.as_lora(adapter, rank=1, error=0.1)


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": "much"}, {"a": float("nan")}, ["a"]])
def test_sums_of_nothing(weights: Any) -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(2), name="a")
    with pytest.raises(lk.SettingError):
        lk.combine(model, weights)
    for limits in ({"rank": 0}, {"rank": 2.5}, {"error": 2}, {"error": -1}, {"rank": True}):
        with pytest.raises(lk.SettingError):
            lk.combine(model, {"a": 1.0}, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", [{"input_ids": 1}, [torch.ones(1)]])
def test_batches_that_are_none(batches: Any) -> None:
    with pytest.raises(lk.SettingError, match="batches"):
        lk.as_lora(lk.adapt(tiny_llama(), lk.LoRA(2)), batches=batches)


def test_a_file_with_magnitudes_in_one_module_alone(tmp_path: Path, ids: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    want = tiny_llama().double()
    for path, gained in zip(paths, (True, False), strict=True):
        weight = want.get_submodule(path).weight
        outputs, inputs = weight.shape
        down, up = (
            torch.randn(2, inputs, generator=generator) * 0.1,
            torch.randn(outputs, 2, generator=generator) * 0.1,
        )
        name = "lora_transformer_" + path.replace(".", "_")
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(4.0),
        }
        with torch.no_grad():
            weight += 2 * up.double() @ down.double()
            if gained:
                tensors[f"{name}.dora_scale"] = 1.1 * weight.norm(dim=1, keepdim=True).float()
                weight *= 1.1
    safetensors.torch.save_file(tensors, tmp_path / "kohya.safetensors")
    model = tiny_llama()
    lk.convert(model, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(logits(model, ids), logits(want, ids), rtol=0, atol=1e-5)
