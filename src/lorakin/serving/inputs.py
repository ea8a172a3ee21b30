"""Inputs for a model of any kind, so that two models can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.errors import ModelError
from lorakin.training.limits import position_count

COUNT, LENGTH = 4, 24
"""How many random inputs there are, and how many tokens each has."""


def reads_text(model: Any) -> bool:
    """Returns whether the model reads token ids."""
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def is_encoder_decoder(model: Any) -> bool:
    """Returns whether the model is an encoder with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def inputs_of(model: Any, text: Sequence[int] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch of one on the model's device, from token ids or from inputs by name.

    The decoder of an encoder-decoder reads the same ids, shifted by its start token.

    >>> from torch import nn
    >>> model = nn.Linear(2, 2)
    >>> model.device, model.dtype = torch.device("cpu"), torch.float32
    >>> inputs_of(model, [1, 2])
    {'input_ids': tensor([[1, 2]])}
    """
    if isinstance(text, Mapping):
        inputs = dict(text)
    else:
        ids = torch.tensor([list(text)])
        inputs = {"input_ids": ids}
        if is_encoder_decoder(model):
            inputs["decoder_input_ids"] = _shifted(model.config, ids)
    return {
        name: t.to(model.device, model.dtype if t.is_floating_point() else t.dtype)
        for name, t in inputs.items()
    }


def random_inputs(model: Any) -> list[dict[str, Tensor]]:
    """Returns inputs for batches of one, always the same ones.

    Raises:
        ModelError: it is not known how to make them for such a model.
    """
    generator = torch.Generator().manual_seed(0)
    name, config = model.main_input_name, model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = getattr(text, "vocab_size", None)
    length = min(LENGTH, position_count(model) or LENGTH)
    inputs = []
    for _ in range(COUNT):
        if name == "input_ids" and tokens:
            given = {name: _ids(tokens, length, config, generator)}
        elif (shape := _shape(name, config)) is not None:
            given = {name: torch.randn(shape, generator=generator)}
        else:
            raise ModelError(
                f"a {type(model).__name__} reads {name}, and lorakin cannot make examples of that, "
                "so nothing was compared and nothing was kept; --no-verify leaves the comparison "
                "out"
            )
        if is_encoder_decoder(model) and tokens:
            ids = given.get("input_ids", _ids(tokens, length, config, generator))
            given["decoder_input_ids"] = _shifted(config, ids)
        inputs.append(given)
    return inputs


def _ids(tokens: int, length: int, config: Any, generator: torch.Generator) -> Tensor:
    """Returns random token ids; the last ends the text: classifiers with a decoder look for it."""
    ids = torch.randint(tokens, (1, length), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < tokens:
        ids[ids == end] = (end + 1) % tokens
        ids[0, -1] = end
    return ids


def _shape(name: str, config: Any) -> tuple[int, ...] | None:
    """Returns the shape of an image, of a clip of sound or its spectrum; None for anything else."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if name == "pixel_values" and size is not None:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return (1, getattr(vision, "num_channels", 3), *sides)
    if name == "input_values":
        return (1, 16_000)
    if name == "input_features" and (bins := getattr(config, "num_mel_bins", None)) is not None:
        return (1, bins, 2 * config.max_source_positions)
    return None


def _shifted(config: Any, ids: Tensor) -> Tensor:
    keys = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    starts = (getattr(config, key, None) for key in keys)
    start = next((start for start in starts if start is not None), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
