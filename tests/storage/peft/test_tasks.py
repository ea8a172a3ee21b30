"""PEFT's task_type in our files.

PEFT loads them and calls the model with our logits, whatever was trained whole.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_llama
from lorakin.storage.peft.tasks import is_classifiers, task_of

IDS = torch.arange(5, 12)[None]
BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SEEN = {**TEXT, "image_size": 16, "patch_size": 8}


def made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return cls(config).eval()


def whisper(cls: Any = T.WhisperForConditionalGeneration) -> Any:
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2))
    }
    sizes |= {
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_source_positions": 20,
        "max_target_positions": 20,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    return made(cls, T.WhisperConfig(vocab_size=64, num_mel_bins=8, d_model=16, **sizes, **special))


def llava() -> Any:
    vision = T.CLIPVisionConfig(**{**SEEN, "projection_dim": 16})
    return made(
        T.LlavaForConditionalGeneration,
        T.LlavaConfig(
            vision_config=vision, text_config=T.LlamaConfig(**TEXT), image_token_index=63
        ),
    )


def t5() -> Any:
    sizes = {
        "vocab_size": 64,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    return made(
        T.T5ForConditionalGeneration, T.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)
    )


def bert(cls: Any) -> Any:
    return made(cls, T.BertConfig(**BERT, num_labels=2, is_decoder=cls is T.BertLMHeadModel))


def distilbert() -> Any:
    config = T.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    return made(T.DistilBertForSequenceClassification, config)


def speaker() -> Any:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    ears = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "num_conv_pos_embeddings": 4}
    more = {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1}
    return made(T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**sizes, **ears, **more))


IDS_ONLY = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
WITH_DECODER = {"input_ids": IDS, "decoder_input_ids": IDS + 1}
HEARD = {"input_features": torch.linspace(-1, 1, 320).view(1, 8, 40), "decoder_input_ids": IDS}
TYPED = {"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)}
CASES: dict[str, tuple[Callable[[], Any], list[str], list[str], dict[str, Any], str | None]] = {
    "llama": (tiny_llama, ["q_proj"], [], IDS_ONLY, "CAUSAL_LM"),
    "bert as decoder": (lambda: bert(T.BertLMHeadModel), ["query"], [], IDS_ONLY, "CAUSAL_LM"),
    "llava": (llava, ["q_proj"], [], IDS_ONLY, "CAUSAL_LM"),
    "t5": (t5, ["q"], [], WITH_DECODER, "SEQ_2_SEQ_LM"),
    "whisper": (whisper, ["q_proj"], [], HEARD, None),
    "no head": (lambda: bert(T.BertModel), ["query"], [], TYPED, None),
    "masked": (lambda: bert(T.BertForMaskedLM), ["query"], [], TYPED, None),
    "classifier": (
        lambda: bert(T.BertForSequenceClassification),
        ["query"],
        ["classifier"],
        TYPED,
        "SEQ_CLS",
    ),
    "classifier and norms": (
        lambda: bert(T.BertForSequenceClassification),
        ["query"],
        ["classifier", "LayerNorm"],
        TYPED,
        "SEQ_CLS",
    ),
    "classifier without its head": (
        lambda: bert(T.BertForSequenceClassification),
        ["query"],
        ["LayerNorm"],
        TYPED,
        None,
    ),
    "classifier and its pooler": (
        lambda: bert(T.BertForSequenceClassification),
        ["query"],
        ["pooler"],
        TYPED,
        None,
    ),
    "head adapted": (
        lambda: bert(T.BertForSequenceClassification),
        ["query", "classifier"],
        [],
        TYPED,
        None,
    ),
    "both parts of the head": (
        distilbert,
        ["q_lin"],
        ["classifier", "pre_classifier"],
        IDS_ONLY,
        "SEQ_CLS",
    ),
    "tokens": (
        lambda: bert(T.BertForTokenClassification),
        ["query"],
        ["classifier"],
        TYPED,
        "TOKEN_CLS",
    ),
    "tokens without the head": (
        lambda: bert(T.BertForTokenClassification),
        ["query"],
        ["LayerNorm"],
        TYPED,
        None,
    ),
    "answers": (lambda: bert(T.BertForQuestionAnswering), ["query"], ["qa_outputs"], TYPED, None),
    "answers without the head": (
        lambda: bert(T.BertForQuestionAnswering),
        ["query"],
        ["LayerNorm"],
        TYPED,
        None,
    ),
    "sound": (
        speaker,
        ["q_proj"],
        ["classifier"],
        {"input_values": torch.linspace(-1, 1, 400)[None]},
        None,
    ),
}


def first(output: Any) -> torch.Tensor:
    return output[0] if "logits" not in output else output["logits"]


@pytest.mark.peer
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_and_calls_it(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, targets, whole, batch, task = CASES[name]
    model = make()
    randomise(lk.adapt(model, lk.LoRA(rank=2), targets, modules_to_save=whole)).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(first(theirs(**batch)), first(model(**batch)), rtol=1e-5, atol=1e-5)


def test_a_classifiers_files_are_known() -> None:
    whole = {"modules_to_save": ["classifier"]}
    assert is_classifiers({"task_type": "SEQ_CLS"}, None)
    assert is_classifiers(whole, "DistilBertForSequenceClassification")
    assert not is_classifiers(whole, "BertForTokenClassification")
    assert not is_classifiers({"modules_to_save": ["LayerNorm"]}, "BertForSequenceClassification")
    assert not is_classifiers({"task_type": "CAUSAL_LM"}, None)


def test_half_of_the_head_is_none() -> None:
    """PEFT takes DistilBERT's pre_classifier for its head too."""
    assert task_of(distilbert(), ["classifier"]) is None
    assert task_of(distilbert(), ["classifier", "pre_classifier"]) == "SEQ_CLS"


def test_a_module_that_is_no_transformers_model(tmp_path: Path) -> None:
    class MyForCausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

    randomise(lk.adapt(MyForCausalLM(), lk.LoRA(rank=2), "inner")).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    randomise(lk.adapt(tiny_bert(), lk.LoRA(rank=2), "query")).save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None


@pytest.mark.peer
def test_what_peft_takes_for_the_head_by_its_name_is_in_the_file(tmp_path: Path) -> None:
    """PEFT wraps "pre_classifier" where "classifier" is to be saved, and fails without it."""
    peft = pytest.importorskip("peft")

    def make() -> Any:
        torch.manual_seed(0)
        config = T.DistilBertConfig(
            vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48, num_labels=3
        )
        return T.DistilBertForSequenceClassification(config).eval()

    model, ids = make(), torch.arange(5, 13).view(2, 4)
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), ["q_lin"], modules_to_save=["classifier"]))
    want = model(ids).logits
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-5, atol=1e-6)
    loaded = make()
    assert lk.load(loaded, tmp_path).placement.whole_modules == ("classifier",)
    torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-5, atol=1e-6)
    adapter.restore(tmp_path)
    (tmp_path / "lorakin.json").unlink()
    other = make()
    assert lk.load(other, tmp_path).placement.whole_modules == ("pre_classifier", "classifier")
    torch.testing.assert_close(other(ids).logits, want, rtol=1e-5, atol=1e-6)
