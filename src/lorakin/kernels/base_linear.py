"""The base's own product, as every kernel for linear layers begins, and a thin one beside it.

A thin product takes as long as reading and writing what it is added to. A product with the base's
weight takes longer to compute than to read a summand, which it reads meanwhile. So on a GPU the
thin product comes first, and the large one is added to it. A CPU is as fast in the other order,
in which the large product may be a library's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakin.kernels.weight_source import Weight, WeightSource


def base_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Computes W0 x + b of x (…, inputs) as a tensor that is not a view: (…, outputs).

    `F.linear` with a bias returns a view of a matrix where x does not have two dimensions.
    Autograd forbids writing in place into a view that a function returned, as
    `nn.ReLU(inplace=True)` behind a layer does.

    >>> y = base_linear(torch.ones(2, 1, 3), torch.eye(3), torch.zeros(3))
    >>> y.shape, y._is_view()
    (torch.Size([2, 1, 3]), False)
    """
    if isinstance(weight, WeightSource):
        if weight.matrix_at_hand is None:
            return weight.product_of_library(x, bias)
        weight = weight.matrix_at_hand
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    output = x.new_empty(*x.shape[:-1], len(weight))
    torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T, out=output.view(-1, len(weight)))
    return output


def adapted_product(
    x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Computes W0 x + scale · up(hidden) + b of x (…, inputs), (…, outputs), not a view.

    Args:
        x: (…, inputs).
        weight: (outputs, inputs).
        bias: (outputs,) or None.
        hidden: (rows, k), for as many rows as x has.
        up: (outputs, k).
        scale: a factor of the thin product.

    >>> ones = torch.ones(2, 3)
    >>> adapted_product(ones, torch.eye(3), None, ones[:, :1], torch.ones(3, 1), 0.5)
    tensor([[1.5000, 1.5000, 1.5000],
            [1.5000, 1.5000, 1.5000]])
    """
    matrix = weight.matrix_at_hand if isinstance(weight, WeightSource) else weight
    if x.device.type == "cpu" or matrix is None:
        y = base_linear(x, weight, bias)
        y.view(-1, y.shape[-1]).addmm_(hidden, up.T, alpha=scale)
        return y
    y = x.new_empty(*x.shape[:-1], len(up))
    rows = y.view(-1, len(up))
    if bias is None:
        rows.addmm_(hidden, up.T, beta=0, alpha=scale)
    else:
        torch.addmm(bias, hidden, up.T, alpha=scale, out=rows)
    rows.addmm_(x.reshape(-1, x.shape[-1]), matrix.T)
    return y


def adapted_input_gradient(
    delta: Tensor, weight: Tensor, back: Tensor, down: Tensor, scale: float
) -> Tensor:
    """Returns δ W0 + scale · back down, (rows, inputs).

    >>> row = torch.ones(1, 2)
    >>> adapted_input_gradient(row, torch.eye(2), torch.ones(1, 1), down=row, scale=2)
    tensor([[3., 3.]])
    """
    if delta.device.type == "cpu":
        return (delta @ weight).addmm_(back, down, alpha=scale)
    for_x = delta.new_empty(len(delta), down.shape[1])
    return for_x.addmm_(back, down, beta=0, alpha=scale).addmm_(delta, weight)
