"""Data as rows that say something, with their names for messages; and rows set apart."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakin.errors import DataError
from lorakin.training import data_files, formats
from lorakin.training.contents import Judged, Labelled, unpacked
from lorakin.training.formats import (
    CLASSIFICATION,
    DPO,
    FEEDBACK,
    KTO,
    LANGUAGE,
    MULTI_LABEL,
    ORPO,
    PREFERENCE,
    REGRESSION,
    REWARD,
    SEQ2SEQ,
    TOKEN_CLASSIFICATION,
)
from lorakin.training.messages import is_left_out
from lorakin.training.records import Record, Source, is_fraction

HOLDOUT_LIMIT = 256
"""The most rows that are held out."""
KINDS = {
    CLASSIFICATION: (CLASSIFICATION, MULTI_LABEL, REGRESSION),
    TOKEN_CLASSIFICATION: (TOKEN_CLASSIFICATION,),
    PREFERENCE: (DPO, ORPO, REWARD, KTO),
    FEEDBACK: (KTO,),
}
"""A format → the tasks that its rows are for, first the one that is meant if nobody says. Rows of
any other format are answers to imitate."""
ANSWERS = (LANGUAGE, SEQ2SEQ)
NEEDED = {
    **dict.fromkeys(KINDS[CLASSIFICATION], "a label (text, label; sentence1, sentence2, label)"),
    TOKEN_CLASSIFICATION: "tags (tokens, tags)",
    **dict.fromkeys(KINDS[PREFERENCE], "two answers (prompt, chosen, rejected)"),
    KTO: "verdicts (prompt, completion, label with true or false) or two answers (prompt, chosen, "
    "rejected)",
    **dict.fromkeys(ANSWERS, "answers to imitate (prompt, completion)"),
}
"""The word of a task → what its rows have."""


@dataclasses.dataclass(frozen=True)
class DataRows:
    """Data from one source or several.

    Attributes:
        name: the sources' names.
        records: the rows that are learned.
        chosen_task: the task that the user named, None if it is to be detected.
        left_out: how many rows say themselves that they are not to be learned.
        unused: keys that no format reads → how many rows have them.
    """

    name: str
    records: list[Record]
    left_out: int = 0
    chosen_task: str | None = None
    unused: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def by_source(self) -> list[DataRows]:
        """Returns the rows of each source, for those that have any."""
        groups = itertools.groupby(self.records, key=lambda record: id(record.source))
        parts = [list(group) for _, group in groups]
        return [dataclasses.replace(self, name=p[0].source.name, records=p) for p in parts]

    def first(self, most: int) -> DataRows:
        """Returns the first rows of each source."""
        parts = [part.records[:most] for part in self.by_source()]
        return dataclasses.replace(self, records=[record for part in parts for record in part])

    @property
    def formats(self) -> list[str]:
        """The formats of the sources, each once."""
        return list(dict.fromkeys(record.source.format.name for record in self.records))

    @property
    def is_classification(self) -> bool:
        """Whether each row is a text, or a pair of texts, and its label."""
        return self.formats == [CLASSIFICATION]

    @property
    def has_labels(self) -> bool:
        """Whether the rows hold classes or numbers, and not answers in words."""
        return self.is_classification or self.formats == [TOKEN_CLASSIFICATION]

    @cached_property
    def task(self) -> str:
        """The word of the task that the rows are for: the user's, or what their labels are."""
        if self.chosen_task is not None:
            return self.chosen_task
        if not self.is_classification:
            return tasks_of(self.formats[0])[0]
        labels = [r.content.label for r in self.records if isinstance(r.content, Labelled)]
        if any(isinstance(unpacked(label), list) for label in labels):
            return MULTI_LABEL
        named = any(record.source.label_names for record in self.records)
        is_number = not named and any(is_fraction(label) for label in labels)
        return REGRESSION if is_number else CLASSIFICATION

    def labels(self) -> list[str]:
        """Returns the classes, in order.

        Raises:
            DataError: a label is not a class, labels are of two kinds, or there is only one class.
        """
        if self.task == REGRESSION:
            return [self.records[0].source.format.columns[-1]]
        by_source = {record.source.name: record.source.label_names for record in self.records}
        if named := [names for names in by_source.values() if names is not None]:
            return list(dict.fromkeys(name for names in named for name in names))
        if self.task in (MULTI_LABEL, TOKEN_CLASSIFICATION):
            names_of = Record.tags if self.task == TOKEN_CLASSIFICATION else Record.label_set
            found = {label for record in self.records for label in names_of(record)}
            return sorted(found, key=lambda label: (int(label) if label.isdigit() else -1, label))
        labels = {record.label() for record in self.records}
        if len(labels) < 2:
            raise DataError(
                f"{self.name}: all {len(self)} rows have the same label {next(iter(labels))!r}"
            )
        contents = [record.content for record in self.records]
        kinds = {isinstance(c.label, str | bool) for c in contents if isinstance(c, Labelled)}
        if len(kinds) > 1:
            raise DataError(f"{self.name}: some labels are text and some are numbers; use one kind")
        return sorted(labels) if kinds == {True} else sorted(labels, key=int)


def tasks_of(name: str) -> tuple[str, ...]:
    """Returns the words of the tasks that rows of a format are for.

    >>> tasks_of("feedback"), tasks_of("alpaca")
    (('kto',), ('language', 'seq2seq'))
    """
    return KINDS.get(name, ANSWERS)


def read_rows(
    names: str | Sequence[str],
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
    task: str | None = None,
    most: int | None = None,
) -> DataRows:
    """Reads data files or hub data sets, and what their rows say.

    Args:
        names: one or several: a file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv, .txt or
            .parquet, perhaps with .gz after it; or a hub data set, as org/set, org/set:split or
            org/set:config:split.
        columns: a format's column → the column that stands for it in the data. Others are
            ignored then.
        layout: the name of the format; by default it is detected.
        task: the word of the task; by default it is detected.
        most: how many rows of each are read, the first ones; None for all.

    Raises:
        DataError: nothing there, unreadable, no rows, columns of no known format, or a row that
            cannot be used as it is.
    """
    if layout is not None and layout not in formats.NAMES:
        raise DataError(f"format must be one of {', '.join(formats.NAMES)}, not {layout!r}")
    names = [names] if isinstance(names, str) else names
    parts = [_read_one(name, columns or {}, layout, most) for name in names]
    if len({tasks_of(part.formats[0]) for part in parts}) > 1:
        kinds = "; ".join(f"{part.name} has format {part.formats[0]}" for part in parts)
        raise DataError(f"data for different tasks cannot be mixed: {kinds}")
    unused: collections.Counter[str] = collections.Counter()
    for part in parts:
        unused.update(part.unused)
    rows = DataRows(
        ", ".join(part.name for part in parts),
        [record for part in parts for record in part.records],
        sum(part.left_out for part in parts),
        task,
        unused,
    )
    if task is not None and task not in tasks_of(rows.formats[0]):
        raise DataError(
            f"--task {task} needs rows with {NEEDED[task]}, but {rows.name} has format "
            f"{rows.formats[0]}; say which columns are meant with --columns"
        )
    # Rows that are set apart may look like another task by themselves.
    return dataclasses.replace(rows, chosen_task=rows.task)


def _read_one(
    name: str, columns: Mapping[str, str], layout: str | None, most: int | None
) -> DataRows:
    numbered, label_names = data_files.table(name, most)
    if not numbered:
        raise DataError(f"data {name!r} has no rows")
    if columns:
        numbered = [(number, mapped(name, number, row, columns)) for number, row in numbered]
    values = [row for _, row in numbered]
    row_format = formats.detected(values, name, layout)
    last_column = row_format.columns[-1]
    source = Source(name, row_format, label_names.get(columns.get(last_column, last_column)))
    found = list(_records(source, numbered, is_mapped=bool(columns)))
    if not found:
        raise DataError(
            f"data {name!r}: all {len(values)} rows say that they are not to be learned"
        )
    left_out = len(values) - len(found)
    return DataRows(name, found, left_out, None, formats.unused_keys(row_format, values))


def records(
    source: Source, numbered: Iterable[tuple[int, dict[str, Any]]], columns: Mapping[str, str]
) -> Iterator[Record]:
    """Yields what the rows of a source say, but for those that are not to be learned.

    Args:
        source: their source, with their format.
        numbered: the rows, each with its number.
        columns: as for `read_rows`.

    Raises:
        DataError: a row that cannot be used as it is.
    """
    if columns:
        numbered = ((n, mapped(source.name, n, row, columns)) for n, row in numbered)
    return _records(source, numbered, is_mapped=bool(columns))


def _records(
    source: Source, numbered: Iterable[tuple[int, dict[str, Any]]], is_mapped: bool
) -> Iterator[Record]:
    for number, row in numbered:
        try:
            if not is_left_out(row):
                content = formats.read(source.format, row, mapped=is_mapped)
                yield Record(source, number, row, content)
        except DataError as error:
            raise DataError(
                f"{source.name}, row {number}: {error} (format {source.format.name}). The row: "
                f"{row_in_message(row)}"
            ) from None


def mapped(
    name: str, number: int, row: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    if missing := [source for source in columns.values() if source not in row]:
        raise DataError(
            f"{name}, row {number}: there is no column {missing[0]!r}; "
            f"there are {', '.join(map(str, row))}"
        )
    return {target: row[source] for target, source in columns.items()}


def row_in_message(row: Mapping[str, Any]) -> str:
    """Returns a row for a message, at most 200 characters of it."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def split(rows: DataRows, share: float, seed: int) -> tuple[DataRows, DataRows]:
    """Sets rows apart to evaluate on; returns the rows to train on, and those. Both keep the order.

    Args:
        rows: the rows.
        share: the share that is set apart, at least one row and at most 256.
        seed: draws them.

    Raises:
        DataError: there are fewer than two rows.
    """
    count = len(rows)
    if count < 2:
        raise DataError(
            f"{rows.name}: {count} row is too few to set one apart; "
            "give held-out rows with --eval-data"
        )
    size = min(max(1, round(share * count)), HOLDOUT_LIMIT, count - 1)
    held_out = set(random.Random(seed).sample(range(count), size))
    train = [record for n, record in enumerate(rows.records) if n not in held_out]
    test = [record for n, record in enumerate(rows.records) if n in held_out]
    return dataclasses.replace(rows, records=train), dataclasses.replace(rows, records=test)


def summary(rows: DataRows) -> str:
    """Returns one line about rows: how many, of which format, and the classes with their counts."""
    line = f"{len(rows):,} rows, format {' and '.join(rows.formats)}"
    if rows.task == REGRESSION:
        numbers = [record.number_label() for record in rows.records]
        line += f", a number from {min(numbers):g} to {max(numbers):g}"
    elif rows.formats == [FEEDBACK]:
        good = sum(isinstance(r.content, Judged) and r.content.is_good for r in rows.records)
        line += f": good × {good:,}, bad × {len(rows) - good:,}"
    elif rows.is_classification:
        named = (
            record.label_set() if rows.task == MULTI_LABEL else [record.label()]
            for record in rows.records
        )
        counts = collections.Counter(label for labels in named for label in labels)
        line += ": " + ", ".join(f"{value!r} × {count:,}" for value, count in counts.most_common(8))
    if rows.left_out:
        line += f"; {rows.left_out:,} more are left out, as they say themselves"
    return line


def unused(rows: DataRows) -> str | None:
    """Returns what rows hold that is not read, in words; None if there is nothing."""
    if not rows.unused:
        return None
    keys = [f"{key} (in {count:,} rows)" for key, count in rows.unused.items()]
    return f"not used: {', '.join(keys)}"
