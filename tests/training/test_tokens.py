"""`lorakin train --trainable-tokens`, transformers' Trainer, and the merged model: rows of tokens
in whole runs.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_bert, tiny_llama
from lorakin.inject.trainable_tokens import TokenRows
from lorakin.serving.export import export
from lorakin.serving.job import ExportRequest
from lorakin.training import prepare_trainer
from lorakin.training import train as training
from lorakin.training.models import load_model
from lorakin.training.recipe import Recipe
from lorakin.training.tokens import rows_of
from lorakin.training.with_adapter import load_with_adapter

Write = Callable[..., str]


def folder(tmp_path: Path, tokenizer: Any, tied: bool) -> str:
    model = tiny_llama(tied, pad_token_id=0, eos_token_id=1, initializer_range=0.3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_and_its_exports(
    tied: bool, tokenizer: Any, chat_rows: list[dict[str, str]], write_rows: Write, tmp_path: Path
) -> None:
    base, data = folder(tmp_path, tokenizer, tied), write_rows(chat_rows)
    recipe = Recipe(
        model=base,
        data=data,
        eval_data=data,
        out=str(tmp_path / "out"),
        rank=4,
        lr=2e-2,
        steps=8,
        dtype="float32",
        trainable_tokens=["<|user|>", "10"],
    )
    shown = io.StringIO()
    training.train(training.prepare(recipe, Console(file=shown, width=200)))
    assert "rows of 2 tokens" in shown.getvalue()
    model = load_with_adapter(base, recipe.out, "base").model
    (adapter,) = lk.adapters(model).values()
    heads = {} if tied else {"lm_head"}
    assert {path: rows.ids for path, rows in adapter.placement.tokens.items()} == dict.fromkeys(
        ["model.embed_tokens", *heads], (3, 10)
    )
    x = torch.arange(3, 27).view(2, 12)
    want = model(x).logits
    assert not torch.allclose(want, load_model(base, "base").model(x).logits, atol=0.1)
    export(ExportRequest(recipe.out, "merged", str(tmp_path / "merged")))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(x).logits, want, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings is tied
    export(ExportRequest(recipe.out, "lora", str(tmp_path / "plain")))
    plain = load_with_adapter(base, str(tmp_path / "plain"), "base").model
    torch.testing.assert_close(plain(x).logits, want, rtol=0, atol=1e-4)
    with pytest.raises(lk.SettingError):
        export(ExportRequest(recipe.out, "lora", str(tmp_path / "portable"), portable=True))
    with pytest.raises(lk.AdapterError, match="GGUF"):
        export(ExportRequest(recipe.out, "gguf", str(tmp_path / "gguf")))
    again = dataclasses.replace(recipe, out=str(tmp_path / "again"), trainable_tokens=["<|other|>"])
    with pytest.raises(lk.SettingError, match=r"no token '<\|other\|>'"):
        training.prepare(again, Console(file=shown))


def test_which_rows(tokenizer: Any) -> None:
    assert rows_of(["<|end|>", "7"], tokenizer, tiny_llama()) == [1, 7]
    assert rows_of(["<unk>"], tokenizer, tiny_llama(False)) == {
        "model.embed_tokens": [2],
        "lm_head": [2],
    }
    assert rows_of(["7"], tokenizer, tiny_bert()) == [7]
    assert rows_of([], tokenizer, tiny_llama(False)) == []


def test_the_trainer_saves_and_resumes_them(ids: Tensor, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def trainer(out: str) -> Any:
        torch.manual_seed(0)
        model = tiny_llama()
        lk.adapt(model, lk.LoRA(rank=4), trainable_tokens=[5, 6], seed=0)
        settings = transformers.TrainingArguments(
            str(tmp_path / out),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        return prepare_trainer(transformers.Trainer(model, settings, train_dataset=rows))

    whole, resumed = trainer("whole"), trainer("again")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    first, second = (
        lk.adapters(run.model)["default"].tensors.rows_at("model.embed_tokens")
        for run in (whole, resumed)
    )
    assert torch.equal(first, second) and not torch.equal(
        first, tiny_llama().model.embed_tokens.weight[[5, 6]]
    )


def test_a_merged_model_that_another_resize_filled(tokenizer: Any, tmp_path: Path) -> None:
    base = folder(tmp_path, tokenizer, False)
    model = load_model(base, "base").model
    both = {"embed_tokens": [62, 63], "lm_head": [62, 63]}
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2), "none", trainable_tokens=both), 0.3)
    adapter.save(tmp_path / "a")
    want = model(torch.arange(50, 64)[None]).logits
    lk.adapters(model)["default"].remove()
    with torch.no_grad():
        for table in (model.lm_head, model.model.embed_tokens):
            table.weight[62:] = 7.0
    model.save_pretrained(tmp_path / "base")
    export(ExportRequest(str(tmp_path / "a"), "merged", str(tmp_path / "out"), base))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(torch.arange(50, 64)[None]).logits, want, rtol=0, atol=1e-5)


def test_the_example_of_the_docs_runs(tokenizer: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "howto" / "tokens.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {
        "lk": lk,
        "tokenizer": copy.deepcopy(tokenizer),
        "model": tiny_llama(vocab_size=len(tokenizer)),
    }
    exec(example, names)
    adapter, size = names["adapter"], len(tokenizer)
    assert adapter.placement.tokens == {
        "model.embed_tokens": TokenRows((size, size + 1), ("lm_head",))
    }
    assert len(names["model"].lm_head.weight) == size + 2
