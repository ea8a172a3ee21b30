"""Counts what a GPU is asked to do: kernels launched, and waits of the CPU for the GPU.

An operation of torch launches one kernel, unless `LAUNCHES` says otherwise. A wait is a copy to the
CPU, or an operation whose result has a size that only the GPU knows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NOTHING = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_",
    "view", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "expand", "t", "lift_fresh",
    "set_", "resize_", "record_stream", "_efficientzerotensor", "is_same_size", "is_pinned",
    "stride", "size", "sym_size", "sym_stride", "sym_numel", "storage_offset", "is_contiguous",
    "sym_storage_offset", "is_non_overlapping_and_dense", "device",
}  # fmt: skip
"""Operations that launch no kernel."""
WAITING = {
    "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "allclose", "bincount", "_local_scalar_dense", "linalg_eigh", "_linalg_eigh",
    "linalg_qr", "_linalg_svd", "linalg_inv_ex", "linalg_cholesky_ex",
}  # fmt: skip
LAUNCHES = {
    "cumsum": 2, "nonzero": 3, "sort": 4, "topk": 2, "equal": 2, "embedding_dense_backward": 4,
    "native_layer_norm_backward": 3, "unique": 6, "linalg_qr": 8, "_linalg_eigh": 12,
    "_scaled_dot_product_flash_attention_backward": 4,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 4,
    "rms_norm_backward": 2, "rms_norm_backward_of_both": 4,
}  # fmt: skip
ROWS_OF_4_BIT_KERNEL = 1536
"""Up to so many rows bitsandbytes may multiply without unpacking; on an H100 often for fewer."""
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""How many tensors a multi-tensor kernel of torch takes, by the lists that it reads and writes."""
LISTS = {
    "_foreach_abs_": 1, "_foreach_add_": 1, "_foreach_norm": 1, "_foreach_zero_": 1,
    "_foreach_mul": 3, "_fused_adam_": 4, "_fused_adamw_": 4,
    "_amp_foreach_non_finite_check_and_unscale_": 1,
}  # fmt: skip
CHUNK, CHUNKS_A_LAUNCH = 65536, 320


class Launch(NamedTuple):
    """One operation on the GPU, or between it and the CPU."""

    name: str
    kernels: int
    waits: bool
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors that come out."""
    line: str
    """The innermost line of lorakin that asked for it, such as `family/dora.py:120`."""


class KernelCount(TorchDispatchMode):
    """Counts the operations inside a `with` block.

    >>> with KernelCount() as count:
    ...     _ = torch.ones(2) + 1
    >>> count.kernels
    0
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    @property
    def kernels(self) -> int:
        """How many kernels were launched."""
        return sum(launch.kernels for launch in self.launches)

    def of(self, name: str) -> int:
        """Returns how many kernels one kind of operation launched."""
        return sum(launch.kernels for launch in self.launches if launch.name == name)

    @property
    def waits(self) -> list[Launch]:
        """What waited for the GPU."""
        return [launch for launch in self.launches if launch.waits]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        if not func.is_view and name not in NOTHING and func.namespace != "prim":
            operands, results = list(tensors((args, kwargs))), list(tensors(out))
            if any(tensor.is_cuda for tensor in (*operands, *results)):
                kernels, waits = _cost(name, args, kwargs or {}, results)
                shapes = tuple(tuple(tensor.shape) for tensor in results)
                self.launches.append(Launch(name, kernels, waits, shapes, _line()))
        return out


def _cost(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], results: Sequence[Tensor]
) -> tuple[int, bool]:
    """Returns how many kernels an operation launches, and whether the CPU waits for it."""
    if results and all(tensor.numel() == 0 for tensor in results):
        return 0, False
    if name in ("_to_copy", "copy_"):
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], results[0])
        waits = source.device.type != target.device.type and not (
            kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        )
        return int(source is not target), waits
    if name in BY_INDEX:
        return _cost_of_index(name, args)
    if name in ("addmm", "baddbmm"):
        # the summand is copied first, unless it is a vector, which is added by the product itself
        return (2 if args[0].dim() > 1 else 1), False
    if name == "gemm_4bit":
        return _kernels_of_4_bits(args[0], has_nested_scales=args[7:8] not in ((), (None,))), False
    if name.startswith(("_foreach", "_fused", "_amp_foreach")):
        extra = int(name == "_foreach_norm" and bool(args[0]))
        return multi_tensor_launches(args[0], LISTS.get(name, 2)) + extra, False
    return LAUNCHES.get(name, 1), name in WAITING


def _kernels_of_4_bits(x: Tensor, has_nested_scales: bool) -> int:
    """Returns how many kernels bitsandbytes' product with a 4-bit weight launches.

    For few rows it has one of its own. For more it computes the scales, unpacks, and multiplies.
    """
    if x.numel() // max(1, x.shape[-1]) <= ROWS_OF_4_BIT_KERNEL:
        return 1
    return 4 if has_nested_scales else 2


def _cost_of_index(name: str, args: Sequence[Any]) -> tuple[int, bool]:
    indices = list(tensors(args[1]))
    if any(index.device.type == "cpu" and index.dim() for index in indices):
        return 2, True
    if not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return 1, False
    # one value put where a mask says is a masked fill
    is_fill = name != "index" and args[2].numel() == 1 and len(indices) == 1
    return (1, False) if is_fill else (4, True)


def multi_tensor_launches(tensors: Sequence[Tensor], lists: int) -> int:
    """Returns how often torch launches a multi-tensor kernel for these tensors."""
    launches, held, chunks = 0, 0, 0
    for tensor in tensors:
        held += 1
        for _ in range(max(1, math.ceil(tensor.numel() / CHUNK))):
            chunks += 1
            if chunks == CHUNKS_A_LAUNCH:
                launches, held, chunks = launches + 1, 0, 0
        if held == TENSORS_A_LAUNCH[lists]:
            launches, held, chunks = launches + 1, 0, 0
    return launches + bool(held or chunks)


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of an operation's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def _line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        _, found, rest = frame.f_code.co_filename.rpartition("/src/lorakin/")
        if found:
            return f"{rest}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "-"
