"""A data set in three parts that never meet: to train on, to choose learning rates by, and to report."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakin.errors import DataError
from lorakin.storage import atomic
from lorakin.storage.schema import Count
from lorakin.training.contents import Number
from lorakin.training.reading import DataRows, read_rows

TRAIN, TUNE, REPORT = "train.jsonl", "tune.jsonl", "report.jsonl"
LEAST_HELD, MOST_TUNE, MOST_REPORT = 16, 128, 256


@dataclasses.dataclass(frozen=True)
class Parts:
    """How many rows each part has, what was left out, in words, and the classes of a classifier."""

    train: Count
    tune: Count
    report: Count
    left_out: str
    labels: list[str] | None
    format: str | None = None


def split_into(
    folder: Path,
    name: str,
    eval_name: str | None,
    batch: int,
    usable: Callable[[DataRows], DataRows],
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> Parts:
    """Write the three parts of the data set `name` into `folder`; those that `eval_name` has are the ones to report on.

    A row that is there twice is taken once, so that no held-out row was trained on. The draw is the same every time.

    Args:
        folder: where to; made if need be.
        name: a file or a hub data set.
        eval_name: another, or None.
        batch: rows of an optimizer step.
        usable: gives those rows that a model can learn from.
        columns: see `read_rows`.
        layout: see `read_rows`.

    Raises:
        DataError: data that cannot be read, or too little for parts of 16 rows and one batch. Nothing is written then.
    """
    rows = read_rows(name, columns, layout)
    given = read_rows(eval_name, columns, layout) if eval_name is not None else None
    if given is not None and given.is_classification != rows.is_classification:
        raise DataError(
            f"{eval_name} has format {given.formats[0]}, but {name} has {rows.formats[0]}"
        )
    report = _distinct(usable(given)) if given is not None else []
    if given is not None and len(report) < LEAST_HELD:
        raise DataError(
            f"{eval_name}: {len(report)} rows that can be used are too few to report on; at least {LEAST_HELD}"
        )
    kept, reported = usable(rows), {_key(row) for row in report}
    once = _distinct(kept)
    distinct = [row for row in once if _key(row) not in reported]
    counts = {
        "without an answer within --max-length": len(rows) - len(kept),
        "that are there before": len(kept) - len(once),
        "that are to be reported on": len(once) - len(distinct),
    }
    left_out = ", ".join(f"{count:,} rows {why}" for why, count in counts.items() if count)
    random.Random(0).shuffle(distinct)
    tune = _share(len(distinct), 0.1, MOST_TUNE)
    held = tune + (_share(len(distinct), 0.15, MOST_REPORT) if given is None else 0)
    if len(distinct) < held + max(batch, LEAST_HELD):
        without = f" ({left_out})" if left_out else ""
        raise DataError(
            f"{name}: {len(rows)} rows{without} are too few to compare on: {held} are held out, to choose learning rates "
            f"by and to report on, and at least {max(batch, LEAST_HELD)} must be left to train on; give more rows"
            + ("" if eval_name else ", or the rows to report on with --eval-data")
        )
    parts = {TUNE: distinct[:tune], REPORT: report or distinct[tune:held], TRAIN: distinct[held:]}
    text = {
        part: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        for part, chosen in parts.items()
    }
    atomic.write(folder, {part: content.encode() for part, content in text.items()})
    labels = rows.labels() if rows.is_classification else None
    return Parts(
        len(parts[TRAIN]), len(parts[TUNE]), len(parts[REPORT]), left_out, labels, rows.formats[0]
    )


def _share(count: int, share: float, most: int) -> int:
    return min(max(LEAST_HELD, round(share * count)), most)


def _distinct(rows: DataRows) -> list[dict[str, Any]]:
    """The rows in their format's columns, classes by name, each once."""
    found: dict[str, dict[str, Any]] = {}
    for record in rows.records:
        layout = record.source.format
        plain = {
            name: _plain(record.values[name])
            for name in (*layout.columns, *layout.optional)
            if name in record.values
        }
        if rows.is_classification:
            plain[layout.columns[-1]] = record.label()
        try:
            found.setdefault(_key(plain), plain)
        except TypeError as error:
            raise DataError(f"{record.where}: it holds what JSON cannot: {error}") from None
    return list(found.values())


def _plain(value: Any) -> Any:
    """The value, its numbers as the file wrote them."""
    if isinstance(value, Number):
        return value.literal
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)
