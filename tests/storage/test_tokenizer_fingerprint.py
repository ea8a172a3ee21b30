"""Another vocabulary is another base; another template, or another way of cutting text, is said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import lorakin as lk
from conftest import TEMPLATE, WORDS, randomise, tiny_llama
from lorakin.errors import LorakinWarning
from lorakin.storage import tokenizer_fingerprint
from lorakin.training.models import load_model
from lorakin.training.with_adapter import load_with_adapter


@pytest.fixture
def saved(model_dir: str, tmp_path: Path) -> Path:
    return randomise(lk.adapt(load_model(model_dir, "float32").model, lk.LoRA(2))).save(
        tmp_path / "adapter"
    )


@pytest.fixture
def folder(model_dir: str, tmp_path: Path, tokenizer: Any) -> Callable[..., str]:
    """The same model with another tokenizer beside it."""

    def make(change: Callable[[Any], Any]) -> str:
        place = tmp_path / "model"
        load_model(model_dir, "float32").model.save_pretrained(place)
        changed = copy.deepcopy(tokenizer)
        (change(changed) or changed).save_pretrained(place)
        return str(place)

    return make


def loads(folder: str, adapter: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_with_adapter(folder, str(adapter), "float32")


def test_the_same_tokenizer_is_not_mentioned(
    model_dir: str, saved: Path, folder: Callable[..., str]
) -> None:
    loads(model_dir, saved)
    loads(folder(lambda tokenizer: None), saved)


def test_other_words_are_another_base(
    saved: Path, folder: Callable[..., str], tokenizer: Any
) -> None:
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words[-2:] = reversed(words[-2:])  # behind the last power of two

    def swapped(_: Any) -> Any:
        raw = Tokenizer(
            WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
        )
        raw.pre_tokenizer = WhitespaceSplit()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, unk_token="<unk>", chat_template=TEMPLATE
        )

    place = folder(swapped)
    found = tokenizer.get_vocab()
    assert len(found) == len(WORDS) + 6
    with pytest.warns(LorakinWarning, match="words"):
        load_with_adapter(place, str(saved), "float32")
    words[10:12] = reversed(words[10:12])
    with pytest.raises(
        lk.AdapterError,
        match="words.*--other-base",
    ):
        load_with_adapter(folder(swapped), str(saved), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_with_adapter(place, str(saved), "float32", other_base=True)


def test_more_words_are_said(saved: Path, folder: Callable[..., str]) -> None:
    place = folder(lambda tokenizer: tokenizer.add_tokens(["more"]) and None)
    with pytest.warns(
        LorakinWarning,
        match="words",
    ):
        load_with_adapter(place, str(saved), "float32")


def test_another_way_of_cutting_is_said(saved: Path, folder: Callable[..., str]) -> None:
    def otherwise(tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    with pytest.warns(LorakinWarning, match="cuts"):
        load_with_adapter(folder(otherwise), str(saved), "float32")


@pytest.mark.parametrize("template", [TEMPLATE + " ", None])
def test_another_template_is_said(
    template: str | None, saved: Path, folder: Callable[..., str]
) -> None:
    place = folder(lambda tokenizer: setattr(tokenizer, "chat_template", template))
    with pytest.warns(LorakinWarning, match="chat template"):
        load_with_adapter(place, str(saved), "float32")


def test_where_no_tokenizer_is_known_nothing_is_said(saved: Path, tmp_path: Path) -> None:
    model = tiny_llama(pad_token_id=0, eos_token_id=1, initializer_range=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.load(model, saved)
    assert tokenizer_fingerprint.fingerprint_of(model) == {}
    assert tokenizer_fingerprint.differences({}, {"tokenizer": {}}) == []


def test_what_a_file_says_is_checked(saved: Path) -> None:
    import json

    base = json.loads((saved / "lorakin.json").read_text())["base"]
    assert tokenizer_fingerprint.is_valid(base) and tokenizer_fingerprint.is_valid({})
    assert set(base["tokenizer"]["words"]) == {"16", "all"}
    for wrong in (
        [],
        "x",
        {"words": []},
        {"words": {}, "cuts": 3},
        {"words": {"16": 3}, "cuts": "x", "template": None},
    ):
        assert not tokenizer_fingerprint.is_valid({"tokenizer": wrong}), wrong


def test_an_adapter_that_brings_its_template_does_not_mind_the_bases(
    model_dir: str,
    tmp_path: Path,
    folder: Callable[..., str],
    write_rows: Callable[..., str],
    chat_rows: list[dict[str, str]],
) -> None:
    from lorakin.cli.app import run

    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE.replace("<|end|> {% endfor %}", "<|end|> {% endfor %}{# ours #}"))
    out = tmp_path / "trained"
    rows = write_rows(chat_rows)
    asked = [
        "-m",
        model_dir,
        "-d",
        rows,
        "-o",
        str(out),
        "--steps=1",
        "--dtype=float32",
        "--chat-template",
        str(own),
    ]
    assert run(["train", *asked]) == 0
    loads(model_dir, out)
    loads(folder(lambda tokenizer: setattr(tokenizer, "chat_template", TEMPLATE + " ")), out)
