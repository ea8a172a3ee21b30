"""A whole model as a GGUF file that llama.cpp runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorakin.errors import LorakinWarning, ModelError
from lorakin.serving.gguf_format import (
    ARCHITECTURES,
    ELSEWHERE,
    EMBEDDING,
    HEAD,
    TYPES,
    TensorToWrite,
    architecture_of,
    check_dtype,
    gguf_name,
    meta_model,
    row_order,
    write_file,
)
from lorakin.serving.gguf_vocabulary import read_vocabulary
from lorakin.training import loading

_FILE = gguf.LlamaFileType
_FILE_TYPES = {
    "f32": _FILE.ALL_F32,
    "f16": _FILE.MOSTLY_F16,
    "bf16": _FILE.MOSTLY_BF16,
    "q8_0": _FILE.MOSTLY_Q8_0,
}
_ROTATIONS = ("default", "linear", "yarn", "llama3")


def write_model(
    path: Path,
    config: Any,
    tokenizer_dir: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str = "f16",
    name: str | None = None,
    template: str | None = None,
) -> None:
    """Writes a model with its tokenizer as one file, with one tensor in memory at a time.

    Args:
        path: the file; an existing one is replaced.
        config: the model's transformers config.
        tokenizer_dir: a directory with its tokenizer, as `save_pretrained` writes it.
        tensors: the weights under transformers' names: a `state_dict()`, or a mapping that loads
            each when asked. A tied head may be left out.
        dtype: "f32", "f16", "bf16" or "q8_0". Vectors stay float32, and matrices whose rows are not
            a multiple of 32 long, which q8_0 cannot hold, become f16.
        name: the model's name in the file.
        template: another chat template than the tokenizer's.

    Raises:
        ModelError: lorakin cannot write the architecture, a setting of it or the tokenizer; tensors
            are missing, unknown, or of another shape; a value is NaN, infinite, or too large for
            `dtype`.
        OutputError: the file cannot be written.
        SettingError: the dtype is unknown.
    """
    check_dtype(dtype, tuple(TYPES))
    architecture = architecture_of(config)
    _check(config)
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        warnings.warn(
            "llama.cpp has no sliding window for this architecture, so the file's context is cut "
            f"to that, {window} tokens",
            LorakinWarning,
            stacklevel=2,
        )
    stored = _stored(config, tensors, dtype)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    if name is not None:
        writer.add_name(name)
    _add_hyperparameters(writer, config)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    read_vocabulary(tokenizer_dir, config.vocab_size, template).add_to(writer)
    write_file(path, writer, stored)


def _check(config: Any) -> None:
    """Checks that llama.cpp loads the model, and computes what transformers does.

    Raises:
        ModelError: it does not.
    """
    kind = config.model_type
    if not ARCHITECTURES[kind].whole:
        writable = ", ".join(name for name in ARCHITECTURES if ARCHITECTURES[name].whole)
        raise ModelError(
            f"lorakin writes only adapters of a {kind} model as GGUF; it writes whole models of "
            f"{writable}. {ELSEWHERE}"
        )
    rope = config.rope_parameters
    rotation = rope.get("rope_type", "default")
    yarn = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    is_yarn, silu = rotation == "yarn", ("silu", "swish")
    width = _head_dim(config) * config.num_attention_heads
    problems = (
        (
            config.hidden_act not in silu,
            f"hidden_act is {config.hidden_act!r}, llama.cpp's is silu",
        ),
        (
            rotation not in _ROTATIONS,
            f"its rotary embedding is {rotation!r}, not one of {', '.join(_ROTATIONS)}",
        ),
        (
            rotation == "llama3" and kind not in ("llama", "mistral"),
            "llama.cpp has Llama 3's rotation for Llama and Mistral only",
        ),
        (is_yarn and bool(yarn), f"its yarn rotation sets {', '.join(yarn)}"),
        (is_yarn and not rope.get("truncate", True), "its yarn rotation is not truncated"),
        (
            rope.get("partial_rotary_factor", 1.0) != 1.0,
            "it rotates a part of each head only (partial_rotary_factor)",
        ),
        (
            kind == "qwen3" and config.attention_bias,
            "llama.cpp has no attention_bias for qwen3",
        ),
        (
            kind == "qwen2" and width != config.hidden_size,
            "llama.cpp requires num_attention_heads · head_dim = hidden_size for qwen2",
        ),
    )
    for exists, problem in problems:
        if exists:
            raise ModelError(f"this {kind} model cannot be written as GGUF: {problem}")


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _stored(config: Any, tensors: Mapping[str, Tensor], dtype: str) -> list[TensorToWrite]:
    """Returns the file's tensors, after checking that none is missing and none left over."""
    expected = {key: tuple(tensor.shape) for key, tensor in meta_model(config).state_dict().items()}
    names = {key: gguf_name(config, key) for key in expected}
    if left := [key for key in tensors if key not in expected]:
        raise ModelError(
            f"this {config.model_type} model has no tensor {left[0]}; merge or remove adapters "
            "first"
        )
    optional = {key for key in names if config.tie_word_embeddings and names[key] == HEAD}
    for key in optional & set(tensors):
        embedding = next(other for other in names if names[other] == EMBEDDING)
        if torch.equal(tensors[key], tensors[embedding]):
            del expected[key]
    if missing := [key for key in expected if key not in tensors and key not in optional]:
        raise ModelError(
            f"{missing[0]} is missing from the tensors of this {config.model_type} model"
        )

    stored = []
    for key, shape in expected.items():
        if key not in tensors:
            continue
        name = names[key]
        assert name is not None  # every tensor of an architecture written whole has one
        order = row_order(config, key, shape[0])
        kind = "f32" if len(shape) == 1 else "f16" if dtype == "q8_0" and shape[-1] % 32 else dtype
        stored.append(TensorToWrite(name, shape, kind, _reader(tensors, key, shape, order), key))
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = _rope_factors(config)
        shape = tuple(factors.shape)
        rope = TensorToWrite("rope_freqs.weight", shape, "f32", lambda: factors, "rope_freqs")
        stored.insert(0, rope)
    return stored


def _reader(
    tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...], order: Tensor | None
) -> Callable[[], Tensor]:
    """Returns a function that loads a tensor in llama.cpp's order of rows and checks its shape."""

    def read() -> Tensor:
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{key} has the shape {tuple(tensor.shape)}, the model's config says {shape}"
            )
        return tensor if order is None else tensor[order.to(tensor.device)]

    return read


def _rope_factors(config: Any) -> Tensor:
    """Returns what llama.cpp divides each rotation's frequency by, for Llama 3's long contexts.

    (head_dim / 2,) float32.
    """
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = _head_dim(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (
        torch.arange(0, dim, 2, dtype=torch.float64) / dim
    )
    factors: Tensor = (plain / scaled.double()).float()
    return factors


def _add_hyperparameters(writer: Any, config: Any) -> None:
    """Adds shapes, norms and rotation under llama.cpp's keys.

    The context is no longer than the sliding window, if there is one: llama.cpp has no window for
    these architectures, and up to that length there is no difference.
    """
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(
        min(config.max_position_embeddings, window or config.max_position_embeddings)
    )
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(
            gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN
        )
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def read_model(path: Path, source: Path) -> nn.Module:
    """Reads a model that `write_model` wrote, in float32, to compare it with the trained one.

    Args:
        path: the file.
        source: the directory of the model that it was made from, for its config.

    Raises:
        ModelError: the file lacks a tensor of the model, or has another.
    """
    config = loading.config(source)
    reader = gguf.GGUFReader(path)
    in_file = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in reader.tensors
    }
    config.tie_word_embeddings = HEAD not in in_file
    state = {}
    for key, tensor in meta_model(config).state_dict().items():
        name = gguf_name(config, key)
        if name == HEAD and config.tie_word_embeddings:
            name = EMBEDDING
        if name not in in_file or in_file[name].shape != tensor.shape:
            raise ModelError(f"{path} does not hold {key} as {name}, {tuple(tensor.shape)}")
        order = row_order(config, key, tensor.shape[0])
        state[key] = in_file[name] if order is None else in_file[name][torch.argsort(order)]
    model: nn.Module = loading.model_from_config(
        transformers.AutoModelForCausalLM, config, dtype=torch.float32
    ).eval()
    model.load_state_dict(state)
    return model
