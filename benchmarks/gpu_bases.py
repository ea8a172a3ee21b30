"""The frozen bases of `benchmarks.gpu`: random weights of real shapes, made on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.subjects import LINEARS

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "length": 32,
    },
    "135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "length": 2048,
    },
    "1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "tie_word_embeddings": True, "length": 2048,
    },
    "8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "length": 2048,
    },
}  # fmt: skip
"""SmolLM2's, Llama-3.2-1B's and Llama-3-8B's."""
COMPILED_LAYERS = 2
TOTAL_STEPS = 10_000
"""Of the runs whose steps are measured, for members that plan over a run."""


def config_of(shape: str, kind: str) -> Any:
    """Returns the config of a base."""
    settings = {key: value for key, value in SHAPES[shape].items() if key != "length"}
    if kind == "compiled":
        settings["num_hidden_layers"] = COMPILED_LAYERS
    return transformers.LlamaConfig(**settings, use_cache=False, pad_token_id=0)


def make_base(shape: str, kind: str) -> Any:
    """Returns a frozen model in training mode; `kind` as in `benchmarks.gpu_cells.Cell`."""
    torch.manual_seed(0)
    config = config_of(shape, kind)
    dtype = torch.float16 if kind == "float16" else torch.bfloat16
    if kind == "nf4":
        return _in_four_bits(config, dtype)
    with torch.device("cuda"), _default_dtype(dtype):
        model = transformers.LlamaForCausalLM(config)
    return model.train().requires_grad_(False)


def _in_four_bits(config: Any, dtype: torch.dtype) -> Any:
    """Makes and quantises one layer after another: the whole in `dtype` may not fit."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers, config.num_hidden_layers = config.num_hidden_layers, 0
    with torch.device("cuda"), _default_dtype(dtype):
        model = transformers.LlamaForCausalLM(config)
        config.num_hidden_layers = layers
        for number in range(layers):
            layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, number)
            for parent in list(layer.modules()):
                for name, child in list(parent.named_children()):
                    if name in LINEARS and isinstance(child, nn.Linear):
                        quantised = Linear4bit(
                            child.in_features, child.out_features, bias=False,
                            compute_dtype=dtype, quant_type="nf4", device="meta",
                        )  # fmt: skip
                        weight = (0.02 * torch.randn_like(child.weight)).cpu()
                        quantised.weight = Params4bit(weight, False, quant_type="nf4").to("cuda")
                        setattr(parent, name, quantised)
            model.model.layers.append(layer)
    return model.train().requires_grad_(False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
