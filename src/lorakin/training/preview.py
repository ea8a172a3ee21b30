"""What `lorakin train` would make of a data set, without the model's weights: `lorakin data`."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text as RichText

from lorakin.training import limits, packing, reading
from lorakin.training.alarms import repeated, row_key
from lorakin.training.batches import Row, texts_of, tokens_in
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import Encoded
from lorakin.training.epoch import Epoch, EpochFigures
from lorakin.training.models import config_of, load_tokenizer
from lorakin.training.prepare import by_source, held_out_rows, read_data
from lorakin.training.reading import DataRows
from lorakin.training.recipe import Recipe
from lorakin.training.tasks import Task, task_for
from lorakin.training.token_labels import IGNORED

BINS = 8
SHOWN = 3
"""How many examples are shown: the shortest, one of median length, and the longest."""


@dataclasses.dataclass(frozen=True)
class Preview:
    """A data set as training would see it.

    Attributes:
        name: the data's.
        summary: how many rows of which format, and the classes.
        task: what would be learned.
        unused: what no format reads, in words; None if there is nothing.
        rows: how many rows are learned.
        lengths: tokens of each text that is learned: a row's, both of a pair, or the pieces of a
            long one.
        max_length: tokens at which rows are cut.
        learned: how many tokens, or rows with a label, the loss is on.
        dropped: rows without anything to learn.
        cut: rows whose last answer does not end within the length.
        doubled: rows that stand there before, token by token.
        epoch: what one pass over the data trains on.
        held_out: rows that would be held out, and how many of them are trained on, too.
        examples: some rows as the model would see them.
    """

    name: str
    summary: str
    task: str
    unused: str | None
    rows: int
    lengths: list[int]
    max_length: int
    learned: int
    dropped: int
    cut: int
    doubled: int
    epoch: EpochFigures
    held_out: tuple[int, int]
    examples: list[RichText]

    def quantiles(self) -> tuple[int, int, int, int]:
        """Returns the shortest, median, 95th percentile and longest row, in tokens."""
        ordered = sorted(self.lengths)
        high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return ordered[0], int(statistics.median(ordered)), high, ordered[-1]

    @property
    def counted(self) -> str:
        """What the lengths are of: each row, or several texts of a row."""
        return "text" if len(self.lengths) > self.rows else "row"

    def facts(self) -> list[tuple[str, str]]:
        """Returns what it is, in words: (label, text)."""
        shortest, median, high, longest = self.quantiles()
        counted = f"{self.rows:,} rows"
        if self.counted == "text":
            counted = f"{len(self.lengths):,} texts of {counted}"
        tokens = (
            f"{sum(self.lengths):,} in {counted}, {self.learned:,} learned; a {self.counted} has "
            f"{shortest} to {longest}, half at most {median}, 95 % at most {high}"
        )
        return [("data", f"{self.name}: {self.summary}"), ("task", self.task), ("tokens", tokens)]

    def troubles(self) -> list[str]:
        """Returns what is lost, doubled or not read, in words."""
        counts = (
            (self.cut, f"rows are cut at {self.max_length} tokens: their last answers do not end"),
            (self.dropped, f"rows have nothing to learn within {self.max_length} tokens"),
            (self.doubled, "rows stand there before, token by token"),
            (self.held_out[1], f"of {self.held_out[0]:,} held-out rows are trained on, too"),
        )
        found = [f"{count:,} {what}" for count, what in counts if count]
        return found if self.unused is None else [*found, self.unused]

    def as_dict(self) -> dict[str, Any]:
        """Returns it for `--json`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        names = ("shortest", "median", "percentile_95", "longest")
        return fields | {
            "tokens": sum(self.lengths),
            "lengths": dict(zip(names, self.quantiles(), strict=True)),
            "epoch": dataclasses.asdict(self.epoch),
            "held_out": {"rows": self.held_out[0], "trained_on": self.held_out[1]},
            "examples": [example.plain for example in self.examples],
        }


def preview(recipe: Recipe) -> Preview:
    """Reads and tokenises a recipe's data as training would; the model's weights are not loaded.

    Args:
        recipe: its model, data and how they are read; nothing is written to its `out`.

    Raises:
        LorakinError: the data cannot be read or does not suit the model.
    """
    rows = read_data(recipe)
    train_rows, held_rows = held_out_rows(recipe, rows)
    config = config_of(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    task = task_for(rows, recipe.labels, config, recipe.task_args)
    if recipe.packing:
        packing.check_task(task)
    if task.takes_template:
        use_template(tokenizer, recipe.chat_template, rows, recipe.template_args)
    length = limits.row_length(limits.position_count_of_config(config), recipe.max_length)
    recipe = dataclasses.replace(recipe, max_length=length)

    def encode(part: DataRows) -> Encoded:
        options = {"loss_on": recipe.loss_on, "split": recipe.packing}
        return task.encode(part, tokenizer, length, **options)

    train, held_out = by_source(recipe, train_rows, encode), encode(held_rows)
    # Without --eval-data the rows that are held out are rows of this data too.
    parts = [train] if recipe.eval_data is not None else [train, held_out]
    read = [train_rows] if recipe.eval_data is not None else [train_rows, held_rows]
    examples: list[Row] = [example for part in parts for example in part.examples]
    counts = Counter(row_key(example) for example in examples)
    return Preview(
        rows.name,
        reading.summary(rows),
        task.word,
        reading.unused(rows),
        sum(map(len, read)) - sum(part.dropped for part in parts),
        [len(text["input_ids"]) for example in examples for text in texts_of(example)],
        length,
        sum(_learned(example) for example in examples),
        sum(part.dropped for part in parts),
        sum(part.cut for part in parts),
        sum(count - 1 for count in counts.values()),
        EpochFigures.of(Epoch.of(train, recipe), recipe),
        (len(held_out.examples), repeated(train.examples, held_out.examples)),
        _shown(task, examples, tokenizer),
    )


def _learned(example: Row) -> int:
    labels = [text["labels"] for text in texts_of(example)]
    return sum(
        sum(label != IGNORED for label in one) if isinstance(one, list) else 1 for one in labels
    )


def _shown(task: Task, examples: Sequence[Row], tokenizer: Any) -> list[RichText]:
    ordered = sorted(examples, key=tokens_in)
    places = dict.fromkeys((0, len(ordered) // 2, len(ordered) - 1))
    return [task.rendered(ordered[place], tokenizer) for place in places]


def histogram(lengths: Sequence[int], max_length: int) -> list[tuple[str, int]]:
    """Returns how many rows have how many tokens: (range, count); the last range is what is cut.

    >>> histogram([1, 2, 2, 9], max_length=100)
    [('1–2', 3), ('3–4', 0), ('5–6', 0), ('7–8', 0), ('9', 1)]
    """
    shortest, longest = min(lengths), max(lengths)
    step = max(1, -(-(longest - shortest + 1) // BINS))
    bins = []
    for start in range(shortest, longest + 1, step):
        end = min(start + step - 1, longest)
        count = sum(start <= length <= end for length in lengths)
        full = " (the most that is read)" if end >= max_length else ""
        bins.append((f"{start}–{end}{full}" if end > start else f"{start}{full}", count))
    return bins


def recipe_for(model: str, data: Sequence[str], **fields: Any) -> Recipe:
    """Returns the recipe of a run that is only looked at."""
    return Recipe(model=model, data=list(data), out=str(Path("unused")), **fields)
