"""A GGUF file's header, read with bounds before any library reads the file.

Every count, length and offset in it comes from outside. None is trusted: a count is compared with
what the rest of the file can hold, and a tensor's place with the file's end.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from lorakin.errors import ModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT, MOST_DIMENSIONS, LONGEST_NAME = 32, 4, 65_535
_TYPE = gguf.GGUFValueType
SCALARS: dict[int, str] = {
    _TYPE.UINT8: "<B", _TYPE.INT8: "<b", _TYPE.UINT16: "<H", _TYPE.INT16: "<h",
    _TYPE.UINT32: "<I", _TYPE.INT32: "<i", _TYPE.UINT64: "<Q", _TYPE.INT64: "<q",
    _TYPE.FLOAT32: "<f", _TYPE.FLOAT64: "<d", _TYPE.BOOL: "<?",
}  # fmt: skip
"""A value's type → its layout for `struct`."""
SIZES = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
"""A tensor's type → its numbers in a block, and bytes of one."""
LEAST_KEY, LEAST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8
"""Bytes of the shortest entries, of a key and of a tensor: they tell how many fit into a file."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        values: each key's value; for an array its type and count.
        tensors: each tensor's shape, innermost dimension first.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    def count(self, name: str) -> int:
        """Returns how many numbers a tensor has."""
        return math.prod(self.tensors[name])


@dataclasses.dataclass(frozen=True)
class Array:
    """An array among the values, whose elements were passed over."""

    type: int
    count: int


def read_header(path: Path, kind: str = "file") -> Header:
    """Returns the header of a file, in which tensors lie inside the file and apart from each other.

    Args:
        path: the file.
        kind: what an error calls it: a GGUF "file" or "model".

    Raises:
        ModelError: no regular file, no GGUF, or a header that is damaged or lies.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file, so it is not a GGUF {kind}")
    try:
        with path.open("rb") as file:
            if path.stat().st_size < len(MAGIC) + 20:
                raise ModelError(
                    f"{path} cannot be read as a GGUF {kind}: it is too short for a header"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Walk(path, content, kind).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None


def check_model(path: Path) -> Header:
    """Returns the header of a file that holds a model.

    Raises:
        ModelError: as `read_header`; or it holds an adapter, a part of a model, or fewer layers
            than it says.
    """
    header = read_header(path, "model")
    values, names = header.values, header.tensors

    def wrong(what: str) -> ModelError:
        return ModelError(f"{path} cannot be read as a GGUF model: {what}")

    if values.get(gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER or any(
        name.endswith(".lora_a") for name in names
    ):
        raise wrong("it holds a LoRA adapter for llama.cpp, not a model; name its base instead")
    if isinstance(parts := values.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT), int) and parts > 1:
        raise wrong(f"it is one of {parts} parts; join them first: llama-gguf-split --merge")
    arch = values.get(gguf.Keys.General.ARCHITECTURE)
    if not isinstance(arch, str) or not arch:
        raise wrong(f"{gguf.Keys.General.ARCHITECTURE} is {arch!r}, expected a name")
    layers = values.get(f"{arch}.block_count")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= len(names):
        raise wrong(
            f"{arch}.block_count is {layers!r}, expected a number of layers that its {len(names)} "
            "tensors can make"
        )
    numbers = (name.split(".")[1] for name in names if name.startswith("blk."))
    beyond = [number for number in numbers if not number.isdecimal() or int(number) >= layers]
    more = values.get(f"{arch}.nextn_predict_layers")
    if beyond and not isinstance(more, int):
        raise wrong(f"it has tensors of blk.{beyond[0]}, and {arch}.block_count is {layers}")
    return header


class _Walk:
    """Reads a header from its start to its end. `at` is where the next value begins."""

    def __init__(self, path: Path, content: mmap.mmap, kind: str) -> None:
        self.path = path
        self.kind = kind
        self.content = content
        self.size = len(content)
        self.at = 0

    def header(self) -> Header:
        if self.take(4) != MAGIC:
            raise self.wrong("it does not begin with GGUF")
        if (version := self.number("<I")) not in VERSIONS:
            raise self.wrong(
                f"its version is {version}, known are {', '.join(map(str, VERSIONS))}, "
                "little-endian"
            )
        tensors, keys = self.number("<Q"), self.number("<Q")
        room = self.size - self.at
        if keys * LEAST_KEY + tensors * LEAST_TENSOR > room:
            raise self.wrong(
                f"it says that it has {keys:,} keys and {tensors:,} tensors, and it has only "
                f"{room:,} bytes"
            )
        values: dict[str, Any] = {}
        for _ in range(keys):
            if (key := self.text("a key")) in values:
                raise self.wrong(f"the key {key!r} stands in it twice")
            values[key] = self.value(self.number("<I"), key)
        alignment = values.get(gguf.Keys.General.ALIGNMENT, DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.wrong(
                f"{gguf.Keys.General.ALIGNMENT} is {alignment!r}, expected a power of two"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        spans: list[tuple[int, int, str]] = []
        for _ in range(tensors):
            if (name := self.text("a tensor's name")) in shapes:
                raise self.wrong(f"the tensor {name!r} stands in it twice")
            shapes[name], span = self.tensor(name, alignment)
            spans.append((*span, name))
        self.check_places(spans, -(-self.at // alignment) * alignment)
        return Header(values, shapes)

    def tensor(self, name: str, alignment: int) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Reads a tensor's shape, innermost dimension first, and its span behind the header."""
        if not 1 <= (dimensions := self.number("<I")) <= MOST_DIMENSIONS:
            raise self.wrong(
                f"the tensor {name!r} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}"
            )
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        kind, start = self.number("<I"), self.number("<Q")
        if kind not in SIZES:
            raise self.wrong(f"the tensor {name!r} is of the unknown type {kind}")
        block, width = SIZES[kind]
        if not all(shape) or shape[0] % block:
            raise self.wrong(
                f"the tensor {name!r} has the shape {shape}, which its type does not divide"
            )
        if start % alignment:
            raise self.wrong(
                f"the tensor {name!r} begins at {start}, which the alignment {alignment} does not "
                "divide"
            )
        return shape, (start, start + math.prod(shape) // block * width)

    def check_places(self, spans: list[tuple[int, int, str]], start: int) -> None:
        end = 0
        for first, last, name in sorted(spans):
            if first < end:
                raise self.wrong(f"the tensor {name!r} overlaps another")
            if start + last > self.size:
                ends = f"the tensor {name!r} ends at byte {start + last:,}"
                raise self.wrong(f"{ends}, the file at {self.size:,}; is it cut off?")
            end = last

    def value(self, kind: int, key: str) -> Any:
        if kind == _TYPE.STRING:
            return self.text(key, self.size)
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != _TYPE.ARRAY:
            raise self.wrong(f"{key} is of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _TYPE.STRING:
            if count * 8 > self.size - self.at:
                raise self.wrong(f"{key} has {count:,} elements, more than the file can hold")
            for _ in range(count):
                self.skip(self.number("<Q"))
        elif inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        else:
            raise self.wrong(f"{key} is an array of the type {inner}, expected numbers or strings")
        return Array(inner, count)

    def text(self, what: str, longest: int = LONGEST_NAME) -> str:
        if (length := self.number("<Q")) > longest:
            raise self.wrong(f"{what} has {length:,} bytes, more than is known")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not valid UTF-8") from None

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def take(self, count: int) -> bytes:
        start = self.at
        self.skip(count)
        return self.content[start : self.at]

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.wrong(
                f"it ends in the middle of its header, {count:,} bytes after byte {self.at:,}"
            )
        self.at += count

    def wrong(self, what: str) -> ModelError:
        return ModelError(f"{self.path} cannot be read as a GGUF {self.kind}: {what}")
