"""What a model can read: places for tokens and rows for ids, by what its own forward takes and
refuses.
"""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorakin as lk
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from lorakin.cli.app import run
from lorakin.compare.comparison import Comparison
from lorakin.compare.preparation import within_positions
from lorakin.plan.advice import conditions_of
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.generate import answer
from lorakin.training.limits import (
    check_rows,
    position_count,
    position_count_of_config,
    row_length,
    warn_cut,
)
from lorakin.training.models import Loaded, load_model
from sweep.architectures import make

TABLES = {
    "bert": ("BertForSequenceClassification", 64),
    "roberta": ("RobertaForSequenceClassification", 63),
    "opt": ("OPTForCausalLM", 64),
    "gpt2": ("GPT2LMHeadModel", 64),
    "gpt_neo": ("GPTNeoForCausalLM", 64),
    "gptj": ("GPTJForCausalLM", 64),
    "codegen": ("CodeGenForCausalLM", 64),
    "ctrl": ("CTRLLMHeadModel", 64),
    "distilbert": ("DistilBertForSequenceClassification", 64),
    "mpnet": ("MPNetForSequenceClassification", 62),
    "biogpt": ("BioGptForCausalLM", 64),
    "ibert": ("IBertForSequenceClassification", 63),
    "nystromformer": ("NystromformerForSequenceClassification", 64),
    "canine": ("CanineForSequenceClassification", 64),
}
"""The sweep's architectures with a table of positions, which have 64 of them; some begin late."""
NONE = {
    "llama": "LlamaForCausalLM",
    "bloom": "BloomForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mamba": "MambaForCausalLM",
    "xglm": "XGLMForCausalLM",
    "falcon": "FalconForCausalLM",
}
"""Rotary, relative, none, or made as long as a row."""


def reads(model: Any, length: int) -> bool:
    ids = torch.randint(5, 60, (1, length), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", TABLES)
def test_a_row_may_be_so_long_and_no_longer(name: str) -> None:
    cls, there = TABLES[name]
    model = make(name, cls).eval()
    assert position_count(model) == position_count_of_config(model.config) == there
    assert reads(model, there) and not reads(model, there + 1)


@pytest.mark.parametrize("name", NONE)
def test_models_without_a_table(name: str) -> None:
    model = make(name, NONE[name]).eval()
    assert position_count(model) is None and reads(model, 100)


def test_mpt_has_its_biases_for_so_many() -> None:
    config = transformers.MptConfig(
        vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=16
    )
    model = transformers.MptForCausalLM(config).eval()
    assert position_count(model) == 16 and reads(model, 16) and not reads(model, 17)


def test_the_length_of_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_cut(64, 65, "m", [{"input_ids": [1] * 63}])
        warn_cut(64, 64, "m", [{"input_ids": [1] * 64}])
    assert [row_length(there, 65) for there in (None, 64, 65, 66)] == [65, 64, 65, 65]
    with pytest.warns(lk.LorakinWarning):
        warn_cut(64, 65, "m", [], [{"input_ids": [1] * 64}])


@pytest.fixture
def gpt2_dir(tmp_path: Path, tokenizer: Any) -> str:
    folder = tmp_path / "gpt2"
    tiny_gpt2().save_pretrained(folder)  # 64 positions
    tokenizer.save_pretrained(folder)
    return str(folder)


LONG = [
    {"prompt": "the cat", "completion": " ".join(["the cat sat on the mat"] * 30)} for _ in range(6)
]


@pytest.mark.filterwarnings("always::lorakin.LorakinWarning")
def test_long_rows_train_and_are_evaluated(
    gpt2_dir: str,
    bert_dir: str,
    tmp_path: Path,
    write_rows: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_rows(LONG)
    common = [
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--dtype",
        "float32",
        "--rank",
        "2",
        "--save-every",
        "0",
    ]
    assert (
        run(["train", "--model", gpt2_dir, "--data", data, *common, "--out", str(tmp_path / "a")])
        == 0
    )
    assert capsys.readouterr().err.count("rows are cut at 64 tokens instead of 1024") == 1
    assert "max_length: 64\n" in (tmp_path / "a" / "recipe.yaml").read_text()
    with pytest.warns(lk.LorakinWarning):
        assert evaluate_rows(gpt2_dir, str(tmp_path / "a"), data, dtype="float32").count > 0
    labelled = write_rows(
        [{"text": LONG[0]["completion"] * 4, "label": n % 2} for n in range(8)], "labelled.jsonl"
    )
    assert (
        run(
            [
                "train",
                "--model",
                bert_dir,
                "--data",
                labelled,
                *common,
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    assert "rows are cut at 512 tokens" in capsys.readouterr().err
    assert (
        run(
            [
                "export",
                str(tmp_path / "a"),
                "--to",
                "merged",
                "--out",
                str(tmp_path / "m"),
                "--data",
                data,
            ]
        )
        == 0
    )


def test_plan_says_it(gpt2_dir: str, model_dir: str) -> None:
    given: dict[str, Any] = {
        "labels": None,
        "task": None,
        "dtype": "float32",
        "device": "cpu",
        "targets": [],
        "layers": None,
        "batch_size": 1,
        "accumulate": 1,
        "steps": 1,
    }
    assert conditions_of(gpt2_dir, max_length=None, **given).max_length == 64
    with pytest.warns(lk.LorakinWarning):
        assert conditions_of(gpt2_dir, max_length=70, **given).max_length == 64
    assert conditions_of(model_dir, max_length=None, **given).max_length == 1024
    with pytest.warns(lk.LorakinWarning, match="2048"):
        assert conditions_of(model_dir, max_length=2050, **given).max_length == 2050


def test_a_comparison_cuts_them_once(
    gpt2_dir: str, tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    asked = Comparison(
        gpt2_dir, write_rows(LONG), str(tmp_path / "c"), methods=["lora"], recipe={"batch_size": 2}
    )
    within = within_positions(asked)
    assert within.base_recipe.max_length == 64 and within.recipe == {
        "batch_size": 2,
        "max_length": 64,
    }
    with pytest.warns(lk.LorakinWarning):
        within_positions(dataclasses.replace(asked, recipe={"max_length": 70}))
    assert within_positions(within) is within


def test_a_rotary_model_reads_on_and_says_so(tokenizer: Any) -> None:
    loaded = Loaded(tiny_llama(max_position_embeddings=8), tokenizer, "m", "float32")
    with pytest.warns(lk.LorakinWarning):
        check_rows([{"input_ids": [3] * 9}], loaded, ["row 1"], "rows.jsonl")


def test_an_answer_has_room_after_the_prompt(gpt2_dir: str) -> None:
    loaded = load_model(gpt2_dir, "float32")
    assert answer(loaded, "the cat", max_new_tokens=500) is not None
    with pytest.raises(lk.ModelError):
        answer(loaded, " ".join(["cat"] * 70))


class TestIdsWithoutARow:
    @pytest.fixture
    def wide(self, tmp_path: Path, model_dir: str, tokenizer: Any) -> str:
        """The tiny model with a tokenizer that was given a token too many."""
        folder = tmp_path / "wide"
        shutil.copytree(model_dir, folder)
        made = transformers.AutoTokenizer.from_pretrained(model_dir)
        made.add_tokens([f"<F{n}>" for n in range(64 - len(made))] + ["<NEW1>"])
        made.save_pretrained(folder)
        return str(folder)

    ROWS = [{"prompt": "the cat", "completion": "sat"}] * 4 + [
        {"prompt": "the cat", "completion": "<NEW1> yes"}
    ]

    def test_training_refuses(
        self, wide: str, tmp_path: Path, write_rows: Callable[..., str], capsys: Any
    ) -> None:
        rows = write_rows(self.ROWS)
        given = [
            "--model",
            wide,
            "--data",
            rows,
            "--eval-data",
            rows,
            "--dtype",
            "float32",
            "--steps",
            "1",
        ]
        assert run(["train", *given, "--out", str(tmp_path / "a")]) == 2
        said = capsys.readouterr().err
        for word in (
            "'<NEW1>'",
            "id 64",
            "64 rows",
            "row 5",
            "resize_token_embeddings(65)",
            "--trainable-tokens '<NEW1>'",
        ):
            assert word in said
        assert not (tmp_path / "a").exists()
        with pytest.raises(lk.DataError, match="<NEW1>"):
            evaluate_rows(wide, None, write_rows(self.ROWS), dtype="float32")

    def test_generating_refuses(self, wide: str) -> None:
        with pytest.raises(lk.DataError, match="NEW1"):
            answer(load_model(wide, "float32"), "the <NEW1>")

    def test_more_rows_than_tokens_are_usual(self, tokenizer: Any) -> None:
        loaded = Loaded(tiny_llama(vocab_size=640), tokenizer, "m", "float32")
        check_rows([{"input_ids": [639]}], loaded, ["row 1"], "rows")

    def test_a_classifier_too(self, tokenizer: Any) -> None:
        loaded = Loaded(tiny_bert(), tokenizer, "m", "float32")
        with pytest.raises(lk.DataError, match="row 7"):
            check_rows(
                [{"input_ids": [3]}, {"input_ids": [64]}], loaded, ["row 2", "row 7"], "rows"
            )
