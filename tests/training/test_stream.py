"""Rows that are read while training: which, in what order, how many are in memory, and what a
resumed run sees.
"""

from __future__ import annotations

import collections
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pytest
import torch

import lorakin as lk
from lorakin.training import data_files, run_directory, stream
from lorakin.training import train as training
from lorakin.training.recipe import Recipe
from training.saved import prepared, tensors

Write = Callable[..., str]
WORDS = "the a cat dog bird sat ran flew on over".split()


def rows(count: int, first: str = "the") -> list[dict[str, str]]:
    return [
        {"prompt": f"{first} {WORDS[n % 10]}", "completion": " ".join(WORDS[: 1 + n % 10])}
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLE": 10, "BUFFER": 8, "AT_ONCE": 4, "WINDOW": 16}.items():
        monkeypatch.setattr(stream, name, value)


@pytest.fixture
def recipe(model_dir: str, write_rows: Write, tmp_path: Path) -> Recipe:
    held_out = write_rows(rows(6), "held.jsonl")
    return Recipe(
        model_dir, write_rows(rows(30), "many.jsonl"), str(tmp_path / "out"), eval_data=held_out,
        rank=4, lr=1e-2, steps=6, dtype="float32", batch_size=4, streaming=True,
    )  # fmt: skip


def taken(run: training.PreparedRun, count: int) -> list[list[int]]:
    assert run.stream is not None
    return [row["input_ids"] for row in itertools.islice(run.stream, count)]


def test_each_pass_has_every_row_once_in_another_order(recipe: Recipe) -> None:
    run, shown = prepared(recipe)
    assert "10 rows" in shown
    recipe.streaming, recipe.out = False, f"{recipe.out}-2"
    whole, _ = prepared(recipe)
    expected = sorted(tuple(row["input_ids"]) for row in whole.train.examples)
    found = taken(run, 60)
    assert sorted(map(tuple, found[:30])) == sorted(map(tuple, found[30:])) == expected
    assert found[:30] != found[30:]
    assert found[:30] != [row["input_ids"] for row in whole.train.examples]
    assert taken(run, 60) == found


def test_weights_are_the_shares_that_come(recipe: Recipe, write_rows: Write) -> None:
    recipe.data.append(write_rows(rows(5, "two"), "few.jsonl"))
    recipe.data_weights = [3.0, 1.0]
    run, _ = prepared(recipe)
    two = run.loaded.tokenizer("two")["input_ids"][0]
    share = sum(two in ids for ids in taken(run, 2000)) / 2000
    assert share == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("packing", [False, True])
def test_no_more_is_read_than_is_trained_on_and_mixed(
    packing: bool, recipe: Recipe, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: collections.Counter[str] = collections.Counter()
    reader = data_files.READERS[".jsonl"]

    def counted(file: IO[bytes]) -> Any:
        def each() -> Iterator[Any]:
            for row in reader(file)[0]:
                read[str(file.name)] += 1
                yield row

        return each(), {}

    monkeypatch.setitem(data_files.READERS, ".jsonl", counted)
    data = write_rows(rows(5000), "huge.jsonl")
    recipe.data, recipe.packing, recipe.max_length, recipe.steps = [data], packing, 32, 4
    training.train(prepared(recipe)[0])
    # the sample; then batches, one ahead, the buffer, and what is tokenised or packed together
    trained = 4 * (recipe.steps + 1) * (4 if packing else 1)
    assert 10 + 4 * recipe.steps <= read[data] <= 10 + trained + 8 + 4 + 16 * packing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "dropout": 0.1},
        {"data_weights": [1.0, 2.0]},
        {"packing": True, "max_length": 32, "batch_size": 2},
        {"packing": True, "max_length": 32, "data_weights": [2.0, 1.0], "batch_size": 1},
        {"max_rows": 7, "eval_every": 2},
    ],
    ids=str,
)
def test_a_resumed_run_sees_the_rows_that_would_have_come(
    changes: dict[str, Any], recipe: Recipe, write_rows: Write
) -> None:
    """It is interrupted after 11 steps of 13, in a later pass of a source."""
    vars(recipe).update(changes, steps=13, save_every=11)
    if recipe.data_weights:
        recipe.data.append(write_rows(rows(7, "two"), "few.jsonl"))
    training.train(prepared(recipe)[0])
    whole, half = tensors(Path(recipe.out)), Path(f"{recipe.out}-half")
    shutil.copytree(recipe.out, half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-13")
    resumed = run_directory.resumed_recipe(None, {"out": str(half)})
    training.train(prepared(resumed, resume=True)[0])
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors(half).items())


def test_a_bad_row_is_named_when_it_comes_and_the_run_resumed_when_it_is_mended(
    recipe: Recipe,
) -> None:
    file = Path(recipe.data[0])
    lines = file.read_text().splitlines()
    bad = [*lines[:20], '{"prompt": "the"}', *lines[21:]]
    recipe.save_every, recipe.steps = 1, 8
    training.train(prepared(recipe)[0])
    whole = tensors(Path(recipe.out))
    recipe.out = f"{recipe.out}-2"
    file.write_text("\n".join(bad) + "\n")
    with pytest.raises(lk.DataError, match=r"many\.jsonl, row 21: .*--resume"):
        training.train(prepared(recipe)[0])
    out = Path(recipe.out)
    assert not (out / "adapter_model.safetensors").exists()
    file.write_text("\n".join(lines) + "\n")
    resumed = run_directory.resumed_recipe(None, {"out": str(out)})
    training.train(prepared(resumed, resume=True)[0])
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors(out).items())


def test_classes_must_be_known(bert_dir: str, write_rows: Write, tmp_path: Path) -> None:
    labelled = [{"text": f"the {WORDS[n % 10]}", "label": n % 2} for n in range(30)]
    held = write_rows(labelled[:6], "held.jsonl")
    settings = {"eval_data": held, "steps": 2, "streaming": True, "batch_size": 4}
    data = write_rows(labelled, "labelled.jsonl")
    recipe = Recipe(bert_dir, data, str(tmp_path / "out"), **settings)  # type: ignore[arg-type]
    with pytest.raises(lk.DataError, match="labels"):
        prepared(recipe)
    recipe.labels = ["0", "1"]
    assert training.train(prepared(recipe)[0]).steps == 2

    named = datasets.Dataset.from_list(labelled).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    named.to_parquet(str(tmp_path / "named.parquet"))
    named.select(range(6)).to_parquet(str(tmp_path / "held.parquet"))
    recipe = Recipe(
        bert_dir, str(tmp_path / "named.parquet"), str(tmp_path / "other"),
        **{**settings, "eval_data": str(tmp_path / "held.parquet")},  # type: ignore[arg-type]
    )  # fmt: skip
    run, _ = prepared(recipe)
    assert run.task.labels == ["no", "yes"]
    run.directory_lock.release()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": None}, "--steps"),
        ({"steps": None, "epochs": 2.0}, "--steps"),
        ({"eval_data": None}, "--eval-data"),
        ({"data": ["a.jsonl", "b.jsonl"]}, "--data-weights"),
        ({"group_by_length": True}, "--group-by-length"),
    ],
)
def test_what_a_stream_needs(changes: dict[str, Any], named: str, recipe: Recipe) -> None:
    with pytest.raises(lk.SettingError, match=f"--streaming .*{named}"):
        Recipe(**{**vars(recipe), **changes})


def test_rows_without_an_answer_are_left_out(recipe: Recipe, write_rows: Write) -> None:
    empty = [{"prompt": "the cat", "completion": ""}] * 9
    recipe.data = [write_rows([*rows(4), *empty], "empty.jsonl")]
    run, _ = prepared(recipe)
    assert len({tuple(ids) for ids in taken(run, 40)}) == 4


def test_a_hub_data_set_is_read_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append(streaming)
        content = datasets.Dataset.from_list([{"text": "a", "more": None}, {"text": "b"}])
        return content.to_iterable_dataset() if streaming else content

    monkeypatch.setattr(datasets, "load_dataset", load)
    with data_files.opened("org/set", streaming=True) as (found, _):
        streamed = list(found)
    assert streamed == data_files.table("org/set")[0]
    assert [row["text"] for _, row in streamed] == ["a", "b"] and asked == [True, False]
