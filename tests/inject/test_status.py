"""`lk.status` and an adapter's words, against PEFT's get_model_status and counts by hand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lorakin as lk
from conftest import MEMBERS, tiny_bert, tiny_llama, tiny_mixtral
from lorakin.inject.attachments import attachments_of
from lorakin.inject.counts import parameter_counts, trained_by_method

ATTENTION = ["q_proj", "v_proj"]


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_model_without_adapters() -> None:
    model = tiny_llama()
    model.lm_head.requires_grad_(False)  # tied to the embedding: one parameter
    status = lk.status(model)
    assert (status.base_model, status.methods, status.modules) == ("LlamaForCausalLM", {}, 0)
    assert (status.active, status.merged, status.disabled, status.enabled) == ((), (), (), True)
    assert (status.trainable_parameters, status.total_parameters) == (
        numbers(model) - 64 * 32,
        numbers(model),
    )
    assert "no adapters" in str(status)
    with pytest.raises(lk.SettingError):
        lk.status("model")  # type: ignore[arg-type]


@pytest.mark.peer
@pytest.mark.parametrize("dora", [False, True])
def test_it_agrees_with_peft(dora: bool) -> None:
    peft = pytest.importorskip("peft")
    ours, base = tiny_bert(), tiny_bert()
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "value"],
        "use_dora": dora,
    }
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(**settings, modules_to_save=["classifier"]), "one"
    )
    theirs.add_adapter("two", peft.LoraConfig(r=2, target_modules=["query"]))
    lk.adapt(
        ours,
        (lk.DoRA if dora else lk.LoRA)(rank=4, alpha=8),
        ["query", "value"],
        name="one",
        modules_to_save=["classifier"],
    )
    lk.adapt(ours, lk.LoRA(2), ["query"], name="two")

    def both(name: str) -> None:
        """Equal where the words mean the same; PEFT trains only the active adapter, lorakin all."""
        theirs.set_adapter(name)
        lk.activate(ours, name)
        for other, adapter in lk.adapters(ours).items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(other == name)
        peers, mine = theirs.get_model_status(), lk.status(ours)
        assert mine.base_model == peers.base_model_type
        assert list(mine.methods) == peers.available_adapters
        assert mine.total_parameters == peers.total_params
        assert mine.trainable_parameters == peers.trainable_params
        assert dict(mine.requires_grad) == peers.requires_grad
        assert mine.enabled == peers.enabled
        assert list(mine.merged) == peers.merged_adapters
        assert {n: list(d) for n, d in mine.devices.items()} == peers.devices
        assert mine.modules == peers.num_adapter_layers
        assert mine.active == (name,)

    both("one")
    both("two")
    theirs.base_model.merge_adapter(["two"])
    lk.adapters(ours)["two"].merge()
    assert list(lk.status(ours).merged) == theirs.get_model_status().merged_adapters == ["two"]
    assert lk.status(ours).total_parameters == theirs.get_model_status().total_params
    theirs.base_model.unmerge_adapter()
    lk.adapters(ours)["two"].unmerge()
    with (
        theirs.disable_adapter(),
        lk.adapters(ours)["one"].disabled(),
        lk.adapters(ours)["two"].disabled(),
    ):
        assert lk.status(ours).enabled is theirs.get_model_status().enabled is False
    part = next(iter(lk.adapters(ours)["one"].parameters()))
    part.requires_grad_(True)
    next(p for n, p in theirs.named_parameters() if ".one." in n).requires_grad_(True)
    assert (
        lk.status(ours).requires_grad["one"]
        == theirs.get_model_status().requires_grad["one"]
        == "irregular"
    )


@pytest.mark.parametrize("word", [word for word in MEMBERS if word != "lora-drop"])
def test_what_a_member_freezes_by_design_is_regular(word: str) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, MEMBERS[word]())
    status = lk.status(model)
    assert status.requires_grad == {"default": True}
    assert status.trainable_parameters == adapter.trainable_parameters == trained_by_method(adapter)
    assert status.total_parameters == numbers(model)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    assert lk.status(model).requires_grad == {"default": False}
    assert trained_by_method(adapter) == status.trainable_parameters
    frozen = next(
        (
            p
            for slot, p in adapter.tensors.branch(next(iter(adapter.placement.methods)))
            .tensors()
            .items()
            if p.numel()
        ),
        None,
    )
    assert frozen is not None
    frozen.requires_grad_(True)
    assert lk.status(model).requires_grad == {"default": "irregular"}


def test_a_base_module_may_be_called_lorakin() -> None:
    model = nn.ModuleDict({"lorakin": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    assert lk.status(model).total_parameters == numbers(model) == 40


def test_of_what_wraps_an_adapted_model_it_is_the_state_of_that() -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(2))
    assert (
        lk.status(nn.Sequential(nn.Identity(), model))
        == lk.status(torch.compile(model))
        == lk.status(model)
    )


def test_states_in_some_modules_only_are_irregular() -> None:
    model = tiny_llama()
    lk.adapt(model, lk.LoRA(2))
    attachments_of(model.model.layers[0].mlp.up_proj).active = ()
    assert lk.status(model).active == "irregular"
    assert "irregular" in str(lk.status(model))
    lk.activate(model, "default")
    attachments_of(model.model.layers[0].mlp.up_proj).merged = ("default",)
    assert (lk.status(model).active, lk.status(model).merged) == (("default",), "irregular")


def test_merging_and_moving_change_no_count() -> None:
    model = tiny_llama(tied=True)
    adapter = lk.adapt(model, lk.LoRA(2), ["embed_tokens", "q_proj"])
    before = lk.status(model)
    adapter.merge()  # unties the head
    assert dataclasses.replace(lk.status(model), merged=()) == before
    adapter.unmerge()
    assert lk.status(model) == before
    experts = tiny_mixtral()
    own = numbers(experts)
    adapter = lk.adapt(experts, lk.LoRA(2), ["mlp.experts.down_proj"])
    assert lk.status(experts).total_parameters == own + adapter.trainable_parameters
    adapter.merge()
    assert lk.status(experts).total_parameters == own + adapter.trainable_parameters


def test_what_is_frozen_removed_or_on_another_device_is_said() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(2), ATTENTION)
    assert "active, trains" in str(adapter) and "(11" not in repr(adapter)
    trained, total = adapter.trainable_parameters, numbers(model)
    assert f"{trained:,} of {total:,} parameters" in str(
        adapter
    ) and f"{trained:,} of {total:,} parameters" in repr(adapter)
    assert f"{4 * trained:,} bytes" in str(adapter) and "float32 on cpu" in str(adapter)
    assert "4 (q_proj, v_proj)" in str(adapter)
    assert len(str(adapter).splitlines()) <= 6 and "\n" not in repr(adapter)
    adapter.merge()
    assert "merged" in str(adapter) and repr(adapter).endswith("merged)")
    adapter.unmerge()
    with adapter.disabled():
        assert repr(adapter).endswith("disabled)")
    lk.activate(model, [])
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    assert "inactive, frozen" in str(adapter) and repr(adapter).endswith("frozen, inactive)")
    adapter.tensors.branch("model.layers.0.self_attn.q_proj").to("meta")
    assert lk.status(model).devices == {"default": ("cpu", "meta")}
    adapter.remove()
    assert "removed" in str(adapter) and repr(adapter).endswith("removed)")


def test_of_a_module_that_was_replaced_nothing_is_said() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(2), ["q_proj"])
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)
    assert lk.status(model).modules == 1
    assert "active" in repr(adapter) and "active" in str(adapter)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_in_few_bits_count_as_what_they_stand_for(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32, bias=False))
    packed = copy.deepcopy(plain)
    for n, layer in enumerate(plain):
        made = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
        options = {"quant_type": "nf4"} if kind == "nf4" else {"has_fp16_weights": False}
        new = made(layer.in_features, layer.out_features, layer.bias is not None, **options)
        new.load_state_dict(layer.state_dict())
        packed[n] = new
    packed = packed.to("cpu")
    assert parameter_counts(packed)[1] == numbers(plain)
    assert parameter_counts(packed)[1] == peft.PeftModel.get_nb_trainable_parameters(packed)[1]
    adapter = lk.adapt(packed, lk.LoRA(2))
    assert lk.status(packed).total_parameters == numbers(plain) + adapter.trainable_parameters
    assert lk.status(packed).trainable_parameters == adapter.trainable_parameters
