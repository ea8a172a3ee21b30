"""GGUF, llama.cpp's file format: architectures, names, the order of rows, writing files.

llama.cpp's converter renames a transformers model's tensors. For some architectures it also
reorders the rows of q_proj and k_proj: within each head transformers has all first halves of the
rotated pairs and then all second halves, llama.cpp has the pairs side by side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from lorakin.errors import ModelError, OutputError, SettingError
from lorakin.family import all_finite
from lorakin.training import loading


class Architecture(NamedTuple):
    """An architecture of llama.cpp, for one `model_type` of transformers.

    Attributes:
        arch: llama.cpp's name, as the gguf library's constant.
        permuted: whether the rows of q_proj and k_proj are reordered.
        whole: whether lorakin writes whole models of it, not only adapters.
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
"""The architectures by a config's `model_type`.

What llama.cpp's converter splits, joins or reorders in another way is left out.
"""

_TYPE = gguf.GGMLQuantizationType
TYPES: dict[str, Any] = {"f32": _TYPE.F32, "f16": _TYPE.F16, "bf16": _TYPE.BF16, "q8_0": _TYPE.Q8_0}
EMBEDDING, HEAD, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
ELSEWHERE = "use --to gguf-merged, or --to merged and llama.cpp's convert_hf_to_gguf.py"


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor to be written to a file.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: a key of `TYPES`.
        read: returns its values.
        source: the name that the user knows, for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    source: str


def architecture_of(config: Any) -> Architecture:
    """Returns llama.cpp's architecture for a model with this config.

    Raises:
        ModelError: lorakin does not know its GGUF layout.

    >>> architecture_of(transformers.LlamaConfig()).permuted
    True
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"lorakin does not know the GGUF layout of a {kind!r} model, only of "
            f"{', '.join(ARCHITECTURES)}; {ELSEWHERE}"
        )
    return ARCHITECTURES[kind]


def meta_model(config: Any) -> nn.Module:
    """Returns the causal language model of `config` on the meta device."""
    with torch.device("meta"):
        model: nn.Module = loading.model_from_config(
            transformers.AutoModelForCausalLM, config, attn_implementation="eager"
        )
    return model


def gguf_name(config: Any, parameter: str) -> str | None:
    """Returns llama.cpp's name of the tensor that transformers calls `parameter`; None if none.

    >>> gguf_name(transformers.LlamaConfig(), "model.layers.0.mlp.up_proj.weight")
    'blk.0.ffn_up.weight'
    """
    names = _names(architecture_of(config).arch, config.num_hidden_layers)
    name: str | None = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    return name


@cache
def _names(arch: Any, layers: int) -> Any:
    return gguf.get_tensor_name_map(arch, layers)


def row_order(config: Any, parameter: str, rows: int) -> Tensor | None:
    """Returns for each row in llama.cpp's order the row in transformers': (rows,), int64.

    None where the order is the same.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None),
    }
    count = heads.get(parameter.split(".")[-2])
    if not architecture_of(config).permuted or count is None:
        return None
    return torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).flatten()


def check_dtype(dtype: str, allowed: Sequence[str]) -> None:
    """Checks the dtype of a GGUF file.

    Raises:
        SettingError: `dtype` is not in `allowed`.
    """
    if dtype not in allowed:
        raise SettingError(f"dtype of a GGUF file must be {', '.join(allowed)}, not {dtype!r}")


def encoded(tensor: Tensor, dtype: str, source: str) -> NDArray[Any]:
    """Returns the values as the file holds them, rounded to the nearest, never to infinity.

    Raises:
        ModelError: NaN, infinity, or a value too large for `dtype`; the message names `source`.

    >>> encoded(torch.ones(2), "f16", "w")
    array([1., 1.], dtype=float16)
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
    block_scale = torch.zeros(())  # q8_0 stores it in float16
    if dtype == "q8_0" and narrow.numel():
        block_scale = narrow.abs().amax() / 127
    if not all_finite(narrow) or block_scale > torch.finfo(torch.float16).max:
        largest = float(tensor.abs().max())
        raise ModelError(
            f"{source} holds {largest:g}, too large for {dtype}; write it as bf16 or f32"
        )
    return gguf.quants.quantize(array, _TYPE.Q8_0) if dtype == "q8_0" else array


def write_file(path: Path, writer: Any, tensors: Sequence[TensorToWrite]) -> None:
    """Writes metadata and tensors to a temporary file, and renames it to `path` when complete.

    Args:
        path: the file.
        writer: a GGUFWriter that holds the metadata.
        tensors: the tensors to write.

    Raises:
        OutputError: it cannot be written; an existing file is unchanged.
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
    """Checks the file's size: on a full disk NumPy loses its last write without an error."""
    if os.fstat(file.fileno()).st_size != file.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
