"""Batches, and the loss on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import tiny_gpt2, tiny_llama
from lorakin.training.batches import AnswerCollator, answer_loss
from lorakin.training.token_labels import IGNORED


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("keep", [True, False])
def test_the_loss_of_a_batch_is_the_models_own(make: Callable[[], Any], keep: bool) -> None:
    """Logits only where labels are, padding and all: the same loss and the same gradients as the
    whole model's.
    """
    model = make()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, answer in ((9, 4), (5, 2), (7, 6)):
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * (length - answer) + ids[-answer:]})
    gradients, losses = [], []
    whole = AnswerCollator(0, logits_to_keep=False)(examples)
    losses.append(model(**whole).loss)
    batch = AnswerCollator(0, logits_to_keep=keep)(examples)
    labels = batch.pop("labels")
    assert int((labels[:, 1:] != IGNORED).sum()) == int((whole["labels"][:, 1:] != IGNORED).sum())
    outputs = model(**batch)
    assert not keep or outputs.logits.shape[1] < whole["labels"].shape[1]
    losses.append(answer_loss(outputs, labels))
    for loss in losses:
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(
        answer_loss(model(**batch), labels, num_items_in_batch=1), losses[0] * 12
    )
