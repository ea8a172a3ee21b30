"""A deep model rehearsed by three shallow ones takes what the whole one takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lorakin.errors import ModelError
from lorakin.family import method_named
from lorakin.plan.conditions import Conditions
from lorakin.plan.few_layers import rehearse, shallow, shallow_depths
from lorakin.plan.rehearsal import FORWARD, rehearse_whole
from plan.small import MACHINE, conditions, small

FEW = {"targets": ["q_proj", "down_proj"], "max_length": 4}


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("lora", {}),
        ("lora", {"fuse": True, "gradient_checkpointing": True, **FEW}),
        ("vera", {"fuse": True, **FEW}),
        ("adalora", FEW),
        ("delta-lora", FEW),
    ],
)
def test_few_layers_tell_the_peak_of_many(word: str, changes: dict[str, Any]) -> None:
    where, method = conditions(10, torch.bfloat16, **changes), method_named(word, {})
    told, whole = rehearse(where, method, MACHINE), rehearse_whole(where, method, MACHINE)
    assert max(p.total for p in told.peaks.values()) == max(
        p.total for k, p in whole.peaks.items() if k
    )
    assert (told.trainable_parameters, told.adapter_bytes, told.modules) == (
        whole.trainable_parameters,
        whole.adapter_bytes,
        whole.modules,
    )
    assert told.seconds == pytest.approx(whole.seconds, rel=0.02)


def test_targets_that_only_deep_models_have_are_rehearsed_whole() -> None:
    where = conditions(10, targets=["layers.7.mlp.up_proj", "layers.9.mlp.up_proj"])
    assert rehearse(where, method_named("lora", {}), MACHINE).modules == 2
    some = conditions(
        10, targets=[r"model\.layers\.[0-4]\.mlp\.up_proj"]
    )  # the first few layers look as if all were meant
    assert rehearse(some, method_named("lora", {}), MACHINE).modules == 5


def test_periods_of_layers_are_kept() -> None:
    where = Conditions(
        small(12, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 4),
        torch.float32,
    )
    assert shallow_depths(where) is None  # 3 + 6 + 9 layers are more than 12
    deep = Conditions(
        small(31, layer_types=["sliding_attention", "full_attention"] * 15 + ["sliding_attention"]),
        torch.float32,
    )
    assert shallow_depths(deep) == (3, 5, 7)
    assert shallow(deep, 5).config.layer_types == deep.config.layer_types[:5]
    assert shallow_depths(conditions(3)) is None


def test_models_of_other_kinds_are_planned_or_refused_with_a_reason() -> None:
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    experts = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **sizes)
    gpt = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)
    gemma = transformers.Gemma2Config(
        num_key_value_heads=2, head_dim=16, **sizes
    )  # with a tensor that its class makes
    method = method_named("lora", {"rank": 4})
    attention, gated = (
        (64 + 64) + 2 * (64 + 32) + (64 + 64),
        3 * (64 + 96),
    )  # numbers a rank: q, k, v, o; gate, up, down
    conv = (64 + 192) + (64 + 64) + 2 * (64 + 256)
    for config, numbers in ((experts, attention), (gpt, conv), (gemma, attention + gated)):
        there = rehearse(
            Conditions(config, torch.bfloat16, batch_size=2, max_length=16), method, MACHINE
        )
        assert there.trainable_parameters == 2 * 4 * numbers
        assert there.peaks[FORWARD].kinds["activations"] > 0
    with pytest.raises(
        ModelError,
        match="Mixtral .* 2 rows of 16 tokens",
    ):
        rehearse(Conditions(experts, torch.float32, batch_size=2, max_length=16), method, MACHINE)


def test_a_classifier_trains_its_head() -> None:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
    )
    there = rehearse(
        Conditions(config, torch.float32, labels=3, batch_size=2, max_length=16),
        method_named("lora", {}),
        MACHINE,
    )
    linears = 2 * (4 * 16 * (32 + 32) + 2 * 16 * (32 + 48)) + 16 * (
        32 + 32
    )  # of two layers, and the pooler's
    assert there.trainable_parameters == linears + 3 * 32 + 3
