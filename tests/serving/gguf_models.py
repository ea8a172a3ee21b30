"""Random models for the tests of GGUF files, and what llama.cpp says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor, nn

from lorakin.family import Pair
from lorakin.inject.layer_kinds import kind_of
from peers import llama_cpp
from serving.words import ROWS

llama = pytest.mark.skipif(llama_cpp.available() is not None, reason=str(llama_cpp.available()))


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of this kind with large weights, norms and biases, so that every mistake shows
    in the logits.
    """
    torch.manual_seed(3)
    settings = {
        "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with biases and wide heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": (
        "qwen3",
        {"head_dim": 128, "tie_word_embeddings": True},
    ),  # 128, as transformers takes for granted there
}


def prompt() -> list[int]:
    return torch.randint(3, 290, (60,), generator=torch.Generator().manual_seed(7)).tolist()


def places(model: Any) -> Tensor:
    """Log-probabilities after each token of the prompt, (places, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([prompt()])).logits[0].float().log_softmax(-1)


def in_llama(path: Path, *loras: Path) -> Tensor:
    """The same, as llama.cpp says."""
    (answer,) = llama_cpp.run(path, [prompt()], loras=loras, max_tokens=0, top=ROWS, score=True)
    return torch.tensor([[place[token] for token in range(ROWS)] for place in answer.prompt])


def random_pairs(model: Any, rank: int = 3, only: Any = lambda path: True) -> dict[str, Pair]:
    """A pair for each module with a matrix, of ranks that differ."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if (kind := kind_of(module)) and only(path):
            shape, k = kind.shape(module), rank + number % 2
            up, down = (
                torch.randn(shape.outputs, k, generator=generator),
                torch.randn(k, shape.inputs, generator=generator),
            )
            pairs[path] = Pair(up * 0.2, down * 0.1)
    return pairs


def apply_by_hand(model: Any, pairs: Mapping[str, Pair]) -> Any:
    """Add the pairs to the model's weights."""
    with torch.no_grad():
        for path, pair in pairs.items():
            module = model.get_submodule(path)
            change = pair.up @ pair.down
            module.weight += change if isinstance(module, nn.Linear) else change.T
    return model


def write_raw(
    path: Path,
    tensors: Mapping[str, Tensor],
    alpha: float | None = None,
    arch: str = "qwen2",
    kind: str = "lora",
    invocation: list[int] | None = None,
    quantised: bool = False,
) -> None:
    """An adapter file by the gguf library alone."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if invocation:
        writer.add_array("adapter.alora.invocation_tokens", invocation)
    for name, tensor in tensors.items():
        if quantised:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
