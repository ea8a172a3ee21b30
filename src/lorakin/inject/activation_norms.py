"""How much each module's pair changes the outputs, measured on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError
from lorakin.inject import layers
from lorakin.inject.adapted import module_at
from lorakin.inject.branch import Branch
from lorakin.inject.eval_mode import in_mode
from lorakin.inject.layers import ConvolutionLayer, ExpertLayer
from lorakin.inject.placement import Graft


def check_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise `SettingError` if the outputs of one of these modules cannot be measured, since it is never called."""
    if experts := [path for path in paths if layers.kind_of(module_at(model, path)) is ExpertLayer]:
        raise SettingError(
            f"the output of each module is to be measured, and {experts[0]}, one expert of a stack or another parameter, "
            "is never called by itself; leave these out of the targets"
        )


@torch.no_grad()
def energies(
    graft: Graft,
    batches: Sequence[Any],
    normalised: bool = False,
    call: Callable[[Any, Any], Any] | None = None,
) -> dict[str, float]:
    """Path → its share of Σ ‖up(down x)‖² over all inputs x of `batches` that are not padding, in eval mode; sums to 1.

    Args:
        graft: the adapter, active. A gain counts for nothing.
        batches: mappings that the model takes; a (batch, length) `attention_mask` says what is padding.
        call: (model, batch) → anything, to run the model; by default on the batch as keywords.
        normalised: divide each module's sum by its Σ ‖W0 x‖² first.
    """
    check_called(graft.model, graft.placement.methods)
    model, sums, own = (
        graft.model,
        dict.fromkeys(graft.placement.methods, 0.0),
        dict.fromkeys(graft.placement.methods, 0.0),
    )
    mask: Tensor | None = None

    def watch(path: str, branch: Branch) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            pair = branch.method.low_rank(branch.wide(), branch.shape)
            sums[path] += _energy(branch.low_rank_term(module, x, pair), mask, branch)
            if normalised:
                own[path] += _energy(
                    branch.layer.product(module, x, module._parameters.get("weight")), mask, branch
                )

        return before

    modules = {path: model.get_submodule(path) for path in graft.placement.methods}
    hooks = [
        m.register_forward_pre_hook(watch(path, graft.branch(path)), with_kwargs=True)
        for path, m in modules.items()
    ]
    try:
        with in_mode(model, training=False):
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if call is None:
                    model(**batch)
                else:
                    call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if normalised:
        sums = {path: value / own[path] if own[path] else 0.0 for path, value in sums.items()}
    total = sum(sums.values())
    return {path: value / total if total else 1 / len(sums) for path, value in sums.items()}


def _energy(output: Tensor, mask: Tensor | None, branch: Branch) -> float:
    squares = output.double().square()
    if mask is not None and mask.dim() == 2 and branch.layer is not ConvolutionLayer:
        mask = mask.to(squares.device)
        if squares.shape[:2] == mask.shape:
            squares = squares * mask.unsqueeze(-1)
        elif squares.shape[0] == mask.numel() and squares.dim() == 2:
            squares = squares * mask.reshape(-1, 1)
    return float(squares.sum())
