"""The kinds of module that can be adapted, each seen as one matrix (outputs × inputs).

A kind says how its module lays out the weight and how it applies a low-rank pair to its input. All
other code works on the matrix and never asks which kind it is.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lorakin.family import FrozenWeight, Method, Pair, Shape, UnadaptedModule
from lorakin.family.sharding import ShardedWeight, is_sharded, whole_shape
from lorakin.inject import quantised, quantised_products
from lorakin.inject.convolutions import ConvolutionLayer, PeftGroupedConvolution
from lorakin.inject.experts import ExpertMatrix
from lorakin.inject.layer_kind import LayerKind
from lorakin.kernels import adapted_linear
from lorakin.kernels.weight_source import Weight

__all__ = [
    "KINDS",
    "ConvolutionLayer",
    "EmbeddingLayer",
    "ExpertLayer",
    "LayerKind",
    "LinearLayer",
    "PeftGroupedConvolution",
    "QuantisedLayer",
    "TransposedLayer",
    "has_one_output_or_input",
    "is_container",
    "is_conv1d",
    "is_grouped",
    "is_linear",
    "kind_of",
    "overrides_forward",
    "refusal",
    "unadapted",
]


class LinearLayer(LayerKind):
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
    def weight_for_kernel(
        module: Any, library_forward: Any, x: Any, method: Method
    ) -> Weight | None:
        weight: Tensor | None = module._parameters.get("weight")
        if library_forward is not nn.Linear.forward or not adapted_linear.applies(x, weight):
            return None
        return weight

    @staticmethod
    def low_rank_product(module: nn.Linear, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.linear(x, pair.down), pair.up)

    @staticmethod
    def base_product(module: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class QuantisedLayer(LinearLayer):
    """A linear layer that keeps its weight in few bits; see `quantised.py`."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = ()

    @staticmethod
    def shape(module: Any) -> Shape:
        return quantised.shape_of(module)

    @classmethod
    def weight(cls, module: Any) -> FrozenWeight:
        return quantised.packed_weight(module)

    @staticmethod
    def weight_for_kernel(
        module: Any, library_forward: Any, x: Any, method: Method
    ) -> Weight | None:
        is_inference = not (module.training or torch.is_grad_enabled())
        if is_inference and not method.has_gain and quantised.device_of(module).type == "cpu":
            # Plain operations beside the library's forward take as long, VeRA's less.
            return None
        return quantised_products.weight_source(module, library_forward, x)

    @staticmethod
    def dtype(module: Any, x: Tensor) -> torch.dtype:
        return x.dtype

    @staticmethod
    def device(module: Any) -> torch.device:
        return quantised.device_of(module)

    @staticmethod
    def base_product(module: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        return quantised.product(module, x)

    @staticmethod
    def refusal(module: Any) -> str | None:
        return quantised.refusal(module)


class ExpertLayer(LinearLayer):
    """One matrix of a stack of experts; see `experts.py`. Its module is never called."""

    modules: ClassVar[tuple[type[nn.Module], ...]] = (ExpertMatrix,)

    @staticmethod
    def weight_for_kernel(
        module: Any, library_forward: Any, x: Any, method: Method
    ) -> Weight | None:
        return None

    @staticmethod
    def shape(module: Any) -> Shape:
        return Shape(*module.shape)

    @classmethod
    def weight(cls, module: Any) -> Tensor | FrozenWeight:
        if is_sharded(module.parameter):
            return ShardedWeight(module.shape, module.parameter)
        return super().weight(module)

    @staticmethod
    def refusal(module: Any) -> str | None:
        weight = module.weight
        if weight.is_floating_point() and weight.element_size() > 1:
            return None
        return (
            f"one of the experts of a {type(module.owner).__name__}, which are quantised "
            f"({weight.dtype})"
        )


class TransposedLayer(LayerKind):
    """transformers' Conv1D, GPT-2's linear layer: the weight is transposed, (in, out)."""

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
    def low_rank_product(module: Any, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.linear(x, pair.down), pair.up)

    @staticmethod
    def base_product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T)


class EmbeddingLayer(LayerKind):
    """nn.Embedding: the weight is the transposed matrix (vocabulary, dim), and inputs pick columns.

    An input is an index, so dropout has nothing to act on.
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
    def low_rank_product(module: nn.Embedding, x: Tensor, pair: Pair) -> Tensor:
        return F.linear(F.embedding(x, pair.down.T, padding_idx=module.padding_idx), pair.up)

    @staticmethod
    def base_product(module: nn.Embedding, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, padding_idx=module.padding_idx)

    @staticmethod
    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        return x

    @staticmethod
    def refusal(module: nn.Embedding) -> str | None:
        if module.max_norm is not None:
            return "an embedding with max_norm rescales its own weight in every forward"
        if module.scale_grad_by_freq or module.sparse:
            return "an embedding with sparse or frequency-scaled gradients"
        return None


KINDS: tuple[type[LayerKind], ...] = (
    LinearLayer,
    EmbeddingLayer,
    ConvolutionLayer,
    TransposedLayer,
    ExpertLayer,
)


def kind_of(module: nn.Module) -> type[LayerKind] | None:
    """Returns the kind of layer that `module` is; None if it cannot be adapted.

    >>> kind_of(nn.Linear(3, 2)).__name__, kind_of(nn.ReLU())
    ('LinearLayer', None)
    """
    if quantised.is_quantised(module):
        return QuantisedLayer
    for kind in KINDS:
        if isinstance(module, kind.modules):
            return kind
    return TransposedLayer if is_conv1d(module) else None


def unadapted(module: nn.Module) -> UnadaptedModule:
    """Returns the module's shape and its base weight as a matrix, also while merged."""
    kind = kind_of(module)
    assert kind is not None
    return UnadaptedModule(kind.shape(module), kind.weight(module))


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether `module` is transformers' Conv1D.

    It looks only if transformers is loaded, since `lorakin.inject` does not import it.
    """
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Returns whether `module` is one of the layers that "all-linear" means."""
    return kind_of(module) in (LinearLayer, QuantisedLayer, TransposedLayer)


def has_one_output_or_input(module: nn.Module) -> bool:
    """Returns whether a layer has one output, such as the gate of a shared expert, or one input.

    A pair has nothing to factor there.
    """
    kind = kind_of(module)
    return kind is not None and 1 in kind.shape(module)[:2]


def refusal(module: nn.Module) -> str | None:
    """Returns why `module` cannot be adapted; None if it can.

    >>> refusal(nn.ReLU())
    'a ReLU, which is not a linear, embedding or convolution layer'
    """
    kind = kind_of(module)
    name = f"a {type(module).__name__}"
    if kind is None:
        return f"{name}, which is not a linear, embedding or convolution layer"
    if kind in (QuantisedLayer, ExpertLayer):
        return kind.refusal(module)

    weight = vars(module)["_parameters"].get("weight")
    if weight is None:
        return f"{name} whose weight is computed (parametrized or normalised), not a parameter"
    if isinstance(weight, UninitializedParameter):
        return f"{name} that gets its shape in the first forward; run one before adapting"
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.element_size() < 2
    ):
        dtype = getattr(weight, "dtype", type(weight).__name__)
        return f"{name} whose weight is quantised ({dtype}), and which is not linear"
    if weight.is_meta and "_hf_hook" in vars(module):
        return (
            "offloaded by Accelerate: its weight comes and goes, and an adapter would stay behind"
        )
    return kind.refusal(module)


def is_grouped(module: nn.Module) -> bool:
    """Returns whether it is a convolution in groups."""
    return kind_of(module) is ConvolutionLayer and bool(module.groups != 1)


def is_container(module: nn.Module) -> bool:
    """Returns whether it only holds other modules and is never called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)


def overrides_forward(module: nn.Module, kind: type[LayerKind]) -> bool:
    """Returns whether the module's class does more than its kind, as a scaled embedding does.

    An adapter then changes the weight that the forward reads, instead of adding to the output.
    """
    if kind in (QuantisedLayer, ExpertLayer) or is_conv1d(module):
        return False
    classes = (c for c in type(module).__mro__ if "forward" in vars(c))
    owner = next(c for c in classes if not c.__module__.startswith("lorakin."))
    return owner not in kind.modules
