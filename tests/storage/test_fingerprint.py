"""An adapter knows its base again: in any precision, and not another fine-tune of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama
from lorakin.storage.fingerprint import difference, fingerprint, is_fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return randomise(lk.adapt(tiny_llama(), lk.LoRA(2))).save(tmp_path / "adapter")


def nudged(share: float, dtype: torch.dtype = torch.float32) -> Any:
    """The base with every weight changed by a share of its size, as further training might."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += (
                share * weight.std() * torch.randn(weight.shape, generator=generator)
                if weight.dim() > 1
                else 0
            )
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_any_precision(saved: Path, dtype: torch.dtype) -> None:
    lk.load(tiny_llama(dtype=dtype), saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_base_is_refused_with_the_difference(saved: Path, dtype: torch.dtype) -> None:
    model = nudged(0.02, dtype)
    with pytest.raises(
        lk.AdapterError,
        match=r"made on .*LlamaForCausalLM.*here is another: \d+\.\d+%.*--other-base",
    ):
        lk.load(model, saved)
    assert not lk.adapters(model)
    lk.load(model, saved, other_base=True)


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("trained_in", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "ways",
    [
        *[(a, b) for a in HALF for b in (*HALF, torch.float32)],
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_copies_in_half_precision_are_the_same_base(
    trained_in: torch.dtype, ways: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    """Rounded once or twice on the way, and widened again.

    What is in a file need not be what it is run in.
    """
    saved = randomise(lk.adapt(tiny_llama(dtype=trained_in), lk.LoRA(2))).save(tmp_path / "adapter")
    model = tiny_llama(dtype=trained_in)
    for dtype in ways:
        model = model.to(dtype)
    again = lk.load(model, saved).save(tmp_path / "again")
    lk.load(tiny_llama(dtype=trained_in), again)


CHANGES: dict[str, Any] = {
    "rms_norm_eps": 0.5,
    "rope_theta": 50.0,
    "hidden_act": "relu",
    "num_attention_heads": 8,
    "head_dim": 4,
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_config_of_the_same_weights_is_another_base(saved: Path, key: str) -> None:
    model = tiny_llama()
    config = model.config.rope_parameters if key == "rope_theta" else model.config
    before = config[key] if key == "rope_theta" else getattr(config, key)
    if key == "rope_theta":
        config[key] = CHANGES[key]
    else:
        setattr(config, key, CHANGES[key])
    with pytest.raises(
        lk.AdapterError,
        match=rf"where \S*{key} is '?{before}'? in the config; here it is '?{CHANGES[key]}",
    ):
        lk.load(model, saved)
    assert not lk.adapters(model)
    lk.load(model, saved, other_base=True)


def test_what_a_config_says_besides_does_not_count(saved: Path) -> None:
    model = tiny_llama()
    for key, value in {
        "use_cache": False,
        "attention_dropout": 0.3,
        "eos_token_id": 7,
        "initializer_range": 1.0,
        "my_note": "x",
        "rms_norm_eps": float(torch.tensor(model.config.rms_norm_eps)),
        "transformers_version": "4.0",
    }.items():
        setattr(model.config, key, value)
    lk.load(model, saved)
    own = json.loads((saved / "lorakin.json").read_text())
    known = own["base"].pop("config")
    assert known["rms_norm_eps"] == tiny_llama().config.rms_norm_eps and "use_cache" not in known
    assert (
        "rope_parameters.rope_theta" in known
        and difference({**own["base"], "config": {"new": 1}}, fingerprint(model)) is None
    )
    assert difference(own["base"], fingerprint(model)) is None  # of an earlier version
    assert not is_fingerprint({**own["base"], "config": {"a": {"b": 1}}}) and not is_fingerprint(
        {**own["base"], "config": 3}
    )


def test_a_light_change_of_a_float32_base_is_seen(saved: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.001)
    with pytest.raises(lk.AdapterError, match=r"k_proj.*0\.10%"):
        lk.load(model, saved)


def test_one_changed_layer_is_seen(saved: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.1
    with pytest.raises(lk.AdapterError, match=r"layers\.1\.mlp\.down_proj.*10\.00%"):
        lk.load(model, saved)


def test_what_adapters_do_to_the_weight_does_not_count(saved: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    first = randomise(lk.adapt(model, lk.LoRA(2), name="first"), 0.5)
    first.merge()
    first.save(tmp_path / "merged")
    lk.load(tiny_llama(), tmp_path / "merged")
    moving = tiny_llama()
    adapter = lk.adapt(moving, lk.DeltaLoRA(rank=2, start_step=1, update="in_place"))
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.5, total_steps=3)
    ids = torch.arange(3, 12).view(1, -1)
    for _ in range(3):
        moving(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.effect.has_moved_base
    adapter.save(tmp_path / "moved")
    lk.load(tiny_llama(), tmp_path / "moved")
    adapter.restore(tmp_path / "moved")


def test_it_is_small_and_stands_in_lorakin_json(saved: Path, tmp_path: Path) -> None:
    base = json.loads((saved / "lorakin.json").read_text())["base"]
    assert base["class"] == "LlamaForCausalLM" and base["model_type"] == "llama"
    assert (
        base["weights"].keys() == dict(tiny_llama().named_parameters(remove_duplicate=False)).keys()
    )
    assert all(len(text.split()) == 6 for text in base["weights"].values())
    gpt2 = randomise(lk.adapt(tiny_gpt2(), lk.LoRA(2))).save(tmp_path / "gpt2")
    lk.load(tiny_gpt2(), gpt2)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_what_is_not_adapted_counts_too(name: str, tmp_path: Path) -> None:
    saved = randomise(lk.adapt(tiny_llama(tied=False), lk.LoRA(2), targets="q_proj")).save(
        tmp_path / "adapter"
    )
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.02)
    with pytest.raises(
        lk.AdapterError,
        match=rf"the weight of {name.removesuffix('.weight')} here is another: 2\.00%",
    ):
        lk.load(model, saved)


def test_other_shapes_and_other_architectures(tmp_path: Path) -> None:
    saved = randomise(lk.adapt(tiny_llama(), lk.LoRA(2))).save(tmp_path / "adapter")
    with pytest.raises(
        lk.AdapterError, match=r"where model\.embed_tokens\.weight is 64x32; here it is 80x32"
    ):
        lk.load(tiny_llama(vocab_size=80), saved)
    settings = tiny_llama().config.to_dict()
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **{k: v for k, v in settings.items() if k not in ("model_type", "architectures")}
        )
    )
    mistral.load_state_dict(tiny_llama().state_dict())
    with pytest.raises(lk.AdapterError, match="llama.*mistral"):
        lk.load(mistral, saved)


def test_a_head_that_is_trained_whole_is_not_the_bases(tmp_path: Path) -> None:
    saved = randomise(lk.adapt(tiny_bert(), lk.LoRA(2), modules_to_save=["classifier"])).save(
        tmp_path / "adapter"
    )
    model = tiny_bert()
    torch.nn.init.normal_(model.classifier.weight)
    lk.load(model, saved)
    torch.nn.init.normal_(model.bert.pooler.dense.weight)
    lk.adapters(model)["default"].remove()
    with pytest.raises(lk.AdapterError, match="pooler"):
        lk.load(model, saved)


def test_without_it_the_adapter_loads_as_what_peft_says(saved: Path) -> None:
    (saved / "lorakin.json").unlink()
    lk.load(nudged(0.5), saved)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_base_with_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    """Rows of an embedding that no token uses may hold anything; the rest is still known again."""

    def base() -> Any:
        model = tiny_llama()
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = value
        return model

    folder = randomise(lk.adapt(base(), lk.LoRA(2))).save(tmp_path / "adapter")
    lk.load(base(), folder)

    other = base()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    with pytest.raises(lk.AdapterError):
        lk.load(other, folder)
