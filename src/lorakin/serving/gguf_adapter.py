"""LoRA adapters as GGUF files, which llama.cpp loads beside a model.

The file holds two tensors for each module, `<name>.lora_a` (rank, in) and `<name>.lora_b` (out,
rank). llama.cpp adds (alpha / rank) · b · a, or b · a where alpha is 0. For the embedding `a` is
transposed: (vocabulary, rank). Rows of `b` are in llama.cpp's order; see `gguf_format.row_order`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, ModelError
from lorakin.family import Pair, Shape, all_finite
from lorakin.inject.layer_kinds import kind_of
from lorakin.serving.gguf_format import (
    ELSEWHERE,
    EMBEDDING,
    HEAD,
    POSITIONS,
    TensorType,
    architecture_of,
    check_dtype,
    encoded,
    gguf_name,
    row_order,
    skeleton,
    write_file,
)
from lorakin.training import gguf_header

ADAPTER_DTYPES = ("f32", "f16", "bf16")
ADAPTER_TYPE: Final = "lora"


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """A module that llama.cpp can adapt.

    `name` is its weight's there, `shape` its matrix, `order` that of its rows, see `row_order`.
    """

    name: str
    shape: Shape
    order: Tensor | None


def write_adapter(
    path: Path, config: Any, pairs: Mapping[str, Pair], *, dtype: str = "f32"
) -> None:
    """Writes `pairs` as a LoRA that llama.cpp loads beside the model of `config`.

    Pairs of smaller rank are padded with zeros to the largest, and alpha is that rank, so every
    factor is 1.

    Args:
        path: the file; one that is there is replaced.
        config: the base model's transformers config.
        pairs: by module path; `up` (out, k), `down` (k, in), scales inside `up`, rows in
            transformers' order.
        dtype: "f32", "f16" or "bf16".

    Raises:
        ModelError: the architecture is not known here.
        AdapterError: a module that the model lacks or llama.cpp cannot adapt, a pair of another
            shape, NaN, infinity, or a number too large for `dtype`. Nothing is written.
        OutputError: the file cannot be written.
        SettingError: the dtype is unknown.
        ValueError: a pair has a gain, so it is no low-rank change.
    """
    check_dtype(dtype, ADAPTER_DTYPES)
    if not pairs:
        raise AdapterError("an adapter without any module is not written")
    architecture, places = architecture_of(config), dict(_places(config))
    rank = max(1, *(pair.up.shape[1] for pair in pairs.values()))
    unknown = f"a {config.model_type} model of this config has no module of that name to adapt"

    tensors = []
    for module, pair in pairs.items():
        place = places.get(module, unknown)
        if isinstance(place, str):
            raise AdapterError(
                f"{module} cannot be written to a GGUF adapter: {place}. Leave it out, or "
                f"{ELSEWHERE}"
            )
        tensors += _tensors(module, pair, place, rank, dtype)

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, ADAPTER_TYPE)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    write_file(path, writer, tensors)


def _tensors(
    module: str, pair: Pair, place: TensorPlace, rank: int, dtype: str
) -> list[TensorType]:
    """Returns the file's two tensors for one module, padded to `rank`."""
    if pair.gain is not None:
        raise ValueError(
            f"{module} has a gain, which a GGUF adapter cannot hold; convert it to a plain pair "
            "first"
        )
    k = pair.up.shape[1]
    if pair.up.shape != (place.shape.outputs, k) or pair.down.shape != (k, place.shape.inputs):
        raise AdapterError(
            f"{module}: up {tuple(pair.up.shape)} and down {tuple(pair.down.shape)} do not fit the "
            f"base model's weight, {place.shape.outputs} × {place.shape.inputs}"
        )
    up = pair.up if place.order is None else pair.up[place.order.to(pair.up.device)]
    up = nn.functional.pad(up.detach(), (0, rank - k))
    down = nn.functional.pad(pair.down.detach(), (0, 0, 0, rank - k))

    found = []
    for half, tensor in (("a", down.T if place.name == EMBEDDING else down), ("b", up)):
        try:
            encoded(tensor, dtype, module)  # raises before anything is written
        except ModelError as error:
            raise AdapterError(str(error)) from None
        name, read = f"{place.name}.lora_{half}", partial(Tensor.contiguous, tensor)
        found.append(TensorType(name, tuple(tensor.shape), dtype, read, module))
    return found


def read_adapter(path: Path, config: Any) -> dict[str, Pair]:
    """Reads the pairs of a LoRA for llama.cpp, the inverse of `write_adapter`.

    Args:
        path: the file.
        config: the base model's transformers config.

    Returns:
        float32 pairs by module path: `up` (out, rank), in transformers' order of rows and with
        alpha / rank in it, and `down` (rank, in).

    Raises:
        ModelError: the architecture is not known here.
        AdapterError: there is no such file, it is no GGUF file, or no adapter of this model, its
            tensors do not fit, or hold NaN or infinity.
    """
    architecture = gguf.MODEL_ARCH_NAMES[architecture_of(config).arch]
    alpha, tensors = _contents(path, architecture)
    places = {p.name: (module, p) for module, p in _places(config) if isinstance(p, TensorPlace)}

    pairs = {}
    whole = (name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors)
    for name in dict.fromkeys(whole):
        if name in tensors:
            raise AdapterError(
                f"{path}: {name} is a whole tensor; only .lora_a and .lora_b are read"
            )
        if name not in places:
            raise AdapterError(
                f"{path}: {name} is no tensor of this {config.model_type} model that can be adapted"
            )
        halves = f"{name}.lora_a", f"{name}.lora_b"
        if missing := [half for half in halves if half not in tensors]:
            raise AdapterError(f"{path}: {missing[0]} is missing, its other half is there")
        module, place = places[name]
        a, b = (tensors[half] for half in halves)
        pairs[module] = _pair(a, b, alpha, place, f"{path}: {name}")
    if not pairs:
        raise AdapterError(f"{path} holds no tensors")
    return pairs


def _contents(path: Path, architecture: str) -> tuple[float, dict[str, Tensor]]:
    """Returns the alpha of an adapter file and its tensors, after checking what the file is."""
    if not path.is_file():
        raise AdapterError(f"there is no file {path}")
    with _readable(path):
        gguf_header.read_header(path)
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}

    expected = {
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: ADAPTER_TYPE,
        gguf.Keys.General.ARCHITECTURE: architecture,
    }
    for key, value in expected.items():
        if fields.get(key) != value:
            raise AdapterError(
                f"{path}: {key} is {fields.get(key)!r}, expected {value!r}; is it an adapter of "
                "this model?"
            )
    if gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS in fields:
        raise AdapterError(
            f"{path} is an aLoRA, which acts from certain tokens on; only plain adapters are read"
        )
    alpha = fields.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"{path}: {gguf.Keys.Adapter.LORA_ALPHA} is {alpha!r}, expected a finite number"
        )
    with _readable(path):
        return alpha, {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
            for t in reader.tensors
        }


def _pair(a: Tensor, b: Tensor, alpha: float, place: TensorPlace, where: str) -> Pair:
    """Returns the pair of two tensors of a file, after checking that they fit the module."""
    up, down = b.float(), (a.T if place.name == EMBEDDING else a).float()
    rank = up.shape[-1]
    if up.shape != (place.shape.outputs, rank) or down.shape != (rank, place.shape.inputs):
        raise AdapterError(
            f"{where}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not fit the base "
            f"model's weight, {place.shape.outputs} × {place.shape.inputs}"
        )
    if not (all_finite(up) and all_finite(down)):
        raise AdapterError(f"{where} holds NaN or infinity")
    if place.order is not None:
        up = up[torch.argsort(place.order)]
    return Pair(up * (alpha / rank) if alpha else up, down.contiguous())


def _places(config: Any) -> Iterator[tuple[str, TensorPlace | str]]:
    """Yields each module with a matrix by path, or a text: why llama.cpp cannot adapt it."""
    for path, module in skeleton(config).named_modules():
        if (kind := kind_of(module)) is None:
            continue
        name, shape = gguf_name(config, f"{path}.weight"), kind.shape(module)
        if name is None or name == POSITIONS:
            yield path, "llama.cpp applies no adapter there"
        elif config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            yield (
                path,
                "the embedding and the output head are tied, and llama.cpp cannot adapt a tensor "
                "that serves as both",
            )
        else:
            yield path, TensorPlace(name, shape, row_order(config, f"{path}.weight", shape.outputs))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the gguf library raises for a damaged file into an AdapterError."""
    damaged = OSError, ValueError, KeyError, IndexError, OverflowError, TypeError, RuntimeError
    try:
        with np.errstate(all="ignore"):
            yield
    except ModelError as error:
        raise AdapterError(str(error)) from None
    except damaged as error:
        raise AdapterError(f"{path} cannot be read as a GGUF file ({error})") from None
