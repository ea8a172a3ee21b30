"""`adapter.restore`: the same method in any spelling, and what PEFT wrote of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise, tiny_llama

TARGETS = ["q_proj", "v_proj"]


def equal(one: Any, other: Any, ids: Tensor) -> None:
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (lk.DoRA(rank=4, alpha=8), [lk.LoRA(rank=4, alpha=8), lk.DoRA()]),
        ([lk.LoRA(rank=4, alpha=8), lk.DoRA()], lk.DoRA(rank=4, alpha=8)),
        (lk.LoRA(rank=4, init="gaussian"), lk.LoRA(rank=4)),
        (
            [lk.LoRAPlus(rank=4, alpha=8), lk.DoRA()],
            [lk.LoRA(rank=4, alpha=8), lk.DoRA(), lk.LoRAPlus()],
        ),
    ],
)
def test_another_spelling(saved: Any, here: Any, tmp_path: Path, ids: Tensor) -> None:
    model, other = tiny_llama(), tiny_llama()
    randomise(lk.adapt(model, saved, TARGETS)).save(tmp_path)
    adapter = randomise(lk.adapt(other, here, TARGETS), seed=9)
    before, tensors = adapter.placement.method, adapter.parameters()
    adapter.restore(tmp_path)
    equal(model, other, ids)
    assert adapter.placement.method is before
    assert all(a is b for a, b in zip(adapter.parameters(), tensors, strict=True))


def test_patterns_in_another_spelling(tmp_path: Path, ids: Tensor) -> None:
    model, other = tiny_llama(), tiny_llama()
    randomise(lk.adapt(model, lk.LoRA(rank=4, alpha=8), TARGETS, rank_pattern={"v_proj": 2})).save(
        tmp_path
    )
    pattern = {"q_proj": 4, "layers.0.self_attn.v_proj": 2, "layers.1.self_attn.v_proj": 2}
    randomise(
        lk.adapt(other, lk.LoRA(rank=3, alpha=8), TARGETS, rank_pattern=pattern), seed=9
    ).restore(tmp_path)
    equal(model, other, ids)
    with pytest.raises(lk.AdapterError):
        lk.adapt(tiny_llama(), lk.LoRA(rank=4, alpha=8), TARGETS).restore(tmp_path)


PLAIN, GAINED = {}, {"use_dora": True}
PATHS = [f"model.layers.{n}.self_attn.{target}" for n in range(2) for target in TARGETS]
IMPORTANCE = dict(zip(PATHS, (0.4, 0.3, 0.2, 0.1), strict=True))


@pytest.mark.peer
@pytest.mark.parametrize(
    ("settings", "member", "fits"),
    [
        (PLAIN, lk.LoRA(rank=4, alpha=8), True),
        (PLAIN, lk.LoRA(rank=4, alpha=8, init="gaussian", dropout=0.1), True),
        (PLAIN, lk.LoRAPlus(rank=4, alpha=8), True),
        (PLAIN, [lk.LoRA(rank=4, alpha=8), lk.LoRAPlus(ratio=4)], True),
        (PLAIN, lk.LoRAFA(rank=4, alpha=8), True),
        (GAINED, lk.DoRA(rank=4, alpha=8), True),
        (GAINED, [lk.LoRA(rank=4, alpha=8), lk.DoRA()], True),
        (GAINED, [lk.DoRA(rank=4, alpha=8), lk.LoRAPlus()], True),
        (PLAIN, lk.DoRA(rank=4, alpha=8), False),
        (GAINED, lk.LoRA(rank=4, alpha=8), False),
        (PLAIN, lk.LoRA(rank=4, alpha=4), False),
        (PLAIN, lk.LoRA(rank=2, alpha=8), False),
        (PLAIN, lk.DeltaLoRA(rank=4, alpha=8), False),
        (PLAIN, lk.LoRADrop(rank=4, alpha=8, keep=1, importance=IMPORTANCE), False),
    ],
)
def test_what_peft_wrote(
    settings: dict[str, Any], member: Any, fits: bool, tmp_path: Path, ids: Tensor
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, **settings
    )
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_llama()
    adapter = lk.adapt(model, member, TARGETS)
    before = [p.clone() for p in adapter.parameters()]
    if not fits:
        with pytest.raises(lk.AdapterError):
            adapter.restore(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
        return
    adapter.restore(tmp_path)
    model.eval()
    equal(model, theirs, ids)


def test_our_own_files_say_how_they_were_trained(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=4, alpha=8), TARGETS)).save(tmp_path)
    adapter = lk.adapt(tiny_llama(), lk.LoRAPlus(rank=4, alpha=8), TARGETS)
    with pytest.raises(lk.AdapterError):
        adapter.restore(tmp_path)


@pytest.mark.parametrize(
    ("saved", "present", "expected"),
    [
        ({"member": lk.DoRA(rank=4, alpha=8)}, {}, ["dora", "lora"]),
        ({"member": lk.LoRA(rank=4, alpha=12)}, {}, ["alpha", PATHS[0], "12", "8"]),
        ({"rank_pattern": {PATHS[2]: 3}}, {}, ["rank", PATHS[2], "3", "4"]),
        ({"targets": ["q_proj"]}, {}, [PATHS[1]]),
        ({}, {"targets": ["q_proj"]}, [PATHS[1]]),
        ({"modules_to_save": ["lm_head"]}, {}, ["lm_head"]),
        ({"trainable_tokens": [1]}, {}, ["model.embed_tokens"]),
        ({"trainable_tokens": [1]}, {"trainable_tokens": [2]}, ["model.embed_tokens"]),
        ({}, {"bias": "lora_only"}, [PATHS[0]]),
    ],
)
def test_the_error_names_the_first_difference(
    saved: dict[str, Any], present: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    settings = {"member": lk.LoRA(rank=4, alpha=8), "targets": TARGETS}
    model, other = (tiny_llama(tied=False, attention_bias=True) for _ in range(2))
    randomise(lk.adapt(model, **{**settings, **saved})).save(tmp_path)
    adapter = lk.adapt(other, **{**settings, **present})
    with pytest.raises(lk.AdapterError) as raised:
        adapter.restore(tmp_path)
    message = str(raised.value).replace(repr(adapter), "")
    assert all(word in message for word in expected), message


def test_ranks_that_were_chosen_from_other_data(tmp_path: Path) -> None:
    """The error says which module's rank differs, and its way out works."""

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model["a"](batch[0]).sum() + model["b"](batch[1]).sum()

    def model() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

    spread, narrow = torch.randn(64, 8), torch.randn(64, 1) * torch.ones(8)
    narrow = narrow + 0.01 * torch.randn(64, 8)
    first, second = model(), model()
    of_spread_a, of_spread_b = (
        lk.adapt(model, lk.EVA(rank=2), ["a", "b"], probe=[batch] * 3, loss=loss)
        for model, batch in ((first, (spread, narrow)), (second, (narrow, spread)))
    )
    ranks = of_spread_a.placement.methods["a"].setting("rank")
    assert ranks != of_spread_b.placement.methods["a"].setting("rank")
    randomise(of_spread_a).save(tmp_path)
    with pytest.raises(lk.AdapterError) as raised:
        of_spread_b.restore(tmp_path)
    assert f"rank of a is {ranks}" in str(raised.value) and "lorakin.load" in str(raised.value)
    of_spread_b.remove()
    loaded = lk.load(second, tmp_path, trainable=True)
    for saved, tensor in zip(of_spread_a.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, tensor) and tensor.requires_grad
