"""The three parts of a data set share no row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakin.compare.split import REPORT, TRAIN, TUNE, split_into
from lorakin.errors import DataError
from lorakin.training.contents import Labelled
from lorakin.training.reading import DataRows, read_rows


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "completion": f"answer {n}"}
        for n in range(start, start + count)
    ]


def every(rows: DataRows) -> DataRows:
    return rows


def read(folder: Path) -> dict[str, list[str]]:
    return {part: (folder / part).read_text().splitlines() for part in (TRAIN, TUNE, REPORT)}


def test_the_parts_are_all_rows_and_share_none(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    parts = split_into(tmp_path / "data", write_rows(rows(200)), None, 8, every)
    there = read(tmp_path / "data")
    assert (parts.train, parts.tune, parts.report, parts.left_out) == (150, 20, 30, "")
    assert [len(there[part]) for part in (TRAIN, TUNE, REPORT)] == [150, 20, 30]
    assert sorted(line for lines in there.values() for line in lines) == sorted(
        json.dumps(row) for row in rows(200)
    )
    split_into(tmp_path / "again", write_rows(rows(200)), None, 8, every)
    assert read(tmp_path / "again") == there


def test_of_a_long_file_the_first_rows(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    split_into(tmp_path / "data", write_rows(rows(500)), None, 8, every, most=200)
    there = read(tmp_path / "data")
    assert sorted(line for lines in there.values() for line in lines) == sorted(
        json.dumps(row) for row in rows(200)
    )


def test_of_rows_with_labels_more_are_held_out(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    labelled = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(8000)]
    parts = split_into(tmp_path / "labels", write_rows(labelled), None, 8, every)
    assert (parts.train, parts.tune, parts.report) == (6464, 512, 1024)
    parts = split_into(tmp_path / "answers", write_rows(rows(8000)), None, 8, every)
    assert (parts.train, parts.tune, parts.report) == (7616, 128, 256)


def test_what_is_there_twice_is_taken_once(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    parts = split_into(tmp_path / "data", write_rows(rows(100) + rows(60)), None, 8, every)
    assert "60" in parts.left_out
    everything = [line for lines in read(tmp_path / "data").values() for line in lines]
    assert len(everything) == len(set(everything)) == 100


def test_rows_to_report_on_are_not_trained_on(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    data, held = write_rows(rows(100)), write_rows(rows(30, start=90), "held.jsonl")
    parts = split_into(tmp_path / "data", data, held, 8, every)
    there = read(tmp_path / "data")
    assert parts.report == 30
    assert "10" in parts.left_out
    assert not set(there[REPORT]) & {*there[TRAIN], *there[TUNE]}


def test_classes_keep_their_names(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    labelled = [
        {"text": f"text {n}", "label": "yes" if n % 2 else "no", "unused": n} for n in range(80)
    ]
    parts = split_into(tmp_path / "data", write_rows(labelled), None, 8, every)
    assert parts.labels == ["no", "yes"]
    assert json.loads(read(tmp_path / "data")[TRAIN][0]).keys() == {"text", "label"}


@pytest.mark.parametrize(("count", "repeated"), [(47, 1), (1, 1), (40, 5)])
def test_too_few_rows_are_refused_with_the_numbers(
    tmp_path: Path, write_rows: Callable[..., str], count: int, repeated: int
) -> None:
    with pytest.raises(DataError, match=rf"{count * repeated} rows.* 32 .*at least 16"):
        split_into(tmp_path / "data", write_rows(rows(count) * repeated), None, 8, every)
    assert not (tmp_path / "data").exists()


def test_rows_that_teach_nothing_are_left_out_before_the_draw(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    def keep_learnable(rows: DataRows) -> DataRows:
        return dataclasses.replace(rows, records=rows.records[:60])

    parts = split_into(tmp_path / "data", write_rows(rows(100)), None, 8, keep_learnable)
    assert (parts.train, parts.tune, parts.report) == (28, 16, 16)
    assert "40" in parts.left_out
    assert {
        json.loads(line)["prompt"] for lines in read(tmp_path / "data").values() for line in lines
    } == {f"question {n}" for n in range(60)}


def test_other_kinds_of_rows_are_refused(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    labelled = write_rows([{"text": "a", "label": "b"}], "held.jsonl")
    with pytest.raises(DataError, match="classification.* prompt/completion"):
        split_into(tmp_path / "data", write_rows(rows(100)), labelled, 8, every)


def test_labels_of_every_task_come_back(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    """Pairs with several classes, and numbers, some of which look like classes."""
    pairs = [
        {"premise": f"one {n}", "hypothesis": "two", "label": ["b", "a"][: n % 3]}
        for n in range(80)
    ]
    parts = split_into(tmp_path / "sets", write_rows(pairs), None, 8, every)
    assert (parts.task, parts.labels) == ("multi-label", ["a", "b"])
    path = str(tmp_path / "sets" / TRAIN)
    again = read_rows(path, layout=parts.format, task=parts.task)
    known = {row["premise"]: row["label"] for row in pairs}
    for record in again.records:
        assert isinstance(record.content, Labelled)
        assert record.content.second == "two"
        assert record.label_set() == known[record.content.text]

    numbers = [{"text": f"text {n}", "score": n / 2 if n % 5 else n} for n in range(80)]
    numbers = [{"text": row["text"], "label": row["score"]} for row in numbers]
    parts = split_into(tmp_path / "numbers", write_rows(numbers), None, 8, every)
    assert (parts.task, parts.labels) == ("regression", ["label"])
    rows = read_rows(str(tmp_path / "numbers" / REPORT), layout=parts.format, task=parts.task)
    expected = {row["text"]: row["label"] for row in numbers}
    for record in rows.records:
        assert isinstance(record.content, Labelled)
        assert record.number_label() == expected[record.content.text]


def test_a_class_that_only_the_rows_to_report_on_have_is_refused(
    tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    data = write_rows([{"text": f"t {n}", "label": "ab"[n % 2]} for n in range(80)])
    held = write_rows([{"text": f"u {n}", "label": "abc"[n % 3]} for n in range(30)], "held.jsonl")
    with pytest.raises(DataError, match=r"held\.jsonl, row 3: label 'c' is none of a, b"):
        split_into(tmp_path / "data", data, held, 8, every)
    assert not (tmp_path / "data").exists()
