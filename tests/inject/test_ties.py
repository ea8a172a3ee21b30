"""Merging in models that tie weights: the same output, in memory and through save_pretrained."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_gpt2, tiny_llama

PAIRS = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32, "vocab_size": 40,
    "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}  # fmt: skip
NESTED = {**BERT, "num_key_value_heads": 1, "head_dim": 8}


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=NESTED,
        vision_config={**BERT, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def pair_of_berts() -> Any:
    configs = transformers.BertConfig(**BERT), transformers.BertConfig(**BERT)
    return transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs)
    )


MAKERS: dict[str, tuple[Any, str, list[str]]] = {
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "wo",
        ["shared", "decoder.embed_tokens"],
    ),
    "t5-1.1": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**T5, tie_word_embeddings=False)
        ),
        "wo",
        ["encoder.embed_tokens"],
    ),
    "umt5": (
        lambda: transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5)),
        "wo",
        ["shared", "lm_head"],
    ),
    "bart": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**PAIRS)),
        "fc1",
        ["model.shared", "model.encoder.embed_tokens", "lm_head"],
    ),
    "marian": (
        lambda: transformers.MarianMTModel(transformers.MarianConfig(**PAIRS)),
        "fc1",
        ["model.decoder.embed_tokens"],
    ),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
        "query",
        ["bert.embeddings.word_embeddings", "cls.predictions.decoder", "cls.predictions"],
    ),
    "berts": (pair_of_berts, "query", ["decoder.bert.embeddings.word_embeddings"]),
    "gpt2": (tiny_gpt2, "c_fc", ["transformer.wte"]),
    "llama": (tiny_llama, "q_proj", ["model.embed_tokens", "lm_head"]),
    "gemma3": (gemma3, "o_proj", ["lm_head"]),
}
"""How each is made, a layer that is tied to nothing, and modules that are tied; a module of several
layers is trained whole.
"""

CASES = [
    (name, path, whole)
    for name, (_, _, paths) in MAKERS.items()
    for path in paths
    for whole in (False, True)
    if whole or path != "cls.predictions"
]
SILENT = {"t5", "t5-1.1", "umt5"}
"""Those whose config cannot say that nothing is tied."""


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MAKERS[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(5, 12)[None]
    inputs = (
        {"input_ids": ids, "decoder_input_ids": ids}
        if model.config.is_encoder_decoder
        else {"input_ids": ids}
    )
    found: Tensor = model(**inputs).logits
    return found


def tied(model: Any) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lorakin" not in name:
            groups.setdefault(id(parameter), set()).add(name)
    return [group for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize(("name", "path", "whole"), CASES)
def test_saved_is_merged(name: str, path: str, whole: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = made(name)
    before, groups = model.config.to_dict(), tied(model)
    targets = MAKERS[name][1] if whole else path
    adapter = lk.adapt(model, lk.LoRA(rank=2), targets, modules_to_save=[path] if whole else [])
    randomise(adapter, scale=0.3)
    expected = logits(model)
    merged(adapter, name, permanent=False)
    check(model, expected, tmp_path / "reversible")
    adapter.unmerge()
    assert tied(model) == groups
    assert model.config.to_dict().get("tie_word_embeddings") == before.get("tie_word_embeddings")
    merged(adapter, name, permanent=True)
    check(model, expected, tmp_path / "for good")
    assert not lk.adapters(model)


def merged(adapter: lk.Adapter, name: str, permanent: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter.merge(permanent=permanent)
    announced = [warning for warning in said if issubclass(warning.category, lk.LorakinWarning)]
    assert len(announced) == (name in SILENT)


def check(model: Any, expected: Tensor, folder: Path) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_the_callers_config_stays_as_it_is() -> None:
    config = transformers.LlamaConfig(**NESTED, tie_word_embeddings=True)
    before = copy.deepcopy(config).to_dict()
    model = transformers.LlamaForCausalLM(config)
    lk.adapt(model, lk.LoRA(rank=2), "embed_tokens").merge(permanent=True)
    assert config.to_dict() == before
    assert model.config.tie_word_embeddings is False
    kept = [getattr(module, "config", None) for module in model.modules()]
    assert all(held is model.config for held in kept if held is not None), (
        "one config for all parts"
    )


def test_a_part_that_ties_by_a_config_of_its_own(tmp_path: Path) -> None:
    model = made("berts")
    given = model.config
    randomise(lk.adapt(model, lk.LoRA(rank=2), "decoder.bert.embeddings.word_embeddings")).merge(
        permanent=True
    )
    assert given.decoder.tie_word_embeddings is True
    assert (
        model.config.decoder.tie_word_embeddings
        is model.decoder.config.tie_word_embeddings
        is False
    )
    assert model.config.encoder.tie_word_embeddings is True
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.decoder.tie_word_embeddings is False


def test_names_of_one_module_are_no_tie() -> None:
    """What is one module under two names is adapted under both, and merging parts nothing."""
    model = made("bart")
    model.model.shared = model.model.encoder.embed_tokens = model.model.decoder.embed_tokens
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "model.shared"), scale=0.3)
    expected = logits(model)
    adapter.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.model.shared.weight
    assert model.config.tie_word_embeddings is False


def test_two_adapters_of_one_tie() -> None:
    """The second is merged into a weight that the first merge has separated, and both find their ties
    again.
    """
    model = made("bart")
    groups = tied(model)
    one = randomise(lk.adapt(model, lk.LoRA(rank=2), "shared", name="one"), scale=0.3)
    two = randomise(lk.adapt(model, lk.LoRA(rank=2), "encoder.embed_tokens", name="two"), scale=0.3)
    lk.activate(model, ["one", "two"])
    expected = logits(model)
    one.merge()
    two.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    one.unmerge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    two.unmerge()
    assert tied(model) == groups
    one.merge(permanent=True)
    two.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    two.remove()
    assert model.config.tie_word_embeddings is False


def test_a_copy_of_a_merged_model_finds_its_ties_again() -> None:
    model = made("bart")
    randomise(lk.adapt(model, lk.LoRA(rank=2), "shared")).merge()
    twin = copy.deepcopy(model)
    lk.adapters(twin)["default"].unmerge()
    assert len(tied(twin)) == 1
    assert twin.config.tie_word_embeddings is True
    assert model.config.tie_word_embeddings is False
