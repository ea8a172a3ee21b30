"""A module's weight for those who read it without calling the module.

`nn.MultiheadAttention` and others multiply by a layer's weight themselves, so they must see the
changed weight. What saves, moves or ties a model must see the base's own: see `callers.py`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning, StateError
from lorakin.family.precision import wide_dtype
from lorakin.inject.attachments import Attachments
from lorakin.inject.layer_kinds import (
    ConvolutionLayer,
    LinearLayer,
    PeftGroupedConvolution,
    QuantisedLayer,
    kind_of,
)
from lorakin.kernels.factored_weight import WeightChange, readable_weight


def changed_weight(module: Any, attached: Attachments) -> Tensor:
    """Returns the module's weight with its adapters' changes, differentiable in their tensors."""
    weight: Tensor = module._parameters["weight"]
    branches: list[Any] = attached.in_use()
    kind = kind_of(module)
    # A quantised weight is bits, and a reader wants only their device or dtype.
    if kind is QuantisedLayer:
        return weight
    by_columns = kind is LinearLayer
    # In a mixed batch only reading values is refused: Gemma's code reads the dtype alone.
    if attached.mixed_batch is not None:
        refuse = functools.partial(_refuse_in_mixed_batch, branches[0].path)
        return readable_weight(weight, refuse, by_columns, ())
    for branch in branches:
        if branch.kind is PeftGroupedConvolution:
            raise StateError(
                f"{branch.path} is read without being called, and its adapter is not a change of "
                "its weight"
            )
        if branch.training and branch.method.dropout and not branch.shape.lookup:
            warnings.warn(
                f"the dropout of the adapter does not act in {branch.path}: the model reads its "
                "weight without calling it, and dropout is for the inputs of a call",
                LorakinWarning,
                stacklevel=3,
            )
    if kind is ConvolutionLayer:
        return _formed(module, attached, branches)

    parameters = [p for branch in branches for p in branch.parameters(recurse=False)]
    # As they are now: the backward comes later.
    scales = [branch.scale for branch in branches]

    def changes() -> tuple[WeightChange, ...]:
        pairs = zip(branches, scales, strict=True)
        return tuple(_as_change(module, attached, *pair, by_columns) for pair in pairs)

    return readable_weight(weight, changes, by_columns, parameters)


def _refuse_in_mixed_batch(path: str) -> NoReturn:
    raise StateError(f"{path} is read without being called, so it cannot be in a mixed batch")


def _as_change(
    module: Any, attached: Attachments, branch: Any, scale: float, by_columns: bool
) -> WeightChange:
    """Returns what one adapter does to the weight, in the weight's layout and dtype."""
    with (
        as_base_forward(attached),
        torch.autocast(module._parameters["weight"].device.type, enabled=False),
    ):
        pair = branch.pair(branch.kind.weight(module), scale)
    dtype = module._parameters["weight"].dtype
    up, down = pair.up.to(dtype), pair.down.to(dtype)
    left, right = (up, down) if by_columns else (down.T, up.T)
    has_gain = pair.gain is not None
    gain_weight = attached.base_before_merge.get("weight") if has_gain else None
    return WeightChange(left, right, pair.gain, gain_weight)


def _formed(module: Any, attached: Attachments, branches: list[Any]) -> Tensor:
    """Computes the changed weight of a convolution, which is not a matrix."""
    weight: Tensor = module._parameters["weight"]
    total = weight
    with as_base_forward(attached), torch.autocast(weight.device.type, enabled=False):
        for branch in branches:
            matrix = branch.kind.weight(module)
            assert isinstance(matrix, Tensor)
            wide = matrix.to(wide_dtype(matrix.dtype))
            change = branch.pair(matrix).applied_to(wide) - wide
            total = total + branch.kind.layout(change, module).to(weight.dtype)
    return total


@contextlib.contextmanager
def as_base_forward(attached: Attachments) -> Iterator[None]:
    """Lets forwards inside a `with` block read the base's tensors of the module."""
    attached.forward_depth += 1
    try:
        yield
    finally:
        attached.forward_depth -= 1
