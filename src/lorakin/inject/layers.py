"""The kinds of module that can be adapted, each seen as one matrix (outputs × inputs).

A kind says how its module's weight is laid out and how the module applies a low-rank pair to its input.
Everything else in lorakin works on the matrix and never asks which kind it is.
"""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lorakin.family import Pair, Shape, Weight
from lorakin.family.pair import ShardedWeight, is_sharded, whole_shape
from lorakin.inject import quantised
from lorakin.inject.attachments import attachments_or_none
from lorakin.inject.experts import ExpertMatrix


class Layer:
    """How one kind of module holds and applies its weight. Methods are static: a kind has no state."""

    modules: ClassVar[tuple[type[nn.Module], ...]]

    @staticmethod
    def shape(module: Any) -> Shape:
        """The module's weight as a matrix."""
        raise NotImplementedError

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """`weight`, in the module's layout, as (outputs, inputs)."""
        raise NotImplementedError

    @staticmethod
    def layout(matrix: Tensor, module: Any) -> Tensor:
        """The inverse of `matrix`: (outputs, inputs) in the layout of the module's weight."""
        raise NotImplementedError

    @classmethod
    def weight(cls, module: Any) -> Tensor | Weight:
        """The module's weight as a matrix, the base's own even while adapters are merged."""
        held = vars(module)["_parameters"].get("weight")
        if held is not None and hasattr(held, "ds_id") and is_sharded(held):
            return ShardedWeight(
                cls.matrix(torch.empty(whole_shape(held), device="meta")).shape, held
            )
        attached = attachments_or_none(module)
        own = module.weight if attached is None else attached.base.get("weight", module.weight)
        return cls.matrix(own.detach())

    @staticmethod
    def dtype(module: Any, x: Tensor) -> torch.dtype:
        """In which the module multiplies, and so does an adapter on it."""
        dtype: torch.dtype = module.weight.dtype
        return dtype

    @staticmethod
    def device(module: Any) -> torch.device:
        """Where the module's weight is."""
        device: torch.device = module.weight.device
        return device

    @staticmethod
    def branch(module: Any, x: Tensor, pair: Pair) -> Tensor:
        """up(down(x)), computed as (x·downᵀ)·upᵀ in the dtype of the pair."""
        raise NotImplementedError

    @staticmethod
    def product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        """W0·x without the bias, for a weight in the module's layout."""
        raise NotImplementedError

    @staticmethod
    def per_output(vector: Tensor, module: Any) -> Tensor:
        """`vector` (outputs,), shaped to multiply the module's output."""
        return vector

    @staticmethod
    def drop(x: Tensor, p: float, training: bool) -> Tensor:
        """Dropout of the branch's input."""
        return F.dropout(x, p, training) if p > 0 and training else x

    @staticmethod
    def refusal(module: Any) -> str | None:
        """Why this module cannot be adapted although it is of this kind, or None."""
        return None


class LinearLayer(Layer):
    """nn.Linear: the weight is the matrix."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    @staticmethod
    def shape(module: nn.Linear) -> Shape:
        return Shape(module.out_features, module.in_features)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def layout(matrix: Tensor, module: nn.Linear) -> Tensor:
        return matrix

    @staticmethod
    def branch(module: nn.Linear, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.linear(x, pair.down), pair.up)

    @staticmethod
    def product(module: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class QuantisedLayer(LinearLayer):
    """A linear layer that keeps its weight in few bits; see `quantised.py`."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()

    @staticmethod
    def shape(module: Any) -> Shape:
        return quantised.shape_of(module)

    @classmethod
    def weight(cls, module: Any) -> Weight:
        return quantised.packed_weight(module)

    @staticmethod
    def dtype(module: Any, x: Tensor) -> torch.dtype:
        return x.dtype

    @staticmethod
    def device(module: Any) -> torch.device:
        return quantised.device_of(module)

    @staticmethod
    def product(module: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        return quantised.product(module, x)

    @staticmethod
    def refusal(module: Any) -> str | None:
        return quantised.refusal(module)


class ExpertLayer(LinearLayer):
    """One matrix of a stack of experts; see `experts.py`. Its module is never called."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = (ExpertMatrix,)

    @staticmethod
    def shape(module: Any) -> Shape:
        return Shape(*module.shape)

    @classmethod
    def weight(cls, module: Any) -> Tensor | Weight:
        return (
            ShardedWeight(module.shape, module.parameter)
            if is_sharded(module.parameter)
            else super().weight(module)
        )

    @staticmethod
    def refusal(module: Any) -> str | None:
        weight = module.weight
        if weight.is_floating_point() and weight.element_size() > 1:
            return None
        return f"one of the experts of a {type(module.experts).__name__}, which are quantised ({weight.dtype})"


class TransposedLayer(Layer):
    """transformers' Conv1D, the linear layer of GPT-2: the weight is the matrix transposed, (in, out)."""

    modules = ()

    @staticmethod
    def shape(module: Any) -> Shape:
        inputs, outputs = whole_shape(module.weight)
        return Shape(outputs, inputs)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.T

    @staticmethod
    def layout(matrix: Tensor, module: Any) -> Tensor:
        return matrix.T

    @staticmethod
    def branch(module: Any, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.linear(x, pair.down), pair.up)

    @staticmethod
    def product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T)


class EmbeddingLayer(Layer):
    """nn.Embedding: the weight is the matrix transposed, (vocabulary, dim), and the input picks its columns.

    The branch's input is an index, so dropout has nothing to act on.
    """

    modules = (nn.Embedding,)

    @staticmethod
    def shape(module: nn.Embedding) -> Shape:
        return Shape(module.embedding_dim, module.num_embeddings, lookup=True)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.T

    @staticmethod
    def layout(matrix: Tensor, module: nn.Embedding) -> Tensor:
        return matrix.T

    @staticmethod
    def branch(module: nn.Embedding, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.embedding(x, pair.down.T, padding_idx=module.padding_idx), pair.up)

    @staticmethod
    def product(module: nn.Embedding, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, padding_idx=module.padding_idx)

    @staticmethod
    def drop(x: Tensor, p: float, training: bool) -> Tensor:
        return x

    @staticmethod
    def refusal(module: nn.Embedding) -> str | None:
        if module.max_norm is not None:
            return "an embedding with max_norm rescales its own weight in every forward"
        if module.scale_grad_by_freq or module.sparse:
            return "an embedding with sparse or frequency-scaled gradients"
        return None


class ConvolutionLayer(Layer):
    """nn.Conv1d, Conv2d and Conv3d: A is a convolution of the same kernel to r channels, B one of kernel 1.

    In a grouped one every group has the same A, on its own inputs, and its own rows of B, so that the
    weight (outputs, inputs/groups · kernel) is a matrix like any other.
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
    def branch(module: Any, x: Tensor, pair: Pair) -> Tensor:
        if module.groups > 1 and module.out_channels <= module.groups * pair.up.shape[1]:
            return ConvolutionLayer.product(
                module, x, ConvolutionLayer.layout(pair.up @ pair.down, module)
            )  # the smaller
        down, groups = ConvolutionLayer.layout(pair.down, module), module.groups
        hidden = module._conv_forward(
            x, down if groups == 1 else down.repeat(groups, *(1 for _ in down.shape[1:])), None
        )
        channel = hidden.ndim - 1 - len(module.kernel_size)
        if groups == 1:
            return F.linear(hidden.movedim(channel, -1), pair.up).movedim(-1, channel)
        out = F.conv1d(hidden.flatten(channel + 1), pair.up.unsqueeze(-1), groups=groups)
        return out.reshape(*out.shape[:-1], *hidden.shape[channel + 1 :])

    @staticmethod
    def product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = module._conv_forward(x, weight, None)
        return out

    @staticmethod
    def per_output(vector: Tensor, module: Any) -> Tensor:
        return vector.view(-1, *(1 for _ in module.kernel_size))


class UngroupedLayer(ConvolutionLayer):
    """A grouped convolution to whose output a convolution of all its inputs is added, as PEFT trains it.

    That is no change of its weight: it cannot be merged, nor seen by who reads the weight.
    """

    @staticmethod
    def shape(module: Any) -> Shape:
        return Shape(module.out_channels, module.in_channels * math.prod(module.kernel_size))

    @staticmethod
    def branch(module: Any, x: Tensor, pair: Pair) -> Tensor:
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = (
                F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode),
                0,
            )
        down = pair.down.view(len(pair.down), -1, *module.kernel_size)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(module.kernel_size) - 1]
        hidden = convolve(x, down, None, module.stride, padding, module.dilation)
        channel = hidden.ndim - 1 - len(module.kernel_size)
        return F.linear(hidden.movedim(channel, -1), pair.up).movedim(-1, channel)


KINDS: tuple[type[Layer], ...] = (
    LinearLayer,
    EmbeddingLayer,
    ConvolutionLayer,
    TransposedLayer,
    ExpertLayer,
)


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The kind of layer that `module` is, or None if it is of no kind that can be adapted."""
    if quantised.is_quantised(module):
        return QuantisedLayer
    for kind in KINDS:
        if isinstance(module, kind.modules):
            return kind
    return TransposedLayer if is_transposed(module) else None


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D. Only looks if transformers is loaded: this room does not import it."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is one of the layers that "all-linear" means."""
    return kind_of(module) in (LinearLayer, QuantisedLayer, TransposedLayer)


def is_gate(module: nn.Module) -> bool:
    """Whether a linear layer has one output, as the gate of a shared expert, or one input: a pair has nothing to factor."""
    kind = kind_of(module)
    return kind is not None and 1 in kind.shape(module)[:2]


def refusal(module: nn.Module) -> str | None:
    """Why `module` cannot be adapted, or None if it can."""
    kind = kind_of(module)
    if kind is None:
        return f"a {type(module).__name__}, which is no linear, embedding or convolution layer"
    if kind in (QuantisedLayer, ExpertLayer):
        return kind.refusal(module)
    weight = vars(module)["_parameters"].get("weight")
    if weight is None:
        return f"a {type(module).__name__} whose weight is computed (parametrized or normalised), not a parameter of its own"
    if isinstance(weight, UninitializedParameter):
        return f"a {type(module).__name__} that gets its shape in the first forward; run one before adapting"
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.element_size() < 2
    ):
        dtype = getattr(weight, "dtype", type(weight).__name__)
        return f"a {type(module).__name__} whose weight is quantised ({dtype}), and no linear layer"
    if weight.is_meta and "_hf_hook" in vars(module):
        return "offloaded by Accelerate: its weight comes and goes, and an adapter would not come with it"
    return kind.refusal(module)


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a convolution in groups."""
    return kind_of(module) is ConvolutionLayer and bool(module.groups != 1)


def is_container(module: nn.Module) -> bool:
    """Whether it only holds other modules and is never called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def has_own_forward(module: nn.Module, kind: type[Layer]) -> bool:
    """Whether the module's class does more than its kind says, as a scaled embedding does.

    An adapter changes such a module's weight as the forward reads it, and not its output.
    """
    if kind in (QuantisedLayer, ExpertLayer) or is_transposed(module):
        return False
    classes = (c for c in type(module).__mro__ if "forward" in vars(c))
    owner = next(c for c in classes if not c.__module__.startswith("lorakin."))
    return owner not in kind.modules
