"""One pass over the data: which rows, how often, and what of a batch is padding."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence

import datasets
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from lorakin.training.batches import Row, tokens_in
from lorakin.training.encoding import Encoded
from lorakin.training.packing import packed
from lorakin.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one pass over the data trains on.

    Attributes:
        examples: tokenised rows, or packed sequences of them.
        order: places in `examples`, where some come several times; None for each once.
        of_sources: how many rows of each source come; None if sources have no weights.
        rows: the number of tokens of each row, where rows are packed.
    """

    examples: Sequence[Row]
    order: list[int] | None = None
    of_sources: list[int] | None = None
    rows: list[int] | None = None

    @classmethod
    def of(cls, train: Encoded, recipe: Recipe) -> Epoch:
        """Returns the epoch of tokenised rows, as a recipe weighs their sources and packs them."""
        rows = cls(train.examples)
        if train.of_sources is not None:
            counts = weighted_counts(train.of_sources, recipe.data_weights)
            order = repeated(train.of_sources, counts, recipe.seed)
            rows = cls(train.examples, order, counts)
        if not recipe.packing:
            return rows
        places = range(len(rows.examples)) if rows.order is None else rows.order
        weighed = [rows.examples[place] for place in places]
        sequences = packed(weighed, recipe.max_length, recipe.seed)
        return cls(sequences, None, rows.of_sources, rows.lengths())

    def __len__(self) -> int:
        return len(self.examples) if self.order is None else len(self.order)

    def dataset(self) -> datasets.Dataset:
        """Returns it for a Trainer; a row that comes several times is stored once."""
        rows = datasets.Dataset.from_list(list(self.examples))
        if "input_ids" not in rows.column_names:  # rows of two answers
            rows = rows.add_column("length", [tokens_in(row) for row in self.examples])
        return rows if self.order is None else rows.select(self.order)

    def lengths(self) -> list[int]:
        """Returns the number of tokens of each row, as often as it comes."""
        lengths = [tokens_in(example) for example in self.examples]
        return lengths if self.order is None else [lengths[place] for place in self.order]


def weighted_counts(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Returns how many rows of each source an epoch sees, in the shares that weights give.

    Each row comes at least once: an epoch is as short as that allows.

    >>> weighted_counts([1000, 100], [2, 1])
    [1000, 500]

    Args:
        counts: how many rows each source has.
        weights: the sources' weights.
    """
    unit = max(count / weight for count, weight in zip(counts, weights, strict=True))
    return [max(count, round(unit * weight)) for count, weight in zip(counts, weights, strict=True)]


def repeated(counts: Sequence[int], wanted: Sequence[int], seed: int) -> list[int]:
    """Returns the places of rows, where each source has as many as it is wanted to have.

    All rows of a source come equally often; chance decides which of them come once more.

    >>> repeated([2, 1], [2, 3], seed=0)
    [0, 1, 2, 2, 2]

    Args:
        counts: how many rows each source has; one source's rows stand after another's.
        wanted: how many it is to have.
        seed: draws the rows that come once more.
    """
    chance, places, start = random.Random(seed), list[int](), 0
    for count, more in zip(counts, wanted, strict=True):
        rows = range(start, start + count)
        places += [*rows] * (more // count)
        places += sorted(chance.sample(rows, more % count))
        start += count
    return places


class EpochLengthGroups(LengthGroupedSampler):
    """transformers' sampler of rows of about one length, in an order that the epoch decides.

    Args:
        lengths: each row's number of tokens.
        group: rows of a step.
        seed: with the number of the epoch, it decides the order.
    """

    def __init__(self, lengths: list[int], group: int, seed: int) -> None:
        super().__init__(group, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    @classmethod
    def of(cls, sampler: LengthGroupedSampler, seed: int) -> EpochLengthGroups:
        """Returns such a sampler of the same rows."""
        return cls(sampler.lengths, sampler.batch_size, seed)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch; the Trainer calls it."""
        self.generator.manual_seed(self.seed + epoch)


def padding_share(lengths: Sequence[int], order: Iterable[int], batch_size: int) -> float:
    """Returns which share of the tokens in batches is padding, in [0, 1).

    >>> padding_share([2, 1], [0, 1], batch_size=2)
    0.25

    Args:
        lengths: each row's number of tokens.
        order: places in `lengths`, as a sampler gives them.
        batch_size: rows of a batch, which are padded to its longest.
    """
    ordered = [lengths[place] for place in order]
    batches = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    return 1 - sum(ordered) / sum(max(batch) * len(batch) for batch in batches)


@dataclasses.dataclass(frozen=True)
class EpochFigures:
    """What a user should know about an epoch.

    Attributes:
        rows: how many rows it has.
        sequences: how many sequences hold them; as many, unless they are packed.
        of_sources: each source and its rows, where sources have weights.
        padding: the share of the tokens in batches that is padding.
        padding_mixed: the same if rows were mixed and stood alone.
    """

    rows: int
    sequences: int
    of_sources: list[tuple[str, int]] | None
    padding: float
    padding_mixed: float

    @classmethod
    def of(cls, epoch: Epoch, recipe: Recipe) -> EpochFigures:
        """Returns the figures of the first epoch of a recipe."""
        counts = epoch.of_sources
        lengths, size = epoch.lengths(), recipe.batch_size
        rows = lengths if epoch.rows is None else epoch.rows
        groups = EpochLengthGroups(lengths, size * recipe.accumulate, recipe.seed)
        order = groups if recipe.group_by_length else _mixed(lengths, recipe.seed)
        return cls(
            len(rows),
            len(epoch),
            None if counts is None else list(zip(recipe.data, counts, strict=True)),
            padding_share(lengths, order, size),
            padding_share(rows, _mixed(rows, recipe.seed), size),
        )

    def lines(self) -> Iterator[str]:
        """Yields the figures in words, where something was asked for."""
        if self.of_sources is not None:
            parts = ", ".join(f"{count:,} of {name}" for name, count in self.of_sources)
            yield f"{self.rows:,} rows, as the sources are weighed: {parts}"
        if self.sequences != self.rows:
            yield f"{self.rows:,} rows are packed into {self.sequences:,} sequences"
        if self.padding != self.padding_mixed:
            yield (
                f"{self.padding:.1%} of the tokens in batches are padding; with mixed rows, one "
                f"in a sequence, {self.padding_mixed:.1%}"
            )


def _mixed(lengths: Sequence[int], seed: int) -> list[int]:
    """Returns places in random order, as a Trainer's own sampler would."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randperm(len(lengths), generator=chance).tolist()
