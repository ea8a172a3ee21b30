"""Runs a model over tokenised rows, and brings what it answers back into the rows' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorakin.inject.module_mode import in_mode
from lorakin.training.batches import Row, tokens_in
from lorakin.training.tasks.task import Collator
from lorakin.waiting import tracked


@torch.no_grad()
def results_by_row(
    model: Any,
    collate: Collator,
    examples: Sequence[Row],
    batch_size: int,
    of_batch: Callable[[Any, Any], tuple[Tensor, ...]],
) -> list[npt.NDArray[Any]]:
    """Returns each tensor that `of_batch` gives, for all rows in the order of `examples`.

    The longest rows come first: batches hold little padding then, and a model that is too large for
    the memory fails at once.

    Args:
        model: a transformers model, on its device; it runs in eval mode.
        collate: makes a batch of rows.
        examples: the rows.
        batch_size: rows at a time.
        of_batch: a function (outputs, labels) → tensors with an entry for each row of the batch;
            labels are None if a batch has none.
    """
    order = sorted(range(len(examples)), key=lambda n: -tokens_in(examples[n]))
    ordered: Any = [examples[n] for n in order]
    batches: Any = DataLoader(ordered, batch_size=batch_size, collate_fn=collate)
    parts = []
    with in_mode(model, training=False):
        for batch in tracked(batches, "evaluating", len(batches)):
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            labels = batch.pop("labels", None)
            parts.append(of_batch(model(**batch), labels))
    back = np.argsort(order)
    return [torch.cat(column).cpu().numpy()[back] for column in zip(*parts, strict=True)]
