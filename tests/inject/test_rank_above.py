"""Ranks above a weight's smaller side: refused, or clamped to it, with the alpha of all others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_llama, tiny_mixtral
from lorakin.family import Method
from lorakin.training.recipe import Recipe

pytestmark = [
    pytest.mark.filterwarnings("ignore:rank_above"),
    pytest.mark.filterwarnings("ignore:.*adalora has not reached"),
]

MEMBERS: dict[str, Any] = {
    "lora": lk.LoRA(20, 40),
    "rslora": lk.LoRA(20, 40, rslora=True),
    "lora+": lk.LoRAPlus(rank=20),
    "lora-fa": lk.LoRAFA(rank=20, corrected=True),
    "dora": lk.DoRA(rank=20),
    "vera": lk.VeRA(rank=20),
    "adalora": lk.AdaLoRA(initial_rank=20, target_rank=6, start=1, finish=2),
    "delta-lora": lk.DeltaLoRA(rank=20, start_step=2),
    "dora,adalora": [lk.DoRA(), lk.AdaLoRA(initial_rank=20, target_rank=6, start=1, finish=2)],
    "lora-drop": lk.LoRADrop(rank=20, keep=4),
    "lora-xs": lk.LoRAXS(rank=20),
    "pissa": lk.PiSSA(rank=20),
    "lora-ga": lk.LoRAGA(rank=20),
    "lora-ga,dora": [lk.LoRAGA(rank=20), lk.DoRA(rank=20)],
}


def rows(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


def adapted(word: str, ids: Tensor, **more: Any) -> lk.Adapter:
    """tiny_llama, whose k_proj and v_proj have 16 outputs."""
    if (word == "lora-drop" and "member" not in more) or "lora-ga" in word:
        more["probe"] = [rows(ids)]
    return lk.adapt(
        tiny_llama(), more.pop("member", MEMBERS[word]), rank_above="clamp", seed=0, **more
    )


def trained(adapter: lk.Adapter, ids: Tensor, steps: int = 5) -> lk.Adapter:
    optimizer = adapter.optimizer(lr=0.02, total_steps=5)
    for _ in range(steps):
        adapter.model(**rows(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("word", MEMBERS)
def test_every_member_saves_loads_and_resumes(
    word: str, steps: int, ids: Tensor, tmp_path: Path
) -> None:
    """Also AdaLoRA before its ranks are freed."""
    adapter = trained(adapted(word, ids), ids, steps)
    narrow = {path for path in adapter.placement.methods if path.endswith(("k_proj", "v_proj"))}
    for path, method in adapter.placement.methods.items():
        side = 16 if path in narrow else 32
        largest = side // 2 if "lora-ga" in word else side
        limit = 20 if word == "vera" else min(20, largest)
        assert method.parametrisation.rank == limit
        twice = word in ("delta-lora", "pissa") or "lora-ga" in word  # a pair and an anchor
        assert adapter.tensors.saved_change(path).down.shape[0] <= (2 if twice else 1) * limit
        if "alpha" in method.parametrisation.setting_names():
            assert method.parametrisation.alpha == adapter.method.parametrisation.alpha
    want = adapter.model(ids).logits
    adapter.save(tmp_path)
    other = tiny_llama()
    lk.load(other, tmp_path)
    torch.testing.assert_close(other(ids).logits, want, rtol=0, atol=1e-6)
    member = MEMBERS[word]
    if word == "lora-drop":
        member = dataclasses.replace(member, importance=adapter.method.setting("importance"))
    again = adapted(word, ids, member=member)
    again.optimizer(lr=0.02, total_steps=5)
    again.restore(tmp_path)
    torch.testing.assert_close(again.model(ids).logits, want, rtol=0, atol=1e-6)


def test_it_is_rank_pattern_written_by_hand() -> None:
    clamped = lk.adapt(tiny_llama(), lk.LoRA(20, 40), rank_above="clamp", seed=0)
    by_hand = lk.adapt(tiny_llama(), lk.LoRA(20, 40), rank_pattern={"[kv]_proj": 16}, seed=0)
    assert clamped.placement.methods == by_hand.placement.methods
    assert (
        clamped.tensors.branch("model.layers.0.self_attn.k_proj").method.parametrisation.scaling
        == 40 / 16
    )
    for one, other in zip(clamped.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adaloras_scale_is_the_initial_ranks(ids: Tensor) -> None:
    adapter = adapted("adalora", ids)
    scales = {method.parametrisation.scaling for method in adapter.placement.methods.values()}
    assert scales == {32 / (20 + 1e-5)}
    optimizer = adapter.optimizer(lr=0.01, total_steps=5)
    for n in range(1, 6):
        adapter.model(**rows(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        left = sum(
            int((adapter.tensors.branch(path).E != 0).sum()) for path in adapter.placement.methods
        )
        assert left == 6 * 14 or n < 3, "the budget is the average over all modules"


def test_a_pattern_above_the_side_is_clamped_and_one_below_stays() -> None:
    adapter = lk.adapt(
        tiny_llama(),
        lk.LoRA(20),
        rank_pattern={"layers.0.self_attn.k_proj": 4, "q_proj": 50},
        rank_above="clamp",
    )
    ranks = {path: adapter.tensors.branch(path).A.shape[0] for path in adapter.placement.methods}
    assert (
        ranks["model.layers.0.self_attn.k_proj"] == 4
        and ranks["model.layers.1.self_attn.k_proj"] == 16
    )
    assert (
        ranks["model.layers.0.self_attn.q_proj"] == 32 and ranks["model.layers.0.mlp.up_proj"] == 20
    )


def test_experts_have_one_pattern_for_a_stack(ids: Tensor, tmp_path: Path) -> None:
    model = tiny_mixtral()
    adapter = randomise(
        lk.adapt(model, lk.LoRA(40), ["q_proj", "experts.down_proj"], rank_above="clamp")
    )
    assert len(adapter.placement.rank_pattern) == 4, "two stacks and two q_proj"
    want = model(ids).logits
    adapter.save(tmp_path)
    again = lk.adapt(
        tiny_mixtral(), lk.LoRA(40), ["q_proj", "experts.down_proj"], rank_above="clamp"
    )
    again.restore(tmp_path)
    torch.testing.assert_close(again.model(ids).logits, want, rtol=0, atol=1e-5)
    some = lk.adapt(
        tiny_mixtral(),
        lk.LoRA(40),
        "experts.down_proj",
        rank_pattern={"layers.0.*down_proj.1": 3},
        rank_above="clamp",
    )
    path = "model.layers.0.mlp.experts.down_proj"
    assert [some.tensors.branch(f"{path}.{n}").A.shape[0] for n in range(4)] == [32, 3, 32, 32]
    randomise(some).save(tmp_path / "some")
    read = lk.load(tiny_mixtral(), tmp_path / "some")
    assert [read.tensors.branch(f"{path}.{n}").A.shape[0] for n in range(4)] == [32, 3, 32, 32]


def test_what_was_clamped_is_said_and_nothing_if_nothing_was(
    recwarn: pytest.WarningsRecorder,
) -> None:
    lk.adapt(tiny_llama(), lk.LoRA(16), rank_above="clamp")
    lk.adapt(tiny_llama(), lk.VeRA(64), rank_above="clamp")
    assert not [w for w in recwarn if issubclass(w.category, lk.LorakinWarning)]
    with pytest.warns(
        lk.LorakinWarning,
        match=r"4 of 14 modules .*\(model\.layers\.0\.self_attn\.k_proj 16, ",
    ):
        lk.adapt(tiny_llama(), lk.LoRA(20), rank_above="clamp", name="one")


def test_it_is_refused_unless_it_is_asked_for() -> None:
    with pytest.raises(
        lk.SettingError,
        match=r"rank 20.*k_proj.*rank_above='clamp' \(--rank-above clamp\)",
    ):
        lk.adapt(tiny_llama(), lk.LoRA(20))
    with pytest.raises(lk.SettingError, match="lower"):
        lk.adapt(tiny_llama(), lk.LoRA(2), rank_above="lower")
    with pytest.raises(lk.SettingError, match="lower"):
        Recipe(model="m", data="d", out="o", rank_above="lower")


def test_a_classifiers_head_of_few_classes() -> None:
    model = tiny_bert(labels=3)
    adapter = lk.adapt(model, lk.LoRA(8), ["query", "classifier"], rank_above="clamp")
    assert adapter.tensors.branch("classifier").B.shape == (3, 3)
    conv = nn.Sequential(nn.Conv2d(3, 2, 1))
    assert lk.adapt(conv, lk.LoRA(8), "0", rank_above="clamp").tensors.branch("0").A.shape[0] == 2


def test_importance_takes_it_too(ids: Tensor) -> None:
    found = lk.importance(
        tiny_llama(), lk.LoRADrop(rank=20), [rows(ids)], rank_above="clamp", lr=1e-2
    )
    assert sum(found.values()) == pytest.approx(1)
    assert Method.of(MEMBERS["lora-drop"]).needed_probe is not None
