"""Rows that are read, mixed and tokenised while training, for data that does not fit in memory."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch

from lorakin.errors import DataError
from lorakin.training import data_files, reading
from lorakin.training.batches import Row
from lorakin.training.encoding import Encoded, NothingLearnedError
from lorakin.training.formats import REGRESSION
from lorakin.training.packing import packed
from lorakin.training.reading import DataRows
from lorakin.training.recipe import Recipe
from lorakin.training.records import Source
from lorakin.training.tasks import WITH_LABELS

SAMPLE = 1000
"""Rows of each source that are read before training: they tell its format, and are shown."""
BUFFER = 1000
"""Rows of each source that are mixed: each comes at random from among so many."""
AT_ONCE = 100
"""Rows that are tokenised together."""
WINDOW = 1000
"""Rows that are packed together."""


class TrainingStream(torch.utils.data.IterableDataset[Row]):
    """Tokenised rows without an end, in an order that the recipe's seed decides.

    Each source is read from its first row to its last, again and again, mixed in another order each
    time. Weights say how often a source's turn comes.

    Args:
        recipe: its columns, weights, seed and packing.
        sample: rows of each source, which tell its format and the task.
        encode: tokenises rows.
    """

    def __init__(
        self, recipe: Recipe, sample: DataRows, encode: Callable[[DataRows], Encoded]
    ) -> None:
        self.recipe, self.sample, self.encode = recipe, sample, encode
        self.sources = [part.records[0].source for part in sample.by_source()]

    def __iter__(self) -> Iterator[Row]:
        """Yields rows, or packed sequences of them.

        Raises:
            DataError: a row cannot be used, or a source has none to learn from.
        """
        rows = self._rows()
        if not self.recipe.packing:
            yield from rows
        for number in itertools.count():
            window = list(itertools.islice(rows, WINDOW))
            seed = self.recipe.seed + number
            sequences = packed(window, self.recipe.max_length, seed)
            random.Random(seed).shuffle(sequences)
            yield from sequences

    def _rows(self) -> Iterator[Row]:
        weights = self.recipe.data_weights or [1.0]
        parts = [self._passes(source) for source in self.sources]
        chance = random.Random(self.recipe.seed)
        while True:
            (part,) = chance.choices(parts, weights)
            yield next(part)

    def _passes(self, source: Source) -> Iterator[Row]:
        """Yields the rows of a source, again and again."""
        raw = {"name": source.name, "most": self.recipe.max_rows}
        rows: Any = datasets.IterableDataset.from_generator(_raw_rows, gen_kwargs=raw)
        rows = rows.shuffle(seed=self.recipe.seed, buffer_size=BUFFER)
        for number in itertools.count():
            rows.set_epoch(number)
            is_empty = True
            mixed = iter(rows)
            while some := list(itertools.islice(mixed, AT_ONCE)):
                for example in self._tokenised(source, some):
                    is_empty = False
                    yield example
            if is_empty:
                raise DataError(f"{source.name}: no row has anything to learn")

    def _tokenised(self, source: Source, rows: Sequence[Mapping[str, Any]]) -> Sequence[Row]:
        numbered = ((row["number"], row["columns"]) for row in rows)
        records = list(reading.records(source, numbered, self.recipe.columns))
        part = dataclasses.replace(self.sample, name=source.name, records=records)
        try:
            return self.encode(part).examples if records else []
        except NothingLearnedError:
            return []


def _raw_rows(name: str, most: int | None) -> Iterator[dict[str, Any]]:
    with data_files.opened(name, streaming=True) as (rows, _):
        for number, columns in itertools.islice(rows, most):
            yield {"number": number, "columns": columns}


def check_labels(recipe: Recipe, sample: DataRows) -> None:
    """Checks that the classes of rows are known before all rows are read.

    Raises:
        DataError: they are not.
    """
    if sample.task not in WITH_LABELS or sample.task == REGRESSION or recipe.labels is not None:
        return
    sources = [part.records[0].source for part in sample.by_source()]
    if unnamed := [source.name for source in sources if source.label_names is None]:
        raise DataError(
            f"--streaming does not read all rows before it trains, so it does not know the classes "
            f"of {unnamed[0]}: give them in the recipe, as labels: [no, yes], or take a Parquet "
            "file or a hub data set that names them (ClassLabel)"
        )
