"""Linear layers whose weight is kept in few bits: bitsandbytes', torchao's, and others.

`quantised_products.py` says how the kernels multiply by some; other layers keep the forward and
backward of their library. What needs values reads them in blocks of rows, and nothing keeps them.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lorakin.family import FrozenWeight, Shape
from lorakin.family.sharding import whole_shape
from lorakin.family.weight import BLOCK
from lorakin.inject.attachments import base_parameters
from lorakin.kernels.autograd import PLAIN_TYPES

ReadRows = Callable[[int, int], Tensor]
"""A function (start, stop) → these rows of the weight, (rows, inputs), floating point."""


def is_quantised(module: nn.Module) -> bool:
    """Returns whether `module` is a linear layer whose weight is packed or has less than 16 bits.

    >>> is_quantised(nn.Linear(2, 2))
    False
    """
    sides = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not all(isinstance(side, int) for side in sides):
        return False
    weight = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return False
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        # Another shape means packed bits in a floating-point dtype.
        is_bits = tuple(whole_shape(weight)) != sides
        return is_bits or (type(weight) not in PLAIN_TYPES and is_packed(weight))
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not tensor.is_floating_point() or tensor.element_size() < 2 for tensor in tensors)


def library_forward(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the output of the library's class for `x`, without adapters and hooks."""
    classes = (c for c in type(module).__mro__ if not c.__module__.startswith("lorakin."))
    owner = next(c for c in classes if "forward" in vars(c))
    out: Tensor = vars(owner)["forward"](module, x)
    return out


def refusal(module: nn.Module) -> str | None:
    """Returns why a quantised module cannot be adapted; None if it can.

    Its forward must run on this machine and be differentiable.
    """
    name = type(module).__name__
    if device_of(module).type == "meta" or row_reader(module) is not None:
        return None
    try:
        x = torch.ones(2, int(module.in_features), device=device_of(module), requires_grad=True)  # type: ignore[arg-type]
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(library_forward(module, x).sum(), x)
    except Exception as error:
        # The library may lack anything on this machine.
        reason = str(error).strip().partition("\n")[0]
        return f"a {name}, a quantised layer that no gradient passes on this machine ({reason})"
    return None if torch.isfinite(grad).all() else f"a {name} whose gradient is not finite"


class PackedWeight(FrozenWeight):
    """The weight of a quantised module as a matrix (outputs, inputs), dequantised each time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.shape = torch.Size((int(module.out_features), int(module.in_features)))  # type: ignore[arg-type]
        self.device = device_of(module)
        self.dtype = torch.float32
        self.state = _state(module)

    @property
    def module(self) -> nn.Module:
        """The module, which outlives this object."""
        module = self._module()
        assert module is not None
        return module

    @property
    def matrix(self) -> Tensor:
        """The whole matrix, float32."""
        return torch.cat(list(self.blocks()))

    def blocks(self) -> Iterator[Tensor]:
        """Yields its rows in order, about `BLOCK` values at a time, float32."""
        return self._blocks(row_reader(self.module) or _by_backward(self.module))

    def _blocks(self, read: ReadRows) -> Iterator[Tensor]:
        outputs, inputs = self.shape
        step = max(1, BLOCK // max(1, inputs))
        return (
            read(start, min(start + step, outputs)).to(torch.float32)
            for start in range(0, outputs, step)
        )

    def product(self, down: Tensor) -> Tensor:
        """Computes W0·downᵀ, (outputs, k), float32."""
        read = row_reader(self.module)
        if read is None:
            # Rows are expensive then, and the module's forward is this product.
            return product(self.module, down).T.to(torch.float32)
        return torch.cat([rows @ down.to(rows.dtype).T for rows in self._blocks(read)])

    def rows(self, which: Tensor) -> Tensor:
        """Returns the rows that a mask (outputs,) selects."""
        return self.matrix[which]


_PACKED_WEIGHTS: weakref.WeakKeyDictionary[nn.Module, PackedWeight] = weakref.WeakKeyDictionary()


def packed_weight(module: nn.Module) -> PackedWeight:
    """Returns the module's weight: the same object until the module's tensors change.

    So the squares of its rows are computed once. A compiled forward does not depend on this cache.
    """
    if torch.compiler.is_compiling():
        return PackedWeight(module)
    packed = _PACKED_WEIGHTS.get(module)
    if packed is None or packed.state != _state(module):
        packed = _PACKED_WEIGHTS[module] = PackedWeight(module)
    return packed


def shape_of(module: Any) -> Shape:
    """Returns the shape of the module's weight as a matrix."""
    return Shape(module.out_features, module.in_features)


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of the module's tensors."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def row_reader(module: nn.Module) -> ReadRows | None:
    """Returns how to read rows of the weight from the module's tensors.

    None if only the module's forward and backward can.
    """
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return None
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is not None:
        return _four_bits(weight, state)
    if hasattr(weight, "SCB"):
        holder: Any = module
        scales: Tensor = holder.state.SCB if weight.SCB is None else weight.SCB
        return lambda start, stop: weight.data[start:stop] * (scales[start:stop, None] / 127)
    if is_packed(weight):
        return lambda start, stop: weight.detach()[start:stop].dequantize()
    return None


def is_packed(weight: Tensor) -> bool:
    """Returns whether a tensor's class can dequantise itself, as torchao's can."""
    return type(weight).dequantize is not Tensor.dequantize


def _four_bits(weight: Any, state: Any) -> ReadRows:
    """Returns how to read rows of bitsandbytes' 4-bit weights.

    These hold two values per byte, row after row, and a scale for every `blocksize` values.
    """
    _restore_layout(weight, state)
    library = sys.modules["bitsandbytes"].functional
    inputs, size, scales = state.shape[1], state.blocksize, state.absmax
    if state.nested:
        scales = library.dequantize_blockwise(scales, state.state2) + state.offset

    def rows(start: int, stop: int) -> Tensor:
        first, past_last = start * inputs, stop * inputs
        if inputs % size:
            # A scale belongs to values of several rows.
            whole: Tensor = library.dequantize_4bit(weight.data, state)
            return whole[start:stop]
        part = library.QuantState(
            absmax=scales[first // size : past_last // size].float(),
            shape=torch.Size((stop - start, inputs)),
            code=state.code,
            blocksize=size,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        bits = weight.data.view(torch.uint8).reshape(-1, 1)[first // 2 : past_last // 2]
        values: Tensor = library.dequantize_4bit(bits, part)
        return values

    return rows


def _by_backward(module: nn.Module) -> ReadRows:
    """Returns how to read rows of any weight that gradients flow through.

    Row j is the gradient of the input for the j-th unit vector as the output's gradient.
    """

    def rows(start: int, stop: int) -> Tensor:
        outputs, inputs = shape_of(module)[:2]
        with torch.enable_grad():
            x = torch.zeros(stop - start, inputs, device=device_of(module), requires_grad=True)
            out = library_forward(module, x)
            units = torch.zeros_like(out)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            (values,) = torch.autograd.grad(out, x, units)
        assert values.shape[1] == inputs and out.shape[1] == outputs
        return values

    return rows


def product(module: nn.Module, x: Tensor) -> Tensor:
    """Computes W0·x without the bias, by the library's own forward."""
    out, bias = library_forward(module, x), getattr(module, "bias", None)
    return out if bias is None else out - bias


def _state(module: nn.Module) -> tuple[object, ...]:
    """Returns a value that changes when the module's tensors do."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return tuple((id(tensor), tensor._version) for tensor in tensors)


FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""Attributes by which transformers and TRL tell whether a model is quantised.

transformers' Trainer refuses such a model unless PEFT adapted it, and TRL casts all that trains to
bfloat16.
"""


def clear_flags(model: nn.Module) -> dict[str, bool]:
    """Clears the flags that call the model quantised, while adapters are in it.

    Returns:
        the flags that were set; `vars(model).update(...)` with them restores them.
    """
    flags = {flag: True for flag in FLAGS if getattr(model, flag, False)}
    vars(model).update(dict.fromkeys(flags, False))
    return flags


def dtype_of(model: nn.Module) -> torch.dtype:
    """Returns the dtype in which a model with quantised layers computes: its other parameters'."""
    dtypes = (p.dtype for _, p in base_parameters(model) if type(p) in PLAIN_TYPES)
    wide = (dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1)
    return next(wide, torch.float32)


def replace(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts plain linear layers in the place of quantised ones.

    Without any quantised layer left, the model is no longer called quantised.

    Args:
        model: the model to change.
        weights: the new weight (outputs, inputs) of each layer, by path.
    """
    for path, weight in weights.items():
        owner, _, leaf = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        sizes = layer.in_features, layer.out_features
        plain = nn.Linear(*sizes, layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        setattr(model.get_submodule(owner), leaf, plain.train(layer.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if not weights or quantizer is None:
        return
    if not any(is_quantised(module) for module in model.modules()):
        quantizer.remove_quantization_config(model)
        vars(model).update({flag: False for flag in FLAGS if hasattr(model, flag)})
    _leave_plain(model, quantizer, list(weights))


def _leave_plain(model: nn.Module, quantizer: Any, paths: list[str]) -> None:
    """Writes into the model's config which modules are plain now, so that saved files load.

    The caller may hold the same config and make other models by it, so the model gets a copy.
    """
    config = copy.deepcopy(quantizer.quantization_config)
    # The lists of bitsandbytes and of torchao.
    lists = ("llm_int8_skip_modules", "modules_to_not_convert")
    for name in (name for name in lists if hasattr(config, name)):
        skipped = [*(getattr(quantizer, "modules_to_not_convert", None) or ()), *paths]
        setattr(config, name, list(dict.fromkeys([*(getattr(config, name) or ()), *skipped])))
    quantizer.quantization_config = config
    model_config: Any = getattr(model, "config", None)
    if hasattr(model_config, "quantization_config"):
        model_config.quantization_config = config


def not_to_shard(model: nn.Module) -> list[nn.Module]:
    """Returns the quantised layers that FSDP2 cannot shard: their tensors are not floats."""
    not_sharded = []
    for module in filter(is_quantised, model.modules()):
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(is_packed(tensor) or not tensor.is_floating_point() for tensor in tensors):
            not_sharded.append(module)
    return not_sharded


def keep_trainable(model: nn.Module) -> list[nn.Module]:
    """Changes a quantised model so that it can be trained, also by DDP.

    On some CPUs bitsandbytes repacks a 4-bit weight for a kernel without a backward when it is
    first used for inference: after an evaluation no gradient would pass. And DDP would send tensors
    to all processes whose classes cannot be sent.

    Returns:
        the modules for `restore_inference_kernel`, when the last adapter goes.
    """
    flag = "support_avx512bf16_for_cpu"
    changed = [module for module in model.modules() if getattr(module, flag, False)]
    for module in changed:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        _restore_layout(module.weight, module.weight.quant_state)  # type: ignore[union-attr]
    if unsent := [name for name, parameter in model.named_parameters() if is_packed(parameter)]:
        model._ddp_params_and_buffers_to_ignore = unsent  # type: ignore[assignment]
    return changed


def restore_inference_kernel(modules: list[nn.Module]) -> None:
    """Switches the inference kernel on again that `keep_trainable` has switched off."""
    for module in modules:
        module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]


def _restore_layout(weight: Any, state: Any) -> None:
    """Restores the usual layout of a 4-bit weight; its scales stay rounded to bfloat16."""
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()  # the library would lose their order
        state.original_nested = False
        undo = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
        weight.data, weight.quant_state = undo(weight.data, state)
        weight.quant_state.absmax = scales
