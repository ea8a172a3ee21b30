"""Batches of encoded rows, and the loss that is taken on them."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.training.token_labels import IGNORED

Row = Mapping[str, Any]
"""An encoded row: `input_ids`, and `labels`, which of a classifier are one number."""


@dataclasses.dataclass(frozen=True)
class AnswerCollator:
    """Batches of unequal examples, padded on the right, whose logits are asked for only where a label is.

    With `logits_to_keep` a batch holds the positions that predict a labelled token in some row, and labels of shape
    (rows, 1 + positions): a column of -100, then the label of each position. A causal model's loss shifts labels by
    one, so whoever counts labels skips that first column; `answer_loss` does too. Without it, labels are shaped like
    the ids.
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
        if self.logits_to_keep:
            following = labels[:, 1:]
            keep = (following != IGNORED).any(0).nonzero().flatten()
            batch["labels"] = torch.cat(
                [labels.new_full((len(examples), 1), IGNORED), following[:, keep]], 1
            )
            batch["logits_to_keep"] = keep
        return batch


def digest(*parts: Sequence[Row]) -> int:
    """A number of 48 bits that other rows, or the same in another order, do not have."""
    found = hashlib.sha256()
    for part in parts:
        for row in part:
            labels = row["labels"] if isinstance(row["labels"], list) else [row["labels"]]
            found.update(
                array.array("q", [len(row["input_ids"]), *row["input_ids"], *labels]).tobytes()
            )
        found.update(b"|")
    return int(found.hexdigest()[:12], 16)


def stratified_sample(examples: Sequence[Row], share: float, seed: int) -> list[Row]:
    """About `share` of the examples, at least one of each class where they have classes, in random order."""
    classes: dict[int | None, list[Row]] = {}
    for example in examples:
        classes.setdefault(
            example["labels"] if isinstance(example["labels"], int) else None, []
        ).append(example)
    chance = random.Random(seed)
    chosen = [
        row
        for rows in classes.values()
        for row in chance.sample(rows, max(1, round(share * len(rows))))
    ]
    chance.shuffle(chosen)
    return chosen


def answer_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy per labelled token, in float32: of a batch of `AnswerCollator`, over `num_items_in_batch` if given."""
    following = labels[:, 1:].to(outputs.logits.device)
    logits = outputs.logits[:, : following.shape[1]].float()
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = (following != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / count
