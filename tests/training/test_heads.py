"""A stored classifier's head on other classes, and weights in a base's files that its class does
not use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorakin as lk
from conftest import tiny_bert, tiny_llama
from lorakin.errors import LorakinWarning
from lorakin.training import models, with_adapter


@pytest.fixture
def classifier(tmp_path: Path, tokenizer: Any) -> Path:
    """A trained classifier of two named classes."""
    folder = tmp_path / "classifier"
    model = tiny_bert()
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def head_of(folder: Path, labels: Sequence[str]) -> Any:
    return models.load_model(str(folder), "float32", labels).model.classifier


def test_the_same_classes_keep_the_head(classifier: Path) -> None:
    loaded = models.load_model(str(classifier), "float32", ["neg", "pos"])
    assert loaded.note is None and loaded.fresh == ()
    assert torch.equal(loaded.model.classifier.weight, tiny_bert().classifier.weight)
    assert torch.equal(loaded.model.classifier.bias, tiny_bert().classifier.bias)


def test_another_number_of_classes_has_a_new_head(classifier: Path) -> None:
    with pytest.warns(
        LorakinWarning,
    ):
        loaded = models.load_model(str(classifier), "float32", ["a", "b", "c"])
    assert (
        loaded.model.classifier.weight.shape == (3, 32) and not loaded.model.classifier.bias.any()
    )
    assert loaded.model.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.fresh == (
        "classifier",
    )
    assert torch.equal(loaded.model.bert.pooler.dense.weight, tiny_bert().bert.pooler.dense.weight)


def test_the_same_classes_in_another_order_move_their_rows(classifier: Path) -> None:
    with pytest.warns(
        LorakinWarning,
    ):
        head = head_of(classifier, ["pos", "neg"])
    assert torch.equal(head.weight, tiny_bert().classifier.weight[[1, 0]])
    assert torch.equal(head.bias, tiny_bert().classifier.bias[[1, 0]])


def test_other_classes_of_the_same_number_have_a_new_head(classifier: Path) -> None:
    with pytest.warns(LorakinWarning):
        head = head_of(classifier, ["cat", "dog"])
    assert (
        not head.bias.any() and not torch.isclose(head.weight, tiny_bert().classifier.weight).any()
    )
    assert float(head.weight.detach().std()) == pytest.approx(
        0.02, rel=0.5
    )  # as a new one is drawn


def test_classes_without_names_say_nothing(tmp_path: Path, tokenizer: Any) -> None:
    tiny_bert().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(head_of(tmp_path, ["no", "yes"]).weight, tiny_bert().classifier.weight)


def test_an_adapters_own_head_is_not_announced_as_new(classifier: Path, tmp_path: Path) -> None:
    with pytest.warns(LorakinWarning):
        model = models.load_model(str(classifier), "float32", ["a", "b", "c"]).model
    adapter = lk.adapt(model, lk.LoRA(2), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    want = model(torch.arange(3, 9).view(1, -1)).logits
    adapter.save(tmp_path / "adapter")
    again = with_adapter.load_with_adapter(
        str(classifier), str(tmp_path / "adapter"), "float32"
    ).model
    assert torch.allclose(again(torch.arange(3, 9).view(1, -1)).logits, want, atol=1e-6)


@pytest.fixture
def language(tmp_path: Path, tokenizer: Any) -> Path:
    folder = tmp_path / "language"
    tiny_llama(tied=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def put(folder: Path, *keys: str) -> None:
    state = load_file(folder / "model.safetensors") | {key: torch.ones(2) for key in keys}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.1.mlp.up_proj.weight.absmax",
        "model.layers.2.mlp.up_proj.weight",
        "layers.2.mlp.up_proj.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
@pytest.mark.parametrize("labels", [None, ["a", "b"]])
def test_weights_inside_the_model_that_it_does_not_use(
    key: str, labels: list[str] | None, language: Path
) -> None:
    put(language, key)
    if labels and key == "lm_head.bias":  # a part of the head, as which it is not loaded
        models.load_model(str(language), "float32", labels)
        return
    with pytest.raises(
        lk.ModelError,
        match=rf"holds {key}, which a Llama.* does not use.*Save the model without them",
    ):
        models.load_model(str(language), "float32", labels)


def test_fewer_layers_than_are_stored(language: Path) -> None:
    config = language / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(lk.ModelError, match=r"model\.layers\.1"):
        models.load_model(str(language), "float32")


def test_parts_beside_the_model_are_said_where_its_class_is_the_stored_one(language: Path) -> None:
    put(language, "v_head.summary.weight")
    with pytest.warns(LorakinWarning, match=r"v_head\.summary\.weight"):
        loaded = models.load_model(str(language), "float32")
    assert torch.equal(loaded.model.lm_head.weight, tiny_llama(tied=False).lm_head.weight)
    models.load_model(
        str(language), "float32", ["a", "b"]
    )  # a head of another class: usual, and not said


def test_a_part_of_a_head_that_the_class_does_not_have(tmp_path: Path, tokenizer: Any) -> None:
    """BERT's own files hold the head for the next sentence inside `cls`, where a masked language
    model has another.
    """
    torch.manual_seed(0)
    settings = tiny_bert().config.to_dict() | {"architectures": ["BertForPreTraining"]}
    transformers.BertForPreTraining(transformers.BertConfig(**settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), "float32", cls=transformers.BertForMaskedLM)
    assert loaded.fresh == ()
    put(tmp_path, "cls.predictions.transform.dense.lora_A.weight")
    with pytest.raises(lk.ModelError, match=r"cls\.predictions\.transform\.dense\.lora_A\.weight"):
        models.load_model(str(tmp_path), "float32", cls=transformers.BertForMaskedLM)


def test_remains_in_quantised_files_are_said(language: Path) -> None:
    from lorakin.training import heads

    model = tiny_llama(tied=False)
    with pytest.warns(LorakinWarning, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
        heads.check_unused("x", model, ["model.layers.0.mlp.up_proj.bias"], [], quantised=True)
    with pytest.raises(lk.ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
        heads.check_unused("x", model, ["model.layers.0.mlp.up_proj.bias"], [])


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.masked_bias",
        "model.version",
    ],
)
def test_buffers_of_earlier_versions_are_nothing(key: str, language: Path) -> None:
    put(language, key)
    models.load_model(str(language), "float32")


def test_a_classifier_is_no_language_model(classifier: Path) -> None:
    with pytest.raises(lk.ModelError, match=r"cls\.predictions"):
        models.load_model(str(classifier), "float32")
