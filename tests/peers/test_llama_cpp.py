"""The llama.cpp harness itself, against transformers on the packaged model: the same tokens and probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from lorakin.training.model_sources import packaged
from lorakin.training.models import load_model
from peers import llama_cpp

REASON = llama_cpp.available()
pytestmark = [
    pytest.mark.peer,
    pytest.mark.model,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old man who",
]
TOKENS = 4
RANK, ALPHA = 3, 12.0
SITE = (
    "model.layers.3.mlp.down_proj",
    "blk.3.ffn_down.weight",
)  # one whose rows both projects order alike


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, list[list[int]]]:
    """The packaged model in float32, and the prompts' tokens."""
    loaded = load_model("smollm2", "float32")
    return loaded.model, [loaded.tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_cpp.dequantise(
        packaged("smollm2"), tmp_path_factory.mktemp("gguf") / "float32.gguf"
    )


def differences(model: Any, prompts: list[list[int]], answers: list[llama_cpp.Answer]) -> Tensor:
    """How far each log-probability in the answers is from transformers', at every place."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            theirs = (
                model(torch.tensor([prompt + answer.tokens])).logits[0].double().log_softmax(-1)
            )
        places = answer.prompt + answer.logprobs[1:]
        assert len(places) == len(prompt) + TOKENS - 1 and answer.prompt[-1] == answer.logprobs[0]
        for place, row in zip(
            places, theirs, strict=False
        ):  # the row after the last token has no counterpart
            found.append(torch.tensor(list(place.values())).double() - row[list(place)])
    return torch.cat(found).abs()


def adapter(path: Path, a: Tensor, b: Tensor) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    writer.add_tensor(f"{SITE[1]}.lora_a", a.numpy())
    writer.add_tensor(f"{SITE[1]}.lora_b", b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_as_transformers(
    smollm2: tuple[Any, list[list[int]]], float32: Path, tmp_path: Path
) -> None:
    model, prompts = smollm2
    base = llama_cpp.run(float32, prompts, max_tokens=TOKENS, score=True)
    for prompt, answer in zip(prompts, base, strict=True):
        chosen = model.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
        assert answer.tokens == chosen[0, len(prompt) :].tolist()
        assert [next(iter(place)) for place in answer.logprobs] == answer.tokens
        assert {len(place) for place in answer.prompt + answer.logprobs} == {50}
    assert differences(model, prompts, base).max() < 3e-4

    weight = model.get_submodule(SITE[0]).weight
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(shape, generator=generator) * 0.1
        for shape in ((RANK, weight.shape[1]), (weight.shape[0], RANK))
    )
    change = ALPHA / RANK * b @ a
    changed = llama_cpp.run(
        float32,
        prompts,
        loras=[adapter(tmp_path / "lora.gguf", a, b)],
        max_tokens=TOKENS,
        score=True,
    )
    assert differences(model, prompts, changed).max() > 0.05  # so what follows says something
    with torch.no_grad():
        weight += change
    try:
        assert differences(model, prompts, changed).max() < 3e-4
    finally:
        with torch.no_grad():
            weight -= change


def test_quantised(smollm2: tuple[Any, list[list[int]]]) -> None:
    model, prompts = smollm2
    answers = llama_cpp.run(packaged("smollm2"), prompts, max_tokens=TOKENS, score=True)
    far = differences(model, prompts, answers)
    assert (
        1e-3 < far.mean() < 0.3
    )  # activations rounded to 8 bits: not exact, and not another model


def test_refused_adapter(float32: Path) -> None:
    with pytest.raises(RuntimeError, match="expect general.type to be 'adapter', but got: model"):
        llama_cpp.run(float32, [[504]], loras=[float32], max_tokens=1)
