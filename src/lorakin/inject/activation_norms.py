"""How much each module's pair changes the outputs, measured on data: what LoRA-drop goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lorakin.inject.branch import Branch
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.layer_kinds import ConvolutionLayer
from lorakin.inject.measuring import Loss, check_called, inputs_of


def importance_shares(
    adapter: InsertedAdapter,
    batches: Sequence[Any],
    normalised: bool = False,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Returns each module's share of Σ ‖up(down x)‖² over all inputs x that are not padding.

    The shares are by path, and sum to 1.

    Args:
        adapter: active. A gain counts for nothing.
        batches: mappings that the model takes; an `attention_mask` (batch, length) marks padding.
        normalised: divide each module's sum by its Σ ‖W0 x‖² first.
        loss: (model, batch) → anything, to run the model; by default on the batch's entries as
            arguments.

    Raises:
        SettingError: a module that is never called by itself.
    """
    paths = list(adapter.placement.methods)
    check_called(adapter.model, paths)
    branches = {path: adapter.tensors.branch(path) for path in paths}
    sums, base_sums = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)

    def see(path: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        branch = branches[path]
        pair = branch.method.low_rank(branch.float32_tensors(), branch.shape)
        sums[path] += _squared_norm(branch.low_rank_term(module, x, pair), mask, branch)
        if normalised:
            weight: Any = module._parameters.get("weight")
            base_output = branch.kind.base_product(module, x, weight)
            base_sums[path] += _squared_norm(base_output, mask, branch)

    inputs_of(adapter.model, paths, batches, see, loss)
    if normalised:
        sums = {
            path: value / base_sums[path] if base_sums[path] else 0.0
            for path, value in sums.items()
        }
    total = sum(sums.values())
    return {path: value / total if total else 1 / len(sums) for path, value in sums.items()}


def _squared_norm(output: Tensor, mask: Tensor | None, branch: Branch) -> float:
    """Returns the sum of all squares of an output, without those at padding."""
    squares = output.double().square()
    if mask is not None and mask.dim() == 2 and branch.kind is not ConvolutionLayer:
        mask = mask.to(squares.device)
        if squares.shape[:2] == mask.shape:
            squares = squares * mask.unsqueeze(-1)
        elif squares.shape[0] == mask.numel() and squares.dim() == 2:
            squares = squares * mask.reshape(-1, 1)
    return float(squares.sum())
