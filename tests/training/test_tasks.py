"""Tasks: what rows are for, what is learned of them, and the same run by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import transformers

import lorakin as lk
from lorakin.terminal import Terminal
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.prepare import prepare
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.tasks import task_for
from lorakin.training.train import train
from training.twins import losses_by_transformers, losses_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "home"]
Write = Callable[..., str]


def texts(count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, chance.integers(2, 7))) for _ in range(count)]


def rows_of(task: str, count: int = 24) -> list[dict[str, Any]]:
    first, second, chance = texts(count), texts(count, 1), np.random.default_rng(2)
    labels: dict[str, Callable[[int], Any]] = {
        "classification": lambda n: ["same", "other"][n % 2],
        "multi-label": lambda n: [["red"], ["red", "blue"], [], ["green"]][n % 4],
        "regression": lambda n: round(float(chance.normal()), 2),
    }
    return [
        {"sentence1": one, "sentence2": two, "label": labels[task](n)}
        for n, (one, two) in enumerate(zip(first, second, strict=True))
    ]


PAIRS = [
    ("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label"),
    ("question1", "question2", "label"), ("question", "sentence", "label"),
    ("text1", "text2", "labels"), ("question", "answer", "label"), ("text", "text_pair", "label"),
    ("sentence1", "sentence2", "score"),
]  # fmt: skip


@pytest.mark.parametrize("columns", PAIRS, ids=",".join)
def test_pairs_of_texts(columns: tuple[str, str, str], write_rows: Write, tokenizer: Any) -> None:
    first, second, label = columns
    data = write_rows(
        [{first: "the cat", second: "a dog", label: n % 3, "idx": n} for n in range(6)]
    )
    rows = read_rows(data)
    assert rows.task == "classification"
    example = task_for(rows).encode(rows, tokenizer, 100).examples[4]
    expected = tokenizer("the cat", "a dog")
    assert {**example} == {
        **{key: value for key, value in expected.items() if key != "attention_mask"},
        "labels": 1,
    }


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        ([0, 1, 2], "classification"),
        (["0", "1", "0"], "classification"),
        ([1.0, 2.0, 5.0], "classification"),
        ([1.0, 2.5, 5.0], "regression"),
        (["1", "2.5", "-3"], "regression"),
        ([["a"], ["a", "b"], []], "multi-label"),
        ([[0, 2], [1], [2]], "multi-label"),
    ],
)
def test_labels_tell_the_task(labels: list[Any], task: str, write_rows: Write) -> None:
    data = write_rows([{"text": "the cat", "label": label} for label in labels])
    assert read_rows(data).task == task


def test_the_user_names_the_task(write_rows: Write) -> None:
    data = write_rows([{"text": "the cat", "label": n} for n in range(1, 6)])
    assert read_rows(data, task="regression").labels() == ["label"]
    assert read_rows(data).labels() == ["1", "2", "3", "4", "5"]


def test_rows_set_apart_are_for_the_same_task(
    write_rows: Write, bert_dir: str, tmp_path: Path
) -> None:
    rows = [{"text": "the cat", "label": 0.5 if n == 3 else float(n)} for n in range(8)]
    recipe = Recipe(model=bert_dir, data=write_rows(rows), steps=1, out=str(tmp_path / "out"))
    assert prepare(recipe, Terminal(quiet=True)).recipe.labels == ["label"]


LEARNED = ["classification", "multi-label", "regression"]


@pytest.mark.parametrize("task", LEARNED)
def test_training_is_that_of_transformers(
    task: str, bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    """The losses of each step are those of transformers' Trainer, with the model's own loss."""
    data = write_rows(rows_of(task))
    recipe = Recipe(
        model=bert_dir, data=data, eval_data=data, out=str(tmp_path / "a"), rank=4, lr=1e-2,
        steps=6, batch_size=6, warmup=0.0, schedule="constant", save_every=0,
    )  # fmt: skip
    run = prepare(recipe, Terminal(quiet=True))
    train(run)
    twin = prepare(Recipe(**{**vars(recipe), "out": str(tmp_path / "b")}), Terminal(quiet=True))
    model = twin.loaded.model
    if task == "multi-label":
        model.config.problem_type = "multi_label_classification"
    collator = transformers.DataCollatorWithPadding(twin.loaded.tokenizer)
    theirs = losses_by_transformers(twin, collator, tmp_path / "c")
    assert losses_of(tmp_path / "a") == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("task", LEARNED)
def test_metrics_are_those_of_sklearn_and_scipy(
    task: str, bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows(rows_of(task))
    recipe = Recipe(
        model=bert_dir, data=data, eval_data=data, out=str(tmp_path / "a"), rank=4, lr=1e-2,
        steps=12, batch_size=8, save_every=0,
    )  # fmt: skip
    run = prepare(recipe, Terminal(quiet=True))
    result = train(run)
    again = evaluate_rows(bert_dir, str(tmp_path / "a"), data)
    assert again.loss == pytest.approx(result.after.loss, rel=1e-5)
    assert again.answers is not None
    assert again.answers.where[2].endswith("row 3")
    values = {name: figure.value for name, figure in again.metrics.items()}

    model, tokenizer = run.loaded.model, run.loaded.tokenizer
    rows = rows_of(task)
    with torch.no_grad():
        batch = tokenizer(
            [row["sentence1"] for row in rows], [row["sentence2"] for row in rows],
            padding=True, return_tensors="pt",
        )  # fmt: skip
        logits = model(**batch).logits.numpy()
    right = [row["label"] for row in rows]
    if task == "classification":
        names = [model.config.id2label[n] for n in range(2)]
        given = [names[n] for n in logits.argmax(1)]
        expected = {
            "accuracy": sklearn.metrics.accuracy_score(right, given),
            "f1": sklearn.metrics.f1_score(right, given, pos_label=names[1]),
            "matthews": sklearn.metrics.matthews_corrcoef(right, given),
        }
        assert again.answers.given == given
    elif task == "regression":
        given = logits[:, 0]
        expected = {
            "pearson": scipy.stats.pearsonr(right, given).statistic,
            "spearman": scipy.stats.spearmanr(right, given).statistic,
            "mean_absolute_error": np.abs(np.array(right) - given).mean(),
        }
    else:
        names = [model.config.id2label[n] for n in range(3)]
        marks = np.array([[name in label for name in names] for label in right])
        expected = {
            "micro_f1": sklearn.metrics.f1_score(marks, logits > 0, average="micro"),
            "macro_f1": sklearn.metrics.f1_score(
                marks, logits > 0, average="macro", zero_division=0
            ),
            "exact_match": (marks == (logits > 0)).all(1).mean(),
        }
    assert values == pytest.approx(expected, abs=1e-6)
    for figure in again.metrics.values():
        assert figure.low is not None and figure.low <= figure.value + 1e-9 <= figure.high + 2e-9


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {"task": "regression"}),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 2}], {"task": "multi-label"}),
        ([{"prompt": "a", "completion": "b"}] * 3, {"task": "classification"}),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}] * 2, {"task": "poetry"}),
        ([{"text": "a", "label": 0, "text2": "c"}, {"text": "b", "label": 1, "text2": "c"}], {}),
        ([{"text": "a", "label": float("nan")}, {"text": "b", "label": 0.5}], {}),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(
    rows: list[dict[str, Any]], options: dict[str, str], bert_dir: str, write_rows: Write,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises((lk.DataError, lk.SettingError)):
        prepare(
            Recipe(model=bert_dir, data=write_rows(rows), out=str(out), steps=1, **options),
            Terminal(quiet=True),
        )
    assert not out.exists() or not list(out.iterdir())


def test_a_model_that_answers_the_same_to_all_says_so(
    bert_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    rows = [{"text": "the cat", "label": n % 2} for n in range(8)]
    data = write_rows(rows)
    recipe = Recipe(model=bert_dir, data=data, eval_data=data, out=str(tmp_path / "o"), steps=1)
    result = train(prepare(recipe, Terminal(quiet=True)))
    assert result.after.only_answer in ("0", "1")
