"""SmolLM2 with an adapter in llama.cpp itself: the same tokens, and the same probabilities.

Tiny models show the same in test_gguf_model.py and test_gguf_adapter.py, in each run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
import soak
from lorakin.cli.app import run
from lorakin.training.encoding import prompt_ids
from lorakin.training.model_sources import packaged
from lorakin.training.models import load_model
from peers import llama_cpp

REASON = llama_cpp.available()
pytestmark = [
    pytest.mark.peer,
    pytest.mark.model,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.skipif(not soak.is_slow(), reason="a real model: `make soak`, `make interop`"),
]

SUBJECTS = "rain,the sea,bread,a fox,music,the moon,tea,a train,winter,paper".split(",")
PROMPTS = [f"Write one sentence about {subject}." for subject in SUBJECTS] + [
    f"What is {subject}?" for subject in SUBJECTS
]
SAID = 10


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[list[int]], list[list[int]], list[torch.Tensor]]:
    """An adapter that changes much, the prompts, what it says to them, and its log-probabilities in
    each place of that.
    """
    loaded = load_model("smollm2", "float32")
    adapter = lk.adapt(loaded.model, lk.VeRA(rank=32), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    prompts = [prompt_ids(prompt, loaded.tokenizer) for prompt in PROMPTS]
    said: list[list[int]] = []
    logprobs = []
    settings: dict[str, Any] = {
        "max_new_tokens": SAID,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **settings
            )[0]
            said.append(out[len(prompt) :].tolist())
            logprobs.append(
                loaded.model(out[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            )
        with adapter.disabled():
            base = loaded.model(out[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert (base - logprobs[-1]).abs().max() > 1
    return adapter.save(tmp_path_factory.mktemp("served") / "adapter"), prompts, said, logprobs


@pytest.mark.parametrize("to", ["gguf", "gguf-merged"])
def test_llama_cpp_says_what_the_trained_model_says(to: str, trained: Any, tmp_path: Path) -> None:
    adapter, prompts, said, logprobs = trained
    out = tmp_path / "out"
    assert (
        run(
            [
                "export",
                str(adapter),
                "--to",
                to,
                "--dtype",
                "float32",
                "--out",
                str(out),
                "--no-verify",
            ]
        )
        == 0
    )
    if to == "gguf":
        model, loras = (
            llama_cpp.dequantise(packaged("smollm2"), tmp_path / "base.gguf"),
            [out / "adapter.gguf"],
        )
    else:
        model, loras = out / "model.gguf", []
    answers = llama_cpp.run(model, prompts, loras=loras, max_tokens=SAID)
    assert [answer.tokens for answer in answers] == said
    apart = [
        abs(value - float(row[token]))
        for answer, rows in zip(answers, logprobs, strict=True)
        for place, row in zip(answer.logprobs, rows, strict=True)
        for token, value in place.items()
    ]
    assert len(apart) == len(PROMPTS) * SAID * 50 and max(apart) < 1e-3
    assert "<|im_start|>" in (out / "Modelfile").read_text()
