"""Generating by our own settings: of a model's generation_config.json only the ids count that start
and stop an answer.

The rest of that file is for people who know the model: beams, penalties, biases, other outputs.
Which of it transformers takes differs by version, and what it does not take fails midway.
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
def with_settings(model: Any, **settings: Any) -> Iterator[None]:
    """Lets `model.generate` use these settings alone, and the id that starts its decoder."""
    before = model.generation_config
    start = getattr(before, "decoder_start_token_id", None)
    start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=start, **settings
    )
    try:
        yield
    finally:
        model.generation_config = before


class StopAtNaN(transformers.LogitsProcessor):
    """Stops generation at logits that are NaN or infinite: an argmax would still pick a token.

    Raises:
        ModelError: within `generate`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores, (batch, vocabulary), as they are; filters write -inf."""
        if bool((scores.isnan() | scores.isposinf()).any()) or bool(torch.isneginf(scores).all()):
            raise nan_error(self.name)
        return scores


def nan_error(name: str) -> ModelError:
    """Returns the error for a model that computes no numbers."""
    return ModelError(
        f"what {name} computes is NaN or infinite, so it says nothing: its weights, or the "
        "adapter's, are too large or damaged. Try --dtype float32, or other files"
    )
