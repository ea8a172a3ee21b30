"""How the kernels multiply by the weights of quantised layers: bitsandbytes'.

For layers and inputs without a `WeightSource`, the library computes the base's product, and plain
operations the adapter's. torchao's would take longer: it unpacks slowly, and its own backward does
not unpack.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.inject.quantised import packed_weight
from lorakin.kernels.autograd import PLAIN_TYPES, runs_eagerly
from lorakin.kernels.weight_source import WeightSource


def weight_source(module: nn.Module, library_forward: Any, x: Any) -> WeightSource | None:
    """Returns the weight of a quantised module for the kernels; None if they do not apply.

    Args:
        module: the layer.
        library_forward: the forward of its library's class.
        x: its input.
    """
    weight = module._parameters.get("weight")
    if weight is None or type(x) not in PLAIN_TYPES or x.device != weight.device:
        return None
    if not (x.is_floating_point() and runs_eagerly()):
        return None
    sources = (source(module, library_forward, weight, x) for source in SOURCES)
    return next((source for source in sources if source is not None), None)


def bitsandbytes_4_bits(
    module: Any, library_forward: Any, weight: Any, x: Tensor
) -> WeightSource | None:
    """Returns the weight of a Linear4bit: NF4 or FP4, with or without nested scales."""
    library, state = sys.modules.get("bitsandbytes"), getattr(weight, "quant_state", None)
    if library is None or library_forward is not library.nn.Linear4bit.forward or state is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        return None
    if not module.compute_type_is_set:
        # The library's forward would do it.
        module.set_compute_type(x)
        module.compute_type_is_set = True
    dtype = _dtype_of_products(module.compute_dtype or x.dtype, x)
    if dtype is None:
        return None

    packed = weight.detach()

    def unpack(dtype: torch.dtype) -> Tensor:
        wanted = copy.copy(state)
        wanted.dtype = dtype
        matrix: Tensor = library.functional.dequantize_4bit(packed, wanted)
        return matrix

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        # Older versions want the packed weight transposed. A result with a bias may be a view.
        y: Tensor = library.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)
        return y.data

    return WeightSource(packed, state.shape, dtype, unpack, product, _squares_of(module))


def bitsandbytes_8_bits(
    module: Any, library_forward: Any, weight: Any, x: Tensor
) -> WeightSource | None:
    """Returns the weight of a Linear8bitLt, whose product may round the inputs too.

    The backward takes it for that of the dequantised weight, as the library's own does.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None or library_forward is not library.nn.Linear8bitLt.forward:
        return None
    state, trains = module.state, module.training
    if weight.CB is not None:
        # The library's forward would do it.
        module.init_8bit_state()
    if state.has_fp16_weights or state.CB is None or _dtype_of_products(x.dtype, x) != x.dtype:
        return None
    packed, scales = state.CB, state.SCB

    def unpack(dtype: torch.dtype) -> Tensor:
        matrix: Tensor = packed.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1 / 127))
        return matrix

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        state.is_training = trains
        y: Tensor = library.matmul(x, weight, bias=bias, state=state)
        return y.data

    squares = _squares_of(module)
    return WeightSource(packed, packed.shape, x.dtype, unpack, product, squares, is_exact=False)


SOURCES = (bitsandbytes_4_bits, bitsandbytes_8_bits)


def _squares_of(module: nn.Module) -> Callable[[], Tensor]:
    """Returns how to get the squares of the rows, which are computed once for each module."""
    return lambda: packed_weight(module).squares


def _dtype_of_products(computes: torch.dtype, x: Tensor) -> torch.dtype | None:
    """Returns the dtype of a layer's products; None for inputs that plain operations treat better.

    Args:
        computes: the dtype in which the library computes without autocast.
        x: the layer's input. Where it is wider, the adapter's product should not be narrower.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return dtype if computes in (dtype, torch.float32) and x.dtype != torch.float64 else None
    return computes if torch.promote_types(computes, x.dtype) == computes else None
