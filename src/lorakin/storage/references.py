"""References to tensors in JSON: the values are in a file of tensors, the JSON says where.

    {"tensor": "tensors/model.layers.0.self_attn.q_proj/P"}         in lorakin.safetensors

Values that PEFT's file has already are not written again. The JSON then names PEFT's tensor, and a
range of its rows, or of its columns with a step. The tensor is taken as a matrix of its first
dimension by all others:

    {"file": "adapter_model.safetensors", "tensor": "base_model.model.….lora_B.weight",
     "columns": [8, 16, 1]}

`shape` and `dtype` are given if they differ from those of that range.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lorakin.storage.schema import Count, checked

PEFT_TENSORS: Final = "adapter_model.safetensors"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value → the integer dtype by which all of its bits are compared."""
MOST_TRIED = 256
"""The most ranges that are tried for a tensor."""
PARENTS = 3
"""How far up PEFT's tensors are searched: those of an expert are kept by a module above it."""


@dataclasses.dataclass(frozen=True)
class TensorReference:
    """Where a tensor is."""

    tensor: str
    file: Literal["adapter_model.safetensors"] | None = None
    rows: tuple[Count, Count] | None = None
    columns: tuple[Count, Count, Count] | None = None
    shape: list[Count] | None = None
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields that are set."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def resolve(self, tensor: Tensor) -> Tensor:
        """Returns the part of `tensor` that this refers to, copied.

        Raises:
            ValueError: the range is not in it.
        """
        part = tensor
        if self.rows is not None or self.columns is not None:
            part = _matrix(tensor)
        if self.rows is not None:
            first, end = self.rows
            if not first <= end <= len(part):
                raise ValueError(f"{self.tensor} has {len(part)} rows, not {first} to {end}")
            part = part[first:end]
        if self.columns is not None:
            first, end, step = self.columns
            if not (first <= end <= part.shape[1] and step > 0):
                raise ValueError(f"{self.tensor} has {part.shape[1]} columns, not {first} to {end}")
            part = part[:, first:end:step]
        if self.shape is not None:
            try:
                part = part.reshape(self.shape)
            except RuntimeError:
                raise ValueError(f"{self.tensor} does not have the shape {self.shape}") from None
        dtype = tensor.dtype if self.dtype is None else DTYPES[self.dtype]
        return part.to(dtype, copy=True).contiguous()


FIELDS = {field.name for field in dataclasses.fields(TensorReference)}


class Packing:
    """Puts tensors into a file, and references to them into JSON.

    >>> in_peft = {"base_model.model.mlp.up.lora_B.weight": torch.arange(6.0).view(2, 3)}
    >>> packing = Packing(in_peft, "base_model.model.")
    >>> slots = {"mlp.up": {"up": torch.tensor([[1.0, 2.0], [4.0, 5.0]]), "m": torch.tensor([9.0])}}
    >>> packed = packing.packed(slots, "tensors")["mlp.up"]
    >>> packed["up"]["columns"], packed.get("m")
    ((1, 3, 1), {'tensor': 'tensors/mlp.up/m'})
    """

    def __init__(self, in_peft: Mapping[str, Tensor], prefix: str) -> None:
        """Makes the packing of the tensors of PEFT's file by key; `prefix` begins all keys."""
        self.in_peft = in_peft
        self.prefix = prefix
        self.keys = sorted(in_peft)
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, TensorReference] = {}

    def packed(self, value: Any, key: str) -> Any:
        """Returns `value` as JSON, with references for its tensors. One object is written once.

        `key` is the value's name, such as "tensors"; the keys of its tensors begin with it.
        """
        if isinstance(value, Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = self._find(value, key) or self._store(value, key)
            return self._seen[id(value)].as_json()
        if isinstance(value, Mapping):
            return {str(k): self.packed(v, f"{key}/{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.packed(v, f"{key}/{n}") for n, v in enumerate(value)]
        return value

    def _store(self, tensor: Tensor, key: str) -> TensorReference:
        self.tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
        return TensorReference(key)

    def _find(self, tensor: Tensor, key: str) -> TensorReference | None:
        """Returns where PEFT's file has these bits already, in a tensor of the same module."""
        if not tensor.numel() or tensor.is_meta:
            return None
        tensor = tensor.detach().cpu()
        for name in self._keys_of_module(key):
            if (found := _reference_in(tensor, self.in_peft[name], name)) is not None:
                return found
        return None

    def _keys_of_module(self, key: str) -> list[str]:
        """Returns the keys of PEFT's tensors that belong to the module that is named in `key`."""
        for part in key.split("/"):
            path = part
            for _ in range(PARENTS):
                start = f"{self.prefix}{path}."
                first = bisect.bisect_left(self.keys, start)
                end = bisect.bisect_left(self.keys, start + chr(0x10FFFF))
                path = path.rpartition(".")[0]
                if first < end or not path:
                    break
            if first < end:
                return self.keys[first:end]
        return []


def unpacked(value: Any, lorakin: Mapping[str, Tensor], peft: Mapping[str, Tensor]) -> Any:
    """Inverts `Packing.packed`; references to the same values give one object.

    Raises:
        ValueError: a reference to what is not there.
    """
    resolved: dict[str, Tensor] = {}

    def unpack(value: Any) -> Any:
        if isinstance(value, list):
            return [unpack(item) for item in value]
        if isinstance(value, TensorReference):
            return tensor_at(value)
        if not isinstance(value, dict):
            return value
        if "tensor" in value and value.keys() <= FIELDS:
            return tensor_at(checked(TensorReference, value))
        return {key: unpack(item) for key, item in value.items()}

    def tensor_at(reference: TensorReference) -> Tensor:
        tensors = lorakin if reference.file is None else peft
        if reference.tensor not in tensors:
            raise ValueError(f"there is no {reference.tensor}")
        if reference.file is None:
            return lorakin[reference.tensor]
        key = repr(reference)
        if key not in resolved:
            resolved[key] = reference.resolve(peft[reference.tensor])
        return resolved[key]

    return unpack(value)


def _reference_in(tensor: Tensor, stored: Tensor, name: str) -> TensorReference | None:
    """Returns a reference to the part of `stored` that has the bits of `tensor`; None if none."""
    is_wider = stored.dtype in (torch.float32, torch.float64) and tensor.is_floating_point()
    is_wider = is_wider and stored.element_size() > tensor.element_size() > 1
    if tensor.dtype != stored.dtype and not is_wider:
        return None
    part, matrix = _matrix(tensor), _matrix(stored)
    sides = set(part.shape) & {1, *matrix.shape}
    if not sides or part.numel() > matrix.numel():
        return None
    part, matrix = _bits(part.to(stored.dtype)), _bits(matrix)
    range_found = _range_of(part, matrix)
    if range_found is None and part.shape[1] == 1:
        # A vector may lie along a row in the file.
        part = part.T
        range_found = _range_of(part, matrix)
    if range_found is None:
        return None
    rows, columns = range_found
    is_whole = rows is None and columns is None
    default_shape = stored.shape if is_whole else part.shape
    return TensorReference(
        name,
        PEFT_TENSORS,
        rows,
        columns,
        None if tensor.shape == default_shape else list(tensor.shape),
        None if tensor.dtype == stored.dtype else _dtype_name(tensor.dtype),
    )


Range = tuple[tuple[int, int] | None, tuple[int, int, int] | None]


def _range_of(part: Tensor, matrix: Tensor) -> Range | None:
    """Returns the range of rows or columns in which `matrix` equals `part`; None if none does."""
    (rows, columns), (all_rows, all_columns) = part.shape, matrix.shape
    if part.shape == matrix.shape:
        return (None, None) if torch.equal(part, matrix) else None
    if columns == all_columns and rows < all_rows:
        for first in _equal_rows(matrix[: all_rows - rows + 1], part[0]):
            if torch.equal(matrix[first : first + rows], part):
                return (first, first + rows), None
    if rows == all_rows and columns < all_columns:
        return _columns(part, matrix)
    return None


def _columns(part: Tensor, matrix: Tensor) -> Range | None:
    across = matrix.T
    firsts = _equal_rows(across, part[:, 0])
    seconds = _equal_rows(across, part[:, 1]) if part.shape[1] > 1 else []
    for first in firsts:
        steps = [1] if part.shape[1] == 1 else [n - first for n in seconds if n > first]
        for step in steps[:2]:
            end = first + step * (part.shape[1] - 1) + 1
            if end <= matrix.shape[1] and torch.equal(matrix[:, first:end:step], part):
                return None, (first, end, step)
    return None


def _equal_rows(matrix: Tensor, row: Tensor) -> list[int]:
    """Returns the first rows of `matrix` that equal `row`; there may be thousands that are zero."""
    start = (matrix[:, 0] == row[0]).nonzero()[:, 0]
    equal = start[(matrix[start] == row).all(1)]
    return equal[:MOST_TRIED].tolist()


def _matrix(tensor: Tensor) -> Tensor:
    """Returns the first dimension by all others."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def _dtype_name(dtype: torch.dtype) -> Any:
    return next(name for name, value in DTYPES.items() if value == dtype)
