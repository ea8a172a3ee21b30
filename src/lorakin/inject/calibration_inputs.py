"""Samples of the inputs of adapted modules on data, by which conversions weigh their error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.inject.active_adapters import set_active
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.measuring import LINEAR, inputs_of, unpadded
from lorakin.inject.model_registry import adapters_in


def input_samples(
    adapter: InsertedAdapter, batches: Sequence[Mapping[str, Any]], limit: int = 1024
) -> dict[str, Tensor]:
    """Returns by path at most `limit` inputs (tokens, inputs) of each linear module.

    The adapter is activated for that. Padding is left out. Modules that are given one tensor, such
    as q, k and v, have one sample together. Embeddings and convolutions have none.
    """
    share = max(1, limit // max(1, len(batches)))
    seen: dict[str, list[Tensor]] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def see(path: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        if not last or last[0][0] is not x:
            last[:] = [(x, _sampled(unpadded(x, mask), share))]
        seen.setdefault(path, []).append(last[0][1])

    paths = [
        path for path in adapter.placement.methods if adapter.tensors.branch(path).kind in LINEAR
    ]
    present = adapters_in(adapter.model)
    active = [name for name, other in present.items() if other.effect.is_active]
    set_active(adapter.model, adapter.name)
    try:
        inputs_of(adapter.model, paths, batches, see)
    finally:
        set_active(adapter.model, active)
    joined: dict[tuple[int, ...], Tensor] = {}
    return {
        path: joined.setdefault(tuple(map(id, parts)), torch.cat(parts))
        for path, parts in seen.items()
    }


def _sampled(tokens: Tensor, count: int) -> Tensor:
    """Returns `count` of the tokens, equally spaced."""
    last, device = len(tokens) - 1, tokens.device
    chosen = torch.linspace(0, last, min(count, len(tokens)), device=device).round().long()
    return tokens[chosen].float().cpu()
