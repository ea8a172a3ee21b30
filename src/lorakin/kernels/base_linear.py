"""The base's own product, as every kernel for linear layers begins."""

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
        matrix = weight.matrix_at_hand
        if matrix is None:
            return weight.product_of_library(x, bias)
        weight = matrix
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    output = x.new_empty(*x.shape[:-1], len(weight))
    torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T, out=output.view(-1, len(weight)))
    return output
