"""Adapters made under transformers 4, whose modules have other names today.

The change of the base's weights is the truth.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as T
from torch import Tensor

import lorakin as lk
from conftest import tiny_llama, tiny_mixtral

IDS = torch.arange(10, 26)[None]
PIXELS = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SEEN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
}


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def qwen_moe() -> Any:
    sizes = {
        **TEXT,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }
    config = T.Qwen2MoeConfig(
        **sizes, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, initializer_range=0.2
    )
    return made(T.Qwen2MoeForCausalLM, config)


def llava() -> Any:
    vision = T.CLIPVisionConfig(**SEEN, patch_size=8)
    config = T.LlavaConfig(
        vision_config=vision, text_config=T.LlamaConfig(**TEXT), image_token_index=5
    )
    return made(T.LlavaForConditionalGeneration, config)


def qwen_vl() -> Any:
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 4,
        "hidden_size": 32,
        "patch_size": 8,
        "spatial_merge_size": 1,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": rope}
    return made(
        T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


def vit() -> Any:
    return made(T.ViTForImageClassification, T.ViTConfig(**SEEN, patch_size=8, num_labels=3))


def half(number: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.chunk(2)[number]


def experts(
    first: str, up: str, down: str, layer: str, now: str, count: int = 4
) -> dict[str, tuple[str, Any, Any]]:
    """v4's path → the parameter today, the index in it, and which part of that."""
    places: dict[str, tuple[str, Any, Any]] = {}
    for n in range(count):
        places[f"{layer}.experts.{n}.{first}"] = (f"{now}.experts.gate_up_proj", n, half(0))
        places[f"{layer}.experts.{n}.{up}"] = (f"{now}.experts.gate_up_proj", n, half(1))
        places[f"{layer}.experts.{n}.{down}"] = (f"{now}.experts.down_proj", n, None)
    return places


def plain(names: Mapping[str, str]) -> dict[str, tuple[str, Any, Any]]:
    return {old: (f"{new}.weight", None, None) for old, new in names.items()}


MIXTRAL = {
    old: place
    for layer in range(2)
    for old, place in experts(
        "w1", "w3", "w2", f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
    ).items()
}
ROUTERS = plain(
    {f"model.layers.{n}.block_sparse_moe.gate": f"model.layers.{n}.mlp.gate" for n in range(2)}
)
ATTENTION = plain(
    {f"model.layers.{n}.self_attn.q_proj": f"model.layers.{n}.self_attn.q_proj" for n in range(2)}
)
QWEN = experts(
    "gate_proj", "up_proj", "down_proj", "model.layers.0.mlp", "model.layers.0.mlp"
) | plain(
    {
        f"model.layers.0.mlp.shared_expert.{n}": f"model.layers.0.mlp.shared_expert.{n}"
        for n in ("gate_proj", "up_proj")
    }
    | {"model.layers.0.mlp.shared_expert.down_proj": "model.layers.0.mlp.shared_expert.down_proj"}
)
Q = "layers.0.self_attn.q_proj"
LLAVA = plain(
    {
        f"language_model.model.{Q}": f"model.language_model.{Q}",
        f"vision_tower.vision_model.encoder.{Q}": f"model.vision_tower.encoder.{Q}",
    }
)
VIT = plain(
    {
        "vit.encoder.layer.0.attention.attention.query": "vit.layers.0.attention.q_proj",
        "vit.encoder.layer.0.attention.output.dense": "vit.layers.0.attention.o_proj",
        "vit.encoder.layer.0.intermediate.dense": "vit.layers.0.mlp.fc1",
        "vit.encoder.layer.0.output.dense": "vit.layers.0.mlp.fc2",
    }
)
QWEN_VL = plain(
    {
        "model.layers.0.self_attn.q_proj": "model.language_model.layers.0.self_attn.q_proj",
        "visual.blocks.0.attn.proj": "model.visual.blocks.0.attn.proj",
    }
)
TOKENS, SIGHT = {"input_ids": IDS}, {"pixel_values": PIXELS}
FOUR = ["w1", "w2", "w3", "q_proj"]
PATTERNS = {"rank_pattern": {"w1": 3, r".*\.experts\.2\.w2": 5}, "alpha_pattern": {"w3": 7}}
# The last says whether PEFT 0.21.2 reads it right: it drops shared experts, Qwen2-VL's and ViT's
# names, and scales of patterns.
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    "mixtral": (tiny_mixtral, MIXTRAL | ATTENTION, {"target_modules": FOUR}, TOKENS, True),
    "mixtral, router": (
        tiny_mixtral,
        MIXTRAL | ROUTERS,
        {"target_modules": ["w1", "w2", "w3", "gate"]},
        TOKENS,
        True,
    ),
    "mixtral, expression": (
        tiny_mixtral,
        MIXTRAL,
        {"target_modules": r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w[123]"},
        TOKENS,
        False,
    ),
    "mixtral, rslora": (
        tiny_mixtral,
        MIXTRAL,
        {"target_modules": FOUR[:3], "use_rslora": True},
        TOKENS,
        False,
    ),
    "mixtral, patterns": (
        tiny_mixtral,
        MIXTRAL,
        {"target_modules": FOUR[:3], **PATTERNS},
        TOKENS,
        False,
    ),
    "mixtral, patterns, rslora": (
        tiny_mixtral,
        MIXTRAL,
        {"target_modules": FOUR[:3], **PATTERNS, "use_rslora": True},
        TOKENS,
        False,
    ),
    "mixtral, one half": (
        tiny_mixtral,
        {p: at for p, at in MIXTRAL.items() if p.endswith("w3")},
        {"target_modules": ["w3"]},
        TOKENS,
        False,
    ),
    "mixtral, one layer": (
        tiny_mixtral,
        {p: at for p, at in MIXTRAL.items() if "layers.1" in p},
        {"target_modules": FOUR[:3], "layers_to_transform": [1], "layers_pattern": "layers"},
        TOKENS,
        False,
    ),
    "qwen2-moe": (
        qwen_moe,
        QWEN,
        {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
        TOKENS,
        False,
    ),
    "llava": (llava, LLAVA, {"target_modules": ["q_proj"]}, TOKENS, True),
    "llava, paths": (llava, LLAVA, {"target_modules": list(LLAVA)}, TOKENS, False),
    "qwen2-vl": (qwen_vl, QWEN_VL, {"target_modules": ["q_proj", "attn.proj"]}, TOKENS, False),
    "vit": (vit, VIT, {"target_modules": ["query", "dense"]}, SIGHT, False),
}


def value(patterns: Mapping[str, int], path: str, usual: int) -> int:
    import re

    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual
    )


def write(path: Path, model: Any, places: Mapping[str, Any], settings: dict[str, Any]) -> Any:
    """A file of then, of rank 2 and alpha 6; returns the model with its change in the weights."""
    changed, tensors = copy.deepcopy(model), {}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", **settings}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for old, (parameter, number, part) in places.items():
            weight = changed.get_parameter(parameter)
            weight = weight if number is None else weight[number]
            weight = weight if part is None else part(weight)
            rank, alpha = (
                value(settings.get(f, {}), old, u)
                for f, u in (("rank_pattern", 2), ("alpha_pattern", 6))
            )
            A = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
            B = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
            (
                tensors[f"base_model.model.{old}.lora_A.weight"],
                tensors[f"base_model.model.{old}.lora_B.weight"],
            ) = A, B
            weight += alpha / (rank**0.5 if settings.get("use_rslora") else rank) * B @ A
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return changed


@pytest.mark.filterwarnings("error::lorakin.errors.LorakinWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_file_of_transformers_4(name: str, tmp_path: Path) -> None:
    make, places, settings, batch, _ = CASES[name]
    model = make()
    changed = write(tmp_path, model, places, settings)
    before = model(**batch).logits
    adapter = lk.load(model, tmp_path)
    torch.testing.assert_close(model(**batch).logits, changed(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**batch).logits, before, rtol=1e-3, atol=1e-4)
    again = make()
    lk.load(again, adapter.save(tmp_path / "again"))
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[-1]])
def test_as_peft_reads_it(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, places, settings, batch, _ = CASES[name]
    model = make()
    write(tmp_path, model, places, settings)
    adapter = lk.load(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-5)
    back = peft.PeftModel.from_pretrained(make(), adapter.save(tmp_path / "again")).eval()
    torch.testing.assert_close(model(**batch).logits, back(**batch).logits, rtol=1e-4, atol=1e-5)


def dinov2() -> Any:
    return made(
        T.Dinov2ForImageClassification,
        T.Dinov2Config(**SEEN, patch_size=8, num_labels=3, use_swiglu_ffn=True),
    )


def deepseek() -> Any:
    sizes = {
        **TEXT,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
    }
    heads = {
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    }
    routed = {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
    }
    return made(T.DeepseekV3ForCausalLM, T.DeepseekV3Config(**sizes, **heads, **routed))


@pytest.mark.parametrize(
    ("make", "batch"),
    [(dinov2, SIGHT), (deepseek, TOKENS), (tiny_mixtral, TOKENS), (llava, TOKENS), (vit, SIGHT)],
    ids=["dinov2", "deepseek", "mixtral", "llava", "vit"],
)
def test_as_transformers_loads_the_changed_checkpoint(
    make: Callable[[], Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    """Every weight with another name in a checkpoint gets a pair.

    Transformers loads the one where they are merged.
    """
    model = make()
    model.save_pretrained(tmp_path / "base")
    weights = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    today, generator = dict(model.named_parameters()), torch.Generator().manual_seed(2)
    renamed = [
        k
        for k, t in weights.items()
        if k.endswith(".weight") and t.dim() == 2 and k not in today and "embed" not in k
    ]
    assert renamed
    pairs = {}
    for key in renamed:
        outputs, inputs = weights[key].shape
        A, B = (
            torch.randn(2, inputs, generator=generator) * 0.2,
            torch.randn(outputs, 2, generator=generator) * 0.2,
        )
        name = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        pairs |= {f"{name}A.weight": A, f"{name}B.weight": B}
        weights[key] = weights[key] + 2 * B @ A
    safetensors.torch.save_file(
        weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"}
    )
    merged = type(model).from_pretrained(tmp_path / "base").eval()
    (tmp_path / "adapter").mkdir()
    safetensors.torch.save_file(pairs, tmp_path / "adapter" / "adapter_model.safetensors")
    targets = [key.removesuffix(".weight") for key in renamed]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lk.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-5)


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any], **settings: Any) -> None:
    tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | settings))


W1 = "base_model.model.model.layers.0.block_sparse_moe.experts.2.w1.lora_{}.weight"


@pytest.mark.parametrize(
    ("edit", "settings", "message"),
    [
        (
            lambda t: [t.pop(W1.format(s)) for s in "AB"],
            {},
            r"targets model.*experts.2.w1, but the file has no tensors",
        ),
        (lambda t: t.pop(W1.format("B")), {}, "experts.2.w1 has A .*expected a pair of rank 2"),
        (lambda t: t.update({W1.format("A"): torch.ones(3, 32)}), {}, "expected a pair of rank 2"),
        (lambda t: t.update({W1.format("B"): torch.ones(47, 2)}), {}, "does not fill it"),
        (lambda t: t.update({W1.format("A"): torch.ones(2, 31)}), {}, "expected a pair of rank 2"),
        (
            lambda t: None,
            {"target_modules": ["w1", "w2"]},
            "has tensors for .* which the config does not target",
        ),
    ],
)
def test_a_damaged_file(edit: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny_mixtral()
    write(tmp_path, model, MIXTRAL, {"target_modules": ["w1", "w2", "w3"]})
    change(tmp_path, edit, **settings)
    with pytest.raises(lk.AdapterError, match=message):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)


def test_modules_trained_whole_are_renamed_too(tmp_path: Path) -> None:
    model = llava()
    changed = write(tmp_path, model, LLAVA, {"target_modules": ["q_proj"]})
    head = torch.randn(64, 32, generator=torch.Generator().manual_seed(7)) * 0.1
    change(
        tmp_path,
        lambda t: t.update({"base_model.model.language_model.lm_head.weight": head}),
        modules_to_save=["lm_head"],
    )
    changed.lm_head.weight.data.copy_(head)
    assert list(lk.load(model, tmp_path).placement.whole_modules) == ["lm_head"]
    torch.testing.assert_close(model(IDS).logits, changed(IDS).logits, rtol=1e-4, atol=1e-5)


def test_dora_of_parts(tmp_path: Path) -> None:
    """Rows are rows: the magnitudes of two halves are those of the whole."""
    model, changed = tiny_mixtral(), tiny_mixtral()
    write(tmp_path, model, MIXTRAL, {"target_modules": ["w1", "w2", "w3"], "use_dora": True})
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        for old, (parameter, number, part) in MIXTRAL.items():
            weight = changed.get_parameter(parameter)[number]
            weight = weight if part is None else part(weight)
            key = f"base_model.model.{old}.lora_"
            m = torch.rand(len(weight), generator=torch.Generator().manual_seed(number)) + 0.5
            tensors[f"{key}magnitude_vector"] = m
            new = weight + 3 * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
            weight.copy_((m / new.norm(dim=1))[:, None] * new)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    lk.load(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, changed(IDS).logits, rtol=1e-4, atol=1e-4)


def test_transformers_is_not_imported_for_it(tmp_path: Path) -> None:
    write(tmp_path, tiny_llama(), ATTENTION, {"target_modules": ["q_proj"]})
    code = f"""
        import sys, torch, lorakin as lk
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        try:
            lk.load(model, {str(tmp_path)!r})
        except lk.AdapterError as error:
            assert "transformers" not in sys.modules, "imported"
            assert "it is for another base model" in str(error)
        else:
            raise SystemExit("it was loaded")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
