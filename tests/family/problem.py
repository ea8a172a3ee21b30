"""A small regression for training every member: one or two linear layers, inputs, targets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from benchmarks import measure
from numpy.typing import NDArray
from torch import Tensor, nn

import lorakin as lk
from lorakin.kernels.dropout import DropoutDraw

BOTH_PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def linear(dtype: torch.dtype = torch.float64, *widths: int) -> nn.Sequential:
    """Linear layers of these widths, 11 → 7 if none are given."""
    torch.manual_seed(0)
    widths = widths or (11, 7)
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(widths))).to(dtype)


def data(
    dtype: torch.dtype = torch.float64, inputs: int = 11, outputs: int = 7, rows: int = 20
) -> tuple[Tensor, Tensor]:
    """Inputs (rows, inputs) and targets (rows, outputs)."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype)
        for n in (inputs, outputs)
    )  # type: ignore[return-value]


def array(tensor: Tensor) -> NDArray[Any]:
    """A copy of the tensor's values, which later steps do not change."""
    return tensor.detach().numpy().copy()


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, steps: int
) -> list[float]:
    """Full-batch steps on the mean squared error; the loss before each."""
    losses = []
    for _ in range(steps):
        loss = ((model(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def close(got: Tensor | list[float], want: Any, tolerance: float) -> None:
    """Equal within `tolerance`, relative and absolute."""
    values = got.detach().numpy() if isinstance(got, Tensor) else got
    np.testing.assert_allclose(values, want, rtol=tolerance, atol=tolerance)


def mask(x: Tensor, p: float) -> NDArray[Any]:
    """What the branch's dropout, if it comes next, will multiply the entries of `x` by."""
    rows = torch.ones_like(x).reshape(-1, x.shape[-1])
    return (
        np.ones(x.shape)
        if not p
        else array((drawn := DropoutDraw.drawn(p, x.device)).zeroed(rows) * drawn.scale).reshape(
            x.shape
        )
    )


def randomised(adapter: lk.Adapter, scale: float = 0.3) -> lk.Adapter:
    """Every trained tensor moved away from where it started."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                ).to(parameter)
    return adapter


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward besides parameters: unique storages."""
    return measure.saved_bytes(model, lambda: model(x))
