"""Batches of tokenised rows, and the loss that is taken on them."""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.training.token_labels import IGNORED

Row = Mapping[str, Any]
"""A tokenised row: `input_ids` and `labels`; a classifier's `labels` are one number. A row of two
answers holds one such row for each of `SIDES`."""
SIDES = ("chosen", "rejected")
GOOD = "is_good"
"""The key of a row with an answer that is good or not."""


def texts_of(row: Row) -> list[Row]:
    """Returns what a model reads of a tokenised row: the row itself, or its two sides.

    >>> texts_of({"chosen": {"input_ids": [1]}, "rejected": {"input_ids": [2]}})
    [{'input_ids': [1]}, {'input_ids': [2]}]
    """
    return [row[side] for side in SIDES] if SIDES[0] in row else [row]


def tokens_in(row: Row) -> int:
    """Returns how many tokens a model reads of a row."""
    return sum(len(text["input_ids"]) for text in texts_of(row))


@dataclasses.dataclass(frozen=True)
class AnswerCollator:
    """Makes batches of rows of unequal length, padded on the right.

    With `logits_to_keep`, a batch also holds the positions that predict a labelled token in some
    row, and its labels have the shape (rows, 1 + positions): a column of -100, then the label of
    each position. A causal model's loss shifts labels by one, so whoever counts labels skips the
    first column; `answer_loss` does too. Without it, labels have the shape of the ids.

    Packed rows have `position_ids`, and so has their batch, in place of a mask. What fills short
    ones is one row more.

    Attributes:
        pad: the id that fills short rows.
        logits_to_keep: whether the model's forward takes `logits_to_keep`.
    """

    pad: int
    logits_to_keep: bool = True

    def __call__(self, examples: Sequence[Row]) -> dict[str, Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.pad)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            mask[row, :length] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "position_ids" in examples[0]:
            del batch["attention_mask"]
            packed = [[*example["position_ids"], *range(width)][:width] for example in examples]
            batch["position_ids"] = torch.tensor(packed)
        if self.logits_to_keep:
            following = labels[:, 1:]
            keep = (following != IGNORED).any(0).nonzero().flatten()
            batch["labels"] = torch.cat(
                [labels.new_full((len(examples), 1), IGNORED), following[:, keep]], 1
            )
            batch["logits_to_keep"] = keep
        return batch


def pad_id(tokenizer: Any) -> int:
    """Returns the id that fills short rows; the mask says that it is no part of them."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def answer_collator(model: Any, tokenizer: Any) -> AnswerCollator:
    """Returns what makes batches of labelled texts for a language model.

    Logits are asked for at the answers alone, if the model's forward can do that.
    """
    return AnswerCollator(
        pad_id(tokenizer), "logits_to_keep" in inspect.signature(model.forward).parameters
    )


def digest(*parts: Sequence[Row]) -> int:
    """Returns a number of 48 bits that tells these rows, in this order, from any others.

    >>> row = {"input_ids": [1, 2], "labels": [-100, 2]}
    >>> digest([row], []) == digest([row], [row])
    False
    """
    found = hashlib.sha256()
    for part in parts:
        for row in (text for pair in part for text in texts_of(pair)):
            labels = row["labels"] if isinstance(row["labels"], list) else [row["labels"]]
            found.update(array.array("q", [len(row["input_ids"]), *row["input_ids"]]).tobytes())
            kind = "d" if any(isinstance(label, float) for label in labels) else "q"
            found.update(array.array(kind, labels).tobytes())
            if GOOD in row:
                found.update(bytes([row[GOOD]]))
        found.update(b"|")
    return int(found.hexdigest()[:12], 16)


def stratified_sample(examples: Sequence[Row], share: float, seed: int) -> list[Row]:
    """Returns a random sample of rows, in random order.

    Args:
        examples: the rows; those of a classifier have one number as their label.
        share: the share that is drawn, of each class; at least one row each.
        seed: draws them.
    """
    classes: dict[int | None, list[Row]] = {}
    for example in examples:
        label = example.get("labels")
        classes.setdefault(label if isinstance(label, int) else None, []).append(example)
    chance = random.Random(seed)
    chosen = [
        row
        for rows in classes.values()
        for row in chance.sample(rows, max(1, round(share * len(rows))))
    ]
    chance.shuffle(chosen)
    return chosen


def row_losses(outputs: Any, labels: Tensor) -> Tensor:
    """Returns the summed cross-entropy of each row's labelled tokens, (rows,), in float32.

    Args:
        outputs: a model's, with logits of shape (rows, positions, vocabulary).
        labels: of a batch of `AnswerCollator`.
    """
    following = labels[:, 1:]
    return label_losses(outputs.logits[:, : following.shape[1]], following).sum(1)


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of each label, in float32, 0 where it is `IGNORED`.

    >>> label_losses(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORED]]))
    tensor([[1.3863, 0.0000]])

    Args:
        logits: (rows, positions, classes).
        labels: (rows, positions).
    """
    labels = labels.to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape)


def answer_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the cross-entropy per labelled token, in float32.

    Args:
        outputs: a model's, with logits of shape (rows, positions, vocabulary).
        labels: of a batch of `AnswerCollator`.
        num_items_in_batch: by how many the sum is divided; by default the labelled tokens.
        label_smoothing: the share of a label's probability that is spread over the vocabulary.
    """
    following = labels[:, 1:].to(outputs.logits.device)
    logits = outputs.logits[:, : following.shape[1]].float()
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1),
        following.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def class_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the cross-entropy per label, in float32, where logits and labels have one shape.

    Args:
        outputs: a model's, with logits of the labels' shape, and of all classes.
        labels: numbers of classes; `IGNORED` where there is none.
        num_items_in_batch: by how many the sum is divided; by default the labels.
        label_smoothing: the share of a label's probability that is spread over the classes.
    """
    labels = labels.to(outputs.logits.device)
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count


def smoothed(loss: Callable[..., Tensor], share: float) -> Callable[..., Tensor]:
    """Returns a loss with label smoothing, which transformers leaves to a loss of one's own.

    >>> smoothed(answer_loss, 0.1).keywords
    {'label_smoothing': 0.1}

    Args:
        loss: a task's.
        share: the share of a label's probability that is spread; 0 changes nothing.

    Raises:
        SettingError: the loss has no labels to choose from, such as a regression's.
    """
    if not share:
        return loss
    if "label_smoothing" not in inspect.signature(loss).parameters:
        raise SettingError(
            f"label_smoothing {share:g} needs a task with one right label of several, and this one "
            "has none; leave it out"
        )
    return functools.partial(loss, label_smoothing=share)
