"""LoRA adapters as GGUF files, which llama.cpp loads together with a model.

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
    TensorToWrite,
    architecture_of,
    check_dtype,
    encoded,
    gguf_name,
    meta_model,
    row_order,
    write_file,
)
from lorakin.training import gguf_header

ADAPTER_DTYPES = ("f32", "f16", "bf16")
ADAPTER_TYPE: Final = "lora"


@dataclasses.dataclass(frozen=True)
class GgufTarget:
    """A module that llama.cpp can adapt.

    Attributes:
        name: llama.cpp's name of its weight.
        shape: the shape of its matrix.
        row_order: the order of the matrix's rows in the file (see `gguf_format.row_order`).
    """

    name: str
    shape: Shape
    row_order: Tensor | None


def write_adapter(
    path: Path, config: Any, pairs: Mapping[str, Pair], *, dtype: str = "f32"
) -> None:
    """Writes `pairs` as a LoRA that llama.cpp loads together with the model of `config`.

    Pairs of smaller rank are padded with zeros to the largest, and alpha is that rank, so every
    factor is 1.

    Args:
        path: the file; an existing one is replaced.
        config: the base model's transformers config.
        pairs: the pairs by module path: `up` (out, k), with the scale in it, and `down` (k, in),
            both in transformers' order of rows.
        dtype: "f32", "f16" or "bf16".

    Raises:
        ModelError: lorakin does not know the architecture's GGUF layout.
        AdapterError: a module that the model lacks or llama.cpp cannot adapt, a pair of another
            shape, NaN, infinity, or a value too large for `dtype`. Nothing is written.
        OutputError: the file cannot be written.
        SettingError: the dtype is unknown.
        ValueError: a pair has a gain, so it is not a low-rank change.
    """
    check_dtype(dtype, ADAPTER_DTYPES)
    if not pairs:
        raise AdapterError("an adapter without modules cannot be written")
    architecture, targets = architecture_of(config), dict(_targets(config))
    rank = max(1, *(pair.up.shape[1] for pair in pairs.values()))
    unknown = f"a {config.model_type} model of this config has no module of that name to adapt"

    tensors = []
    for module, pair in pairs.items():
        target = targets.get(module, unknown)
        if isinstance(target, str):
            raise AdapterError(
                f"{module} cannot be written to a GGUF adapter: {target}. Leave it out, or "
                f"{ELSEWHERE}"
            )
        tensors += _tensors(module, pair, target, rank, dtype)

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, ADAPTER_TYPE)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    write_file(path, writer, tensors)


def _tensors(
    module: str, pair: Pair, target: GgufTarget, rank: int, dtype: str
) -> list[TensorToWrite]:
    """Returns the file's two tensors for one module, padded to `rank`."""
    if pair.gain is not None:
        raise ValueError(
            f"{module} has a gain, which a GGUF adapter cannot hold; convert it to a plain pair "
            "first"
        )
    k = pair.up.shape[1]
    outputs, inputs = target.shape.outputs, target.shape.inputs
    if pair.up.shape != (outputs, k) or pair.down.shape != (k, inputs):
        raise AdapterError(
            f"{module}: up {tuple(pair.up.shape)} and down {tuple(pair.down.shape)} do not fit the "
            f"base model's weight, {outputs} × {inputs}"
        )
    up = pair.up if target.row_order is None else pair.up[target.row_order.to(pair.up.device)]
    up = nn.functional.pad(up.detach(), (0, rank - k))
    down = nn.functional.pad(pair.down.detach(), (0, 0, 0, rank - k))

    tensors = []
    for letter, tensor in (("a", down.T if target.name == EMBEDDING else down), ("b", up)):
        try:
            encoded(tensor, dtype, module)  # raises before anything is written
        except ModelError as error:
            raise AdapterError(str(error)) from None
        name, read = f"{target.name}.lora_{letter}", partial(Tensor.contiguous, tensor)
        tensors.append(TensorToWrite(name, tuple(tensor.shape), dtype, read, module))
    return tensors


def read_adapter(path: Path, config: Any) -> dict[str, Pair]:
    """Reads the pairs of a LoRA for llama.cpp, the inverse of `write_adapter`.

    Args:
        path: the file.
        config: the base model's transformers config.

    Returns:
        float32 pairs by module path: `up` (out, rank), in transformers' order of rows and with
        alpha / rank in it, and `down` (rank, in).

    Raises:
        ModelError: lorakin does not know the architecture's GGUF layout.
        AdapterError: there is no such file, it is not a GGUF file or not an adapter of this model,
            its tensors do not fit, or hold NaN or infinity.
    """
    architecture = gguf.MODEL_ARCH_NAMES[architecture_of(config).arch]
    alpha, tensors = _contents(path, architecture)
    targets = {
        target.name: (module, target)
        for module, target in _targets(config)
        if isinstance(target, GgufTarget)
    }

    pairs = {}
    weights = (name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors)
    for name in dict.fromkeys(weights):
        if name in tensors:
            raise AdapterError(
                f"{path}: {name} is a whole tensor; only .lora_a and .lora_b are read"
            )
        if name not in targets:
            raise AdapterError(
                f"{path}: this {config.model_type} model has no tensor {name} that can be adapted"
            )
        keys = f"{name}.lora_a", f"{name}.lora_b"
        if missing := [key for key in keys if key not in tensors]:
            raise AdapterError(f"{path}: {missing[0]} is missing, only half of its pair is there")
        module, target = targets[name]
        a, b = (tensors[key] for key in keys)
        pairs[module] = _pair(a, b, alpha, target, f"{path}: {name}")
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


def _pair(a: Tensor, b: Tensor, alpha: float, target: GgufTarget, where: str) -> Pair:
    """Returns the pair of two tensors of a file, after checking that they fit the module."""
    up, down = b.float(), (a.T if target.name == EMBEDDING else a).float()
    rank, outputs, inputs = up.shape[-1], target.shape.outputs, target.shape.inputs
    if up.shape != (outputs, rank) or down.shape != (rank, inputs):
        raise AdapterError(
            f"{where}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not fit the base "
            f"model's weight, {outputs} × {inputs}"
        )
    if not (all_finite(up) and all_finite(down)):
        raise AdapterError(f"{where} holds NaN or infinity")
    if target.row_order is not None:
        up = up[torch.argsort(target.row_order)]
    return Pair(up * (alpha / rank) if alpha else up, down.contiguous())


def _targets(config: Any) -> Iterator[tuple[str, GgufTarget | str]]:
    """Yields the path of each module with a matrix, and its target or why there is none."""
    for path, module in meta_model(config).named_modules():
        if (kind := kind_of(module)) is None:
            continue
        name, shape = gguf_name(config, f"{path}.weight"), kind.shape(module)
        if name is None or name == POSITIONS:
            yield path, "llama.cpp applies no adapter to that tensor"
        elif config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            yield (
                path,
                "the embedding and the output head are tied, and llama.cpp cannot adapt a tensor "
                "that serves as both",
            )
        else:
            yield path, GgufTarget(name, shape, row_order(config, f"{path}.weight", shape.outputs))


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
