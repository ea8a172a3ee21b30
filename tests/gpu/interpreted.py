"""Triton's interpreter, which runs GPU kernels on the CPU, with bfloat16 as a GPU has it.

The interpreter of Triton 3.7 keeps bfloat16 as 16-bit integers. It multiplies them as integers,
matrices too, and cuts off digits where a GPU rounds to the nearest. It leaves floats that a kernel
is given what they are in Python, and knows no functions of CUDA's mathematics library. Liger wants
tensors of the one, and `rsqrt` of the other. This mends all of it.
"""

from __future__ import annotations

import importlib.util
from typing import Any


def install() -> None:
    """Mends the interpreter; TRITON_INTERPRET was set before Triton was imported."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    interpreter._implicit_cvt = _with_floats(interpreter._implicit_cvt)
    libdevice.rsqrt = lambda x: tl.rsqrt(x)

    InterpreterBuilder.cast_impl = _with_rounding(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _with_rounding(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.binary_op = _widened_and_narrowed(InterpreterBuilder.binary_op)
    InterpreterBuilder.create_dot = _in_float32(InterpreterBuilder.create_dot)


def _with_floats(convert: Any) -> Any:
    def mended(argument: Any) -> Any:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if type(argument) is not float:
            return convert(argument)
        return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    return mended


def _with_rounding(cast: Any) -> Any:
    def mended(builder: Any, source: Any, target: Any, *rest: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(_narrowed(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(_widened(source.data), tl.float32)
        return cast(builder, source, target, *rest)

    return mended


def _widened_and_narrowed(operation: Any) -> Any:
    def mended(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if left.dtype.scalar != tl.bfloat16:
            return operation(builder, left, right, *rest)
        wide = (TensorHandle(_widened(t.data), tl.float32) for t in (left, right))
        return TensorHandle(_narrowed(operation(builder, *wide, *rest).data), tl.bfloat16)

    return mended


def _in_float32(dot: Any) -> Any:
    def mended(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if left.dtype.scalar == tl.bfloat16:
            left, right = (TensorHandle(_widened(t.data), tl.float32) for t in (left, right))
        return dot(builder, left, right, *rest)

    return mended


def _narrowed(values: Any) -> Any:
    """Returns float32 numbers as the bits of bfloat16, rounded by torch."""
    import numpy as np
    import torch

    narrow = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return narrow.view(torch.int16).numpy().view(np.uint16)


def _widened(bits: Any) -> Any:
    """Returns the float32 numbers that bits of bfloat16 stand for."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)
