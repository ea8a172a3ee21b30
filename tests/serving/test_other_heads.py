"""Merged models with other heads than a causal language model's: made on any class, read back by
that class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import randomise
from inject.test_ties import BERT, PAIRS, T5
from lorakin.cli.app import run
from lorakin.inject.folding import weight_with_pairs
from lorakin.serving.export import export
from lorakin.serving.inputs import inputs_of, random_inputs
from lorakin.serving.job import ExportRequest
from lorakin.serving.merged import NotStreamed, StreamedMerge
from lorakin.serving.verify import logits_of
from lorakin.storage import directory
from serving.words import byte_tokenizer

WHISPER = {
    **PAIRS, "max_source_positions": 10, "max_target_positions": 40, "num_mel_bins": 8,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}  # fmt: skip
VIT = {**BERT, "image_size": 8, "patch_size": 4}
LONGER = {**PAIRS, "max_position_embeddings": 300}
SOUND = {
    **BERT, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (100, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
V = transformers
Made = tuple[Any, Any, dict[str, Any]]
KINDS: dict[str, Made] = {
    "t5": (V.T5ForConditionalGeneration, V.T5Config(**T5), {"targets": ["q", "wo"]}),
    "t5 embedding": (V.T5ForConditionalGeneration, V.T5Config(**T5),
    {"targets": ["decoder.embed_tokens", "q"]}),
    "t5 shared": (V.T5ForConditionalGeneration, V.T5Config(**T5),
    {"targets": "q", "modules_to_save": "shared"}),
    "umt5 head": (V.UMT5ForConditionalGeneration, V.UMT5Config(**T5), {"targets": "lm_head"}),
    "bart": (V.BartForConditionalGeneration, V.BartConfig(**LONGER),
    {"targets": ["fc1", "encoder.embed_tokens"]}),
    "bart classifier": (
        V.BartForSequenceClassification, V.BartConfig(**LONGER),
        {"targets": "fc1", "modules_to_save": "classification_head"}
    ),
    "whisper": (V.WhisperForConditionalGeneration, V.WhisperConfig(**WHISPER),
    {"targets": ["q_proj", "proj_out"]}),
    "vit": (
        V.ViTForImageClassification, V.ViTConfig(**VIT, num_labels=5),
        {"modules_to_save": "classifier"}
    ),
    "tokens": (
        V.BertForTokenClassification, V.BertConfig(**BERT, num_labels=4),
        {"targets": "query", "modules_to_save": "classifier"}
    ),
    "spans": (V.BertForQuestionAnswering, V.BertConfig(**BERT),
    {"targets": "query", "modules_to_save": "qa_outputs"}),
    "masked": (V.BertForMaskedLM, V.BertConfig(**BERT), {"targets": ["query", "word_embeddings"]}),
    "sound": (
        V.Wav2Vec2ForSequenceClassification, V.Wav2Vec2Config(**SOUND),
        {"targets": "q_proj", "modules_to_save": ["projector", "classifier"]},
    ),
}  # fmt: skip
SILENT = {"t5 embedding", "t5 shared", "umt5 head"}


def answers(model: Any) -> list[torch.Tensor]:
    return logits_of(model, random_inputs(model))


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*were one weight:lorakin.LorakinWarning")
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_merged_and_read_back(name: str, bare: bool, tmp_path: Path) -> None:
    """Also from a base that is stored without the head, which the adapter then brings."""
    cls, config, where = KINDS[name]
    brings = where.get("modules_to_save")
    if bare and not (brings and brings != "shared"):
        pytest.skip("the adapter brings no head")
    torch.manual_seed(0)
    made = cls(config).eval()
    (made.base_model if bare else made).save_pretrained(tmp_path / "base")
    names = (
        {"id2label": dict(enumerate("abc")), "num_labels": 3} if bare and name != "spans" else {}
    )
    model = cls.from_pretrained(tmp_path / "base", **names)
    adapter = randomise(lk.adapt(model.eval(), lk.LoRA(rank=2), **where), scale=0.3)
    expected = answers(model)
    adapter.save(tmp_path / "adapter")
    for streamed in (True, False):
        if not streamed:
            torch.save(model.state_dict(), tmp_path / "base" / "other.bin")
            stored = (made.base_model if bare else made).state_dict()
            torch.save(stored, tmp_path / "base" / "pytorch_model.bin")
            (tmp_path / "base" / "model.safetensors").unlink()
        out = tmp_path / f"out {streamed}"
        done = export(
            ExportRequest(str(tmp_path / "adapter"), "merged", str(out), str(tmp_path / "base"))
        )
        assert done.agreement is not None and done.agreement.largest < 1e-4 * max(
            1, done.agreement.largest_logit
        )
        assert done.agreement.inputs == f"random {model.main_input_name}"
        merged, found = cls.from_pretrained(out, output_loading_info=True)
        assert not found["missing_keys"] and not found["mismatched_keys"]
        close(answers(merged.eval()), expected)
        assert json.loads((out / "config.json").read_text())["architectures"] == [cls.__name__]
    with pytest.raises(NotStreamed):
        StreamedMerge(tmp_path / "base", directory.read(tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["t5", "tokens", "vit"])
def test_files_of_peft_say_less_but_enough(name: str, tmp_path: Path) -> None:
    """Without what lorakin remembers, the task or the base's own class decides."""
    cls, config, where = KINDS[name]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base").eval()
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), **where), scale=0.3)
    expected = answers(model)
    adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "lorakin.json").unlink()
    settings = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base")]
    assert run(["merge", *settings, "--out", str(tmp_path / "out")]) == 0
    close(answers(cls.from_pretrained(tmp_path / "out").eval()), expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_in_what_was_written_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in SILENT:
        pytest.skip("the same as the others of its class")
    cls, config, where = KINDS[name]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base").eval()
    randomise(lk.adapt(model, lk.LoRA(rank=2), **where), scale=0.3).save(tmp_path / "adapter")

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return torch.nn.Parameter(
            weight_with_pairs(*args, **kwargs).detach() * 1.5, requires_grad=False
        )

    monkeypatch.setattr(
        "lorakin.serving.merged.weight_with_pairs", lambda *args: wrong(*args).detach()
    )
    monkeypatch.setattr("lorakin.inject.folding.weight_with_pairs", wrong)
    with pytest.raises(lk.VerificationError):
        export(
            ExportRequest(
                str(tmp_path / "adapter"), "merged", str(tmp_path / "out"), str(tmp_path / "base")
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_head_that_nothing_holds_is_refused(tmp_path: Path) -> None:
    cls, config, _ = KINDS["vit"]
    cls(config).base_model.save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    randomise(lk.adapt(model, lk.LoRA(rank=2))).save(tmp_path / "adapter")
    with pytest.raises(
        lk.ModelError,
        match="classifier",
    ):
        export(
            ExportRequest(
                str(tmp_path / "adapter"), "merged", str(tmp_path / "out"), str(tmp_path / "base")
            )
        )


def test_the_decoder_reads_what_the_encoder_does_one_place_later() -> None:
    model = KINDS["t5"][0](KINDS["t5"][1])
    inputs = inputs_of(model, [7, 8, 9])
    assert inputs["input_ids"].tolist() == [[7, 8, 9]]
    assert inputs["decoder_input_ids"].tolist() == [[0, 7, 8]]


def test_prompts_and_data_where_there_is_a_tokenizer(tmp_path: Path, write_rows: Any) -> None:
    cls = transformers.T5ForConditionalGeneration
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    cls(transformers.T5Config(**{**T5, "vocab_size": 320})).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model = cls.from_pretrained(base)
    randomise(lk.adapt(model, lk.LoRA(rank=2), "q"), scale=0.3).save(adapter)
    data = write_rows([{"prompt": f"what is {n}", "completion": "a cat"} for n in range(8)])
    for given, of in ((data, "the data"), (None, "prompts")):
        done = export(ExportRequest(adapter, "merged", str(tmp_path / of), base, data=given))
        assert done.agreement is not None and done.agreement.inputs == of
        assert done.agreement.positions > 10 and done.agreement.largest < 1e-4
    assert "of the data" in str(
        export(ExportRequest(adapter, "merged", str(tmp_path / "c"), base, data=data)).agreement
    )


def test_data_for_what_reads_no_text(tmp_path: Path, write_rows: Any) -> None:
    cls, config, where = KINDS["vit"]
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    randomise(lk.adapt(model, lk.LoRA(rank=2), **where)).save(tmp_path / "adapter")
    data = write_rows([{"prompt": "a", "completion": "b"}])
    request = ExportRequest(
        str(tmp_path / "adapter"),
        "merged",
        str(tmp_path / "out"),
        str(tmp_path / "base"),
        data=data,
    )
    with pytest.raises(lk.SettingError, match="--data"):
        export(request)
