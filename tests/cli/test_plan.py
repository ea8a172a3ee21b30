"""`lorakin plan` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorakin as lk
from conftest import tiny_bert, tiny_llama
from lorakin.cli.app import run
from lorakin.family import FAMILY
from lorakin.plan import advice


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model's directory with a config and nothing else."""
    tiny_llama().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def suggestions() -> None:
    """For tests that look at what is suggested, which takes most of the time."""


@pytest.fixture(autouse=True)
def _no_suggestions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "suggestions" not in request.fixturenames:
        monkeypatch.setattr(advice, "suggestions", lambda *_, **__: {})


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert (
        run(
            [
                "plan",
                "--json",
                "--batch-size",
                "2",
                "--max-length",
                "16",
                "--dtype",
                "float32",
                *arguments,
            ]
        )
        == 0
    )
    return json.loads(capsys.readouterr().out)


def test_all_members_are_planned_of_a_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(num_hidden_layers=1).config.save_pretrained(tmp_path)
    model = str(tmp_path)
    said = planned(
        capsys, "--model", model, "--memory", "4GB", "--set", "target_rank=4", "--set", "keep=3"
    )
    assert [row["method"] for row in said["methods"]] == [member.word for member in FAMILY]
    assert all(
        row["fits"] and row["peak"] == max(row["peaks"].values())
        for row in said["methods"]
        if "peak" in row
    )
    assert said["memory"] == 4 * 10**9
    ranks = {row["method"]: row.get("rank") for row in said["methods"]}
    assert ranks["adalora"] == 12, "only it has the setting"
    fair = {
        row["method"]: row["rank"]
        for row in planned(
            capsys, "--model", model, "--rank", "4", "--memory", "4GB",
            "--methods", "lora vera adalora",
        )["methods"]
    }  # fmt: skip
    assert fair == {"lora": 4, "vera": 256, "adalora": 6}


@pytest.mark.usefixtures("suggestions")
def test_a_table_with_reasons_and_suggestions(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batch-size", "2", "--max-length", "16", "--dtype", "float32", "--memory", "8GiB"]
    words = f"{FAMILY[0].word} {FAMILY[4].word},{FAMILY[1].word} {FAMILY[2].word},{FAMILY[1].word}"
    assert run(["plan", "--model", model, "--method", words, "--rank", "4", *options]) == 0
    said = capsys.readouterr().out
    assert "lora+ and lora-fa do not combine" in said.replace("\n", " ")
    assert "largest batch for" in said and "--batch-size 256" in said
    assert "3,712" in said  # 2 layers of rank 4: q, o 64 numbers a rank, k, v 48, gate, up, down 80


@pytest.mark.usefixtures("suggestions")
def test_what_does_not_fit_is_told_what_would(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = planned(capsys, "--model", model, "--method", FAMILY[0].word, "--memory", "600kB")
    (row,) = said["methods"]
    assert row["fits"] is False
    assert row["remedies"] == {}
    assert said["suggestions"] == {}


@pytest.mark.filterwarnings("ignore:rank_above")
def test_clamped_ranks_are_planned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--model",
        model,
        "--method",
        FAMILY[0].word,
        "--memory",
        "4GB",
        "--rank-above",
        "clamp",
    ]
    rows = [planned(capsys, *given, "--rank", rank)["methods"][0] for rank in ("32", "500")]
    assert rows[0]["trainable_parameters"] == rows[1]["trainable_parameters"]


def test_nothing_that_can_run_is_an_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", model, "--method", FAMILY[0].word, "--rank", "500"]) == 2
    assert "no method can run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory", "lots"], "memory must be a size with its unit, such as 24GB"),
        (["--method", "lorra"], "unknown method 'lorra'"),
        (["--set", "ratoi=2"], "has no setting 'ratoi'"),
        (["--batch-size", "0"], "--batch-size is 0, expected a whole number ≥ 1"),
        (["--max-length", "0"], "max_length must be at least 1, not 0"),
        (["--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["--quantize", "int3"], "quantize must be one of nf4, int8, torchao-int8, not 'int3'"),
        (["--dtype", "int8"], "dtype must be auto"),
        (["--model", "./nowhere"], "there is no model './nowhere'"),
        (["--layers", "all"], "layers must look like"),
    ],
)
def test_bad_options_are_errors(
    model: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model", model, *options]) == 2
    assert said in capsys.readouterr().err


def test_a_card_that_is_not_here_needs_its_memory(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = planned(
        capsys, "--model", model, "--method", FAMILY[0].word, "--device", "cuda", "--memory", "24GB"
    )
    assert said["methods"][0]["fits"] is True
    assert "loading" not in said["methods"][0]["peaks"]


def test_quantised_bases_are_smaller(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", model, "--method", FAMILY[0].word, "--device", "cuda", "--memory", "1GB"]
    (row,) = planned(capsys, *common, "--quantize", "nf4")["methods"]
    numbers = sum(p.numel() for p in tiny_llama().parameters())
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert row["weight_bytes"] == pytest.approx(
        4 * (numbers - linear) + linear * 4.127 / 8, abs=200
    )  # and rotary tables


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_a_classifier_and_a_regression_train_what_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: int
) -> None:
    """The trained parameters of PEFT's kind of LoRA with the head of transformers' own class."""
    config = tiny_bert().config
    config.save_pretrained(tmp_path)
    arguments = ("--model", str(tmp_path), "--method", "lora", "--labels", str(labels))
    (row,) = planned(capsys, *arguments)["methods"]
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig.from_dict({**config.to_dict(), "num_labels": labels})
    )
    adapter = lk.adapt(model, lk.LoRA(rank=16), modules_to_save=["classifier"])
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert row["trainable_parameters"] == trained
    assert run(["plan", *arguments[:4], "--labels", "0"]) == 2
