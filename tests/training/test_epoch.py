"""How many rows are read, how often each comes, and in which batches; all resumed to the bit."""

from __future__ import annotations

import collections
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import datasets
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices
from typer.testing import CliRunner

import lorakin as lk
from lorakin.cli.app import app
from lorakin.training import data_files, run_directory
from lorakin.training import train as training
from lorakin.training.epoch import EpochFigures, EpochLengthGroups, padding_share, weighted_counts
from lorakin.training.preview import preview, recipe_for
from lorakin.training.reading import read_rows
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe, write_recipe
from training.saved import prepared, tensors

Write = Callable[..., str]
WORDS = "the a cat dog bird sat ran flew on over".split()


def rows(count: int, first: str = "the") -> list[dict[str, str]]:
    """Rows of 1 to 10 words, that no other has."""
    return [
        {"prompt": f"{first} {WORDS[n % 10]}", "completion": " ".join(WORDS[: 1 + n % 10])}
        for n in range(count)
    ]


@pytest.fixture
def recipe(model_dir: str, write_rows: Write, tmp_path: Path) -> Recipe:
    held_out = write_rows(rows(6), "held.jsonl")
    data = [write_rows(rows(30), "many.jsonl"), write_rows(rows(7, "two"), "few.jsonl")]
    return Recipe(
        model_dir, data, str(tmp_path / "out"), eval_data=held_out, rank=4, lr=1e-2, steps=6,
        dtype="float32", batch_size=4,
    )  # fmt: skip


def check_resumed(recipe: Recipe, last: int) -> None:
    """Trains, and resumes a copy that lacks the last checkpoint: to the same bits."""
    training.train(prepared(recipe)[0])
    whole, half = tensors(Path(recipe.out)), Path(f"{recipe.out}-half")
    shutil.copytree(recipe.out, half)
    shutil.rmtree(half / "checkpoints" / f"checkpoint-{last}")
    resumed = run_directory.resumed_recipe(None, {"out": str(half)})
    training.train(prepared(resumed, resume=True)[0])
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors(half).items())


# --max-rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_the_first_rows_are_read_and_no_more(name: str, tmp_path: Path) -> None:
    content = {
        "a.jsonl": '{"text": "one"}\n{"text": "two"}\n{"text": "three"}\nnot JSON\n',
        "a.json": '[{"text": "one"}, {"text": "two"}, {"text": "three"}]',
        "a.csv": 'text\none\ntwo\nthree\n"not closed\n',
        "a.txt": "one\n\ntwo\nthree\n",
    }
    path = tmp_path / name
    if name == "a.parquet":
        datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).to_parquet(str(path))
    elif name == "a.jsonl.gz":
        path.write_bytes(gzip.compress(content["a.jsonl"].encode()))
    else:
        path.write_text(content[name])
    found = read_rows(str(path), layout="text", most=2)
    assert [record.values["text"] for record in found.records] == ["one", "two"]


def test_no_more_is_read_of_a_long_file(
    monkeypatch: pytest.MonkeyPatch, write_rows: Write, tmp_path: Path
) -> None:
    read = collections.Counter[str]()
    reader = data_files.READERS[".jsonl"]

    def counted(file: IO[bytes]) -> Any:
        def rows_of() -> Iterator[Any]:
            for row in reader(file)[0]:
                read["rows"] += 1
                yield row

        return rows_of(), {}

    monkeypatch.setitem(data_files.READERS, ".jsonl", counted)
    assert len(read_rows(write_rows(rows(500)), most=3)) == 3
    assert read["rows"] == 3


def test_held_out_rows_come_on_top(recipe: Recipe) -> None:
    recipe.max_rows = 5
    run, _ = prepared(recipe)
    assert len(run.train.examples) == 10 and len(run.held_out.examples) == 6
    run.directory_lock.release()
    recipe.eval_data, recipe.data, recipe.out = None, recipe.data[:1], f"{recipe.out}-2"
    run, _ = prepared(recipe)
    assert len(run.train.examples) == 5 and len(run.held_out.examples) >= 1
    assert all(int(place.rpartition(" ")[2]) <= 7 for place in run.train.where)
    run.directory_lock.release()


# --data-weights


def test_an_epoch_has_the_shares_and_every_row(recipe: Recipe) -> None:
    recipe.data_weights, recipe.steps, recipe.epochs = [1.0, 2.0], None, 1.0
    run, shown = prepared(recipe)
    order = run.epoch.order
    assert order is not None
    times = collections.Counter(order)
    assert [times[n] for n in range(30)] == [1] * 30
    assert {times[n] for n in range(30, 37)} == {8, 9} and len(order) == 90
    assert run.total_steps == 23
    assert "60 of" in shown and "30 of" in shown
    dataset = run.epoch.dataset()
    assert len(dataset) == 90 and dataset[89] == run.train.examples[order[89]]
    run.directory_lock.release()


def test_weights_are_shares() -> None:
    """The same shares as datasets' interleaving has on average, until each row has come."""
    assert weighted_counts([1000, 100], [2, 1]) == weighted_counts([1000, 100], [4, 2])
    assert weighted_counts([10, 10, 10], [1, 1, 2]) == [10, 10, 20]
    parts = [datasets.Dataset.from_dict({"n": [k] * size}) for k, size in enumerate((9000, 3000))]
    mixed = datasets.interleave_datasets(
        parts, probabilities=[2 / 3, 1 / 3], seed=0, stopping_strategy="all_exhausted"
    )
    share = sum(mixed["n"]) / len(mixed)
    first, second = weighted_counts([9000, 3000], [2, 1])
    assert second / (first + second) == pytest.approx(share, abs=0.02)


def test_weights_are_resumed_to_the_bit(recipe: Recipe) -> None:
    """At most 20 rows of the first source and 7 of the other: 10 steps an epoch."""
    recipe.data_weights, recipe.save_every, recipe.steps = [1.0, 2.0], 17, 19
    recipe.max_rows = 20
    check_resumed(recipe, 19)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, 0.0], "1,x"])
def test_weights_that_are_none(weights: Any, recipe: Recipe) -> None:
    options = ["--model", recipe.model, "--data", recipe.data[0], "--data", recipe.data[1]]
    said = weights if isinstance(weights, str) else ",".join(map(str, weights))
    run = CliRunner().invoke(app, ["train", *options, "--out", recipe.out, "--data-weights", said])
    assert isinstance(run.exception, lk.SettingError)
    assert not Path(recipe.out).exists()


def test_a_source_whose_rows_are_all_held_out(recipe: Recipe, write_rows: Write) -> None:
    recipe.eval_data = None
    recipe.data = [write_rows(rows(1), "a.jsonl"), write_rows(rows(1), "b.jsonl")]
    recipe.data_weights = [1.0, 1.0]
    with pytest.raises(lk.DataError, match=r"[ab]\.jsonl"):
        prepared(recipe)


def test_a_recipe_keeps_them(recipe: Recipe, tmp_path: Path) -> None:
    recipe.data_weights, recipe.max_rows = [2.0, 0.5], 4
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml", {}) == recipe


# --group-by-length


def test_the_order_is_transformers_own_and_the_epochs() -> None:
    lengths = [7, 1, 3, 9, 9, 2, 5, 4, 4, 8, 1, 6]
    sampler = EpochLengthGroups(lengths, 4, seed=3)
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        generator = torch.Generator().manual_seed(3 + epoch)
        assert list(sampler) == get_length_grouped_indices(lengths, 4, generator=generator)


def test_grouping_saves_padding(recipe: Recipe) -> None:
    recipe.group_by_length = True
    run, shown = prepared(recipe)
    figures = EpochFigures.of(run.epoch, recipe)
    assert figures.padding < figures.padding_mixed
    assert f"{figures.padding:.1%}" in shown
    run.directory_lock.release()
    assert padding_share([3, 3], [0, 1], 2) == 0.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_grouping_is_resumed_in_a_later_epoch(recipe: Recipe, accumulate: int) -> None:
    """37 rows in batches of 4 are 10 steps an epoch, or 5; step 14 lies inside a later one."""
    recipe.group_by_length, recipe.accumulate = True, accumulate
    recipe.save_every, recipe.steps = 14, 17
    recipe.dropout = 0.1
    check_resumed(recipe, 17)


def test_the_preview_shows_them(recipe: Recipe) -> None:
    options = {"eval_data": recipe.eval_data, "batch_size": 4}
    found = preview(
        recipe_for(
            recipe.model, recipe.data, data_weights=[1.0, 2.0], group_by_length=True, **options
        )
    )
    assert [count for _, count in found.epoch.of_sources or []] == [30, 60]
    assert found.epoch.padding < found.epoch.padding_mixed
    assert len(list(found.epoch.lines())) == 2
    json.dumps(found.as_dict())
