"""Which modules are chosen, and the errors that name what was meant."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

import lorakin as lk
from conftest import ConvNet, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral
from lorakin.inject.heads import head_of
from lorakin.inject.layer_numbers import parse_layers
from lorakin.inject.targets import select

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def names(model: nn.Module, targets, **options) -> set[str]:  # type: ignore[no-untyped-def]
    return set(select(model, targets, **options))


def leaves(paths: set[str]) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


def test_all_linear_leaves_the_head_out() -> None:
    chosen = names(tiny_llama(), "all-linear")
    assert leaves(chosen) == ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert len(chosen) == 14
    assert names(tiny_gpt2(), "all-linear") == {
        f"transformer.h.{i}.{m}"
        for i in (0, 1)
        for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert not any("classifier" in path for path in names(tiny_bert(), "all-linear"))
    assert "bert.pooler.dense" in names(tiny_bert(), "all-linear")
    assert names(ConvNet(), "all-linear") == {"head"}, (
        "a plain module has no head that could be known"
    )


def test_all_linear_leaves_gates_out() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.shared_expert_gate = nn.Linear(32, 1, bias=False)
    assert not any(
        "gate" in path and "gate_proj" not in path for path in select(model, "all-linear")
    )
    assert select(model, "shared_expert_gate") == ["model.layers.0.mlp.shared_expert_gate"]


def test_heads() -> None:
    assert head_of(tiny_llama()) == ["lm_head"]
    assert head_of(tiny_bert()) == ["classifier"]


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["self_attn.q_proj", "self_attn.v_proj"],
        "model.layers.*.self_attn.[qv]_proj",
        r".*\.(q|v)_proj",
        r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
        lambda path, module: path.endswith(("q_proj", "v_proj")),
    ],
)
def test_names_globs_regular_expressions_and_functions(targets) -> None:  # type: ignore[no-untyped-def]
    assert names(tiny_llama(), targets) == {
        f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")
    }


def test_a_name_is_a_whole_part_of_the_path() -> None:
    with pytest.raises(lk.TargetError, match="'proj'"):
        names(tiny_llama(), "proj")


def test_layers_and_exclusions() -> None:
    assert names(tiny_llama(), "q_proj", layer_indices=[1]) == {"model.layers.1.self_attn.q_proj"}
    assert names(tiny_llama(), "q_proj", layer_indices=[-2]) == {"model.layers.0.self_attn.q_proj"}
    assert leaves(names(tiny_llama(), "all-linear", exclude=["*.mlp.*"])) == ATTENTION
    assert leaves(names(tiny_llama(), "all-linear",
    exclude="o_proj")) == (ATTENTION - {"o_proj"}) | {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    with pytest.raises(lk.TargetError, match="2"):
        names(tiny_llama(), "q_proj", layer_indices=[2])
    with pytest.raises(lk.TargetError, match="'lm_hed'.*lm_head"):
        names(tiny_llama(), "all-linear", exclude="lm_hed")
    with pytest.raises(lk.TargetError):
        names(tiny_llama(), "q_proj", exclude="q_proj")


def test_layer_ranges_in_text() -> None:
    assert parse_layers("0-2, 5,-1") == [0, 1, 2, 5, -1]
    with pytest.raises(lk.SettingError, match="'first'"):
        parse_layers("first")


def test_a_miss_lists_near_names() -> None:
    with pytest.raises(lk.TargetError, match="'q_prj'.*q_proj"):
        names(tiny_llama(), ["q_prj", "v_proj"])
    with pytest.raises(lk.TargetError, match="c_attn"):
        names(tiny_gpt2(), "zzzzzz")


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    with pytest.raises(lk.TargetError, match="'self_attn'.*q_proj, k_proj"):
        names(tiny_llama(), "self_attn")
    with pytest.raises(lk.TargetError):
        names(tiny_llama(), [])
    with pytest.raises(lk.TargetError, match="ConvTranspose1d"):
        names(nn.Sequential(nn.ConvTranspose1d(4, 4, 3)), "0")
    with pytest.raises(lk.TargetError, match="max_norm"):
        names(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), "0")


def test_words_and_lists_of_every_kind() -> None:
    linear = names(tiny_llama(), "all-linear")
    assert names(tiny_llama(), "ALL-LINEAR") == names(tiny_llama(), ["all-linear"]) == linear
    assert names(tiny_llama(), ["all-linear", "lm_head"]) == linear | {"lm_head"}
    assert (
        names(tiny_llama(), {"q_proj"})
        == names(tiny_llama(), ("q_proj",))
        == names(tiny_llama(), "q_proj")
    )
    for wrong in ([nn.Linear], nn.Linear, re.compile("q"), 3, nn.Linear(2, 2)):
        with pytest.raises(
            lk.TargetError,
            match="targets",
        ):
            names(tiny_llama(), wrong)


def test_a_glob_is_not_read_as_a_regular_expression_too() -> None:
    model = tiny_llama(num_hidden_layers=12)
    assert {path.split(".")[2] for path in names(model, "model.layers.1.*")} == {"1"}
    left = names(model, "all-linear", exclude="model.layers.1.*")
    assert {path.split(".")[2] for path in left} == {str(n) for n in range(12)} - {"1"}


def test_layers_are_counted_by_the_named_number() -> None:
    model = nn.Sequential(tiny_llama())
    assert names(model, "q_proj", layer_indices=[1]) == {"0.model.layers.1.self_attn.q_proj"}
    assert names(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "all-linear", layer_indices=1
    ) == {"1"}


def test_exclusion_comes_before_refusal() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, max_norm=1.0))
    assert names(model, "*", exclude="1") == {"0"}


def test_what_is_trained_whole_is_no_target() -> None:
    with pytest.raises(
        lk.TargetError,
        match="'classifier'.*modules_to_save",
    ):
        lk.adapt(
            tiny_bert(), lk.LoRA(rank=2), ["query", "classifier"], modules_to_save=["classifier"]
        )


def test_containers_are_not_trained_whole() -> None:
    model = nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(8, 8)]), "fc": nn.Linear(8, 8)})
    with pytest.raises(lk.TargetError):
        lk.adapt(model, lk.LoRA(rank=2), "fc", modules_to_save=["heads"])


def test_computed_and_missing_weights_are_refused() -> None:
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(
        lk.TargetError,
        match="ParametrizedLinear",
    ):
        names(normed, "0")
    with pytest.raises(lk.TargetError):
        names(nn.Sequential(nn.LazyLinear(4)), "0")
    with pytest.raises(lk.TargetError, match="Linear"):
        names(nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), "0")


def test_quantised_weights_are_refused() -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(lk.TargetError, match="Linear"):
        names(nn.Sequential(linear), "0")


def test_layers_are_counted_in_each_stack() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=4, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config)
    assert select(model, "q", layer_indices=[-1]) == [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.3.layer.0.SelfAttention.q",
        "decoder.block.3.layer.1.EncDecAttention.q",
    ]
    assert {path.split(".")[0] for path in select(model, "q", layer_indices=[3])} == {"decoder"}
    with pytest.raises(lk.TargetError):
        select(model, "q", layer_indices=[4])


@pytest.mark.parametrize(
    "pattern", [r".*(gate_proj|up_proj|down_proj)", r".*\.(gate_proj|down_proj)"]
)
def test_words_of_a_pattern_that_name_nothing_are_said(pattern: str) -> None:
    with pytest.warns(lk.LorakinWarning, match="gate_up_proj"):
        select(tiny_mixtral(), pattern)
    select(tiny_llama(), pattern)  # which has them: a warning would be an error here


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 8), (8, 1)])
def test_all_linear_leaves_out_what_has_nothing_to_factor(inputs: int, outputs: int) -> None:
    assert select(
        nn.ModuleDict({"thin": nn.Linear(inputs, outputs), "wide": nn.Linear(8, 8)}), "all-linear"
    ) == ["wide"]
