"""`lorakin compare` for real on a tiny encoder: pairs of texts, several classes, numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

import soak
from compare.test_comparison import arguments, result_of, rows_of
from conftest import WORDS
from lorakin.cli.app import run as cli
from lorakin.compare import directory
from lorakin.compare.comparison import Comparison
from lorakin.compare.results import DONE, FAILED, REFUSED
from lorakin.training.evaluate import evaluate_rows

SMALL = {"methods": "lora-fa", "lr_sweep": "1e-2", "budget": "steps=4", "devices": "cpu"}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(label: Any, count: int = 120) -> list[dict[str, Any]]:
    return [
        {
            "sentence1": f"{WORDS[n % 9]} {WORDS[n % 25]}",
            "sentence2": WORDS[n % 7],
            "label": label(n),
        }
        for n in range(count)
    ]


def test_pairs_with_several_classes(bert_dir: str, tmp_path: Path) -> None:
    data = written(tmp_path / "rows.jsonl", pairs(lambda n: ["x", "y", "z"][: 1 + n % 3]))
    out = tmp_path / "out"
    found = result_of(arguments(bert_dir, data, out, **SMALL, seeds="1"))
    assert found["measure"] == "micro_f1"
    names = [arm["arm"] for arm in found["arms"]]
    assert names == ["lora", "lora-fa", "base", "head", "full", "constant"]
    rows = rows_of(out)
    assert not [row for row in rows if row.status in (FAILED, REFUSED)]
    for row in rows:
        assert row.report is not None
        assert row.answers is not None
        assert row.report.keys() >= {"micro_f1", "macro_f1", "exact_match", "loss"}
        right, given = row.answers.numbers
        f1 = sklearn.metrics.f1_score(right, given, average="micro", zero_division=0.0)
        assert row.report["micro_f1"] == pytest.approx(f1)
    kept = next(row for row in rows if row.trial.arm == "lora-fa")
    adapter, report = (out / directory.TRIALS / kept.trial.name, out / directory.DATA)
    again = evaluate_rows(bert_dir, str(adapter), str(report / "report.jsonl"))
    assert kept.report is not None
    assert again.loss == pytest.approx(kept.report["loss"], rel=1e-5)


def test_numbers_and_the_same_trials_by_another_metric(
    bert_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "rows.jsonl", pairs(lambda n: (n % 9) / 2))
    out = tmp_path / "out"
    command = arguments(bert_dir, data, out, **SMALL)
    found = result_of(command)
    assert found["measure"] == "pearson"
    before = (out / directory.RESULTS).read_bytes()
    for row in rows_of(out):
        assert row.status == DONE
        assert row.report is not None
        assert row.answers is not None
        right, given = row.answers.numbers
        assert np.unique(right).size > 4
        pearson = scipy.stats.pearsonr(right, given).statistic
        assert row.report["pearson"] == pytest.approx(pearson, abs=1e-3)

    other = result_of([*command, "--metric", "mean_absolute_error"])
    assert (out / directory.RESULTS).read_bytes() == before
    lora, lora_fa, *_ = other["arms"]
    difference = lora["quality"]["mean"] - lora_fa["quality"]["mean"]
    assert lora_fa["ahead_of_plain"]["mean"] == pytest.approx(difference)  # less is better
    assert lora["quality"]["rows"] == len((out / "data" / "report.jsonl").read_text().splitlines())
    page = (out / directory.REPORT).read_text()
    assert "mean absolute error" in page

    assert cli([*command, "--metric", "accuracy"]) == 2
    assert "'accuracy'" in capsys.readouterr().err
    assert cli([*command, "--task", "classification"]) == 2
    assert "task" in capsys.readouterr().err


def test_a_metric_that_does_not_fit_is_refused_before_anything_is_written(
    bert_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "rows.jsonl", pairs(lambda n: "ab"[n % 2]))
    out = tmp_path / "out"
    assert cli([*arguments(bert_dir, data, out, **SMALL), "--metric", "pearson"]) == 2
    said = capsys.readouterr().err
    assert "'pearson'" in said
    assert "matthews" in said
    assert not (out / directory.DATA).exists()


def test_a_quantised_base(model_dir: str, tmp_path: Path) -> None:
    rows = [{"prompt": WORDS[n % 9], "completion": f"{WORDS[n % 7]} {n}"} for n in range(64)]
    data, out = written(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    settings = {**SMALL, "methods": "lora", "seeds": "1", "quantize": "nf4"}
    found = result_of(arguments(model_dir, data, out, **settings))
    refused = {arm["arm"]: arm["refused"] for arm in found["arms"] if arm["refused"]}
    assert refused.keys() == {"full"}
    assert "nf4" in refused["full"]
    (lora,) = [row for row in rows_of(out) if row.trial.arm == "lora"]
    assert lora.status == DONE
    assert lora.layers
    report = str(out / directory.DATA / "report.jsonl")
    adapter = str(out / directory.TRIALS / lora.trial.name)
    again = evaluate_rows(model_dir, adapter, report, dtype="float32", quantize="nf4")
    assert lora.report is not None
    assert again.loss == pytest.approx(lora.report["loss"], rel=1e-4)


def test_a_class_for_each_word(bert_dir: str, tmp_path: Path) -> None:
    rows = [
        {
            "tokens": [WORDS[n % 9], WORDS[n % 25], WORDS[n % 7]],
            "ner_tags": ["O", "A" if n % 2 else "O", "O"],
        }
        for n in range(120)
    ]
    data, out = written(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    found = result_of(arguments(bert_dir, data, out, **{**SMALL, "methods": "lora", "seeds": "1"}))
    assert found["measure"] == "macro_f1"
    assert not [row for row in rows_of(out) if row.status in (FAILED, REFUSED)]
    words = 3 * len((out / "data" / "report.jsonl").read_text().splitlines())
    for row in rows_of(out):
        assert row.report is not None
        assert row.answers is not None
        right, given = row.answers.numbers
        assert row.report["count"] == len(right) == words
        f1 = sklearn.metrics.f1_score(right, given, average="macro", zero_division=0.0)
        assert row.report["macro_f1"] == pytest.approx(f1)
    assert found["arms"][-1]["arm"] == "constant"


def test_a_task_of_glue_brings_its_metric(tmp_path: Path) -> None:
    def of(**more: Any) -> Comparison:
        out = str(tmp_path / "out")
        recipe = {"task": "cola"}
        return Comparison("m", "rows.jsonl", out, methods=["vera"], recipe=recipe, **more)

    assert of().metric == "matthews"
    assert of(metric="f1").metric == "f1"


@pytest.mark.parametrize("task", ["reward", "dpo"] if soak.is_slow() else ["dpo"])
def test_pairs_of_answers(task: str, model_dir: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{WORDS[n % 9]} {WORDS[n % 25]}", "chosen": WORDS[n % 7], "rejected": "no bad"}
        for n in range(120)
    ]
    out = tmp_path / "out"
    data = written(tmp_path / "rows.jsonl", rows)
    found = result_of(arguments(model_dir, data, out, **SMALL, seeds="1", task=task))
    assert found["measure"] == "reward_accuracy"
    done = rows_of(out)
    assert not [row for row in done if row.status in (FAILED, REFUSED)]
    by_arm = {arm["arm"]: arm for arm in found["arms"]}
    assert "constant" not in by_arm
    assert ("head" in by_arm) == (task == "reward")
    if task == "dpo":
        base = next(row for row in done if row.trial.arm == "base")
        assert base.report is not None
        assert (base.report["reward_accuracy"], base.report["reward_margin"]) == (0.5, 0.0)
    kept = next(row for row in done if row.trial.arm == "lora-fa")
    adapter, report = (out / directory.TRIALS / kept.trial.name, out / directory.DATA)
    again = evaluate_rows(model_dir, str(adapter), str(report / "report.jsonl"), dtype="float32")
    assert kept.report is not None
    assert again.loss == pytest.approx(kept.report["loss"], rel=1e-4)
