"""GGUF, llama.cpp's file format: which architectures, under which names and in which layout, and LoRA adapters.

llama.cpp's converter renames a transformers model's tensors and, for some architectures, changes the order of the rows of
q_proj and k_proj: within each head transformers has all first halves of the rotated pairs and then all second halves,
llama.cpp has the pairs side by side. An adapter's `up` has the same rows and is reordered alike.

A GGUF adapter holds for each tensor `<name>.lora_a` (rank, in) and `<name>.lora_b` (out, rank); llama.cpp adds
(alpha / rank) · b · a, or b · a where alpha is 0. For the embedding `a` lies the other way, (vocabulary, rank).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakin.errors import AdapterError, ModelError, OutputError, SettingError
from lorakin.family import Pair, Shape, all_finite
from lorakin.inject.layers import kind_of
from lorakin.training import gguf_header, loading


class Architecture(NamedTuple):
    """How llama.cpp knows one kind of transformers model.

    `permuted`: q_proj and k_proj have their rows reordered. `whole`: models of it can be written here, not only adapters.
    """

    arch: Any
    permuted: bool = False
    whole: bool = False


_ARCH = gguf.MODEL_ARCH
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_ARCH.LLAMA, permuted=True, whole=True),
    "mistral": Architecture(_ARCH.LLAMA, permuted=True, whole=True),
    "qwen2": Architecture(_ARCH.QWEN2, whole=True),
    "qwen3": Architecture(_ARCH.QWEN3, whole=True),
    "arcee": Architecture(_ARCH.ARCEE, permuted=True),
    "granite": Architecture(_ARCH.GRANITE, permuted=True),
    "olmo": Architecture(_ARCH.OLMO, permuted=True),
    "smollm3": Architecture(_ARCH.SMOLLM3, permuted=True),
    "cohere": Architecture(_ARCH.COMMAND_R),
    "cohere2": Architecture(_ARCH.COHERE2),
    "gemma": Architecture(_ARCH.GEMMA),
    "gemma2": Architecture(_ARCH.GEMMA2),
    "gemma3_text": Architecture(_ARCH.GEMMA3),
    "gpt2": Architecture(_ARCH.GPT2),
    "olmo2": Architecture(_ARCH.OLMO2),
    "phi": Architecture(_ARCH.PHI2),
    "phi3": Architecture(_ARCH.PHI3),
    "stablelm": Architecture(_ARCH.STABLELM),
    "starcoder2": Architecture(_ARCH.STARCODER2),
}
"""By a config's `model_type`. Left out is what llama.cpp's converter splits, joins or reorders in another way."""

_TYPE = gguf.GGMLQuantizationType
TYPES: dict[str, Any] = {"f32": _TYPE.F32, "f16": _TYPE.F16, "bf16": _TYPE.BF16, "q8_0": _TYPE.Q8_0}
ADAPTER_DTYPES = ("f32", "f16", "bf16")
ADAPTER_TYPE: Final = "lora"
EMBEDDING, HEAD, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
ELSEWHERE = "use --to gguf-merged, or --to merged and llama.cpp's convert_hf_to_gguf.py"


@dataclasses.dataclass(frozen=True)
class TensorType:
    """One tensor of a file: its name and shape there, the key of `TYPES` it is written in, and what gives its numbers.

    `source` is what the user knows it by.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    source: str


def architecture_of(config: Any) -> Architecture:
    """What llama.cpp calls the architecture of a model with this config.

    Raises:
        ModelError: none that is known here.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a {kind!r} model's GGUF layout is not known here, only: {', '.join(ARCHITECTURES)}; {ELSEWHERE}"
        )
    return ARCHITECTURES[kind]


def skeleton(config: Any) -> nn.Module:
    """The causal language model of `config`, without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = loading.made(
            transformers.AutoModelForCausalLM, config, attn_implementation="eager"
        )
    return model


def gguf_name(config: Any, parameter: str) -> str | None:
    """What llama.cpp calls the tensor that transformers calls `parameter`, or None if it has none like it."""
    names = _names(architecture_of(config).arch, config.num_hidden_layers)
    name: str | None = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    return name


@cache
def _names(arch: Any, layers: int) -> Any:
    return gguf.get_tensor_name_map(arch, layers)


def row_order(config: Any, parameter: str, rows: int) -> Tensor | None:
    """For each row in llama.cpp's order the row it is in transformers', (rows,) int64; None where the order is the same."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None),
    }
    count = heads.get(parameter.split(".")[-2])
    if not architecture_of(config).permuted or count is None:
        return None
    return torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).flatten()


def check_dtype(dtype: str, allowed: Sequence[str]) -> None:
    """Raises SettingError if `dtype` is none of `allowed`."""
    if dtype not in allowed:
        raise SettingError(f"dtype of a GGUF file must be {', '.join(allowed)}, not {dtype!r}")


def encoded(tensor: Tensor, dtype: str, source: str) -> NDArray[Any]:
    """The tensor's numbers as the file holds them: rounded to the nearest, never to infinity.

    Raises:
        ModelError: NaN, infinity, or a number too large for `dtype`; the message names `source`.
    """
    tensor = tensor.detach().cpu().contiguous()
    if not all_finite(tensor):
        raise ModelError(f"{source} holds NaN or infinity, so it is not written")
    if dtype == "bf16":
        narrow = tensor.to(torch.bfloat16)
        array: NDArray[Any] = narrow.view(torch.int16).numpy().view(np.uint16)
    else:
        narrow = tensor.to(torch.float16 if dtype == "f16" else torch.float32)
        array = narrow.numpy()
    block_scale = (
        narrow.abs().amax() / 127 if dtype == "q8_0" and narrow.numel() else torch.zeros(())
    )
    if not all_finite(narrow) or block_scale > torch.finfo(torch.float16).max:
        largest = float(tensor.abs().max())
        raise ModelError(
            f"{source} holds {largest:g}, too large for {dtype}; write it as bf16 or f32"
        )
    return gguf.quants.quantize(array, _TYPE.Q8_0) if dtype == "q8_0" else array


def write_file(path: Path, writer: Any, tensors: Sequence[TensorType]) -> None:
    """Write the GGUFWriter's metadata and `tensors`, one at a time, beside `path`, and rename it when it is complete.

    Raises:
        OutputError: it cannot be written; a file that was there is intact.
    """
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[TYPES[tensor.dtype]]
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=TYPES[tensor.dtype]
        )
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(encoded(tensor.read(), tensor.dtype, tensor.source))
            writer.flush()
            _check_written(writer.fout[0])
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # closing flushes what a full disk refused before
            writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink()


def _check_written(file: Any) -> None:
    """See that all is there: what NumPy writes last is lost without a word where the disk is full."""
    if os.fstat(file.fileno()).st_size != file.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """A module that llama.cpp can adapt: its weight's name there, its matrix, and the order of its rows, see `row_order`."""

    name: str
    shape: Shape
    order: Tensor | None


def _places(config: Any) -> Iterator[tuple[str, TensorPlace | str]]:
    """Every module of the model that has a weight matrix, by path, or why llama.cpp cannot adapt it."""
    tied = "the embedding and the output head are tied, and llama.cpp cannot adapt a tensor that serves as both"
    for path, module in skeleton(config).named_modules():
        if (kind := kind_of(module)) is None:
            continue
        name, shape = gguf_name(config, f"{path}.weight"), kind.shape(module)
        if name is None or name == POSITIONS:
            yield path, "llama.cpp applies no adapter there"
        elif config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            yield path, tied
        else:
            yield path, TensorPlace(name, shape, row_order(config, f"{path}.weight", shape.outputs))


def write_adapter(
    path: Path, config: Any, pairs: Mapping[str, Pair], *, dtype: str = "f32"
) -> None:
    """Write `pairs` as a LoRA that llama.cpp loads beside the model of `config`.

    Pairs of smaller rank are filled up with zeros to the largest, and alpha is that rank, so that every factor is 1.

    Args:
        path: the file; one that is there is replaced.
        config: the base model's transformers config.
        pairs: by module path; `up` (out, k), `down` (k, in), scales inside `up`, rows in transformers' order.
        dtype: "f32", "f16" or "bf16".

    Raises:
        ModelError: an architecture that is not known here.
        AdapterError: a module that the model lacks or llama.cpp cannot adapt, a pair of another shape, NaN, infinity, or a
            number too large for `dtype`. Nothing is written.
        OutputError: the file cannot be written.
        SettingError: an unknown dtype.
        ValueError: a pair with a gain, which is no low-rank change.
    """
    check_dtype(dtype, ADAPTER_DTYPES)
    if not pairs:
        raise AdapterError("an adapter without any module is not written")
    architecture, places = architecture_of(config), dict(_places(config))
    rank = max(1, *(pair.up.shape[1] for pair in pairs.values()))
    tensors = []
    for module, pair in pairs.items():
        place = places.get(
            module,
            f"a {config.model_type} model of this config has no module of that name to adapt",
        )
        if isinstance(place, str):
            raise AdapterError(
                f"{module} cannot be written to a GGUF adapter: {place}. Leave it out, or {ELSEWHERE}"
            )
        if pair.gain is not None:
            raise ValueError(
                f"{module} has a gain, which a GGUF adapter cannot hold; convert it to a plain pair first"
            )
        k = pair.up.shape[1]
        if pair.up.shape != (place.shape.outputs, k) or pair.down.shape != (k, place.shape.inputs):
            raise AdapterError(
                f"{module}: up {tuple(pair.up.shape)} and down {tuple(pair.down.shape)} do not fit the base model's weight, "
                f"{place.shape.outputs} × {place.shape.inputs}"
            )
        up = pair.up if place.order is None else pair.up[place.order.to(pair.up.device)]
        up = nn.functional.pad(up.detach(), (0, rank - k))
        down = nn.functional.pad(pair.down.detach(), (0, 0, 0, rank - k))
        for half, tensor in (("a", down.T if place.name == EMBEDDING else down), ("b", up)):
            try:
                encoded(tensor, dtype, module)
            except ModelError as error:
                raise AdapterError(str(error)) from None
            tensors.append(
                TensorType(
                    f"{place.name}.lora_{half}",
                    tuple(tensor.shape),
                    dtype,
                    partial(Tensor.contiguous, tensor),
                    module,
                )
            )
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, ADAPTER_TYPE)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    write_file(path, writer, tensors)


def read_adapter(path: Path, config: Any) -> dict[str, Pair]:
    """The pairs of a LoRA for llama.cpp, by the module paths of the model of `config`: the inverse of `write_adapter`.

    `up` (out, rank) in transformers' order of rows and with alpha / rank in it, `down` (rank, in), both float32.

    Raises:
        ModelError: an architecture that is not known here.
        AdapterError: no such file, no GGUF, no adapter, one for another model, tensors that do not fit, NaN or infinity.
    """
    architecture = gguf.MODEL_ARCH_NAMES[architecture_of(config).arch]
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
                f"{path}: {key} is {fields.get(key)!r}, expected {value!r}; is it an adapter of this model?"
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
        tensors = {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
            for t in reader.tensors
        }
    places = {
        place.name: (module, place)
        for module, place in _places(config)
        if isinstance(place, TensorPlace)
    }
    pairs = {}
    for name in dict.fromkeys(
        tensor.removesuffix(".lora_a").removesuffix(".lora_b") for tensor in tensors
    ):
        if name in tensors:
            raise AdapterError(
                f"{path}: {name} is a whole tensor; only .lora_a and .lora_b are read"
            )
        if name not in places:
            raise AdapterError(
                f"{path}: {name} is no tensor of this {config.model_type} model that can be adapted"
            )
        missing = [half for half in (f"{name}.lora_a", f"{name}.lora_b") if half not in tensors]
        if missing:
            raise AdapterError(f"{path}: {missing[0]} is missing, its other half is there")
        module, place = places[name]
        pairs[module] = _pair(
            tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], alpha, place, f"{path}: {name}"
        )
    if not pairs:
        raise AdapterError(f"{path} holds no tensors")
    return pairs


def _pair(a: Tensor, b: Tensor, alpha: float, place: TensorPlace, where: str) -> Pair:
    up, down = b.float(), (a.T if place.name == EMBEDDING else a).float()
    rank = up.shape[-1]
    if up.shape != (place.shape.outputs, rank) or down.shape != (rank, place.shape.inputs):
        raise AdapterError(
            f"{where}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} do not fit the base model's weight, "
            f"{place.shape.outputs} × {place.shape.inputs}"
        )
    if not (all_finite(up) and all_finite(down)):
        raise AdapterError(f"{where} holds NaN or infinity")
    if place.order is not None:
        up = up[torch.argsort(place.order)]
    return Pair(up * (alpha / rank) if alpha else up, down.contiguous())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the gguf library raises for a damaged file into an AdapterError."""
    try:
        with np.errstate(all="ignore"):
            yield
    except ModelError as error:
        raise AdapterError(str(error)) from None
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        OverflowError,
        TypeError,
        RuntimeError,
    ) as error:
        raise AdapterError(f"{path} cannot be read as a GGUF file ({error})") from None
