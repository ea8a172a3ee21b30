"""How likely a model finds the answers of rows, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from lorakin.switching import adapters
from lorakin.training.batches import AnswerCollator, Row, label_losses, texts_of
from lorakin.training.reference_adapter import as_reference
from lorakin.training.tasks.by_row import results_by_row
from lorakin.training.token_labels import IGNORED

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """Log-probabilities of answer tokens, (rows, sides, tokens); 0 behind the last of an answer.

    Attributes:
        policy: the model's.
        reference: those of the model that it is compared with.
        counts: each answer's number of tokens, (rows, sides).
    """

    policy: Array
    reference: Array
    counts: Array


def side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Returns the texts of rows: the first sides of all, then the second sides of all."""
    return [text for side in zip(*map(texts_of, rows), strict=True) for text in side]


def likelihoods(
    model: Any, collate: AnswerCollator, examples: Sequence[Row], batch_size: int
) -> Likelihoods:
    """Returns how likely a model and its reference find the answers of rows.

    Args:
        model: a language model on its device, perhaps with adapters.
        collate: makes a batch of texts.
        examples: the rows.
        batch_size: rows at a time.
    """
    policy = log_probabilities(model, collate, examples, batch_size)
    reference = policy
    if adapters(model):
        with as_reference(model):
            reference = log_probabilities(model, collate, examples, batch_size)
    return Likelihoods(policy, reference, answer_counts(examples))


def answer_counts(examples: Sequence[Row]) -> Array:
    """Returns each answer's number of tokens that something predicts, (rows, sides)."""
    return np.array(
        [[sum(n != IGNORED for n in t["labels"][1:]) for t in texts_of(row)] for row in examples]
    )


def log_probabilities(
    model: Any, collate: AnswerCollator, examples: Sequence[Row], batch_size: int
) -> Array:
    """Returns a model's log-probabilities of the labelled tokens, (rows, sides, tokens)."""
    longest = int(answer_counts(examples).max())
    sides = len(texts_of(examples[0]))

    def of_batch(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
        following = labels[:, 1:]
        logps = -label_losses(outputs.logits[:, : following.shape[1]], following)
        # Those that are learned come first.
        order = (following != IGNORED).int().argsort(dim=1, descending=True, stable=True)
        first = logps.gather(1, order.to(logps.device))[:, :longest]
        return F.pad(first, (0, longest - first.shape[1])).chunk(sides)

    # As many texts at a time as of rows with one text.
    rows_at_a_time = max(1, batch_size // sides)
    found = results_by_row(
        model, lambda rows: collate(side_by_side(rows)), examples, rows_at_a_time, of_batch
    )
    return np.stack(found, axis=1)
