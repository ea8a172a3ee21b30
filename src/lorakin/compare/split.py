"""Splits a data set into three disjoint parts: for training, for tuning, and for the report."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakin.errors import DataError
from lorakin.storage import atomic
from lorakin.storage.schema import Count
from lorakin.training.contents import Number
from lorakin.training.formats import (
    CLASSIFICATION,
    LANGUAGE,
    MULTI_LABEL,
    REGRESSION,
    REWARD,
    TOKEN_CLASSIFICATION,
)
from lorakin.training.reading import ANSWERS, DataRows, read_rows, tasks_of
from lorakin.training.records import Record

TRAIN, TUNE, REPORT = "train.jsonl", "tune.jsonl", "report.jsonl"
LEAST_HELD, MOST_TUNE, MOST_REPORT = 16, 128, 256
MORE_WITH_LABELS = 4
"""So many times more rows are held out where a row has a label: it tells less than an answer of
many tokens, and takes less time."""
LABEL_OF: dict[str, Callable[[Record], Any]] = {
    CLASSIFICATION: Record.label,
    MULTI_LABEL: Record.label_set,
    REGRESSION: Record.number_label,
    TOKEN_CLASSIFICATION: Record.tags,
}
"""Word of a task → what a row's label is, by name: numbers of classes mean nothing alone."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a data set was split.

    Attributes:
        train, tune, report: the number of rows in each part.
        left_out: how many rows were left out and why, in words.
        labels: the classes of a classifier.
        format: the format of the rows.
        task: the word of the task; None in comparisons from before it was kept.
    """

    train: Count
    tune: Count
    report: Count
    left_out: str
    labels: list[str] | None
    format: str | None = None
    task: str | None = None

    @property
    def task_word(self) -> str:
        """The word of the task."""
        return self.task or (LANGUAGE if self.labels is None else CLASSIFICATION)


def split_into(
    folder: Path,
    name: str,
    eval_name: str | None,
    batch: int,
    keep_learnable: Callable[[DataRows], DataRows],
    columns: Mapping[str, str] | None = None,
    format_name: str | None = None,
    task: str | None = None,
    most: int | None = None,
) -> Parts:
    """Splits the data set `name` and writes the parts into `folder`.

    A row that occurs twice is used once, so that no held-out row is trained on. The split is
    random but the same every time.

    Args:
        folder: where the parts are written; it is created if needed.
        name: a file or a hub data set.
        eval_name: a data set to report on; None holds out a part of `name`.
        batch: the number of rows in an optimizer step.
        keep_learnable: returns the rows that a model can learn from.
        columns: see `read_rows`.
        format_name: the format of the rows; None detects it.
        task: the word of the task; None detects it.
        most: how many rows of `name` are read, the first ones; None for all.

    Raises:
        DataError: the data cannot be read, or has too few rows. Nothing is written.
    """
    rows = read_rows(name, columns, format_name, task, most)
    kept = keep_learnable(rows)
    labels = rows.labels() if rows.has_labels else [REWARD] if rows.task == REWARD else None
    report = []
    if eval_name is not None:
        word = None if rows.task in ANSWERS else rows.task
        given = read_rows(eval_name, columns, format_name, word)
        report = _report_rows(given, rows, eval_name, name, keep_learnable)

    reported = {_key(row) for row in report}
    distinct = _distinct(kept)
    remaining = [row for row in distinct if _key(row) not in reported]
    counts = {
        "without an answer within --max-length": len(rows) - len(kept),
        "that occur twice": len(kept) - len(distinct),
        "that are to be reported on": len(distinct) - len(remaining),
    }
    left_out = ", ".join(f"{count:,} rows {why}" for why, count in counts.items() if count)

    random.Random(0).shuffle(remaining)
    times = MORE_WITH_LABELS if rows.has_labels else 1
    tune = _share(len(remaining), 0.1, times * MOST_TUNE)
    held_out = tune + (0 if report else _share(len(remaining), 0.15, times * MOST_REPORT))
    if len(remaining) < held_out + max(batch, LEAST_HELD):
        without = f" ({left_out})" if left_out else ""
        or_eval = "" if eval_name else ", or rows to report on with --eval-data"
        raise DataError(
            f"{name}: {len(rows)} rows{without} are too few for a comparison: {held_out} are held "
            f"out for tuning and for the report, and at least {max(batch, LEAST_HELD)} must "
            f"remain for training; give more rows{or_eval}"
        )

    parts = {
        TUNE: remaining[:tune],
        REPORT: report or remaining[tune:held_out],
        TRAIN: remaining[held_out:],
    }
    atomic.write(folder, {part: _as_lines(rows_of_part) for part, rows_of_part in parts.items()})
    return Parts(
        train=len(parts[TRAIN]),
        tune=len(parts[TUNE]),
        report=len(parts[REPORT]),
        left_out=left_out,
        labels=labels,
        format=rows.formats[0],
        task=rows.task,
    )


def _report_rows(
    given: DataRows,
    rows: DataRows,
    eval_name: str,
    name: str,
    keep_learnable: Callable[[DataRows], DataRows],
) -> list[dict[str, Any]]:
    """Returns the rows of --eval-data, if they are enough and of the same kind as the others."""
    if tasks_of(given.formats[0]) != tasks_of(rows.formats[0]):
        raise DataError(
            f"{eval_name} has format {given.formats[0]}, but {name} has {rows.formats[0]}"
        )
    if rows.has_labels and rows.task != REGRESSION:
        _check_known(given, rows.labels())
    report = _distinct(keep_learnable(given))
    if len(report) < LEAST_HELD:
        raise DataError(
            f"{eval_name}: {len(report)} usable rows are too few to report on; give at least "
            f"{LEAST_HELD}"
        )
    return report


def _check_known(given: DataRows, labels: Sequence[str]) -> None:
    """Refuses rows with a class that the rows to train on do not have."""
    for record in given.records:
        found = LABEL_OF[given.task](record)
        for label in found if isinstance(found, list) else [found]:
            if label not in labels:
                raise DataError(
                    f"{record.where}: label {label!r} is none of {', '.join(labels)}, the classes "
                    "of the rows to train on"
                )


def _as_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _share(count: int, share: float, most: int) -> int:
    return min(max(LEAST_HELD, round(share * count)), most)


def _distinct(rows: DataRows) -> list[dict[str, Any]]:
    """Returns each row once, in its format's columns, with the label as the task reads it."""
    label_of = LABEL_OF.get(rows.task)
    distinct: dict[str, dict[str, Any]] = {}
    for record in rows.records:
        row_format = record.source.format
        row = {
            name: _plain(record.values[name])
            for name in (*row_format.columns, *row_format.optional)
            if name in record.values
        }
        if label_of is not None:
            row[row_format.columns[-1]] = label_of(record)
        try:
            distinct.setdefault(_key(row), row)
        except TypeError as error:
            raise DataError(f"{record.where}: a value cannot be written as JSON: {error}") from None
    return list(distinct.values())


def _plain(value: Any) -> Any:
    """Returns the value with numbers as the file wrote them."""
    if isinstance(value, Number):
        return value.literal
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)
