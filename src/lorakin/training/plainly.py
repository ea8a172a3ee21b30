"""Generating by settings of our own: of what lies in a model's generation_config.json only the ids that end an answer count.

The rest chooses another way of decoding, or other outputs, for those who know the model: beams, penalties, biases. Which of
it transformers takes differs by its version, and what it does not take ends in its midst.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from lorakin.errors import ModelError


@contextlib.contextmanager
def by_own_settings(model: Any, **settings: Any) -> Iterator[None]:
    """`model.generate` takes these settings alone: it would add to those that it is given what the model's own say."""
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(**settings)
    try:
        yield
    finally:
        model.generation_config = before


class OnlyNumbers(transformers.LogitsProcessor):
    """Ends an answer at logits that are NaN or infinite, of which an argmax makes a token all the same.

    Raises:
        ModelError: in the midst of `generate`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are, (batch, vocabulary); -inf is what a filter writes."""
        if bool((scores.isnan() | scores.isposinf()).any()) or bool(torch.isneginf(scores).all()):
            raise not_numbers(self.name)
        return scores


def not_numbers(name: str) -> ModelError:
    """What to say of a model that computes no numbers."""
    return ModelError(
        f"what {name} computes is NaN or infinite, so it says nothing: its weights, or the adapter's, are too large or "
        "damaged. Try --dtype float32, or other files"
    )
