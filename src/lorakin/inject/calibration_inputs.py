"""A sample of what the adapted modules are given on data, for conversions that weigh their error by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.inject.measuring import LINEAR, inputs_of, unpadded
from lorakin.inject.placement import Graft, activate, grafts


def input_samples(
    graft: Graft, batches: Sequence[Mapping[str, Any]], limit: int = 1024
) -> dict[str, Tensor]:
    """Path → at most `limit` inputs (tokens, inputs) of each linear module, with this adapter active.

    Padding is left out. Modules that are given one tensor, such as q, k and v, hold one sample together.
    Embeddings and convolutions have none.
    """
    share = max(1, limit // max(1, len(batches)))
    seen: dict[str, list[Tensor]] = {}
    last: list[tuple[Tensor, Tensor]] = []

    def see(path: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        if not last or last[0][0] is not x:
            last[:] = [(x, _drawn(unpadded(x, mask), share))]
        seen.setdefault(path, []).append(last[0][1])

    paths = [path for path in graft.placement.methods if graft.branch(path).layer in LINEAR]
    active = [name for name, one in grafts(graft.model).items() if one.is_active]
    activate(graft.model, graft.name)
    try:
        inputs_of(graft.model, paths, batches, see)
    finally:
        activate(graft.model, active)
    joined: dict[tuple[int, ...], Tensor] = {}
    return {
        path: joined.setdefault(tuple(map(id, parts)), torch.cat(parts))
        for path, parts in seen.items()
    }


def _drawn(tokens: Tensor, count: int) -> Tensor:
    """So many of the tokens, at equal distances."""
    last, device = len(tokens) - 1, tokens.device
    chosen = torch.linspace(0, last, min(count, len(tokens)), device=device).round().long()
    return tokens[chosen].float().cpu()
