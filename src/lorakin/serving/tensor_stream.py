"""A safetensors file written one tensor at a time, which the library itself cannot do."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakin.errors import ModelError
from lorakin.waiting import tracked

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""safetensors' words for dtypes."""
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
TensorKind = tuple[torch.dtype, tuple[int, ...]]
"""The dtype and shape of a stored tensor."""


def write_shard(path: Path, kinds: Mapping[str, TensorKind], read: Callable[[str], Tensor]) -> int:
    """Writes a safetensors file.

    The format: the header's length (8 bytes, little-endian), the header as JSON, then the tensors
    without gaps (https://github.com/huggingface/safetensors#format).

    Args:
        path: the file.
        kinds: the dtype and shape of each tensor, by name, in the order in which they are written.
        read: returns the tensor of a name.

    Returns:
        the bytes of the tensors.

    Raises:
        ModelError: a tensor has another dtype or shape.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "model.safetensors"
    ...     size = write_shard(path, {"w": (torch.float32, (2,))}, lambda name: torch.ones(2))
    ...     size, load_file(path)["w"]
    (8, tensor([1., 1.]))
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [start, end]
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, kind in tracked(kinds.items(), f"writing {path.name}", len(kinds)):
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != kind:
                raise ModelError(
                    f"{name} is stored with shape {tuple(tensor.shape)}, expected {kind[1]}"
                )
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return end
