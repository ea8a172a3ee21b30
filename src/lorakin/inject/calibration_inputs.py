"""What the adapted modules see: a sample of their inputs on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakin.inject.eval_mode import in_mode
from lorakin.inject.layers import LinearLayer, QuantisedLayer, TransposedLayer
from lorakin.inject.placement import Graft, activate, grafts


@torch.no_grad()
def input_samples(
    graft: Graft, batches: Sequence[Mapping[str, Any]], limit: int = 1024
) -> dict[str, Tensor]:
    """Path → (tokens, inputs), with this adapter active: at most `limit` inputs of each linear module, without padding.

    Modules that read one tensor, such as q, k and v, hold one sample together. Embeddings and convolutions have none.
    """
    model, share = graft.model, max(1, limit // max(1, len(batches)))
    seen: dict[str, list[Tensor]] = {}
    taken: dict[int, tuple[Tensor, Tensor]] = {}
    mask: Tensor | None = None

    def watch(path: str) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if (
                id(x) not in taken
            ):  # the tensor is kept beside its sample, so that its id stays its own
                taken[id(x)] = (x, _drawn(x, mask, share))
            seen.setdefault(path, []).append(taken[id(x)][1])

        return before

    paths = [
        path
        for path in graft.placement.methods
        if graft.branch(path).layer in (LinearLayer, QuantisedLayer, TransposedLayer)
    ]
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True)
        for path in paths
    ]
    active = [name for name, one in grafts(model).items() if one.is_active]
    activate(model, graft.name)
    try:
        with in_mode(model, training=False):
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
                taken.clear()
    finally:
        activate(model, active)
        for hook in hooks:
            hook.remove()
    joined: dict[tuple[int, ...], Tensor] = {}
    return {
        path: joined.setdefault(tuple(map(id, parts)), torch.cat(parts))
        for path, parts in seen.items()
    }


def _drawn(x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.dim() == 2 and mask.numel() == len(tokens):
        tokens = tokens[mask.reshape(-1).bool().to(x.device)]
    chosen = (
        torch.linspace(0, len(tokens) - 1, min(count, len(tokens)), device=x.device).round().long()
    )
    return tokens[chosen].float().cpu()
