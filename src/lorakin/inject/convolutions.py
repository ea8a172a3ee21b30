"""Convolutions: a low-rank pair is a convolution to r channels, then one with a kernel of 1."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakin.family import Pair, Shape
from lorakin.inject.layer_kind import LayerKind


class ConvolutionLayer(LayerKind):
    """nn.Conv1d, Conv2d and Conv3d: A is a convolution to r channels, B one with a kernel of 1.

    A has the module's own kernel. In a grouped convolution all groups have the same A, on their own
    inputs, and each its own rows of B. So the weight (outputs, inputs/groups · kernel) is a matrix
    like any other.
    """

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @staticmethod
    def shape(module: Any) -> Shape:
        return Shape(
            module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
        )

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @staticmethod
    def layout(matrix: Tensor, module: Any) -> Tensor:
        return matrix.view(-1, module.in_channels // module.groups, *module.kernel_size)

    @staticmethod
    def low_rank_product(module: Any, x: Tensor, pair: Pair) -> Tensor:
        groups, layout = module.groups, ConvolutionLayer.layout
        if groups > 1 and module.out_channels <= groups * pair.up.shape[1]:
            # The pair would have more channels than the output: multiply it out.
            return ConvolutionLayer.base_product(module, x, layout(pair.up @ pair.down, module))

        down = layout(pair.down, module)
        if groups > 1:
            down = down.repeat(groups, *(1 for _ in down.shape[1:]))
        hidden = module._conv_forward(x, down, None)
        channel = hidden.ndim - 1 - len(module.kernel_size)
        if groups == 1:
            return F.linear(hidden.movedim(channel, -1), pair.up).movedim(-1, channel)
        out = F.conv1d(hidden.flatten(channel + 1), pair.up.unsqueeze(-1), groups=groups)
        return out.reshape(*out.shape[:-1], *hidden.shape[channel + 1 :])

    @staticmethod
    def base_product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = module._conv_forward(x, weight, None)
        return out

    @staticmethod
    def per_output(vector: Tensor, module: Any) -> Tensor:
        return vector.view(-1, *(1 for _ in module.kernel_size))


class PeftGroupedConvolution(ConvolutionLayer):
    """A grouped convolution that also gets a convolution of all its inputs, as PEFT trains it.

    That is not a change of the weight, so it cannot be merged, and code that reads the weight
    misses it.
    """

    @staticmethod
    def shape(module: Any) -> Shape:
        return Shape(module.out_channels, module.in_channels * math.prod(module.kernel_size))

    @staticmethod
    def low_rank_product(module: Any, x: Tensor, pair: Pair) -> Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = 0
        down = pair.down.view(len(pair.down), -1, *module.kernel_size)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(module.kernel_size) - 1]
        hidden = convolve(x, down, None, module.stride, padding, module.dilation)
        channel = hidden.ndim - 1 - len(module.kernel_size)
        return F.linear(hidden.movedim(channel, -1), pair.up).movedim(-1, channel)
